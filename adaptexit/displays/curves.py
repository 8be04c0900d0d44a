"""Curves: accuracy against cost, and a saver against its base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from adaptexit.displays.checks import (
    check_exit,
    check_kind,
    check_switch,
    chosen_point,
    number,
    numbers,
    optional_text,
    standard_errors,
    text,
)
from adaptexit.displays.drawing import drawing
from adaptexit.displays.shared import (
    BAND,
    FULL_MODEL,
    ONE_ERROR,
    RING,
    Outputs,
    Point,
    axes,
    caption,
    check_outputs,
    choice,
    exit_labels,
    line_style,
    operating_point,
    point_style,
    thresholded,
)

Frontier = Any  # adaptexit.core.frontier.ParetoFrontier, which this module does not import
Curve = Any  # adaptexit.core.saver.JobCurve


class ParetoDisplay:
    """Accuracy against mean relative cost: the curve, each exit alone, the full model and the point in use.

    One standard error of accuracy is shaded around the curve, where it is known. It says how far the whole curve, the
    full model's level with it, might lie elsewhere on other samples; a loss against the full model, on the same
    samples, is known better (``drop_se`` of a point).

    Make one with :meth:`from_estimator` or :meth:`from_frontier`; a frontier of recorded outputs is
    ``calibrator.pareto(outputs)``.

    Parameters
    ----------
    cost, accuracy : arrays (P,)
        The operating points in rising cost.
    fixed_cost, fixed_accuracy : arrays (K,)
        Each exit alone; the last is the full model.
    accuracy_se : array (P,), optional
        Standard errors of the points' accuracies, 0 or above; without, or where all are 0, nothing is shaded.
    chosen : (cost, accuracy), optional
        The operating point in use.
    chosen_by : str, optional
        What chose it, such as "budget 0.40".
    exit_names : sequence of K str, optional
    name : str, optional
        Of the curve.

    Attributes
    ----------
    ax_, figure_, line_ : matplotlib Axes, Figure and the curve's Line2D, after :meth:`plot`
    band_ : what is shaded around it, a PolyCollection, or None
    """

    def __init__(
        self,
        *,
        cost: ArrayLike,
        accuracy: ArrayLike,
        fixed_cost: ArrayLike,
        fixed_accuracy: ArrayLike,
        accuracy_se: ArrayLike | None = None,
        chosen: tuple[float, float] | None = None,
        chosen_by: str | None = None,
        exit_names: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        self.cost = numbers("cost", cost, "P")
        self.accuracy = numbers("accuracy", accuracy, len(self.cost), beside="cost")
        self.accuracy_se = None if accuracy_se is None else standard_errors(accuracy_se, len(self.cost))
        self.fixed_cost = numbers("fixed_cost", fixed_cost, "K")
        self.fixed_accuracy = numbers("fixed_accuracy", fixed_accuracy, len(self.fixed_cost), beside="fixed_cost")
        self.chosen = chosen_point(chosen)
        self.chosen_by = optional_text("chosen_by", chosen_by)
        self.exit_names = exit_labels(exit_names, len(self.fixed_cost))
        self.name = optional_text("name", name)

    @classmethod
    def from_frontier(
        cls,
        frontier: Frontier,
        *,
        budget: float | None = None,
        max_drop: float | None = None,
        exit_names: Sequence[str] | None = None,
        name: str | None = None,
    ) -> ParetoDisplay:
        """From a frontier; ``budget`` or ``max_drop`` marks the operating point that serves it.

        Parameters
        ----------
        frontier : ParetoFrontier
        budget, max_drop : float, optional
            As for :meth:`adaptexit.ParetoFrontier.at`, at most one of them; without, no point is marked.
        exit_names : sequence of K str, optional
        name : str, optional
            Of the curve.

        Raises
        ------
        ValueError
            For a budget below the cheapest point, or both.
        """
        from adaptexit.core.frontier import ParetoFrontier

        check_kind("frontier", frontier, ParetoFrontier, "pareto()")
        nothing = budget is None and max_drop is None
        point = None if nothing else frontier.at(budget=budget, max_drop=max_drop)
        return cls._of(frontier, point, choice(budget, max_drop), exit_names, name)

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any = None,
        y: Any = None,
        *,
        budget: float | None = None,
        max_drop: float | None = None,
        name: str | None = None,
    ) -> ParetoDisplay:
        """From a fitted estimator, on its calibration data or on (X, y); marks the point that ``predict`` would use.

        Parameters
        ----------
        estimator : fitted estimator
        X, y : as for its ``pareto``
        budget, max_drop : float, optional
            As for its ``predict``.
        name : str, optional
            Of the curve.
        """
        stored_point, chosen_by = operating_point(estimator, budget, max_drop)
        frontier = estimator.pareto(X, y)
        point = frontier.points[estimator.calibrator_.frontier_.index(stored_point)]
        return cls._of(frontier, point, chosen_by, estimator.exit_names, name)

    @classmethod
    def _of(
        cls,
        frontier: Frontier,
        point: Point | None,
        chosen_by: str | None,
        exit_names: Sequence[str] | None,
        name: str | None,
    ) -> ParetoDisplay:
        return cls(
            cost=frontier.cost,
            accuracy=frontier.accuracy,
            accuracy_se=[p.accuracy_se for p in frontier.points],
            fixed_cost=frontier.fixed_cost,
            fixed_accuracy=frontier.fixed_accuracy,
            chosen=None if point is None else (point.cost, point.accuracy),
            chosen_by=chosen_by,
            exit_names=exit_names,
            name=name,
        )

    @drawing
    def plot(self, ax: Any = None, *, name: str | None = None, errors: bool = True, **kwargs: Any) -> ParetoDisplay:
        """Draw on ``ax`` (a new figure unless given); ``kwargs`` go to the curve's ``Axes.plot``. Returns self.

        A second curve on the same axes gets other markers and dashes, and exits of the same names are listed once, as
        is what the shading means. ``errors=False`` shades nothing.
        """
        check_switch("errors", errors)
        ax = axes(ax, layout="constrained")
        n_curves = sum(not str(line.get_label()).startswith("_") for line in ax.lines)
        legend_labels = {dots.get_label() for dots in ax.collections}
        style = line_style(n_curves) | {"label": name or self.name or "operating points"} | kwargs
        (self.line_,) = ax.plot(self.cost, self.accuracy, **style)
        self.band_ = None
        if errors and self.accuracy_se is not None and self.accuracy_se.any():
            self.band_ = ax.fill_between(
                self.cost,
                self.accuracy - self.accuracy_se,
                self.accuracy + self.accuracy_se,
                **BAND,
                color=self.line_.get_color(),
                label=f"_{ONE_ERROR}" if ONE_ERROR in legend_labels else ONE_ERROR,
            )
        *early, full = self.exit_names
        labels = [*(f"{exit_name} alone" for exit_name in early), full]
        styles = [*(point_style(k) | {"color": f"C{k + 1}"} for k in range(len(early))), FULL_MODEL]
        for cost, accuracy, label, style in zip(self.fixed_cost, self.fixed_accuracy, labels, styles, strict=True):
            ax.scatter(cost, accuracy, **style, label=f"_{label}" if label in legend_labels else label)
        if self.chosen is not None:
            ax.scatter(*self.chosen, **RING, label=caption(self.chosen, self.chosen_by))
            ax.axvline(self.chosen[0], color="black", linewidth=0.8, linestyle=":")
        ax.axhline(self.fixed_accuracy[-1], color="grey", linewidth=0.8, linestyle="--")
        ax.set(xlabel="mean relative cost (full model = 1)", ylabel="accuracy")
        ax.legend(loc="best", fontsize="small")
        self.ax_, self.figure_ = ax, ax.figure
        return self


class JobRatioDisplay:
    """Accuracy of saver and base on the samples that leave, against how many leave (TinySaver's Fig. 3).

    Where the curves cross, the saver has taken as much of the job as it can without loss: the job ratio. Make one with
    :meth:`from_estimator`, :meth:`from_outputs` or :meth:`from_curve`.

    Parameters
    ----------
    exit_ratio, saver_accuracy, base_accuracy : arrays (E,)
    job_ratio : float
    saver_name, base_name : str

    Attributes
    ----------
    ax_, figure_, saver_line_, base_line_ : matplotlib objects, after :meth:`plot`
    """

    def __init__(
        self,
        *,
        exit_ratio: ArrayLike,
        saver_accuracy: ArrayLike,
        base_accuracy: ArrayLike,
        job_ratio: float,
        saver_name: str = "saver",
        base_name: str = "base",
    ) -> None:
        self.exit_ratio = numbers("exit_ratio", exit_ratio, "E")
        self.saver_accuracy = numbers("saver_accuracy", saver_accuracy, len(self.exit_ratio), beside="exit_ratio")
        self.base_accuracy = numbers("base_accuracy", base_accuracy, len(self.exit_ratio), beside="exit_ratio")
        self.job_ratio = number("job_ratio", job_ratio)
        self.saver_name = text("saver_name", saver_name)
        self.base_name = text("base_name", base_name)

    @classmethod
    def from_curve(cls, curve: Curve, *, saver_name: str = "saver", base_name: str = "base") -> JobRatioDisplay:
        """From :func:`adaptexit.core.saver.job_curve`."""
        from adaptexit.core.saver import JobCurve

        check_kind("curve", curve, JobCurve, "job_curve")
        return cls(
            exit_ratio=curve.exit_ratio,
            saver_accuracy=curve.saver_accuracy,
            base_accuracy=curve.base_accuracy,
            job_ratio=curve.job_ratio,
            saver_name=saver_name,
            base_name=base_name,
        )

    @classmethod
    def from_outputs(
        cls, outputs: Outputs, saver: int = 0, *, exit_names: Sequence[str] | None = None
    ) -> JobRatioDisplay:
        """From recorded outputs.

        Parameters
        ----------
        outputs : ExitOutputs
            Of K exits, with the scores that are thresholded: ``calibrator.rescored(outputs)``.
        saver : int, default=0
            Its exit, 0 ... K - 2.
        exit_names : sequence of K str, optional

        Raises
        ------
        ValueError
            For a saver that is none of the early exits.
        """
        from adaptexit.core.saver import job_curve

        check_outputs(outputs)
        check_exit("saver", saver, outputs.n_exits)
        names = exit_labels(exit_names, outputs.n_exits)
        curve = job_curve(outputs.scores[saver], outputs.graded[saver], outputs.graded[-1], outputs.sample_weight)
        return cls.from_curve(curve, saver_name=names[saver], base_name=names[-1])

    @classmethod
    def from_estimator(cls, estimator: Any, X: Any = None, y: Any = None, *, saver: int = 0) -> JobRatioDisplay:
        """From a fitted cascade, on its calibration data or on (X, y)."""
        return cls.from_outputs(thresholded(estimator, X, y), saver, exit_names=estimator.exit_names)

    @drawing
    def plot(self, ax: Any = None, **kwargs: Any) -> JobRatioDisplay:
        """Draw on ``ax`` (a new figure unless given); ``kwargs`` go to both curves. Returns self."""
        ax = axes(ax, layout="constrained")
        curves = ((self.saver_accuracy, self.saver_name), (self.base_accuracy, self.base_name))
        self.saver_line_, self.base_line_ = (
            ax.plot(self.exit_ratio, accuracy, **(line_style(i) | {"markevery": 0.1, "label": name} | kwargs))[0]
            for i, (accuracy, name) in enumerate(curves)
        )
        if self.job_ratio > 0:
            height = float(np.interp(self.job_ratio, self.exit_ratio, self.saver_accuracy))
            ax.scatter(self.job_ratio, height, **RING, label=f"job ratio {self.job_ratio:.3f}")
        ax.set(xlabel="exit ratio (share of samples that leave at the saver)", ylabel="accuracy on those that leave")
        ax.legend(loc="lower left", fontsize="small")
        self.ax_, self.figure_ = ax, ax.figure
        return self
