"""The one training loop: minibatches of row numbers, AdamW on a cosine schedule, a loss that the caller defines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.utils import check_random_state
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from adaptexit.staging.contexts import random_state_kept

MINIBATCHES = 500
"""That "auto" epochs make at least."""


def minimise(
    loss: Callable[[Tensor], Tensor],
    modules: Sequence[nn.Module],
    n_samples: int,
    *,
    epochs: int,
    lr: float,
    weight_decay: float = 0.0,
    batch_size: int = 256,
    parameters: Sequence[nn.Parameter] | None = None,
    training: bool = True,
    sample_weight: ArrayLike | None = None,
    random_state: Any = 0,
    verbose: int = 0,
    description: str = "training",
) -> list[list[float]]:
    """Train ``parameters`` of ``modules`` in place by AdamW, its learning rate falling to 0 along a half cosine.

    Equal arguments give bit-equal weights on the CPU. Torch's global random state is left as it was, and so is whether
    a parameter requires gradients; every part of ``modules`` is in evaluation mode afterwards, also after an error.

    Parameters
    ----------
    loss : callable, from row numbers (B,) int64 in 0 ... n_samples - 1 to a scalar or to (T,)
        Mean losses of the batch: one, or T terms whose sum is minimised.
    modules : sequence of nn.Module
    n_samples : int
    epochs, batch_size : int
        An epoch visits ``n_samples`` rows. A last batch of one row joins the batch before it.
    lr, weight_decay : float
        Learning rate at the start, and AdamW's decoupled decay.
    parameters : sequence of nn.Parameter, optional
        All of ``modules`` unless given; nothing else gets a gradient.
    training : bool
        Whether ``modules`` train in training mode (dropout, batch statistics) or in evaluation mode.
    sample_weight : array (n_samples,), optional
        Rows are then drawn with replacement, with probabilities in proportion; otherwise each comes once an epoch.
    random_state : int, RandomState or None
    verbose : int
        From 1 on, a bar over epochs.
    description : str
        Of the bar, and of the error.

    Returns
    -------
    list of ``epochs`` lists of T floats
        Mean of each term over the rows of an epoch, as met while training.

    Raises
    ------
    FloatingPointError
        Once a loss is NaN or infinite: names the epoch and the term.
    """
    everything = (parameter for module in modules for parameter in module.parameters())
    learners = list(dict.fromkeys(everything if parameters is None else parameters))
    if not learners:
        raise ValueError(f"{description} needs parameters to train; got none. Give modules that have some.")
    seed = int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
    order = torch.Generator().manual_seed(seed)
    probabilities = None if sample_weight is None else _checked_weights(sample_weight, n_samples)
    optimizer = torch.optim.AdamW(learners, lr, weight_decay=weight_decay)
    schedule = CosineAnnealingLR(optimizer, epochs * len(row_batches(torch.arange(n_samples), batch_size)))
    history = []
    with (
        only_learning(learners, modules),
        _mode(modules, training),
        seeded_everywhere(seed, learners),
        torch.enable_grad(),
    ):
        for epoch in tqdm(range(epochs), desc=description, disable=verbose < 1):
            total = torch.zeros(())
            for rows in row_batches(row_order(n_samples, probabilities, order), batch_size):
                terms = loss(rows).reshape(-1)
                terms.sum().backward(inputs=learners)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                total = total + terms.detach() * len(rows)
            history.append((total / n_samples).tolist())
            if not np.isfinite(history[-1]).all():
                _raise_diverged(description, epoch, epochs, history[-1], lr)
    return history


def n_epochs(asked: int | str, n_samples: int, batch_size: int, usual: int, minibatches: int = MINIBATCHES) -> int:
    """The number asked for; for "auto" the usual one, or as many as make so many minibatches."""
    if not isinstance(asked, str):
        return int(asked)
    batches = -(-n_samples // batch_size)
    return max(usual, -(-minibatches // batches))


def row_order(n_samples: int, probabilities: Tensor | None, generator: torch.Generator) -> Tensor:
    if probabilities is None:
        return torch.randperm(n_samples, generator=generator)
    return torch.multinomial(probabilities, n_samples, replacement=True, generator=generator)


def row_batches(rows: Tensor, batch_size: int, least: int = 2) -> list[Tensor]:
    """Batches of ``batch_size``; fewer than ``least`` rows left over join the last of them.

    Batch norm cannot take a single row alone.
    """
    batches = list(rows.split(int(batch_size)))
    if len(batches) > 1 and len(batches[-1]) < least:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def _checked_weights(sample_weight: ArrayLike, n_samples: int) -> Tensor:
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (n_samples,):
        raise ValueError(f"sample_weight must have shape ({n_samples},), one a row; got shape {weights.shape}.")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError(
            "sample_weight must be finite and not negative, with one above 0; got values from "
            f"{weights.min()} to {weights.max()}."
        )
    return torch.from_numpy(weights / weights.sum())


def _raise_diverged(description: str, epoch: int, epochs: int, terms: list[float], lr: float) -> None:
    bad = int(np.argmin(np.isfinite(terms)))
    which = f"term {bad} of the loss" if len(terms) > 1 else "the loss"
    raise FloatingPointError(
        f"{description}: {which} became {terms[bad]} in epoch {epoch + 1} of {epochs} at lr={lr:g}. Lower lr, or look "
        "for features of very different sizes."
    )


@contextmanager
def only_learning(learners: Sequence[nn.Parameter], modules: Sequence[nn.Module]) -> Iterator[None]:
    """Gradients for ``learners`` and no other parameter; none is left behind."""
    identities = {id(parameter) for parameter in learners}
    before = {p: p.requires_grad for p in [*learners, *(p for module in modules for p in module.parameters())]}
    for parameter in before:
        parameter.requires_grad_(id(parameter) in identities)
    try:
        yield
    finally:
        for parameter, requires_grad in before.items():
            parameter.requires_grad_(requires_grad)
        for parameter in learners:
            parameter.grad = None


@contextmanager
def _mode(modules: Sequence[nn.Module], training: bool) -> Iterator[None]:
    for module in modules:
        module.train(training)
    try:
        yield
    finally:
        for module in modules:
            module.eval()


@contextmanager
def seeded_everywhere(seed: int, learners: Sequence[nn.Parameter]) -> Iterator[None]:
    """Dropout and the like from ``seed``; the random states of the CPU and of the GPUs in use are given back."""
    gpus = sorted({p.device.index for p in learners if p.device.type == "cuda"})
    states = [torch.cuda.get_rng_state(index) for index in gpus]
    # torch.manual_seed would seed every GPU, also those whose state is not given back.
    with random_state_kept(seed):
        for index in gpus:
            torch.cuda.default_generators[index].manual_seed(seed)
        try:
            yield
        finally:
            for index, state in zip(gpus, states, strict=True):
                torch.cuda.set_rng_state(state, index)
