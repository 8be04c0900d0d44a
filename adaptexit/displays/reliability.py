"""Scores against accuracy, exit by exit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from adaptexit.displays.checks import check_kind, chosen_point, numbers, optional_text
from adaptexit.displays.drawing import drawing
from adaptexit.displays.shared import (
    Outputs,
    Point,
    caption,
    check_pair,
    exit_labels,
    measured,
    operating_point,
    pyplot,
    thresholded,
)

Calibration = Any  # adaptexit.core.metrics.ExitCalibration

_COLUMNS = 4
"""Panels beside each other at most."""


class ReliabilityDisplay:
    """Accuracy against score among the samples that leave at each exit (CalexNet, appendix A.1).

    One panel for each exit that somebody leaves at: a point for each bin, joined to the diagonal on which scores and
    accuracy agree, and behind it how many samples the bin holds. Make one with :meth:`from_estimator`,
    :meth:`from_outputs` or :meth:`from_calibration`.

    Parameters
    ----------
    ece : array (K,)
    n : int array (K,)
        Samples that leave at each exit.
    edges : array (K, n_bins + 1)
    accuracy, confidence, count : arrays (K, n_bins)
    exit_names : sequence of K str, optional
    chosen : (cost, accuracy), optional
        Of the operating point on these samples.
    chosen_by : str, optional
        What chose it, such as "budget 0.40".

    Attributes
    ----------
    exits_ : list of int
        The exits drawn.
    ax_ : array of Axes, one a panel
    count_ax_ : array of Axes
        Of the numbers of samples, behind them.
    points_, bars_ : lists of Line2D and of BarContainer
        Accuracy and numbers of samples of the bins that are not empty.
    legend_ : Legend
        One for all panels.
    figure_ : matplotlib Figure
        All after :meth:`plot`.
    """

    _several_axes = True

    def __init__(
        self,
        *,
        ece: ArrayLike,
        n: ArrayLike,
        edges: ArrayLike,
        accuracy: ArrayLike,
        confidence: ArrayLike,
        count: ArrayLike,
        exit_names: Sequence[str] | None = None,
        chosen: tuple[float, float] | None = None,
        chosen_by: str | None = None,
    ) -> None:
        self.n = numbers("n", n, "K", whole=True)
        shape = numbers("count", count, len(self.n), "n_bins", whole=True, beside="n").shape
        self.count = np.asarray(count)
        self.ece = numbers("ece", ece, len(self.n), finite=False, beside="n")
        self.edges = numbers("edges", edges, len(self.n), shape[1] + 1, finite=False, beside="count")
        self.accuracy = numbers("accuracy", accuracy, *shape, finite=False, beside="count")
        self.confidence = numbers("confidence", confidence, *shape, finite=False, beside="count")
        if not self.n.any():
            raise ValueError("n must be above 0 at one exit at least; nobody leaves, so there is nothing to draw.")
        if (self.n != self.count.sum(axis=1)).any():
            raise ValueError(f"n must be the sums of count, {self.count.sum(axis=1).tolist()}; got {self.n.tolist()}.")
        if np.isnan(self.edges[self.n > 0]).any() or np.isnan(self.accuracy + self.confidence)[self.count > 0].any():
            raise ValueError("edges, accuracy and confidence must be finite where samples leave; they hold NaN.")
        self.exit_names = exit_labels(exit_names, len(self.n))
        self.chosen = chosen_point(chosen)
        self.chosen_by = optional_text("chosen_by", chosen_by)

    @classmethod
    def from_calibration(
        cls,
        calibration: Calibration,
        *,
        exit_names: Sequence[str] | None = None,
        chosen: tuple[float, float] | None = None,
        chosen_by: str | None = None,
    ) -> ReliabilityDisplay:
        """From :func:`adaptexit.core.metrics.exit_calibration`."""
        from adaptexit.core.metrics import ExitCalibration

        check_kind("calibration", calibration, ExitCalibration, "exit_calibration")
        return cls(
            ece=calibration.ece,
            n=calibration.n,
            edges=calibration.edges,
            accuracy=calibration.accuracy,
            confidence=calibration.confidence,
            count=calibration.count,
            exit_names=exit_names,
            chosen=chosen,
            chosen_by=chosen_by,
        )

    @classmethod
    def from_outputs(
        cls,
        outputs: Outputs,
        point: Point,
        *,
        n_bins: int = 10,
        chosen_by: str | None = None,
        exit_names: Sequence[str] | None = None,
    ) -> ReliabilityDisplay:
        """From recorded outputs at an operating point.

        Parameters
        ----------
        outputs : ExitOutputs
            Of K exits, with the scores that the point thresholds, which have to be probabilities:
            ``calibrator.rescored(outputs)``.
        point : OperatingPoint
        n_bins : int, default=10
        chosen_by : str, optional
            What chose the point, such as "budget 0.40".
        exit_names : sequence of K str, optional

        Raises
        ------
        ValueError
            When a sample leaves with a score outside [0, 1], or for a point of other exits or classes.
        """
        from adaptexit.core.metrics import exit_calibration

        check_pair(outputs, point)
        calibration = exit_calibration(outputs, point, n_bins)
        return cls.from_calibration(
            calibration, exit_names=exit_names, chosen=measured(outputs, point), chosen_by=chosen_by
        )

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any = None,
        y: Any = None,
        *,
        budget: float | None = None,
        max_drop: float | None = None,
        n_bins: int = 10,
    ) -> ReliabilityDisplay:
        """From a fitted estimator at the point that ``predict`` would use, on its calibration data or on (X, y).

        Parameters
        ----------
        estimator : fitted estimator
        X, y : as for its ``record``
        budget, max_drop : float, optional
            As for its ``predict``.
        n_bins : int, default=10
        """
        point, chosen_by = operating_point(estimator, budget, max_drop)
        outputs = thresholded(estimator, X, y)
        return cls.from_outputs(outputs, point, n_bins=n_bins, chosen_by=chosen_by, exit_names=estimator.exit_names)

    @drawing
    def plot(self, ax: Any = None, **kwargs: Any) -> ReliabilityDisplay:
        """Draw one panel for each exit that somebody leaves at.

        Parameters
        ----------
        ax : Axes or array of Axes, optional
            At least as many as panels; those left over stay as they are. A new figure unless given.
        **kwargs
            Of the points, for ``Axes.plot``.

        Returns
        -------
        self
        """
        plt = pyplot()
        self.exits_ = np.flatnonzero(self.n).tolist()
        panels, own = len(self.exits_), ax is None
        columns = min(panels, _COLUMNS) if own else panels
        if own:
            rows = -(-panels // columns)
            size = {"figsize": (max(4.4, 0.6 + 3.0 * columns), 0.6 + 3.2 * rows), "layout": "constrained"}
            ax = plt.subplots(rows, columns, squeeze=False, sharey=True, **size)[1]
        grid = np.ravel(np.asarray(ax, dtype=object))
        if len(grid) < panels:
            raise ValueError(f"ax must hold {panels} axes, one for each exit that somebody leaves at; got {len(grid)}.")
        for spare in grid[panels:] if own else ():
            spare.remove()
        self.ax_, self.figure_ = grid[:panels], grid[0].figure
        self.count_ax_ = np.array([panel.twinx() for panel in self.ax_])
        self.points_: list[Any] = []
        self.bars_: list[Any] = []
        names = self.exit_names
        for i, k in enumerate(self.exits_):
            handles = self._panel(i, k, kwargs)
            self.ax_[i].set(xlabel="score", ylabel="accuracy" if i % columns == 0 else "")
            self.ax_[i].set_title(f"{names[k]}\nn = {self.n[k]:,}, ECE = {self.ece[k]:.3f}", fontsize=10)
        words = caption(self.chosen, self.chosen_by)
        if own:
            self.figure_.suptitle(words, fontsize=11)
            below = {"loc": "outside lower center", "ncols": min(2 * columns, 4)}
            self.legend_ = self.figure_.legend(handles=handles, frameon=False, fontsize="small", **below)
        else:
            beside = {"title": words.replace(": ", ":\n"), "loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
            self.legend_ = self.ax_[-1].legend(handles=handles, frameon=False, fontsize="small", **beside)
        return self

    def _panel(self, i: int, k: int, style: dict[str, Any]) -> list[Any]:
        """Draw exit k; what a legend shows of it."""
        ax, behind = self.ax_[i], self.count_ax_[i]
        some = self.count[k] > 0
        edges, score, accuracy = self.edges[k], self.confidence[k][some], self.accuracy[k][some]
        widths, counts = np.diff(edges)[some], self.count[k][some]
        light = {"color": "0.88", "edgecolor": "white", "linewidth": 0.6, "label": "samples in the bin"}
        bars = behind.bar(edges[:-1][some], counts, widths, align="edge", **light)
        behind.bar_label(bars, fmt="{:,.0f}", fontsize=6, color="0.45", padding=1)
        behind.set_ylim(0, 5.5 * self.count[k].max())
        behind.set_axis_off()
        # the twin is drawn over its panel unless the panel is raised, whose background would then hide the bars
        ax.set_zorder(behind.get_zorder() + 1)
        ax.patch.set_visible(False)
        diagonal = ax.axline(
            (1.0, 1.0), slope=1.0, color="grey", linewidth=0.8, linestyle="--", label="score = accuracy"
        )
        stems = ax.vlines(score, score, accuracy, color="C3", linewidth=1.2, alpha=0.7, label="difference")
        dots = {"marker": "o", "markersize": 5, "linestyle": "none", "label": "accuracy in the bin"} | style
        (points,) = ax.plot(score, accuracy, **dots)
        low = float(edges[0])
        margin = 0.03 * (1.0 - low) or 0.03
        ax.set(xlim=(low - margin, 1.0 + margin), ylim=(-0.04, 1.04))
        self.points_.append(points)
        self.bars_.append(bars)
        return [points, stems, diagonal, bars]
