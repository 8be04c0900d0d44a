import copy
import dataclasses
import json
import warnings

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn

from adaptexit import InputWarning
from adaptexit.networks.models import build_model
from adaptexit.networks.preprocessing import (
    TimmPreprocess,
    described_preprocess,
    preprocess_of,
    restored_preprocess,
)

PREPROCESS = TimmPreprocess((40, 40), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), "bicubic")


def picture(height, width, seed=0, low=0, high=256):
    """A PIL image and the same as a tensor (1, 3, H, W), uint8."""
    image = Image.fromarray(np.random.default_rng(seed).integers(low, high, (height, width, 3), dtype=np.uint8))
    return image, torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def timm_transform(preprocess, crop_pct=1.0):
    return create_transform(
        (3, *preprocess.size),
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=crop_pct,
        crop_mode=preprocess.crop_mode,
    )


# -- as timm does ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 40), (60, 40), (40, 77)])
def test_images_whose_shorter_side_fits_are_treated_as_by_timm(shape):
    image, pixels = picture(*shape)
    expected = timm_transform(PREPROCESS)(image)[None]
    assert expected.shape == (1, 3, 40, 40)
    torch.testing.assert_close(PREPROCESS(pixels / 255), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(PREPROCESS(pixels), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(20, 20), (55, 55), (130, 91), (30, 80), (80, 27)])
def test_other_sizes_are_resized_as_by_timm(shape, interpolation, crop_mode):
    preprocess = TimmPreprocess((40, 40), PREPROCESS.mean, PREPROCESS.std, interpolation, crop_mode)
    image, pixels = picture(*shape, low=60, high=200)
    expected = timm_transform(preprocess)(image)[None]
    grey_level = 1 / 255 / min(PREPROCESS.std)
    torch.testing.assert_close(preprocess(pixels / 255), expected, rtol=0, atol=1.5 * grey_level)


def test_resized_images_stay_within_0_and_1():
    plain = TimmPreprocess((40, 40), (0.0,) * 3, (1.0,) * 3, "bicubic")
    x = plain(picture(20, 20)[1] / 255)
    assert x.min() == 0.0
    assert x.max() == 1.0


def test_an_input_size_that_is_not_square():
    preprocess = TimmPreprocess((30, 50), (0.5,), (0.5,), "bilinear")
    ramp = torch.linspace(0, 1, 100).expand(1, 1, 90, 100)
    out = preprocess(ramp)
    assert out.shape == (1, 1, 30, 50)
    torch.testing.assert_close(out[0, 0, 0], out[0, 0, 29])
    assert (out[0, 0, 0].diff() > 0).all()


