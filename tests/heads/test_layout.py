import json
import math
from dataclasses import asdict

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer

from adaptexit.heads.layout import AXES, FeatureSpec, as_map, map_size, pooled, positions
from adaptexit.heads.layout_inference import feature_spec


def features_of(net, cuts, size):
    """What the modules at the cuts return for two images, by cut."""
    features = {}
    hooks = [
        net.get_submodule(cut).register_forward_hook(
            lambda module, inputs, output, cut=cut: features.update({cut: output})
        )
        for cut in cuts
    ]
    with torch.inference_mode():
        net.eval()(torch.zeros(2, 3, *size, device=next(net.parameters()).device))
    for hook in hooks:
        hook.remove()
    return features


def feature_of(net, cut, size):
    return features_of(net, [cut], size)[cut]


def timm_model(name, **kwargs):
    with torch.device("meta"):  # shapes without work
        return timm.create_model(name, pretrained=False, **kwargs)


def torchvision_vit():
    return VisionTransformer(32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=36, mlp_dim=32, num_classes=3)


def torchvision_swin(embed_dim=32):
    return SwinTransformer([4, 4], embed_dim, [1, 1], [2, 2], window_size=[2, 2], num_classes=3)


class Opaque(nn.Module):
    """A cut that says nothing of itself, with attributes on the model around it."""

    def __init__(self, cut=None, **attributes):
        super().__init__()
        self.cut = nn.Identity() if cut is None else cut
        for name, value in attributes.items():
            setattr(self, name, value)


def spec_of(module, *shape, size=(64, 64), cut="cut", **kwargs):
    return feature_spec(module, cut, torch.empty(2, *shape), (3, *size), **kwargs)


MODELS = [
    ("resnet18", {}, (64, 96), {"layer2": ("NCHW", 128, 0, (8, 12)), "act1": ("NCHW", 64, 0, (32, 48))}),
    ("resnet18", {}, (256, 256), {"layer1": ("NCHW", 64, 0, (64, 64)), "layer1.0": ("NCHW", 64, 0, (64, 64))}),
    ("densenet121", {}, (64, 64), {"features.transition1.conv": ("NCHW", 128, 0, (16, 16))}),
    ("inception_v3", {}, (299, 299), {"Mixed_5d": ("NCHW", 288, 0, (35, 35))}),
    (
        "mobilenetv3_small_050",
        {},
        (64, 64),
        {
            "blocks.1": ("NCHW", 16, 0, (8, 8)),
            "conv_head": ("NCHW", 1024, 0, (1, 1)),
            "flatten": ("NC", 1024, 0, (1, 1)),
        },
    ),
    (
        "swin_tiny_patch4_window7_224",
        {},
        (224, 224),
        {
            "patch_embed.proj": ("NCHW", 96, 0, (56, 56)),
            "layers.0": ("NHWC", 96, 0, (56, 56)),
            "layers.1.blocks.0": ("NHWC", 192, 0, (28, 28)),
            "layers.2": ("NHWC", 384, 0, (14, 14)),
            "layers.3": ("NHWC", 768, 0, (7, 7)),
        },
    ),
    ("swin_tiny_patch4_window7_224", {"img_size": 384}, (384, 384), {"layers.0": ("NHWC", 96, 0, (96, 96))}),
    ("vit_tiny_patch16_224", {"depth": 2}, (224, 224), {"blocks.1": ("NLC", 192, 1, (14, 14))}),
    ("vit_large_patch16_224", {"depth": 1}, (224, 224), {"patch_embed": ("NLC", 1024, 0, (14, 14))}),
    ("deit_tiny_distilled_patch16_224", {"depth": 2}, (224, 224), {"blocks.0": ("NLC", 192, 2, (14, 14))}),
    (
        "vit_small_patch14_reg4_dinov2",
        {"depth": 1, "dynamic_img_size": True},
        (252, 308),
        {"blocks.0": ("NLC", 384, 5, (18, 22)), "patch_embed.norm": ("NHWC", 384, 0, (18, 22))},
    ),
    (
        "cait_xxs24_224",
        {"depth": 1},
        (224, 224),
        {"blocks.0": ("NLC", 192, 0, (14, 14)), "norm": ("NLC", 192, 1, (14, 14))},
    ),
    (
        "coat_lite_tiny",
        {"img_size": (64, 128)},
        (64, 128),
        {
            "serial_blocks2.0.factoratt_crpe.proj": ("NLC", 128, 1, (8, 16)),
            "serial_blocks4.0.mlp.fc2": ("NLC", 320, 1, (2, 4)),
        },
    ),
    (
        "mixer_s32_224",
        {},
        (224, 224),
        {"blocks.0": ("NLC", 512, 0, (7, 7)), "blocks.0.mlp_tokens": ("NCL", 512, 0, (7, 7))},
    ),
    (
        "maxvit_nano_rw_256",
        {},
        (256, 256),
        {"stem": ("NCHW", 64, 0, (128, 128)), "stages.0": ("NCHW", 64, 0, (64, 64))},
    ),
    ("volo_d1_224", {}, (224, 224), {"network.0": ("NHWC", 192, 0, (28, 28)), "norm": ("NLC", 384, 1, (14, 14))}),
    ("levit_128s", {}, (224, 224), {"stages.1": ("NLC", 256, 0, (7, 7))}),
    ("focalnet_tiny_srf", {}, (64, 64), {"layers.1": ("NCHW", 192, 0, (8, 8))}),
]


