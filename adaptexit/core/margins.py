"""Class precision margins: thresholds by exit and class that keep an exit about as precise as the full model.

CalexNet (2026), equations 6, 7 and 12. A sample that exit k takes for class i may leave there if, among the calibration
samples at least as sure, the share that really is of class i exceeds (1 - margin) times the full model's precision on
that class; of all thresholds that do, the smallest is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.routing import midpoint

Floats = NDArray[np.float64]

MARGINS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
"""The margins that the paper sweeps."""

Bound = Literal["none", "wilson", "fixed_sequence"]
BOUNDS = get_args(Bound)

_DECIMALS = 12
"""Of precisions by weight that are compared, so that rounding in their sums does not tell equal ones apart."""

LEAST_TESTED = 30
"""Samples that leave in the first test of the fixed sequence, at least."""


@dataclass(frozen=True)
class Rule:
    """What makes a threshold feasible, beside its target.

    Attributes
    ----------
    min_support : int
        Calibration samples that have to leave, at least 1.
    bound : {"none", "wilson", "fixed_sequence"}
        What has to exceed the target: the precision observed; the lower end of its one-sided Wilson interval; or the
        true precision, as far as tests in a fixed order from the surest samples on can tell.
    delta : float
        Error level of one cell's interval or tests.
    """

    min_support: int = 1
    bound: Bound = "none"
    delta: float = 0.1


def class_precision(
    predictions: NDArray[Any], labels: NDArray[Any], n_classes: int, sample_weight: Floats | None = None
) -> Floats:
    """Share, by weight, of right ones among the samples predicted as each class, (C,); NaN where there are none."""
    hits = predictions == labels
    answers = np.bincount(predictions, sample_weight, n_classes)
    with np.errstate(invalid="ignore"):
        if sample_weight is not None:
            return np.asarray(np.bincount(predictions, hits * sample_weight, n_classes) / answers)
        return np.asarray(np.bincount(predictions[hits], minlength=n_classes) / answers, dtype=np.float64)


def margin_thresholds(
    outputs: ExitOutputs, margins: Sequence[float], *, cascade_aware: bool, rule: Rule | None = None
) -> tuple[Floats, Floats]:
    """Thresholds and cutoffs of every margin, each (M, K, C); the last exit's are -inf.

    Parameters
    ----------
    outputs : ExitOutputs
        With predictions and labels.
    margins : sequence of M floats, at least 0
    cascade_aware : bool
        Whether precision at an exit is counted on the samples that the exits before it leave over (equation 12), or on
        all. The first exit is the same either way.
    rule : Rule, optional

    Notes
    -----
    Where samples have weights, precisions are weighted, and those of weight 0 are left out; ``min_support`` still
    counts samples. Intervals and tests need numbers of equal samples, so those have to be done without weights.

    Candidates for a threshold are -inf and the scores observed in the cell, so the samples that leave are always whole
    groups of equal scores. +inf, nobody leaves, where no candidate is feasible, where the exit never answers with the
    class and where the full model never does. The cutoff lies half way from the threshold to the next score above.

    All margins and classes of an exit are served by one sort: O(N log N + M C log N), and O(M N) more for survivors.
    """
    rule, outputs = rule or Rule(), outputs.counted()
    weights = outputs.sample_weight
    if weights is not None and rule.bound != "none":
        raise ValueError(
            f"bound must be 'none' for outputs with sample_weight; got {rule.bound!r}, which counts samples as alike. "
            "Draw a sample by weight and take its outputs: outputs.take(indices), without weights."
        )
    predictions, labels = _classes(outputs)
    n_exits, n_classes = outputs.n_exits, outputs.n_classes or 0
    precision = class_precision(predictions[-1], labels, n_classes, weights)
    targets = (1.0 - np.asarray(margins, dtype=np.float64)[:, None]) * precision
    targets[:, np.isnan(precision)] = np.inf
    if weights is not None:
        targets = np.round(targets, _DECIMALS)
    thresholds = np.full((len(margins), n_exits, n_classes), -np.inf)
    cutoffs = thresholds.copy()
    alive = np.ones((len(margins), outputs.n_samples), dtype=bool)
    for k in range(n_exits - 1):
        cells = _Cells.sorted(predictions[k], outputs.scores[k], labels, n_classes, weights)
        if not cascade_aware or k == 0:
            thresholds[:, k], cutoffs[:, k] = cells.smallest_feasible(targets, rule)
        else:
            for m, survivors in enumerate(alive):
                own = cells.take(survivors)
                thresholds[m, k], cutoffs[m, k] = (x[0] for x in own.smallest_feasible(targets[m, None], rule))
        if cascade_aware:
            alive &= outputs.scores[k] <= cutoffs[:, k][:, predictions[k]]
    return thresholds, cutoffs


def _classes(outputs: ExitOutputs) -> tuple[NDArray[Any], NDArray[Any]]:
    if outputs.predictions is None or outputs.labels is None:
        raise ValueError(
            "class precision needs predictions and labels; the outputs have quality alone. Use ThresholdCalibrator."
        )
    return outputs.predictions, outputs.labels


@dataclass(frozen=True)
class _Cells:
    """Samples at one exit, by predicted class and then from sure to unsure."""

    order: NDArray[np.intp]
    classes: NDArray[np.intp]
    scores: Floats
    right: NDArray[np.bool_]
    n_classes: int
    weights: Floats | None = None

    @classmethod
    def sorted(
        cls,
        predictions: NDArray[Any],
        scores: NDArray[Any],
        labels: NDArray[Any],
        n_classes: int,
        weights: Floats | None = None,
    ) -> _Cells:
        sure = np.asarray(scores, dtype=np.float64)
        falling = np.argsort(-sure)
        order = falling[np.argsort(predictions[falling], kind="stable")]  # several times faster than lexsort
        classes = predictions[order]
        ordered = None if weights is None else weights[order]
        return cls(order, classes.astype(np.intp), sure[order], classes == labels[order], n_classes, ordered)

    def take(self, samples: NDArray[np.bool_]) -> _Cells:
        """Those of the samples (N,), still in order."""
        some = samples[self.order]
        weights = None if self.weights is None else self.weights[some]
        return _Cells(
            self.order[some], self.classes[some], self.scores[some], self.right[some], self.n_classes, weights
        )

    def smallest_feasible(self, targets: Floats, rule: Rule) -> tuple[Floats, Floats]:
        """Thresholds and cutoffs (Q, C) for targets (Q, C)."""
        groups = _Groups.of(self)
        by = groups.by_tests if rule.bound == "fixed_sequence" else groups.by_precision
        return groups.thresholds(by(targets, rule))


@dataclass(frozen=True)
class _Groups:
    """Groups of equal score (E), each with how many samples of its class are at least as sure, and how many right.

    ``size`` and ``right`` are by weight, where there are any; ``first`` (C + 1) is where each class begins.
    """

    classes: NDArray[np.intp]
    scores: Floats
    count: NDArray[np.int64]
    size: NDArray[Any]
    right: NDArray[Any]
    first: NDArray[np.intp]

    @classmethod
    def of(cls, cells: _Cells) -> _Groups:
        classes, scores = cells.classes, cells.scores
        differs = (classes[1:] != classes[:-1]) | (scores[1:] != scores[:-1])
        ends = np.flatnonzero(np.append(differs, np.ones(min(1, len(classes)), dtype=bool)))
        begins = np.searchsorted(classes, np.arange(cells.n_classes))
        at = begins[classes[ends]]
        count = size = ends + 1 - at
        each: NDArray[Any] = cells.right
        if cells.weights is not None:
            sizes = np.concatenate([[0.0], np.cumsum(cells.weights)])
            size, each = sizes[ends + 1] - sizes[at], cells.right * cells.weights
        right = np.concatenate([[0], np.cumsum(each)])
        return cls(
            classes[ends], scores[ends], count, size, right[ends + 1] - right[at],
            np.searchsorted(classes[ends], np.arange(cells.n_classes + 1)),
        )  # fmt: skip

    def by_precision(self, targets: Floats, rule: Rule) -> NDArray[np.intp]:
        """Number of groups that leave, (Q, C): as many as the last one whose precision exceeds the target.

        Precisions become ranks; the best rank from a group on to the end of its class falls from group to group, and
        with every class's ranks lifted above the next class's it falls throughout: one binary search a query.
        """
        precision = self.right / self.size
        if self.size is not self.count:
            precision = np.round(precision, _DECIMALS)
        if rule.bound == "wilson":
            precision = _wilson_lower(precision, self.count, rule.delta)
        levels, ranks = np.unique(precision, return_inverse=True)
        ranks = np.where(self.count >= rule.min_support, ranks + 1, 0)
        lift = (len(levels) + 1) * np.arange(len(self.first) - 2, -1, -1)
        best = np.maximum.accumulate((ranks + lift[self.classes])[::-1])[::-1]
        # The least rank whose precision exceeds the target; ranks count from 1, as 0 stands for too little support.
        least = np.searchsorted(levels, targets, side="right") + 1
        return np.asarray(np.searchsorted(-best, -(least + lift), side="right") - self.first[:-1])

    def by_tests(self, targets: Floats, rule: Rule) -> NDArray[np.intp]:
        """Number of groups that leave, (Q, C): the last of the tests, in their order, that all succeed."""
        n_leaving = np.zeros(targets.shape, dtype=np.intp)
        for q, c in np.ndindex(*targets.shape):
            here = slice(self.first[c], self.first[c + 1])
            count, right, target = self.count[here], self.right[here], float(targets[q, c])
            if not len(count) or target >= 1.0 or count[-1] < rule.min_support:
                continue
            if target <= 0.0:
                n_leaving[q, c] = len(count)
                continue
            stops = _test_stops(count, max(rule.min_support, _first_size(target, rule.delta)))
            successes = stats.binom.sf(right[stops] - 1, count[stops], target) <= rule.delta
            n_passed = len(successes) if successes.all() else int(np.argmin(successes))
            n_leaving[q, c] = stops[n_passed - 1] + 1 if n_passed else 0
        return n_leaving

    def thresholds(self, n_leaving: NDArray[np.intp]) -> tuple[Floats, Floats]:
        """Thresholds and cutoffs that let so many groups of each class leave."""
        thresholds = np.full(n_leaving.shape, np.inf)
        some = n_leaving > 0
        thresholds[some & (n_leaving == np.diff(self.first))] = -np.inf
        part = some & (n_leaving < np.diff(self.first))
        last = (self.first[:-1] + n_leaving - 1)[part]
        thresholds[part] = self.scores[last + 1]
        cutoffs = thresholds.copy()
        cutoffs[part] = midpoint(self.scores[last + 1], self.scores[last])
        return thresholds, cutoffs


def _wilson_lower(precision: Floats, count: NDArray[np.int64], delta: float) -> Floats:
    """Lower end of the one-sided Wilson interval at level 1 - delta."""
    z = float(stats.norm.isf(delta))
    spread = z * np.sqrt(precision * (1.0 - precision) / count + (z / (2 * count)) ** 2)
    lower = (precision + z**2 / (2 * count) - spread) / (1.0 + z**2 / count)
    return np.where(precision > 0.0, lower, 0.0)  # exactly 0, which a target of 0 asks for


def _first_size(target: float, delta: float) -> int:
    """Samples with which a perfect record rejects precision <= target well below delta."""
    return max(LEAST_TESTED, math.ceil(2.0 * math.log(delta) / math.log(target)))


def _test_stops(count: NDArray[np.int64], start: int) -> list[int]:
    """Groups at which the tests stand: from the first with ``start`` samples, each with a tenth more, to the last."""
    stops: list[int] = []
    size = start
    while size <= count[-1]:
        stops.append(int(np.searchsorted(count, size)))
        size = -(-11 * int(count[stops[-1]]) // 10)  # in whole numbers: 1.1 * 10 is more than 11
    if stops and stops[-1] != len(count) - 1:
        stops.append(len(count) - 1)
    return stops
