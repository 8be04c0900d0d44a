"""The searches: each proposes policies for a list of targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from adaptexit.core.search.problem import COST_UNIT, Policy, Problem, blocks
from adaptexit.core.search.targets import Targets, Weighted, WithinBudget, WithinDrop, broken

Floats = NDArray[np.float64]
Policies = NDArray[np.int64]
Search = Callable[[Problem, Targets], Policies]

_FAR = 2**62
"""Beyond every sum."""

MOST_EXHAUSTIVE = 3
"""Early exits up to which every subset of exits that cost something is tried."""


def pick(problem: Problem, targets: Targets, candidates: Policies) -> Policies:
    """For every target the best of the candidates, shape (T, K-1)."""
    return candidates[targets.best(problem, *problem.values(candidates))[0]]


def _subsets(problem: Problem) -> Iterator[NDArray[np.bool_]]:
    """Sets of early exits to commit to: one where exits are free, all where few cost something."""
    if problem.free:
        yield problem.allowed
        return
    for exits in product((True, False), repeat=problem.n_early):
        if any(exits):
            yield np.array(exits)


# -- exact -------------------------------------------------------------------------------------------------------------


def exact(problem: Problem, targets: Targets) -> Policies:
    """The optimum for every target, over all thresholds of one early exit (O(N log N)) or of two (O(N^2)).

    Exits that cost something are switched off where that is better.
    """
    if problem.n_early > 2:
        raise ValueError(f"search='exact' needs at most 3 exits; got {problem.n_early + 1}. Use 'coord' for more.")
    optima = []
    for exits in _subsets(problem):
        sunk = problem.committed(exits)
        if np.count_nonzero(exits) == 1:
            optima.append(_exact_one(sunk, int(np.flatnonzero(exits)[0]), targets))
        else:
            optima.append(_exact_two(sunk, targets))
    return optima[0] if len(optima) == 1 else pick(problem, targets, np.unique(np.concatenate(optima), axis=0))


def _exact_one(problem: Problem, k: int, targets: Targets) -> Policies:
    """The best prefix of exit k for every target, everybody passing it and the others being switched off."""
    n = problem.n_samples
    ends = np.append(0, problem.ends[k])
    gain = np.append(0, np.cumsum((problem.quality[k] - problem.quality[-1])[problem.order[k]]))[ends]
    # Longer prefixes are cheaper: one is worth keeping where it beats every longer one.
    best_longer = np.append(np.maximum.accumulate(gain[::-1])[::-1][1:], gain.min() - 1)
    worthwhile = gain > best_longer
    quality, ends = problem.full_quality + gain[worthwhile] * problem.quality_unit, ends[worthwhile]
    paths = np.cumsum(problem.stage_costs + problem.exit_costs) * COST_UNIT
    leaving = problem.prefix_sizes[k][ends]
    cost = leaving * paths[k] + (n - leaving) * paths[-1]
    policies = np.zeros((len(targets), problem.n_early), dtype=np.int64)
    policies[:, k] = ends[targets.best(problem, quality, cost)[0]]
    return policies


def _exact_two(problem: Problem, targets: Targets) -> Policies:
    """The best pair of prefixes for every target, both exits being run by everybody who reaches them.

    In whole units: among equally accurate pairs the cheapest is taken, among equally cheap ones the most accurate.
    """
    n = problem.n_samples
    first_q, second_q, last_q = problem.quality
    paths = np.cumsum(problem.stage_costs + problem.exit_costs)
    budgets = np.floor((targets.budgets * n + 1e-9 * n) / COST_UNIT).clip(-_FAR, _FAR).astype(np.int64)
    floors = (problem.full_quality - targets.drops * n - 1e-9 * n) / problem.quality_unit
    floors = np.ceil(floors).clip(-_FAR, _FAR).astype(np.int64)
    budgets_q, budgets_c = np.full(len(budgets), -_FAR), np.full(len(budgets), _FAR)
    floors_q, floors_c = np.full(len(floors), -_FAR), np.full(len(floors), _FAR)
    at_budget, at_floor = (np.zeros((len(limits), 2), dtype=np.int64) for limits in (budgets, floors))
    gain_all = (second_q - last_q)[problem.order[1]]
    rank_all = problem.rank[0][problem.order[1]]
    each = 1 if problem.weights is None else problem.weights[problem.order[1]]
    gain_first = last_q.sum() + np.append(0, np.cumsum((first_q - last_q)[problem.order[0]]))
    ends = np.append(0, problem.ends[1])
    for leaving in np.append(0, problem.ends[0]):
        reach = rank_all >= leaving
        quality = gain_first[leaving] + np.append(0, np.cumsum(gain_all * reach))[ends]
        stops, first = np.append(0, np.cumsum(reach * each))[ends], problem.prefix_sizes[0][leaving]
        cost = first * paths[0] + (n - first) * paths[2] - stops * (paths[2] - paths[1])
        cost = cost if problem.weights is None else np.rint(cost).astype(np.int64)
        # Longer prefixes of the second exit are cheaper: a budget leaves those from some length on, whose best quality
        # falls with that length, so that a floor leaves those up to some length. Both are found by binary search.
        from_here_on = np.maximum.accumulate(quality[::-1])[::-1]
        shortest = np.searchsorted(-cost, -budgets)
        attained = np.append(from_here_on, -_FAR)[shortest]
        rivals = np.flatnonzero((attained >= budgets_q) & (shortest < len(cost)))
        # The longest prefix of that quality is the cheapest; those as cheap differ in nobody who comes as far.
        cheapest = cost[np.searchsorted(-from_here_on, -attained[rivals], side="right") - 1]
        better = (attained[rivals] > budgets_q[rivals]) | (cheapest < budgets_c[rivals])
        rivals, cheapest = rivals[better], cheapest[better]
        budgets_q[rivals], budgets_c[rivals] = attained[rivals], cheapest
        at_budget[rivals, 0], at_budget[rivals, 1] = leaving, ends[np.searchsorted(-cost, -cheapest)]
        longest = np.searchsorted(-from_here_on, -floors, side="right") - 1
        better = (cost[longest] < floors_c) | ((cost[longest] == floors_c) & (quality[longest] > floors_q))
        better &= longest >= 0
        floors_q[better], floors_c[better] = quality[longest][better], cost[longest][better]
        at_floor[better, 0], at_floor[better, 1] = leaving, ends[longest[better]]
    return np.concatenate([at_budget, at_floor])


# -- coordinate search -------------------------------------------------------------------------------------------------


def coord(problem: Problem, targets: Targets, n_weights: int = 28) -> Policies:
    """Exact one-dimensional scans, exit by exit to a fixed point, over cost weights; then repair for every target.

    The published geometric rule's policies are among the starting points of the repair, so no target is served worse
    than by that rule.
    """
    proposals = [np.zeros((1, problem.n_early), dtype=np.int64)]
    if problem.free or problem.n_early <= MOST_EXHAUSTIVE:
        for exits in _subsets(problem):
            sunk = problem.committed(exits)
            proposals += [_weighted_path(sunk, n_weights)[1], geometric_path(sunk)]
    else:
        # Too many subsets: start from all exits run, then let every scan weigh an exit against its own cost.
        sunk = problem.committed(problem.allowed)
        weights, policies = _weighted_path(sunk, n_weights)
        proposals += [policies, geometric_path(sunk)]
        for weight, policy in zip(weights, policies, strict=True):
            objective = Weighted(weight)
            proposals.append(_drop_exits(problem, problem.settle(policy, objective)[0], objective)[None])
    candidates = np.unique(np.concatenate(proposals), axis=0)
    merits = targets.merits(problem, *problem.values(candidates))
    return np.stack(
        [
            _repair(problem, objective, candidates, merits_here)
            for objective, merits_here in zip(targets.objectives(problem), merits, strict=True)
        ]
    )


def _weighted_path(problem: Problem, n_weights: int) -> tuple[list[float], Policies]:
    """Cost weights in falling order and a policy for each; exits are free or their cost is sunk.

    Half of the weights lie on a geometric grid around the average price of accuracy, from cost alone to accuracy alone;
    the others go where neighbouring policies differ most in accuracy and cost.
    """
    nothing = np.zeros(problem.n_early, dtype=np.int64)

    def settled(weight: float, start: Policy) -> Policy:
        return problem.priced(weight).settle(start, Weighted(0.0))[0]

    cheapest = float(problem.stage_costs[0] + problem.exit_costs[0]) * COST_UNIT
    loss = abs(problem.full_quality - int(problem.quality[0].sum()) * problem.quality_unit) / problem.n_samples
    price = loss / max(1.0 - cheapest, 1e-3)
    grid = max(price, 1.0 / problem.n_samples) * np.geomspace(30.0, 3e-3, max(n_weights // 2, 2))
    weights: list[float] = grid.tolist()
    policies: list[Policy] = []
    for weight in weights:
        policies.append(settled(weight, policies[-1] if policies else nothing))
    values = np.stack(problem.values(np.stack(policies)), axis=1)
    spread = np.maximum(np.ptp(values, axis=0), 1e-9)
    while len(weights) < n_weights:
        gaps = np.abs(np.diff(values, axis=0) / spread).sum(axis=1)
        i = int(np.argmax(gaps * (np.diff(np.log(weights)) < -1e-3)))
        weight = float(np.sqrt(weights[i] * weights[i + 1]))
        policy = settled(weight, policies[i])
        weights.insert(i + 1, weight)
        policies.insert(i + 1, policy)
        values = np.insert(values, i + 1, np.concatenate(problem.values(policy[None])), axis=0)
    return weights, np.stack(policies)


def _drop_exits(problem: Problem, policy: Policy, objective: Weighted) -> Policy:
    """Switch off, one by one, the exit whose loss costs least while the objective rises after the rest adapts."""
    best = float(objective(*problem.values(policy[None]))[0])
    while (policy > 0).any():
        on = np.flatnonzero(policy > 0)
        without = np.tile(policy, (len(on), 1))
        without[np.arange(len(on)), on] = 0
        start = without[int(np.argmax(objective(*problem.values(without))))]
        fewer, value = problem.settle(start, objective)
        if value <= best + 1e-9 * max(1.0, abs(best)):
            break
        policy, best = fewer, value
    return policy


def _repair(problem: Problem, objective: WithinBudget | WithinDrop, candidates: Policies, merits: Floats) -> Policy:
    """The nearest candidate beyond the target, scanned to a fixed point under it; else the best that keeps it.

    ``merits`` (P,) is what the objective gives for the candidates.
    """
    nearest = int(np.argmax(merits))
    beyond = broken(merits, problem.n_samples)
    if beyond.any():
        policy, merit = problem.settle(candidates[int(np.argmax(np.where(beyond, merits, -np.inf)))], objective)
        if merit > merits[nearest]:
            return policy
    return problem.settle(candidates[nearest], objective)[0]


# -- published and small-sample rules ----------------------------------------------------------------------------------


def geometric(problem: Problem, targets: Targets) -> Policies:
    """MSDNet's rule: exit rates proportional to (p/20)^k for p = 1 ... 39, thresholds on those left.

    Where fewer samples are left than an exit's quota, all of them leave; MSDNet's public code then leaves nobody there.
    """
    return _by_subsets(problem, targets, geometric_path)


def geometric_path(problem: Problem, points: Sequence[float] = range(1, 40), *, rounded_up: bool = False) -> Policies:
    """The policies of MSDNet's rule for the p of ``points``, shape (P, K-1), on the exits allowed.

    The rule rounds quotas down, which depends on how many samples there are; rounded up, copies of all samples change
    nothing. By weight there is no whole number to round to: a quota ends with the sample that fills it.
    """
    exits = np.flatnonzero(problem.allowed)
    shares = (np.array(points)[:, None] / 20.0) ** np.arange(len(exits) + 1)
    quotas = np.zeros((len(points), problem.n_early))
    quotas[:, exits] = (problem.n_samples * shares / shares.sum(axis=1, keepdims=True))[:, :-1]
    return quota_policies(problem, quotas, rounded_up=rounded_up)


def quota_policies(problem: Problem, numbers: Floats, *, rounded_up: bool = False) -> Policies:
    """Policies (P, K-1) at which every exit takes its quota of the surest samples that reach it, or all of fewer.

    An exit with the quota 0 is switched off. Equal scores leave together, which may be more than the quota. Numbers
    (P, K-1) are rounded to whole quotas, or where samples have weights taken as they are.
    """
    size: Any = np.int32
    if problem.weights is not None:
        quotas, size = np.maximum(numbers - 1e-6, 0.0), np.float64
    else:
        quotas = (np.ceil(numbers - 1e-6) if rounded_up else np.floor(numbers)).astype(np.int64)
    policies = np.zeros(quotas.shape, dtype=np.int32)  # as ranks are
    for block in blocks(len(quotas), problem.n_samples):
        alive = np.ones((len(quotas[block]), problem.n_samples), dtype=bool)
        for k in np.flatnonzero(quotas[block].any(axis=0)):
            arriving = alive.take(problem.order[k], axis=1)
            if problem.weights is not None:
                arriving = arriving * problem.weights[problem.order[k]]
            arrivals = np.cumsum(arriving, axis=1, dtype=size)
            quota = np.minimum(quotas[block, k], arrivals[:, -1]).astype(size)
            last = (arrivals < quota[:, None]).argmin(axis=1)  # where the quota's last sample stands
            ends = problem.ends[k]
            policies[block, k] = np.where(quota > 0, ends[np.searchsorted(ends, last + 1)], 0)
            alive &= problem.rank[k] >= policies[block, k, None]
    return policies.astype(np.int64)


def shared(problem: Problem, targets: Targets) -> Policies:
    """One threshold for all exits on P(correct), estimated at each exit by isotonic regression: for small samples."""
    return _by_subsets(problem, targets, shared_path)


def shared_path(problem: Problem, n_levels: int = 200) -> Policies:
    """One policy for each of up to ``n_levels`` levels of the shared threshold, shape (L, K-1)."""
    exits = np.flatnonzero(problem.allowed)
    estimates = {}
    for k in exits:  # one value a tie, so that the order within it cannot matter
        starts = np.append(0, problem.ends[k][:-1])
        lengths = np.diff(problem.ends[k], prepend=0)
        sizes = np.diff(problem.prefix_sizes[k][problem.ends[k]], prepend=0)
        means = np.add.reduceat(problem.quality[k][problem.order[k]], starts) / sizes
        estimates[k] = np.repeat(isotonic_regression(means, weights=sizes, increasing=False).x, lengths)
    levels = np.unique(np.concatenate([np.append(x, -np.inf) for x in estimates.values()]))
    if len(levels) > n_levels:
        levels = levels[np.linspace(0, len(levels) - 1, n_levels).round().astype(int)]
    policies = np.zeros((len(levels), problem.n_early), dtype=np.int64)
    for k in exits:  # the estimates fall: those above a level come first
        policies[:, k] = np.searchsorted(-estimates[k], -levels, side="left")
    return policies


def _by_subsets(problem: Problem, targets: Targets, path: Callable[[Problem], Policies]) -> Policies:
    """A rule applied to every subset of the exits (few), or to fewer and fewer of them (many), picked by target."""
    nothing = np.zeros((1, problem.n_early), dtype=np.int64)
    if problem.free or problem.n_early <= MOST_EXHAUSTIVE:
        paths = [path(problem.committed(exits)) for exits in _subsets(problem)]
        return pick(problem, targets, np.unique(np.concatenate([nothing, *paths]), axis=0))
    exits = problem.allowed
    candidates = np.concatenate([nothing, path(problem.committed(exits))])
    values = problem.values(candidates)
    merit = _merit(problem, targets, values)
    while np.count_nonzero(exits) > 1:
        trials = []
        for k in np.flatnonzero(exits):
            fewer = exits & (np.arange(problem.n_early) != k)
            more = path(problem.committed(fewer))
            quality, cost = (np.append(old, new) for old, new in zip(values, problem.values(more), strict=True))
            trials.append((_merit(problem, targets, (quality, cost)), fewer, more, (quality, cost)))
        best, fewer, more, values_with = max(trials, key=lambda trial: trial[0])
        if best <= merit:
            break
        exits, merit = fewer, best
        candidates, first = np.unique(np.concatenate([candidates, more]), axis=0, return_index=True)
        values = values_with[0][first], values_with[1][first]
    return candidates[targets.best(problem, *values)[0]]


def _merit(problem: Problem, targets: Targets, values: tuple[Floats, Floats]) -> float:
    """How well candidates of given values serve all targets: the sum of what each objective gives for its best."""
    return float(np.sum(targets.best(problem, *values)[1]))
