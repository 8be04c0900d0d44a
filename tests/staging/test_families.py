"""Families of classifiers in stages: the plain model's answers for whatever samples go on, in whatever order."""

import zlib

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

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
FAMILIES = [*TIMM, *TOLD_THEIR_SIZE, *(f"torchvision/{name}" for name in TORCHVISION)]

SIDES = {
    "inception_v3": 96, "inception_v4": 96, "inception_resnet_v2": 96, "torchvision/inception_v3": 96,
    "swin_tiny_patch4_window7_224": 112, "swin_s3_tiny_224": 112, "convmixer_768_32": 56, "sequencer2d_s": 56,
    "eva02_tiny_patch14_224": 56, "bat_resnext26ts": 256, "halonet26t": 256, "crossvit_9_240": 240,
    "tiny_vit_5m_224": 224, "efficientformer_l1": 224,
}  # fmt: skip
"""Sides of the images that are not 64: what the family supports at least."""

OPTIONS = {
    "torchvision/vit_b_16": {"image_size": 64},
    "torchvision/googlenet": {"init_weights": False},
    "torchvision/inception_v3": {"init_weights": False},
}

FAST = ["torchvision/resnet18", "vit_tiny_patch16_224", "coat_lite_tiny", "levit_128s", "mobilevit_xxs"]
"""Of both libraries, some that are traced with values beside the graph, some with many live values."""

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


def assert_staged_equals_plain(name):
    model, x = model_of(name), images(name)
    parts, refusals = made_stages(model, x)
    expected_refusal = REFUSED.get(name) or SECOND_CHOICE.get(name)
    assert (parts is None) == (name in REFUSED), refusals
    assert bool(refusals) == bool(expected_refusal), refusals
    assert not refusals or expected_refusal in refusals[0]
    if parts is None:
        parts = split(model, NAMED[name], x)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
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


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in FAST])
def test_staged_equals_plain_for_whoever_stays_in_every_family(name):
    assert_staged_equals_plain(name)
