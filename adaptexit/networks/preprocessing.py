"""From images as users have them to what a model takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

Preprocess = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TimmPreprocess:
    """Images in [0, 1] (or uint8), NCHW, size to a model's input size and normalised as it was trained.

    Images that have the input size are only normalised; of others the shorter side is resized and the middle cut out.
    The crop margin of timm's evaluation transform is left out: the images come as the user framed them.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str

    @classmethod
    def of(cls, module: nn.Module) -> TimmPreprocess:
        """What timm's data config says of a model."""
        config = resolve_model_data_config(module)
        _, height, width = config["input_size"]
        return cls((height, width), tuple(config["mean"]), tuple(config["std"]), config["interpolation"])

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != len(self.mean):
            raise ValueError(
                f"X must be images of shape (N, {len(self.mean)}, H, W) for this model; got shape {tuple(x.shape)}."
            )
        x = tv.to_dtype(x, torch.float32, scale=True)
        low, high = (float(v) for v in x.aminmax())
        if low < -0.01 or high > 1.01:
            raise ValueError(
                f"X must hold images in [0, 1] (or uint8), which are then normalised for each model; got values from "
                f"{low:.3g} to {high:.3g}. If they are normalised already, pass preprocess=None for that model."
            )
        if x.shape[-2:] != self.size:
            (height, width), (given_height, given_width) = self.size, x.shape[-2:]
            if height * given_width >= width * given_height:
                size = [height, height * given_width // given_height]
            else:
                size = [width * given_height // given_width, width]
            x = tv.resize(x, size, interpolation=InterpolationMode(self.interpolation), antialias=True)
            x = tv.center_crop(x, list(self.size)).clamp(0, 1)  # bicubic overshoots; 8-bit images cannot
        return tv.normalize(x, list(self.mean), list(self.std))


class ProcessorPreprocess:
    """An image processor of transformers as a function of a batch: its ``pixel_values``.

    Floats are taken to be images in [0, 1] already, so that the processor does not rescale them.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, x: Tensor) -> Tensor:
        options = {"do_rescale": False} if x.is_floating_point() else {}
        return torch.as_tensor(self.processor(images=list(x), return_tensors="pt", **options)["pixel_values"])


def preprocess_of(module: nn.Module, preprocess: Any, label: str) -> Preprocess | None:
    """What was asked for as a function of a batch: "auto", None, a callable or an image processor."""
    if isinstance(preprocess, str):
        if preprocess == "auto":
            return TimmPreprocess.of(module) if getattr(module, "pretrained_cfg", None) else None
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


def described_preprocess(preprocess: Any) -> dict[str, Any] | None:
    """One that a model's data config gave, as a JSON value; None for the user's own."""
    return dataclasses.asdict(preprocess) if isinstance(preprocess, TimmPreprocess) else None


def restored_preprocess(described: dict[str, Any]) -> TimmPreprocess:
    """What :func:`described_preprocess` took apart."""
    return TimmPreprocess(
        tuple(described["size"]), tuple(described["mean"]), tuple(described["std"]), described["interpolation"]
    )
