"""Heads around another head: they change what it says of a feature, and leave alone what it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from adaptexit.core.answer import Answer
from adaptexit.heads.base import Head
from adaptexit.heads.by_name import make_head
from adaptexit.heads.layout import FeatureSpec


class WrappingHead(Head):
    """Base of the heads around another one, which is made from a name or a factory; subclasses write ``revised``.

    Parameters
    ----------
    spec : FeatureSpec
    n_classes : int
    head : str or callable
        As for :func:`adaptexit.heads.make_head`; none that is chained itself.
    """

    purpose: str
    """What the inner head is made for, as an error says it."""

    def __init__(self, spec: FeatureSpec, n_classes: int, head: str | Callable[[FeatureSpec, int], nn.Module]) -> None:
        super().__init__(spec, n_classes)
        self.inner = make_head(head, spec, n_classes)
        if self.inner.chained:
            raise ValueError(
                f"head must answer by itself to be {self.purpose}; got {type(self.inner).__name__}, a chained one."
            )

    def place(self, k: int) -> None:
        self.inner.place(k)

    @property
    def reduction_key(self) -> str:
        return self.inner.reduction_key

    def reduce(self, feature: Tensor) -> Tensor:
        """What the inner head keeps of a feature."""
        return self.inner.reduce(feature)

    def answer(self, reduced: Tensor, state: Any = None) -> Answer:
        """The revised answer to what ``reduce`` returned."""
        return self.revised(self.inner.answer(reduced), state)

    def forward(self, feature: Tensor, state: Any = None) -> Answer:
        """The revised answer to a feature (B, *spec.shape)."""
        return self.revised(self.inner(feature), state)

    def confidence_parameters(self) -> list[nn.Parameter]:
        """The inner head's."""
        return self.inner.confidence_parameters()

    def revised(self, output: Answer, state: Any) -> Answer:
        """What is made of the inner head's answer."""
        raise NotImplementedError


class ScalarConfidenceHead(WrappingHead):
    """Any head with a confidence output, made to be as sure of one class as of another: one confidence a sample.

    Its confidence logit is the mean over the classes of those that the inner head gives, where that is linear again a
    linear output of what the head reads; a sample has it for every class, in the form that all heads give, (B, C).

    Parameters
    ----------
    spec : FeatureSpec
    n_classes : int
    head : str or callable, default="prototype"
        As for :func:`adaptexit.heads.make_head`: one with a confidence output, and none that is chained.
    """

    purpose = "given one confidence"

    def __init__(
        self, spec: FeatureSpec, n_classes: int, head: str | Callable[[FeatureSpec, int], nn.Module] = "prototype"
    ) -> None:
        super().__init__(spec, n_classes, head)
        if not self.inner.confidence_parameters():
            raise ValueError(
                "head must have a confidence output to be given one confidence; got "
                f"{type(self.inner).__name__}, which has none. Take 'prototype', 'refined_prototype' or 'residual'."
            )

    def revised(self, output: Answer, state: Any) -> Answer:
        """The inner head's answer with the mean of its confidence logits in place of each."""
        mean = output.confidence_logits.mean(dim=1, keepdim=True)
        return dataclasses.replace(output, confidence_logits=mean.expand_as(output.confidence_logits))
