"""The default search: for every budget a policy that spends it, found with less noise than counting has.

Choosing the policy that looks best on the calibration data chooses luck as well, and does so the more, the fewer the
samples and the more alike the exits. Three things are done against it (benchmarks/small_calibration.py measures them):

- what a sample is worth at an exit is a mixture of what it was and of the isotonic estimate of P(right) given the
  exit's own score; the more samples, the more counts what was;
- policies are moved towards those of the geometric rule, which chooses nothing; the fewer samples, the farther;
- the price of a unit of cost runs on below 0, where cost is bought for its own sake: so the policies lead from the
  cheapest exit to the full model without a gap, and a budget is spent even where the data do not say what it is for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.search.methods import MOST_EXHAUSTIVE, Policies, geometric_path
from adaptexit.core.search.problem import COST_UNIT, Problem, in_units
from adaptexit.core.search.targets import Weighted

Floats = NDArray[np.float64]

MOST_SEARCHED = 10_000
"""Samples that thresholds are searched on, drawn from more: what they give, and cost, is counted on all."""

_HALF_COUNTED = 5_000
"""Samples at which what was and what is estimated count alike."""

_QUARTER_MOVED = 1_000
"""Samples at which policies go a quarter of the way to the geometric rule's."""

_PRICES = np.concatenate([np.geomspace(30.0, 3e-3, 20), -np.geomspace(3e-3, 30.0, 8)])
"""Prices of a unit of cost, in units of the average one: what the full model gains over the first exit."""

_RATIOS = np.geomspace(0.02, 20.0, 60) * 20
"""Of the geometric rule: its p, from almost everybody at the first exit to almost nobody at an early one."""

_DENSE = 300
"""Policies that a path is followed through."""

_HALVINGS = 6
"""Steps in which positions are fitted to their budgets on many samples; twice as many on few."""


def described(n_exits: int, n_samples: int, effective_size: float | None = None) -> str:
    """What the search does with K exits and N samples, in words; by weight they may be worth fewer."""
    if n_exits <= 2:
        return "one early exit: as many of the surest samples leave as a budget needs"
    n: float = min(n_samples, MOST_SEARCHED)
    of_many = f"searched on {n} of {n_samples} samples" if n < n_samples else f"{n} samples"
    if effective_size is not None and effective_size < n_samples:
        n *= effective_size / n_samples
        of_many += f" that by weight are worth {n:.0f}"
    return f"{of_many}: qualities are {_counted(n):.0%} counted, policies {_moved(n):.0%} the geometric rule's"


def _counted(n_samples: float) -> float:
    """Share of what was in what a sample is worth; the rest is estimated."""
    return n_samples / (n_samples + _HALF_COUNTED)


def _moved(n_samples: float) -> float:
    """Share of the way to the geometric rule's policies."""
    return (_QUARTER_MOVED / (n_samples + _QUARTER_MOVED)) ** 2


def spend(outputs: ExitOutputs, problem: Problem, budgets: Sequence[float], random_state: int = 0) -> Policies:
    """For every budget a policy that costs it, or a little less: shape (B, K-1).

    Parameters
    ----------
    outputs : ExitOutputs
        Without samples of weight 0.
    problem : Problem
        Of these outputs.
    budgets : sequence of B floats
        Mean relative costs, from the cheapest policy's to 1.
    random_state : int
        Seed of the draw of samples to search on, where there are more than ``MOST_SEARCHED``.
    """
    wanted = np.asarray(budgets, dtype=np.float64)
    if problem.n_early == 1:
        return _prefixes(problem, wanted)
    few, sample = outputs, problem
    if outputs.n_samples > MOST_SEARCHED:
        chosen = np.random.default_rng(random_state).choice(outputs.n_samples, MOST_SEARCHED, replace=False)
        few = outputs.take(np.sort(chosen))
        sample = Problem.from_outputs(few)
    estimate = _estimated(few, sample)
    positions = _of_best_exits(estimate, wanted)
    if sample is not problem:
        positions = problem.moved(positions, sample)
    policies = _fitted(problem, positions, wanted)
    # On few samples a set of exits may be taken that is dearer than its budget for anybody.
    policies[problem.costs(policies) / problem.n_samples > wanted + 1e-9] = cheapest(problem)
    return policies


