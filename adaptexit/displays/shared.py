"""What every picture needs: axes to draw on, and names of exits."""

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


def class_labels(class_names: Sequence[Any] | None, least: int) -> Sequence[Any]:
    """Names of at least so many classes, their indices unless given."""
    if class_names is None:
        return range(least)
    if len(class_names) < least:
        raise ValueError(f"class_names must be one a class, {least} at least; got {len(class_names)}.")
    return class_names


def exit_labels(exit_names: Sequence[str] | None, n_exits: int) -> list[str]:
    """Names of all exits, made up unless given."""
    if exit_names is None:
        return [*(f"exit {k}" for k in range(n_exits - 1)), "full model"]
    if len(exit_names) != n_exits:
        raise ValueError(f"exit_names must be one an exit, {n_exits} in all; got {len(exit_names)}.")
    return [str(name) for name in exit_names]
