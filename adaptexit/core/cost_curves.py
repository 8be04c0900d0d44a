"""Accuracy against absolute cost in the two settings of papers on networks with exits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaptexit.core.frontier import TOLERANCE, ParetoFrontier
from adaptexit.core.outputs import ExitOutputs
from adaptexit.utils.validation import checked_number

Floats = NDArray[np.float64]

_SCALES = {
    "MACs": ((1e9, "G MACs"), (1e6, "M MACs"), (1e3, "k MACs"), (1.0, "MACs")),
    "seconds": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
}


@dataclass(frozen=True, eq=False)
class CostCurve:
    """Points of one model on named data.

    Attributes
    ----------
    cost : array (P,)
        Mean cost of a sample, in the unit that the model's costs have.
    accuracy : array (P,)
    """

    cost: Floats
    accuracy: Floats

    def cost_at(self, accuracy: float) -> float:
        """The least cost of a point that reaches an accuracy (a share, 0.94 is 94%); NaN where none does.

        What texts quote ("reaches 94% at 40 M"). The point is chosen on the data reported here.
        """
        share = checked_number("accuracy", accuracy, "a share (0.94 is 94%)")
        if share > 1:
            raise ValueError(f"accuracy must be a share, at most 1; got {share:.4g}. Was {share / 100:.4g} meant?")
        costs = self.cost[self.accuracy >= share - TOLERANCE]
        return float(costs.min()) if len(costs) else float("nan")

    def accuracy_at(self, cost: float) -> float:
        """Accuracy of the dearest point within a cost, in the curve's unit; NaN where all cost more.

        Not the most accurate one: that would be chosen by the accuracies reported. Of equally dear ones the last.
        """
        limit = checked_number("cost", cost, "a finite cost in the curve's unit")
        order = np.argsort(self.cost, kind="stable")
        place = int(np.searchsorted(self.cost[order], limit * (1 + TOLERANCE), side="right")) - 1
        return float(self.accuracy[order[place]]) if place >= 0 else float("nan")


@dataclass(frozen=True, eq=False)
class AnytimeCurve(CostCurve):
    """Anytime prediction: every exit alone answers for everybody, from shallow to deep.

    Attributes
    ----------
    exit_names : list of K str
    """

    exit_names: list[str]

    @classmethod
    def of(cls, outputs: ExitOutputs, exit_names: Sequence[str]) -> AnytimeCurve:
        """What every exit of the outputs gives, at :meth:`ExitOutputs.alone_costs`."""
        return cls(outputs.alone_costs(), outputs.accuracies, list(exit_names))


@dataclass(frozen=True, eq=False)
class BudgetCurve(CostCurve):
    """Budgeted batch classification: thresholds chosen on calibration data, one point a budget.

    Attributes
    ----------
    budgets : array (P,), rising
        Mean cost that the calibration data were to keep, in the unit of ``cost``; on the data reported it is ``cost``.
    """

    budgets: Floats

    @classmethod
    def served(cls, frontier: ParetoFrontier, full_cost: float, n_budgets: int) -> BudgetCurve:
        """The points that serve even budgets, from the cheapest calibrated point's cost to the dearest's.

        Parameters
        ----------
        frontier : ParetoFrontier
            Evaluated on the data to report; budgets are served by the points it was ``chosen_on``.
        full_cost : float
            Of the full model: what relative costs are relative to.
        n_budgets : int
        """
        choosing = (frontier.chosen_on or frontier).cost
        budgets = np.linspace(choosing.min(), choosing.max(), n_budgets)
        points = [frontier.at(budget=float(budget)) for budget in budgets]
        costs, accuracies = (np.array([getattr(p, name) for p in points]) for name in ("cost", "accuracy"))
        return cls(costs * full_cost, accuracies, budgets * full_cost)

    @classmethod
    def of(cls, frontier: ParetoFrontier, full_cost: float) -> BudgetCurve:
        """All points of a frontier, each for the budget that it costs on the calibration data."""
        choosing = frontier.chosen_on or frontier
        return cls(frontier.cost * full_cost, frontier.accuracy, choosing.cost * full_cost)


def readable_scale(largest: float, unit: str | None) -> tuple[float, str]:
    """What to divide costs of a unit by so that the largest reads well, and what they are called then."""
    if unit not in _SCALES:
        return 1.0, {None: "cost", "given": "cost as given"}.get(unit, str(unit))
    scales = _SCALES[unit]
    return next((scale for scale in scales if largest >= scale[0]), scales[-1])
