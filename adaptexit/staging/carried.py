"""Values on their way from one stage to the next: which axis holds the samples, and how survivors are picked out.

How a value hangs on the number of samples is read off two runs, of 2 and of 3 samples: a tensor with m rows a sample
along one axis, an integer that counts them, something that does not change, or a nesting of these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptexit.exceptions import SplitError, UnsupportedValueError
from adaptexit.staging.nested import Rows, entries, is_nest, join, kind, n_bytes, rebuilt, take


@dataclass(frozen=True)
class Along:
    """A tensor with ``per_sample`` rows a sample along axis ``dim``, those of one sample side by side."""

    dim: int
    per_sample: int


@dataclass(frozen=True)
class Count:
    """An integer: ``per_sample`` times the number of samples."""

    per_sample: int


@dataclass(frozen=True)
class Static:
    """The same for any samples; where a later stage writes into it, each block of a divided batch needs its own."""

    written: bool = False


@dataclass(frozen=True)
class Nest:
    """A list, tuple, dict or dataclass of values, in the order of iteration."""

    parts: tuple[Layout, ...]


Layout = Along | Count | Static | Nest


def layout_of(two: Any, three: Any) -> Layout:
    """The layout of a value that is ``two`` for 2 samples and ``three`` for 3 others.

    Raises
    ------
    UnsupportedValueError
        Where none fits.
    """
    if type(two) is not type(three):
        raise UnsupportedValueError(f"it is a {type(two).__name__} for 2 samples and a {type(three).__name__} for 3")
    if isinstance(two, Tensor):
        return _tensor_layout(two, three)
    if is_nest(two):
        if len(entries(two)) != len(entries(three)) or (isinstance(two, dict) and list(two) != list(three)):
            raise UnsupportedValueError(f"it is a {type(two).__name__} whose entries change with the samples")
        return Nest(tuple(layout_of(*pair) for pair in zip(entries(two), entries(three), strict=True)))
    if type(two) is int and two != three and two % 2 == 0 and three * 2 == two * 3:
        return Count(two // 2)
    try:
        same = bool(two == three)
    except (TypeError, ValueError, RuntimeError):
        same = False
    if not same:
        raise UnsupportedValueError(
            f"it is a {type(two).__name__} that changes with the samples: {two!r} and {three!r}"
        )
    return Static()


def _tensor_layout(two: Tensor, three: Tensor) -> Layout:
    if two.layout is not torch.strided or two.is_nested:
        raise UnsupportedValueError("it is a sparse or nested tensor")
    if two.dtype != three.dtype:
        raise UnsupportedValueError(f"it is a tensor of {two.dtype} for 2 samples and of {three.dtype} for 3")
    shapes = f"{tuple(two.shape)} for 2 samples and {tuple(three.shape)} for 3"
    if two.shape == three.shape:
        # Floats may differ by rounding, as kernels add in another order for another batch size.
        exact = {} if two.is_floating_point() or two.is_complex() else {"rtol": 0.0, "atol": 0.0}
        if not torch.allclose(two, three, equal_nan=True, **exact):
            raise UnsupportedValueError(
                f"it is a tensor without an axis for the samples that changes with them, {shapes}"
            )
        return Static()
    if two.ndim != three.ndim:
        raise UnsupportedValueError(f"it is a tensor whose number of axes changes with the samples, {shapes}")
    differing = [d for d, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]
    if len(differing) != 1:
        raise UnsupportedValueError(f"it is a tensor with more than one axis that grows with the samples, {shapes}")
    (dim,) = differing
    if two.shape[dim] % 2 or two.shape[dim] // 2 * 3 != three.shape[dim]:
        raise UnsupportedValueError(f"it is a tensor with no whole number of rows a sample, {shapes}")
    return Along(dim, two.shape[dim] // 2)


def writes_into(tensor: Tensor) -> int:
    """How often a tensor was written into, also with the values that it had; 0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


def leaves(value: Any, layout: Layout) -> Iterator[tuple[Any, Layout]]:
    """What lies in a value once its nests are opened, each with its layout."""
    if isinstance(layout, Nest):
        for entry, part in zip(entries(value), layout.parts, strict=True):
            yield from leaves(entry, part)
    else:
        yield value, layout