LARGE = ["inception_v3", "maxvit_nano_rw_256", "volo_d1_224"]


@pytest.mark.parametrize(
    ("name", "kwargs", "size", "expected"),
    [
        pytest.param(*model, marks=pytest.mark.slow if model[0] in LARGE else (), id=f"{model[0]}-{model[2]}")
        for model in MODELS
    ],
)
def test_layouts_of_timm_models(name, kwargs, size, expected):
    net = timm_model(name, **kwargs)
    specs = {}
    for cut, feature in features_of(net, expected, size).items():
        spec = feature_spec(net, cut, feature, (3, *size))
        specs[cut] = (spec.layout, spec.channels, spec.prefix_tokens, spec.grid)
    assert specs == expected


@pytest.mark.parametrize(
    ("make", "size", "cut", "expected"),
    [
        (torchvision_vit, (32, 32), "encoder.layers.encoder_layer_1", ("NLC", 36, 1, (4, 4))),
        (torchvision_vit, (32, 32), "conv_proj", ("NCHW", 36, 0, (4, 4))),
        (torchvision_swin, (64, 96), "features.1", ("NHWC", 32, 0, (16, 24))),
        (torchvision_swin, (64, 96), "features.2", ("NHWC", 64, 0, (8, 12))),
        (torchvision_swin, (64, 96), "features.0.0", ("NCHW", 32, 0, (16, 24))),
        (lambda: torchvision.models.resnet18(num_classes=3), (256, 256), "layer1", ("NCHW", 64, 0, (64, 64))),
    ],
)
def test_layouts_of_torchvision_models(make, size, cut, expected):
    net = make()
    spec = feature_spec(net, cut, feature_of(net, cut, size), (3, *size))
    assert (spec.layout, spec.channels, spec.prefix_tokens, spec.grid) == expected


def test_a_class_token_alone_is_what_there_is():
    net = timm_model("cait_xxs24_224", depth=1)
    spec = feature_spec(net, "blocks_token_only.0", torch.empty(2, 1, 192), (3, 224, 224))
    assert (spec.layout, spec.channels, spec.n_positions, map_size(spec)) == ("NLC", 192, 1, (1, 1))
    x = torch.randn(2, 1, 192)
    assert torch.equal(pooled(x, spec), x[:, 0])


def test_a_wrapped_model_tells_the_same():
    model = nn.ModuleDict({"net": timm_model("swin_tiny_patch4_window7_224", img_size=384)})
    assert spec_of(model, 96, 96, 96, size=(384, 384), cut="net.layers.0").layout == "NHWC"


@pytest.mark.parametrize(
    ("module", "layout"),
    [
        (Opaque(output_fmt="NHWC"), "NHWC"),
        (Opaque(output_fmt=timm.layers.Format.NHWC), "NHWC"),
        (Opaque(output_fmt="NCHW"), "NCHW"),
        (Opaque(Opaque(output_fmt="NHWC")), "NHWC"),
        (Opaque(Opaque(output_fmt="NCHW"), output_fmt="NHWC"), "NCHW"),
        (Opaque(feature_info=[{"module": "cut", "num_chs": 16, "reduction": 4}]), "NCHW"),
        (Opaque(feature_info=[{"module": "cut", "num_chs": 16, "reduction": 4}], output_fmt="NHWC"), "NHWC"),
        (Opaque(nn.Conv2d(3, 16, 1), output_fmt="NHWC"), "NCHW"),
        (Opaque(nn.Sequential(nn.LayerNorm(3), nn.MaxPool2d(2))), "NCHW"),
        (Opaque(nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU())), "NCHW"),
    ],
)
def test_hints_decide_where_the_geometry_does_not(module, layout):
    assert spec_of(module, 16, 16, 16).layout == layout


