"""What travels from stage to stage: tensors (or arrays) whose first axis is the samples, alone or nested.

Nesting is by tuples, lists and dicts; every leaf holds the same samples in the same order. A leaf may also be an object
that knows how: with ``taken``, ``joined``, ``n_rows`` and ``nbytes``. None is an empty nesting.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows = Any


def entries(value: Any) -> list[Any]:
    """What a list, tuple or dict holds."""
    return list(value.values()) if isinstance(value, dict) else list(value)


def rebuilt(like: Any, parts: list[Any]) -> Any:
    """A list, tuple or dict of the same kind, with other entries."""
    if isinstance(like, dict):
        made = copy.copy(like)
        made.update(zip(like, parts, strict=True))
        return made
    return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)


def mapped(rows: Rows, function: Callable[..., Any], *others: Rows) -> Rows:
    if rows is None:
        return None
    if isinstance(rows, (dict, tuple, list)):
        groups = zip(entries(rows), *map(entries, others), strict=True)
        return rebuilt(rows, [mapped(group[0], function, *group[1:]) for group in groups])
    return function(rows, *others)


def _leaves(rows: Rows) -> list[Any]:
    found: list[Any] = []
    mapped(rows, found.append)
    return found


def n_rows(rows: Rows) -> int:
    """Number of samples."""
    if isinstance(rows, Tensor):
        return int(rows.shape[0])
    leaf = _leaves(rows)[0]
    return int(leaf.n_rows if hasattr(leaf, "n_rows") else leaf.shape[0])


def n_bytes(rows: Rows) -> int:
    """Memory that the samples take."""
    return sum(int(leaf.nbytes) for leaf in _leaves(rows))


def take(rows: Rows, samples: NDArray[Any] | slice) -> Rows:
    """Some of the samples, in the order of their indices; memory formats are kept."""

    def pick(leaf: Any) -> Any:
        if hasattr(leaf, "taken"):
            return leaf.taken(samples)
        if isinstance(samples, slice) or isinstance(leaf, np.ndarray):
            return leaf[samples]
        return leaf[torch.from_numpy(samples).to(leaf.device)]

    return mapped(rows, pick)


def join(parts: Sequence[Rows]) -> Rows:
    """The samples of all parts, one after the other."""
    if len(parts) == 1:
        return parts[0]

    def concatenate(*leaves: Any) -> Any:
        if hasattr(leaves[0], "joined"):
            return leaves[0].joined(leaves[1:])
        return np.concatenate(leaves) if isinstance(leaves[0], np.ndarray) else torch.cat(leaves)

    return mapped(parts[0], concatenate, *parts[1:])


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
