"""Whether leaving early pays at all, in words, judged on samples that the thresholds were not chosen on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from adaptexit.core.chance import warn_of_chance
from adaptexit.core.frontier import TOLERANCE, OperatingPoint
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.routing import exit_index
from adaptexit.core.search import search_thresholds
from adaptexit.utils.validation import check_whole, checked_number

Floats = NDArray[np.float64]
Interval = tuple[float, float]

MANY_TIMES = 100
"""More times the samples than this are not asked for: then it is too close to be told."""


@dataclass(frozen=True, eq=False)
class Verdict:
    """What :func:`verdict` found; ``str()`` of it is :attr:`text`.

    Attributes
    ----------
    pays : bool or None
        None where the samples do not tell.
    saving : float
        Share of the full model's cost that the setting saves.
    saving_interval : (float, float)
    accuracy_difference : float
        Accuracy less that of the full model (mean quality, for outputs by ``quality``).
    accuracy_interval : (float, float)
    point : OperatingPoint
        What all samples together choose: the setting that the verdict is about. Its own accuracy and cost are
        those on the samples it was chosen on, and so flattering.
    n_samples, n_disagreements : int
        Samples (of those with weights the ones above 0), and those of them on which an early exit is graded otherwise
        than the full model.
    confidence : float
        Of both intervals, each on its own.
    text : str
    """

    pays: bool | None
    saving: float
    saving_interval: Interval
    accuracy_difference: float
    accuracy_interval: Interval
    point: OperatingPoint = field(repr=False)
    n_samples: int
    n_disagreements: int
    confidence: float
    text: str = field(repr=False)

    def __str__(self) -> str:
        return self.text


def verdict(
    outputs: ExitOutputs,
    *,
    max_drop: float = 0.0,
    slack: float = 0.01,
    confidence: float = 0.95,
    n_folds: int = 5,
    random_state: int = 0,
) -> Verdict:
    """Whether a cascade, or early exits, pay at an allowed loss of accuracy, with intervals and in words.

    Accuracy is cross-fitted: for each fold, thresholds are searched on the others and applied to it, so that no sample
    has a part in the choice it judges. Early answers pay where they save and where a loss of accuracy of more than
    ``max_drop + slack`` is ruled out, both at the confidence asked for.

    Parameters
    ----------
    outputs : ExitOutputs
        K >= 2 exits on N samples that the models have not learned from. Where they have weights, all means are
        weighted, and intervals as wide as these make them.
    max_drop : float, default=0.0
        Allowed loss of accuracy that thresholds are chosen for (0.01 is one point).
    slack : float, default=0.01
        Loss beyond it that does not matter. No finite sample rules out every loss, so it is above 0.
    confidence : float, default=0.95
    n_folds : int, default=5
    random_state : int, default=0
        Seed of the folds.

    Returns
    -------
    Verdict

    Raises
    ------
    TypeError, ValueError
        For outputs that are none, have one exit, or fewer than two samples a fold, and for other arguments that
        cannot be.

    Warns
    -----
    LabelWarning
        Where models are at chance.

    Notes
    -----
    The saving is that of the setting itself on all samples, as a cost reads no labels and so is not flattered by the
    choice. The accuracy is cross-fitted. Its variance is that of the mean over the pooled samples (Bayle et al.,
    "Cross-validation Confidence Intervals for Test Error", NeurIPS 2020), with a pair of pseudo-samples, so that no
    disagreement seen is not taken for none to come (Agresti and Min, "Simple improved confidence intervals for
    comparing matched proportions", Statistics in Medicine 2005), and the spread of what the folds' settings give on all
    samples, as the setting in use is none of them.
    """
    if not isinstance(outputs, ExitOutputs):
        raise TypeError(f"outputs must be ExitOutputs; got {type(outputs).__name__}. Estimators make them by record.")
    if outputs.n_exits < 2:
        raise ValueError("outputs must have an early exit beside the full model; got the full model alone.")
    drop = checked_number("max_drop", max_drop, "a share of accuracy, at least 0 (0.01 is one point)", 0.0)
    smallest = float(np.nextafter(0, 1))
    slack = checked_number("slack", slack, "a share of accuracy, above 0 (0.01 is one point)", smallest)
    confidence = checked_number("confidence", confidence, "a share, above 0 and below 1 (0.95)", smallest)
    if confidence >= 1:
        raise ValueError(f"confidence must be a share, above 0 and below 1 (0.95); got {confidence!r}.")
    check_whole("n_folds", n_folds, 2)
    check_whole("random_state", random_state, 0)
    outputs = outputs.counted()
    if outputs.n_samples < 2 * n_folds:
        raise ValueError(
            f"outputs must have at least 2 samples a fold, {2 * n_folds} in all; got {outputs.n_samples}. "
            "Record more, or take fewer folds."
        )
    warn_of_chance(outputs)
    n, worth = outputs.n_samples, max(outputs.effective_size, 2.0)
    point, closest, seeming = _chosen(outputs, drop, random_state, also=drop + slack)
    _, costs = _outcomes(outputs, point)
    gains, choices, stayed_off = _cross_fitted(outputs, drop, n_folds, random_state)
    quantile = float(student.ppf((1 + confidence) / 2, worth - 1))
    mean_cost, difference = outputs.mean(costs), outputs.mean(gains)
    saving, centre = 1 - mean_cost, difference * n / (n + 2)
    half = quantile * float(np.linalg.norm(_by_weight(costs - mean_cost, outputs))) / n * math.sqrt(worth / (worth - 1))
    accuracy_half = quantile * math.hypot(_paired_error(gains, outputs), float(choices.std()))
    figures: dict[str, Any] = {
        "saving": saving,
        "saving_interval": (saving - half, saving + half),
        "accuracy_difference": difference,
        "accuracy_interval": (min(centre - accuracy_half, difference), max(centre + accuracy_half, difference)),
        "point": point,
        "n_samples": n,
        "n_disagreements": int(np.count_nonzero((outputs.graded[:-1] != outputs.graded[-1]).any(axis=0))),
        "confidence": confidence,
    }
    settled = not seeming and stayed_off > 0.5
    pays, text = _said(outputs, drop, slack, figures, settled, 1 - closest.cost)
    return Verdict(pays=pays, text=text, **figures)


# -- measuring -------------------------------------------------------------------------------------------------------


def _chosen(
    outputs: ExitOutputs, drop: float, random_state: int, also: float | None = None
) -> tuple[OperatingPoint, OperatingPoint, bool]:
    """The setting for a drop that is allowed, and for another one; whether any cheaper one seems to keep the first."""
    drops = (drop, drop if also is None else also)
    frontier, _ = search_thresholds(outputs, drops=drops, random_state=random_state)
    seeming = (frontier.accuracy >= frontier.full_accuracy - drop - TOLERANCE) & (frontier.cost < 1 - TOLERANCE)
    return frontier.at(max_drop=drops[0]), frontier.at(max_drop=drops[1]), bool(seeming.any())


def _outcomes(outputs: ExitOutputs, point: OperatingPoint) -> tuple[Floats, Floats]:
    """What each sample gains on the full model, and its relative cost, both (N,)."""
    exits = exit_index(outputs, point.cutoffs)
    graded = np.asarray(outputs.graded, dtype=np.float64)
    gains = graded[exits, np.arange(len(exits))] - graded[-1]
    return gains, outputs.path_costs(point.on)[exits] / outputs.full_cost


def _cross_fitted(outputs: ExitOutputs, drop: float, n_folds: int, random_state: int) -> tuple[Floats, Floats, float]:
    """Gains (N,) under the setting of the other folds, each setting's mean gain on all samples (F,), and the share of
    the settings that are the plain full model."""
    n = outputs.n_samples
    folds = np.array_split(np.random.default_rng(random_state).permutation(n), n_folds)
    gains, choices, off = np.empty(n), np.empty(n_folds), np.empty(n_folds, dtype=bool)
    for f, fold in enumerate(folds):
        others = np.sort(np.concatenate([folds[g] for g in range(n_folds) if g != f]))
        point, _, _ = _chosen(outputs.take(others), drop, random_state)
        everyone, _ = _outcomes(outputs, point)
        gains[fold], choices[f], off[f] = everyone[fold], outputs.mean(everyone), not point.on[:-1].any()
    return gains, choices, float(off.mean())


def _paired_error(gains: Floats, outputs: ExitOutputs) -> float:
    """Standard error of the mean gain with two pseudo-samples, half of which gain and half of which lose."""
    n, centre = len(gains), outputs.mean(gains) * len(gains) / (len(gains) + 2)
    step = float(np.abs(gains).max()) or float(outputs.graded.max()) - float(outputs.graded.min()) or 1.0
    pseudo = math.sqrt(step**2 + 2 * centre**2)
    return math.hypot(float(np.linalg.norm(_by_weight(gains - centre, outputs))), pseudo) / (n + 2)


def _by_weight(values: Floats, outputs: ExitOutputs) -> Floats:
    """One number a sample, (N,), as often as the sample counts."""
    return values if outputs.sample_weight is None else values * outputs.sample_weight


# -- saying ----------------------------------------------------------------------------------------------------------


def _said(
    outputs: ExitOutputs, drop: float, slack: float, figures: dict[str, Any], settled: bool, within_slack: float
) -> tuple[bool | None, str]:
    """Whether it pays, and all figures in words.

    ``settled`` says whether no setting even seems to keep the drop, nor does on most folds; ``within_slack`` is the
    saving where the slack is allowed too, as the samples it was chosen on have it.
    """
    saving, saves = figures["saving"], figures["saving_interval"]
    changes, limit = figures["accuracy_interval"], -(drop + slack)
    n, off = figures["n_samples"], not figures["point"].on[:-1].any()
    whole, what = (True, "the cascade") if not outputs.stage_costs.any() else (False, "leaving early")
    advice = "Do not cascade" if whole else "Do not let samples leave early"
    in_range = float(outputs.graded.min()) >= 0 and float(outputs.graded.max()) <= 1
    worth = _Worth(100.0, " points", "accuracy") if in_range else _Worth(1.0, "", "mean quality")
    allowed = f"without losing {worth.name}" if drop == 0 else f"at a loss of at most {worth.amount(drop)}"
    weighted = "" if outputs.sample_weight is None else " by weight"
    basis = f"measured on {n:,} samples{weighted} ({100 * figures['confidence']:.4g}% intervals)"
    outcome = (
        f"{100 * saving:.0f}% cheaper ({_range(saves)}) at {worth.change(figures['accuracy_difference'], changes)}"
    )
    if off and settled and changes[0] >= limit:
        more = ""
        if within_slack > 0:
            more = f" With max_drop={drop + slack:g} it might save {100 * within_slack:.0f}%."
        return False, f"{advice}: no setting saves anything {allowed}, measured on {n:,} samples.{more}"
    if not off and changes[1] < limit:
        return False, f"{advice}: it loses more than is allowed, {outcome}, {basis}. Calibrate on more samples."
    if saves[0] > 0 and changes[0] >= limit:
        return True, f"{what[0].upper()}{what[1:]} pays: {outcome}, {basis}."
    if off:
        reason = f"of the settings that seem to save {allowed}, {n:,} samples do not tell whether they do"
        next_step = "Calibrate on more."
        if within_slack > 0:
            next_step += f" With max_drop={drop + slack:g} it might save {100 * within_slack:.0f}%."
    else:
        reason = outcome + f", {basis}"
        times = [_times(i, end) for i, end in ((saves, 0.0), (changes, limit)) if i[0] <= end]
        next_step = _samples_needed(n, max(times))
    few = f"early answers and the full model's differ in being right on {figures['n_disagreements']:,} of them"
    return None, f"Cannot tell whether {what} pays: {reason}; {few}. {next_step}"


@dataclass(frozen=True)
class _Worth:
    """How accuracy, or another quality, is written."""

    scale: float
    unit: str
    name: str

    def amount(self, value: float) -> str:
        number = f"{self.scale * value:.3g}"
        return f"{number}{self.unit.removesuffix('s') if number == '1' else self.unit}"

    def change(self, value: float, interval: Interval) -> str:
        digits = 1 if self.scale == 100 else 3

        def one(number: float) -> str:
            rounded = round(self.scale * number, digits)
            return f"{abs(rounded):.{digits}f}{' lower' if rounded < 0 else ' higher' if rounded > 0 else ''}"

        article = "an" if self.name[0] in "aeiou" else "a"
        middle = one(value)
        if " " in middle:
            size, side = middle.split()
            middle = f"{article} {self.name} {size}{self.unit} {side}"
        else:
            middle = f"the same {self.name}"
        return f"{middle} ({one(interval[0])} to {one(interval[1])})"


def _range(saves: Interval) -> str:
    return f"{100 * saves[0]:.0f} to {100 * saves[1]:.0f}%"


def _times(interval: Interval, limit: float) -> float:
    """How many times the samples put the limit outside an interval that shrinks around its middle."""
    middle, half = sum(interval) / 2, (interval[1] - interval[0]) / 2
    return (half / max(abs(middle - limit), 1e-12)) ** 2


def _samples_needed(n: int, times: float) -> str:
    if times > MANY_TIMES:
        return f"It is too close to be told even from {MANY_TIMES} times the samples."
    needed = times * n
    step = 10.0 ** max(math.floor(math.log10(needed)) - 1, 1)
    return f"About {math.ceil(needed / step) * step:,.0f} samples would tell."
