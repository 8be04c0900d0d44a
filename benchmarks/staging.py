"""What the benchmarks of staged execution share: models and their cuts, the least head, policies of a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adaptexit.backbones import resnet56_cifar
from adaptexit.core.answer import Answer
from adaptexit.core.policy import Decision
from adaptexit.heads import Head
from adaptexit.heads.layout import FeatureSpec, pooled

CUTS = {
    "resnet18": ("layer1", "layer2", "layer3"),
    "vit_tiny_patch16_224": ("blocks.2", "blocks.5", "blocks.8"),
    "mobilenetv3_large_100": ("blocks.1", "blocks.3", "blocks.4"),
    "resnet56_cifar": ("layer1", "layer2.3", "layer2"),
}
"""Models, and the cuts that ``exits="auto"`` takes."""


def new_model(name: str) -> nn.Module:
    """One of the models, with random weights, in evaluation mode."""
    torch.manual_seed(0)
    return (resnet56_cifar() if name == "resnet56_cifar" else timm.create_model(name)).eval()


def noise_images(name: str, n: int) -> Tensor:
    """(n, 3, H, W) at the size that a model takes."""
    side = 32 if name == "resnet56_cifar" else 224
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


class LinearHead(Head):
    """Mean over the positions and one linear layer: as little as a head can do."""

    def __init__(self, spec: FeatureSpec, n_classes: int) -> None:
        super().__init__(spec, n_classes)
        self.linear = nn.Linear(spec.channels, n_classes)

    def reduce(self, feature: Tensor) -> Tensor:
        """Means over the positions, (B, C)."""
        return pooled(feature, self.spec)

    def answer(self, reduced: Tensor, state: Any = None) -> Answer:
        """Logits from means (B, C)."""
        return Answer(self.linear(reduced))


class FunctionPolicy:
    """A policy whose rule is a function; what exits cost plays no part in it.

    Parameters
    ----------
    rule : callable (k, Answer) -> booleans (B,)
        Asked at every early exit that is run.
    runs : booleans (K,)
    """

    needs_logits = False
    needs_features = False
    full_cost = 1.0

    def __init__(self, rule: Callable[[int, Answer], NDArray[np.bool_]], runs: NDArray[np.bool_]) -> None:
        self.rule, self.runs = rule, runs
        self.path_costs = np.zeros(len(runs))

    def decide(self, k: int, batch: Answer, memory: NDArray[Any] | None = None) -> Decision:
        """As the rule says; at the last exit everybody leaves."""
        last = k == len(self.runs) - 1
        return Decision(np.ones(len(batch.scores), dtype=bool) if last else self.rule(k, batch), batch.scores)
