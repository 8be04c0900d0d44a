"""What every ``plot`` does before and after it draws."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

import numpy as np

from adaptexit.displays.checks import optional_text

Plot = TypeVar("Plot", bound=Callable[..., Any])


def pyplot() -> Any:
    """matplotlib.pyplot, or an error that says how to get it."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib (the extra 'plot' brings it).") from error
    return pyplot


def drawing(plot: Plot) -> Plot:
    """Let a ``plot`` check its axes and name, say which styles matplotlib refuses, and leave no figure if it fails."""

    own = {name for name, parameter in signature(plot).parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}

    @wraps(plot)
    def checked(self: Any, ax: Any = None, **kwargs: Any) -> Any:
        plt = pyplot()
        optional_text("name", kwargs.get("name"))
        for panel in _panels(ax, getattr(self, "_several_axes", False)):
            if not isinstance(panel, plt.Axes):
                raise TypeError(f"ax must be matplotlib Axes, or None for a new figure; got {type(panel).__name__}.")
        for style in set(kwargs) - own:
            # What can only be run through is no style, and looking into it may draw from a random state.
            if hasattr(kwargs[style], "__iter__") and not hasattr(kwargs[style], "__getitem__"):
                got = type(kwargs[style]).__name__
                raise TypeError(f"{style} must be a style that matplotlib takes, as a number or a name; got {got}.")
        before = set(plt.get_fignums())
        try:
            return plot(self, ax, **kwargs)
        except Exception as error:
            for figure in set(plt.get_fignums()) - before:
                plt.close(figure)
            styles = sorted(set(kwargs) - own)
            if not styles:
                raise
            kind = TypeError if isinstance(error, (TypeError, AttributeError)) else ValueError
            raise kind(f"{', '.join(styles)} must be styles that matplotlib takes: {error}") from error

    return checked  # type: ignore[return-value]


def _panels(ax: Any, several: bool) -> list[Any]:
    """The axes given one by one, where there may be several."""
    if several and isinstance(ax, np.ndarray) and ax.size:
        return list(ax.ravel())
    if several and isinstance(ax, (list, tuple)) and ax:
        return [panel for part in ax for panel in (part if isinstance(part, (list, tuple)) else [part])]
    return [] if ax is None else [ax]
