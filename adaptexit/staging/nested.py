"""What travels from stage to stage: tensors (or arrays) whose first axis is the samples, alone or nested.

Nesting is by tuples, lists, dicts and dataclasses; every leaf holds the same samples in the same order. A leaf may also
be an object that knows how: with ``taken``, ``joined``, ``n_rows`` and ``nbytes``, and with ``kind`` where not all can
be joined. None is an empty nesting.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows = Any


def is_nest(value: Any) -> bool:
    """Whether values lie in it, rather than that it is one."""
    if isinstance(value, (tuple, list, dict)):
        return True
    return is_dataclass(value) and not (isinstance(value, type) or hasattr(value, "taken"))


def entries(value: Any) -> list[Any]:
    """What a list, tuple, dict or dataclass holds."""
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (tuple, list)) else [getattr(value, name) for name in _names(value)]


def _names(value: Any) -> list[str]:
    """The fields of a dataclass that have been set."""
    return [field.name for field in fields(value) if hasattr(value, field.name)]


def rebuilt(like: Any, parts: list[Any]) -> Any:
    """A list, tuple, dict or dataclass of the same kind, with other entries."""
    if isinstance(like, dict) and is_dataclass(like):  # transformers' outputs, which refuse to be updated
        return type(like)(**dict(zip(like, parts, strict=True)))
    if isinstance(like, dict):
        twin = copy.copy(like)  # of the same class, with what a defaultdict or a user's own holds beside its entries
        twin.update(zip(like, parts, strict=True))
        return twin
    if not isinstance(like, (tuple, list)):
        twin = copy.copy(like)  # made without its __init__, which may do anything
        for name, part in zip(_names(like), parts, strict=True):
            object.__setattr__(twin, name, part)
        return twin
    return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)


def mapped(rows: Rows, function: Callable[..., Any], *others: Rows) -> Rows:
    """What a function makes of every leaf (and of the same leaf of others), nested as the leaves were."""
    if rows is None:
        return None
    if is_nest(rows):
        groups = zip(entries(rows), *map(entries, others), strict=True)
        return rebuilt(rows, [mapped(group[0], function, *group[1:]) for group in groups])
    return function(rows, *others)


# What follows is called several times a batch, mostly with one tensor, a pair with None or one object that knows how:
# these come first, and nothing is built that they do not need.


def n_rows(rows: Rows) -> int:
    """Number of samples."""
    if isinstance(rows, Tensor):
        return int(rows.shape[0])
    leaf = _first_leaf(rows)
    return int(leaf.n_rows if hasattr(leaf, "n_rows") else leaf.shape[0])


def _first_leaf(rows: Rows) -> Any:
    if not is_nest(rows):
        return rows
    return next((leaf for leaf in map(_first_leaf, entries(rows)) if leaf is not None), None)


def n_bytes(rows: Rows) -> int:
    """Memory that the samples take."""
    if rows is None:
        return 0
    if is_nest(rows):
        return sum(map(n_bytes, entries(rows)))
    return int(rows.nbytes)


def kind(rows: Rows) -> Hashable:
    """What two have in common that can be joined: type, precision and shape of what they hold, samples left out."""
    if isinstance(rows, (Tensor, np.ndarray)):
        return rows.dtype, rows.shape[1:]
    if rows is None:
        return None
    if is_nest(rows):
        return (type(rows), *map(kind, entries(rows)))
    return getattr(rows, "kind", None)


def take(rows: Rows, samples: NDArray[Any] | slice) -> Rows:
    """Some of the samples, in the order of their indices; memory formats are kept."""
    if rows is None:
        return None
    if isinstance(rows, Tensor):
        if isinstance(samples, slice):
            return rows[samples]
        index = torch.from_numpy(samples)
        return rows[index if rows.is_cpu else index.to(rows.device)]
    if type(rows) is tuple:
        return tuple(map(take, rows, repeat(samples)))
    if is_nest(rows):
        return rebuilt(rows, [take(entry, samples) for entry in entries(rows)])
    return rows[samples] if isinstance(rows, np.ndarray) else rows.taken(samples)


def join(parts: Sequence[Rows]) -> Rows:
    """The samples of all parts, one after the other."""
    first = parts[0]
    if len(parts) == 1 or first is None:
        return first
    if isinstance(first, Tensor):
        return torch.cat(tuple(parts))
    if is_nest(first):
        return rebuilt(first, [join(group) for group in zip(*map(entries, parts), strict=True)])
    return np.concatenate(parts) if isinstance(first, np.ndarray) else first.joined(parts[1:])


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif is_nest(value):
        for part in entries(value):
            yield from tensors_in(part)


def storages(tensors: Iterable[Tensor]) -> frozenset[int]:
    """What tells the memory of dense tensors from that of others, as long as they live."""
    return frozenset(t.untyped_storage()._cdata for t in tensors if t.layout is torch.strided)
