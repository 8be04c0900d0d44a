"""Routers: a small perceptron an exit that says how likely a sample should leave there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from adaptexit.training.asking import rows_of
from adaptexit.training.loop import minimise

Floats = NDArray[np.float64]


class Router(nn.Module):
    """Standardised features (B, d) through one hidden layer to the log-odds of leaving, (B,)."""

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a sample."""
        return sum(layer.in_features * layer.out_features for layer in self.net if isinstance(layer, nn.Linear))

    def forward(self, features: Tensor) -> Tensor:
        return self.net((features - self.mean) * self.scale).squeeze(1)


def new_routers(features: Sequence[NDArray[Any]], hidden: int, seed: int) -> list[Router]:
    """A router for each array of features (N, d_k), standardised by them."""
    routers = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for array in features:
            router = Router(array.shape[1], hidden)
            mean, spread = array.mean(axis=0, dtype=np.float64), array.std(axis=0, dtype=np.float64)
            router.mean.copy_(torch.from_numpy(mean))
            router.scale.copy_(torch.from_numpy(1.0 / np.where(spread > 0, spread, 1.0)))
            routers.append(router.eval())
    return routers


def train_routers(
    routers: Sequence[Router],
    features: Sequence[NDArray[Any]],
    targets: Floats,
    weights: Floats | None = None,
    **settings: Any,
) -> list[list[float]]:
    """Binary cross-entropy against soft targets, in place; mean losses by epoch and exit.

    Parameters
    ----------
    routers : sequence of K - 1 Routers
    features : sequence of K - 1 arrays (N, d_k)
    targets : array (N, K - 1)
        Probability of leaving at each exit once there.
    weights : array (N, K - 1), optional
        What each sample counts at each exit.
    **settings
        Of :func:`adaptexit.training.minimise`: epochs, lr, weight_decay, batch_size, random_state, verbose.
    """
    inputs = [rows_of(array) for array in features]
    wanted = rows_of(targets)
    counted = None if weights is None else rows_of(weights)

    def losses(rows: Tensor) -> Tensor:
        terms = []
        for k, router in enumerate(routers):
            weight = None if counted is None else counted[rows, k]
            terms.append(F.binary_cross_entropy_with_logits(router(inputs[k][rows]), wanted[rows, k], weight))
        return torch.stack(terms)

    return minimise(losses, routers, len(wanted), description="training routers", **settings)
