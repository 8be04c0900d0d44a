"""The heads that have a name, and how a head is made from what the user gives."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import nn

from adaptexit.heads.base import Head, WrappedHead
from adaptexit.heads.layout import FeatureSpec, map_size
from adaptexit.heads.pooled_map import GridHead
from adaptexit.heads.prototype import PrototypeHead, RefinedPrototypeHead
from adaptexit.heads.residual import ResidualHead, WideHead
from adaptexit.heads.simple import ConvHead, LinearHead, MLPHead

HeadFactory = Callable[[FeatureSpec, int], nn.Module]

HeadName = Literal[
    "auto", "linear", "mlp", "grid", "conv", "prototype", "refined_prototype", "residual", "wide",
    "mlp-64", "grid-64", "wide-32", "wide-64",
]  # fmt: skip

HEADS: dict[str, type[Head]] = {
    "linear": LinearHead,
    "mlp": MLPHead,
    "grid": GridHead,
    "conv": ConvHead,
    "prototype": PrototypeHead,
    "refined_prototype": RefinedPrototypeHead,
    "residual": ResidualHead,
    "wide": WideHead,
}
"""The kinds of heads by name, each with its usual size."""

NAMED: dict[str, Callable[[FeatureSpec, int], Head]] = HEADS | {
    "mlp-64": partial(MLPHead, hidden=64),
    "grid-64": partial(GridHead, hidden=64),
    "wide-32": partial(WideHead, width=32),
    "wide-64": partial(WideHead, width=64),
}
"""Every head that has a name, some with a width in it: a closed set, which saves keep to."""

FOR_MAPS = ("linear", "mlp", "grid", "grid-64", "wide-32", "wide-64")
"""Heads to be tried on features whose positions lie on a grid."""

FOR_VECTORS = ("linear", "mlp", "mlp-64")
"""Heads to be tried on vectors, and on positions in no order: those that read means alone."""


def heads_to_try(specs: Sequence[FeatureSpec]) -> tuple[str, ...]:
    """Names of the heads to choose from for features of these kinds: those for maps where all can be made one."""
    if all(spec.n_positions == 1 for spec in specs) or not all(map(_can_be_a_map, specs)):
        return FOR_VECTORS
    return FOR_MAPS


def _can_be_a_map(spec: FeatureSpec) -> bool:
    try:
        map_size(spec)
    except ValueError:
        return False
    return True


def make_head(head: str | HeadFactory, spec: FeatureSpec, n_classes: int) -> Head:
    """A new head for a feature.

    Parameters
    ----------
    head : str or callable
        A name in ``NAMED``, or a callable that gets ``spec`` and ``n_classes`` and returns a :class:`Head`, or any
        module that turns a feature (B, *spec.shape) into logits (B, n_classes).
    spec : FeatureSpec
        The feature it reads.
    n_classes : int

    Returns
    -------
    Head
        Freshly initialised from torch's random state: fork that to keep it as it is.

    Raises
    ------
    ValueError
        For a name that is not in ``NAMED``.
    TypeError
        When ``head`` is neither a name nor a factory, or a factory returns something else than a module.
    """
    if isinstance(head, str):
        if head not in NAMED:
            near = difflib.get_close_matches(head.lower(), NAMED, n=2, cutoff=0.4)
            raise ValueError(
                f"head must be one of {', '.join(NAMED)}, or a factory (spec, n_classes) -> module; got {head!r}."
                + (f" Near it: {', '.join(near)}." if near else "")
            )
        return NAMED[head](spec, n_classes)
    if isinstance(head, nn.Module) or not callable(head):
        raise TypeError(
            f"head must be one of {', '.join(NAMED)}, or a factory (spec, n_classes) -> module; got "
            f"{'the module ' if isinstance(head, nn.Module) else ''}{head!r}. Every exit needs a head of its own: pass "
            "a function that makes one."
        )
    module = head(spec, n_classes)
    if isinstance(module, Head):
        return module
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"head, called as a factory, must return an nn.Module; got {type(module).__name__}. Return a Head, or a "
            "module from a feature to logits."
        )
    return WrappedHead(spec, n_classes, module)
