"""Arguments that are numbers or switches: refused with their name, what is allowed and what came."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np


def checked_number(name: str, value: Any, meaning: str, least: float = -np.inf) -> float:
    """A finite number, not below ``least``, as a float; ``meaning`` says in the error what it has to be."""
    try:
        number = float("nan") if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number) or number < least:
        raise ValueError(f"{name} must be {meaning}; got {value!r}.")
    return number


def check_whole(name: str, value: Any, least: int = 1, other: str = "") -> None:
    """Refuse what is no whole number of at least ``least``; ``other`` says in the error what else may be."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number, at least {least}{other}; got {value!r}.")


def check_switch(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False; got {value!r}.")
