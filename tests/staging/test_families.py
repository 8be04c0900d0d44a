"""Families of classifiers in stages: the plain model's answers for whatever samples go on, in whatever order."""

import warnings
import zlib

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.ao import quantization

from adaptexit.exceptions import SplitError
from adaptexit.staging.cuts import propose_cuts
from adaptexit.staging.splitting import split

N_CLASSES = 10
N_CUTS = 3
TOLERANCE = 1e-4
DISTINCT = 1e-3
"""By how much of the largest logit any two samples differ at least: ten times what a wrong row could hide in."""


def words(text):
    return text.split()


TIMM = words("""
    resnet18 resnext50_32x4d resnest14d res2net50_14w_8s legacy_seresnet18 skresnet18 ecaresnet26t resnetv2_18
    resnetv2_50x1_bit resnetrs50 gcresnext26ts bat_resnext26ts nf_resnet26 eca_nfnet_l0 nf_regnet_b0 efficientnet_b0
    efficientnet_cc_b0_4e tf_efficientnetv2_b0 mixnet_s ghostnet_050 ghostnetv2_100 ghostnetv3_050 hardcorenas_a
    mobilenetv1_100 mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium_075
    mnasnet_small lcnet_035 tinynet_e fbnetc_100 spnasnet_100 tresnet_m vgg11 ese_vovnet19b_slim_dw selecsls42
    regnetx_002 regnety_002 regnetz_b16 densenet121 dla46_c dla60_res2net dpn48b hrnet_w18_small inception_v3
    inception_v4 inception_resnet_v2 xception41 legacy_xception nasnetalarge pnasnet5large mobileone_s0 repvgg_a0
    repvit_m0_9 repghostnet_050 fastvit_t8 edgenext_xx_small mobilevit_xxs mobilevitv2_050 convnext_atto
    convnextv2_atto inception_next_atto poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18 cs3darknet_focus_s
    cspresnet50 rexnet_100 gernet_s halonet26t lambda_resnet26t hgnetv2_b0 mambaout_femto starnet_s050 shvit_s1
    fasternet_t0 swiftformer_xs rdnet_tiny nextvit_small convmixer_768_32 csatv2 efficientvim_m1 lcnetv2_small
    iformer_t lowformer_b0 pvt_v2_b0 twins_svt_small twins_pcpvt_small efficientvit_b0 davit_tiny focalnet_tiny_srf
    crossvit_9_240 tiny_vit_5m_224 efficientformer_l1
""")
TOLD_THEIR_SIZE = words("""
    vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vit_relpos_small_patch16_224 vit_small_patch16_dinov3
    vit_small_patch16_rope_mixed_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224 beit_base_patch16_224
    eva02_tiny_patch14_224 flexivit_small samvit_base_patch16_224 swin_s3_tiny_224 swin_tiny_patch4_window7_224
    swinv2_tiny_window8_256 swinv2_cr_tiny_224 maxvit_pico_rw_256 coatnet_pico_rw_224 maxxvit_rmlp_nano_rw_256
    coat_tiny coat_lite_tiny tnt_s_patch16_224 cait_xxs24_224 xcit_nano_12_p16_224 mixer_s32_224 gmixer_12_224
    resmlp_12_224 gmlp_ti16_224 nest_tiny visformer_tiny convit_tiny mvitv2_tiny mvitv2_small_cls hiera_tiny_224
    gcvit_xxtiny volo_d1_224 pit_ti_224 pit_ti_distilled_224 levit_128s levit_conv_128s efficientvit_m0
    efficientformerv2_s0 sequencer2d_s vitamin_small_224 naflexvit_base_patch16_gap botnet26t_256 resnet50_clip
""")
TORCHVISION = words("""
    alexnet vgg11_bn resnet18 densenet121 googlenet inception_v3 squeezenet1_1 shufflenet_v2_x0_5 mobilenet_v2
    mobilenet_v3_small mnasnet0_5 efficientnet_b0 regnet_y_400mf convnext_tiny swin_t swin_v2_t vit_b_16 maxvit_t
""")
VARIANTS = words("""
    resnet10t resnet18d resnetaa34d resnetblur18 resnet32ts resnet50_gn resnet51q resnetv2_18d resnetv2_50d_frn
    resnetv2_50d_evos seresnext26ts eca_resnext26ts ecaresnetlight gcresnet33ts legacy_seresnext26_32x4d nf_seresnet26
    nf_ecaresnet26 resnest26d res2net50_48w_2s res2next50 skresnext50_32x4d densenetblur121d dla34 dla60x_c dpn68
    ese_vovnet19b_dw vovnet39a efficientnet_b0_gn efficientnet_es efficientnet_lite0 efficientnetv2_rw_t
    tf_efficientnet_b0 tf_mixnet_s tf_mobilenetv3_small_minimal_100 fbnetv3_b semnasnet_050 mobilenet_edgetpu_v2_xs
    mobilenetv1_100h mobilenetv4_conv_aa_medium rexnetr_100 cs3darknet_s cs3se_edgenet_x sedarknet21 cspnext_tiny
    darknet17 cpubone_nano edgenext_x_small fastvit_mci0 fastvit_sa12 mobileone_s1 repvgg_b0 repvit_m1 regnety_004
    regnetv_040 regnetz_005 hgnet_tiny inception_next_tiny convnext_femto_ols convnext_zepto_rms convnext_tiny_hnf
    convnextv2_pico mambaout_kobe starnet_s1 swiftformer_s efficientvit_b1 efficientvit_l1 iformer_s iformer_m_distilled
    lowformer_e1 selecsls60 xception41p efficientvim_m1_dist test_byobnet test_mambaout
""")
VARIANTS_TOLD = words("""
    vit_small_patch16_18x2_224 vit_base_patch16_xp_224 vit_dwee_patch16_reg1_gap_256 vit_relpos_small_patch16_rpn_224
    vit_srelpos_small_patch16_224 vit_small_patch14_reg4_dinov2 vit_xsmall_patch16_clip_224 vit_small_resnet26d_224
    vit_pe_core_tiny_patch16_384 vit_pe_spatial_tiny_patch16_512 vit_small_patch16_rope_ape_224 deit_tiny_patch16_224
    vit_medium_patch16_rope_reg1_gap_256 vit_wee_patch16_reg1_gap_256 beitv2_base_patch16_224 beit3_base_patch16_224
    test_vit test_vit2 test_vit3 test_vit4 test_vit_relpos test_maxvit test_coatnet coatnet_rmlp_nano_rw_224
    coatnext_nano_rw_224 coatnet_nano_cc_224 maxvit_rmlp_pico_rw_256 maxxvitv2_nano_rw_256 swinv2_cr_tiny_ns_224
    coat_mini coat_lite_mini xcit_tiny_12_p8_224 gcvit_xtiny levit_conv_192 levit_256d efficientvit_m2
    efficientformerv2_s1 pit_xs_224 nest_tiny_jx hiera_small_abswin_256 visformer_small naflexvit_base_patch16_par_gap
    volo_d2_224 cait_xxs36_224 eva02_small_patch14_224 qwen3_vit_88m sebotnet33ts_256 resnet50_clip_gap
""")
TOLD_THEIR_SIZE += VARIANTS_TOLD
FAMILIES = [*TIMM, *VARIANTS, *TOLD_THEIR_SIZE, *(f"torchvision/{name}" for name in TORCHVISION)]

