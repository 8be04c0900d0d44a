"""What displays are given, checked before anything is drawn: matplotlib would name none of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

# -- numbers ----------------------------------------------------------------------------------------------------------


def numbers(
    name: str, values: Any, *shape: int | str, finite: bool = True, whole: bool = False, beside: str = ""
) -> NDArray[Any]:
    """Real numbers of a shape, whose letters stand for any length above 0, as an array.

    ``beside`` is the argument that its numbers come from.
    """
    expected = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
    kind = "whole numbers, 0 or above," if whole else "finite real numbers" if finite else "real numbers"
    try:
        array = np.asarray(values)
    except Exception as error:  # whatever holds them may raise anything
        raise TypeError(f"{name} must be {kind} of shape {expected}; got {type(values).__name__}: {error}") from error
    if isinstance(values, np.ma.MaskedArray) or array.dtype.kind not in ("iu" if whole else "iufb"):
        actual = "a masked array" if isinstance(values, np.ma.MaskedArray) else f"dtype {array.dtype}"
        raise TypeError(f"{name} must be {kind} of shape {expected}; got {actual}.")
    fits = len(array.shape) == len(shape) and all(
        size > 0 if isinstance(length, str) else size == length for size, length in zip(array.shape, shape, strict=True)
    )
    if not fits:
        reason = f" beside this {beside}" if beside else ""
        raise ValueError(f"{name} must be {kind} of shape {expected}{reason}; got shape {array.shape}.")
    if (finite and not np.isfinite(array).all()) or np.isinf(array).any() or (whole and (array < 0).any()):
        raise ValueError(f"{name} must be {kind}; got values from {array.min()} to {array.max()}.")
    return array


def number(name: str, value: Any) -> float:
    """One finite real number."""
    return float(numbers(name, value))


def standard_errors(values: Any, length: int) -> NDArray[Any]:
    """Of accuracies, one each, none negative."""
    errors = numbers("accuracy_se", values, length, beside="cost")
    if (errors < 0).any():
        raise ValueError(f"accuracy_se must be standard errors, 0 or above; got {errors.min()}.")
    return errors


def chosen_point(chosen: Any) -> tuple[float, float] | None:
    """(cost, accuracy) of an operating point, or None."""
    if chosen is None:
        return None
    cost, accuracy = numbers("chosen", chosen, 2)
    return float(cost), float(accuracy)


def check_exit(name: str, value: Any, n_exits: int) -> None:
    """Refuse what is none of the exits before the last."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value not in range(n_exits - 1):
        raise ValueError(f"{name} must be one of 0 ... {n_exits - 2}; got {value!r}.")


def check_switch(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False; got {value!r}.")


# -- words ------------------------------------------------------------------------------------------------------------


def text(name: str, value: Any) -> str:
    """A word or several."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str; got {value!r}.")
    return value


def optional_text(name: str, value: Any) -> str | None:
    """The same, or None."""
    return None if value is None else text(name, value)


def sequence(name: str, values: Any, what: str) -> list[Any]:
    """The entries of something with a length and an order."""
    if isinstance(values, (bytes, Mapping, set, frozenset)) or not isinstance(values, (Collection, np.ndarray)):
        raise TypeError(f"{name} must be a sequence, {what}; got {values!r}.")
    try:
        return list(values)
    except TypeError as error:  # an array without axes
        raise TypeError(f"{name} must be a sequence, {what}; got {values!r}.") from error


# -- curves -----------------------------------------------------------------------------------------------------------


def curve_pairs(name: str, curves: Any, *, points: bool = False) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """(cost, accuracy) by name: arrays of one length each, or single numbers."""
    form = "two numbers" if points else "two arrays"
    if not isinstance(curves, Mapping):
        raise TypeError(f"{name} must be a dict of name to (cost, accuracy); got {type(curves).__name__}.")
    arrays = {}
    for key, pair in curves.items():
        label = f"{name}[{text(name, key)!r}]"
        cost_and_accuracy = sequence(label, pair, "(cost, accuracy)")
        if len(cost_and_accuracy) != 2:
            raise ValueError(f"{label} must be {form}, (cost, accuracy); got {len(cost_and_accuracy)}.")
        cost = numbers(f"cost of {label}", cost_and_accuracy[0], *(() if points else ("P",)))
        arrays[key] = cost, numbers(f"accuracy of {label}", cost_and_accuracy[1], *cost.shape)
    return arrays


# -- objects ----------------------------------------------------------------------------------------------------------


def check_kind(name: str, value: Any, kind: type, source: str) -> None:
    """Refuse what is none of a class; ``source`` says what makes one."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"{name} must be {article} {kind.__name__}, as {source} gives it; got {type(value).__name__}.")


def check_estimator(estimator: Any) -> None:
    """Refuse what is no estimator of this package."""
    if isinstance(estimator, type) or not hasattr(estimator, "_thresholded"):
        raise TypeError(
            "estimator must be a fitted estimator, as CascadeSaver(...).fit(X, y) gives it; got "
            f"{estimator.__name__ if isinstance(estimator, type) else type(estimator).__name__}."
        )


def check_comparison(comparison: Any) -> None:
    """Refuse what is no comparison."""
    if isinstance(comparison, type) or not all(hasattr(comparison, name) for name in ("points", "frontiers", "at")):
        raise TypeError(f"comparison must be a Comparison, as compare gives it; got {type(comparison).__name__}.")


def check_evaluation(evaluation: Any) -> None:
    """Refuse what is no evaluation."""
    if isinstance(evaluation, type) or not all(hasattr(evaluation, name) for name in ("anytime", "budgeted", "unit")):
        raise TypeError(
            f"evaluation must be an Evaluation, as evaluate_settings gives it; got {type(evaluation).__name__}."
        )
