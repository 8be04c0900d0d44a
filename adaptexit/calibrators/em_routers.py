"""Routers: a small perceptron an exit that says how likely a sample should leave there, learned by EM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from adaptexit.calibrators.small_modules import probabilities, rows_at, rows_of
from adaptexit.core.em import (
    Posterior,
    exit_probabilities,
    expectation,
    fit_global,
    fit_per_sample,
    halting_targets,
    reach,
)
from adaptexit.core.scores import row_blocks
from adaptexit.staging.contexts import random_state_kept
from adaptexit.training.loop import minimise, n_epochs

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

    @staticmethod
    def macs_of(width: int, hidden: int) -> int:
        """Multiply-accumulates of a sample in a router of that size."""
        return (width + 1) * hidden

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a sample."""
        return self.macs_of(len(self.mean), self.net[0].out_features)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        return self.net((features - self.mean) * self.scale).squeeze(1)


def new_routers(features: Sequence[NDArray[Any]], hidden: int, seed: int) -> list[Router]:
    """A router for each array of features (N, d_k), standardised by them."""
    routers = []
    with random_state_kept(seed):
        for array in features:
            router = Router(array.shape[1], hidden)
            mean = array.mean(axis=0, dtype=np.float64)
            spread = np.sqrt(_summed_squares(array, mean) / len(array))
            router.mean.copy_(torch.from_numpy(mean))
            router.scale.copy_(torch.from_numpy(1.0 / np.where(spread > 0, spread, 1.0)))
            routers.append(router.eval())
    return routers


def _summed_squares(array: NDArray[Any], mean: Floats) -> Floats:
    """Of the distances from the mean, (d,), added up row by row."""
    total = np.zeros(len(mean))
    for rows in row_blocks(array):
        distances = np.subtract(array[rows], mean, dtype=np.float64)
        total = np.concatenate([total[None], distances * distances]).sum(axis=0)
    return total


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
    halts = rows_of(targets)
    counts = None if weights is None else rows_of(weights)

    def losses(rows: Tensor) -> Tensor:
        terms = []
        for k, router in enumerate(routers):
            weight = None if counts is None else counts[rows, k]
            terms.append(F.binary_cross_entropy_with_logits(router(rows_at(features[k], rows)), halts[rows, k], weight))
        return torch.stack(terms)

    return minimise(losses, routers, len(halts), description="training routers", **settings)


def halting(routers: Sequence[Router], features: Sequence[NDArray[Any]], n_samples: int) -> Floats:
    """Probability of leaving at each exit once there, (N, K); 1 at the last."""
    columns = [probabilities(router, array) for router, array in zip(routers, features, strict=True)]
    return np.stack([*columns, np.ones(n_samples)], axis=1)


def fit_routers(
    log_p: Floats,
    penalty: Floats,
    features: Sequence[NDArray[Any]],
    *,
    prior: str,
    n_iter: int,
    tol: float,
    hidden: int,
    weighted: bool,
    epochs: int | str,
    usual_epochs: int,
    usual_minibatches: int,
    random_state: int,
    **settings: Any,
) -> tuple[list[Router], Posterior]:
    """Responsibilities of the exits, and routers that learned to leave by them.

    Kyauk, "Adaptive Multi-Exit Neural Networks using EM-Based Routing", section 4.3; for the amortized prior, which is
    what the routers say, the E-step and the routers' training come in turns.

    Parameters
    ----------
    log_p : array (N, K)
        Log-likelihoods of the labels.
    penalty : array (K,)
        Cost weight times cost.
    features : sequence of K - 1 arrays (N, d_k)
    prior : {"amortized", "global", "per_sample"}
    n_iter, tol : int and float
        Of EM.
    hidden : int
    weighted : bool
        Whether a router's loss is weighted by the probability of reaching it.
    epochs : int or "auto"
        Of each training of the routers; "auto" is ``usual_epochs``, or as many as make ``usual_minibatches``.
    random_state : int
    **settings
        Of :func:`adaptexit.training.minimise`.
    """
    routers = new_routers(features, hidden, random_state)
    n_times = n_epochs(epochs, len(log_p), settings["batch_size"], usual_epochs, usual_minibatches)

    def learn(log_r: Floats, step: int = 0) -> None:
        """M-step: the probability of leaving once there."""
        if routers:
            weights = reach(log_r)[:, :-1] if weighted else None
            seed = random_state + step
            train_routers(
                routers,
                features,
                halting_targets(log_r)[:, :-1],
                weights,
                epochs=n_times,
                random_state=seed,
                **settings,
            )

    if prior != "amortized":
        if prior == "global":
            posterior = fit_global(log_p, penalty, n_iter=n_iter, tol=tol)
        else:
            posterior = fit_per_sample(log_p, penalty, n_iter=n_iter)
        learn(posterior.log_responsibilities)
        return routers, posterior
    exits = np.full(log_p.shape, 1.0 / log_p.shape[1])
    log_r, likelihood = expectation(log_p, exits, penalty)
    history = [likelihood]
    for step in range(n_iter):
        learn(log_r, step)
        exits = exit_probabilities(halting(routers, features, len(log_p)))
        log_r, likelihood = expectation(log_p, exits, penalty)
        history.append(likelihood)
        if step and history[-1] - history[-2] < tol:  # the first step leaves the even prior, and may lose
            return routers, Posterior(log_r, exits, history, True)
    return routers, Posterior(log_r, exits, history, False)
