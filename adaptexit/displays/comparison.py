"""Methods side by side: their curves beside simple rules, and their accuracies and costs as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from adaptexit.displays.checks import check_comparison, curve_pairs, numbers, optional_text, sequence, text
from adaptexit.displays.drawing import drawing
from adaptexit.displays.shared import FULL_MODEL, axes, choice, line_style, point_style

Comparison = Any  # adaptexit.comparison.Comparison, which this module does not import


class ComparisonDisplay:
    """Accuracy against mean relative cost of several methods, and of rules that have no curve.

    Fig. 2 of Kyauk, "Adaptive Multi-Exit Neural Networks using EM-Based Routing", with its baselines in it. Make one
    with :meth:`from_comparison`.

    Parameters
    ----------
    curves : dict of str to (cost, accuracy), arrays (P,) each
        Of every method, in the order in which its points are joined.
    rules : dict of str to (cost, accuracy), arrays (R,) each
        Of every rule without a curve.
    full : (cost, accuracy)
        Of the full model.
    full_name : str, default="full model"

    Attributes
    ----------
    lines_ : dict of str to Line2D
    markers_ : dict of str to PathCollection
        Of the rules and the full model.
    ax_, figure_ : matplotlib Axes and Figure
        All after :meth:`plot`.
    """

    def __init__(
        self,
        *,
        curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
        rules: Mapping[str, tuple[ArrayLike, ArrayLike]],
        full: tuple[float, float],
        full_name: str = "full model",
    ) -> None:
        self.curves = curve_pairs("curves", curves)
        self.rules = curve_pairs("rules", rules)
        self.full = tuple(numbers("full", full, 2).tolist())
        self.full_name = text("full_name", full_name)

    @classmethod
    def from_comparison(cls, comparison: Comparison) -> ComparisonDisplay:
        """From :func:`adaptexit.comparison.compare`."""
        check_comparison(comparison)
        *alone, full = comparison.points["exits alone"]
        rules = {name: (alone if name == "exits alone" else points) for name, points in comparison.points.items()}
        return cls(
            curves={name: (frontier.cost, frontier.accuracy) for name, frontier in comparison.frontiers.items()},
            rules={name: ([p.cost for p in some], [p.accuracy for p in some]) for name, some in rules.items() if some},
            full=(full.cost, full.accuracy),
            full_name=full.name,
        )

    @drawing
    def plot(self, ax: Any = None, **kwargs: Any) -> ComparisonDisplay:
        """Draw on ``ax`` (a new figure unless given); ``kwargs`` go to every curve's ``Axes.plot``. Returns self."""
        ax = axes(ax, figsize=(7.2, 4.8), layout="constrained")
        self.lines_: dict[str, Any] = {}
        self.markers_: dict[str, Any] = {}
        for i, (name, (cost, accuracy)) in enumerate(self.curves.items()):
            # markers a twelfth of the diagonal apart: a curve may have a hundred points
            style = line_style(i) | {"markevery": 1 / 12, "label": name} | kwargs
            (self.lines_[name],) = ax.plot(cost, accuracy, **style)
        for i, (name, (cost, accuracy)) in enumerate(self.rules.items()):
            self.markers_[name] = ax.scatter(cost, accuracy, **point_style(i), color="0.35", label=name)
        self.markers_[self.full_name] = ax.scatter(*self.full, **FULL_MODEL, label=self.full_name)
        ax.axhline(self.full[1], color="grey", linewidth=0.8, linestyle="--")
        ax.set(xlabel="mean relative cost (full model = 1)", ylabel="accuracy")
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize="small", handlelength=3.5)
        self.ax_, self.figure_ = ax, ax.figure
        return self


class BarsDisplay:
    """Accuracy and mean relative cost of every method and rule, one pair of bars each.

    Fig. 4 of Kyauk, "Adaptive Multi-Exit Neural Networks using EM-Based Routing". Make one with
    :meth:`from_comparison`.

    Parameters
    ----------
    names : sequence of M str
        From top to bottom.
    accuracy, cost : arrays (M,)
        NaN where a method has no point to show.
    chosen_by : str, optional
        What chose the points, such as "budget 0.40".

    Attributes
    ----------
    accuracy_bars_, cost_bars_ : BarContainer
        M bars each.
    ax_, figure_ : matplotlib Axes and Figure
        All after :meth:`plot`.
    """

    def __init__(
        self, *, names: Sequence[str], accuracy: ArrayLike, cost: ArrayLike, chosen_by: str | None = None
    ) -> None:
        self.names = [text("names", name) for name in sequence("names", names, "one name a row")]
        if not self.names:
            raise ValueError("names must be one a row; got none.")
        self.accuracy = numbers("accuracy", accuracy, len(self.names), finite=False, beside="names").astype(float)
        self.cost = numbers("cost", cost, len(self.names), finite=False, beside="names").astype(float)
        self.chosen_by = optional_text("chosen_by", chosen_by)

    @classmethod
    def from_comparison(
        cls, comparison: Comparison, budget: float | None = None, max_drop: float | None = None
    ) -> BarsDisplay:
        """From :func:`adaptexit.comparison.compare`: one point of each method, as :meth:`Comparison.at` gives it."""
        check_comparison(comparison)
        rows = comparison.at(budget, max_drop)
        return cls(
            names=list(rows),
            accuracy=[np.nan if point is None else point.accuracy for point in rows.values()],
            cost=[np.nan if point is None else point.cost for point in rows.values()],
            chosen_by=choice(budget, max_drop) or "each method's own operating point",
        )

    @drawing
    def plot(self, ax: Any = None, **kwargs: Any) -> BarsDisplay:
        """Draw on ``ax`` (a new figure unless given); ``kwargs`` go to both ``Axes.barh``. Returns self."""
        rows = np.arange(len(self.names))
        ax = axes(ax, figsize=(7.2, 1.0 + 0.45 * len(rows)), layout="constrained")
        height = 0.38
        empty = np.isnan(self.accuracy)
        styles = (
            {"color": "C0", "label": "accuracy"} | kwargs,
            {"color": "0.8", "edgecolor": "0.5", "hatch": "////", "label": "mean relative cost"} | kwargs,
        )
        pairs = ((self.accuracy, -height / 2), (self.cost, height / 2))
        self.accuracy_bars_, self.cost_bars_ = (
            ax.barh(rows + shift, np.nan_to_num(values), height, **style)
            for (values, shift), style in zip(pairs, styles, strict=True)
        )
        for bars, (values, _) in zip((self.accuracy_bars_, self.cost_bars_), pairs, strict=True):
            figures = ["" if none else f"{value:.3f}" for value, none in zip(values, empty, strict=True)]
            ax.bar_label(bars, figures, padding=3, fontsize=8)
        for row in rows[empty]:
            ax.text(0.01, row, "none within the budget", va="center", fontsize=8, color="0.5")
        ax.set_yticks(rows, self.names)
        ax.invert_yaxis()
        ax.margins(x=0.08, y=0.02)
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(
            loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize="small", title=self.chosen_by
        )
        self.ax_, self.figure_ = ax, ax.figure
        return self