@pytest.mark.parametrize(
    "module",
    [
        Opaque(),
        Opaque(feature_info=[{"module": "other", "num_chs": 16, "reduction": 4}]),
        Opaque(nn.Sequential(nn.Conv2d(3, 16, 1), nn.LayerNorm(16))),
        Opaque(output_fmt="unheard of"),
    ],
)
@pytest.mark.parametrize("shape", [(16, 16, 16), (256, 256)])
def test_nothing_is_guessed(module, shape):
    with pytest.raises(ValueError, match=r"cut 'cut' cannot be inferred: shape .*fits N.* as well as N.*layout=N"):
        spec_of(module, *shape)
    for layout in ("NCHW", "NHWC") if len(shape) == 3 else ("NLC", "NCL"):
        assert spec_of(module, *shape, layout=layout).layout == layout


def test_torchvision_swin_with_as_many_channels_as_rows_is_refused():
    net = torchvision_swin(embed_dim=16)
    with pytest.raises(ValueError, match=r"'features.1' cannot be inferred: shape \(16, 16, 16\)"):
        feature_spec(net, "features.1", feature_of(net, "features.1", (64, 64)), (3, 64, 64))


def test_a_block_inside_a_hybrid_is_not_taken_for_its_stage():
    with pytest.raises(ValueError, match="cannot be inferred"):
        spec_of(timm_model("maxvit_nano_rw_256"), 64, 64, 64, size=(256, 256), cut="stages.0.blocks.0")


@pytest.mark.parametrize(
    ("shape", "size", "layout"),
    [
        ((24, 8, 12), (64, 96), "NCHW"),
        ((8, 12, 24), (64, 96), "NHWC"),
        ((8, 8, 12), (64, 96), "NCHW"),
        ((12, 8, 12), (64, 96), "NCHW"),
        ((8, 12, 8), (64, 96), "NHWC"),
        ((32, 7, 10), (50, 75), "NCHW"),
    ],
)
@pytest.mark.parametrize("output_fmt", [None, "NHWC", "NCHW"])
def test_geometry_overrules_hints_that_do_not_fit(shape, size, layout, output_fmt):
    assert spec_of(Opaque(output_fmt=output_fmt), *shape, size=size).layout == layout


@pytest.mark.parametrize(
    ("module", "shape", "layout"),
    [
        (Opaque(embed_dim=256), (64, 256), "NLC"),
        (Opaque(hidden_dim=64), (64, 256), "NCL"),
        (Opaque(feature_info=[{"module": "cut", "num_chs": 64}], embed_dim=256), (64, 256), "NCL"),
        (Opaque(nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256))), (64, 256), "NLC"),
        (Opaque(nn.Sequential(nn.LayerNorm(64))), (64, 256), "NCL"),
        (Opaque(output_fmt="NLC"), (64, 64), "NLC"),
        (Opaque(num_prefix_tokens=1), (65, 256), "NLC"),
    ],
)
def test_hints_for_tokens(module, shape, layout):
    assert spec_of(module, *shape).layout == layout


def test_a_width_inside_a_stage_is_the_stages():
    stage = {"module": "cut", "num_chs": 256}
    module = Opaque(nn.Sequential(nn.Identity()), feature_info=[stage, {"module": "early", "num_chs": 64}])
    assert spec_of(module, 64, 256, cut="cut.0").layout == "NLC"


def test_maps_inside_a_stage_need_not_have_its_width():
    assert (
        spec_of(
            Opaque(nn.Sequential(nn.Identity()), feature_info=[{"module": "cut", "num_chs": 16}]),
            24,
            16,
            16,
            cut="cut.0",
        ).layout
        == "NCHW"
    )