SIDES = {
    "inception_v3": 96, "inception_v4": 96, "inception_resnet_v2": 96, "torchvision/inception_v3": 96,
    "swin_tiny_patch4_window7_224": 112, "swin_s3_tiny_224": 112, "convmixer_768_32": 56, "sequencer2d_s": 56,
    "eva02_tiny_patch14_224": 56, "bat_resnext26ts": 256, "halonet26t": 256, "crossvit_9_240": 240,
    "tiny_vit_5m_224": 224, "efficientformer_l1": 224,
}  # fmt: skip
"""Sides of the images that are not 64: what the family supports at least."""

OPTIONS = {
    "vgg11": {"mlp_ratio": 1 / 64},
    "nasnetalarge": {"num_features": 384},
    "beit_base_patch16_224": {"embed_dim": 192, "depth": 6, "num_heads": 3},
    "samvit_base_patch16_224": {"embed_dim": 192, "depth": 6, "num_heads": 3, "global_attn_indexes": [2, 5]},
    "naflexvit_base_patch16_gap": {"embed_dim": 192, "depth": 6, "num_heads": 3},
    "torchvision/vit_b_16": {"image_size": 64},
    "torchvision/googlenet": {"init_weights": False},
    "torchvision/inception_v3": {"init_weights": False},
}
"""What makes a family's smallest member smaller still, or its library quiet."""

FAST = ["torchvision/resnet18", "vit_tiny_patch16_224", "coat_lite_tiny", "levit_128s", "mobilevit_xxs"]
"""Of both libraries, some that are traced with values beside the graph, some with many live values."""

