"""Calibrated methods side by side with the simplest rules, on data that none of them was chosen on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from adaptexit.calibrators import ThresholdCalibrator
from adaptexit.calibrators.base import Calibrator, check_outputs
from adaptexit.calibrators.offline import calibrated, check_like, check_needs
from adaptexit.core.baselines import RulePoint, fixed_exits, oracle, patience, random_routing
from adaptexit.core.frontier import TOLERANCE, OperatingPoint, ParetoFrontier
from adaptexit.core.outputs import ExitOutputs
from adaptexit.utils.frames import aligned, as_frame
from adaptexit.utils.validation import checked_number

if TYPE_CHECKING:
    import pandas

RuleName = Literal["exits alone", "random exit", "patience", "oracle"]
Points = dict[RuleName, list[RulePoint]]


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What :func:`compare` found; every figure is on its ``test`` outputs.

    Attributes
    ----------
    points : dict of rule name to list of RulePoint
        Rules without a curve: ``exits alone``, ``random exit``, ``patience`` (not for outputs by quality) and
        ``oracle``. The name of a point is its row in the table.
    frontiers : dict of str to ParetoFrontier
        Of every method, in the order given; ``chosen_on`` is the calibrated one.
    in_use : dict of str to int
        Index, on each method's frontier, of its calibrator's own ``point_``.
    calibrators : dict of str to Calibrator
        The fitted ones, such as for a sweep: ``pareto(test, refit=True)``.
    exit_names : list of K str or None
    full_accuracy : float
        Of the full model.
    n_samples : int
    held_out : bool
        Whether these are other outputs than methods were fitted on.
    """

    points: Points
    frontiers: dict[str, ParetoFrontier]
    in_use: dict[str, int]
    calibrators: dict[str, Calibrator]
    exit_names: list[str] | None
    full_accuracy: float
    n_samples: int
    held_out: bool

    @property
    def n_exits(self) -> int:
        """Number of exits K."""
        return len(self.points["exits alone"])

    def at(
        self, budget: float | None = None, max_drop: float | None = None
    ) -> dict[str, RulePoint | OperatingPoint | None]:
        """One point a row of the table: rules without a curve, then methods, and the oracle last.

        Parameters
        ----------
        budget : float, optional
            Mean relative cost: of each method the point that the calibration data say is best within it, or None where
            its cheapest costs more.
        max_drop : float, optional
            Instead: of each method the cheapest point that loses at most so much accuracy on the calibration data (0.01
            is one point). With neither, each method's own point. Rules without a curve stay as they are.
        """
        if budget is not None and max_drop is not None:
            raise ValueError(f"give at most one of budget and max_drop; got {budget=}, {max_drop=}.")
        if budget is not None:
            budget = checked_number("budget", budget, "a finite relative cost (0.4 is 40% of the full model)")
        rows: dict[str, RulePoint | OperatingPoint | None] = {
            point.name: point for rule, points in self.points.items() if rule != "oracle" for point in points
        }
        rows |= {name: self._point(name, budget, max_drop) for name in self.frontiers}
        return rows | {point.name: point for point in self.points["oracle"]}

    def _point(self, name: str, budget: float | None, max_drop: float | None) -> OperatingPoint | None:
        frontier = self.frontiers[name]
        if budget is None and max_drop is None:
            return frontier.points[self.in_use[name]]
        choosing = frontier.chosen_on or frontier
        if budget is not None and choosing.cost.min() > budget + TOLERANCE:
            return None
        return frontier.at(budget=budget, max_drop=max_drop)

    def to_frame(self, budget: float | None = None, max_drop: float | None = None) -> pandas.DataFrame:
        """A pandas table, one row a method or rule: ``accuracy``, ``cost`` and ``exit_rate_...`` (needs pandas).

        Table 1 of Kyauk, "Adaptive Multi-Exit Neural Networks using EM-Based Routing", with the exit rates: columns
        ``exit_rate_0`` and so on, or by the exits' names where those were given.

        Parameters
        ----------
        budget, max_drop : float, optional
            As for :meth:`at`; a method that has nothing within it gets a row of NaN.
        """
        points = self.at(budget, max_drop)
        columns = ["accuracy", "cost", *(f"exit_rate_{name}" for name in self.exit_names or range(self.n_exits))]
        rows = [self._row(point) for point in points.values()]
        return as_frame(rows, index=list(points), columns=columns, dtype=float).rename_axis("method")

    def _row(self, point: RulePoint | OperatingPoint | None) -> list[float]:
        if point is None:
            return [np.nan] * (2 + self.n_exits)
        return [point.accuracy, point.cost, *point.exit_rates]

    def __str__(self) -> str:
        heads = ["", "accuracy", "cost", *(self.exit_names or made_up_names(self.n_exits))]
        rows = [[name, *(f"{value:.4f}" for value in self._row(point))] for name, point in self.at().items()]
        source = "held out" if self.held_out else "the calibration data themselves, which flatters calibrated methods"
        return "\n".join(
            [
                *aligned([heads, *rows]),
                f"Share of samples that each exit answers; {self.n_samples:,} samples, {source}.",
            ]
        )

    def __repr__(self) -> str:
        return (
            f"Comparison({len(self.frontiers)} methods, {sum(map(len, self.points.values()))} points of simple rules, "
            f"{self.n_samples} samples, full model {self.full_accuracy:.4f})"
        )


