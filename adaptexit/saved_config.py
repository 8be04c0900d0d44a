"""What the config of a saved estimator may hold: it is read once, and compared with this before anything is made of it.

It holds a checksum of every other file and one of itself, so that damage is noticed, and a folder that was made up does
no harm: no path leads out of it, no class is outside the registry, no number of it is a size that nothing else has.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from torchvision.transforms import InterpolationMode

import adaptexit
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.saved_outputs import OUTPUTS_FOLDER
from adaptexit.heads.layout import AXES
from adaptexit.networks.mlp import ACTIVATIONS
from adaptexit.utils.files import naming, parsed_json, read_bytes
from adaptexit.utils.folders import Kind
from adaptexit.utils.schema import check_form, whole

FORMAT_VERSION = 3

CONFIG_FILE, WEIGHTS, CALIBRATION, TRAINING = "config.json", "model.safetensors", "calibration", "training"

UNSIGNED = "0" * 64
"""Stands for the config's checksum while that is computed."""

LONGEST_LABEL = 4096
"""Bytes of a label up to which the declared type of the classes is believed, whatever the labels are."""

# -- forms -------------------------------------------------------------------------------------------------------------


def checksum(value: Any) -> bool:
    """a checksum of 64 hexadecimal digits"""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


CONFIG = {
    "sha256": checksum, "format": int, "class": str, "params": dict, "given_again": [str], "state": dict,
    "files": {"*": checksum},
}  # fmt: skip

_MODEL = {
    "kind": ("torch", "scikit-learn"),
    "timm_preprocess": (
        None,
        {
            "size": [whole(1)],
            "mean": [float],
            "std": [float],
            "interpolation": tuple(mode.value for mode in InterpolationMode),
            "*": object,
        },
    ),
}

_ESTIMATOR = {
    "calibrator": dict,
    "classes": [(str, bool, int, float)],
    "classes_dtype": str,
    "inputs": {"shape": [whole(0)], "resizes": bool},
    "labelled": bool,
    "table": {"n_features_in_?": whole(0), "feature_names_in_?": [str]},
}

_FEATURE = {
    "shape": [whole(1)],
    "layout": tuple(AXES),
    "prefix_tokens": whole(0),
    "grid": (None, [whole(1)]),
    "*": object,
}

STATES = {
    "CascadeSaver": _ESTIMATOR
    | {
        "models": [_MODEL],
        "saver_reports": [{"saver": whole(0), "delta_cost": float, "job_ratio": float}],
    },
    "MultiExitClassifier": _ESTIMATOR
    | {
        "backbone": _MODEL,
        "cuts?": [str],
        "features?": [_FEATURE],
        "mlp": (None, {"widths": [whole(1)], "n_classes": whole(1), "activation": tuple(ACTIVATIONS)}),
        "fitted_classes": bool,
        "unseen": bool,
        "self_calibrated": bool,
        "history": dict,
        "head?": str,
    },
}
"""What each estimator writes of what it learned. The calibrator checks its own part."""


def with_checksum(text: str) -> str:
    """The text of a config with its own checksum in the place left for it."""
    return text.replace(UNSIGNED, hashlib.sha256(text.encode()).hexdigest(), 1)


def _is_config(config: Any) -> bool:
    """Whether a save of this or an earlier format has such a config."""
    if not isinstance(config, dict):
        return False
    version = config.get("format")
    return config.get("class") in list(STATES) and isinstance(version, int) and 1 <= version <= FORMAT_VERSION


_OUTPUTS = f"({CALIBRATION}|{TRAINING})"
SAVE_FOLDER = Kind(
    CONFIG_FILE,
    re.compile(rf"config\.json|model\.safetensors|{_OUTPUTS}|{_OUTPUTS}/({OUTPUTS_FOLDER.contents.pattern})"),
    _is_config,
)
"""What tells a save from other folders, with a ``config.json`` or without."""


# -- reading -----------------------------------------------------------------------------------------------------------


