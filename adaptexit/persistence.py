"""Estimators in folders: ``config.json``, ``model.safetensors`` and the calibration outputs; nothing is pickled.

Every file is compared with its checksum, and the config with a description of what it may hold
(:mod:`adaptexit.saved_config`), before anything is made of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.torch import save_file
from sklearn.base import BaseEstimator
from torch import Tensor

import adaptexit
from adaptexit.calibrators.base import Calibrator
from adaptexit.core.outputs import ExitOutputs
from adaptexit.saved_config import (
    CALIBRATION,
    CONFIG_FILE,
    FORMAT_VERSION,
    SAVE_FOLDER,
    TRAINING,
    UNSIGNED,
    WEIGHTS,
    check_classes,
    is_described,
    read_config,
    registry,
    with_checksum,
)
from adaptexit.utils.files import naming, sha256_of, write_text
from adaptexit.utils.folders import put_back, written_whole

MACHINE = ("device", "cache_dir")
"""Parameters that belong to a machine: they are stored, and may be given to ``load`` all the same."""


def save(estimator: Any, folder: str | os.PathLike[str]) -> None:
    """Write a fitted estimator; an earlier save in the same folder is replaced whole.

    Raises
    ------
    FileExistsError
        If something else lies there, or beside an earlier save in the folder: nothing is then written or deleted.
    OSError
        If a file cannot be written, which it names; the earlier save stays.
    """
    params, given_again = _described(estimator)
    state, tensors = estimator._get_state()
    config = {
        "sha256": UNSIGNED,
        "format": FORMAT_VERSION,
        "class": _registered_name(estimator),
        "params": params,
        "given_again": given_again,
        "state": state,
    }
    json.dumps(config, allow_nan=False, default=plain)  # refused before anything is written
    with written_whole(folder, SAVE_FOLDER) as scratch:
        weights = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
        try:
            save_file(weights, scratch / WEIGHTS)
        except safetensors.SafetensorError as error:
            raise OSError(f"{scratch / WEIGHTS} cannot be written: {error}") from error
        estimator.outputs_.save(scratch / CALIBRATION)
        if getattr(estimator, "training_outputs_", None) is not None:
            estimator.training_outputs_.save(scratch / TRAINING)
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        config["files"] = {path.relative_to(scratch).as_posix(): sha256_of(path) for path in files}
        text = json.dumps(config, indent=2, allow_nan=False, default=plain) + "\n"
        write_text(scratch / CONFIG_FILE, with_checksum(text))


def load(folder: str | os.PathLike[str], **given: Any) -> adaptexit.CascadeSaver | adaptexit.MultiExitClassifier:
    """Read an estimator that its ``save`` wrote. Nothing that a file says is executed.

    Parameters
    ----------
    folder : path
        Links in it are followed.
    **given
        The parameters that could not be written (modules, factories, scikit-learn classifiers, callables), by the names
        they had: ``base=``, ``saver=``, ``confidence=`` ... Modules get the saved weights: one whose weights are those
        already is shared, any other is copied first. Classifiers must be fitted. ``device=`` and ``cache_dir=`` may be
        given in place of those that were stored.

    Raises
    ------
    FileNotFoundError
        If the folder is no save, or one of its files is missing.
    ValueError
        If it has another format, if a file is not what was written (the message names it), if parameters are missing
        or too many (the message names them), or if weights do not fit, key by key.
    """
    source = Path(folder).expanduser()
    while True:
        put_back(source)
        identity = _identity(source)
        try:
            return _loaded(source, given)
        except (OSError, ValueError):
            if _identity(source) == identity:
                raise  # else another save was put in its place meanwhile


def _identity(folder: Path) -> tuple[int, int] | None:
    return (folder.stat().st_ino, folder.stat().st_mtime_ns) if folder.exists() else None


def _loaded(source: Path, given: dict[str, Any]) -> Any:
    config = read_config(source)
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
    for name, checksum in config["files"].items():
        if sha256_of(source / name) != checksum:
            raise ValueError(
                f"{source / name} is not what was saved: its checksum differs. It was damaged, or comes from another "
                "save. Take another copy of the folder, or save the estimator again."
            )
    weights = source / WEIGHTS
    with naming(weights, safetensors.SafetensorError), safetensors.safe_open(weights, framework="pt") as file:
        tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    outputs = ExitOutputs.load(source / CALIBRATION)
    with _restoring(source):
        check_classes(config["state"], outputs)
        estimator = _built(config["class"], config["params"], given)
        if not isinstance(estimator.calibrator, (Calibrator, type(None))):
            raise TypeError(f"calibrator must be a Calibrator; got {estimator.calibrator!r}.")
        estimator._set_state(config["state"], tensors, outputs)
        if len(estimator.exit_names) != outputs.n_exits:
            raise ValueError(f"the network has {len(estimator.exit_names)} exits, the outputs {outputs.n_exits}.")
    if any(name.startswith(TRAINING) for name in config["files"]):
        estimator.training_outputs_ = ExitOutputs.load(source / TRAINING)
    return estimator


@contextmanager
def _restoring(source: Path) -> Iterator[None]:
    """Name the files in errors of the block, and make those that a user's module may raise ValueErrors."""
    files = f"(from {source / CONFIG_FILE} and {WEIGHTS} beside it)"
    try:
        yield
    except OSError:
        raise
    except (ValueError, TypeError) as error:
        error.args = (f"{error} {files}",)
        raise
    except Exception as error:
        raise ValueError(f"the estimator cannot be restored: {type(error).__name__}: {error} {files}") from error


def plain(value: Any) -> Any:
    """NumPy values, ranges and paths as JSON holds them; TypeError for anything else that it does not know."""
    if isinstance(value, range):
        return list(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"JSON cannot hold a {type(value).__name__}.")


def _registered_name(estimator: Any) -> str:
    classes, name = registry(), type(estimator).__name__
    if classes.get(name) is not type(estimator):
        raise TypeError(f"save knows {sorted(classes)}; got {name}, which is none of them.")
    return name


def _described(estimator: BaseEstimator) -> tuple[dict[str, Any], list[str]]:
    """Parameters as JSON holds them, and the names of those it cannot hold."""
    params, given_again = {}, []
    for name, value in estimator.get_params(deep=False).items():
        if isinstance(value, BaseEstimator) and type(value).__name__ in registry():
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
    arguments = {
        key: _built(value["class"], value["params"], {}) if is_described(value) else value
        for key, value in params.items()
    }
    return registry()[name](**arguments | given)
