"""Estimators in folders: ``config.json``, ``model.safetensors`` and the calibration outputs; nothing is pickled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.torch import save_file
from sklearn.base import BaseEstimator
from torch import Tensor

import adaptexit
from adaptexit.core.outputs import ExitOutputs
from adaptexit.utils.folders import written_whole

FORMAT_VERSION = 2

MACHINE = ("device", "cache_dir")
"""Parameters that belong to a machine: they are stored, and may be given to ``load`` all the same."""


def save(estimator: Any, folder: str | os.PathLike[str]) -> None:
    """Write a fitted estimator; an earlier save in the same folder is replaced whole."""
    params, given_again = _described(estimator)
    state, tensors = estimator._get_state()
    config = {
        "format": FORMAT_VERSION,
        "class": _registered_name(estimator),
        "params": params,
        "given_again": given_again,
        "state": state,
    }
    text = json.dumps(config, indent=2, allow_nan=False, default=plain)
    with written_whole(folder, "config.json") as scratch:
        (scratch / "config.json").write_text(text + "\n")
        save_file({key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()},
                  scratch / "model.safetensors")  # fmt: skip
        estimator.outputs_.save(scratch / "calibration")
        if getattr(estimator, "training_outputs_", None) is not None:
            estimator.training_outputs_.save(scratch / "training")


def load(folder: str | os.PathLike[str], **given: Any) -> adaptexit.CascadeSaver | adaptexit.MultiExitClassifier:
    """Read an estimator that its ``save`` wrote.

    Parameters
    ----------
    folder : path
    **given
        The parameters that could not be written (modules, factories, scikit-learn classifiers, callables), by the names
        they had: ``base=``, ``saver=``, ``confidence=`` ... Modules get the saved weights: one whose weights are those
        already is shared, any other is copied first. Classifiers must be fitted. ``device=`` and ``cache_dir=`` may be
        given in place of those that were stored.

    Raises
    ------
    FileNotFoundError
        If the folder is no save.
    ValueError
        If it has another format, if parameters are missing or too many (the message names them), or if weights do not
        fit, key by key.
    """
    source = Path(folder)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"folder must hold an estimator written by save; there is no config.json in {source}.")
    config = json.loads((source / "config.json").read_text())
    if config.get("format") != FORMAT_VERSION:
        raise ValueError(
            f"{source} has format {config.get('format')!r}; this version reads format {FORMAT_VERSION}. "
            "Read it with the version that wrote it."
        )
    again = config["given_again"]
    absent = [name for name in again if name not in given]
    if absent:
        raise ValueError(
            f"{', '.join(f'{name}=' for name in absent)} could not be written and must be given to load again, as "
            f"when the estimator was saved (in all: {', '.join(again)})."
        )
    places = {name for name in MACHINE if name in config["params"]}
    if unknown := sorted(set(given) - set(again) - places):
        raise ValueError(f"{', '.join(unknown)} cannot be given to load: they are stored. Only {again} can.")
    with safetensors.safe_open(source / "model.safetensors", framework="pt") as file:
        tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    estimator = _built(config["class"], config["params"], given)
    estimator._set_state(config["state"], tensors, ExitOutputs.load(source / "calibration"))
    if (source / "training").is_dir():
        estimator.training_outputs_ = ExitOutputs.load(source / "training")
    return estimator


def plain(value: Any) -> Any:
    """NumPy values and paths as JSON holds them; TypeError for anything else that it does not know."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"JSON cannot hold a {type(value).__name__}.")


def _registry() -> dict[str, type]:
    """The closed registry, classes that a folder may name: the package's public estimators, calibrators and recipes."""
    public = (getattr(adaptexit, name) for name in adaptexit.__all__)
    return {entry.__name__: entry for entry in public if isinstance(entry, type) and issubclass(entry, BaseEstimator)}


def _registered_name(estimator: Any) -> str:
    registry = _registry()
    name = type(estimator).__name__
    if registry.get(name) is not type(estimator):
        raise TypeError(f"save knows {sorted(registry)}; got {name}, which is none of them.")
    return name


def _described(estimator: BaseEstimator) -> tuple[dict[str, Any], list[str]]:
    """Parameters as JSON holds them, and the names of those it cannot hold."""
    params, given_again = {}, []
    for name, value in estimator.get_params(deep=False).items():
        if isinstance(value, BaseEstimator) and type(value).__name__ in _registry():
            inner, unwritten = _described(value)
            if not unwritten:
                params[name] = {"class": _registered_name(value), "params": inner}
                continue
        try:
            json.dumps(value, allow_nan=False, default=plain)
            params[name] = value
        except (TypeError, ValueError):
            given_again.append(name)
    return params, given_again


def _built(name: str, params: dict[str, Any], given: dict[str, Any]) -> Any:
    registry = _registry()
    if name not in registry:
        raise ValueError(f"the folder holds a {name!r}; this version knows {sorted(registry)}.")
    arguments = {
        key: _built(value["class"], value["params"], {}) if isinstance(value, dict) and "class" in value else value
        for key, value in params.items()
    }
    return registry[name](**arguments | given)
