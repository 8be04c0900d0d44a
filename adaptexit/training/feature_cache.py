"""The backbone runs once over the training data; heads learn from what it left at the cuts.

Features go to memory, and to files once they outgrow it. In a folder of the caller's they stay, and a later run of the
same model over the same data finds them there.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from adaptexit.training.feature_store import Digest, Shelf, inputs_hash, model_name

MEMORY_LIMIT = 1 << 31
"""Bytes of features and logits above which they go to files."""

Visit = Callable[[int, Tensor], None]
Run = Callable[[Tensor, Visit], Tensor]
Reducer = Callable[[Tensor], Tensor]


class FeatureCache:
    """What heads are trained on: reduced features of N samples at K - 1 cuts, and the full model's logits.

    Parameters
    ----------
    features : list of K - 1 arrays (N, ...)
        In the form that each head's ``reduce`` gives; memory-mapped ones stay on disk.
    logits : float array (N, C)
    dtypes : list of K - 1 torch dtypes, optional
        What :meth:`rows` gives back, where it is not the type that the features are kept in.

    Attributes
    ----------
    features, logits : as given; empty once closed
    n_samples : int
    n_bytes : int
        Of features and logits, wherever they lie.
    """

    def __init__(
        self, features: list[NDArray[Any]], logits: NDArray[Any], dtypes: Sequence[torch.dtype | None] | None = None
    ) -> None:
        self.features = features
        self.logits = logits
        self._dtypes: list[torch.dtype | None] = [None] * len(features) if dtypes is None else list(dtypes)

    @property
    def n_samples(self) -> int:
        return len(self.logits)

    @property
    def n_bytes(self) -> int:
        return sum(int(array.nbytes) for array in [*self.features, self.logits])

    def rows(self, k: int, indices: ArrayLike) -> Tensor:
        """Features (B, ...) of the samples ``indices`` (B,) at exit k, on the CPU, in the type that ``reduce`` gave.

        A batch is read from a file in the order in which it lies there, which is what makes random batches fast.
        """
        if k >= len(self.features):
            raise IndexError(f"k must be an early exit, below {len(self.features)}; got {k} (a closed cache has none).")
        feature, places = self.features[k], np.asarray(indices)
        if isinstance(feature, np.memmap):
            order = np.argsort(places, kind="stable")
            batch = np.empty((len(places), *feature.shape[1:]), feature.dtype)
            batch[order] = np.asarray(feature)[places[order]]
        else:
            batch = feature[places]
        return torch.from_numpy(batch).to(self._dtypes[k])

    def part(self, exits: slice | Sequence[int]) -> FeatureCache:
        """The same of some of the exits, in the order given, sharing memory and files."""
        places = range(len(self.features))[exits] if isinstance(exits, slice) else exits
        return FeatureCache([self.features[k] for k in places], self.logits, [self._dtypes[k] for k in places])

    def close(self) -> None:
        """Give memory and temporary files back; what a folder of the caller's holds stays there."""
        self.features, self.logits = [], self.logits[:0].copy()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"FeatureCache({len(self.features)} early exits, {self.n_samples} samples, {self.n_bytes} bytes)"


