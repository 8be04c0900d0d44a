"""One hooked run of a model: what every module returns, what it has cost by then, and what is still needed after it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from adaptexit.staging.cost import counted_macs
from adaptexit.staging.formulas import flop_counter
from adaptexit.staging.nested import Rows, n_rows, storages, tensors_in

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Call:
    """One return of a module. The same value at the same time, counted in operations, is one group.

    ``works``: it has MACs and no parts; ``holds_work``: MACs within its parts.
    """

    name: str
    time: int
    group: int
    macs: float
    works: bool
    holds_work: bool
    shape: Any
    is_tensor: bool
    storages: frozenset[int]


class Scan:
    """One run of a module: every return in it, and what each leaves alive."""

    def __init__(self, module: nn.Module, example: Rows) -> None:
        self.module = module
        self.info = _feature_info(module)
        self.calls: list[Call] = []
        self.n_calls: dict[str, int] = {}
        self._last: tuple[int, list[Tensor]] = (-1, [])
        self._group = 0
        self._n = n_rows(example)
        self._flow = _Dataflow(example)
        try:
            with _without_gradients(module):
                self.macs, _ = counted_macs(self._run, example)
        except Exception as error:
            error.add_note(
                f"This is {type(module).__name__}, run on an example of shape {_shape(example, 0)} to find its cuts. "
                "Give the batch of inputs that it takes as example."
            )
            raise

    def _run(self, example: Rows) -> None:
        macs_at_entry: dict[str, float] = {}
        with self._flow, flop_counter() as counter:

            def enter(name: str, output: Any = None) -> None:
                macs_at_entry[name] = counter.get_total_flops() / 2 / self._n

            def leave(name: str, output: Any) -> None:
                self._record(name, output, counter.get_total_flops() / 2 / self._n, macs_at_entry[name])

            names = [name for name, _ in _parts(self.module)]
            with _hooked(self.module, names, leave, enter):
                output = self.module(example)
        results = list(tensors_in(output))
        self._flow.keep(results)
        last = self._last[1]
        same = storages(results) == storages(last) and sum(map(Tensor.numel, results)) == sum(map(Tensor.numel, last))
        self._own_output = self._group if same else -1
        self._last = (-1, [])

    def _record(self, name: str, output: Any, macs: float, macs_before: float) -> None:
        self.n_calls[name] = self.n_calls.get(name, 0) + 1
        time_, tensors = self._flow.time, list(tensors_in(output))
        if (time_, list(map(id, tensors))) != (self._last[0], list(map(id, self._last[1]))):
            self._group += 1
        self._last = time_, tensors  # kept alive, so that its identity stays its own
        works, leaf = macs > macs_before, not self.module.get_submodule(name)._modules
        work = (works and leaf, works and not leaf)
        shape = _shape(output, self._n)
        is_tensor = len(tensors) == 1 and tensors[0].shape[:1] == (self._n,)
        self.calls.append(Call(name, time_, self._group, macs, *work, shape, is_tensor, storages(tensors)))

    def once(self) -> list[Call]:
        """Modules called exactly once, but for those that return the model's own output."""
        return [c for c in self.calls if self.n_calls[c.name] == 1 and c.group != self._own_output]

    def structural(self) -> list[Call]:
        """What a person would cut at, one name for each amount of work done."""
        once = [call for call in self.once() if 0 < call.macs < self.macs]
        narrow = {call.name for call in once if self.is_narrow(call)}
        outer, stages = set(_outer(self.module)), self._stages(narrow)
        best: dict[float, tuple[tuple[Any, ...], Call]] = {}
        for order, call in enumerate(once):
            name = call.name
            free = name in narrow and all(above in stages for above in ancestors(name))
            if free or name in self.info or (name in outer and call.holds_work):
                plain = name in narrow and call.is_tensor
                rank = (plain, name in self.info, call.holds_work, -name.count("."), order)
                if call.macs not in best or rank > best[call.macs][0]:
                    best[call.macs] = rank, call
        return [call for _, call in sorted(best.values(), key=lambda value: value[0][-1])]

    def _stages(self, narrow: set[str]) -> set[str]:
        """Modules whose parts are blocks: containers, and what holds narrow siblings of one class with real work.

        Real work is two modules with MACs; an expansion convolution with its norm is no block.
        """
        workers = [call.name for call in self.calls if call.works]
        stages = {name for name, part in self.module.named_modules() if isinstance(part, CONTAINERS)}
        for name, part in self.module.named_modules():
            prefix = name + "." if name else ""
            kinds = [
                type(child)
                for child_name, child in part.named_children()
                if (path := prefix + child_name) in narrow and sum(w.startswith(path + ".") for w in workers) > 1
            ]
            if name and len(kinds) > len(set(kinds)):
                stages |= {name, *ancestors(name)}
        return stages

    def is_narrow(self, call: Call) -> bool:
        return self._flow.alive(call.time) <= call.storages