def with_leaves(value: Any, layout: Layout, function: Callable[[Any, Layout], Any]) -> Any:
    """A value with what a function makes of each leaf and its layout in its place."""
    if isinstance(layout, Nest):
        return rebuilt(value, [with_leaves(*pair, function) for pair in zip(entries(value), layout.parts, strict=True)])
    return function(value, layout)


def with_written(value: Any, layout: Layout, written: Collection[int]) -> Layout:
    """The layout, with those static tensors marked whose ``id`` is among ``written``."""
    if isinstance(layout, Nest):
        parts = zip(entries(value), layout.parts, strict=True)
        return Nest(tuple(with_written(entry, part, written) for entry, part in parts))
    return Static(written=True) if isinstance(layout, Static) and id(value) in written else layout


def copied(value: Any) -> Any:
    """The same value with its tensors cloned."""
    if isinstance(value, Tensor):
        return value.clone()
    if is_nest(value):
        return rebuilt(value, [copied(entry) for entry in entries(value)])
    return value


@dataclass(frozen=True, slots=True)
class Live:
    """The values that later stages still need, of ``n`` samples.

    Attributes
    ----------
    values : tuple
    layouts : tuple of Layout, one a value
    n : number of samples
    """

    values: tuple[Any, ...]
    layouts: tuple[Layout, ...]
    n: int

    def taken(self, samples: NDArray[Any] | slice) -> Live:
        """Those of some samples, in the order of their indices."""
        pick = _Pick(samples, self.n)
        return Live(tuple(map(pick, self.values, self.layouts)), self.layouts, pick.n)

    def joined(self, others: Sequence[Live]) -> Live:
        """Those of these samples, then those of the others."""
        parts = [self, *others]
        columns = zip(*[part.values for part in parts], strict=True)
        counts = [part.n for part in parts]
        return Live(tuple(map(_concatenated, columns, self.layouts, repeat(counts))), self.layouts, sum(counts))

    @property
    def n_rows(self) -> int:
        """Number of samples."""
        return self.n

    @property
    def nbytes(self) -> int:
        """Memory of the tensors that grow with the samples."""
        return sum(map(_size, self.values, self.layouts))

    @property
    def kind(self) -> Hashable:
        """What those have in common that can be joined."""
        return tuple(map(_kind, self.values, self.layouts, repeat(self.n)))


@dataclass(slots=True)
class Carried:
    """What leaves a stage.

    Attributes
    ----------
    live : Live
        What later stages need.
    feature : any
        What the exit after this stage reads: the output of the cut module, or of the whole model after the last stage.
        It is not passed on.
    state : rows
        What the heads passed so far leave to later ones; samples first.
    """

    live: Live
    feature: Any = None
    state: Rows = None

    def without_feature(self) -> Carried:
        """What goes on of all samples."""
        return Carried(self.live, None, self.state)

    def taken(self, samples: NDArray[Any] | slice) -> Carried:
        """What goes on of some samples."""
        state = None if self.state is None else take(self.state, samples)
        return Carried(self.live.taken(samples), None, state)

    def joined(self, others: Sequence[Carried]) -> Carried:
        """What goes on of these samples, then of the others."""
        state = None if self.state is None else join([self.state, *[other.state for other in others]])
        return Carried(self.live.joined([other.live for other in others]), None, state)

    @property
    def n_rows(self) -> int:
        """Number of samples."""
        return self.live.n

    @property
    def nbytes(self) -> int:
        """Memory of what goes on."""
        return self.live.nbytes + (0 if self.state is None else n_bytes(self.state))

    @property
    def kind(self) -> Hashable:
        """What those have in common that can be joined."""
        return self.live.kind, kind(self.state)


