"""Is a split the model? Its stages against the model itself, on all samples, on one, and on some out of order."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adaptexit.exceptions import DifferenceError, SplitError
from adaptexit.staging.carried import (
    Carried,
    Layout,
    Live,
    Nest,
    Static,
    copied,
    leaves,
    with_written,
    writes_into,
)
from adaptexit.staging.nested import tensors_in

N_VERIFIED = 6
"""Distinct samples on which a split is compared with its model."""

_STAYING = (np.array([5, 1, 3]), np.array([4, 0, 2]))
"""Samples that go on after a cut: no prefix, out of order, and every sample without some others."""

_TOLERANCES = {torch.float16: 3e-2, torch.bfloat16: 3e-2, torch.float32: 1e-4, torch.quint8: 3e-2, torch.qint8: 3e-2}
_DOUBLE = 1e-8
"""Largest difference relative to the largest value, by precision."""


def distinct(example: Any) -> Tensor:
    """Exactly :data:`N_VERIFIED` distinct inputs: the example's first ones, and noisy ones where it has too few."""
    if not isinstance(example, Tensor) or example.ndim < 1 or not len(example):
        kind = f"shape {tuple(example.shape)}" if isinstance(example, Tensor) else f"a {type(example).__name__}"
        raise ValueError(f"example must be a tensor of at least one input, (B, ...); got {kind}.")
    example = example.detach()
    inputs: list[Tensor] = []
    _add_new(inputs, example)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        if len(inputs) == N_VERIFIED:
            break
        _add_new(inputs, _noisy(example[: N_VERIFIED - len(inputs)], example, generator))
    else:
        raise ValueError(
            f"example must have {N_VERIFIED} different inputs, or values to make them from; got shape "
            f"{tuple(example.shape)} with values from {example.min()} to {example.max()}. Give {N_VERIFIED} inputs."
        )
    return _as_channels_last_as(torch.stack(inputs), example)


def _as_channels_last_as(inputs: Tensor, example: Tensor) -> Tensor:
    """The same inputs in the example's memory format, which models may be made for."""
    channels_last = example.ndim == 4 and example.is_contiguous(memory_format=torch.channels_last)
    return inputs.contiguous(memory_format=torch.channels_last) if channels_last else inputs


def _add_new(inputs: list[Tensor], rows: Tensor) -> None:
    for row in rows:
        if len(inputs) < N_VERIFIED and not any(torch.equal(row, other) for other in inputs):
            inputs.append(row)


def shuffled(example: Tensor) -> Tensor:
    """Inputs of the same values in random places, so that what is kept of real data shows none of them."""
    order = torch.randperm(example.numel(), generator=torch.Generator().manual_seed(0)).to(example.device)
    return _as_channels_last_as(example.contiguous().reshape(-1)[order].reshape(example.shape), example)


def _noisy(rows: Tensor, example: Tensor, generator: torch.Generator) -> Tensor:
    """Inputs like ``rows``: with noise of the example's spread, or of integers within its range."""
    if not rows.is_floating_point():
        low, high = (int(v) for v in example.to(torch.int64).aminmax())
        return torch.randint(low, high + 1, rows.shape, generator=generator).to(rows)
    spread = float(example.float().std()) if example.numel() > 1 else 0.0
    return rows + (torch.randn(rows.shape, generator=generator) * (spread or 1.0)).to(rows)


def difference_from_model(
    module: nn.Module,
    run: Callable[[int, Any], Carried],
    cuts: Sequence[str],
    layouts: Sequence[Layout | None],
    inputs: Tensor,
) -> float:
    """Largest difference of the stages from the model: on all samples, on one, and on some out of order after each cut.

    Parameters
    ----------
    module : nn.Module
    run : callable (k, what stage k-1 returned) -> what stage k returns
    cuts : K-1 names
    layouts : of what each stage answers, K; None where samples cannot be told apart in it, which is then not compared
    inputs : tensor of :data:`N_VERIFIED` distinct samples

    Raises
    ------
    DifferenceError
        Where it is larger than rounding explains.
    SplitError
        Where the model's answers cannot be compared.
    """
    last = len(cuts)
    if layouts[last] is None:
        raise SplitError(
            "samples cannot be told apart in what the model returns, so its stages cannot be verified. Wrap the model "
            "so that it returns its answers alone, samples first."
        )
    reference = copied(module(inputs.clone()))
    if not all(torch.isfinite(t).all() for t in tensors_in(reference) if t.is_floating_point()):
        raise SplitError("the model's answers to the example are NaN or infinite, so its stages cannot be verified.")
    features: list[Any] = []
    run_up_to(run, inputs.clone(), last, lambda k, feature: features.append(copied(feature)))
    worst = _difference(features[last], reference, "all stages in a row")
    for k, cut in enumerate(cuts):
        for samples in _STAYING:
            carried = run_up_to(run, inputs.clone(), k)
            carried = carried.taken(samples[:2]).joined([carried.taken(samples[2:])])
            where = f"{len(samples)} of {len(inputs)} samples going on after {cut!r}"
            for after in range(k + 1, last + 1):
                carried = run(after, carried)
                expected = rows_of(features[after], layouts[after], samples)
                worst = max(worst, _difference(carried.feature, expected, where))
    # One sample alone may take other kernels than many: the model does so too, and both must agree.
    alone = run_up_to(run, inputs[:1].clone(), last)
    worst = max(worst, _difference(alone.feature, module(inputs[:1].clone()), "one sample alone"))
    return max(worst, _difference(alone.feature, rows_of(reference, layouts[last], np.array([0])), "one sample alone"))