class _Dataflow(TorchDispatchMode):
    """When each storage computed from the input was made and last read, counted in operations.

    Weak references keep the addresses of freed storages from being used again.
    """

    def __init__(self, example: Rows) -> None:
        super().__init__()
        self.time = 0
        self._made: dict[int, int] = {}
        self._read: dict[int, float] = {}
        self._references: list[StorageWeakRef] = []
        for tensor in tensors_in(example):
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self.time += 1
        inputs = storages(tensors_in((args, kwargs))) & self._made.keys()
        self._read |= dict.fromkeys(inputs, self.time)
        if inputs:  # what no input of the model had a part in, such as a mask, can be made again in any stage
            for tensor in tensors_in(output):
                self._add(tensor)
        return output

    def _add(self, tensor: Tensor) -> None:
        for storage in storages([tensor]) - self._made.keys():
            self._references.append(StorageWeakRef(tensor.untyped_storage()))
            self._made[storage] = self.time

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """What the model returns is needed to the end."""
        self._read |= dict.fromkeys(storages(tensors) & self._made.keys(), float("inf"))

    def alive(self, time_: int) -> set[int]:
        """Storages made up to a time and read later."""
        return {key for key, last in self._read.items() if self._made[key] <= time_ < last}


def _shape(value: Any, n: int) -> Any:
    """Shape without the axis of the n samples (all axes for n = 0), nested like the value."""
    if isinstance(value, Tensor):
        first, *rest = value.shape or (n,)
        if first == n or not value.ndim:
            return tuple(rest)
        return (first // n, *rest) if n and first % n == 0 else (first, *rest)
    if isinstance(value, dict):
        return {key: _shape(part, n) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        shapes = [_shape(part, n) for part in value]
        return shapes if isinstance(value, list) else tuple(shapes)
    return type(value).__name__


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Submodules that can carry hooks, each under its first name."""
    opaque: tuple[str, ...] = ()  # prefixes of what lies inside TorchScript
    for name, part in module.named_modules():
        if not name or name.startswith(opaque):
            continue
        if isinstance(part, torch.jit.ScriptModule):
            opaque += (name + ".",)
        else:
            yield name, part


@contextmanager
def _hooked(
    module: nn.Module,
    names: Iterable[str],
    leave: Callable[[str, Any], None],
    enter: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Functions called when modules return (and are entered) in this thread; taken off again whatever happens.

    Nothing is put into the modules, which another thread may copy or pickle meanwhile.
    """
    thread = threading.get_ident()
    names_of: dict[nn.Module, list[str]] = {}
    for name in names:
        names_of.setdefault(module.get_submodule(name), []).append(name)

    def entered(part: nn.Module, inputs: Any) -> None:
        if enter is not None and threading.get_ident() == thread:
            for name in names_of.get(part, ()):
                enter(name)

    def returned(part: nn.Module, inputs: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            for name in names_of.get(part, ()):
                leave(name, output)

    handles = [register_module_forward_pre_hook(entered), register_module_forward_hook(returned)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    """No parameter requires gradients: the counter's module tracker fails on views of those that do (cait's token)."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad = False
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad = True


def latencies(module: nn.Module, example: Rows, names: Sequence[str], repeats: int) -> NDArray[np.float64]:
    """Median seconds a sample until each module returns, in order, and until the end, shape (len(names) + 1,)."""
    tensors = [*tensors_in(example), *module.parameters()]
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    times: list[float] = []

    def stop(*_: Any) -> None:
        for device in devices:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())

    runs = []
    with torch.inference_mode(False), torch.no_grad(), _hooked(module, names, stop):
        for _ in range(repeats + 1):
            times.clear()
            stop()
            module(example)
            stop()
            runs.append(np.diff(times).cumsum())
    return np.median(runs[1:], axis=0) / n_rows(example)


def _outer(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of a module's children, and of theirs where they are plain containers."""
    for name, child in module.named_children():
        yield prefix + name
        if type(child) in CONTAINERS:
            yield from _outer(child, f"{prefix}{name}.")


def _feature_info(module: nn.Module) -> set[str]:
    """Names of modules in timm's feature_info; some are those of no module."""
    info = getattr(module, "feature_info", None)
    info = getattr(info, "info", info)
    if not isinstance(info, (list, tuple)):
        return set()
    return {entry["module"] for entry in info if isinstance(entry, dict) and isinstance(entry.get("module"), str)}


def ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
