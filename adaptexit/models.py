"""Whole models from what a user gives: a timm name, a factory, a module or a scikit-learn classifier."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from sklearn.base import is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from adaptexit.staging.cost import count_macs

SMALLEST_PROBABILITY = 1e-12
"""Probabilities of scikit-learn classifiers are clipped here before their logarithm serves as logits."""


@dataclass(frozen=True)
class TimmPreprocess:
    """Images in [0, 1] (or uint8), NCHW, resized to a model's input size and normalised as it was trained.

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
                resized = [height, height * given_width // given_height]
            else:
                resized = [width * given_height // given_width, width]
            x = tv.resize(x, resized, interpolation=InterpolationMode(self.interpolation), antialias=True)
            x = tv.center_crop(x, list(self.size)).clamp(0, 1)  # bicubic overshoots; 8-bit images cannot
        return tv.normalize(x, list(self.mean), list(self.std))


class TorchModel:
    """A module in evaluation mode behind its preprocessing: batch of inputs -> logits."""

    def __init__(self, module: nn.Module, preprocess: Callable[[Tensor], Tensor] | None, label: str) -> None:
        self.module, self.preprocess, self.label = module, preprocess, label
        tensor = next((t for t in module.parameters() if t.is_floating_point()), None)
        self.device = torch.device("cpu") if tensor is None else tensor.device
        self.dtype = None if tensor is None else tensor.dtype

    def prepare(self, x: Tensor) -> Tensor:
        """Inputs as the module takes them: on its device, preprocessed, in its precision."""
        x = x.to(self.device, non_blocking=True)
        if self.preprocess is not None:
            x = self.preprocess(x)
        elif self.dtype is not None and not (x.is_floating_point() or x.is_complex()) and x.ndim == 4:
            raise TypeError(
                f"X must hold floats for {self.label}, which has no preprocessing; got images of {x.dtype}. Scale them "
                "to what the model was trained on, or give its preprocessing."
            )
        if self.dtype is not None and x.is_floating_point() and x.dtype != self.dtype:
            x = x.to(self.dtype)
        return x

    def __call__(self, x: Tensor) -> Tensor:
        x = self.prepare(x)
        try:
            output = self.module(x)
        except Exception as error:
            error.add_note(f"This is {self.label}, run on inputs of shape {tuple(x.shape)} and {x.dtype}.")
            raise
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{self.label} must return a tensor of logits (B, C); got {type(output).__name__}. Wrap the module so "
                "that it returns the logits alone."
            )
        return output

    def macs(self, x: Tensor) -> float:
        """Multiply-accumulates a sample, counted on a batch like ``x``."""
        return count_macs(self, x)


class ScikitModel:
    """A fitted scikit-learn classifier: batch of inputs, flattened to 2-D, -> log-probabilities."""

    module = None
    preprocess = None
    device = torch.device("cpu")

    def __init__(self, classifier: Any, label: str) -> None:
        self.classifier, self.label = classifier, label

    @property
    def classes(self) -> NDArray[Any]:
        """Labels in the order of the outputs."""
        return np.asarray(self.classifier.classes_)

    def __call__(self, x: Tensor) -> Tensor:
        proba = self.classifier.predict_proba(x.cpu().numpy().reshape(len(x), -1))
        return torch.from_numpy(np.log(np.maximum(proba, SMALLEST_PROBABILITY)))


WholeModel = TorchModel | ScikitModel


def build_model(given: Any, preprocess: Any, label: str, device: str | None = None) -> WholeModel:
    """A model from what was given for the argument ``label``; classifiers must be fitted.

    Parameters
    ----------
    given : str, callable, nn.Module or fitted scikit-learn classifier
        A timm name (made with its pretrained weights), a factory of a module, or the model itself, which is shared.
    preprocess : "auto", None or callable
        "auto": timm's data config for a timm model, nothing for any other.
    label : str
        How errors name the model.
    device : str, optional
        Where a module made here goes.
    """
    if isinstance(given, str):
        module: Any = _timm_model(given, label, pretrained=True).to(device)
    elif isinstance(given, nn.Module):
        module = given
    elif is_scikit(given):
        if preprocess not in ("auto", None):
            raise ValueError(
                f"preprocessing of {label} must be left out for a scikit-learn classifier; got {preprocess!r}. Put it "
                "into a Pipeline instead."
            )
        if not hasattr(given, "predict_proba"):
            raise TypeError(
                f"{label} must offer predict_proba; {type(given).__name__} does not. Wrap it in "
                "sklearn.calibration.CalibratedClassifierCV."
            )
        check_is_fitted(given)
        return ScikitModel(given, label)
    elif callable(given) and not isinstance(given, type):
        module = given()
        if not isinstance(module, nn.Module):
            raise TypeError(f"{label}, called as a factory, must return an nn.Module; got {type(module).__name__}.")
        module = module.to(device)
    else:
        raise TypeError(
            f"{label} must be a timm model name, a factory of a module, an nn.Module or a scikit-learn classifier "
            f"with predict_proba; got {given!r}."
        )
    return TorchModel(module, _preprocess_of(module, preprocess, label), label)


def _timm_model(name: str, label: str, *, pretrained: bool) -> nn.Module:
    """A timm model by name, in evaluation mode; names with a prefix (``local-dir:`` ...) are timm's to check."""
    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            f"{label} must be the name of a timm model; got {name!r}"
            + (f". Near it are {', '.join(near)}." if near else ". See timm.list_models().")
        )
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(name, pretrained=pretrained).eval()


