"""One threshold an exit and class, from the precision that the full model has on that class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptexit.calibrators.base import ScoreCalibrator, ScoreName, check_outputs
from adaptexit.core.frontier import OperatingPoint, evaluate
from adaptexit.core.margins import BOUNDS, MARGINS, Bound, Rule, class_precision, margin_thresholds
from adaptexit.core.outputs import ExitOutputs
from adaptexit.exceptions import CalibrationWarning, warn
from adaptexit.utils.learning import learned_at_once
from adaptexit.utils.validation import check_switch, check_whole, checked_number, stored_array

MOST_NAMED = 5


class CPMCalibrator(ScoreCalibrator):
    """Class precision margins: leave where the exit is nearly as precise as the full model on the predicted class.

    For each exit and class the threshold is the smallest with which, on the calibration data, the samples that leave
    are right more often than (1 - margin) times the full model is when it answers with that class. CalexNet (2026),
    equations 6, 7 and 12.

    Parameters
    ----------
    margin : float, default=0.1
        Of the point in use: the share of the full model's precision that an exit may miss, at least 0.
    margins : sequence of float
        The sweep: one operating point each, which is what budgets choose from and what :meth:`pareto` returns.
    cascade_aware : bool, default=True
        Count precision on the samples that earlier exits leave over (equation 12) instead of on all of them.
    min_support : int, default=1
        Calibration samples that have to leave for a threshold to count.
    bound : {"none", "wilson", "fixed_sequence"}, default="none"
        What has to exceed the target: the precision observed (the paper); the lower end of its one-sided Wilson
        interval; or the true precision, by tests from the surest samples on. See Notes.
    delta : float, default=0.1
        Error level of the bound, for each exit and class.
    joint : bool, default=False
        Whether ``delta`` is that of all exits and classes together (each then gets its share).
    score : {"recorded", "max_proba", "entropy", "margin"} or callable, default="recorded"
        What is compared with the thresholds, as for :class:`ThresholdCalibrator`.

    Attributes
    ----------
    thresholds_ : array of shape (K, C)
        inf where an exit may never answer with that class. The last row is -inf.
    precision_ : array of shape (C,)
        Of the full model on the calibration data; NaN for classes that it never answers with.
    point_ : OperatingPoint
        That of ``margin``, whether or not another one is better in both accuracy and cost.
    frontier_ : ParetoFrontier
        Every margin's point in rising cost, dominated or not, and the plain full model.

    Notes
    -----
    Margins say how precise an exit is, not how accurate the whole will be: even with ``margin=0`` accuracy falls, as
    the samples that stay are harder than the average. With survivors counted (``cascade_aware``) a larger margin may
    cost more, because more samples leave early that the next exit would have needed for its own thresholds.

    The smallest threshold that looks good is chosen for having looked good. In a simulation (20 classes, 2,000 samples,
    margin 0.05; ``benchmarks/class_margins.py``) 65% of the exits' classes missed their target on fresh data, 16% with
    ``"wilson"`` and 3% with ``"fixed_sequence"``, with which far fewer classes may leave at all. Only the latter is a
    test, valid at each exit and class for ``cascade_aware=False`` if the full model's precision is taken as known;
    survivors were themselves chosen with the same labels.
    """

    precision_: NDArray[np.float64]

    def __init__(
        self,
        margin: float = 0.1,
        *,
        margins: Sequence[float] = MARGINS,
        cascade_aware: bool = True,
        min_support: int = 1,
        bound: Bound = "none",
        delta: float = 0.1,
        joint: bool = False,
        score: ScoreName | Callable[[Any], Any] = "recorded",
    ) -> None:
        self.margin = margin
        self.margins = margins
        self.cascade_aware = cascade_aware
        self.min_support = min_support
        self.bound = bound
        self.delta = delta
        self.joint = joint
        self.score = score

    @classmethod
    def published_with(cls, recipe: Any, margin: float = 0.1, **settings: Any) -> CPMCalibrator:
        """The margins that a recipe's paper leaves by: on survivors or on all samples, as ``recipe.cascade_aware``."""
        return cls(margin, **({"cascade_aware": recipe.cascade_aware} | settings))

    @learned_at_once
    def fit(self, outputs: ExitOutputs, y: None = None) -> CPMCalibrator:
        """Find the thresholds of every margin on calibration outputs.

        Raises
        ------
        ValueError
            For a parameter outside what is allowed, outputs without classes, or without the logits that ``score``
            needs, and for another bound than "none" where samples have weights.

        Warns
        -----
        CalibrationWarning
            Where classes have no calibration sample, or the full model never answers with them: nobody leaves with
            those.
        """
        check_outputs(outputs)
        margin, margins = self._checked_margins()
        rule = self._checked_rule(outputs)
        outputs = self.rescored(outputs)
        thresholds, cutoffs = margin_thresholds(outputs, margins, cascade_aware=bool(self.cascade_aware), rule=rule)
        points = [evaluate(outputs, thresholds[m], cutoffs[m], {"margin": value}) for m, value in enumerate(margins)]
        own = points[margins.index(margin)]
        # A margin that switches every early exit off is the plain full model already.
        if all(point.on[:-1].any() for point in points):
            points.append(_plain(outputs))
        assert outputs.predictions is not None
        assert outputs.labels is not None
        precision = class_precision(
            outputs.predictions[-1], outputs.labels, outputs.n_classes or 0, outputs.sample_weight
        )
        unknown = np.bincount(outputs.labels, outputs.sample_weight, minlength=len(precision)) == 0
        _warn_of_classes("have no calibration sample", np.flatnonzero(unknown), len(precision))
        unsaid = np.isnan(precision) & ~unknown
        _warn_of_classes("are never answered by the full model", np.flatnonzero(unsaid), len(precision))
        self.precision_ = precision
        self._keep(points, own, outputs)
        return self

    def _checked_margins(self) -> tuple[float, list[float]]:
        """The margin in use and all of the sweep, it included, from small to large."""
        meaning = "a share of the full model's precision, at least 0 (0.1 is a tenth)"
        margin = checked_number("margin", self.margin, meaning, least=0.0)
        if isinstance(self.margins, str) or not np.iterable(self.margins):
            raise ValueError(f"margins must be a sequence of numbers, each {meaning}; got {self.margins!r}.")
        sweep = {checked_number("margins", value, f"numbers, each {meaning}", least=0.0) for value in self.margins}
        return margin, sorted(sweep | {margin})

    def _checked_rule(self, outputs: ExitOutputs) -> Rule:
        check_whole("min_support", self.min_support)
        if self.bound not in BOUNDS:
            raise ValueError(f"bound must be one of {list(BOUNDS)}; got {self.bound!r}.")
        if not (isinstance(self.delta, Real) and 0 < self.delta <= 0.5):
            raise ValueError(f"delta must lie above 0 and be at most 0.5; got {self.delta!r}.")
        for name in ("cascade_aware", "joint"):
            check_switch(name, getattr(self, name))
        cells = max(1, (outputs.n_exits - 1) * (outputs.n_classes or 1))
        return Rule(int(self.min_support), self.bound, float(self.delta) / (cells if self.joint else 1))

    def get_state(self) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
        state, arrays = super().get_state()
        return state, arrays | {"precision": self.precision_}

    def set_state(self, state: dict[str, Any], arrays: dict[str, NDArray[np.float64]], outputs: ExitOutputs) -> None:
        super().set_state(state, arrays, outputs)
        self.precision_ = stored_array(arrays, "precision", (outputs.n_classes,), "nan")


def _plain(outputs: ExitOutputs) -> OperatingPoint:
    """The full model alone: every other exit switched off."""
    never = np.full((outputs.n_exits, outputs.n_classes or 0), np.inf)
    never[-1] = -np.inf
    return evaluate(outputs, never, never)


def _warn_of_classes(what: str, classes: NDArray[np.intp], n_classes: int) -> None:
    if len(classes):
        names = ", ".join(map(str, classes[:MOST_NAMED])) + (" ..." if len(classes) > MOST_NAMED else "")
        warn(
            f"{len(classes)} of the {n_classes} classes {what} ({names}), so nothing leaves early with them. Calibrate "
            "on data that have every class.",
            CalibrationWarning,
        )