def compare(
    outputs: ExitOutputs,
    methods: Mapping[str, Calibrator] | None = None,
    *,
    test: ExitOutputs | None = None,
    training: ExitOutputs | None = None,
    exit_names: Sequence[str] | None = None,
) -> Comparison:
    """Calibrate methods on some outputs and report them on others, beside the simplest rules.

    Section 5 of Kyauk, "Adaptive Multi-Exit Neural Networks using EM-Based Routing", with what its protocol leaves
    open settled: operating points are fitted and chosen on ``outputs``, and ``test`` only reports them.

    Parameters
    ----------
    outputs : ExitOutputs
        Calibration data: K exits, N samples, with logits and features where a method needs them.
    methods : dict of str to Calibrator, optional
        Unfitted calibrators are cloned and fitted on ``outputs``; fitted ones are taken as they are. Unless given,
        BranchyNet's entropy and the largest probability, with a threshold an exit each; where ``outputs`` have no
        logits, the recorded score alone.
    test : ExitOutputs, optional
        The same exits on other data. Unless given, ``outputs`` themselves: optimistic for methods that were fitted
        on them.
    training : ExitOutputs, optional
        The same exits on the data that their heads were trained on (``estimator.training_outputs_``), for calibrators
        that learn from it.
    exit_names : sequence of K distinct str, optional
        As an estimator's ``exit_names``.

    Returns
    -------
    Comparison
        With exits alone, random routing, PABEE's patience and the oracle (:mod:`adaptexit.core.baselines`) always
        in it; patience only for outputs with predictions.

    Raises
    ------
    TypeError
        For outputs that are none, or methods that are no dict of calibrators.
    ValueError
        For ``test`` or ``training`` with other exits or classes, logits or features that are missing (before any
        method is fitted), a fitted method of other exits, or names that are not distinct.
    """
    check_outputs(outputs)
    _check_like("test", test, outputs)
    _check_like("training", training, outputs)
    reported = outputs if test is None else test
    names = _checked_names(exit_names, outputs.n_exits)
    points = _simple_rules(reported, names)
    candidates = _checked_methods(_usual(outputs) if methods is None else methods, points)
    fresh = {name for name, method in candidates.items() if not _fitted(method)}
    for name, method in candidates.items():
        learned_on = {"outputs": outputs, "training": training if method.needs_training else None}
        check_needs(
            method,
            f"methods[{name!r}]",
            learned_on if name in fresh else {},
            {"outputs" if test is None else "test": reported},
            without_logits="Record them (keep_logits=True), or compare methods that do without.",
            without_features="Record them (an estimator with such a calibrator does), or compare methods that do "
            "without.",
        )
        if name not in fresh:
            _check_exits(name, method, outputs)
    calibrators = {
        name: calibrated(method, outputs, training) if name in fresh else method for name, method in candidates.items()
    }
    return Comparison(
        points=points,
        frontiers={name: calibrator.pareto(reported) for name, calibrator in calibrators.items()},
        in_use={name: calibrator.frontier_.index(calibrator.point_) for name, calibrator in calibrators.items()},
        calibrators=calibrators,
        exit_names=names,
        full_accuracy=reported.full_accuracy,
        n_samples=reported.n_samples,
        held_out=test is not None,
    )