def _preprocess_of(module: nn.Module, preprocess: Any, label: str) -> Callable[[Tensor], Tensor] | None:
    if preprocess is None or (callable(preprocess) and not isinstance(preprocess, str)):
        return preprocess
    if isinstance(preprocess, str) and preprocess == "auto":
        return TimmPreprocess.of(module) if getattr(module, "pretrained_cfg", None) else None
    raise ValueError(
        f"preprocessing of {label} must be 'auto' (timm's data config), None or a callable from a batch of inputs to "
        f"what the model takes; got {preprocess!r}."
    )


def writes_into(tensor: Tensor) -> int:
    """How often a tensor was written into, also with the values that it had; 0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def unspoiled(x: Tensor, label: str) -> Iterator[None]:
    """Refuse a model that writes into its input within the block; the input is mended."""
    before, writes = x.clone(), writes_into(x)
    yield
    if writes_into(x) != writes or not torch.equal(x, before):
        x.copy_(before)
        raise ValueError(
            f"{label} must leave its input as it is; it, or its preprocessing, writes into it, which spoils the data "
            "that were given. Let it work on a copy."
        )


def is_scikit(given: Any) -> bool:
    """Whether something is a scikit-learn classifier."""
    return not isinstance(given, (nn.Module, type)) and hasattr(given, "get_params") and is_classifier(given)


def is_fitted(classifier: Any) -> bool:
    """Whether a scikit-learn classifier is fitted."""
    try:
        check_is_fitted(classifier)
    except NotFittedError:
        return False
    return True


def describe_model(model: WholeModel) -> dict[str, Any]:
    """What :func:`restore_model` has to know besides the weights, as a JSON value."""
    known = model.preprocess if isinstance(model.preprocess, TimmPreprocess) else None
    return {
        "kind": "torch" if isinstance(model, TorchModel) else "scikit-learn",
        "timm_preprocess": None if known is None else dataclasses.asdict(known),
    }


def restore_model(
    given: Any,
    preprocess: Any,
    label: str,
    described: dict[str, Any],
    weights: dict[str, Tensor],
    device: str | None = None,
) -> WholeModel:
    """The model that was described, from what was given for it (again) and the saved weights.

    A module that has those weights already is shared; one of the caller's that has not is copied before it gets them.
    """
    scikit = described["kind"] == "scikit-learn"
    if scikit != is_scikit(given):
        raise ValueError(
            f"{label} must be {'the fitted scikit-learn classifier' if scikit else 'the module'} that was saved; "
            f"got {given!r}."
        )
    theirs = isinstance(given, nn.Module)
    if isinstance(given, str):
        given = _timm_model(given, label, pretrained=False).to(device)
    if known := described["timm_preprocess"]:
        preprocess = TimmPreprocess(
            tuple(known["size"]), tuple(known["mean"]), tuple(known["std"]), known["interpolation"]
        )
    model = build_model(given, preprocess, label, device)
    if isinstance(model, TorchModel):
        current = model.module.state_dict()
        same = current.keys() == weights.keys()
        for key, weight in weights.items():
            if key in current and current[key].dtype != weight.dtype:
                raise ValueError(
                    f"the saved weights do not fit {label}: {key} is {weight.dtype}, the module's "
                    f"{current[key].dtype}. Convert the module first."
                )
        if not same or any(not torch.equal(current[key].cpu(), weight) for key, weight in weights.items()):
            if theirs:
                model.module = copy.deepcopy(model.module)
            try:
                model.module.load_state_dict(weights, strict=True)
            except RuntimeError as error:
                raise ValueError(f"the saved weights do not fit {label}: {error}") from error
    return model