WIDE = {*VARIANTS, *VARIANTS_TOLD, "inception_v4", "pnasnet5large", "swin_s3_tiny_224", "torchvision/vgg11_bn"}
"""Made as another family is: of its blocks in another order, of other blocks in its network, or much larger."""

EVERY_FAMILY = [
    pytest.param(name, marks=pytest.mark.exhaustive if name in WIDE else pytest.mark.slow)
    for name in FAMILIES
    if name not in FAST
]

REFUSED = dict.fromkeys(
    ["crossvit_9_240", "tnt_s_patch16_224"],
    "none of its stages and blocks returns one tensor",
)
"""Families for which cuts cannot be chosen, or none of the choices can be split, and a piece of the reason."""

NAMED = {
    "crossvit_9_240": ["blocks.0.revert_projs.0", "blocks.0", "blocks.1"],
    "tnt_s_patch16_224": ["blocks.2", "blocks.5.norm1_proj", "blocks.8"],
}
"""Where those can be cut by name: their blocks return lists and tuples."""

SECOND_CHOICE = {}
"""Families whose first choice of cuts cannot be split, but a later one can, and a piece of the reason."""


def side(name):
    return SIDES.get(name, 64)


def images(name, n=8):
    """Images that differ in colour too, which pooling over the whole image keeps."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    shape = (n, 3, side(name), side(name))
    colour = torch.randn(n, 3, 1, 1, generator=generator)
    contrast = 0.5 + torch.rand(n, 1, 1, 1, generator=generator)
    return colour + contrast * torch.randn(shape, generator=generator)


def untrained(name):
    """The family's smallest member as its library makes it."""
    options = {"num_classes": N_CLASSES} | OPTIONS.get(name, {})
    if name in TOLD_THEIR_SIZE:
        options["img_size"] = side(name)
    if name == "torchvision/maxvit_t":
        return small_maxvit(**options).eval()
    if name.startswith("torchvision/"):
        return torchvision.models.get_model(name.removeprefix("torchvision/"), weights=None, **options).eval()
    return timm.create_model(name, pretrained=False, **options).eval()


def model_of(name):
    """The family's smallest member, as a trained one would be: no two samples alike, no block that does nothing.

    Heads and residual branches that start at zero, LayerScales of 1e-6 and the like are given random values, weights of
    0.02 grow. Batch normalisation takes the statistics of some images and leaves most ReLUs open: deep random networks
    would multiply rounding errors otherwise.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = untrained(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.amin() == parameter.amax():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            elif parameter.ndim > 1:
                at_least = parameter[0].numel() ** -0.5
                parameter *= (at_least / parameter.std()).clamp_min(1.0)
    normalising = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    handles = [part.register_forward_pre_hook(take_statistics) for part in normalising]
    with torch.no_grad():
        model(images(name))
    for handle in handles:
        handle.remove()
    return model


def small_maxvit(**options):
    """torchvision's maxvit_t for small images, which its builder does not make."""
    return torchvision.models.MaxVit(
        input_size=(64, 64), stem_channels=64, partition_size=2, block_channels=[64, 128, 256, 512],
        block_layers=[2, 2, 5, 2], head_dim=32, stochastic_depth_prob=0.2, **options,
    )  # fmt: skip


def take_statistics(norm, inputs):
    """Of the inputs; a channel that hardly varies in them is not blown up."""
    axes = [axis for axis in range(inputs[0].ndim) if axis != 1]
    variance = inputs[0].var(axes)
    norm.running_mean.copy_(inputs[0].mean(axes))
    norm.running_var.copy_(variance + 0.1 * variance.mean() + 1e-3)
    if norm.affine:
        norm.bias += 1


def made_stages(model, example):
    """The first of the proposals that can be split, and what those before it were refused for."""
    refusals = []
    try:
        for cuts in propose_cuts(model, example[:2], n=N_CUTS):
            try:
                return split(model, cuts, example), refusals
            except SplitError as error:
                refusals.append(str(error))
    except ValueError as error:
        refusals.append(str(error))
    return None, refusals


