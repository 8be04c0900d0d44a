"""Data that training reads again and again, in an order of its own: arrays, Datasets, and those behind loaders."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from adaptexit.data.batches import Batches, as_batches
from adaptexit.data.sources import ForeignDataset, is_foreign, is_stream
from adaptexit.staging.contexts import random_state_kept
from adaptexit.training.feature_store import Digest


class Samples:
    """N samples that can be read by number, as often as wanted.

    Parameters
    ----------
    X, y : as for :func:`adaptexit.data.batches.as_batches`
        Of a loader its Dataset, workers and collation are used; which samples make a batch is decided here, so that
        some can be held out and a run can be repeated.
    batch_size : int
        Where batches are read in order.
    augment : callable, optional
        From one sample (...) to another; for arrays only, as a Dataset has its own.
    in_batches : bool
        Whether ``augment`` takes batches (B, ...) instead.

    Raises
    ------
    TypeError
        For an IterableDataset, whose samples have no numbers.
    ValueError
        For a loader whose sampler draws by weight or leaves samples out; ``augment`` beside a Dataset or loader.
    """

    def __init__(
        self,
        X: Any,
        y: Any,
        batch_size: int,
        augment: Callable[[Tensor], Tensor] | None = None,
        in_batches: bool = False,
    ) -> None:
        self.y, self.batch_size, self.augment, self.in_batches = y, batch_size, augment, in_batches
        self.options: dict[str, Any] = {}
        if not is_stream(X):
            first = as_batches(X, y, batch_size=batch_size, labels=None)  # refuses what cannot be read
            self.source, self.from_dataset = first.source.array, False
            return
        if augment is not None:
            raise ValueError(
                f"augment must be left out where X is a {type(X).__name__}, which augments by itself; got {augment!r}. "
                "Put it into the Dataset's transform."
            )
        self.source, self.from_dataset = _dataset_of(X), True
        if isinstance(X, DataLoader):
            self.batch_size = X.batch_size or batch_size
            self.options = {
                "num_workers": X.num_workers, "collate_fn": X.collate_fn, "pin_memory": X.pin_memory,
                "timeout": X.timeout, "worker_init_fn": X.worker_init_fn,
                "multiprocessing_context": X.multiprocessing_context, "prefetch_factor": X.prefetch_factor,
            }  # fmt: skip

    def __len__(self) -> int:
        return len(self.source)

    def in_order(self, rows: NDArray[np.intp] | None = None, seed: int = 0) -> Batches:
        """Batches of all samples, or of some, one after the other, with their labels."""
        if self.from_dataset:
            chosen = self.source if rows is None else Subset(self.source, rows.tolist())
            loader = DataLoader(chosen, self.batch_size, generator=_generator(seed), **self.options)
            return as_batches(loader, batch_size=self.batch_size, labels=None)
        x, y = (
            (self.source, self.y) if rows is None else (self.source[rows], self.y if self.y is None else self.y[rows])
        )
        return as_batches(x, y, batch_size=self.batch_size, labels=None)

    def read(self, batches: Sequence[Tensor], seed: int) -> Iterator[Tensor]:
        """Inputs of every batch of row numbers, augmented."""
        if self.from_dataset:
            loader = DataLoader(
                self.source, batch_sampler=[rows.tolist() for rows in batches], generator=_generator(seed),
                **self.options,
            )  # fmt: skip
            yield from as_batches(loader, batch_size=self.batch_size, labels=False)
            return
        for rows in batches:
            x = torch.as_tensor(self.source[rows if isinstance(self.source, Tensor) else rows.numpy()])
            if self.augment is None:
                yield x
            elif self.in_batches:
                yield self._augmented(x)
            else:
                yield torch.stack([self.augment(sample) for sample in x])

    def _augmented(self, x: Tensor) -> Tensor:
        assert self.augment is not None
        augmented = self.augment(x)
        if not isinstance(augmented, Tensor) or len(augmented) != len(x):
            raise ValueError(
                f"augment must return a batch of as many samples, {len(x)}, with augment_batches=True; got "
                f"{tuple(augmented.shape) if isinstance(augmented, Tensor) else type(augmented).__name__}."
            )
        return augmented


class Hashed:
    """Batches as they are; what was read last is told by :attr:`result`.

    Every time they are read, transforms draw the same random numbers.
    """

    def __init__(self, batches: Batches, seed: int) -> None:
        self.batches, self.seed = batches, seed
        self.n_batches = batches.n_batches

    def __iter__(self) -> Iterator[Tensor]:
        self._digest = Digest()
        with seeded(self.seed):
            for x in self.batches:
                self._digest.tensor(x)
                yield x

    @property
    def result(self) -> str:
        """Of all inputs, in their order."""
        return self._digest.result()


@contextmanager
def seeded(*numbers: int) -> Iterator[int]:
    """Whatever draws from torch, NumPy or Python in the block draws the same for the same numbers.

    Their states are given back afterwards, so that transforms and dropout leave nobody else's numbers changed.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with random_state_kept(seed):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield seed
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


def _dataset_of(X: Any) -> Any:
    dataset = X.dataset if isinstance(X, DataLoader) else X
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"X must be read by number where a network learns with its exits; got a {type(dataset).__name__}, which "
            "only runs through. Give an array, or a Dataset with a length."
        )
    if isinstance(X, DataLoader):
        if X.batch_sampler is None:
            raise ValueError(
                "X must come with a loader that makes batches of samples; got one with batch_size=None, whose Dataset "
                "gives whole batches. Give a Dataset of single samples."
            )
        sampler: Any = getattr(X.batch_sampler, "sampler", X.batch_sampler)
        if not isinstance(sampler, (SequentialSampler, RandomSampler)) or len(sampler) != len(dataset):
            raise ValueError(
                "X must come with a loader that gives every sample once, as training puts together its own batches; "
                f"got one with a {type(sampler).__name__}. Give a Dataset of the samples wanted "
                "(torch.utils.data.Subset)."
            )
    return ForeignDataset(dataset, None) if is_foreign(dataset) else dataset


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
