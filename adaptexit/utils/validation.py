"""Arguments that cannot be: refused with their name, what is allowed and what came."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def checked_number(name: str, value: Any, meaning: str, least: float = -np.inf) -> float:
    """A finite number, not below ``least``, as a float; ``meaning`` says in the error what it has to be."""
    try:
        number = float("nan") if isinstance(value, (str, bytes, bool, np.bool_)) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number) or number < least:
        raise ValueError(f"{name} must be {meaning}; got {value!r}.")
    return number


MOST_BUDGET = 2.0
"""Relative cost above which a percentage or an absolute cost was probably meant, where nothing is that dear."""


def checked_relative_cost(name: str, value: Any, dearest: float, slack: float = 0.0) -> float:
    """A cost in units of the full model's; one above all that there is is asked about, as 40 was probably 0.4."""
    cost = checked_number(name, value, "a finite relative cost (0.4 is 40% of the full model)")
    most = max(MOST_BUDGET, dearest)
    if cost > most + slack:
        meant = f"Was {cost / 100:.4g} meant?" if cost <= 100 else "Divide a cost by the full model's."
        raise ValueError(
            f"{name} must be a relative cost, at most {most:.4g}: 1 is the plain full model; got {cost:.4g}. {meant}"
        )
    return cost


def check_whole(name: str, value: Any, least: int = 1, other: str = "") -> None:
    """Refuse what is no whole number of at least ``least``; ``other`` says in the error what else may be."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number, at least {least}{other}; got {value!r}.")


def check_switch(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False; got {value!r}.")


def checked_folder(name: str, value: Any) -> Path | None:
    """A folder, new or not, as a path, its ``~`` replaced; None as it is."""
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name} must be the path of a folder, or None; got {value!r}.")
    folder = Path(value).expanduser()
    if folder.is_file():
        raise NotADirectoryError(f"{name} must be a folder or new; {folder} is a file.")
    return folder


def checked_settings(epochs: Any, lr: Any, weight_decay: Any, batch_size: Any) -> dict[str, Any]:
    """Refuse settings that cannot be; those that the training loop takes, without ``epochs``, which may be "auto"."""
    if not (isinstance(epochs, str) and epochs == "auto"):
        check_whole("epochs", epochs, 1, " or 'auto'")
    check_whole("batch_size", batch_size, 2)
    return {
        "lr": checked_number("lr", lr, "a finite number above 0", np.nextafter(0, 1)),
        "weight_decay": checked_number("weight_decay", weight_decay, "a finite number, 0 or above", 0.0),
        "batch_size": batch_size,
    }


def check_plain(name: str, values: Any) -> None:
    """Refuse what would be read otherwise than it is meant, or not at all: masked, sparse and complex values."""
    if isinstance(values, np.ma.MaskedArray):
        raise ValueError(f"{name} must be a plain array; got a masked one. Leave masked entries out, or fill them in.")
    if any(getattr(values, name, False) for name in ("is_meta", "is_sparse", "is_sparse_csr")):
        raise ValueError(f"{name} must hold its values densely; got a tensor that is sparse or has none (meta).")
    dtype = getattr(values, "dtype", None)
    if getattr(dtype, "is_complex", False) or getattr(dtype, "kind", "") == "c":
        raise ValueError(  # in scikit-learn's words, which it checks estimators for
            f"Complex data not supported: {name} must be real numbers; got {dtype}. Give the two parts apart."
        )


def plain_array(name: str, values: Any) -> NDArray[Any]:
    """Whatever holds values as an array; a mapped one stays one."""
    check_plain(name, values)
    try:
        array = np.asanyarray(values.detach().cpu() if hasattr(values, "detach") else values)
    except Exception as error:  # whatever holds them may raise anything
        shapes = "entries of different shapes" if isinstance(values, (list, tuple)) else type(values).__name__
        raise ValueError(f"{name} must be an array; got {shapes}: {error}") from error
    check_plain(name, array)
    return array


def real_array(name: str, values: Any) -> NDArray[Any]:
    """The same of real numbers."""
    array = plain_array(name, values)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be real numbers; got dtype {array.dtype}.")
    return array


def check_shape(array: NDArray[Any], shape: tuple[int, ...], name: str) -> None:
    """Refuse an array of another shape."""
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; got shape {array.shape}.")


def checked_weights(values: Any, n_samples: int | None) -> NDArray[np.float64]:
    """Weights of samples as floats (N,): finite, not negative, not all 0; None where N is not known yet."""
    weights = real_array("sample_weight", values).astype(np.float64)
    if weights.ndim != 1 or n_samples not in (None, len(weights)):
        n = "N" if n_samples is None else n_samples
        raise ValueError(f"sample_weight must have shape ({n},), one weight a sample; got shape {weights.shape}.")
    allowed = "sample_weight must be finite, not negative and not all zero"
    refused = ~(np.isfinite(weights) & (weights >= 0))
    if refused.any():
        where = int(np.argmax(refused))
        raise ValueError(f"{allowed}; sample {where} has {float(weights[where])}.")
    if not weights.any():
        raise ValueError(f"{allowed}; all are zero. Give weights above 0 to the samples that are to count.")
    return weights


def stored_array(
    arrays: Mapping[str, NDArray[Any]], name: str, shape: tuple[int | None, ...], allowed: str = ""
) -> NDArray[np.float64]:
    """One of the arrays that were read from a file, of that shape (None: any length).

    It holds floats, finite ones unless ``allowed`` names "inf" or "nan".
    """
    array = arrays.get(name)
    if array is None:
        raise ValueError(f"array {name} is missing.")
    if len(array.shape) != len(shape) or any(
        size not in (None, length) for size, length in zip(shape, array.shape, strict=True)
    ):
        raise ValueError(f"array {name} must have shape {shape}; got shape {array.shape}.")
    if array.dtype.kind != "f":
        raise ValueError(f"array {name} must hold floats; got dtype {array.dtype}.")
    if (np.isnan(array).any() and allowed != "nan") or (np.isinf(array).any() and allowed != "inf"):
        raise ValueError(f"array {name} must be finite{f' or {allowed}' if allowed else ''}; it is not.")
    return array


_ROWS = 2**14
"""Samples looked at at once: a mask of all of them would be large where they are many."""


def check_finite(rows: NDArray[Any] | list[NDArray[Any]], name: str) -> None:
    """Refuse NaN and inf in what K exits gave, samples first in each."""
    for k, row in enumerate(rows):
        parts = range(0, len(row), _ROWS)
        if not all(np.isfinite(row[start : start + _ROWS]).all() for start in parts):
            where = int(np.argmax(~np.isfinite(row).reshape(row.shape[0], -1).all(axis=1)))
            raise ValueError(
                f"{name} must be finite; exit {k} has {row[where]!r} at sample {where}. "
                "Look for NaN or inf in the data, or for a model that overflows."
            )


def compact_classes(array: NDArray[Any], n_classes: int, name: str) -> NDArray[Any]:
    """Class indices in the smallest signed integers that hold ``n_classes``; a ValueError for what are none."""
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integer class indices; got dtype {array.dtype}.")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= n_classes:
        raise ValueError(
            f"{name} must lie in 0 ... {n_classes - 1}; got values from {low} to {high}. "
            "Map other label values to indices first."
        )
    smallest = np.min_scalar_type(-n_classes)
    return array if array.dtype.itemsize <= smallest.itemsize else array.astype(smallest)
