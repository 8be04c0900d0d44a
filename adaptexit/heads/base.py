"""Heads: the small networks that answer at a cut.

A head answers in two steps, so that a frozen backbone's features can be stored once and the head trained on them for
many epochs: ``reduce`` has no parameters and keeps as little of the feature as the head needs, ``answer`` does the
rest.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from adaptexit.core.answer import Answer
from adaptexit.heads.layout import FeatureSpec


class Head(nn.Module):
    """Base of all heads; made from the spec of the feature it reads and the number of classes.

    ``forward(feature)`` equals ``answer(reduce(feature))`` up to rounding. Subclasses write ``answer``, and ``reduce``
    where less than the feature is enough.
    """

    chained: bool = False
    """Whether ``answer`` reads the state that the head before it returned."""

    def __init__(self, spec: FeatureSpec, n_classes: int) -> None:
        super().__init__()
        check_size("n_classes", n_classes)
        self.spec, self.n_classes = spec, n_classes

    def place(self, k: int) -> None:
        """Told, once all heads are made and before they are trained, that this one answers at exit k."""

    @property
    def reduction_key(self) -> str:
        """What ``reduce`` does, by the class that defines it and by all that the head was made with."""
        reduce = type(self).reduce
        made_with = {key: value for key, value in vars(self).items() if key[0] != "_" and key != "training"}
        return f"{reduce.__module__}.{reduce.__qualname__} {made_with}"

    def reduce(self, feature: Tensor) -> Tensor:
        """The smallest form of a feature (B, *spec.shape) that loses nothing for this head, samples first."""
        return feature

    def answer(self, reduced: Tensor, state: Any = None) -> Answer:
        """The answer to what ``reduce`` returned."""
        raise NotImplementedError

    def forward(self, feature: Tensor, state: Any = None) -> Answer:
        """The answer to a feature (B, *spec.shape)."""
        return self.answer(self.reduce(feature), state)

    def confidence_parameters(self) -> list[nn.Parameter]:
        """The parameters that only the confidence output has."""
        return []


class WrappedHead(Head):
    """Any module that returns logits (B, n_classes) for a feature, as a head; it reads the feature as it is."""

    def __init__(self, spec: FeatureSpec, n_classes: int, net: nn.Module) -> None:
        super().__init__(spec, n_classes)
        self.net = net

    def answer(self, reduced: Tensor, state: Any = None) -> Answer:
        """The module's logits for a feature (B, *spec.shape)."""
        logits = self.net(reduced)
        shape = (len(reduced), self.n_classes)
        if not isinstance(logits, Tensor) or logits.shape != shape:
            kind = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ValueError(
                f"the head {type(self.net).__name__} must return logits of shape {shape} for a feature of shape "
                f"{tuple(reduced.shape)}; got {kind}. Return those, or make it a subclass of adaptexit.heads.base.Head."
            )
        return Answer(logits)


def check_size(name: str, value: int) -> None:
    """Refuse what is no whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1; got {value!r}. Give the number of them.")
