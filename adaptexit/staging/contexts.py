"""Other people's modules, used without a trace."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


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


class evaluating_parts:
    """The same as :func:`evaluating` for parts that were listed before; a class, as that is entered faster.

    Where nothing draws random numbers, their state need not be looked at (``keep_random_state=False``).
    """

    def __init__(self, parts: list[nn.Module], keep_random_state: bool = True) -> None:
        self.training = [part for part in parts if part.training]
        self.keeper = random_state_kept() if keep_random_state else None

    def __enter__(self) -> None:
        for part in self.training:
            part.training = False
        if self.keeper is not None:
            self.keeper.__enter__()

    def __exit__(self, *_: object) -> None:
        if self.keeper is not None:
            self.keeper.__exit__()
        for part in self.training:
            part.training = True


_GENERATOR = threading.RLock()


class random_state_kept:
    """torch's random state of the CPU, given back after the block, which may begin with a ``seed`` of its own.

    torch holds the generator's mutex while it makes the tensor of the state. If Python collects garbage just then,
    another thread may run and wait for that mutex with the interpreter's lock in hand: both stand still for good. So
    only one thread at a time looks at the state or sets it.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        with _GENERATOR:
            self.state = torch.get_rng_state()
            if self.seed is not None:
                torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        with _GENERATOR:
            torch.set_rng_state(self.state)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Convolutions and matrix products in full single precision, where TF32 would differ by batch size."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    backends: list[Any] = [matmul, cudnn]
    switch: str = "allow_tf32"
    exact: Any = False
    if hasattr(matmul, "fp32_precision") and hasattr(cudnn, "conv"):  # torch 2.9 and later refuse to mix both
        backends, switch, exact = [matmul, cudnn.conv, cudnn.rnn], "fp32_precision", "ieee"
    before = [getattr(backend, switch) for backend in backends]
    for backend in backends:
        setattr(backend, switch, exact)
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            setattr(backend, switch, value)


def autocast_in_use(device: torch.device) -> torch.dtype | None:
    """The precision that autocast gives to a device's products and convolutions just now, if any."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