def collect(
    batches: Iterable[Tensor],
    run: Run,
    reducers: Sequence[Reducer],
    *,
    half: bool = False,
    memory_limit: int = MEMORY_LIMIT,
    folder: str | os.PathLike[str] | None = None,
    key: str | None = None,
) -> FeatureCache:
    """Run a backbone over all batches and keep what the heads need.

    Parameters
    ----------
    batches : iterable of tensors (B, ...)
        Any number of batches of any sizes. Read once where nothing is to be had from ``folder``.
    run : callable (x, visit) -> logits (B, C)
        Runs the backbone on a batch and calls ``visit(k, feature)`` right after cut k, once for each of the K - 1 cuts.
        The feature is reduced and copied inside the call: operations behind the cut may overwrite it.
    reducers : sequence of K - 1 callables
        From a feature to what is kept of it, samples first.
    half : bool
        Keep features as float16.
    memory_limit : int
        Bytes of features and logits that may lie in memory; beyond it all of them move to temporary files without a
        name, which vanish with the cache or the process, whichever goes first.
    folder : path, optional
        Keep the features there, whatever their size, and take them from there where an earlier run with the same key
        kept them for the same data. It may serve any number of models and data sets; what it holds may be deleted at
        any time.
    key : str, optional
        Of everything beside the data and ``half`` that determines the features: :func:`cache_key`. Needed with
        ``folder`` only.

    Returns
    -------
    FeatureCache

    Raises
    ------
    ValueError
        For NaN or inf in features or logits, features too large for float16, shapes or types that change from batch to
        batch, cuts that were not visited, no samples, a folder without a key.

    Notes
    -----
    Where ``folder`` has an entry for the model, the data are read through and hashed to see whether they are the same,
    batch by batch, which is cheap beside running the backbone, and the first batch is run and compared; only if they
    are not the same, are they read once more and run. Data that are shuffled or augmented anew are never the same.
    For that ``batches`` must be iterable again (a list, a loader). A plain iterator is not, and is never looked up.
    """
    if not isinstance(memory_limit, (int, np.integer)) or memory_limit < 0:
        raise ValueError(f"memory_limit must be a number of bytes; got {memory_limit!r}.")
    if (folder is None) != (key is None):
        one, other = ("key", "folder") if folder is None else ("folder", "key")
        raise ValueError(f"folder and key go together; got {one} without {other}. Give both (see cache_key).")
    if folder is None or key is None:
        with _Collecting(reducers, half) as collecting:
            collecting.run_over(batches, run, memory_limit=memory_limit)
            return collecting.in_memory_or_temporary()
    shelf = Shelf(Path(folder).expanduser(), model_name(key, half, len(reducers)))
    n_read, replace = None, isinstance(batches, Iterator)  # whose features were never looked up
    if shelf.has_entries() and not isinstance(batches, Iterator):
        inputs, n_read, first = inputs_hash(batches)
        if first is not None and (entry := shelf.find(inputs, check=True)) is not None:
            cache = _cache_of(*entry)
            if _holds(cache, first, run, reducers, half):
                return cache
            replace = True
    with shelf.scratch() as scratch:
        digest = Digest()
        with _Collecting(reducers, half) as collecting:
            collecting.write_to(scratch)
            collecting.run_over(batches, run, digest=digest)
            if n_read is not None and n_read != collecting.n_samples:
                raise ValueError(
                    f"batches must give the same samples whenever they are read; got {n_read} when they were hashed "
                    f"and {collecting.n_samples} when they were run. Give a source that can be read again or no folder."
                )
            header = collecting.header()
        entry = shelf.keep(scratch, digest.result(), header, replace=replace)
    if entry is None:
        raise OSError(f"the features written to {folder} cannot be read back. Look whether that disk is full or gone.")
    return _cache_of(*entry)


def _holds(cache: FeatureCache, first: Tensor, run: Run, reducers: Sequence[Reducer], half: bool) -> bool:
    """Whether the backbone, run on the first batch, still gives what is kept: no key sees a changed ``forward``."""
    with _Collecting(reducers, half) as collecting:
        collecting.run_over([first], run, memory_limit=MEMORY_LIMIT)
        with collecting.in_memory_or_temporary() as anew:
            return all(
                old.dtype == new.dtype
                and old.shape[1:] == new.shape[1:]
                and np.allclose(old[: len(new)], new, rtol=0, atol=1e-3 * float(np.abs(new).max(initial=0)))
                for old, new in zip([*cache.features, cache.logits], [*anew.features, anew.logits], strict=True)
            )


def _cache_of(arrays: list[NDArray[Any]], dtypes: list[torch.dtype]) -> FeatureCache:
    return FeatureCache(arrays[:-1], arrays[-1], dtypes)


# -- collecting --------------------------------------------------------------------------------------------------------


