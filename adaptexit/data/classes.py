"""Labels, classes and what is held out of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score
from sklearn.model_selection import train_test_split

from adaptexit.utils.validation import check_shape, plain_array, real_array


def hold_out(y: NDArray[Any], size: float, random_state: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices to fit on and to calibrate on: stratified where classes allow it, every class fitted on."""
    if not 0 < size < 1:
        raise ValueError(f"calibration_size must lie between 0 and 1; got {size!r}.")
    if len(y) < 2:
        raise ValueError(f"at least 2 samples are needed to fit and to calibrate; got {len(y)} sample.")
    _, codes, counts = np.unique(y, return_inverse=True, return_counts=True)
    lone = np.flatnonzero(counts[codes] == 1)
    rest = np.flatnonzero(counts[codes] > 1)
    n_classes = int(np.count_nonzero(counts > 1))
    n_out = min(max(round(size * len(y)), n_classes), len(rest) - n_classes)
    if n_out < 1:
        raise ValueError(
            "calibration needs samples besides one of each class to fit on; got "
            f"{len(y)} samples of {len(counts)} classes."
        )
    held_in, held_out = train_test_split(rest, test_size=n_out, stratify=codes[rest], random_state=random_state)
    # Stratifying may hold out every sample of a small class: one of each such class goes back.
    outside, first = np.unique(codes[held_out], return_index=True)
    back = held_out[first[~np.isin(outside, codes[held_in])]]
    return np.sort(np.concatenate([held_in, lone, back])), np.setdiff1d(held_out, back)


def known_classes(given: Any, width: int, fitted: NDArray[Any] | None) -> NDArray[Any]:
    """Labels in the order of ``width`` outputs: those given, those of fitted classifiers, or 0 ... width - 1."""
    if given is None:
        return np.arange(width) if fitted is None else fitted
    classes = plain_array("classes", given)
    try:
        different = classes.shape == (width,) and len(np.unique(classes)) == width
    except TypeError:  # names and numbers do not compare
        different = False
    if not different:
        raise ValueError(f"classes must be {width} different labels, one an output; got {given!r}.")
    if fitted is not None and not np.array_equal(classes, fitted):
        raise ValueError(f"classes must be those of the fitted classifiers, {fitted.tolist()}; got {classes.tolist()}.")
    return classes


def as_labels(y: Any) -> NDArray[Any]:
    """Labels as an array, from whatever holds them."""
    return np.asarray(plain_array("y", y))


def class_indices(labels: NDArray[Any], classes: NDArray[Any]) -> NDArray[np.intp]:
    """Labels as positions in ``classes``; integers where classes have names are taken as positions already."""
    if labels.ndim != 1:
        raise ValueError(f"y must be one label a sample; got shape {labels.shape}.")
    if classes.dtype.kind not in "iufb" and labels.dtype.kind in "iu":
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
            raise ValueError(
                f"y must hold names of the {len(classes)} classes {_shortened(classes)}, or their positions 0 ... "
                f"{len(classes) - 1}; got positions from {labels.min()} to {labels.max()}."
            )
        return labels.astype(np.intp)
    order = np.argsort(classes)
    try:
        place = np.minimum(np.searchsorted(classes, labels, sorter=order), len(classes) - 1)
        positions = order[place]
        strangers = np.unique(labels[classes[positions] != labels])
    except TypeError:  # names and numbers in arrays of objects do not compare
        strangers = labels
    if len(strangers):
        raise ValueError(
            f"y must hold labels among the {len(classes)} classes {_shortened(classes)}; got "
            f"{_shortened(strangers)}. Give the labels in the order of the outputs as classes=."
        )
    return positions


def accuracy_of(answers: NDArray[Any], y: NDArray[Any], classes: NDArray[Any], sample_weight: Any = None) -> float:
    """Share of the answers that are as the labels say, weighted or not."""
    if y.shape != answers.shape:
        raise ValueError(f"y must have shape {answers.shape}, one label a sample of X; got shape {y.shape}.")
    if classes.dtype.kind not in "iufb" and y.dtype.kind in "iu":
        y = classes[class_indices(y, classes)]  # positions of classes that have names
    if sample_weight is None:
        weights = None
    else:
        weights = real_array("sample_weight", sample_weight)
        check_shape(weights, answers.shape, "sample_weight")
        if not (np.isfinite(weights).all() and weights.sum() > 0):
            raise ValueError("sample_weight must be finite, and above 0 in sum; it is not.")
    try:
        return float(accuracy_score(y, answers, sample_weight=weights))
    except (TypeError, ValueError) as error:
        raise ValueError(f"y must hold labels as the classes {_shortened(classes)}; got others: {error}") from error


def _shortened(values: NDArray[Any]) -> str:
    return str(values.tolist()) if len(values) <= 6 else f"[{values[0]}, {values[1]}, ..., {values[-1]}]"
