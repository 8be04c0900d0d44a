"""Is a split the model? Its stages against the model itself, on all samples, on one, and on some out of order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptexit.staging.live import Carried
from adaptexit.staging.rows import tensors_in
from adaptexit.staging.trace import SplitError

N_VERIFIED = 6
"""Distinct samples on which a split is compared with its model."""

TOLERANCE = 1e-4
"""Largest difference, relative to the largest value."""

_LOW_PRECISION = {torch.float16: 3e-2, torch.bfloat16: 3e-2}


def distinct(example: Tensor) -> Tensor:
    """At least :data:`N_VERIFIED` distinct inputs: the example's, and noisy ones where it has too few."""
    if not isinstance(example, Tensor) or example.ndim < 1 or not len(example):
        raise ValueError(f"example must be a tensor of at least one input, (B, ...); got {type(example).__name__}"
                         + (f" of shape {tuple(example.shape)}." if isinstance(example, Tensor) else "."))  # fmt: skip
    example = example.detach()
    kept: list[Tensor] = []
    for row in example:
        if len(kept) < N_VERIFIED and not any(torch.equal(row, other) for other in kept):
            kept.append(row)
    found = torch.stack(kept)
    missing = N_VERIFIED - len(found)
    if missing:
        like = found[torch.arange(missing, device=found.device) % len(found)]
        found = torch.cat([found, noise(like, missing)])
    if len(example) and example.ndim == 4 and example.is_contiguous(memory_format=torch.channels_last):
        return found.contiguous(memory_format=torch.channels_last)
    return found


def noise(like: Tensor, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if not like.is_floating_point():
        low, high = (int(v) for v in like.aminmax())
        return torch.randint(low, max(high, low + n) + 1, like.shape, generator=generator).to(like)
    spread = float(like.float().std()) if like.numel() > 1 else 0.0
    return like + (torch.randn(like.shape, generator=generator) * (spread or 1.0)).to(like)


def difference_from_model(
    module: nn.Module, run: Callable[[int, Any], Carried], cuts: Sequence[str], inputs: Tensor
) -> float:
    """Largest difference of the stages from the model: on all samples, on one, and on some out of order after each cut.

    Parameters
    ----------
    module : nn.Module
    run : callable (k, what stage k-1 returned) -> what stage k returns
    cuts : K-1 names
    inputs : tensor of :data:`N_VERIFIED` distinct samples

    Raises
    ------
    SplitError
        Where it is larger than rounding explains.
    """
    last = len(cuts)
    reference = _copied(module(inputs.clone()))
    if not all(torch.isfinite(t).all() for t in reference if t.is_floating_point()):
        raise SplitError("the model's answers to the example are NaN or infinite, so its stages cannot be verified.")
    worst = 0.0
    seen = []
    carried: Any = inputs.clone()
    for k in range(last + 1):
        carried = run(k, carried)
        seen.append(_copied(carried.feature))
    worst = max(worst, _difference(seen[-1], reference, "all stages in a row"))
    alone: Any = inputs[:1].clone()
    for k in range(last + 1):
        alone = run(k, alone)
    worst = max(worst, _difference(alone.feature, module(inputs[:1].clone()), "one sample alone"))
    chosen = np.array([5, 1, 3])
    for k, cut in enumerate(cuts):
        carried = inputs.clone()
        for before in range(k + 1):
            carried = run(before, carried)
        carried = carried.taken(chosen[:2]).joined([carried.taken(chosen[2:])])
        for after in range(k + 1, last + 1):
            carried = run(after, carried)
            where = f"{len(chosen)} of {len(inputs)} samples going on after {cut!r}"
            worst = max(worst, _difference(carried.feature, _rows_of(seen[after], chosen, len(inputs)), where))
    return worst


def _copied(value: Any) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors_in(value)]


def _rows_of(tensors: list[Tensor], chosen: Any, n: int) -> list[Tensor | None]:
    """The chosen samples of tensors that have them along their first axis; None for the others."""
    index = torch.from_numpy(chosen)
    return [t[index.to(t.device)] if t.ndim and len(t) == n else None for t in tensors]


def _difference(got: Any, expected: Any, where: str) -> float:
    """Largest difference relative to the largest value; SplitError where it is too large."""
    got = list(tensors_in(got))
    expected = expected if isinstance(expected, list) else list(tensors_in(expected))
    if len(got) != len(expected):
        raise SplitError(
            f"verification failed with {where}: the model returns {len(expected)} tensors, its stages {len(got)}."
        )
    worst = 0.0
    for one, other in zip(got, expected, strict=True):
        if other is None:
            continue
        if one.shape != other.shape:
            raise SplitError(
                f"verification failed with {where}: shape {tuple(one.shape)}, not the model's {tuple(other.shape)}. "
                "Its samples depend on each other, or are stored in an order that hides them; cut elsewhere."
            )
        if not one.numel():
            continue
        a, b = one.double(), other.double()
        scale = float(b.abs().max()) or 1.0
        difference = float((a - b).abs().max()) / scale
        if not difference <= _LOW_PRECISION.get(other.dtype, TOLERANCE):
            raise SplitError(
                f"verification failed with {where}: values differ by {difference:.2g} of the largest. In this model "
                "samples depend on each other, or it is random in evaluation mode, so that none may leave; cut "
                "elsewhere, or give the stages explicitly."
            )
        worst = max(worst, difference)
    return worst
