"""From images as users have them to what a model takes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.layers import SpaceToDepth
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from adaptexit.exceptions import InputWarning, warn
from adaptexit.staging.contexts import random_state_kept

Preprocess = Callable[[Tensor], Tensor]


_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, ModelEmaV2, ModelEmaV3)
"""What hands its input to the module in ``module`` as it is."""


@dataclass(frozen=True)
class TimmPreprocess:
    """Images in [0, 1] (or integers 0 ... 255), NCHW, size to a model's input size and normalised as it was trained.

    Images that have the input size are only normalised. Of others, as the model's ``crop_mode`` says, the shorter side
    is resized and the middle cut out ("center"), both sides are resized ("squash"), or the longer side is and the rest
    filled with the mean colour ("border"). The crop margin of timm's evaluation transform is left out: the images come
    as the user framed them.

    Attributes
    ----------
    size : (height, width)
    mean, std : one number a channel
    interpolation : str
    crop_mode : {"center", "squash", "border"}
    patch : (height, width), optional
        Of a model that takes any multiple of it (``dynamic_img_size=True``): images of such a size keep it.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_mode: str = "center"
    patch: tuple[int, int] | None = None

    @classmethod
    def of(cls, module: nn.Module) -> TimmPreprocess:
        """What timm's data config says of a model, in the input size and channels that the model was made with.

        Raises
        ------
        ValueError
            Where it says nothing of that number of channels.
        """
        config = resolve_data_config(pretrained_cfg=module.pretrained_cfg)
        size = tuple(config["input_size"][1:])
        for owner in (module, getattr(module, "patch_embed", None)):
            sides = getattr(owner, "img_size", None)
            if isinstance(sides, (tuple, list)) and len(sides) == 2:
                size = (int(sides[0]), int(sides[1]))
        mean, std = (_for_channels(tuple(config[key]), _n_channels(module), key) for key in ("mean", "std"))
        dynamic = bool(getattr(module, "dynamic_img_size", False))
        patch = tuple(module.patch_embed.patch_size) if dynamic else None  # type: ignore[union-attr,arg-type]
        return cls(size, mean, std, config["interpolation"], config["crop_mode"], patch)

    @property
    def resizes(self) -> bool:
        """Whether images of every size are brought to one."""
        return self.patch is None

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != len(self.mean):
            raise ValueError(
                f"X must be images of shape (N, {len(self.mean)}, H, W) for this model; got shape {tuple(x.shape)}."
            )
        x = tv.to_dtype(as_pixels(x), torch.float32, scale=True)
        low, high = (float(v) for v in x.aminmax())
        if low < -0.01 or high > 1.01:
            raise ValueError(
                f"X must hold images in [0, 1] (or uint8), which are then normalised for each model; got values from "
                f"{low:.3g} to {high:.3g}. If they are normalised already, pass preprocess=None for that model."
            )
        if not self._fits(x):
            x = self._resized(x)
        return tv.normalize(x, list(self.mean), list(self.std))

    def _fits(self, x: Tensor) -> bool:
        if self.patch is None:
            return x.shape[-2:] == self.size
        return all(side % patch == 0 for side, patch in zip(x.shape[-2:], self.patch, strict=True))

    def _resized(self, x: Tensor) -> Tensor:
        (height, width), (given_height, given_width) = self.size, x.shape[-2:]
        if self.crop_mode == "squash":
            size = [height, width]
        elif self.crop_mode == "border":
            ratio = max(given_height / height, given_width / width)
            size = [max(1, round(given_height / ratio)), max(1, round(given_width / ratio))]
        elif height * given_width >= width * given_height:
            size = [height, height * given_width // given_height]
        else:
            size = [width * given_height // given_width, width]
        x = tv.resize(x, size, interpolation=InterpolationMode(self.interpolation), antialias=True).clamp(0, 1)
        if self.crop_mode != "border":  # bicubic overshoots; 8-bit images cannot
            return tv.center_crop(x, [height, width])
        framed = x.new_tensor([round(255 * v) / 255 for v in self.mean])[:, None, None].repeat(len(x), 1, height, width)
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        framed[..., top : top + size[0], left : left + size[1]] = x
        return framed


def as_pixels(x: Tensor) -> Tensor:
    """Integers of any type as bytes: 255 is white, as the largest value of a type that was only counted in is not."""
    if x.is_floating_point() or x.dtype in (torch.uint8, torch.bool):
        return x
    low, high = (int(v) for v in x.to(torch.int64).aminmax())
    if low < 0 or high > 255:
        raise ValueError(
            f"X must hold integers in 0 ... 255, or floats in [0, 1]; got values from {low} to {high} of {x.dtype}. "
            "Divide by the largest value that a pixel can have (65535 in 16-bit images)."
        )
    return x.to(torch.uint8)


def _n_channels(module: nn.Module) -> int | None:
    """Of the images that a timm model takes, None where its first layer does not say."""
    names = module.pretrained_cfg.get("first_conv") or ()  # type: ignore[union-attr,operator]
    name = names if isinstance(names, str) else next(iter(names), "")
    layer = dict(module.named_modules()).get(name)
    if not isinstance(layer, nn.Conv2d) or any(isinstance(part, SpaceToDepth) for part in module.modules()):
        return None
    return layer.in_channels


def _for_channels(values: tuple[float, ...], n: int | None, name: str) -> tuple[float, ...]:
    """Means or deviations of so many channels, from those of three."""
    if n is None or n == len(values):
        return values
    if n == 1 or len(set(values)) == 1:  # timm makes weights for grey images from those of colours, added up
        return (sum(values) / len(values),) * n
    raise ValueError(f"its data config has a {name} for {len(values)} channels, and it takes {n}")


class ProcessorPreprocess:
    """An image processor of transformers as a function of a batch: its ``pixel_values``.

    Floats are taken to be images in [0, 1] already, so that the processor does not rescale them.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, x: Tensor) -> Tensor:
        options = {"do_rescale": False} if x.is_floating_point() else {}
        images = list(as_pixels(x))
        return torch.as_tensor(self.processor(images=images, return_tensors="pt", **options)["pixel_values"])


def preprocess_of(module: nn.Module, preprocess: Any, label: str) -> Preprocess | None:
    """What was asked for as a function of a batch: "auto", None, a callable or an image processor."""
    if isinstance(preprocess, str):
        if preprocess == "auto":
            return _automatic(module, label)
    elif preprocess is None:
        return None
    elif "pixel_values" in getattr(preprocess, "model_input_names", ()):
        return ProcessorPreprocess(preprocess)
    elif callable(preprocess):
        return preprocess
    raise ValueError(
        f"preprocessing of {label} must be 'auto' (timm's data config), None, an image processor of transformers or a "
        f"callable from a batch of inputs to what the model takes; got {preprocess!r}."
    )


def _automatic(module: nn.Module, label: str) -> TimmPreprocess | None:
    """Of a timm model, however it is wrapped; a warning where one is inside that may see other inputs."""
    inner = _seen_through(module)
    if not _has_config(inner):
        if not any(map(_has_config, inner.modules())):
            return None
        reason = "what it does with its input before is not known"
    else:
        try:
            return TimmPreprocess.of(inner)
        except ValueError as error:
            reason = str(error)
    warn(
        f"{label} is, or holds, a timm model (pretrained_cfg), but its preprocessing cannot be told: {reason}. It gets "
        "the inputs as they are. Give its preprocessing, or None if they are what it takes.",
        InputWarning,
    )
    return None


def _has_config(module: nn.Module) -> bool:
    return bool(getattr(module, "pretrained_cfg", None))


def _seen_through(module: nn.Module) -> nn.Module:
    """The module inside all that hands its input on as it is."""
    while not _has_config(module):
        if isinstance(module, _WRAPPERS):
            module = module.module
        elif isinstance(original := getattr(module, "_orig_mod", None), nn.Module):  # torch.compile's
            module = original
        elif (part := _sole_part(module)) is not None and _hands_on(module):
            module = part
        else:
            break
    return module


def _sole_part(module: nn.Module) -> nn.Module | None:
    """The only child of a module that has no tensors of its own."""
    parts = list(module.children())
    own = any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))
    return parts[0] if len(parts) == 1 and not own else None


class _Reached(Exception):
    """Carries what a part was called with out of the module around it."""


class _Recorder(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _Reached(args, kwargs)


def _hands_on(module: nn.Module) -> bool:
    """Whether the only part of a module is called with the module's input, seen on a copy in which that part stops."""
    stand_in = copy.copy(module)
    stand_in._modules = dict.fromkeys(module._modules, _Recorder())
    stand_in.training = False
    x = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    try:
        with random_state_kept():
            stand_in.forward(x.clone())
    except _Reached as reached:
        args, kwargs = reached.args
        values = [*args, *kwargs.values()]
        return bool(values) and isinstance(values[0], Tensor) and torch.equal(values[0].cpu(), x)
    except Exception:  # whatever it needs, it is not known to hand its input on
        return False
    return False


def described_preprocess(preprocess: Any) -> dict[str, Any] | None:
    """One that a model's data config gave, as a JSON value; None for the user's own."""
    return dataclasses.asdict(preprocess) if isinstance(preprocess, TimmPreprocess) else None


def restored_preprocess(described: dict[str, Any]) -> TimmPreprocess:
    """What :func:`described_preprocess` took apart."""
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in described.items()}
    return TimmPreprocess(**fields)
