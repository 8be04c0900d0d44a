"""One way from arrays, tensors, datasets and loaders to batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from adaptexit.data.classes import as_labels, class_indices
from adaptexit.data.inputs import InputSpec
from adaptexit.data.sources import (
    TO_TENSORS,
    ForeignDataset,
    are_images,
    check_order,
    check_source,
    from_columns,
    is_foreign,
    is_stream,
)
from adaptexit.utils.validation import check_plain, check_whole


@dataclass
class Batches:
    """Batches of inputs, checked for NaN and inf; labels met on the way are collected in :attr:`labels`.

    Labels are needed (True), not looked at (False), or collected where there are any (None).

    Attributes
    ----------
    batch_size : int
        Of the source where it has one.
    n_batches : int or None
        None where the source does not know.
    """

    source: Any
    batch_size: int
    n_batches: int | None
    needs_labels: bool | None = False
    like: InputSpec | None = None
    _labels: list[NDArray[Any]] = field(default_factory=list)
    # The batch that was looked at, and the run that it began: the next iteration goes on with it.
    _begun: tuple[Any, Iterator[Any]] | None = None
    _example: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        self._labels = []
        if self._begun is not None:
            batches: Iterator[Any] = chain(self._begun[:1], self._begun[1])
        else:
            batches = iter(self.source) if isinstance(self.source, _Slices) else self._opened()
        self._begun = None
        for batch in batches:
            x, y = _unpack(batch, self.needs_labels)
            if self.needs_labels or (self.needs_labels is None and y is not None):
                if y is None:
                    raise ValueError(
                        "the data loader or dataset must give (x, y) pairs here; it gave x alone. Give y as an "
                        "array beside it, or a dataset with labels."
                    )
                self._labels.append(np.atleast_1d(as_labels(y)))
            x = _checked(x)
            if self.like is not None:
                self.like.check(x.shape)
            yield x

    def _opened(self) -> Iterator[Any]:
        try:
            yield from self.source
        except TypeError as error:
            # The default collation's own words; a worker's error has its traceback, which may pass through PIL's files.
            if "found <class 'PIL." in str(error):
                raise TypeError(f"X gives PIL images, which cannot be batched. {TO_TENSORS}") from error
            raise

    def first(self) -> Tensor:
        """The inputs of the first batch, for looking at; nothing is read twice, as some sources are read only once."""
        if self._begun is None:
            batches = self._opened()
            for batch in batches:
                self._begun = batch, batches
                break
            else:
                raise ValueError("X holds no samples; give at least one.")
        x = _checked(_unpack(self._begun[0], False)[0])
        if self.like is not None:
            self.like.check(x.shape)
        self._example = x
        return self._example

    @property
    def from_loader(self) -> bool:
        """Whether a loader gives them, which draws from torch's random state even where it does not shuffle."""
        return not isinstance(self.source, _Slices)

    @property
    def example(self) -> Tensor:
        """The inputs of the first batch, as they were shown by :meth:`first`."""
        assert self._example is not None
        return self._example

    @property
    def labels(self) -> NDArray[Any]:
        """Labels of all samples, after the batches were run through, shape (N,)."""
        return np.concatenate(self._labels)

    def indices(self, classes: NDArray[Any], n_samples: int) -> NDArray[np.intp]:
        """Labels of all samples as positions in ``classes``."""
        labels = class_indices(self.labels, classes)
        if len(labels) != n_samples:
            raise ValueError(f"X must give a label for every sample or for none; got {len(labels)} of {n_samples}.")
        return labels

    @property
    def labelled(self) -> bool:
        """Whether the batches that were run through had labels."""
        return bool(self._labels)


