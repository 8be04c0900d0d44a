"""What every picture needs: axes to draw on, the data of a fitted estimator, and names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def pyplot() -> Any:
    """matplotlib.pyplot, or an error that says how to get it."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib (the extra 'plot' brings it).") from error
    return pyplot


def axes(ax: Any, **figure: Any) -> Any:
    """The axes given, or those of a new figure."""
    plt = pyplot()
    return plt.subplots(**figure)[1] if ax is None else ax


def calibrated(estimator: Any, X: Any, y: Any, budget: float | None) -> tuple[Any, Any]:
    """Outputs under the score that is thresholded, on (X, y) or the calibration data, and the operating point."""
    outputs = estimator.outputs_ if X is None else estimator.record(X, y)
    calibrator = estimator.calibrator_
    return calibrator.rescored(outputs), calibrator.operating_point(estimator.budget if budget is None else budget)


def exit_labels(exit_names: Sequence[str] | None, n_exits: int) -> list[str]:
    """Names of all exits, made up unless given."""
    if exit_names is None:
        return [*(f"exit {k}" for k in range(n_exits - 1)), "full model"]
    return [str(name) for name in exit_names]