def with_writes_noted(
    run: Callable[[int, Any], Carried], layouts: Sequence[tuple[Layout, ...]], inputs: Tensor
) -> list[tuple[Layout, ...]]:
    """The layouts of what is carried over each cut, with the static tensors marked that a later stage writes into."""
    if not any(isinstance(layout, (Static, Nest)) for row in layouts for layout in row):
        return list(layouts)
    lives: list[Live] = []
    counts: list[dict[int, int]] = []
    carried: Any = inputs[:2].clone()
    for k in range(len(layouts)):
        carried = run(k, carried)
        lives.append(carried.live)
        counts.append({id(tensor): writes_into(tensor) for tensor in _static_tensors(carried.live)})
    run(len(layouts), carried)
    return [_marked(live, before) for live, before in zip(lives, counts, strict=True)]


def leaves_of(live: Live) -> list[tuple[Any, Layout]]:
    """What lies in carried values once their nests are opened, each with its layout."""
    return [leaf for pair in zip(live.values, live.layouts, strict=True) for leaf in leaves(*pair)]


def _static_tensors(live: Live) -> list[Tensor]:
    return [value for value, layout in leaves_of(live) if isinstance(layout, Static) and isinstance(value, Tensor)]


def _marked(live: Live, before: dict[int, int]) -> tuple[Layout, ...]:
    """Its layouts, with the statics marked that were written into since their writes were counted ``before``."""
    # What was made in inference mode has no count, and may be written into.
    written = {id(t) for t in _static_tensors(live) if t.is_inference() or writes_into(t) != before[id(t)]}
    return tuple(with_written(*pair, written) for pair in zip(live.values, live.layouts, strict=True))


def cause_of_difference(module: nn.Module, layout: Layout | None, inputs: Tensor) -> str:
    """Why stages answer differently from their model, or do not run: found out by running the model without them.

    ``layout`` is that of its answers to ``inputs``.
    """
    answers = copied(module(inputs.clone()))
    if _differs(module(inputs.clone()), answers):
        return (
            "The model answers the same inputs differently each time: it is random in evaluation mode (a generator of "
            "its own, a dropout that is always on), or remembers earlier calls. Take that out of its forward."
        )
    for samples in (*_STAYING, np.array([0])):
        without = f"{len(samples)} of {len(inputs)} samples without the others"
        try:
            differs = _differs(module(inputs[samples].clone()), rows_of(answers, layout, samples))
        except Exception as error:
            return f"The model itself fails on {without} ({said(error)}), so that none may leave."
        if differs:
            return (
                f"In this model samples depend on each other: it answers differently for {without}, so that none may "
                "leave. Cut behind the part that couples them, or change that."
            )
    return (
        "The model itself answers alike in any batch, so either samples are stored in an order that hides them in what "
        "goes on after a cut, or its Python around the cuts does what stages cannot repeat (it asks for the exact type "
        "of a value, say). Cut elsewhere, or give the stages explicitly."
    )


def said(error: Exception) -> str:
    """An error in a message: its type, what it says, and which line of the user's code it comes from."""
    own = [
        frame for frame in traceback.extract_tb(error.__traceback__)
        if not {"torch", "adaptexit"} & set(Path(frame.filename).parts) and not frame.filename.startswith("<")
    ]  # fmt: skip
    line = f" (in {Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line})" if own else ""
    text = str(error).strip().rstrip(".")
    return f"{type(error).__name__}{': ' if text else ''}{text}{line}"


def _differs(got: Any, expected: Any) -> bool:
    try:
        _difference(got, expected, "")
    except DifferenceError:
        return True
    return False


def rows_of(value: Any, layout: Layout | None, samples: NDArray[Any]) -> Any:
    """What stages should answer for some of the samples; None where that cannot be told from the answer for all."""
    return None if layout is None else Live((value,), (layout,), N_VERIFIED).taken(samples).values[0]


def run_up_to(
    run: Callable[[int, Any], Carried],
    carried: Any,
    last: int,
    look: Callable[[int, Any], None] = lambda k, feature: None,
) -> Carried:
    """What stage ``last`` returns, all features shown on the way."""
    for k in range(last + 1):
        carried = run(k, carried)
        look(k, carried.feature)
    return carried


def _difference(got: Any, expected: Any, where: str) -> float:
    """Largest difference relative to the largest value; DifferenceError where it is too large."""
    if expected is None:
        return 0.0
    ours, theirs = list(tensors_in(got)), list(tensors_in(expected))
    if len(ours) != len(theirs):
        raise DifferenceError(
            f"verification failed with {where}: the model returns {len(theirs)} tensors, its stages {len(ours)}."
        )
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        if one.shape != other.shape:
            raise DifferenceError(
                f"verification failed with {where}: shape {tuple(one.shape)}, not the model's {tuple(other.shape)}."
            )
        if not one.numel():
            continue
        a, b = (each.dequantize().double() if each.is_quantized else each.double() for each in (one, other))
        difference = float((a - b).abs().max()) / (float(b.abs().max()) or 1.0)
        if not difference <= _TOLERANCES.get(other.dtype, _DOUBLE):
            raise DifferenceError(
                f"verification failed with {where}: values differ by {difference:.2g} of the largest.", difference
            )
        worst = max(worst, difference)
    return worst
