"""EENet's scheduler: how sure each exit should be taken to be, and what share of the samples it should answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from adaptexit.calibrators.small_modules import rows_at, rows_of
from adaptexit.core.scores import CELLS
from adaptexit.staging.contexts import random_state_kept
from adaptexit.training.loop import minimise

Floats = NDArray[np.float64]


def evidence(logits: Tensor) -> Tensor:
    """What an exit says, (B, C + 2): probabilities, the largest of them, and 1 less the entropy's share of log C."""
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    most = max(float(np.log(logits.shape[1])), 1e-12)
    return torch.cat([p, p.amax(dim=1, keepdim=True), 1 + (p * log_p).sum(dim=1, keepdim=True) / most], dim=1)


class Scorer(nn.Module):
    """The log-odds (B,) that one exit is right, from its logits (B, C) and earlier exits' scores (B, k)."""

    def __init__(self, n_classes: int, k: int) -> None:
        super().__init__()
        self.n_classes = n_classes
        self.net = nn.Linear(self.macs_of(n_classes, k), 1)

    @staticmethod
    def macs_of(n_classes: int, k: int) -> int:
        """Multiply-accumulates of a sample at exit k: one for each number that is read."""
        return n_classes + 2 + k

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a sample."""
        return self.net.in_features

    def forward(self, logits: Tensor, earlier: Tensor) -> Tensor:
        return self.read(torch.cat([evidence(logits), earlier], dim=1))

    def read(self, evidence_and_earlier: Tensor) -> Tensor:
        """The same from what is read, (B, C + 2 + k)."""
        return self.net(evidence_and_earlier).squeeze(1)


class Assigner(nn.Module):
    """Log-probabilities of the exits to answer a sample, not normalised, (B, K); used in training alone."""

    def __init__(self, n_classes: int, n_exits: int, hidden: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(Scorer.macs_of(n_classes, k), hidden), nn.Sigmoid(), nn.Linear(hidden, 1))
            for k in range(n_exits)
        )

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        return torch.cat([net(tensor) for net, tensor in zip(self.nets, inputs, strict=True)], dim=1)


def train_schedule(
    logits: NDArray[Any],
    correct: NDArray[np.bool_],
    costs: ArrayLike,
    budget: float,
    *,
    hidden: int,
    kl_weight: float,
    budget_weight: float,
    random_state: int,
    **settings: Any,
) -> tuple[list[Scorer], Floats, list[list[float]]]:
    """Learn scores and shares together.

    Ilhan et al., "Adaptive Deep Neural Network Inference Optimization with EENet": binary cross-entropy of the scores
    against correctness, every exit's samples weighted by how far they are assigned to it; ``kl_weight`` times the
    divergence of the assignment from the scores' own proportions; ``budget_weight`` times the relative distance of
    the assignment's mean cost from the budget.

    Parameters
    ----------
    logits : array (K, N, C)
    correct : boolean array (K, N)
    costs : array (K,)
        Of a sample that each exit answers.
    budget : float
        Mean cost, above 0.
    hidden : int
        Width of the assigner's hidden layers.
    kl_weight, budget_weight : float
    random_state : int
    **settings
        Of :func:`adaptexit.training.minimise`: epochs, lr, weight_decay, batch_size, verbose.

    Returns
    -------
    scorers : list of K Scorers
    shares : array (K,)
        Mean assignment.
    history : list of lists of 3 floats
        The three terms by epoch, weights included.
    """
    n_exits, n_samples, n_classes = logits.shape
    with random_state_kept(random_state):
        scorers = [Scorer(n_classes, k) for k in range(n_exits)]
        assigner = Assigner(n_classes, n_exits, hidden)
    right, price = rows_of(np.asarray(correct).T), rows_of(np.asarray(costs))

    def assignment(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds of being right, (B, K), and log-probabilities of the exits, (B, K)."""
        odds: list[Tensor] = []
        inputs = []
        for k, scorer in enumerate(scorers):
            # Earlier scores are read as they are: no exit's score learns to serve a later one.
            own = evidence(rows_at(logits[k], rows))
            inputs.append(torch.column_stack([own, *(logit.detach().sigmoid() for logit in odds)]))
            odds.append(scorer.read(inputs[k]))
        return torch.stack(odds, dim=1), assigner(inputs).log_softmax(dim=1)

    def terms(rows: Tensor) -> Tensor:
        odds, log_r = assignment(rows)
        weights = log_r.detach().exp()
        weights = weights / weights.sum(dim=0).clamp_min(1e-12)
        wrong = F.binary_cross_entropy_with_logits(odds, right[rows], weights, reduction="sum") / n_exits
        proportions = F.normalize(odds.detach().sigmoid().clamp_min(1e-12), p=1, dim=1)
        divergence = F.kl_div(log_r, proportions, reduction="batchmean")
        mean_cost = (log_r.exp() @ price).mean()
        return torch.stack([wrong, kl_weight * divergence, budget_weight * (mean_cost - budget).abs() / budget])

    history = minimise(
        terms, [*scorers, assigner], n_samples, random_state=random_state, description="training a schedule", **settings
    )
    with torch.inference_mode():
        parts = [assignment(rows)[1] for rows in torch.arange(n_samples).split(max(1, CELLS // n_classes))]
        shares = torch.cat(parts).double().exp().mean(dim=0).numpy()
    return [scorer.double() for scorer in scorers], shares, history