def test_a_batch_is_preprocessed_image_by_image():
    batch = torch.cat([picture(50, 60, seed)[1] for seed in range(3)])
    assert torch.equal(PREPROCESS(batch)[1:2], PREPROCESS(batch[1:2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floats_become_single_precision(dtype):
    x = picture(40, 40)[1] / 255
    assert PREPROCESS(x.to(dtype)).dtype == torch.float32
    torch.testing.assert_close(PREPROCESS(x.to(dtype)), PREPROCESS(x), rtol=0, atol=5e-3)


def test_the_input_is_not_changed():
    x = torch.rand(1, 3, 40, 40)
    before = x.clone()
    PREPROCESS(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("value", [-0.5, 1.5, 255.0])
def test_values_outside_0_and_1(value):
    x = torch.full((1, 3, 40, 40), 0.5)
    x[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"X must hold images in \[0, 1\] \(or uint8\).*got values from.*normalised"):
        PREPROCESS(x)


@pytest.mark.parametrize("shape", [(2, 1, 40, 40), (2, 40, 40, 3), (3, 40, 40), (2, 12)])
def test_images_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"X must be images of shape \(N, 3, H, W\) for this model; got shape \("):
        PREPROCESS(torch.zeros(shape))


def test_the_data_config_of_a_timm_model():
    net = timm.create_model("test_vit", num_classes=3)
    known = TimmPreprocess.of(net)
    config = net.pretrained_cfg
    assert known.size == config["input_size"][1:]
    assert (known.mean, known.std, known.interpolation) == (config["mean"], config["std"], config["interpolation"])


# -- integers ---------------------------------------------------------------------------------------------------------

INTEGERS = [torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]


class Processor:
    """As image processors of transformers are called."""

    model_input_names = ("pixel_values",)

    def __call__(self, images, return_tensors, do_rescale=True):
        x = torch.stack(images)
        return {"pixel_values": x.float() / 255 if do_rescale else x}


@pytest.mark.parametrize("preprocess", [PREPROCESS, preprocess_of(nn.Identity(), Processor(), "base")])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_bytes_whatever_their_type(dtype, preprocess):
    pixels = picture(40, 40)[1]
    expected = preprocess(pixels)
    assert expected.std() > 0.1
    assert torch.equal(preprocess(pixels.to(dtype)), expected)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_above_a_byte_are_refused(dtype):
    x = picture(40, 40)[1].to(torch.int32) * 257
    message = r"X must hold integers in 0 \.\.\. 255, or floats in \[0, 1\]; got values from 0 to .*Divide by .*65535"
    with pytest.raises(ValueError, match=message):
        PREPROCESS((x // 4).to(dtype))
    if dtype in (torch.int16, torch.int32, torch.int64):
        with pytest.raises(ValueError, match="got values from -1 to 0"):
            PREPROCESS(torch.zeros(1, 3, 40, 40, dtype=dtype).index_fill(3, torch.tensor([2]), -1))


def test_bitmaps_are_black_and_white():
    bits = picture(40, 40)[1] > 127
    assert torch.equal(PREPROCESS(bits), PREPROCESS(bits.float()))


# -- the model that timm made ------------------------------------------------------------------------------------------


def made(name="test_vit", **kwargs):
    return timm.create_model(name, num_classes=3, **kwargs).eval()


@pytest.mark.parametrize("options", [{}, {"dynamic_img_size": True}])
def test_the_input_size_that_a_model_was_made_with(options):
    net = made(img_size=96, **options)
    preprocess = TimmPreprocess.of(net)
    assert preprocess.size == (96, 96)
    assert preprocess(picture(50, 75)[1]).shape == (1, 3, 96, 96)
    assert build_model(net, "auto", "base")(picture(50, 75)[1]).shape == (1, 3)


def test_a_size_that_was_set_later_counts():
    net = made()
    net.set_input_size((128, 96))
    assert TimmPreprocess.of(net).size == (128, 96)


def test_models_of_any_size_leave_images_of_whole_patches():
    net = made(dynamic_img_size=True)
    preprocess = TimmPreprocess.of(net)
    assert preprocess.patch == (16, 16)
    assert not preprocess.resizes
    assert preprocess(picture(64, 96)[1]).shape == (1, 3, 64, 96)
    assert preprocess(picture(65, 96)[1]).shape == (1, 3, 160, 160)
    assert build_model(net, "auto", "base")(picture(64, 96)[1]).shape == (1, 3)
    assert TimmPreprocess.of(made(dynamic_img_size=False)).resizes


def test_grey_images():
    for name in ("test_vit", "test_efficientnet"):
        net = made(name, in_chans=1)
        preprocess, config = TimmPreprocess.of(net), net.pretrained_cfg
        assert preprocess.mean == (pytest.approx(np.mean(config["mean"])),)
        assert preprocess.std == (pytest.approx(np.mean(config["std"])),)
        assert build_model(net, "auto", "base")(picture(160, 160)[1][:, :1]).shape == (1, 3)


def test_more_channels_are_normalised_alike_where_colours_are():
    net = made(in_chans=5)
    assert TimmPreprocess.of(net).mean == (net.pretrained_cfg["mean"][0],) * 5
    net.pretrained_cfg = net.pretrained_cfg | {"mean": (0.4, 0.5, 0.6)}
    with pytest.warns(InputWarning, match="cannot be told: its data config has a mean for 3.*takes 5"):
        assert preprocess_of(net, "auto", "base") is None


def test_layers_that_fold_pixels_into_channels_say_nothing():
    from timm.layers import SpaceToDepth

    net = made("test_efficientnet")
    net.conv_stem = nn.Conv2d(48, 8, 1)
    net.fold = SpaceToDepth()
    assert len(TimmPreprocess.of(net).mean) == 3


def test_the_crop_mode_of_the_data_config():
    net = made()
    net.pretrained_cfg = net.pretrained_cfg | {"crop_mode": "squash"}
    assert TimmPreprocess.of(net).crop_mode == "squash"


@pytest.mark.parametrize("options", [{}, {"dynamic_img_size": True}])
def test_what_is_written_is_read_again(options):
    preprocess = TimmPreprocess.of(made(**options))
    written = json.loads(json.dumps(described_preprocess(preprocess)))
    assert restored_preprocess(written) == preprocess
    fields = ("size", "mean", "std", "interpolation")  # all that was once written
    earlier = {name: written[name] for name in fields}
    assert restored_preprocess(earlier) == dataclasses.replace(preprocess, patch=None)


# -- wrappers ---------------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """A module around another one."""

    def __init__(self, part, before=lambda x: x, after=lambda x: x):
        super().__init__()
        self.part, self.before, self.after = part, before, after

    def forward(self, x):
        return self.after(self.part(self.before(x)))


class Keyword(Around):
    def forward(self, pixel_values, labels=None):
        return self.part(x=pixel_values)


class Headed(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part, self.head = part, nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.part(x))


class WithBuffers(Around):
    def __init__(self, part):
        super().__init__(part)
        self.register_buffer("mean", torch.zeros(3, 1, 1))

    def forward(self, x):
        return self.part(x - self.mean)


TRANSPARENT = {
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "averaged": ModelEmaV2,
    "averaged, V3": ModelEmaV3,
    "sequential": nn.Sequential,
    "module": Around,
    "of keywords": Keyword,
    "changed answers": lambda net: Around(net, after=lambda z: z[:, :2]),
    "several": lambda net: torch.compile(nn.Sequential(Around(nn.DataParallel(net)))),
}
OPAQUE = {
    "normalised": lambda net: Around(net, before=lambda x: (x - 0.5) / 0.5),
    "normalised in a row": lambda net: nn.Sequential(nn.BatchNorm2d(3), net),
    "resized": lambda net: Around(net, before=lambda x: x[..., ::2, ::2]),
    "buffers": WithBuffers,
    "new head": Headed,
    "fails": lambda net: Around(net, before=lambda x: x.nothing),
}


@pytest.mark.parametrize("wrapper", TRANSPARENT)
def test_wrappers_are_looked_through(wrapper):
    net = made(img_size=64)
    wrapped = TRANSPARENT[wrapper](net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert preprocess_of(wrapped, "auto", "base") == TimmPreprocess.of(net)


@pytest.mark.parametrize("wrapper", OPAQUE)
def test_timm_models_in_modules_that_may_change_inputs_are_warned_of(wrapper):
    net = OPAQUE[wrapper](made())
    message = (
        "base is, or holds, a timm model .*cannot be told: what it does with its input.*Give its preprocessing, or"
    )
    with pytest.warns(InputWarning, match=message) as warned:
        assert preprocess_of(net, "auto", "base") is None
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert preprocess_of(net, None, "base") is None


def test_a_look_into_a_wrapper_leaves_it_as_it_was():
    net = Around(made(), before=lambda x: x + 0 * torch.rand(1)).train()
    before, state = copy.copy(vars(net)), torch.random.get_rng_state()
    part = net.part
    assert preprocess_of(net, "auto", "base") is not None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert vars(net) == before
    assert net.training
    assert net.part is part


def test_modules_without_a_data_config_are_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(3, 2))
        warnings.simplefilter("error")
        assert preprocess_of(nn.Sequential(Around(nn.Linear(3, 2))), "auto", "base") is None
        assert preprocess_of(scripted, "auto", "base") is None


def test_a_wrapped_model_answers_as_the_model():
    net, x = made(), torch.rand(2, 3, 160, 160)
    expected = build_model(net, "auto", "base")(x)
    assert not torch.allclose(expected, net(x))
    assert torch.equal(build_model(nn.Sequential(net), "auto", "base")(x), expected)