@pytest.mark.parametrize(
    ("n_tokens", "size", "prefix", "grid"),
    [
        (2, (64, 64), 2, None),
        (18, (64, 64), 2, (4, 4)),
        (16, (64, 64), 0, (4, 4)),
        (396, (252, 308), 0, (18, 22)),  # less 2 they are no grid
        (398, (252, 308), 2, (18, 22)),
    ],
)
@pytest.mark.parametrize("width", [31, 62])
def test_prefix_tokens_are_those_that_leave_a_grid(n_tokens, size, prefix, grid, width):
    by_number = Opaque(num_prefix_tokens=2)
    by_token = Opaque(cls_token=nn.Parameter(torch.zeros(1, 2, 31)))
    for module in [by_number, by_token] if n_tokens != 2 else [by_number]:
        spec = spec_of(module, n_tokens, width, size=size)
        assert (spec.layout, spec.prefix_tokens, spec.grid) == ("NLC", prefix, grid)


def test_of_two_grids_the_one_with_the_inputs_proportions_is_taken():
    assert spec_of(Opaque(num_prefix_tokens=5), 396, 31, size=(256, 320)).grid == (18, 22)  # 391 could be 17x23
    assert spec_of(Opaque(), 2, 30, size=(96, 64), layout="NLC").grid == (2, 1)
    assert spec_of(Opaque(), 2, 30, size=(64, 96), layout="NLC").grid == (1, 2)


def test_a_width_told_for_another_axis_forbids_the_only_layout_that_fits():
    assert spec_of(Opaque(), 64, 67).layout == "NLC"
    with pytest.raises(ValueError, match="no grid as NLC or NCL"):
        spec_of(Opaque(embed_dim=64), 64, 67)  # 67 positions lie on no grid


def test_tokens_with_an_unknown_prefix_and_a_square_width_are_not_taken_for_channels():
    with pytest.raises(ValueError, match="fits NCL, and the model says nothing"):
        spec_of(Opaque(), 67, 64)
    assert spec_of(Opaque(embed_dim=67), 67, 64).layout == "NCL"
    assert spec_of(Opaque(output_fmt="NCL"), 67, 64).layout == "NCL"


@pytest.mark.parametrize("shape", [(11, 24, 40), (23, 29), (200, 200, 24)])
def test_shapes_without_a_grid_are_refused(shape):
    with pytest.raises(ValueError, match=r"fits no grid as .* Pass layout="):
        spec_of(Opaque(), *shape)


def test_maps_and_tokens_need_images():
    with pytest.raises(ValueError, match=r"inputs of shape \(30,\)"):
        feature_spec(Opaque(), "cut", torch.empty(2, 8, 4, 4), (30,))
    assert feature_spec(Opaque(), "cut", torch.empty(2, 8), (30,)) == FeatureSpec((8,), "NC")
    spec = feature_spec(Opaque(), "cut", torch.empty(2, 8, 9), (30,), layout="NCL")
    assert (spec.channels, spec.n_positions, spec.grid) == (8, 9, (3, 3))


def test_a_given_layout_is_taken_without_a_grid():
    spec = spec_of(Opaque(num_prefix_tokens=2), 31, 8, layout="NLC")
    assert (spec.prefix_tokens, spec.n_positions, spec.grid) == (2, 29, None)
    with pytest.raises(ValueError, match="29 of them"):
        as_map(torch.zeros(1, 31, 8), spec)


@pytest.mark.parametrize("shape", [(31,), (1, 31), (1, 1, 31)])
@pytest.mark.parametrize("name", ["class_embedding", "cls_token", "class_token"])
@pytest.mark.parametrize("layout", [None, "NLC"])
def test_class_tokens_are_found_however_they_are_stored(shape, name, layout):
    module = Opaque(**{name: nn.Parameter(torch.zeros(shape))})
    assert spec_of(module, 17, 31, layout=layout) == FeatureSpec((17, 31), "NLC", 1, (4, 4))


def test_several_tokens_stored_without_an_axis_for_samples():
    module = Opaque(cls_token=nn.Parameter(torch.zeros(31)), register_tokens=nn.Parameter(torch.zeros(4, 31)))
    assert spec_of(module, 21, 31) == FeatureSpec((21, 31), "NLC", 5, (4, 4))


@pytest.mark.parametrize(("n_tokens", "extra", "words"), [(17, 1, "1 of them is no patch"), (21, 5, "5 of them are")])
def test_class_tokens_that_nothing_names_can_be_told(n_tokens, extra, words):
    with pytest.raises(
        ValueError, match=rf"'cut' are: {n_tokens} .*but 16 would, .*Pass layout='NLC\+{extra}' .*{words}"
    ):
        spec_of(Opaque(), n_tokens, 31, layout="NLC")
    told = spec_of(Opaque(), n_tokens, 31, layout=f"NLC+{extra}")
    assert told == FeatureSpec((n_tokens, 31), "NLC", extra, (4, 4))
    assert pooled(torch.arange(float(n_tokens))[None, :, None].expand(1, -1, 31), told)[0, 0] == extra + 7.5
    none = spec_of(Opaque(), n_tokens, 31, layout="NLC+0")
    assert (none.prefix_tokens, none.n_positions) == (0, n_tokens)


