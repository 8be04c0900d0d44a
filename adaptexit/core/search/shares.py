"""Thresholds from the share of samples that each exit is to answer, made to fit a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import softmax

from adaptexit.core.frontier import OperatingPoint, ParetoFrontier, evaluate, not_dominated
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.search.methods import geometric_path, quota_policies
from adaptexit.core.search.problem import Problem

Floats = NDArray[np.float64]

_STEEPEST = 1e6
"""Tilt, in units of one over the range of costs, beyond which shares no longer change."""


def matched_shares(shares: ArrayLike, costs: ArrayLike, budget: float) -> Floats:
    """The shares nearest to given ones that cost a budget on average, (K,).

    Of all shares with that mean cost these diverge least (Kullback-Leibler) from the given ones: each is multiplied by
    exp(-t cost), with the one t that fits.

    Parameters
    ----------
    shares : array (K,)
        Above 0, of any sum.
    costs : array (K,)
        Of a sample that each exit answers.
    budget : float
        A mean cost; below the cheapest and above the dearest exit's, all go there.
    """
    logs, price = np.log(np.asarray(shares, dtype=np.float64)), np.asarray(costs, dtype=np.float64)
    low, width = price.min(), np.ptp(price)
    if width == 0:
        return np.asarray(softmax(logs))
    steps = (price - low) / width
    target = (budget - low) / width

    def tilted(t: float) -> Floats:
        return np.asarray(softmax(logs - t * steps))

    def excess(t: float) -> float:
        return float(tilted(t) @ steps - target)

    if excess(_STEEPEST) >= 0:
        return tilted(_STEEPEST)
    if excess(-_STEEPEST) <= 0:
        return tilted(-_STEEPEST)
    return tilted(brentq(excess, -_STEEPEST, _STEEPEST, xtol=1e-12, rtol=1e-14, maxiter=500))


def frontier_of_shares(
    outputs: ExitOutputs, shares: ArrayLike, budgets: Sequence[float], in_use: float
) -> tuple[ParetoFrontier, OperatingPoint]:
    """Operating points at which every exit takes its share of the surest samples that reach it.

    Parameters
    ----------
    outputs : ExitOutputs
    shares : array (K,)
        Of samples that each exit answers; tilted (:func:`matched_shares`) to fit every budget.
    budgets : sequence of float
        Mean relative costs. Shares are rounded up exit by exit and equal scores leave together, so that points cost
        their budget or a little less.
    in_use : float
        A further budget, whose point is returned.

    Returns
    -------
    (ParetoFrontier, OperatingPoint)
        Of the budgets' points those that no other dominates, the plain full model and the point in use.
    """
    problem = Problem.from_outputs(outputs.counted())
    costs = outputs.path_costs(np.ones(outputs.n_exits, dtype=bool)) / outputs.full_cost
    every_budget = [in_use, *(budget for budget in budgets if budget != in_use)]
    quotas = problem.n_samples * np.stack([matched_shares(shares, costs, budget)[:-1] for budget in every_budget])
    policies = quota_policies(problem, quotas, rounded_up=True)
    point, *others = (
        evaluate(outputs, thresholds, cutoffs, {"budget": float(budget)})
        for thresholds, cutoffs, budget in zip(*problem.thresholds(policies), every_budget, strict=True)
    )
    plain = evaluate(outputs, *problem.thresholds(np.zeros(problem.n_early, dtype=np.int64)))
    if plain.cost <= in_use < point.cost:  # the first exit is dearer than the full model
        point = dataclasses.replace(plain, params=point.params)
    points = [point, plain, *others]
    survivors = {0, 1, *not_dominated([p.accuracy for p in points], [p.cost for p in points]).tolist()}
    return ParetoFrontier.of([points[i] for i in sorted(survivors)], outputs), point


def geometric_frontier(outputs: ExitOutputs, n_points: int = 39) -> ParetoFrontier:
    """The operating points of MSDNet's rule on all exits, in rising cost, dominated or not.

    Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification" (ICLR 2018),
    budgeted batch classification: exit k answers a share proportional to q^k, and thresholds are set exit by exit
    where that share of the samples, the surest of those left, ends. Their public code takes q = 0.05, 0.1 ... 1.95.
    Where fewer samples are left than an exit's share, all of them leave; that code then leaves nobody there.

    Parameters
    ----------
    outputs : ExitOutputs
        Of the calibration.
    n_points : int, default=39
        How many q, evenly from 0.05 to 1.95: by default theirs.
    """
    problem = Problem.from_outputs(outputs.counted())
    steps = np.linspace(1, 39, n_points)
    policies = geometric_path(problem, steps.tolist())
    return ParetoFrontier.of(
        (
            evaluate(outputs, thresholds, cutoffs, {"q": float(step) / 20})
            for thresholds, cutoffs, step in zip(*problem.thresholds(policies), steps, strict=True)
        ),
        outputs,
    )
