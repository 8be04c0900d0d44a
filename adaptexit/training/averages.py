"""Weights averaged along a training, by torch's ``swa_utils``, and batch statistics that fit them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn


def average_of(module: nn.Module, averaging: str | None, decay: float) -> AveragedModel | None:
    """An average of a module's weights and buffers: "ema", with that decay, or "swa"; nothing for None."""
    if averaging is None:
        return None
    rule = get_ema_multi_avg_fn(decay) if averaging == "ema" else get_swa_multi_avg_fn()
    return AveragedModel(module, multi_avg_fn=_of_numbers(rule), use_buffers=True)


def _of_numbers(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule for floats; integers, as indices in buffers, are taken as they are.

    torch rounds their averages down, also where nothing has changed, and its plain average of them fails on a GPU.
    """

    @torch.no_grad()
    def update(averages: Any, values: Any, count: Any) -> None:
        if averages[0].is_floating_point() or averages[0].is_complex():
            rule(averages, values, count)
            return
        for average, value in zip(averages, values, strict=True):
            average.copy_(value)

    return update


def take_statistics_anew(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Put plain means over all batches into the batch norms that are in training mode; others stay as they are.

    torch's ``update_bn`` would renew them all.
    """
    layers = [
        part
        for part in module.modules()
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.training and part.track_running_stats
    ]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    with torch.no_grad():
        for x in batches:
            module(x)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
