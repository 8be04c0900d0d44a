"""What one knob does: accuracy, cost and who answers along a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from adaptexit.displays.checks import check_kind, number, numbers, text
from adaptexit.displays.drawing import drawing
from adaptexit.displays.shared import axes, exit_labels, line_style

Frontier = Any  # adaptexit.core.frontier.ParetoFrontier, which this module does not import

_LOGARITHMIC = 20.0
"""Largest over smallest value from which the axis is logarithmic."""


class SweepDisplay:
    """Accuracy, mean relative cost and the exits' shares against the knob that was swept.

    Fig. 3 of Kyauk, "Adaptive Multi-Exit Neural Networks using EM-Based Routing", for its cost weight; likewise for the
    margins of CPM or budgets. Make one with :meth:`from_frontier`.

    Parameters
    ----------
    values : array (P,)
        Of the knob, rising.
    accuracy, cost : arrays (P,)
    exit_rates : array (P, K)
        Share of the samples that each exit answers.
    knob : str
        Its name.
    exit_names : sequence of K str, optional

    Attributes
    ----------
    accuracy_, cost_ : Line2D
    areas_ : list of K PolyCollection
        Shares of the exits, stacked from the first exit up.
    ax_, figure_ : matplotlib Axes and Figure
        All after :meth:`plot`.
    """

    def __init__(
        self,
        *,
        values: ArrayLike,
        accuracy: ArrayLike,
        cost: ArrayLike,
        exit_rates: ArrayLike,
        knob: str,
        exit_names: Sequence[str] | None = None,
    ) -> None:
        self.values = numbers("values", values, "P").astype(float)
        self.accuracy = numbers("accuracy", accuracy, len(self.values), beside="values").astype(float)
        self.cost = numbers("cost", cost, len(self.values), beside="values").astype(float)
        self.exit_rates = numbers("exit_rates", exit_rates, len(self.values), "K", beside="values").astype(float)
        self.knob = text("knob", knob)
        self.exit_names = exit_labels(exit_names, self.exit_rates.shape[1])

    @classmethod
    def from_frontier(
        cls, frontier: Frontier, knob: str = "cost_weight", *, exit_names: Sequence[str] | None = None
    ) -> SweepDisplay:
        """From a frontier whose points say the knob in their ``params``; points that do not are left out.

        Raises
        ------
        ValueError
            Where no point says it.
        """
        from adaptexit.core.frontier import ParetoFrontier

        check_kind("frontier", frontier, ParetoFrontier, "pareto()")
        text("knob", knob)
        points = [p for p in frontier.points if knob in p.params]
        points.sort(key=lambda point: number(f"knob {knob!r}", point.params[knob]))
        if not points:
            knobs = sorted({name for p in frontier.points for name in p.params})
            raise ValueError(f"knob must be among the params of the frontier's points, {knobs}; got {knob!r}.")
        return cls(
            values=[p.params[knob] for p in points],
            accuracy=[p.accuracy for p in points],
            cost=[p.cost for p in points],
            exit_rates=[p.exit_rates for p in points],
            knob=knob,
            exit_names=exit_names,
        )

    @drawing
    def plot(self, ax: Any = None, **kwargs: Any) -> SweepDisplay:
        """Draw on ``ax`` (a new figure unless given); ``kwargs`` go to both lines' ``Axes.plot``. Returns self."""
        ax = axes(ax, figsize=(7.2, 4.8), layout="constrained")
        shades = [str(shade) for shade in np.linspace(0.95, 0.65, self.exit_rates.shape[1])]
        areas = {"colors": shades, "edgecolor": "white", "linewidth": 0.8}
        self.areas_ = ax.stackplot(self.values, self.exit_rates.T, labels=self.exit_names, **areas)
        self.accuracy_, self.cost_ = (
            ax.plot(self.values, values, **(line_style(i) | {"linewidth": 2.0, "clip_on": False} | style | kwargs))[0]
            for i, (values, style) in enumerate(
                (
                    (self.accuracy, {"color": "C0", "label": "accuracy"}),
                    (self.cost, {"color": "C3", "label": "mean relative cost"}),
                )
            )
        )
        positive = self.values[self.values > 0]
        if len(positive) and self.values.max() >= _LOGARITHMIC * positive.min():
            wide = self.values.min() > 0
            ax.set_xscale("log" if wide else "symlog", **({} if wide else {"linthresh": positive.min()}))
        ax.set(xlabel=self.knob.replace("_", " "), ylim=(0.0, max(1.0, 1.03 * float(self.cost.max()))))
        ax.margins(x=0)
        ax.set_ylabel("accuracy, relative cost; share of samples (grey)")
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize="small")
        self.ax_, self.figure_ = ax, ax.figure
        return self