def test_more_class_tokens_than_tokens_cannot_be_told():
    with pytest.raises(ValueError, match="prefix_tokens must be from 0 to the number of tokens, 17"):
        spec_of(Opaque(), 17, 31, layout="NLC+18")
    with pytest.raises(ValueError, match="layout NLC needs 2 axes"):
        spec_of(Opaque(), 17, layout="NLC+1")


@pytest.mark.parametrize(
    ("feature", "words"),
    [
        ([torch.zeros(2, 4), torch.zeros(2, 8, 3)], r"a list of 2 \(tensor \(2, 4\), tensor \(2, 8, 3\)\)"),
        ((torch.zeros(2, 4), (7, 7)), "a tuple of 2"),
        ({"low": torch.zeros(2, 4)}, r"a dict with keys \['low'\]"),
        (None, "a NoneType"),
    ],
)
def test_features_that_are_not_one_tensor(feature, words):
    with pytest.raises(ValueError, match=f"cut 'here' must return one tensor.*{words}.*Choose a cut"):
        feature_spec(nn.Identity(), "here", feature, (3, 8, 8))


@pytest.mark.parametrize("shape", [(), (2, 3, 4, 5), (0,)])
def test_features_with_too_many_or_too_few_axes(shape):
    with pytest.raises(ValueError, match="1 to 3 axes"):
        spec_of(Opaque(), *shape)


def test_features_of_videos_are_told_what_would_do():
    net = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2))
    feature = net[0](torch.zeros(2, 3, 4, 8, 8))
    for layout in (None, "NCHW", "NCTHW"):
        with pytest.raises(ValueError, match=r"got shape \(2, 4, 4, 8, 8\).*frames \(C, T, H, W\), one behind"):
            feature_spec(net, "0", feature, (3, 4, 8, 8), layout)
    flat = nn.Flatten(2, 3)(feature)
    assert feature_spec(net, "0", flat, (3, 4, 8, 8), "NCHW").channels == 4


def test_lists_of_real_models_are_refused():
    net = timm_model("hrnet_w18_small")
    with pytest.raises(ValueError, match=r"'stage2' must return one tensor.*a list of 2"):
        feature_spec(net, "stage2", feature_of(net, "stage2", (64, 64)), (3, 64, 64))


@pytest.mark.parametrize(
    ("layout", "message"), [("nchw", "layout must be one of NC, NLC"), ("NLC", "NLC needs 2 axes.*NCHW, NHWC")]
)
def test_layouts_that_cannot_be(layout, message):
    with pytest.raises(ValueError, match=message):
        spec_of(Opaque(), 8, 4, 4, layout=layout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((5, 3), "NLC", 6), "prefix_tokens must be from 0"),
        (((3, 4, 4), "NCHW", 1), "prefix_tokens must be from 0"),
        (((5, 3), "NLC", 1, (1, 5)), "grid must be two sizes with product 4"),
        (((5, 3), "NX"), "layout must be one of"),
    ],
)
def test_specs_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureSpec(*arguments)


@pytest.mark.parametrize(
    ("spec", "channels", "n_positions", "grid"),
    [
        (FeatureSpec((5, 3, 4), "NCHW"), 5, 12, (3, 4)),
        (FeatureSpec((3, 4, 5), "NHWC"), 5, 12, (3, 4)),
        (FeatureSpec((14, 5), "NLC", 2, (3, 4)), 5, 12, (3, 4)),
        (FeatureSpec((2, 5), "NLC", 2), 5, 2, None),
        (FeatureSpec((5, 12), "NCL"), 5, 12, None),
        (FeatureSpec((5,), "NC"), 5, 1, (1, 1)),
    ],
)
def test_sizes_of_specs_and_their_way_through_json(spec, channels, n_positions, grid):
    assert (spec.channels, spec.n_positions, spec.grid) == (channels, n_positions, grid)
    assert FeatureSpec(**json.loads(json.dumps(asdict(spec)))) == spec
    assert hash(spec) == hash(FeatureSpec(**asdict(spec)))