def staged_at_random(parts, x, rng):
    """Answers of those who stay to the end and who they are, after random samples left at every cut."""
    carried, who = x, np.arange(len(x))
    for k in range(parts.n_stages):
        carried = parts.run(k, carried)
        if k < len(parts.cuts):
            staying = rng.permutation(len(who))[: rng.integers(max(1, len(who) // 2), len(who) + 1)]
            first, second = np.split(staying, [rng.integers(1, len(staying) + 1)])
            carried = carried.taken(first).joined([carried.taken(second)] if len(second) else [])
            who = who[staying]
    return carried.feature, who


def assert_all_distinct(logits):
    apart = (logits[:, None] - logits).abs().amax(dim=2) + torch.eye(len(logits)) * torch.inf
    assert apart.nan_to_num(torch.inf).amin() > DISTINCT * logits.abs().amax()


def assert_equal(answers, expected, scale):
    assert answers.shape == expected.shape
    assert (answers - expected).abs().amax() <= TOLERANCE * scale


def assert_staged_equals_plain(name, made_into=lambda model: model):
    model, x = made_into(model_of(name)), images(name)
    parts, refusals = made_stages(model, x)
    expected_refusal = REFUSED.get(name) or SECOND_CHOICE.get(name)
    assert (parts is None) == (name in REFUSED), refusals
    assert bool(refusals) == bool(expected_refusal), refusals
    assert not refusals or expected_refusal in refusals[0]
    if parts is None:
        parts = split(model, NAMED[name], x)
    assert_stages_equal(parts, model, x)


def assert_stages_equal(parts, model, x):
    rng = np.random.default_rng(zlib.crc32(str(parts).encode()))
    with torch.inference_mode():
        for size in (1, 3, 8):
            batch = x[-size:]
            expected = model(batch)
            assert expected.shape == (size, N_CLASSES)
            scale = expected.abs().amax()
            if size == 8:
                assert_all_distinct(expected)
            answers, who = staged_at_random(parts, batch, rng)
            assert_equal(answers, expected[who], scale)


@pytest.mark.parametrize("name", FAST)
def test_staged_equals_plain_for_whoever_stays(name):
    assert_staged_equals_plain(name)


@pytest.mark.usefixtures("freed")
@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_staged_equals_plain_for_whoever_stays_in_every_family(name):
    assert_staged_equals_plain(name)


# -- wrapped, compiled and quantised -----------------------------------------------------------------------------------


class Around(nn.Module):
    """A model as a part of another."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x):
        return self.model(x) * 0.5


def compiled(model):
    return torch.compile(model, backend="eager")


def in_half_precision(model):
    """With weights quantised to half precision, which needs no scales."""
    return quietly(quantization.quantize_dynamic, model, {nn.Linear}, dtype=torch.float16).eval()


def dynamically_quantised(model):
    return quietly(quantization.quantize_dynamic, model, {nn.Linear}, dtype=torch.qint8).eval()


def statically_quantised(model, x):
    model = nn.Sequential(quantization.QuantStub(), model, quantization.DeQuantStub()).eval()
    model.qconfig = quantization.get_default_qconfig()
    quietly(quantization.prepare, model, inplace=True)
    with torch.no_grad():
        model(x)
    return quietly(quantization.convert, model).eval()


def quietly(make, *args, **options):
    """Without what torch says of its own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **options)


@pytest.mark.parametrize(
    ("name", "made_into"),
    [
        ("test_byobnet", nn.DataParallel),
        ("test_vit", nn.DataParallel),
        ("test_vit2", Around),
        ("test_vit", in_half_precision),
        pytest.param("test_byobnet", compiled, marks=pytest.mark.slow),
        pytest.param("torchvision/resnet18", Around, marks=pytest.mark.slow),
        pytest.param("coat_lite_tiny", in_half_precision, marks=pytest.mark.slow),
        pytest.param("mobilevit_xxs", in_half_precision, marks=pytest.mark.slow),
    ],
)
def test_models_in_another_form(name, made_into):
    assert_staged_equals_plain(name, made_into)


def test_convolutions_quantised_statically():
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Conv2d(i, o, 3, 2, 1) for i, o in [(3, 16), (16, 32), (32, 64)]]
    blocks = [nn.Sequential(layer, nn.ReLU()) for layer in layers]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, N_CLASSES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    x = images("quantised")
    model = statically_quantised(model, x)
    assert_stages_equal(split(model, ["1.0", "1.1"], x), model, x)


@pytest.mark.parametrize("name", ["test_vit", "test_byobnet"])
def test_models_quantised_dynamically_are_refused_with_the_reason(name):
    model, x = dynamically_quantised(model_of(name)), images(name)
    with pytest.raises(SplitError, match=r"quantised dynamically, with scales taken from the whole batch"):
        split(model, [propose_cuts(model_of(name), x[:2], n=1)[0][0]], x)
