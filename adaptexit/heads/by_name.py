"""The heads that have a name, and how a head is made from what the user gives."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Literal

from torch import nn

from adaptexit.heads.base import Head, WrappedHead
from adaptexit.heads.layout import FeatureSpec
from adaptexit.heads.prototype import PrototypeHead, RefinedPrototypeHead
from adaptexit.heads.residual import ResidualHead
from adaptexit.heads.simple import ConvHead, MLPHead

HeadName = Literal["auto", "mlp", "conv", "prototype", "refined_prototype", "residual"]

HEADS: dict[str, type[Head]] = {
    "mlp": MLPHead,
    "conv": ConvHead,
    "prototype": PrototypeHead,
    "refined_prototype": RefinedPrototypeHead,
    "residual": ResidualHead,
}
"""The heads that have a name."""


def make_head(head: str | Callable[[FeatureSpec, int], nn.Module], spec: FeatureSpec, n_classes: int) -> Head:
    """A new head for a feature.

    Parameters
    ----------
    head : {"mlp", "conv", "prototype", "refined_prototype", "residual"} or callable
        A callable gets ``spec`` and ``n_classes`` and returns a :class:`Head`, or any module that turns a feature
        (B, *spec.shape) into logits (B, n_classes).
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
        For a name that is not in ``HEADS``.
    TypeError
        When ``head`` is neither a name nor a factory, or a factory returns something else than a module.
    """
    if isinstance(head, str):
        if head not in HEADS:
            near = difflib.get_close_matches(head.lower(), HEADS, n=2, cutoff=0.4)
            raise ValueError(
                f"head must be one of {', '.join(HEADS)}, or a factory (spec, n_classes) -> module; got {head!r}."
                + (f" Near it: {', '.join(near)}." if near else "")
            )
        return HEADS[head](spec, n_classes)
    if isinstance(head, nn.Module) or not callable(head):
        raise TypeError(
            f"head must be one of {', '.join(HEADS)}, or a factory (spec, n_classes) -> module; got "
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
