"""What happens at the exits of one operating point: who leaves, how well scores match accuracy, who is left.

CalexNet (2026), appendices A.1, A.2 and A.5. Scores are those that the point's
thresholds are compared with: where a calibrator rescores, pass ``calibrator.rescored(outputs)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaptexit.core.frontier import OperatingPoint
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.routing import exit_index
from adaptexit.utils.frames import as_frame
from adaptexit.utils.validation import check_whole

if TYPE_CHECKING:
    import pandas

Floats = NDArray[np.float64]

ROUNDING = 1e-6
"""How far a probability in single precision may lie outside [0, 1]."""


# -- calibration ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ExitCalibration:
    """How well scores match accuracy among the samples that leave at each exit (CalexNet, appendix A.1, Table A1).

    Attributes
    ----------
    ece : float array of shape (K,)
        Expected calibration error; NaN where nobody leaves.
    n : int array of shape (K,)
        Samples that leave at each exit.
    edges : float array of shape (K, n_bins + 1)
        Of the bins, each closed on the right; NaN at an exit that is switched off.
    accuracy, confidence : float arrays of shape (K, n_bins)
        Mean quality and mean score of each bin, by weight where samples have weights; NaN where a bin is empty.
    count : int array of shape (K, n_bins)
        Samples in each bin, weights apart (the ECE is by weight).
    """

    ece: Floats
    n: NDArray[np.int64]
    edges: Floats
    accuracy: Floats
    confidence: Floats
    count: NDArray[np.int64]

    def to_frame(self) -> pandas.DataFrame:
        """A pandas table, one row a bin: exit, low, high, accuracy, confidence, count (needs pandas)."""
        exits, _ = np.indices(self.count.shape)
        return as_frame(
            {
                "exit": exits.ravel(), "low": self.edges[:, :-1].ravel(), "high": self.edges[:, 1:].ravel(),
                "accuracy": self.accuracy.ravel(), "confidence": self.confidence.ravel(), "count": self.count.ravel(),
            }
        )  # fmt: skip


def exit_calibration(outputs: ExitOutputs, point: OperatingPoint, n_bins: int = 10) -> ExitCalibration:
    """Calibration error of every exit, on the samples that leave there (CalexNet, appendix A.1, Table A1).

    ECE = sum_b n_b / n |accuracy_b - confidence_b| over equal bins between the exit's smallest threshold and 1. A
    threshold of -inf counts as 0 and one of inf, which lets nobody leave, is not counted.

    Parameters
    ----------
    outputs : ExitOutputs
        With the scores that the point thresholds, which have to be probabilities.
    point : OperatingPoint
    n_bins : int, default=10

    Raises
    ------
    ValueError
        When a sample leaves with a score outside [0, 1], or when outputs and point do not fit together.
    """
    check_whole("n_bins", n_bins)
    outputs = outputs.counted()
    exits, weights = _exits(outputs, point), outputs.sample_weight
    n_exits = outputs.n_exits
    accuracy, confidence = np.full((2, n_exits, n_bins), np.nan)
    count = np.zeros((n_exits, n_bins), dtype=np.int64)
    size = np.zeros((n_exits, n_bins))
    edges = np.stack([np.linspace(_lower_edge(row), 1.0, n_bins + 1) for row in np.asarray(point.thresholds)])
    edges[np.isnan(edges[:, 0])] = np.nan
    for k in range(n_exits):
        here = np.flatnonzero(exits == k)
        if not len(here):
            continue
        scores = _probabilities(outputs.scores[k, here], k)
        # From the left, as bins are closed on the right; the first also takes scores at its lower edge or below it.
        bins = np.clip(np.searchsorted(edges[k], scores, side="left") - 1, 0, n_bins - 1)
        count[k] = np.bincount(bins, minlength=n_bins)
        each = np.ones(len(here)) if weights is None else weights[here]
        size[k] = np.bincount(bins, weights=each, minlength=n_bins)
        with np.errstate(invalid="ignore"):
            accuracy[k] = np.bincount(bins, weights=each * outputs.graded[k, here], minlength=n_bins) / size[k]
            confidence[k] = np.bincount(bins, weights=each * scores, minlength=n_bins) / size[k]
    n = count.sum(axis=1)
    with np.errstate(invalid="ignore"):
        ece = np.nansum(size * np.abs(accuracy - confidence), axis=1) / size.sum(axis=1)
    return ExitCalibration(ece, n, edges, accuracy, confidence, count)


def _lower_edge(thresholds: Any) -> float:
    """Where the bins of an exit begin, from its threshold or its thresholds by class; NaN where it is off."""
    limits = np.atleast_1d(thresholds)
    limits = limits[limits < np.inf]
    return float(np.clip(limits.min(), 0.0, 1.0)) if len(limits) else np.nan


def _probabilities(scores: NDArray[Any], k: int) -> Floats:
    values = np.asarray(scores, dtype=np.float64)
    low, high = values.min(), values.max()
    if low < -ROUNDING or high > 1.0 + ROUNDING:
        raise ValueError(
            f"scores must be probabilities in [0, 1] to be compared with accuracy; of those who leave, exit {k} has "
            f"scores from {low:.4g} to {high:.4g}. Calibrate with a score that is a probability (score='max_proba'), "
            "or, with a calibrator that rescores, pass calibrator.rescored(outputs)."
        )
    return values


# -- who is left ------------------------------------------------------------------------------------------------------


def flow(outputs: ExitOutputs, point: OperatingPoint) -> NDArray[np.int64]:
    """How many samples of each true class reach each exit, shape (K, C); the first row is everybody.

    CalexNet's Fig. 4, for outputs with labels. Samples are counted, whatever their weights.
    """
    return _reaching(outputs, point, None).astype(np.int64)


def _reaching(outputs: ExitOutputs, point: OperatingPoint, weights: Floats | None) -> NDArray[Any]:
    """Samples of each true class that reach each exit, (K, C), counted or by weight."""
    if outputs.labels is None or outputs.n_classes is None:
        raise ValueError("classes of survivors need labels and n_classes; the outputs have quality alone.")
    shape = (outputs.n_exits, outputs.n_classes)
    cells = _exits(outputs, point) * outputs.n_classes + outputs.labels
    leaving = np.bincount(cells, weights, minlength=shape[0] * shape[1]).reshape(shape)
    return np.asarray(np.cumsum(leaving[::-1], axis=0)[::-1])


@dataclass(frozen=True, eq=False)
class SurvivorShift:
    """How the true classes of the samples that reach each exit differ from everybody's (CalexNet, Table A2).

    Attributes
    ----------
    n : int array of shape (K,)
        Samples that reach the exit; the first entry is everybody. Where it is 0 the others are NaN. Of samples with
        weights those above 0 are counted, and all else is by weight.
    kl : float array of shape (K,)
        KL(everybody || survivors) of the classes, in nats; inf where a class has no survivor.
    gini : float array of shape (K,)
        Gini coefficient of the class counts over all C classes: 0 for classes of equal size, 1 - 1/C for a single
        class.
    top3 : float array of shape (K,)
        Share of the three commonest classes.
    """

    n: NDArray[np.int64]
    kl: Floats
    gini: Floats
    top3: Floats

    def to_frame(self) -> pandas.DataFrame:
        """A pandas table, one row an exit: n, kl, gini, top3 (needs pandas)."""
        return as_frame({"n": self.n, "kl": self.kl, "gini": self.gini, "top3": self.top3})


def survivor_shift(outputs: ExitOutputs, point: OperatingPoint) -> SurvivorShift:
    """Covariate shift by exit: what the exits before it leave over (CalexNet, appendix A.2, Table A2).

    Parameters
    ----------
    outputs : ExitOutputs
        With labels.
    point : OperatingPoint
    """
    outputs = outputs.counted()
    n, counts = flow(outputs, point).sum(axis=1), _reaching(outputs, point, outputs.sample_weight)
    n_classes = counts.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = counts / counts.sum(axis=1, keepdims=True)
        present = counts[0] > 0
        kl = (shares[0] * np.log(shares[0] / shares))[:, present].sum(axis=1)
        rising = np.sort(shares, axis=1)
        gini = rising @ (2.0 * np.arange(1, n_classes + 1) - n_classes - 1) / n_classes
        top3 = rising[:, -3:].sum(axis=1)
    return SurvivorShift(n, kl, gini, top3)


# -- examples ---------------------------------------------------------------------------------------------------------


class Strip(NamedTuple):
    """Some samples that leave at one exit: indices, scores there and true classes (None without labels), each (m,)."""

    samples: NDArray[np.intp]
    scores: NDArray[Any]
    labels: NDArray[Any] | None


@dataclass(frozen=True, eq=False)
class Exemplars:
    """Samples that leave barely and samples that leave with ease.

    Attributes
    ----------
    strips : list of K - 1 pairs (near, deep)
        For each early exit, of samples that leave there and are answered rightly: those whose score is least above
        the threshold that let them leave, rising, and those with the highest scores, falling.
    n_samples : int
        Of which the indices are.
    """

    strips: list[tuple[Strip, Strip]]
    n_samples: int


def exemplars(outputs: ExitOutputs, point: OperatingPoint, n: int = 6) -> Exemplars:
    """Samples that leave barely and samples that leave with ease (CalexNet, appendix A.5, Fig. A1).

    Parameters
    ----------
    outputs : ExitOutputs
    point : OperatingPoint
    n : int, default=6
        Samples in each strip at most.

    Returns
    -------
    Exemplars
        Right is quality 1. The threshold is that of the predicted class where there is one a class; -inf counts as 0.
        Equals come in the order of the samples.
    """
    check_whole("n", n)
    exits = _exits(outputs, point)
    pairs = []
    for k in range(outputs.n_exits - 1):
        right = np.flatnonzero((exits == k) & (np.asarray(outputs.graded[k]) >= 1))
        scores = np.asarray(outputs.scores[k, right], dtype=np.float64)
        thresholds = np.asarray(point.thresholds[k], dtype=np.float64)
        if thresholds.ndim:
            assert outputs.predictions is not None
            thresholds = thresholds[outputs.predictions[k, right]]
        excess = scores - np.where(thresholds == -np.inf, 0.0, thresholds)
        near, deep = (right[np.argsort(key, kind="stable")[:n]] for key in (excess, -scores))
        pairs.append((_strip(outputs, k, near), _strip(outputs, k, deep)))
    return Exemplars(pairs, outputs.n_samples)


def _strip(outputs: ExitOutputs, k: int, samples: NDArray[np.intp]) -> Strip:
    return Strip(samples, outputs.scores[k, samples], None if outputs.labels is None else outputs.labels[samples])


def _exits(outputs: ExitOutputs, point: OperatingPoint) -> NDArray[np.intp]:
    """The exit of every sample, shape (N,)."""
    shape: tuple[int, ...] = np.shape(point.cutoffs)
    fitting: list[tuple[int, ...]] = [(outputs.n_exits,)]
    if outputs.predictions is not None and outputs.n_classes is not None:
        fitting.append((outputs.n_exits, outputs.n_classes))
    if shape not in fitting:
        raise ValueError(
            f"the point's thresholds must have shape {' or '.join(map(str, fitting))} to fit the outputs; got {shape}. "
            "Take outputs and operating point from the same model."
        )
    return exit_index(outputs, point.cutoffs)