def _usual(outputs: ExitOutputs) -> dict[str, Calibrator]:
    if outputs.logits is None:
        return {"recorded score": ThresholdCalibrator("recorded")}
    return {
        "BranchyNet (entropy)": ThresholdCalibrator("entropy"),
        "largest probability": ThresholdCalibrator("max_proba"),
    }


def _simple_rules(outputs: ExitOutputs, exit_names: list[str] | None) -> Points:
    alone = fixed_exits(outputs)
    if exit_names is not None:
        rows = [*(f"{name} alone" for name in exit_names[:-1]), exit_names[-1]]
        alone = [dataclasses.replace(point, name=row) for point, row in zip(alone, rows, strict=True)]
    rules: Points = {"exits alone": alone, "random exit": [random_routing(outputs)]}
    if outputs.predictions is not None:
        rules["patience"] = patience(outputs)
    return rules | {"oracle": [oracle(outputs)]}


def made_up_names(n_exits: int) -> list[str]:
    """Names of exits that have none."""
    return [*(f"exit {k}" for k in range(n_exits - 1)), "full model"]


def _checked_names(exit_names: Any, n_exits: int) -> list[str] | None:
    if exit_names is None:
        return None
    names = [] if isinstance(exit_names, str) else [str(name) for name in exit_names]
    if len(names) != n_exits or len(set(names)) < n_exits:
        raise ValueError(f"exit_names must be {n_exits} distinct names, one an exit; got {exit_names!r}.")
    return names


def _check_like(argument: Literal["test", "training"], other: Any, outputs: ExitOutputs) -> None:
    if other is None:
        return
    if not isinstance(other, ExitOutputs):
        without = {"test": "report on outputs", "training": "learn from outputs alone"}[argument]
        raise TypeError(f"{argument} must be ExitOutputs, or None to {without}; got {type(other).__name__}.")
    check_like(argument, other, outputs)


def _checked_methods(methods: Any, points: Points) -> dict[str, Calibrator]:
    form = 'a dict of names to calibrators, as {"mine": ThresholdCalibrator()}'
    if not isinstance(methods, Mapping):
        raise TypeError(f"methods must be {form}; got {type(methods).__name__}.")
    rule_names = {point.name for rule in points.values() for point in rule}
    for name, method in methods.items():
        if not isinstance(name, str):
            raise TypeError(f"methods must be {form}; got the key {name!r}.")
        if isinstance(method, type):
            raise TypeError(f"methods must be {form}; methods[{name!r}] is the class {method.__name__}: call it first.")
        if not isinstance(method, Calibrator):
            raise TypeError(
                f"methods must be {form}; methods[{name!r}] is {type(method).__name__}. "
                "Of a fitted estimator give its calibrator_."
            )
        if name in rule_names:
            raise ValueError(f"methods must not be called as a simple rule, which {name!r} is; choose another name.")
    return dict(methods)


def _fitted(method: Calibrator) -> bool:
    try:
        check_is_fitted(method)
    except NotFittedError:
        return False
    return True


def _check_exits(name: str, method: Calibrator, outputs: ExitOutputs) -> None:
    shape = method.point_.cutoffs.shape
    if shape[0] != outputs.n_exits or (len(shape) == 2 and shape[1] != outputs.n_classes):
        origin = f"{shape[0]} exits" + (f" and {shape[1]} classes" if len(shape) == 2 else "")
        raise ValueError(
            f"methods must be calibrated on the {outputs.n_exits} exits and {outputs.n_classes} classes of outputs, or "
            f"not yet; methods[{name!r}] was on {origin}. Give clone(calibrator) to have it calibrated here."
        )