class _Column:
    """One array that grows batch by batch, in memory until it is given a file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.checksum = 0
        self.file: IO[bytes] | None = None
        self.torch_dtype: torch.dtype | None = None
        self._array: NDArray[Any] | None = None
        self._like: NDArray[Any] = np.empty(0)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._like.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.count, *self._like.shape[1:]

    @property
    def n_bytes(self) -> int:
        return int(self._like.nbytes) * self.count

    def append(self, rows: NDArray[Any], torch_dtype: torch.dtype) -> None:
        if self.torch_dtype is None:
            self.torch_dtype, self._like = torch_dtype, np.empty_like(rows[:1])
        elif torch_dtype != self.torch_dtype or rows.shape[1:] != self._like.shape[1:]:
            raise ValueError(
                f"{_named(self.name)} must be alike in all batches; got {self.torch_dtype} of shape "
                f"{self._like.shape[1:]} a sample, then {torch_dtype} of shape {rows.shape[1:]}. Resize the inputs to "
                "one size."
            )
        if self.file is not None:
            self._write(rows)
        else:
            self._store(rows)
        self.count += len(rows)

    def move_to(self, file: IO[bytes]) -> None:
        self.file = file
        if self._array is not None:
            self._write(self._array[: self.count])
            self._array = None

    def whole(self) -> NDArray[Any]:
        """All rows: the array itself, or its file mapped read-only."""
        if self.file is not None:
            self.file.flush()
            return np.memmap(self.file, self.dtype, mode="r", shape=self.shape)
        assert self._array is not None
        array, self._array = self._array, None
        array.resize(self.shape, refcheck=False)
        return array

    def _store(self, rows: NDArray[Any]) -> None:
        if self._array is None:
            self._array = np.empty_like(rows, order="C")
        room = len(self._array)
        if self.count + len(rows) > room:
            # In place: the operating system moves large arrays without a second copy.
            self._array.resize((max(self.count + len(rows), room + room // 8), *rows.shape[1:]), refcheck=False)
        self._array[self.count : self.count + len(rows)] = rows

    def _write(self, rows: NDArray[Any]) -> None:
        assert self.file is not None
        content = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        self.file.write(content)
        self.checksum = zlib.crc32(content, self.checksum)


class _Collecting:
    """A run over the data, with the columns that it fills: K - 1 of features, one of logits."""

    def __init__(self, reducers: Sequence[Callable[[Tensor], Tensor]], half: bool) -> None:
        self.reducers, self.half = reducers, half
        self.columns = [_Column(f"features_{k}") for k in range(len(reducers))] + [_Column("logits")]
        self.n_samples = 0
        self._files = ExitStack()
        self._size = 0
        self._visited: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def run_over(
        self,
        batches: Iterable[Tensor],
        run: Run,
        *,
        memory_limit: float = np.inf,
        digest: Digest | None = None,
    ) -> None:
        """Fill the columns; they go to files without names, which no crash can leave behind, beyond the limit."""
        with torch.inference_mode():
            for x in batches:
                if not len(x):
                    continue
                if digest is not None:
                    digest.tensor(x)
                self._run_one(x, run)
                if self.columns[-1].file is None and sum(column.n_bytes for column in self.columns) > memory_limit:
                    for column in self.columns:
                        file = tempfile.TemporaryFile(prefix="adaptexit-")  # noqa: SIM115
                        column.move_to(self._files.enter_context(file))
        if not self.n_samples:
            raise ValueError("X holds no samples; give at least one.")

    def write_to(self, folder: Path) -> None:
        for column in self.columns:
            file = open(folder / f"{column.name}.bin", "wb")  # noqa: SIM115
            column.move_to(self._files.enter_context(file))

    def in_memory_or_temporary(self) -> FeatureCache:
        *features, logits = [column.whole() for column in self.columns]
        return FeatureCache(features, logits, self._dtypes())

    def header(self) -> list[dict[str, Any]]:
        """Name, type, shape and checksum of what was written, as JSON holds them."""
        return [
            {
                "name": column.name, "dtype": column.dtype.str, "shape": column.shape, "checksum": column.checksum,
                "came": str(column.torch_dtype).removeprefix("torch."),
            }
            for column in self.columns
        ]  # fmt: skip

    def _dtypes(self) -> list[torch.dtype]:
        return [column.torch_dtype for column in self.columns[:-1] if column.torch_dtype is not None]

    def _run_one(self, x: Tensor, run: Run) -> None:
        self._size, self._visited = len(x), []
        logits = run(x, self._visit)
        if sorted(self._visited) != list(range(len(self.reducers))):
            raise ValueError(
                f"run must visit each of the cuts 0 ... {len(self.reducers) - 1} once a batch; it visited "
                f"{self._visited}. Look whether the network reaches every cut on every input."
            )
        if logits.ndim != 2 or len(logits) != len(x):
            raise ValueError(
                f"the full model must answer {len(x)} samples with logits of shape ({len(x)}, C); got shape "
                f"{tuple(logits.shape)}."
            )
        self._add(self.columns[-1], logits if logits.dtype == torch.float64 else logits.float())
        self.n_samples += len(x)

    def _visit(self, k: int, feature: Tensor) -> None:
        self._visited.append(k)
        if not 0 <= k < len(self.reducers):
            return  # named with all the others once the batch is through
        reduction = self.reducers[k](feature)
        if reduction.ndim < 1 or len(reduction) != self._size:
            raise ValueError(
                f"the reduced feature of exit {k} must have one row for each of the {self._size} samples; got shape "
                f"{tuple(reduction.shape)}. reduce must keep the samples first."
            )
        self._add(self.columns[k], reduction, self.half)

    def _add(self, column: _Column, tensor: Tensor, half: bool = False) -> None:
        storable = tensor
        if tensor.is_floating_point():
            if not _all_finite(tensor):
                raise ValueError(
                    f"{_named(column.name)} must be finite; got NaN or infinity. Look for NaN or inf in the weights, "
                    "for values of X beyond those that the model was trained on, "
                    "or for an overflow where the model runs in half precision."
                )
            # NumPy has no bfloat16.
            storable = tensor.half() if half else tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            if half and not _all_finite(storable):
                raise ValueError(
                    f"{_named(column.name)} must fit into float16 (at most 65504 in size) with half=True; got "
                    f"{float(tensor.abs().max()):.6g}. Leave half off."
                )
        column.append(storable.detach().cpu().numpy(), tensor.dtype)


def _named(column: str) -> str:
    return "logits of the full model" if column == "logits" else f"features of exit {column.removeprefix('features_')}"


def _all_finite(tensor: Tensor) -> bool:
    # The sum is finite only if every entry is; only where it is not are the entries looked at.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
