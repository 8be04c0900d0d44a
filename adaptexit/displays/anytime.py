"""Accuracy against absolute cost of several models, in the two settings of papers on networks with exits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from adaptexit.displays.checks import check_evaluation, curve_pairs, optional_text
from adaptexit.displays.drawing import drawing, pyplot
from adaptexit.displays.shared import line_style, point_style

Evaluation = Any  # adaptexit.evaluation.Evaluation, which this module does not import

_TITLES = {"anytime": "anytime prediction", "budgeted": "budgeted batch classification"}


class AnytimeDisplay:
    """Anytime prediction (left) and budgeted batch classification (right): accuracy against the cost of a sample.

    Figs. 2 and 3 of the fusion-stem paper (ICCVW 2023), as of MSDNet's before it: a marker an exit on the left, the
    mean cost along the budget on the right, a model in one colour. Make one with :meth:`from_evaluation`.

    Parameters
    ----------
    anytime : dict of str to (cost, accuracy), arrays (K,) each
        Of every model, one point an exit.
    budgeted : dict of str to (cost, accuracy), arrays (P,) each
        Of every model, one point a budget. A model may be in one of the two alone.
    unit : {"MACs", "seconds", "given"} or other str, optional
        Of costs; the axis takes MACs in thousands, millions or thousand millions, whichever reads well.
    static : dict of str to (cost, accuracy), numbers each, optional
        Models without exits: single points, in both panels.

    Attributes
    ----------
    lines_ : dict of "anytime" and "budgeted" to dict of str to Line2D
    points_ : dict of "anytime" and "budgeted" to dict of str to PathCollection
        Of the static models.
    ax_ : array of two Axes
    figure_ : matplotlib Figure
        All after :meth:`plot`.
    """

    _several_axes = True

    def __init__(
        self,
        *,
        anytime: Mapping[str, tuple[ArrayLike, ArrayLike]],
        budgeted: Mapping[str, tuple[ArrayLike, ArrayLike]],
        unit: str | None = None,
        static: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self.anytime = curve_pairs("anytime", anytime)
        self.budgeted = curve_pairs("budgeted", budgeted)
        if not (self.anytime or self.budgeted):
            raise ValueError("anytime or budgeted must hold one model at least; got two empty dicts.")
        self.unit = optional_text("unit", unit)
        self.static = curve_pairs("static", {} if static is None else static, points=True)

    @classmethod
    def from_evaluation(
        cls, evaluation: Evaluation, *, static: Mapping[str, tuple[float, float]] | None = None
    ) -> AnytimeDisplay:
        """From :func:`adaptexit.evaluation.evaluate_settings`; costs of ``static`` models are in its unit."""
        check_evaluation(evaluation)
        return cls(
            anytime={name: (curve.cost, curve.accuracy) for name, curve in evaluation.anytime.items()},
            budgeted={name: (curve.cost, curve.accuracy) for name, curve in evaluation.budgeted.items()},
            unit=evaluation.unit,
            static=static,
        )

    @drawing
    def plot(self, ax: Any = None, **kwargs: Any) -> AnytimeDisplay:
        """Draw on ``ax``, a sequence of two (a new figure unless given). Returns self.

        ``kwargs`` go to every curve's ``Axes.plot``.
        """
        from adaptexit.core.cost_curves import readable_scale

        plt = pyplot()
        if ax is None:
            ax = plt.subplots(1, 2, figsize=(9.6, 4.2), sharex=True, sharey=True, layout="constrained")[1]
        panels = np.ravel(np.asarray(ax, dtype=object))
        if len(panels) != 2:
            raise ValueError(f"ax must hold two axes, for the two settings; got {len(panels)}.")
        settings = {"anytime": self.anytime, "budgeted": self.budgeted}
        divisor, unit = readable_scale(self._largest_cost(), self.unit)
        names = list(dict.fromkeys([*self.anytime, *self.budgeted]))
        self.lines_: dict[str, dict[str, Any]] = {setting: {} for setting in settings}
        self.points_: dict[str, dict[str, Any]] = {setting: {} for setting in settings}
        for panel, (setting, curves) in zip(panels, settings.items(), strict=True):
            for name, (cost, accuracy) in curves.items():
                i = names.index(name)
                style = line_style(i) | {"color": f"C{i}", "label": name}
                if setting == "budgeted":
                    style["markevery"] = 1 / 12  # of the diagonal: a curve may have a hundred points
                (self.lines_[setting][name],) = panel.plot(cost / divisor, accuracy, **(style | kwargs))
            for i, (name, (cost, accuracy)) in enumerate(self.static.items()):
                dots = panel.scatter(cost / divisor, accuracy, **point_style(i), color="0.35", label=name)
                self.points_[setting][name] = dots
            panel.set_title(_TITLES[setting], fontsize=11)
        panels[0].set(xlabel=f"{unit} of a sample", ylabel="accuracy")
        panels[1].set(xlabel=f"mean {unit} of a sample")
        handles = {
            handle.get_label(): handle
            for setting in settings
            for handle in (*self.lines_[setting].values(), *self.points_[setting].values())
        }
        panels[1].legend(
            handles=list(handles.values()), loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False,
            fontsize="small", handlelength=3.5,
        )  # fmt: skip
        self.ax_, self.figure_ = panels, panels[0].figure
        return self

    def _largest_cost(self) -> float:
        curves = [*self.anytime.values(), *self.budgeted.values(), *self.static.values()]
        return max(float(np.max(cost)) for cost, _ in curves)
