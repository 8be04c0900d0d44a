"""Rows of carried values whose order the example does not show: do those of one sample lie side by side?

A mask that is the same for all samples looks alike whether it was repeated sample by sample or head by head, but only
from the first can samples be picked. So each sample's rows get values of their own in turn, with which the remaining
stages run: if they are that sample's, the answers for the others stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptexit.exceptions import SplitError
from adaptexit.staging.carried import Along, Carried, Layout, Live, copied, with_leaves
from adaptexit.staging.nested import tensors_in
from adaptexit.staging.verify import N_VERIFIED, leaves_of, rows_of, run_up_to

_LEAK = 1e-3
"""How far answers for other samples may change, relative to the sample's own: kernels that add in any order do so."""

_CHANGED_SHARE = 0.3
"""Share of the whole numbers and flags in a row that get another value: masks that cover everything give NaN."""


def check_row_orders(
    run: Callable[[int, Any], Carried], cuts: Sequence[str], layouts: Sequence[Layout | None], inputs: Tensor
) -> None:
    """Refuse carried values with several rows a sample that may lie in another order than the example shows.

    Parameters
    ----------
    run, cuts, layouts, inputs
        As for :func:`adaptexit.staging.verify.difference_from_model`.

    Raises
    ------
    SplitError
        Where rows of one sample prove to belong to others, or the stages do not run with other values.
    """
    carried: Any = inputs.clone()
    for k, cut in enumerate(cuts):
        carried = run(k, carried)
        per_sample = [m for value, layout in leaves_of(carried.live) if (m := _hidden_rows(value, layout))]
        if not per_sample:
            continue
        problem = (
            f"a value that is carried after the cut {cut!r} has {per_sample[0]} rows a sample, the same for several "
            "samples of the example, so that their order shows only with other values. With such values "
        )
        try:
            leaks = _leaks(run, k, layouts, inputs)
        except Exception as error:
            raise SplitError(
                f"{problem}the model does not run: {str(error).rstrip('.') or type(error).__name__}. Cut elsewhere, or "
                "give an example in which these rows differ."
            ) from error
        if leaks:
            raise SplitError(
                f"{problem}the answers for other samples change: the rows of a sample do not lie side by side (as "
                "repeat_interleave puts them, not repeat), or samples depend on each other. Cut elsewhere, or let the "
                "model make this value in every stage that needs it."
            )


def _hidden_rows(value: Any, layout: Layout) -> int:
    """Rows a sample of a value in which some samples have the same rows; 0 where order cannot matter, or shows."""
    if not isinstance(layout, Along) or layout.per_sample == 1 or not value.numel():
        return 0
    samples = value.movedim(layout.dim, 0).unflatten(0, (-1, layout.per_sample))
    alike = any(torch.equal(one, other) for one, other in combinations(samples, 2))
    return layout.per_sample if alike else 0


def _leaks(run: Callable[[int, Any], Carried], k: int, layouts: Sequence[Layout | None], inputs: Tensor) -> bool:
    """Whether other values in the rows of one sample change the answers for others."""
    usual = _answers_after(run, k, len(layouts), inputs, None)
    for sample in range(N_VERIFIED):
        answers = _answers_after(run, k, len(layouts), inputs, sample)
        everybody = np.arange(N_VERIFIED)
        own, others = (
            max(
                _change(rows_of(one, layout, who), rows_of(other, layout, who))
                for one, other, layout in zip(usual, answers, layouts[k + 1 :], strict=True)
            )
            for who in (everybody[[sample]], np.delete(everybody, sample))
        )
        if others > _LEAK * own:
            return True
    return False


def _answers_after(
    run: Callable[[int, Any], Carried], k: int, n_stages: int, inputs: Tensor, sample: int | None
) -> list[Any]:
    """What the stages after cut k answer where hidden rows of one sample have other values; with None all as it is."""
    carried = run_up_to(run, inputs.clone(), k)
    generator = torch.Generator().manual_seed(0)

    def changed(value: Any, layout: Layout) -> Any:
        if not (isinstance(layout, Along) and _hidden_rows(value, layout)):
            return value
        twin = value.clone()  # also for nobody, so that kernels are the same
        if sample is not None:
            rows = twin.movedim(layout.dim, 0).unflatten(0, (-1, layout.per_sample))[sample]
            rows.copy_(_other_values(rows, value, generator))
        return twin

    live = carried.live
    values = tuple(with_leaves(*pair, changed) for pair in zip(live.values, live.layouts, strict=True))
    carried.live = Live(values, live.layouts, live.n)
    answers = []
    for after in range(k + 1, n_stages):
        carried = run(after, carried)
        answers.append(copied(carried.feature))
    return answers


def _other_values(rows: Tensor, whole: Tensor, generator: torch.Generator) -> Tensor:
    """Rows that differ from these everywhere, or, of whole numbers and flags, in some places at least."""
    if rows.is_floating_point() or rows.is_complex():
        finite = whole[torch.isfinite(whole)].abs()
        spread = float(finite.max()) if finite.numel() else 0.0
        noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
        return rows + ((spread or 1.0) * noise).to(rows)
    numbers = rows.to(torch.int64)
    low, high = (int(number) for number in whole.to(torch.int64).aminmax())
    if rows.dtype == torch.bool:
        low, high = 0, 1
    elif low == high:
        low, high = (low - 1, low) if low > 0 else (low, low + 1)  # as an index the smaller one is safer
    steps = torch.randint(1, high - low + 1, rows.shape, generator=generator).to(numbers)
    places = torch.rand(rows.shape, generator=generator) < _CHANGED_SHARE
    places.view(-1)[int(torch.randint(rows.numel(), (), generator=generator))] = True
    return torch.where(places.to(rows.device), low + (numbers - low + steps) % (high - low + 1), numbers).to(rows)


def _change(one: Any, other: Any) -> float:
    """How far the values of two answers lie apart; inf where their shapes differ or only one is a number."""
    worst = 0.0
    for a, b in zip(tensors_in(one), tensors_in(other), strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel():
            apart = (a.double() - b.double()).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)
            worst = max(worst, float(apart.nan_to_num(nan=float("inf"), posinf=float("inf")).max()))
    return worst
