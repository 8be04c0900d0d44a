"""Scores against accuracy, exit by exit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from adaptexit.displays.shared import exit_labels, pyplot

Calibration = Any  # adaptexit.core.metrics.ExitCalibration


class ReliabilityDisplay:
    """Accuracy against score among the samples that leave at each exit (CalexNet, appendix A.1).

    One panel for each exit that somebody leaves at: a point for each bin, joined to the diagonal on which scores and
    accuracy agree, and behind it how many samples the bin holds. Make one with :meth:`from_estimator` or
    :meth:`from_calibration`.

    Parameters
    ----------
    ece : array (K,)
    n : int array (K,)
        Samples that leave at each exit.
    edges : array (K, n_bins + 1)
    accuracy, confidence, count : arrays (K, n_bins)
    exit_names : sequence of K str, optional

    Attributes
    ----------
    exits_ : list of int
        The exits drawn.
    ax_ : array of Axes, one a panel
    count_ax_ : array of Axes
        Of the numbers of samples, behind them.
    points_, bars_ : lists of Line2D and of BarContainer
        Accuracy and numbers of samples of the bins that are not empty.
    figure_ : matplotlib Figure
        All after :meth:`plot`.
    """

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
    ) -> None:
        self.ece = np.asarray(ece)
        self.n = np.asarray(n)
        self.edges = np.asarray(edges)
        self.accuracy = np.asarray(accuracy)
        self.confidence = np.asarray(confidence)
        self.count = np.asarray(count)
        self.exit_names = exit_names

    @classmethod
    def from_calibration(
        cls, calibration: Calibration, *, exit_names: Sequence[str] | None = None
    ) -> ReliabilityDisplay:
        """From :func:`adaptexit.core.metrics.exit_calibration`."""
        return cls(
            ece=calibration.ece,
            n=calibration.n,
            edges=calibration.edges,
            accuracy=calibration.accuracy,
            confidence=calibration.confidence,
            count=calibration.count,
            exit_names=exit_names,
        )

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any = None, y: Any = None, *, budget: float | None = None, n_bins: int = 10
    ) -> ReliabilityDisplay:
        """From a fitted estimator at a budget, on its calibration data or on (X, y)."""
        calibration = estimator.exit_calibration(X, y, budget=budget, n_bins=n_bins)
        return cls.from_calibration(calibration, exit_names=estimator.exit_names)

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
        panels = len(self.exits_)
        if ax is None:
            size = {"figsize": (0.6 + 3.0 * panels, 3.2), "layout": "constrained"}
            ax = plt.subplots(1, panels, squeeze=False, sharey=True, **size)[1]
        found = np.ravel(np.asarray(ax, dtype=object))
        if len(found) < panels:
            raise ValueError(
                f"ax must hold {panels} axes, one for each exit that somebody leaves at; got {len(found)}."
            )
        self.ax_, self.figure_ = found[:panels], found[0].figure
        self.count_ax_ = np.array([panel.twinx() for panel in self.ax_])
        self.points_: list[Any] = []
        self.bars_: list[Any] = []
        names = exit_labels(self.exit_names, len(self.n))
        for i, k in enumerate(self.exits_):
            self._panel(i, k, kwargs)
            self.ax_[i].set(xlabel="score", title=f"{names[k]}\nn = {self.n[k]:,}, ECE = {self.ece[k]:.3f}")
        self.ax_[0].set_ylabel("accuracy")
        return self

    def _panel(self, i: int, k: int, style: dict[str, Any]) -> None:
        ax, behind = self.ax_[i], self.count_ax_[i]
        some = self.count[k] > 0
        edges, score, accuracy = self.edges[k], self.confidence[k][some], self.accuracy[k][some]
        widths, counts = np.diff(edges)[some], self.count[k][some]
        bars = behind.bar(
            edges[:-1][some], counts, widths, align="edge", color="0.88", edgecolor="white", linewidth=0.6
        )
        self.bars_.append(bars)
        behind.bar_label(bars, fmt="{:,.0f}", fontsize=6, color="0.45", padding=1)
        behind.set_ylim(0, 4.0 * self.count[k].max())
        behind.set_axis_off()
        ax.set_zorder(behind.get_zorder() + 1)
        ax.patch.set_visible(False)
        ax.axline((1.0, 1.0), slope=1.0, color="grey", linewidth=0.8, linestyle="--")
        ax.vlines(score, score, accuracy, color="C3", linewidth=1.2, alpha=0.7)
        (points,) = ax.plot(score, accuracy, **({"marker": "o", "markersize": 5, "linestyle": "none"} | style))
        self.points_.append(points)
        low = float(edges[0])
        margin = 0.03 * (1.0 - low) or 0.03
        ax.set(xlim=(low - margin, 1.0 + margin), ylim=(-0.04, 1.04))
