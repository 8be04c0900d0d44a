"""What joint training minimises: one loss an exit, of labels and of a teacher, and how much each exit counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.mixup import Mixup
from torch import Tensor
from torch.nn import functional as F

EARLIEST_WEIGHT = 0.01
"""Of early exits when "scheduled" weights begin to rise."""


def exit_losses(
    answers: Sequence[Tensor], target: Tensor, teacher: Tensor | None, *, settings: dict[str, Any], n_samples: float
) -> Tensor:
    """(1 - a) CE + a T^2 KL(teacher || exit) of each exit, (K,): sums over the batch divided by ``n_samples``.

    Parameters
    ----------
    answers : K tensors of logits (B, C)
    target : class indices (B,), or probabilities (B, C)
    teacher : logits (B, C), or None
        None with ``settings["teacher"] == "last"`` is the last answer, which then learns from labels alone.
    settings : dict
        ``teacher``, ``distillation`` (a), ``temperature`` (T) and ``label_smoothing``.
    n_samples : float
        What sums are divided by: B, or what makes the mean over processes the mean over all their samples.
    """
    own = settings["teacher"] == "last"
    if own:
        teacher = answers[-1].detach()
    share, temperature = settings["distillation"], settings["temperature"]
    losses = []
    for k, logits in enumerate(answers):
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        a = 0.0 if teacher is None or (own and k == len(answers) - 1) else share
        loss = logits.new_zeros(())
        if a < 1:
            smoothing = settings["label_smoothing"] if target.ndim == 1 else 0.0  # mixed targets are smooth already
            loss = (1 - a) * F.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing)
        if a > 0 and teacher is not None:
            log_probabilities = F.log_softmax(logits / temperature, dim=1)
            teacher_log_probabilities = F.log_softmax(teacher.to(logits.dtype) / temperature, dim=1)
            loss = loss + a * temperature**2 * F.kl_div(
                log_probabilities, teacher_log_probabilities, reduction="sum", log_target=True
            )
        losses.append(loss / n_samples)
    return torch.stack(losses)


def exit_weights(weights: Any, relative_costs: NDArray[np.float64]) -> Callable[[float], NDArray[np.float64]]:
    """From the share of the training that is over (0 to 1) to what each of K exits counts.

    Parameters
    ----------
    weights : "equal", "rising", "scheduled" or K numbers
        As for :class:`adaptexit.training.recipes.JointRecipe`.
    relative_costs : array (K,)
        What a sample costs that leaves at each exit, the full model's being 1.
    """
    n_exits = len(relative_costs)
    if isinstance(weights, str):
        if weights == "scheduled":
            last = np.append(relative_costs[:-1], 1.0)
            first = np.append(np.full(n_exits - 1, EARLIEST_WEIGHT), 1.0)
            return lambda over: first + (last - first) * over
        fixed = np.ones(n_exits) if weights == "equal" else np.arange(1, n_exits + 1) / n_exits
    else:
        fixed = np.asarray(weights, dtype=np.float64)
        if fixed.shape != (n_exits,) or not np.isfinite(fixed).all() or (fixed < 0).any() or not fixed.any():
            raise ValueError(
                f"weights must be {n_exits} numbers, one an exit, the full model last, none negative and one above 0; "
                f"got {weights!r}."
            )
    return lambda over: fixed


def mixed(mixup: Mixup | None, x: Tensor, target: Tensor, smoothing: float, n_classes: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets after timm's Mixup or CutMix; an odd sample, which has no partner, stays as it is."""
    if mixup is None or len(x) < 2:
        return x, target
    even = len(x) // 2 * 2
    blended, probabilities = mixup(x[:even].clone(), target[:even])
    if even < len(x):
        off = smoothing / n_classes
        alone = torch.full_like(probabilities[:1], off)
        alone[0, target[-1]] += 1.0 - smoothing
        blended, probabilities = torch.cat([blended, x[even:]]), torch.cat([probabilities, alone])
    return blended, probabilities


def mixup_of(settings: dict[str, Any], n_classes: int) -> Mixup | None:
    """timm's Mixup and CutMix as the settings ask for them."""
    if not (settings["mixup"] or settings["cutmix"]):
        return None
    return Mixup(
        mixup_alpha=settings["mixup"], cutmix_alpha=settings["cutmix"], label_smoothing=settings["label_smoothing"],
        num_classes=n_classes,
    )  # fmt: skip