def registry() -> dict[str, type]:
    """The closed registry, classes that a folder may name: the package's public estimators, calibrators and recipes."""
    public = (getattr(adaptexit, name) for name in adaptexit.__all__)
    return {entry.__name__: entry for entry in public if isinstance(entry, type) and issubclass(entry, BaseEstimator)}


def is_described(value: Any) -> bool:
    """Whether a parameter's value stands for an estimator."""
    return isinstance(value, dict) and value.keys() == {"class", "params"}


def read_config(source: Path) -> dict[str, Any]:
    """The config of a save, as it was written and with nothing in it that cannot be."""
    path = source / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(f"folder must hold an estimator written by save; there is no {path.name} in {source}.")
    content = read_bytes(path)
    config = parsed_json(content, path)
    version = config.get("format") if isinstance(config, dict) else None
    if version != FORMAT_VERSION or not isinstance(config, dict):
        raise ValueError(
            f"{path} has format {version!r}; this version reads format {FORMAT_VERSION}. Read it with the version that "
            "wrote it, or fit and save the estimator again."
        )
    own = str(config.get("sha256"))
    unsigned = content.replace(own.encode(errors="replace"), UNSIGNED.encode(), 1)
    if hashlib.sha256(unsigned).hexdigest() != own:
        raise ValueError(
            f"{path} is not what was saved: its checksum differs. It was damaged or edited. Take another copy of the "
            "folder, or save the estimator again."
        )
    with naming(path, RecursionError):
        _check_config(config)
    return config


def _check_config(config: dict[str, Any]) -> None:
    check_form(config, CONFIG, "config")
    if config["class"] not in STATES:
        raise ValueError(f"the folder holds a {config['class']!r}; this version knows {sorted(STATES)}.")
    check_form(config["state"], STATES[config["class"]], "state")
    _check_params(config["class"], config["params"], config["given_again"], "params")
    if absent := {WEIGHTS, f"{CALIBRATION}/{OUTPUTS_FOLDER.marker}"} - set(config["files"]):
        raise ValueError(f"files must have {', '.join(sorted(absent))}; it has not.")
    for name in config["files"]:
        if name == CONFIG_FILE or not SAVE_FOLDER.contents.fullmatch(name):
            raise ValueError(f"files must have names that save gives; got {name!r}.")


def _check_params(name: str, params: dict[str, Any], given_again: list[str], place: str) -> None:
    """Refuse parameters that a class has not, and estimators in them that are none of the registry."""
    classes = registry()
    if name not in classes:
        raise ValueError(f"{place} holds a {name!r}; this version knows {sorted(classes)}.")
    names: list[str] = classes[name]._get_param_names()  # type: ignore[attr-defined]
    if unknown := sorted({*params, *given_again} - set(names)) or sorted(set(params) & set(given_again)):
        raise ValueError(f"{place} must be parameters of {name}, each once: {', '.join(names)}; got {unknown}.")
    for key, value in params.items():
        if is_described(value):
            check_form(value, {"class": str, "params": dict}, f"{place}.{key}")
            _check_params(value["class"], value["params"], [], f"{place}.{key}")


def check_classes(state: dict[str, Any], outputs: ExitOutputs) -> None:
    """Refuse classes that are none, or not those of the calibration outputs."""
    labels, dtype = state["classes"], np.dtype(state["classes_dtype"])
    longest = max((4 * len(label) for label in labels if isinstance(label, str)), default=0)
    if dtype.kind not in "biufUO" or dtype.itemsize > max(LONGEST_LABEL, longest):
        raise ValueError(f"classes_dtype must be that of labels; got {state['classes_dtype']!r}.")
    if len(set(labels)) < len(labels) or len(labels) != outputs.n_classes:
        raise ValueError(
            f"classes must be the {outputs.n_classes} different ones of the calibration outputs; got {len(labels)}, "
            f"{len(set(labels))} of them different."
        )
