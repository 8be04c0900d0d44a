"""Curves: accuracy against cost, and a saver against its base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from adaptexit.displays.shared import axes

Frontier = Any  # adaptexit.core.frontier.ParetoFrontier, which this module does not import
Curve = Any  # adaptexit.core.saver.JobCurve


class ParetoDisplay:
    """Accuracy against mean relative cost: the curve, each exit alone, the full model and the point in use.

    Make one with :meth:`from_estimator` or :meth:`from_frontier`.

    Parameters
    ----------
    cost, accuracy : arrays (P,)
        The operating points in rising cost.
    fixed_cost, fixed_accuracy : arrays (K,)
        Each exit alone; the last is the full model.
    chosen : (cost, accuracy), optional
        The operating point in use.
    exit_names : sequence of K str, optional
    name : str, optional
        Of the curve.

    Attributes
    ----------
    ax_, figure_, line_ : matplotlib Axes, Figure and the curve's Line2D, after :meth:`plot`
    """

    def __init__(
        self,
        *,
        cost: ArrayLike,
        accuracy: ArrayLike,
        fixed_cost: ArrayLike,
        fixed_accuracy: ArrayLike,
        chosen: tuple[float, float] | None = None,
        exit_names: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        self.cost = np.asarray(cost)
        self.accuracy = np.asarray(accuracy)
        self.fixed_cost = np.asarray(fixed_cost)
        self.fixed_accuracy = np.asarray(fixed_accuracy)
        self.chosen = chosen
        self.exit_names = exit_names
        self.name = name

    @classmethod
    def from_frontier(
        cls,
        frontier: Frontier,
        *,
        budget: float | None = None,
        exit_names: Sequence[str] | None = None,
        name: str | None = None,
    ) -> ParetoDisplay:
        """From a frontier; ``budget`` marks the operating point that serves it."""
        point = None if budget is None else frontier.at(budget=budget)
        return cls(
            cost=frontier.cost,
            accuracy=frontier.accuracy,
            fixed_cost=frontier.fixed_cost,
            fixed_accuracy=frontier.fixed_accuracy,
            chosen=None if point is None else (point.cost, point.accuracy),
            exit_names=exit_names,
            name=name,
        )

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any = None, y: Any = None, *, budget: float | None = None, name: str | None = None
    ) -> ParetoDisplay:
        """From a fitted estimator, on its calibration data or on (X, y); marks the point that ``predict`` would use."""
        frontier = estimator.pareto(X, y)
        point = frontier.points[estimator.point_index(budget)]
        display = cls.from_frontier(frontier, exit_names=estimator.exit_names, name=name)
        display.chosen = (point.cost, point.accuracy)
        return display

    def plot(self, ax: Any = None, *, name: str | None = None, **kwargs: Any) -> ParetoDisplay:
        """Draw on ``ax`` (a new figure unless given); ``kwargs`` go to the curve's ``Axes.plot``. Returns self."""
        ax = axes(ax)
        style = {"marker": ".", "label": name or self.name or "operating points"} | kwargs
        (self.line_,) = ax.plot(self.cost, self.accuracy, **style)
        last = len(self.fixed_cost) - 1
        for k, (cost, accuracy) in enumerate(zip(self.fixed_cost, self.fixed_accuracy, strict=True)):
            label = self.exit_names[k] if self.exit_names else ("full model" if k == last else f"exit {k} alone")
            ax.scatter(cost, accuracy, marker="s" if k == last else "^", s=45, zorder=3, label=label, color=f"C{k + 1}")
        if self.chosen is not None:
            ax.scatter(*self.chosen, marker="o", s=110, facecolors="none", edgecolors="black", zorder=4, label="in use")
            ax.axvline(self.chosen[0], color="black", linewidth=0.8, linestyle=":")
        ax.axhline(self.fixed_accuracy[-1], color="grey", linewidth=0.8, linestyle="--")
        ax.set(xlabel="mean relative cost (full model = 1)", ylabel="accuracy")
        ax.legend(loc="lower right", fontsize="small")
        self.ax_, self.figure_ = ax, ax.figure
        return self


class JobRatioDisplay:
    """Accuracy of saver and base on the samples that leave, against how many leave (TinySaver's Fig. 3).

    Where the curves cross, the saver has taken as much of the job as it can without loss: the job ratio.

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
        self.exit_ratio = np.asarray(exit_ratio)
        self.saver_accuracy = np.asarray(saver_accuracy)
        self.base_accuracy = np.asarray(base_accuracy)
        self.job_ratio = job_ratio
        self.saver_name = saver_name
        self.base_name = base_name

    @classmethod
    def from_curve(cls, curve: Curve, *, saver_name: str = "saver", base_name: str = "base") -> JobRatioDisplay:
        """From :func:`adaptexit.core.saver.job_curve`."""
        return cls(
            exit_ratio=curve.exit_ratio,
            saver_accuracy=curve.saver_accuracy,
            base_accuracy=curve.base_accuracy,
            job_ratio=curve.job_ratio,
            saver_name=saver_name,
            base_name=base_name,
        )

    @classmethod
    def from_estimator(cls, estimator: Any, X: Any = None, y: Any = None, *, saver: int = 0) -> JobRatioDisplay:
        """From a fitted cascade, on its calibration data or on (X, y)."""
        names = estimator.exit_names
        return cls.from_curve(estimator.job_curve(saver, X, y), saver_name=names[saver], base_name=names[-1])

    def plot(self, ax: Any = None, **kwargs: Any) -> JobRatioDisplay:
        """Draw on ``ax`` (a new figure unless given); ``kwargs`` go to both curves. Returns self."""
        ax = axes(ax)
        (self.saver_line_,) = ax.plot(self.exit_ratio, self.saver_accuracy, **({"label": self.saver_name} | kwargs))
        (self.base_line_,) = ax.plot(self.exit_ratio, self.base_accuracy, **({"label": self.base_name} | kwargs))
        if self.job_ratio > 0:
            height = float(np.interp(self.job_ratio, self.exit_ratio, self.saver_accuracy))
            label = f"job ratio {self.job_ratio:.3f}"
            ax.scatter(self.job_ratio, height, s=110, facecolors="none", edgecolors="red", zorder=3, label=label)
        ax.set(xlabel="exit ratio (share of samples that leave at the saver)", ylabel="accuracy on those that leave")
        ax.legend(loc="lower left", fontsize="small")
        self.ax_, self.figure_ = ax, ax.figure
        return self
