"""What an estimator has learned changes all at once: for whoever asks it meanwhile, and where a fit fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

Estimator = TypeVar("Estimator")
Arguments = ParamSpec("Arguments")


def learned_at_once(
    method: Callable[Concatenate[Estimator, Arguments], Any],
) -> Callable[Concatenate[Estimator, Arguments], Estimator]:
    """Let a method that learns work on a twin, whose state is taken over in one assignment once it has succeeded.

    Threads that ask the estimator meanwhile see what it was before or after, and a failure leaves it as it was. The
    estimator is returned, whatever the method returns.
    """

    @wraps(method)
    def learn(self: Estimator, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Estimator:
        twin = twin_of(self)
        method(twin, *args, **kwargs)
        self.__dict__ = twin.__dict__
        return self

    return learn


def twin_of(estimator: Estimator) -> Estimator:
    """Another one with the same state at this moment, which stays when the first learns anew."""
    twin = object.__new__(type(estimator))
    twin.__dict__.update(estimator.__dict__)
    return twin
