"""Whole models from what a user gives: a timm name, a factory, a module or a scikit-learn classifier."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from sklearn.base import is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from adaptexit.backbones import NAMED
from adaptexit.core.answer import Answer
from adaptexit.networks.base import Network, State
from adaptexit.networks.penultimate import with_penultimate
from adaptexit.networks.preprocessing import (
    Preprocess,
    described_preprocess,
    preprocess_of,
    restored_preprocess,
)
from adaptexit.networks.readers import logits_in
from adaptexit.networks.weights import can_be_set, plain_weights, weights_in
from adaptexit.staging.carried import writes_into
from adaptexit.staging.contexts import random_state_kept
from adaptexit.staging.cuts import unwrapped
from adaptexit.staging.nested import Rows, tensors_in

SMALLEST_PROBABILITY = 1e-12
"""Probabilities of scikit-learn classifiers are clipped here before their logarithm serves as logits."""


class WholeModel(Network):
    """One model that answers in one piece: a network of one exit, whose cost is that exit's.

    Attributes
    ----------
    label : str
        How errors name it.
    device : torch.device
    """

    label: str
    device: torch.device

    def stage(self, k: int, carried: Rows) -> Rows:
        return carried

    def advance(self, carried: Rows, after: int, to: int) -> Rows:
        return self.prepare(carried)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B, C) of raw inputs."""
        return logits_in(self.exit(0, self.prepare(x))[0], self.label)

    def given_costs(self, alone: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return np.zeros(1), alone

    def get_state(self) -> State:
        header = {
            "kind": "torch" if isinstance(self, TorchModel) else "scikit-learn",
            "timm_preprocess": described_preprocess(getattr(self, "preprocess", None)),
        }
        return header, plain_weights(self.heads[0])


class TorchModel(WholeModel):
    """A module in evaluation mode behind its preprocessing: batch of inputs -> logits."""

    def __init__(self, module: nn.Module, preprocess: Preprocess | None, label: str) -> None:
        self.module, self.preprocess = module, preprocess
        self.label = label
        self.exit_names = [label]
        self.stages, self.heads = nn.ModuleList([nn.Identity()]), nn.ModuleList([module])
        self._like: Tensor | None = next((t for t in module.parameters() if t.is_floating_point()), None)
        if self._like is None:  # of quantised and frozen modules
            self._like = next((t for t in tensors_in(weights_in(module)) if t.is_floating_point()), None)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the module is by now."""
        return torch.device("cpu") if self._like is None else self._like.device

    @property
    def dtype(self) -> torch.dtype | None:
        """The precision that the module has by now."""
        return None if self._like is None else self._like.dtype

    @property
    def modules(self) -> list[nn.Module]:
        return [self.module]

    def prepare(self, x: Tensor) -> Tensor:
        """Inputs as the module takes them: on its device, preprocessed, in its precision."""
        x = x.to(self.device, non_blocking=True)
        if self.preprocess is not None:
            x = self.preprocess(x)
            if not isinstance(x, Tensor):
                raise TypeError(f"preprocessing of {self.label} must return a tensor; got {type(x).__name__}.")
            x = x.to(self.device)
        elif self.dtype is not None and not (x.is_floating_point() or x.is_complex()) and x.ndim == 4:
            raise TypeError(
                f"X must hold floats for {self.label}, a {type(self.module).__name__} without preprocessing; got "
                f"images of {x.dtype}. Scale them to what the model was trained on (x.float() / 255, normalised), or "
                "give its preprocessing."
            )
        if self.dtype is not None and x.is_floating_point() and x.dtype != self.dtype:
            x = x.to(self.dtype)
        return x

    def exit(self, k: int, carried: Rows, features: bool = False) -> tuple[Any, Rows]:
        try:
            if not features:
                return self.module(carried), None
            output, vector = with_penultimate(self.module, carried)
        except Exception as error:
            error.add_note(f"This is {self.label}, run on inputs of shape {tuple(carried.shape)} and {carried.dtype}.")
            raise
        return Answer(logits_in(output, self.label), features=vector), None


class _Probabilities(nn.Module):
    """A fitted scikit-learn classifier: inputs, flattened to 2-D -> log-probabilities."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        proba = self.classifier.predict_proba(x.cpu().numpy().reshape(len(x), -1))
        return torch.from_numpy(np.log(np.maximum(proba, SMALLEST_PROBABILITY)))


class ScikitModel(WholeModel):
    """A fitted scikit-learn classifier: batch of inputs -> log-probabilities."""

    device = torch.device("cpu")
    countable = False
    modules: list[nn.Module] = []  # noqa: RUF012  # type: ignore[assignment]

    def __init__(self, classifier: Any, label: str) -> None:
        self.classifier, self.label = classifier, label
        self.exit_names = [label]
        self.stages, self.heads = nn.ModuleList([nn.Identity()]), nn.ModuleList([_Probabilities(classifier)])

    @property
    def classes(self) -> NDArray[Any]:
        """Labels in the order of the outputs."""
        return np.asarray(self.classifier.classes_)

    def exit(self, k: int, carried: Rows, features: bool = False) -> tuple[Any, Rows]:
        return self.heads[0](carried), None


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
        module = _made(given, label).to(device)
    else:
        raise TypeError(
            f"{label} must be a timm model name, a factory of a module, an nn.Module or a scikit-learn classifier "
            f"with predict_proba; got {given!r}."
        )
    return TorchModel(module, preprocess_of(module, preprocess, label), label)


def copied(model: TorchModel) -> TorchModel:
    """A model of its own weights, for training; compiled and parallel wrappers are left behind."""
    return TorchModel(copy.deepcopy(unwrapped(model.module)), model.preprocess, model.label)


def _made(factory: Callable[[], Any], label: str) -> nn.Module:
    """The module that a factory makes."""
    try:
        module = factory()
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise  # from within
        raise TypeError(
            f"{label} must be a module, or a factory that makes one and takes no arguments; got {factory!r}: {error}. "
            "If it is the model itself, put it into an nn.Module whose forward calls it."
        ) from error
    if not isinstance(module, nn.Module):
        raise TypeError(f"{label}, called as a factory, must return an nn.Module; got {type(module).__name__}.")
    return module


def check_device(device: Any) -> None:
    """Refuse what is no device of torch."""
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a device of torch, as 'cuda' or 'cpu', or None; got {device!r}.") from error


def _timm_model(name: str, label: str, *, pretrained: bool) -> nn.Module:
    """A timm model by name, in evaluation mode; names with a prefix (``local-dir:`` ...) are timm's to check."""
    if name in NAMED:
        raise ValueError(
            f"{label} must have trained weights; got {name!r}, a network of adaptexit.backbones that is made without "
            f"any. Give the module with its weights loaded, adaptexit.backbones.{name}()."
        )
    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, [*timm.list_models(), *NAMED], n=3)
        raise ValueError(
            f"{label} must be the name of a timm model; got {name!r}"
            + (f". Near it are {', '.join(near)}." if near else ". See timm.list_models().")
        )
    with random_state_kept():
        return timm.create_model(name, pretrained=pretrained).eval()


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
    if config := described["timm_preprocess"]:
        preprocess = restored_preprocess(config)
    model = build_model(given, preprocess, label, device)
    if isinstance(model, TorchModel):
        current = plain_weights(model.module)
        if (
            current.keys() != weights.keys()
            and plain_weights(inner := unwrapped(model.module)).keys() == weights.keys()
        ):
            # A copy that was trained has left its wrapper behind.
            model, current = TorchModel(inner, model.preprocess, label), plain_weights(inner)
        same = current.keys() == weights.keys()
        for key, weight in weights.items():
            if key in current and current[key].dtype != weight.dtype:
                raise ValueError(
                    f"the saved weights do not fit {label}: {key} is {weight.dtype}, the module's "
                    f"{current[key].dtype}. Convert the module first."
                )
        if not same or any(not torch.equal(current[key].cpu(), weight) for key, weight in weights.items()):
            if not can_be_set(model.module):
                raise ValueError(
                    f"{label} must be given with the weights that were saved, as those of a quantised or frozen "
                    f"{type(model.module).__name__} cannot be set; got others. Make it from the weights that it had."
                )
            if theirs:
                model = TorchModel(copy.deepcopy(model.module), model.preprocess, label)
            try:
                model.module.load_state_dict(weights, strict=True)
            except RuntimeError as error:
                raise ValueError(f"the saved weights do not fit {label}: {error}") from error
    return model
