"""Other people's modules, used without a trace, and settings of the process, held by many threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import mha


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """All modules in evaluation mode; every submodule's own mode and torch's random state are given back afterwards.

    Loaders draw from that state even where they do not shuffle.
    """
    with evaluating_parts(parts_of(modules)):
        yield


def parts_of(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules with all that is inside them, to be looked through more than once; frozen TorchScript has no mode."""
    return [part for module in modules for part in module.modules() if hasattr(part, "training")]


class _Modes:
    """Parts that were in training mode, with how many users keep each in evaluation mode; the last gives it back."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a destructor may run anywhere, and evaluate something
        self.users: dict[nn.Module, int] = {}
        self.given_back = 0  # how often

    def take(self, parts: list[nn.Module]) -> list[nn.Module]:
        """Evaluation mode for all parts; those that are counted now."""
        with self.lock:
            counted = [part for part in parts if part.training or part in self.users]
            for part in counted:
                self.users[part] = self.users.get(part, 0) + 1
                if part.training:
                    part.training = False
        return counted

    def give_back(self, counted: list[nn.Module]) -> None:
        with self.lock:
            for part in counted:
                self.users[part] -= 1
                part.training = not self.users[part]
            self.given_back += 1  # between the two: who sees nobody counted any more sees this, too
            for part in counted:
                if not self.users.get(part, 1):
                    del self.users[part]


_MODES = _Modes()


class evaluating_parts:
    """The same as :func:`evaluating` for parts that were listed before; a class, as that is entered faster.

    Where nothing draws random numbers, their state need not be looked at (``keep_random_state=False``).
    """

    def __init__(self, parts: list[nn.Module], keep_random_state: bool = True) -> None:
        self.parts = parts
        self.keeper = random_state_kept(alone=False) if keep_random_state else None

    def __enter__(self) -> None:
        self.counted: list[nn.Module] = []
        # Nothing is counted where all parts are in evaluation mode by themselves: nobody keeps any part in it now, and
        # nobody has given one back since before they were looked at.
        given_back = _MODES.given_back
        if [1 for part in self.parts if part.training] or _MODES.users or _MODES.given_back != given_back:
            self.counted = _MODES.take(self.parts)
        if self.keeper is not None:
            self.keeper.__enter__()

    def __exit__(self, *_: object) -> None:
        if self.keeper is not None:
            self.keeper.__exit__()
        if self.counted:
            _MODES.give_back(self.counted)


_SEQUENCE = threading.RLock()
_GENERATOR = threading.RLock()
_KEEPERS: list[random_state_kept] = []


class random_state_kept:
    """torch's random state of the CPU, given back after the block, which may begin with a ``seed`` of its own.

    Only one thread at a time is in such a block, so that what it draws is nobody else's; blocks that draw nothing that
    matters need not wait (``alone=False``). The state is given back when no other thread is in a block.

    torch holds the generator's mutex while it makes the tensor of the state. If Python collects garbage just then,
    another thread may run and wait for that mutex with the interpreter's lock in hand: both stand still for good. So
    only one thread at a time looks at the state or sets it.
    """

    def __init__(self, seed: int | None = None, alone: bool = True) -> None:
        self.seed, self.alone = seed, alone

    def __enter__(self) -> None:
        if self.alone:
            _SEQUENCE.acquire()
        with _GENERATOR:
            self.thread, self.state = threading.get_ident(), torch.get_rng_state()
            self.first: Tensor = _KEEPERS[0].first if _KEEPERS else self.state
            _KEEPERS.append(self)
            if self.seed is not None:
                torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        with _GENERATOR:
            _KEEPERS.remove(self)
            if not _KEEPERS:
                torch.set_rng_state(self.first)
            elif self.alone or all(keeper.thread == self.thread for keeper in _KEEPERS):
                torch.set_rng_state(self.state)
        if self.alone:
            _SEQUENCE.release()


class held:
    """A setting of the whole process at a value while anybody needs it so; the last one puts back what was there."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> None:
        self.read, self.write, self.value = read, write, value
        self.lock = threading.RLock()
        self.users = 0

    def __enter__(self) -> None:
        with self.lock:
            if not self.users:
                self.before = self.read()
                self.write(self.value)
            self.users += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                self.write(self.before)


def _precision() -> list[tuple[Any, str, Any]]:
    """What decides on TF32, by backend: its switch and the value that is exact."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision") and hasattr(cudnn, "conv"):  # torch 2.9 and later refuse to mix both
        return [(backend, "fp32_precision", "ieee") for backend in (matmul, cudnn.conv, cudnn.rnn)]
    return [(backend, "allow_tf32", False) for backend in (matmul, cudnn)]


def _set_precision(values: list[Any]) -> None:
    for (backend, switch, _), value in zip(_precision(), values, strict=True):
        setattr(backend, switch, value)


exact_arithmetic = held(
    lambda: [getattr(backend, switch) for backend, switch, _ in _precision()],
    _set_precision,
    [exact for *_, exact in _precision()],
)
"""Convolutions and matrix products in full single precision, where TF32 would differ by batch size."""

unfused_attention = held(mha.get_fastpath_enabled, mha.set_fastpath_enabled, False)
"""Attention operator by operator, as the fused path shows no counter what it does."""


def autocast_in_use(device: torch.device) -> torch.dtype | None:
    """The precision that autocast gives to a device's products and convolutions just now, if any."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