def as_batches(
    X: Any,
    y: Any = None,
    *,
    batch_size: int,
    labels: bool | None = False,
    ordered: bool = True,
    like: InputSpec | None = None,
) -> Batches:
    """Batches of X, and of y with it where ``labels`` are wanted.

    Parameters
    ----------
    X : array or tensor (N, ...), Dataset or DataLoader
        Datasets and loaders give (x, y), (x,), x, or rows with an image's and a label's column. A list of (x, y), or
        anything that has a length and gives such rows by number, is a Dataset too.
    y : array (N,), optional
        Labels, for arrays and tensors only.
    batch_size : int
        For sources without one of their own.
    labels : bool or None
        Whether labels are needed; None takes them where there are any.
    ordered : bool
        Whether answers go back to the caller in the order of X: a loader that shuffles or drops samples is then an
        error.
    like : InputSpec, optional
        What inputs have to look like.

    Raises
    ------
    ValueError
        For an empty or shuffling source, NaN or inf (while iterating), missing labels, or labels given twice.
    TypeError
        For anything that is none of the above, and PIL images (those of a stream while iterating).
    """
    check_whole("batch_size", batch_size)
    if is_stream(X):
        if y is not None:
            raise ValueError(
                f"y is taken from X where X is a {type(X).__name__} of (x, y); got y beside it. Leave y out."
            )
        rows = ForeignDataset(X, labels) if is_foreign(X) else X
        loader = X if isinstance(X, DataLoader) else DataLoader(rows, batch_size=int(batch_size))
        if ordered:
            check_order(loader)
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or int(batch_size)
        n_batches = None if isinstance(loader.dataset, IterableDataset) else len(loader)
        return Batches(loader, size, n_batches, labels, like)
    array = _as_array(X)
    n = len(array)
    if n == 0:
        raise ValueError("X holds no samples; give at least one.")
    targets = None
    if labels or (labels is None and y is not None):
        if y is None:
            raise ValueError(
                "labels are needed: give y, a pair (X, y), or a Dataset or DataLoader of (x, y); got y=None."
            )
        targets = as_labels(y)
        if targets.shape != (n,):
            raise ValueError(f"y must have shape ({n},), one label a sample of X; got shape {targets.shape}.")
    if like is not None:
        like.check(array.shape)
    slices = _Slices(array, targets, int(batch_size))
    return Batches(slices, int(batch_size), len(slices), labels)


class _Slices:
    """An array cut into batches, as often as wanted."""

    def __init__(self, array: Any, labels: NDArray[Any] | None, batch_size: int) -> None:
        self.array, self.labels, self.batch_size = array, labels, batch_size

    def __len__(self) -> int:
        return -(-len(self.array) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.array), self.batch_size):
            x = self.array[start : start + self.batch_size]
            if isinstance(x, np.ndarray):
                x = torch.from_numpy(x if x.flags.writeable and min(x.strides) >= 0 else x.copy())
            yield x if self.labels is None else (x, self.labels[start : start + self.batch_size])


def _as_array(X: Any) -> Any:
    check_source(X)
    if isinstance(X, Tensor):
        return X.detach()
    if isinstance(X, (dict, set)) or not hasattr(X, "__len__"):
        raise TypeError(
            f"X must be an array or tensor of shape (N, ...), a Dataset or a DataLoader; got {type(X).__name__}."
        )
    try:
        array = np.asanyarray(X)
        nature = f"dtype {array.dtype} and shape {array.shape}"
    except ValueError:
        array, nature = np.array(None), "entries of different shapes"
    if array.dtype.kind not in "fiub" or array.ndim == 0:
        raise TypeError(
            f"X must be a numeric array of shape (N, ...); got {nature}. "
            "Images of different sizes go through a Dataset that resizes them."
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _unpack(batch: Any, labels: bool | None) -> tuple[Any, Any]:
    _refuse_images(batch)
    if isinstance(batch, (tuple, list)):
        if len(batch) == 1:
            return batch[0], None
        if len(batch) == 2:
            return batch[0], batch[1]
        raise ValueError(f"a batch must be x, (x,) or (x, y); got {len(batch)} items.")
    if isinstance(batch, Mapping):
        return from_columns(batch, labels)
    return batch, None


def _refuse_images(x: Any) -> None:
    if are_images(x):
        raise TypeError(f"X gives PIL images, which no model takes. {TO_TENSORS}")


def _checked(x: Any) -> Tensor:
    _refuse_images(x)
    if not isinstance(x, Tensor) or x.is_complex() or x.layout is not torch.strided or x.is_meta:
        check_plain("X", x)
    x = torch.as_tensor(x)
    # The sum is finite only if every entry is; a finite batch whose sum overflows is looked at entry by entry.
    if x.is_floating_point() and not math.isfinite(x.sum()) and not bool(torch.isfinite(x).all()):
        raise ValueError("X must be finite; it contains NaN or infinity. Clean or impute the data first.")
    return x