class _Pick:
    """Rows of some samples out of one value after another."""

    def __init__(self, samples: NDArray[Any] | slice, n_before: int) -> None:
        self.n_before = n_before
        self.rows: dict[tuple[torch.device, int], Tensor] = {}
        self.where: slice | Tensor
        if isinstance(samples, slice) and samples.step not in (None, 1):
            samples = np.arange(n_before)[samples]  # a view with gaps would not be channels_last any more
        if isinstance(samples, slice):
            self.where, self.is_slice = samples, True
            self.n = len(range(n_before)[samples])
        else:
            indices = np.flatnonzero(samples) if samples.dtype == bool else samples
            # A copy, as torch takes no arrays with negative strides, which even a single reversed sample has.
            self.where, self.is_slice = torch.from_numpy(np.array(indices, np.int64)), False
            self.n = len(indices)

    def __call__(self, value: Any, layout: Layout) -> Any:
        if isinstance(layout, Along):
            where: Any = self.where
            per_sample = _rows_a_sample(value.shape[layout.dim], self.n_before, layout)
            if per_sample > 1 or not (self.is_slice or value.is_cpu):
                where = self._rows_on(value.device, per_sample)
            # Advanced indexing, as index_select would give up channels_last.
            return value[(slice(None),) * layout.dim + (where,)]
        if isinstance(layout, Static):
            return value.clone() if layout.written else value
        if isinstance(layout, Count):
            return _rows_a_sample(value, self.n_before, layout) * self.n
        return rebuilt(value, list(map(self, entries(value), layout.parts)))

    def _rows_on(self, device: torch.device, per_sample: int) -> Tensor:
        """Places of the samples' rows, those of one sample side by side."""
        place = device, per_sample
        if place not in self.rows:
            samples = torch.arange(self.n_before)[self.where]
            rows = samples[:, None] * per_sample + torch.arange(per_sample)
            self.rows[place] = rows.reshape(-1).to(device)
        return self.rows[place]


def _rows_a_sample(rows: int, n: int, layout: Along | Count) -> int:
    """How many rows a sample has: of inputs of another size than the example's they may be more, or fewer."""
    if not n:
        return layout.per_sample
    per_sample, rest = divmod(rows, n)
    if rest:
        raise SplitError(
            f"a value that is carried has {rows} rows for {n} samples, where the example's had {layout.per_sample} "
            "each: samples have different numbers of them here, and cannot be picked out. Give inputs like the example."
        )
    return per_sample


def _concatenated(values: Sequence[Any], layout: Layout, counts: Sequence[int]) -> Any:
    first = values[0]
    if isinstance(layout, (Along, Count)):
        sizes = [value.shape[layout.dim] if isinstance(layout, Along) else value for value in values]
        if any(size * counts[0] != sizes[0] * n for size, n in zip(sizes, counts, strict=True)):
            raise _merging_refused(sizes if isinstance(layout, Count) else [tuple(value.shape) for value in values])
    if isinstance(layout, Along):
        try:
            return torch.cat(tuple(values), dim=layout.dim)
        except RuntimeError:
            shapes = [(*value.shape[: layout.dim], *value.shape[layout.dim + 1 :]) for value in values]
            if len(set(shapes)) == 1:  # it fails for another reason
                raise
            raise _merging_refused([tuple(value.shape) for value in values]) from None
    if isinstance(layout, Count):
        return sum(values)
    if isinstance(layout, Nest):
        columns = zip(*map(entries, values), strict=True)
        return rebuilt(first, list(map(_concatenated, columns, layout.parts, repeat(counts))))
    for value in values[1:]:
        if not (value is first or _same(value, first)):
            raise _merging_refused([tuple(v.shape) if isinstance(v, Tensor) else v for v in values])
    return first


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):  # to torch.equal a NaN is not the same as itself
        return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    return bool(one == other)


def _merging_refused(values: list[Any]) -> ValueError:
    return ValueError(
        f"batches can be merged only where their inputs have the same size; a value that is carried is {values} for "
        "different ones. Give inputs of one size, or run batch by batch (merge=False)."
    )


def _size(value: Any, layout: Layout) -> int:
    if isinstance(layout, Along):
        return int(value.nbytes)
    if isinstance(layout, Nest):
        return sum(map(_size, entries(value), layout.parts))
    return 0


def _kind(value: Any, layout: Layout, n: int) -> Hashable:
    if isinstance(layout, Along):
        shape = value.shape
        return value.dtype, shape[: layout.dim], _rows_a_sample(shape[layout.dim], n, layout), shape[layout.dim + 1 :]
    if isinstance(layout, Nest):
        return tuple(map(_kind, entries(value), layout.parts, repeat(n)))
    if isinstance(layout, Count):
        return _rows_a_sample(value, n, layout)
    if isinstance(value, Tensor):  # what belongs to a grid of 4x8 patches has the shape of that for 8x4
        return value.dtype, value.shape, hash(value.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    try:
        hash(value)
    except TypeError:
        return type(value).__qualname__
    return value