def _prefixes(problem: Problem, budgets: Floats) -> Policies:
    """With one early exit, the shortest prefixes of its surest samples that budgets allow: (B, 1); none from 1 on."""
    sunk = problem.committed(np.ones(1, dtype=bool))
    leaving, staying = np.cumsum(sunk.stage_costs + sunk.exit_costs) * COST_UNIT
    ends = problem.ends[0]
    left = problem.prefix_sizes[0][ends]
    cost = left * leaving + (problem.n_samples - left) * staying
    shortest = np.searchsorted(-cost, -(budgets + 1e-9) * problem.n_samples)
    lengths = ends[np.minimum(shortest, len(ends) - 1)]
    return np.where(budgets >= 1 - 1e-9, 0, lengths)[:, None]


def cheapest(problem: Problem) -> Policies:
    """The policy (1, K-1) at which everybody leaves at the exit that costs least."""
    everybody = np.diag(np.full(problem.n_early, problem.n_samples))
    return everybody[np.argsort(problem.costs(everybody), kind="stable")[:1]]


def _estimated(outputs: ExitOutputs, problem: Problem) -> Problem:
    """The problem with qualities that are partly estimated from the scores."""
    trust = _counted(problem.effective_size)
    quality, sizes = problem.quality * problem.quality_unit, problem.weights
    for k, scores in enumerate(outputs.scores):
        if scores.min() == scores.max():
            continue  # tells nothing: the full model of a log may come without scores
        _, of_sample = np.unique(scores, return_inverse=True)
        numbers = np.bincount(of_sample, weights=sizes)
        means = np.bincount(of_sample, weights=quality[k]) / numbers
        estimates = isotonic_regression(means, weights=numbers).x[of_sample]
        quality[k] = trust * quality[k] + (1 - trust) * (estimates if sizes is None else sizes * estimates)
    units, unit = in_units(quality)
    return dataclasses.replace(problem, quality=units, quality_unit=unit)


# -- which exits to switch on ------------------------------------------------------------------------------------------


def _of_best_exits(problem: Problem, budgets: Floats) -> Floats:
    """For every budget the positions (B, K-1) of the best set of exits.

    All sets are tried where exits cost something and are few; where they are many, one after the other is left out, the
    most useless first and down to one: of two that are no use, each alone may look as if it had to stay. Where exits
    are free, all are on.
    """
    everything = np.ones(problem.n_early, dtype=bool)
    best = _Best(problem, budgets)
    if problem.free:
        best.offer(everything)
    elif problem.n_early <= MOST_EXHAUSTIVE:
        for some in sorted(product((True, False), repeat=problem.n_early), key=sum, reverse=True)[:-1]:
            best.offer(np.array(some))
    else:
        exits = everything
        best.offer(exits)
        while np.count_nonzero(exits) > 1:
            trials = [exits & (np.arange(problem.n_early) != k) for k in np.flatnonzero(exits)]
            exits = trials[int(np.argmax([best.offer(fewer) for fewer in trials]))]
    return best.positions


class _Best:
    """The best positions that were offered for every budget, by estimated quality; of equals the last."""

    def __init__(self, problem: Problem, budgets: Floats) -> None:
        self.problem, self.budgets = problem, budgets
        self.positions: Floats = np.zeros((len(budgets), problem.n_early))
        self.merits = np.full(len(budgets), -np.inf)

    def offer(self, exits: NDArray[np.bool_]) -> float:
        """Try a set of exits; the mean quality of its policies, that of the worst exit where they are too dear."""
        positions = _curve(self.problem.committed(exits), self.budgets)
        quality, cost = self.problem.values(self.problem.snap(positions))
        n = self.problem.n_samples
        # Too dear is worse than any quality; a little too dear is set right in the end.
        excess = np.maximum(cost / n - self.budgets - 2e-3 - 1 / n, 0.0)
        merits = quality / n - np.where(excess > 0, 1e6 * (1 + excess), 0.0)
        better = merits >= self.merits
        self.positions[better], self.merits[better] = positions[better], merits[better]
        worst = self.problem.quality.sum(axis=1).min() * self.problem.quality_unit
        return float(np.where(excess > 0, worst, quality).mean()) / n


# -- from cheap to dear ------------------------------------------------------------------------------------------------


def _curve(problem: Problem, budgets: Floats) -> Floats:
    """Positions (B, K-1) of a problem whose exits are committed to, at every budget."""
    on = np.flatnonzero(problem.allowed)
    everybody = np.zeros((1, problem.n_early), dtype=np.int64)
    everybody[0, on[0]] = problem.n_samples
    nobody = np.zeros_like(everybody)
    pull = 1.0 if len(on) == 1 else _moved(problem.effective_size)  # a prefix of one exit is told by its cost
    if pull < 1:
        by_scans = _between(problem, np.concatenate([everybody, _priced_path(problem), nobody]), budgets)
        if pull < 0.01:
            return by_scans
    rule = geometric_path(problem, _RATIOS.tolist())
    by_rule = _between(problem, np.concatenate([everybody, rule, nobody]), budgets)
    if pull == 1:
        return by_rule
    return _fitted(problem, (1 - pull) * by_scans + pull * by_rule, budgets).astype(np.float64)


