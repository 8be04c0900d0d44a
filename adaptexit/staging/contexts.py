"""Other people's modules, used without a trace."""

from __future__ import annotations

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
    """Modules with all that is inside them, to be looked through more than once."""
    return [part for module in modules for part in module.modules()]


class evaluating_parts:
    """The same as :func:`evaluating` for parts that were listed before; a class, as that is entered faster."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.training = [part for part in parts if part.training]

    def __enter__(self) -> None:
        for part in self.training:
            part.training = False
        self.state = torch.get_rng_state()

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.state)
        for part in self.training:
            part.training = True


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
