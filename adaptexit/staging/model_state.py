"""What a run leaves in a module besides its modes: attributes, what its containers hold, tensors written into."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (dict, list, set, deque)

_OF_TORCH = frozenset(vars(nn.Module())) - {"_buffers", "_modules", "_parameters"}
"""What every module has beside those: its hooks and its mode."""


@contextmanager
def state_restored(module: nn.Module) -> Iterator[None]:
    """Put back what the block changes in a module, parameters excepted, which are too large to be copied beforehand.

    What did not change is not touched, as other threads may use it. Modes are their users' business
    (:class:`adaptexit.staging.contexts.evaluating_parts`).
    """
    holders = _holders(module)
    values = [*module.buffers()]
    for _, contents in holders:
        values += contents.values() if isinstance(contents, dict) else contents
    tensors = {id(v): v for v in values if isinstance(v, Tensor) and not isinstance(v, nn.Parameter)}
    copies = [(t, 0 if t.is_inference() else t._version, t.detach().clone()) for t in tensors.values()]
    try:
        yield
    finally:
        for holder, contents in holders:
            _put_back(holder, contents)
        with torch.no_grad():
            for tensor, version, copied in copies:
                # Inference tensors do not count what is written into them.
                if not torch.equal(tensor, copied) if tensor.is_inference() else tensor._version != version:
                    tensor.detach().copy_(copied)


def _holders(module: nn.Module) -> list[tuple[Any, Any]]:
    """Attributes of a module's parts, of objects that these hold, and all containers in them, each with a copy."""
    parts = list(module.modules())
    classes = {cls for part in parts for cls in type(part).__mro__ if cls.__module__.partition(".")[0] != "torch"}
    waiting: list[tuple[Any, bool]] = [(vars(part), False) for part in parts]
    waiting += [(value, True) for cls in classes for value in vars(cls).values() if isinstance(value, _CONTAINERS)]
    visited = {id(value) for part in parts for name, value in vars(part).items() if name in _OF_TORCH}
    holders = []
    while waiting:
        holder, in_object = waiting.pop()
        if id(holder) in visited:
            continue
        visited.add(id(holder))
        contents = dict(holder) if isinstance(holder, dict) else list(holder)
        if not isinstance(holder, tuple):
            holders.append((holder, contents))
        for value in contents.values() if isinstance(contents, dict) else contents:
            if isinstance(value, (*_CONTAINERS, tuple)):
                waiting.append((value, in_object))
            elif not in_object and hasattr(value, "__dict__") and not callable(value) and not isinstance(value, Tensor):
                waiting.append((vars(value), True))  # a cache, say; what objects in objects hold is left alone
    return holders


def _put_back(holder: Any, contents: Any) -> None:
    """What a container held before, save a module's mode."""
    if isinstance(holder, dict):
        now = dict(holder)
        for key in now.keys() - contents.keys():
            del holder[key]
        for key, value in contents.items():
            if key != "training" and (key not in now or now[key] is not value):
                holder[key] = value
        return
    entries = list(holder)
    if len(entries) != len(contents) or any(one is not other for one, other in zip(entries, contents, strict=True)):
        holder.clear()
        (holder.update if isinstance(holder, set) else holder.extend)(contents)