def _priced_path(problem: Problem) -> Policies:
    """The policies that are best at falling prices of cost, each found from the one before."""
    full, first = problem.quality[-1].sum(), problem.quality[int(np.flatnonzero(problem.allowed)[0])].sum()
    average = max(abs(int(full - first)) * problem.quality_unit, 1.0) / problem.n_samples
    average /= max(1.0 - float(problem.stage_costs[0] + problem.exit_costs[0]) * COST_UNIT, 1e-3)
    policies: list[NDArray[np.int64]] = [np.zeros(problem.n_early, dtype=np.int64)]
    for price in (average * _PRICES).tolist():
        policies.append(problem.priced(price).settle(policies[-1], Weighted(0.0), max_sweeps=4)[0])
    return np.stack(policies[1:])


def _between(problem: Problem, curve: Policies, budgets: Floats) -> Floats:
    """Positions (B, K-1) that cost the budgets, interpolated along policies (P, K-1)."""
    cost = problem.costs(curve)
    order = np.argsort(cost, kind="stable")
    steps = np.linspace(cost[order[0]], cost[order[-1]], _DENSE)
    dense = _interpolated(steps, cost[order], curve[order])
    # Costs are not linear between policies: counted once more on the dense ones, they nearly are.
    dense_cost = np.maximum.accumulate(problem.costs(problem.snap(dense)) / problem.n_samples)
    return _interpolated(budgets, dense_cost + 1e-12 * np.arange(len(dense)), dense)


def _interpolated(at: Floats, cost: Floats, positions: NDArray[np.number]) -> Floats:
    return np.stack([np.interp(at, cost, column) for column in positions.T], axis=1)


# -- to the budget -----------------------------------------------------------------------------------------------------


def _fitted(problem: Problem, positions: Floats, budgets: Floats) -> Policies:
    """Policies near positions (B, K-1) that cost the budgets or less, and spend of them what exits allow.

    Positions are stretched or shrunk together: the farther, the more samples leave early and the cheaper. Where even
    that everybody leaves at the first of the exits is too dear, that is what is returned.
    """
    n = problem.n_samples
    policies = problem.snap(positions)
    cost = problem.costs(policies) / n
    # Interpolated positions nearly cost their budgets: it is near them that the cost is looked for.
    reach = np.clip(8 * np.abs(cost - budgets), 4 / n, 0.5)
    within = cost <= budgets + 1e-9
    ranges = np.where(within, -reach, 0.0), np.where(within, 0.0, reach)
    halvings = _HALVINGS if n > MOST_SEARCHED else 2 * _HALVINGS
    best, enclosed = _halved(problem, positions, policies, cost, budgets, ranges, halvings)
    if not enclosed.all():  # ties are in the way, or so few leave that stretching moves next to nobody
        rest = ~enclosed
        far = np.full(np.count_nonzero(rest), np.log(n))
        ranges = np.where(within[rest], -far, 0.0), np.where(within[rest], 0.0, far)
        best[rest], _ = _halved(
            problem, positions[rest], best[rest], problem.costs(best[rest]) / n, budgets[rest], ranges, 2 * _HALVINGS
        )
    return best


def _halved(
    problem: Problem,
    positions: Floats,
    policies: Policies,
    cost: Floats,
    budgets: Floats,
    ranges: tuple[Floats, Floats],
    halvings: int,
) -> tuple[Policies, NDArray[np.bool_]]:
    """The dearest policies within their budgets that halving ranges (B,) of log stretch meets; else ``policies``.

    Returns
    -------
    (policies, enclosed)
        Policies (B, K-1), and whether some were within the budget and others not: else it may lie outside the range.
    """
    n, (low, high) = problem.n_samples, ranges
    best, limits = policies.copy(), budgets + 1e-9
    spent = np.where(cost <= limits, cost, -np.inf)
    too_dear = cost > limits
    for _ in range(halvings):
        guess = (low + high) / 2
        tried = problem.snap(np.where(positions > 0, np.clip(positions * np.exp(guess)[:, None], 1, n), 0))
        cost = problem.costs(tried) / n
        within = cost <= limits
        too_dear |= ~within
        better = within & (cost > spent)
        best[better], spent[better] = tried[better], cost[better]
        low, high = np.where(within, low, guess), np.where(within, guess, high)
    return best, too_dear & np.isfinite(spent)
