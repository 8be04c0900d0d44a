"""The optimizer of joint training, and what sets its rates step by step."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, StepLRScheduler
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

FALLS_AT = (0.5, 0.75)
"""Parts of the training after which "multistep" divides the rates by ten, as for residual and dense networks."""


def optimizer_for(settings: dict[str, Any], network: list[nn.Parameter], heads: list[nn.Parameter]) -> Any:
    """The optimizer of the settings, with a group for the network and one for the heads where there are any."""
    groups = [{"params": network, "lr": settings["lr"]}]
    if heads:
        groups.append({"params": heads, "lr": settings["head_lr"]})
    if callable(settings["optimizer"]):
        optimizer = settings["optimizer"](groups)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must return a torch Optimizer; got {type(optimizer).__name__}.")
        return optimizer
    # timm's "sgd" is Nesterov's, which torch refuses without a momentum.
    plain = settings["optimizer"].lower() == "sgd" and not settings["momentum"]
    name = "momentum" if plain else settings["optimizer"]
    return create_optimizer_v2(
        groups, name, lr=settings["lr"], weight_decay=settings["weight_decay"],
        momentum=settings["momentum"], filter_bias_and_bn=False,
    )  # fmt: skip


def schedule_for(optimizer: Any, settings: dict[str, Any], steps_per_epoch: int) -> Any:
    """What sets the rates before the first step and after every one."""
    total = steps_per_epoch * settings["epochs"]
    if settings["scheduler"] == "onecycle":
        cycles = "betas" in optimizer.defaults or bool(optimizer.defaults.get("momentum"))
        rates = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, rates, total_steps=total + 1, cycle_momentum=cycles)
    warmup = {"warmup_t": min(round(settings["warmup_epochs"] * steps_per_epoch), total - 1), "warmup_lr_init": 0.0}
    if settings["scheduler"] == "constant":
        schedule: Any = StepLRScheduler(optimizer, decay_t=total + 1, decay_rate=1.0, t_in_epochs=False, **warmup)
    elif settings["scheduler"] == "multistep":
        steps = [round(share * total) + 1 for share in FALLS_AT]  # timm's fall a step before the one that is named
        schedule = MultiStepLRScheduler(
            optimizer, steps, decay_rate=0.1, warmup_prefix=False, t_in_epochs=False, **warmup
        )  # fmt: skip
    else:
        length = total - warmup["warmup_t"]
        schedule = CosineLRScheduler(optimizer, t_initial=length, warmup_prefix=True, t_in_epochs=False, **warmup)
    schedule.step_update(0)
    return schedule
