"""Which weights a count of multiply-accumulates leaves out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from adaptexit.staging.formulas import is_packed
from adaptexit.staging.nested import storages, tensors_in

_NO_MACS = (
    "cat", "clone", "copy", "embedding", "flip", "gather", "index", "mean", "norm", "pad", "quantize", "repeat", "roll",
    "softmax", "stack", "sum", "upsample",
)  # fmt: skip
"""Parts of the names of operators that read weights and multiply no matrices, beside the element-wise ones."""


@dataclass
class _Frame:
    """A module that is being called, the matrices among its own weights, and what has read them."""

    module: nn.Module
    parameters: frozenset[int]
    weights: frozenset[int]
    is_counted: bool = False
    is_read: bool = False
    unknown: dict[str, None] = field(default_factory=dict)


Finding = tuple[nn.Module | None, str | None]
"""A module and the operator that reads its weights, either as far as it is known."""


class UncountedWeights(TorchDispatchMode):
    """Watches for weights that go where the counter does not follow, on the thread that enters it.

    ``findings`` are operators without a formula that read matrices of a module, or packed weights; and leaves with
    matrices that no operator has read while none was counted: extensions that torch does not dispatch. Vectors and
    element-wise work are no multiply-accumulates.
    """

    supports_higher_order_operators = True

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.findings: dict[Finding, None] = {}
        self._counted = counter.flop_registry
        self._frames: list[_Frame] = []

    def __enter__(self) -> UncountedWeights:
        self._thread = threading.get_ident()
        self._hooks = [register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave)]
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = getattr(func, "_overloadpacket", func)
        if operator in self._counted:
            for frame in self._frames:
                frame.is_counted = True
        elif any(
            is_packed(value)
            for value in (*args, *kwargs.values())
            if isinstance(value, (torch.ScriptObject, list, tuple))
        ):
            self.findings[self._frames[-1].module if self._frames else None, str(operator)] = None
        elif any(frame.weights for frame in self._frames) and not getattr(func, "is_view", False):
            inputs = storages(tensors_in((args, kwargs)))
            for frame in self._frames:
                if inputs & frame.weights:
                    frame.is_read = True
                    if not _without_macs(func):
                        frame.unknown[str(operator)] = None
        return func(*args, **kwargs)

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        parameters = buffers = frozenset[int]()
        if module._parameters:
            parameters = storages(_matrices_of(module.parameters(recurse=False)))
        if module._buffers:
            buffers = storages(_matrices_of(module.buffers(recurse=False)))
        self._frames.append(_Frame(module, parameters, parameters | buffers))

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        frame = self._frames.pop()
        self.findings |= {(module, operator): None for operator in frame.unknown}
        is_leaf = next(module.children(), None) is None
        if is_leaf and frame.parameters and not (frame.is_counted or frame.is_read):
            self.findings[module, None] = None


def _matrices_of(tensors: Iterator[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for tensor in tensors if not is_lazy(tensor) and sum(size > 1 for size in tensor.shape) > 1]


def _without_macs(func: Any) -> bool:
    if getattr(func, "namespace", None) != "aten":
        return False
    return torch.Tag.pointwise in func.tags or any(part in func.__name__ for part in _NO_MACS)
