"""What a run leaves in a module besides its modes: attributes, what its containers hold, tensors written into."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (dict, list, set, deque)
_HOOKS = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
"""What every module has, and no forward fills: some fifteen dicts a part need not be looked into."""


@contextmanager
def state_restored(module: nn.Module) -> Iterator[None]:
    """Put back what the block changes in a module, parameters excepted, which are too large to be copied beforehand.

    What did not change is not touched, as other threads may use it. Modes are their users' business
    (:class:`adaptexit.staging.contexts.evaluating_parts`).
    """
    holders = [(holder, _contents(holder)) for holder in _holders(module)]
    values = [value for _, contents in holders for value in _entries(contents)]
    tensors = {id(value): value for value in [*values, *module.buffers()] if _may_be_written(value)}
    copies = [(tensor, _version(tensor), tensor.detach().clone()) for tensor in tensors.values()]
    try:
        yield
    finally:
        for holder, contents in holders:
            _put_back(holder, contents)
        with torch.no_grad():
            for tensor, version, copied in copies:
                if _version(tensor) != version or (tensor.is_inference() and not torch.equal(tensor, copied)):
                    tensor.detach().copy_(copied)


def _holders(module: nn.Module) -> Iterator[Any]:
    """Attributes of a module's parts, of objects that these hold, and all containers in them."""
    parts = list(module.modules())
    classes = {cls for part in parts for cls in type(part).__mro__ if cls.__module__.partition(".")[0] != "torch"}
    waiting: list[tuple[Any, bool]] = [(vars(part), False) for part in parts]
    waiting += [(value, True) for cls in classes for value in vars(cls).values() if isinstance(value, _CONTAINERS)]
    seen: set[int] = set()
    while waiting:
        holder, in_object = waiting.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        if not isinstance(holder, tuple):
            yield holder
        for value in _entries(_contents(holder)):
            if isinstance(value, (*_CONTAINERS, tuple)):
                waiting.append((value, in_object))
            elif not in_object and hasattr(value, "__dict__") and not callable(value) and not isinstance(value, Tensor):
                waiting.append((vars(value), True))  # a cache, say; what objects in objects hold is left alone


def _contents(holder: Any) -> Any:
    """A copy of a container, made in one go; without a module's mode."""
    if isinstance(holder, dict):
        return {key: value for key, value in dict(holder).items() if key != "training"}
    return list(holder)


def _entries(contents: Any) -> Iterable[Any]:
    if isinstance(contents, dict):
        return [value for key, value in contents.items() if key not in _HOOKS]
    return contents


def _put_back(holder: Any, contents: Any) -> None:
    now = _contents(holder)
    if isinstance(holder, dict):
        for key in now.keys() - contents.keys():
            del holder[key]
        for key, value in contents.items():
            if key not in now or now[key] is not value:
                holder[key] = value
    elif len(now) != len(contents) or any(one is not other for one, other in zip(now, contents, strict=True)):
        holder.clear()
        (holder.update if isinstance(holder, set) else holder.extend)(contents)


def _may_be_written(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
