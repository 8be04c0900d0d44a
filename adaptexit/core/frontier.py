"""Operating points and the frontier they form."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.routing import exit_index, standard_errors, summarise, switched_on
from adaptexit.utils.frames import as_frame
from adaptexit.utils.schema import check_form, whole
from adaptexit.utils.validation import checked_number, checked_relative_cost, stored_array

if TYPE_CHECKING:
    import pandas

    import adaptexit

Floats = NDArray[np.float64]

_DESCRIPTION = {"full_accuracy": float, "n_samples": whole(1), "effective_size?": float, "params": [dict]}
"""Of a frontier, as :meth:`ParetoFrontier.to_arrays` gives it beside the arrays."""

ERRORS = ("accuracy_se", "cost_se", "drop_se")
"""Standard errors that a point carries."""

TOLERANCE = 1e-9
"""Slack in comparing accuracies and relative costs, far below one sample in any data set."""

TOLD_APART = 3.0
"""Standard errors by which a cheaper point must be better for a dearer one to be passed over: of a hundred points the
best one looks better than it is."""

_CAUTION, _MORE_CAUTION, _CAUTIOUS_AT = 0.6, 0.4, 500
"""Standard errors of its loss by which a point must keep an allowed drop: on many samples, and how many more at and
below a number of samples. The cheapest point that seems to keep a drop is chosen for its luck; with these it is kept on
average in benchmarks/small_calibration.py."""

NEGLIGIBLE = 3e-4
"""Loss of accuracy, beyond an allowed drop, that is passed over: 0.03 points."""


@dataclass(frozen=True, eq=False)
class OperatingPoint:
    """One setting of thresholds, and what it gives on named data.

    Attributes
    ----------
    accuracy : float
    cost : float
        Mean relative cost: 1 is the plain full model.
    exit_rates : array of shape (K,)
        Share of the samples that leave at each exit.
    thresholds, cutoffs : arrays of shape (K,) or (K, C)
        A sample leaves exit k iff its score is above; ``thresholds`` are observed scores, ``cutoffs`` what is compared
        (:mod:`adaptexit.core.routing`). The last row is -inf.
    params : dict
        The knob that made the point: a target, a cost weight, a margin ...
    accuracy_se, cost_se : float
        Standard errors of accuracy and cost on those data, 0 where they were not estimated.
    drop_se : float
        Standard error of the full model's accuracy minus this point's, on the same samples: the smaller, the fewer
        answers differ.
    """

    accuracy: float
    cost: float
    exit_rates: Floats
    thresholds: Floats
    cutoffs: Floats
    params: dict[str, Any] = field(default_factory=dict)
    accuracy_se: float = 0.0
    cost_se: float = 0.0
    drop_se: float = 0.0

    @property
    def on(self) -> NDArray[np.bool_]:
        """Exits that are switched on, shape (K,)."""
        return switched_on(self.thresholds)


@dataclass(frozen=True, eq=False, repr=False)
class ParetoFrontier:
    """Operating points in rising cost, with the full model they are compared to.

    On calibration data these are policies for a grid of budgets, without those that a cheaper one beats beyond their
    noise (or the points that no other beats in both accuracy and cost, where a search was asked for by name; or every
    setting of a calibrator that sweeps one, as CPM's margins), and the plain full model in any case. Evaluated on other
    data (:meth:`on`) every point is kept in its order and :meth:`at` still chooses by what was calibrated: a test curve
    never chooses for itself.

    Parameters
    ----------
    points : list of OperatingPoint
    full_accuracy : float
        Accuracy of the full model on the same data.
    fixed_accuracy, fixed_cost : arrays of shape (K,)
        Accuracy and relative cost when each exit alone answers for everybody.
    n_samples : int
    chosen_on : ParetoFrontier or None
        The calibrated frontier, where the points were evaluated on other data.
    effective_size : float or None
        Samples of equal weight that say as much, where they have weights (:attr:`ExitOutputs.effective_size`).
    """

    points: list[OperatingPoint]
    full_accuracy: float
    fixed_accuracy: Floats
    fixed_cost: Floats
    n_samples: int
    chosen_on: ParetoFrontier | None = None
    effective_size: float | None = None

    @cached_property
    def accuracy(self) -> Floats:
        """Accuracy of every point, shape (P,)."""
        return np.array([point.accuracy for point in self.points])

    @cached_property
    def cost(self) -> Floats:
        """Mean relative cost of every point, shape (P,)."""
        return np.array([point.cost for point in self.points])

    @cached_property
    def drop_se(self) -> Floats:
        """Standard error of every point's loss against the full model, shape (P,)."""
        return np.array([point.drop_se for point in self.points])

    @cached_property
    def plain(self) -> NDArray[np.bool_]:
        """Points at which nobody leaves early, shape (P,): the full model."""
        never = np.isposinf([point.thresholds for point in self.points])[:, :-1]
        return np.asarray(never.reshape(len(never), -1).all(axis=1))

    @cached_property
    def beaten(self) -> NDArray[np.bool_]:
        """Points that a cheaper one, or one as cheap, is better than by more than chance explains, shape (P,)."""
        return beaten(self.accuracy, self.cost, self.drop_se)

    @classmethod
    def of(
        cls, points: Iterable[OperatingPoint], outputs: ExitOutputs, *, chosen_on: ParetoFrontier | None = None
    ) -> ParetoFrontier:
        """The frontier of points on outputs: in rising cost, or in the order of the frontier they were chosen on."""
        in_order = list(points)
        if chosen_on is None:
            in_order.sort(key=lambda point: (point.cost, point.accuracy))
        alone = outputs.alone_costs() / outputs.full_cost
        size = None if outputs.sample_weight is None else outputs.effective_size
        return cls(in_order, outputs.full_accuracy, outputs.accuracies, alone, outputs.n_samples, chosen_on, size)

    def index(self, point: OperatingPoint) -> int:
        """Where a stored point, itself and not one like it, stands in :attr:`points`; a ValueError for any other."""
        for i, own in enumerate(self.points):
            if own is point:
                return i
        raise ValueError("point must be one of the frontier's own points; got another. Take it from .points or .at().")

    def index_at(self, *, budget: float | None = None, max_drop: float | None = None) -> int:
        """Index of the point that :meth:`at` returns."""
        if (budget is None) == (max_drop is None):
            raise ValueError(f"give exactly one of budget and max_drop; got budget={budget!r}, max_drop={max_drop!r}.")
        calibrated = self.chosen_on or self
        if budget is not None:
            budget = checked_relative_cost("budget", budget, float(calibrated.cost.max()), TOLERANCE)
            within = calibrated.cost <= budget + TOLERANCE
            if not within.any():
                raise ValueError(
                    f"budget must be at least {calibrated.cost.min():.4g}, the relative cost of the cheapest operating "
                    f"point; got {budget:.4g}. Raise the budget or use a cheaper first exit."
                )
            return _best(np.where(within & ~calibrated.beaten, calibrated.cost, -np.inf), calibrated.accuracy)
        assert max_drop is not None
        max_drop = checked_number(
            "max_drop", max_drop, "a share of accuracy, at least 0 (0.01 is one point)", least=0.0
        )
        size = calibrated.effective_size or calibrated.n_samples
        caution = _CAUTION + _MORE_CAUTION * min(_CAUTIOUS_AT / size, 1.0)
        loss = calibrated.full_accuracy - calibrated.accuracy + caution * calibrated.drop_se
        eligible = calibrated.plain | (loss <= max_drop + NEGLIGIBLE)
        if not eligible.any():  # a frontier without the plain full model
            eligible = loss == loss.min()
        return _best(np.where(eligible, -calibrated.cost, -np.inf), calibrated.accuracy)

    def at(self, *, budget: float | None = None, max_drop: float | None = None) -> OperatingPoint:
        """The operating point for a budget, or for a loss of accuracy that is allowed.

        Parameters
        ----------
        budget : float, optional
            The dearest point whose mean relative cost is within it and that no cheaper one beats beyond their noise:
            a budget is spent, unless the data say that less is better.
        max_drop : float, optional
            The cheapest point that loses at most so much accuracy against the full model (0.01: one point), corrected
            for its being chosen: on average over calibration sets it holds on other data.

        Raises
        ------
        ValueError
            For a budget below the cheapest point, which is named, for one so large that a percentage was probably
            meant, or when not exactly one of the two is given.
        """
        return self.points[self.index_at(budget=budget, max_drop=max_drop)]

    def on(self, outputs: ExitOutputs) -> ParetoFrontier:
        """Every point evaluated on other data, in the same order."""
        points = [evaluate(outputs, point.thresholds, point.cutoffs, point.params) for point in self.points]
        return ParetoFrontier.of(points, outputs, chosen_on=self.chosen_on or self)

    def beside(self, outputs: ExitOutputs) -> ParetoFrontier:
        """The same points, with each exit alone as these outputs say: not charged with what a calibrator costs."""
        fixed_cost = outputs.alone_costs() / outputs.full_cost
        return dataclasses.replace(self, fixed_accuracy=outputs.accuracies, fixed_cost=fixed_cost)

    def accuracy_at(self, *, reduction: ArrayLike, below: float = 0.08, clamp: bool = False) -> Floats:
        """Accuracy at given cost reductions, as CalexNet's Tables 4 and 5 compare methods; shape of ``reduction``.

        Linear between the points and the full model, which is a point at reduction 0 whatever was measured. Of points
        at equal reduction the most accurate counts.

        Parameters
        ----------
        reduction : float or array
            1 - mean relative cost, heads and routers included: negative where those cost more than the exits save.
        below : float, default=0.08
            How far under the smallest measured reduction an answer is given, on the line to the full model. Under
            reduction 0 there is no such line: if nothing was measured there, there is no answer.
        clamp : bool, default=False
            Give the last accuracy up to ``below`` above the largest measured reduction.

        Returns
        -------
        array of the shape of ``reduction``
            NaN outside the measured range and what the two arguments add to it.
        """
        reductions, targets = 1.0 - self.cost, np.asarray(reduction, dtype=np.float64)
        knots, places = np.unique(np.append(reductions, 0.0), return_inverse=True)
        best = np.full(len(knots), -np.inf)
        np.maximum.at(best, places, np.append(self.accuracy, self.full_accuracy))
        lowest = min(reductions.min(), max(reductions.min() - below, 0.0))
        highest = reductions.max() + below if clamp else reductions.max()
        in_range = (targets >= lowest - TOLERANCE) & (targets <= highest + TOLERANCE)
        return np.where(in_range, np.interp(np.minimum(targets, reductions.max()), knots, best), np.nan)

    def to_arrays(self) -> tuple[dict[str, Any], dict[str, Floats]]:
        """The frontier as a JSON value and named float64 arrays, for writing; :meth:`from_arrays` reads them."""
        fields = ("accuracy", "cost", *ERRORS, "exit_rates", "thresholds", "cutoffs")
        arrays = {
            name: np.stack([np.asarray(getattr(p, name), dtype=np.float64) for p in self.points]) for name in fields
        }
        arrays |= {"fixed_accuracy": self.fixed_accuracy, "fixed_cost": self.fixed_cost}
        description: dict[str, Any] = {
            "full_accuracy": self.full_accuracy,
            "n_samples": self.n_samples,
            "params": [point.params for point in self.points],
        }
        if self.effective_size is not None:
            description["effective_size"] = self.effective_size
        return description, arrays

    @classmethod
    def from_arrays(cls, described: dict[str, Any], arrays: dict[str, Floats]) -> ParetoFrontier:
        """What :meth:`to_arrays` took apart; a ValueError for what it cannot have given."""
        check_form(described, _DESCRIPTION, "frontier")
        n_points, by_class = len(described["params"]), np.ndim(arrays.get("cutoffs", 0)) == 3
        shape = stored_array(arrays, "cutoffs", (n_points, None, None) if by_class else (n_points, None), "inf").shape
        n_exits = shape[1]
        for name in ("thresholds", "cutoffs"):
            limits = stored_array(arrays, name, shape, "inf")
            if not np.isneginf(limits[:, -1]).all():
                raise ValueError(f"array {name} must end in -inf, as the last exit takes everybody.")
        for name in ("accuracy", "cost", *ERRORS):
            stored_array(arrays, name, (n_points,))
        for name in ("fixed_accuracy", "fixed_cost"):
            stored_array(arrays, name, (n_exits,))
        stored_array(arrays, "exit_rates", (n_points, n_exits))
        for name in ("exit_rates", "cost", *ERRORS):
            if (arrays[name] < 0).any():
                raise ValueError(f"array {name} must not be negative; it is.")
        points = [
            OperatingPoint(
                accuracy=float(arrays["accuracy"][i]),
                cost=float(arrays["cost"][i]),
                exit_rates=arrays["exit_rates"][i],
                thresholds=arrays["thresholds"][i],
                cutoffs=arrays["cutoffs"][i],
                params=params,
                **{name: float(arrays[name][i]) for name in ERRORS},
            )
            for i, params in enumerate(described["params"])
        ]
        size = described.get("effective_size")
        if size is not None and not 0 < size < described["n_samples"] + 1e-6:
            raise ValueError(f"frontier.effective_size must be above 0 and at most n_samples; got {size!r}.")
        return cls(
            points, described["full_accuracy"], arrays["fixed_accuracy"], arrays["fixed_cost"], described["n_samples"],
            effective_size=size,
        )  # fmt: skip

    def to_frame(self) -> pandas.DataFrame:
        """A pandas table, one row a point: accuracy and relative cost with their standard errors, exit rates, params.

        Needs pandas. ``drop_se`` is the standard error of the accuracy lost against the full model.
        """
        rows = [
            {"accuracy": p.accuracy, "accuracy_se": p.accuracy_se, "cost": p.cost, "cost_se": p.cost_se}
            | {"drop_se": p.drop_se}
            | {f"exit_rate_{k}": rate for k, rate in enumerate(p.exit_rates)}
            | p.params
            for p in self.points
        ]
        return as_frame(rows)

    def plot(self, ax: Any = None, **kwargs: Any) -> adaptexit.ParetoDisplay:
        """Draw the curve; a shorthand for ``ParetoDisplay.from_frontier(frontier).plot(ax, **kwargs)``."""
        import adaptexit  # pictures are optional, and lie above: only the package's face knows both

        return adaptexit.ParetoDisplay.from_frontier(self).plot(ax, **kwargs)

    def __repr__(self) -> str:
        return (
            f"ParetoFrontier({len(self.points)} points, relative cost {self.cost.min():.3f} to {self.cost.max():.3f}, "
            f"accuracy {self.accuracy.min():.4f} to {self.accuracy.max():.4f}, full model {self.full_accuracy:.4f})"
        )


def _best(first: Floats, second: Floats) -> int:
    """Index of the largest ``first``; among equals (within the tolerance) of the largest ``second``."""
    equal = first >= first.max() - TOLERANCE
    return int(np.argmax(np.where(equal, second, -np.inf)))


def evaluate(
    outputs: ExitOutputs, thresholds: Floats, cutoffs: Floats, params: dict[str, Any] | None = None
) -> OperatingPoint:
    """The operating point of given thresholds on given outputs."""
    exits, on = exit_index(outputs, cutoffs), switched_on(thresholds)
    accuracy, cost, rates = summarise(outputs, exits, on)
    return OperatingPoint(
        accuracy, cost, rates, thresholds, cutoffs, params or {}, *standard_errors(outputs, exits, on)
    )


def beaten(accuracy: Floats, cost: Floats, drop_se: Floats) -> NDArray[np.bool_]:
    """Points (P,) that another, no dearer, beats in accuracy by more than ``TOLD_APART`` standard errors.

    The error of a difference is taken as if both losses were found on different samples: at most too large. Where no
    errors are known, of equals the cheaper one beats.
    """
    better = accuracy[None, :] - accuracy[:, None]
    error = np.hypot(drop_se[None, :], drop_se[:, None])
    saved = cost[:, None] - cost[None, :]
    by_accuracy = (saved >= -TOLERANCE) & (better > TOLD_APART * error + TOLERANCE)
    by_cost = (saved > TOLERANCE) & (better >= -TOLERANCE) & (error == 0)
    return np.asarray((by_accuracy | by_cost).any(axis=1))


def not_dominated(accuracy: Sequence[float] | Floats, cost: Sequence[float] | Floats) -> NDArray[np.intp]:
    """Indices, in rising cost, of the points that no other beats in both; of equal points the first."""
    accuracies, costs = np.asarray(accuracy, dtype=np.float64), np.asarray(cost, dtype=np.float64)
    order = np.lexsort((np.arange(len(costs)), -accuracies, costs))  # cheapest, then most accurate, then first
    best_before = np.maximum.accumulate(np.concatenate([[-np.inf], accuracies[order][:-1]]))
    return order[accuracies[order] > best_before + TOLERANCE]
