"""TinySaver's arithmetic: how much of a base model's job a saver can take (Wang et al., ECCV 2024, section 3).

All functions take, for N samples, the saver's confidence and the quality (usually correctness, 0 or 1) of both models'
answers. A sample leaves at the saver iff its confidence is at least the paper's t, so equal confidences leave together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptexit.core.frontier import TOLERANCE
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.search import MOST_SAMPLES_EXACT, search_thresholds
from adaptexit.utils.frames import as_frame

if TYPE_CHECKING:
    import pandas

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class JobCurve:
    """Accuracy of saver and base on the samples that leave, against how many leave (TinySaver's Fig. 3).

    Attributes
    ----------
    exit_ratio, saver_accuracy, base_accuracy, threshold : arrays of shape (E,)
        One entry for each distinct confidence, from the surest; ``threshold`` is the paper's t (leave iff at least t).
    job_ratio : float
        Largest exit ratio at which the saver is not worse than the base on those who leave (eq. 7), 0 if none.
    """

    exit_ratio: Floats
    saver_accuracy: Floats
    base_accuracy: Floats
    threshold: Floats
    job_ratio: float

    def to_frame(self) -> pandas.DataFrame:
        """A pandas table, one row a distinct confidence: the four curves (needs pandas)."""
        names = ("exit_ratio", "saver_accuracy", "base_accuracy", "threshold")
        return as_frame({name: getattr(self, name) for name in names})


def job_curve(
    confidence: ArrayLike, saver_quality: ArrayLike, base_quality: ArrayLike, sample_weight: Floats | None = None
) -> JobCurve:
    """The curve of TinySaver's Fig. 3 with its crossing (eq. 6-7), arguments of shape (N,).

    With ``sample_weight`` (``ExitOutputs.sample_weight``) all shares and means are by weight.
    """
    sizes, saver_sum, base_sum, thresholds = _sorted_sums(confidence, saver_quality, base_quality, sample_weight)
    ratio = sizes / sizes[-1]
    equal = np.flatnonzero(saver_sum >= base_sum - TOLERANCE)
    return JobCurve(
        exit_ratio=ratio, saver_accuracy=saver_sum / sizes, base_accuracy=base_sum / sizes,
        threshold=thresholds, job_ratio=float(ratio[equal[-1]]) if len(equal) else 0.0,
    )  # fmt: skip


def job_ratio(
    confidence: ArrayLike, saver_quality: ArrayLike, base_quality: ArrayLike, sample_weight: Floats | None = None
) -> float:
    """r_match of TinySaver's eq. 7: the largest share of samples the saver takes with no loss on those that leave."""
    return job_curve(confidence, saver_quality, base_quality, sample_weight).job_ratio


def delta_cost(saver_cost: float, base_cost: float, ratio: float) -> float:
    """ΔC of TinySaver's eq. 10, C_S / C_B - r: the change of mean cost relative to the base; it pays where negative."""
    return saver_cost / base_cost - ratio


def required_cost(
    confidence: ArrayLike,
    saver_quality: ArrayLike,
    base_quality: ArrayLike,
    saver_cost: float,
    base_cost: float,
    drops: Sequence[float] = (0.01, 0.005, 0.001, 0.0),
) -> Floats:
    """Relative cost needed when accuracy may fall by at most each of ``drops`` (TinySaver's Table 1), shape of drops.

    C_S/C_B + 1 - r with the largest r that keeps the drop, also where r is 0: then it lies above 1, as the paper
    prints it. The plain base, at relative cost 1, is a separate operating point.
    """
    sizes, saver_sum, base_sum, _ = _sorted_sums(confidence, saver_quality, base_quality)
    gain = saver_sum - base_sum
    losses = np.asarray(drops, dtype=np.float64) * sizes[-1]
    within = gain[None, :] >= -losses[:, None] - 1e-9
    longest = np.where(within, sizes[None, :], 0).max(axis=1)
    return np.asarray(saver_cost / base_cost + 1.0 - longest / sizes[-1])


def _sorted_sums(
    confidence: ArrayLike, saver_quality: ArrayLike, base_quality: ArrayLike, sample_weight: Floats | None = None
) -> tuple[NDArray[Any], Floats, Floats, NDArray[Any]]:
    """Of prefixes that end with a tie (E): sizes, by weight where there are any, summed qualities, least confidence."""
    scores = np.asarray(confidence)
    scores = scores if scores.dtype.kind == "f" else scores.astype(np.float64)
    shapes = [np.shape(values) for values in (confidence, saver_quality, base_quality)]
    if scores.ndim != 1 or len(set(shapes)) > 1 or not scores.size:
        raise ValueError(
            f"confidence, saver_quality and base_quality must have one shape (N,) with N >= 1; got {shapes}."
        )
    if not np.isfinite(scores).all():
        raise ValueError("confidence must be finite; it contains NaN or infinity.")
    order = np.argsort(-scores, kind="stable")
    weights = None if sample_weight is None else sample_weight[order]
    if weights is not None and not weights.all():
        order, weights = order[weights > 0], weights[weights > 0]
    falling = scores[order]
    ends = np.append(np.flatnonzero(np.diff(falling)) + 1, len(falling))
    qualities = [np.asarray(quality)[order] for quality in (saver_quality, base_quality)]
    sizes = ends if weights is None else np.cumsum(weights)[ends - 1]
    saver_sum, base_sum = (
        np.cumsum(quality if weights is None else quality * weights, dtype=np.float64)[ends - 1]
        for quality in qualities
    )
    return sizes, saver_sum, base_sum, falling[ends - 1]


@dataclass(frozen=True)
class SaverReport:
    """What one saver brings to its cascade at no loss of calibrated accuracy.

    Attributes
    ----------
    saver : int
        Its exit.
    delta_cost : float
        Change of the mean relative cost by having it run; it pays where negative. With one saver TinySaver's ΔC
        (eq. 10); with several, the cheapest cascade with it against the cheapest without it.
    job_ratio : float
        Share of the base's job that it could take alone (eq. 7).
    """

    saver: int
    delta_cost: float
    job_ratio: float

    @property
    def pays(self) -> bool:
        """Whether running the saver lowers the cost."""
        return self.delta_cost < 0


def saver_reports(outputs: ExitOutputs) -> list[SaverReport]:
    """One report for each early exit of a cascade of whole models."""
    rows = zip(outputs.scores[:-1], outputs.graded[:-1], strict=True)
    ratios = [job_ratio(scores, graded, outputs.graded[-1], outputs.sample_weight) for scores, graded in rows]
    if outputs.n_exits == 2:
        delta = delta_cost(float(outputs.exit_costs[0]), float(outputs.exit_costs[1]), ratios[0])
        return [SaverReport(0, delta, ratios[0])]
    return [
        SaverReport(k, _lossless_cost(_committed(outputs, k)) - _lossless_cost(outputs.drop_exit(k)), ratio)
        for k, ratio in enumerate(ratios)
    ]


def _committed(outputs: ExitOutputs, saver: int) -> ExitOutputs:
    """The same cascade when everybody who gets as far as the saver runs it."""
    stage_costs, exit_costs = outputs.stage_costs.copy(), outputs.exit_costs.copy()
    stage_costs[saver] += exit_costs[saver]
    exit_costs[saver] = 0.0
    return outputs.with_costs(stage_costs, exit_costs)


def _lossless_cost(outputs: ExitOutputs) -> float:
    """Least mean cost at no loss of accuracy, relative to the last model alone."""
    few = outputs.n_exits <= 2 or (outputs.n_exits == 3 and outputs.n_samples <= MOST_SAMPLES_EXACT)
    frontier, _ = search_thresholds(outputs, "exact" if few else "coord", n_points=10)
    # At their word, as the paper counts: no caution for the choice.
    lossless = frontier.accuracy >= outputs.full_accuracy - TOLERANCE
    return float(frontier.cost[lossless].min()) * outputs.full_cost / float(outputs.exit_costs[-1])
