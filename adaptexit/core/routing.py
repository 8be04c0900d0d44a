"""From thresholds to the exit of every sample, and what that means on average.

A sample leaves exit k iff ``score > threshold``. The thresholds that are stored are observed scores; what is compared
online and offline is the *cutoff*, half way between the threshold and the next observed score above it, so that a
rounding error cannot flip the calibration sample that sits on the threshold itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptexit.core.outputs import ExitOutputs

Floats = NDArray[np.float64]


def switched_on(thresholds: Floats) -> NDArray[np.bool_]:
    """Exits that somebody can leave at, shape (K,); the last always is on."""
    finite = thresholds < np.inf
    on: NDArray[np.bool_] = np.array(finite.any(axis=1) if finite.ndim == 2 else finite)
    on[-1] = True
    return on


def accepts(predictions: NDArray[Any], scores: NDArray[Any], cutoff: Floats | np.float64) -> NDArray[np.bool_]:
    """Who leaves, shape (B,): those whose score lies above the exit's cutoff (one number, or one a class)."""
    limit: Any = cutoff[predictions] if isinstance(cutoff, np.ndarray) and cutoff.ndim else cutoff
    # A NumPy number keeps its double precision beside scores in single; in single it could round to a score itself.
    return np.asarray(scores > limit)


def exit_index(outputs: ExitOutputs, cutoffs: Floats) -> NDArray[np.intp]:
    """The exit at which every sample leaves, shape (N,), for cutoffs of shape (K,) or (K, C)."""
    exits = np.full(outputs.n_samples, outputs.n_exits - 1, dtype=np.intp)
    for k in range(outputs.n_exits - 2, -1, -1):
        predictions = exits if outputs.predictions is None else outputs.predictions[k]
        exits[accepts(predictions, outputs.scores[k], cutoffs[k])] = k
    return exits


def summarise(outputs: ExitOutputs, exits: NDArray[np.intp], on: NDArray[np.bool_]) -> tuple[float, float, Floats]:
    """Accuracy, mean relative cost and exit rates (K,) when sample i leaves at ``exits[i]``; by weight, where any."""
    if outputs.sample_weight is not None:
        return _weighted_summary(outputs, outputs.sample_weight, exits, on)
    counts = np.zeros(outputs.n_exits, dtype=np.int64)
    quality = 0.0
    for k, graded in enumerate(outputs.graded):
        here = exits == k
        counts[k] = np.count_nonzero(here)
        quality += np.count_nonzero(graded & here) if graded.dtype == bool else float(graded @ here)
    rates = counts / outputs.n_samples
    cost = float(rates @ outputs.path_costs(on)) / outputs.full_cost
    return quality / outputs.n_samples, cost, rates


def _weighted_summary(
    outputs: ExitOutputs, weights: Floats, exits: NDArray[np.intp], on: NDArray[np.bool_]
) -> tuple[float, float, Floats]:
    rates = np.bincount(exits, weights=weights, minlength=outputs.n_exits) / weights.sum()
    cost = float(rates @ outputs.path_costs(on)) / outputs.full_cost
    return outputs.mean(_at_exits(outputs.graded, exits)), cost, rates


def _at_exits(graded: NDArray[Any], exits: NDArray[np.intp]) -> Floats:
    """Quality (N,) of every sample's answer at its exit."""
    return graded[exits, np.arange(len(exits))].astype(np.float64)


def standard_errors(outputs: ExitOutputs, exits: NDArray[np.intp], on: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Standard errors when sample i leaves at ``exits[i]``: of accuracy, of relative cost, and of the accuracy lost.

    The loss is against the full model on the same samples, which agrees with most answers: its error is the smaller
    one. Both as if one more sample disagreed, since where none does nothing is certain either. By weight, the error of
    a mean is sqrt(sum w^2 (x - mean)^2) / sum w.
    """
    if outputs.sample_weight is not None:
        return _weighted_errors(outputs, outputs.sample_weight, exits, on)
    n = outputs.n_samples
    first, second, lost = 0.0, 0.0, _largest_difference(outputs.graded) ** 2
    counts = np.zeros(outputs.n_exits)
    full = outputs.graded[-1]
    for k, graded in enumerate(outputs.graded):
        here = exits == k
        counts[k] = np.count_nonzero(here)
        if graded.dtype == bool:
            first += float(np.count_nonzero(graded & here))
            lost += float(np.count_nonzero((graded != full) & here))
        else:
            values = graded[here].astype(np.float64)
            first, second = first + float(values.sum()), second + float(values @ values)
            lost += float(np.square(values - full[here]).sum())
    mean = first / n
    spread = mean * (1 - mean) if full.dtype == bool else second / n - mean**2
    paths, rates = outputs.path_costs(on) / outputs.full_cost, counts / n
    cost_spread = rates @ (paths - rates @ paths) ** 2
    return float(np.sqrt(max(float(spread), 0.0) / n)), float(np.sqrt(cost_spread / n)), float(np.sqrt(lost) / n)


def _weighted_errors(
    outputs: ExitOutputs, weights: Floats, exits: NDArray[np.intp], on: NDArray[np.bool_]
) -> tuple[float, float, float]:
    quality, costs = _at_exits(outputs.graded, exits), (outputs.path_costs(on) / outputs.full_cost)[exits]
    lost = quality - outputs.graded[-1].astype(np.float64)
    total = float(weights.sum())
    errors = [np.linalg.norm(weights * (values - outputs.mean(values))) / total for values in (quality, costs)]
    largest = _largest_difference(outputs.graded[:, weights > 0])
    drop_se = np.hypot(np.linalg.norm(weights * lost), largest) / total
    return float(errors[0]), float(errors[1]), float(drop_se)


def _largest_difference(graded: NDArray[Any]) -> float:
    """Most that an exit's quality differs from the full model's on one sample: 1 for right and wrong."""
    if graded.dtype == bool:
        return 1.0
    full = np.asarray(graded[-1], dtype=np.float64)
    return max(float(np.abs(row - full).max()) for row in graded)


def cutoffs_above(thresholds: NDArray[Any], scores: NDArray[Any]) -> Floats:
    """Half way from each threshold to the smallest observed score above it, shape of ``thresholds``.

    ``scores`` are the sorted (rising) observed scores of the cell. Thresholds of -inf and inf stay as they are.
    """
    values = np.asarray(thresholds, dtype=np.float64)
    above = np.searchsorted(scores, values, side="right")
    next_up = np.asarray(scores, dtype=np.float64)[np.minimum(above, len(scores) - 1)]
    return np.where(np.isfinite(values) & (above < len(scores)), midpoint(values, next_up), values)


def midpoint(low: Any, high: Any) -> Floats:
    """Half way between two numbers, and below ``high`` even where no number lies between."""
    with np.errstate(invalid="ignore"):
        middle = low / 2 + high / 2
    return np.asarray(np.where((low <= middle) & (middle < high), middle, low), dtype=np.float64)