def laid_out(vectors, grid, layout, prefix=0):
    """The same vectors (B, C, L) in each layout; prefix tokens are far off."""
    if layout == "NCHW":
        feature = vectors.unflatten(2, grid)
    elif layout == "NHWC":
        feature = vectors.unflatten(2, grid).permute(0, 2, 3, 1).contiguous()
    elif layout == "NCL":
        feature = vectors
    else:
        front = torch.full((len(vectors), prefix, vectors.shape[1]), 1e6, dtype=vectors.dtype)
        feature = torch.cat([front, vectors.transpose(1, 2)], dim=1)
    return feature, FeatureSpec(tuple(feature.shape[1:]), layout, prefix, grid)


@pytest.mark.parametrize(("layout", "prefix"), [("NCHW", 0), ("NHWC", 0), ("NCL", 0), ("NLC", 0), ("NLC", 3)])
def test_layouts_give_the_same_vectors(layout, prefix):
    vectors = torch.randn(2, 5, 12)
    feature, spec = laid_out(vectors, (3, 4), layout, prefix)
    assert torch.equal(positions(feature, spec), vectors)
    assert torch.equal(as_map(feature, spec), vectors.unflatten(2, (3, 4)))
    torch.testing.assert_close(pooled(feature, spec), vectors.mean(dim=2))
    assert positions(feature, spec).untyped_storage().data_ptr() == feature.untyped_storage().data_ptr()


def test_a_vector_is_a_map_of_one_position():
    x, spec = torch.randn(2, 5), FeatureSpec((5,), "NC")
    assert torch.equal(pooled(x, spec), x)
    assert torch.equal(positions(x, spec), x[:, :, None])
    assert torch.equal(as_map(x, spec), x[:, :, None, None])


def test_prefix_tokens_are_pooled_where_nothing_else_is():
    x, spec = torch.randn(2, 3, 5), FeatureSpec((3, 5), "NLC", 3)
    torch.testing.assert_close(pooled(x, spec), x.mean(dim=1))
    assert positions(x, spec).shape == (2, 5, 3)


def test_tokens_without_a_grid_are_a_square_or_no_map():
    x = torch.randn(2, 10, 5)
    square = as_map(x, FeatureSpec((10, 5), "NLC", 1))
    assert torch.equal(square, x[:, 1:].transpose(1, 2).reshape(2, 5, 3, 3))
    with pytest.raises(ValueError, match=r"tokens must lie on a grid.*10 of them"):
        as_map(x, FeatureSpec((10, 5), "NLC"))


def test_tokens_of_a_wide_image_keep_its_proportions():
    spec = spec_of(Opaque(embed_dim=5), 16, 5, size=(32, 128))
    assert spec.grid == (2, 8)  # although 16 tokens could be a square
    assert as_map(torch.zeros(1, 16, 5), spec).shape == (1, 5, 2, 8)


@pytest.mark.parametrize("layout", list(AXES))
@pytest.mark.parametrize("function", [pooled, positions, as_map])
def test_features_of_another_width_are_refused(layout, function):
    shape = {"NC": (5,), "NLC": (4, 5), "NCL": (5, 4), "NCHW": (5, 2, 2), "NHWC": (2, 2, 5)}[layout]
    spec = FeatureSpec(shape, layout)
    wrong = tuple(size + (size == 5) for size in shape)
    assert math.prod(wrong) != math.prod(shape)
    for bad in (wrong, (*shape, 1)):
        with pytest.raises(ValueError, match="feature must have shape"):
            function(torch.zeros(2, *bad), spec)


def test_maps_of_another_size_are_pooled_but_tokens_keep_their_grid():
    spec = FeatureSpec((5, 4, 4), "NCHW")
    assert pooled(torch.zeros(2, 5, 6, 7), spec).shape == (2, 5)
    with pytest.raises(ValueError, match="must have 4 positions, a grid of 2x2; got 9"):
        as_map(torch.zeros(2, 9, 5), FeatureSpec((4, 5), "NLC"))


def test_tokens_in_another_order_are_pooled_but_no_map():
    spec = FeatureSpec((16, 8), "NLC", grid=(4, 4), in_order=False)
    assert FeatureSpec(**json.loads(json.dumps(asdict(spec)))) == spec
    feature = torch.randn(2, 16, 8)
    assert torch.equal(pooled(feature, spec), feature.mean(1))
    for use in (lambda: as_map(feature, spec), lambda: map_size(spec)):
        with pytest.raises(ValueError, match=r"row by row .* the 16 of this feature .* Use a head that pools"):
            use()
