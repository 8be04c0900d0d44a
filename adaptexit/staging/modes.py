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
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Convolutions and matrix products in full single precision on GPUs, where TF32 would differ by batch size."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def autocast_in_use(device: torch.device) -> torch.dtype | None:
    """The precision that autocast gives to a device's products and convolutions just now, if any."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
