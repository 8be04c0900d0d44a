"""What pictures share: axes, styles that differ without colour, names, and the operating point in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from adaptexit.displays.checks import check_estimator, check_kind, number, sequence
from adaptexit.displays.drawing import pyplot

Point = Any  # adaptexit.core.frontier.OperatingPoint, which this module does not import
Outputs = Any  # adaptexit.core.outputs.ExitOutputs

# As many dash patterns as markers would repeat together; 8 and 7 repeat after 56 lines.
_LINE_MARKERS = ("o", "v", "<", ">", "p", "+", "H", "|")
_DASHES = ("-", "--", "-.", ":", (0, (8, 2)), (0, (4, 1, 1, 1, 1, 1)), (0, (1, 3)))
_POINT_MARKERS = ("^", "X", "D", "*", "P", "h")

FULL_MODEL = {"marker": "s", "s": 50, "color": "black", "zorder": 3}
RING = {"marker": "o", "s": 130, "facecolors": "none", "edgecolors": "black", "zorder": 4}
"""Around the one point of a curve that matters."""

BAND = {"alpha": 0.15, "linewidth": 0}
"""Around a curve, in its colour; lighter than the curve where bands of several lie on each other."""

ONE_ERROR = "± 1 standard error"


# -- drawing ----------------------------------------------------------------------------------------------------------


def axes(ax: Any, **figure: Any) -> Any:
    """The axes given, or those of a new figure."""
    plt = pyplot()
    return plt.subplots(**figure)[1] if ax is None else ax


def line_style(i: int) -> dict[str, Any]:
    """Marker and dashes of the i-th line of a picture."""
    return {"marker": _LINE_MARKERS[i % len(_LINE_MARKERS)], "linestyle": _DASHES[i % len(_DASHES)], "markersize": 4}


def point_style(i: int) -> dict[str, Any]:
    """Marker of the i-th kind of single points; none is a line's, and past the last one it is the number itself."""
    marker = _POINT_MARKERS[i] if i < len(_POINT_MARKERS) else f"${i}$"
    return {"marker": marker, "s": 120 if marker == "*" else 60, "zorder": 3}


# -- naming -----------------------------------------------------------------------------------------------------------


def class_labels(class_names: Sequence[Any] | None, least: int) -> Sequence[Any]:
    """Names of at least so many classes, their indices unless given."""
    if class_names is None:
        return range(least)
    names = sequence("class_names", class_names, "one name a class")
    if len(names) < least:
        raise ValueError(f"class_names must be one a class, {least} at least; got {len(names)}.")
    return names


def exit_labels(exit_names: Sequence[str] | None, n_exits: int) -> list[str]:
    """Names of all exits, made up unless given."""
    if exit_names is None:
        return [*(f"exit {k}" for k in range(n_exits - 1)), "full model"]
    names = sequence("exit_names", exit_names, "one name an exit")
    if len(names) != n_exits:
        raise ValueError(f"exit_names must be one an exit, {n_exits} in all; got {len(names)}.")
    return [str(name) for name in names]


def choice(budget: float | None, max_drop: float | None) -> str | None:
    """What chose an operating point, as pictures say it: "budget 0.40"."""
    for name, value in (("budget", budget), ("max_drop", max_drop)):
        if value is not None:
            return f"{name} {np.format_float_positional(number(name, value), precision=4, min_digits=2)}"
    return None


def caption(chosen: tuple[float, float] | None, chosen_by: str | None, name: str | None = None) -> str:
    """The operating point (cost, accuracy) in words, below a name; empty where there is neither."""
    lines = [] if name is None else [name]
    if chosen is not None:
        cost, accuracy = chosen
        lines.append(f"{chosen_by or 'operating point'}: accuracy {accuracy:.3f} at cost {cost:.2f}")
    return "\n".join(lines)


# -- data -------------------------------------------------------------------------------------------------------------


def check_outputs(outputs: Outputs) -> None:
    """Refuse what are no recorded outputs."""
    from adaptexit.core.outputs import ExitOutputs

    if not isinstance(outputs, ExitOutputs):
        raise TypeError(f"outputs must be ExitOutputs, as record gives them; got {type(outputs).__name__}.")


def check_pair(outputs: Outputs, point: Point) -> None:
    """Refuse what are no outputs with one operating point."""
    from adaptexit.core.frontier import OperatingPoint

    check_outputs(outputs)
    check_kind("point", point, OperatingPoint, "calibrator_.frontier_.at(budget=0.4)")


def measured(outputs: Outputs, point: Point) -> tuple[float, float]:
    """Mean relative cost and accuracy of an operating point on these outputs."""
    from adaptexit.core.frontier import evaluate

    here = evaluate(outputs, point.thresholds, point.cutoffs)
    return here.cost, here.accuracy


def operating_point(estimator: Any, budget: float | None, max_drop: float | None) -> tuple[Point, str]:
    """The point that an estimator's ``predict`` would use, and what chose it."""
    check_estimator(estimator)
    point = estimator.operating_point(budget, max_drop)
    if budget is None and max_drop is None:
        budget = estimator.budget
    return point, choice(budget, max_drop) or "in use"


def thresholded(estimator: Any, X: Any, y: Any, ordered: bool = False) -> Outputs:
    """Outputs on (X, y) or the calibration data, under the score that an estimator thresholds."""
    check_estimator(estimator)
    return estimator._thresholded(X, y, ordered)
