"""Who is left after each exit, class by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptexit.displays.checks import chosen_point, numbers, optional_text
from adaptexit.displays.drawing import drawing
from adaptexit.displays.shared import (
    Outputs,
    Point,
    axes,
    caption,
    check_pair,
    class_labels,
    exit_labels,
    measured,
    operating_point,
    thresholded,
)

LISTED = 10
"""Classes that the legend lists at most: the first and the last half of that many."""

_WIDTH = 0.26
_LETTERS_AN_INCH = 12


class ExitFlowDisplay:
    """The population as it passes the exits, one ribbon a class (CalexNet's Fig. 4).

    Make one with :meth:`from_estimator`, :meth:`from_outputs`, or from :func:`adaptexit.core.metrics.flow`.

    Parameters
    ----------
    counts : int array (K, C)
        Samples of each true class that reach each exit; the first row is everybody.
    exit_names : sequence of K str, optional
    class_names : sequence of C str, optional
        The class indices unless given.
    chosen : (cost, accuracy), optional
        Of the operating point on these samples.
    chosen_by : str, optional
        What chose it, such as "budget 0.40".

    Attributes
    ----------
    order_ : int array
        The classes that occur, as they are stacked from top to bottom: those that lose the largest share at the
        first exit first; where equal, at the next.
    columns_ : list of BarContainer
        Of each class in that order: its part of every column.
    bands_ : list of lists of PolyCollection
        Of each class in that order: what joins its parts, K - 1.
    ax_, figure_ : matplotlib Axes and Figure
        All after :meth:`plot`.
    """

    def __init__(
        self,
        *,
        counts: ArrayLike,
        exit_names: Sequence[str] | None = None,
        class_names: Sequence[Any] | None = None,
        chosen: tuple[float, float] | None = None,
        chosen_by: str | None = None,
    ) -> None:
        self.counts = numbers("counts", counts, "K", "C", whole=True)
        if not self.counts[0].any():
            raise ValueError("counts must begin with everybody; its first row says that there is nobody.")
        if (np.diff(self.counts, axis=0) > 0).any():
            raise ValueError(f"counts must not rise from exit to exit; got {self.counts.tolist()}.")
        self.exit_names = exit_labels(exit_names, len(self.counts))
        self.class_names = class_labels(class_names, self.counts.shape[1])
        self.chosen = chosen_point(chosen)
        self.chosen_by = optional_text("chosen_by", chosen_by)

    @classmethod
    def from_outputs(
        cls,
        outputs: Outputs,
        point: Point,
        *,
        chosen_by: str | None = None,
        exit_names: Sequence[str] | None = None,
        class_names: Sequence[Any] | None = None,
    ) -> ExitFlowDisplay:
        """From recorded outputs at an operating point.

        Parameters
        ----------
        outputs : ExitOutputs
            Of K exits and C classes, with labels and the scores that the point thresholds:
            ``calibrator.rescored(outputs)``.
        point : OperatingPoint
        chosen_by : str, optional
            What chose the point, such as "budget 0.40".
        exit_names : sequence of K str, optional
        class_names : sequence of C str, optional
            The class indices unless given.

        Raises
        ------
        ValueError
            For outputs without labels, or a point of other exits or classes.
        """
        from adaptexit.core.metrics import flow

        check_pair(outputs, point)
        return cls(
            counts=flow(outputs, point),
            exit_names=exit_names,
            class_names=class_names,
            chosen=measured(outputs, point),
            chosen_by=chosen_by,
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
        class_names: Sequence[Any] | None = None,
    ) -> ExitFlowDisplay:
        """From a fitted estimator at the point that ``predict`` would use, on its calibration data or on (X, y).

        Parameters
        ----------
        estimator : fitted estimator
        X, y : as for its ``record``
        budget, max_drop : float, optional
            As for its ``predict``.
        class_names : sequence of C str, optional
            The estimator's classes unless given.
        """
        point, chosen_by = operating_point(estimator, budget, max_drop)
        return cls.from_outputs(
            thresholded(estimator, X, y),
            point,
            chosen_by=chosen_by,
            exit_names=estimator.exit_names,
            class_names=estimator.classes_ if class_names is None else class_names,
        )

    @drawing
    def plot(self, ax: Any = None, *, name: str | None = None, **kwargs: Any) -> ExitFlowDisplay:
        """Draw on ``ax`` (a new figure unless given).

        Parameters
        ----------
        ax : matplotlib Axes, optional
        name : str, optional
            First line of the title, which says the operating point.
        **kwargs
            Of the ribbons, for ``Axes.fill_between``.

        Returns
        -------
        self
        """
        ax = axes(ax, figsize=(8.0, 4.8), layout="constrained")
        n_exits = len(self.counts)
        self.order_ = self._order()
        heights = self.counts[:, self.order_]
        floors = np.cumsum(heights[:, ::-1], axis=1)[:, ::-1] - heights
        colors = _colors(len(self.order_))
        self.columns_: list[Any] = []
        self.bands_: list[list[Any]] = []
        for i, color in enumerate(colors):
            gaps = np.where(heights[:, i] > 0.01 * heights[0].sum(), 0.4, 0.0)
            parts = {"color": color, "edgecolor": "white", "linewidth": gaps, "zorder": 2}
            self.columns_.append(ax.bar(range(n_exits), heights[:, i], _WIDTH, floors[:, i], **parts))
            style = {"color": color, "alpha": 0.5, "linewidth": 0} | kwargs
            self.bands_.append(
                [_band(ax, k, floors[k : k + 2, i], heights[k : k + 2, i], style) for k in range(n_exits - 1)]
            )
        self._describe(ax, name)
        self.ax_, self.figure_ = ax, ax.figure
        return self

    def _order(self) -> NDArray[np.intp]:
        present = np.flatnonzero(self.counts[0])
        surviving = self.counts[:, present] / self.counts[0, present]
        # lexsort reads its last key first: the share behind the first exit decides, the class index settles ties
        return np.asarray(present[np.lexsort((present, *surviving[:0:-1]))])

    def _describe(self, ax: Any, name: str | None) -> None:
        names = self.exit_names
        totals = self.counts.sum(axis=1)
        for k, total in enumerate(totals):
            share = f"{total:,}" if k == 0 else f"{total:,}\n{total / totals[0]:.0%}"
            ax.annotate(share, (k, total), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=9)
        ticks = ["everybody", *(f"after {exit_name}" for exit_name in names[:-1])]
        inches = ax.get_window_extent().width / ax.figure.dpi
        overlapping = len(ticks) * max(map(len, ticks)) > _LETTERS_AN_INCH * inches
        ax.set_xticks(range(len(ticks)), ticks, **({"rotation": 30, "ha": "right"} if overlapping else {}))
        ax.tick_params(axis="x", length=0)
        ax.yaxis.set_major_formatter("{x:,.0f}")
        ax.set(ylabel="samples left", ylim=(0, totals[0] * 1.12))
        ax.set_title(caption(self.chosen, self.chosen_by, name), fontsize=11)
        ax.spines[["top", "right", "bottom"]].set_visible(False)
        handles: list[Any] = list(self.columns_)
        labels = [str(self.class_names[c]) for c in self.order_]
        if len(handles) > LISTED:
            half = LISTED // 2
            gap = _nothing()
            handles, labels = [*handles[:half], gap, *handles[-half:]], [*labels[:half], "…", *labels[-half:]]
        ax.legend(
            handles, labels, title="classes,\nas stacked", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False,
            fontsize="small",
        )  # fmt: skip


def _colors(n: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0.0, 0.95, n))


def _nothing() -> Any:
    """What the legend shows beside the classes it leaves out."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none")


def _band(ax: Any, k: int, floors: NDArray[Any], heights: NDArray[Any], style: dict[str, Any]) -> Any:
    """A ribbon from column k to the next, level where it touches them."""
    t = np.linspace(0.0, 1.0, 60)
    smooth = t * t * (3.0 - 2.0 * t)
    low, high = (ends[0] + (ends[1] - ends[0]) * smooth for ends in (floors, floors + heights))
    return ax.fill_between(k + _WIDTH / 2 + (1.0 - _WIDTH) * t, low, high, **style)
