"""The fields of recorded outputs, checked once: what :class:`~adaptexit.core.outputs.ExitOutputs` is made from."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptexit.core.costs import Costs
from adaptexit.utils.validation import (
    check_finite,
    check_shape,
    check_switch,
    checked_weights,
    compact_classes,
    plain_array,
    real_array,
)

MEAN_TOLERANCE = 1e-12
"""Weights with a mean as near to 1 are kept to the last bit, as when they are read back."""


def checked_fields(fields: Mapping[str, Any], costs: ArrayLike | None) -> dict[str, Any]:
    """Fields by name, in the form in which they are kept.

    Raises
    ------
    TypeError, ValueError
        As :class:`~adaptexit.core.outputs.ExitOutputs` says.
    """
    check_switch("chained", fields["chained"])
    if fields["cost_unit"] is not None and not isinstance(fields["cost_unit"], str):
        raise ValueError(f"cost_unit must be a word, as 'MACs', or None; got {fields['cost_unit']!r}.")
    scores = _checked_scores(fields["scores"])
    n_exits, n_samples = scores.shape
    checked = {"scores": scores} | _checked_classes(fields, n_exits, n_samples)
    if fields["quality"] is not None:
        checked["quality"] = _checked_rows("quality", fields["quality"], (n_exits, n_samples))
    elif fields["predictions"] is None or fields["labels"] is None:
        raise ValueError(
            "accuracy is undefined: give predictions and labels, or quality of shape (K, N) instead; "
            f"got predictions={_shape(fields['predictions'])}, labels={_shape(fields['labels'])}, quality=None."
        )
    if fields["logits"] is not None:
        if fields["n_classes"] is None:
            raise ValueError("logits need n_classes; got n_classes=None.")
        checked["logits"] = _checked_rows("logits", fields["logits"], (n_exits, n_samples, fields["n_classes"]))
    if fields["features"] is not None:
        checked["features"] = _checked_features(fields["features"], n_exits, n_samples)
    if fields["sample_weight"] is not None:
        checked["sample_weight"] = mean_one(checked_weights(fields["sample_weight"], n_samples))
    prices = Costs.checked(fields["stage_costs"], fields["exit_costs"], costs, n_exits)
    return checked | {"stage_costs": prices.stages, "exit_costs": prices.exits}


def mean_one(weights: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Weights (N,) scaled to a mean of 1; None where all are alike, which is as if there were none.

    Raises
    ------
    ValueError
        Where all are 0.
    """
    largest = weights.max()
    if largest == 0:
        raise ValueError("samples must have a weight above 0 among them; all of these have the weight 0.")
    if (weights == largest).all():
        return None
    if largest <= len(weights) and abs(float(weights.mean()) - 1.0) <= MEAN_TOLERANCE:
        return weights
    shares = weights / largest  # sums of very large ones would overflow
    return np.asarray(shares / shares.mean())


def _checked_scores(given: Any) -> NDArray[Any]:
    scores = np.empty(()) if given is None else real_array("scores", given)
    if scores.ndim != 2 or scores.shape[0] < 1:
        raise ValueError(f"scores must have shape (K, N) with K >= 1 exits; got shape {scores.shape}.")
    if scores.shape[1] == 0:
        raise ValueError("scores must hold at least one sample; got none. Check that the data set is not empty.")
    if scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float32 if scores.dtype == np.float16 else np.float64)
    check_finite(scores, "scores")
    return scores


def _checked_classes(fields: Mapping[str, Any], n_exits: int, n_samples: int) -> dict[str, Any]:
    n_classes = fields["n_classes"]
    if fields["predictions"] is None and fields["labels"] is None and n_classes is None:
        return {}
    if not isinstance(n_classes, Integral) or isinstance(n_classes, bool) or n_classes < 1:
        raise ValueError(f"n_classes must be a positive integer; got {n_classes!r}.")
    checked: dict[str, Any] = {"n_classes": int(n_classes)}
    for name, shape in (("predictions", (n_exits, n_samples)), ("labels", (n_samples,))):
        if fields[name] is not None:
            array = plain_array(name, fields[name])
            check_shape(array, shape, name)
            checked[name] = compact_classes(array, int(n_classes), name)
    return checked


def _checked_rows(name: str, given: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    array = real_array(name, given)
    check_shape(array, shape, name)
    check_finite(array, name)
    return array


def _checked_features(given: Any, n_exits: int, n_samples: int) -> list[NDArray[Any]]:
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"features must be a list of {n_exits} arrays; got {type(given).__name__}.")
    features = [real_array("features", feature) for feature in given]
    if len(features) != n_exits or any(f.ndim != 2 or f.shape[0] != n_samples for f in features):
        raise ValueError(
            f"features must be a list of {n_exits} arrays of shape ({n_samples}, d_k); "
            f"got shapes {[f.shape for f in features]}."
        )
    check_finite(features, "features")
    return features


def _shape(array: NDArray[Any] | None) -> str:
    return "None" if array is None else f"shape {np.shape(array)}"
