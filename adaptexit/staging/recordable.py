"""What torch.fx cannot record of a forward's Python by itself: checks of types, functions that must stay in one piece.

Where names lead is changed in the files that the ancestors of cuts come from, while they are traced; who is not traced
gets from these names what he always got.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy, _symbolic_trace

_EINOPS = ("rearrange", "reduce", "repeat", "einsum", "pack", "unpack", "parse_shape")


def record_more(parts: Iterable[nn.Module]) -> None:
    """Called while torch.fx traces, which gives all names back at its end."""
    patcher: Any = _symbolic_trace.CURRENT_PATCHER
    parts = list(parts)
    einops: Any = sys.modules.get("einops")  # a model that uses it has imported it
    whole = [function for name in _EINOPS if callable(function := getattr(einops, name, None))]
    replacements: dict[int, Any] = {id(each): _in_one_piece(each) for each in whole}
    replacements[id(torch.is_tensor)] = _told_is_tensor
    files = [*_files(parts), *([vars(einops)] if einops else [])]
    for names in files:
        patcher.patch(names, "isinstance", told_isinstance)
    patcher.patch(vars(torch), "is_tensor", _told_is_tensor)
    for names in [*files, *map(vars, parts)]:
        for name, value in list(names.items()):
            if type(value) is torch.jit.ScriptFunction:
                patcher.patch(names, name, _in_one_piece(value))
            elif id(value) in replacements:
                patcher.patch(names, name, replacements[id(value)])


def _in_one_piece(function: Any) -> Callable[..., Any]:
    """A function that is recorded where a proxy is given to it."""

    def target(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        proxy = _symbolic_trace._find_proxy(args, kwargs)
        return (
            function(*args, **kwargs)
            if proxy is None
            else proxy.tracer.create_proxy("call_function", target, args, kwargs)
        )

    target.__name__ = recorded.__name__ = function.__name__
    return recorded


def compiled_functions_inlined() -> Any:
    """Within it, compiled functions are traced as what they were compiled from."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes seconds
        return nullcontext()
    return torch._dynamo.config.patch(error_on_nested_fx_trace=False)  # type: ignore[no-untyped-call]


def told_isinstance(obj: Any, kinds: Any) -> bool:
    """Whether a value is of some type, where it is traced: whether what it stands for is.

    A proxy may not pretend to be a tensor by its ``__class__``, as torch's C++ would then take it for one.
    """
    if isinstance(obj, kinds):
        return True
    return issubclass(type(obj), Proxy) and isinstance(obj.tracer.values[obj.node][0], kinds)


def _told_is_tensor(obj: Any) -> bool:
    return told_isinstance(obj, Tensor)


def _files(parts: Iterable[nn.Module]) -> Iterator[dict[str, Any]]:
    """Names of the files that the Python of modules lies in, and of those that it takes functions from."""
    own: dict[int, dict[str, Any]] = {}
    for part in parts:
        forward: Callable[..., Any] = getattr(part.forward, "__func__", part.forward)
        classes = [vars(sys.modules[cls.__module__]) for cls in type(part).__mro__ if cls.__module__ in sys.modules]
        own |= {id(names): names for names in [*classes, getattr(forward, "__globals__", {})] if not _foreign(names)}
    helpers: dict[int, dict[str, Any]] = {}
    for names in own.values():
        package = str(names.get("__name__")).partition(".")[0]
        for value in list(names.values()):
            if isinstance(value, FunctionType):
                helpers[id(value.__globals__)] = value.__globals__
            elif isinstance(value, ModuleType) and value.__name__.partition(".")[0] == package:
                helpers[id(vars(value))] = vars(value)
    yield from (names for names in (own | helpers).values() if not _foreign(names))


def _foreign(names: dict[str, Any]) -> bool:
    """Whether a file is Python's, torch's or this package's, which trace nothing of the user's."""
    package = str(names.get("__name__", "builtins")).partition(".")[0]
    return package in ("torch", "adaptexit", "numpy") or package in sys.stdlib_module_names
