"""The searches: each proposes policies for a list of targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from adaptexit.core.search.problem import COST_UNIT, Policy, Problem
from adaptexit.core.search.targets import Target, Weighted

Policies = NDArray[np.int64]
Search = Callable[[Problem, Sequence[Target]], Policies]

MOST_EXHAUSTIVE = 3
"""Early exits up to which every subset of exits that cost something is tried."""


def pick(problem: Problem, targets: Sequence[Target], candidates: Policies) -> Policies:
    """For every target the best of the candidates, shape (T, K-1)."""
    quality, cost = problem.values(candidates)
    chosen = [int(np.argmax(_objective(problem, target)(quality, cost))) for target in targets]
    return candidates[chosen]


def _objective(problem: Problem, target: Target):  # type: ignore[no-untyped-def]
    return target.objective(problem.n_samples, problem.full_quality)


def _subsets(problem: Problem) -> Iterator[NDArray[np.bool_]]:
    """Sets of early exits to commit to: one where exits are free, all where few cost something."""
    if problem.free:
        yield problem.allowed
        return
    for chosen in product((True, False), repeat=problem.n_early):
        if any(chosen):
            yield np.array(chosen)


# -- exact -------------------------------------------------------------------------------------------------------------


def exact(problem: Problem, targets: Sequence[Target]) -> Policies:
    """The optimum for every target, over all thresholds of one early exit (O(N log N)) or of two (O(N^2)).

    Exits that cost something are switched off where that is better.
    """
    if problem.n_early > 2:
        raise ValueError(f"search='exact' needs at most 3 exits; got {problem.n_early + 1}. Use 'coord' for more.")
    found = []
    for exits in _subsets(problem):
        sunk = problem.committed(exits)
        if np.count_nonzero(exits) == 1:
            found.append(_exact_one(sunk, int(np.flatnonzero(exits)[0]), targets))
        else:
            found.append(_exact_two(sunk, targets))
    return found[0] if len(found) == 1 else pick(problem, targets, np.unique(np.concatenate(found), axis=0))


def _exact_one(problem: Problem, k: int, targets: Sequence[Target]) -> Policies:
    """The best prefix of exit k for every target, everybody passing it and the others being switched off."""
    n = problem.n_samples
    ends = np.append(0, problem.ends[k])
    gain = np.append(0, np.cumsum((problem.quality[k] - problem.quality[-1])[problem.order[k]]))[ends]
    # Longer prefixes are cheaper: one is worth keeping where it beats every longer one.
    best_longer = np.append(np.maximum.accumulate(gain[::-1])[::-1][1:], gain.min() - 1)
    kept = gain > best_longer
    quality, ends = problem.full_quality + gain[kept] * problem.quality_unit, ends[kept]
    paths = np.cumsum(problem.stage_costs + problem.exit_costs) * COST_UNIT
    cost = ends * paths[k] + (n - ends) * paths[-1]
    policies = np.zeros((len(targets), problem.n_early), dtype=np.int64)
    policies[:, k] = [ends[int(np.argmax(_objective(problem, target)(quality, cost)))] for target in targets]
    return policies


def _exact_two(problem: Problem, targets: Sequence[Target]) -> Policies:
    """The best pair of prefixes for every target, both exits being run by everybody who reaches them."""
    n = problem.n_samples
    first_q, second_q, last_q = problem.quality * problem.quality_unit
    paths = np.cumsum(problem.stage_costs + problem.exit_costs) * COST_UNIT
    budgets = np.array([t.budget for t in targets if t.budget is not None]) * n + 1e-9 * n
    floors = np.array([problem.full_quality - t.max_drop * n for t in targets if t.max_drop is not None]) - 1e-9 * n
    best_q, at_budget = np.full(len(budgets), -np.inf), np.zeros((len(budgets), 2), dtype=np.int64)
    best_c, at_floor = np.full(len(floors), np.inf), np.zeros((len(floors), 2), dtype=np.int64)
    gain_all = (second_q - last_q)[problem.order[1]]
    rank_all = problem.rank[0][problem.order[1]]
    left_q = np.append(0.0, np.cumsum((first_q - last_q)[problem.order[0]]))
    ends = np.append(0, problem.ends[1])
    for leaving in np.append(0, problem.ends[0]):
        reach = rank_all >= leaving
        quality = problem.full_quality + left_q[leaving] + np.append(0.0, np.cumsum(gain_all * reach))[ends]
        stops = np.append(0, np.cumsum(reach))[ends]
        cost = leaving * paths[0] + (n - leaving) * paths[2] - stops * (paths[2] - paths[1])
        from_here_on = np.maximum.accumulate(quality[::-1])[::-1]  # best quality of this prefix or a longer one
        cheap_enough = np.searchsorted(-cost, -budgets)
        for j in np.flatnonzero(cheap_enough < len(ends)):
            if from_here_on[cheap_enough[j]] > best_q[j]:
                best_q[j] = from_here_on[cheap_enough[j]]
                at_budget[j] = leaving, ends[cheap_enough[j] + int(np.argmax(quality[cheap_enough[j] :]))]
        longest = np.searchsorted(-from_here_on, -floors, side="right") - 1
        for j in np.flatnonzero(longest >= 0):
            if cost[longest[j]] < best_c[j]:
                best_c[j], at_floor[j] = cost[longest[j]], (leaving, ends[longest[j]])
    return np.concatenate([at_budget, at_floor])


# -- coordinate search -------------------------------------------------------------------------------------------------


def coord(problem: Problem, targets: Sequence[Target], n_weights: int = 28) -> Policies:
    """Exact one-dimensional scans, exit by exit to a fixed point, over cost weights; then repair for every target.

    The published geometric rule's policies are among the starting points of the repair, so no target is served worse
    than by that rule.
    """
    found = [np.zeros((1, problem.n_early), dtype=np.int64)]
    if problem.free or problem.n_early <= MOST_EXHAUSTIVE:
        for exits in _subsets(problem):
            committed = problem.committed(exits)
            found += [_weighted_path(committed, n_weights)[1], geometric_path(committed)]
    else:
        # Too many subsets: start from all exits run, then let every scan weigh an exit against its own cost.
        committed = problem.committed(problem.allowed)
        weights, policies = _weighted_path(committed, n_weights)
        found += [policies, geometric_path(committed)]
        for weight, policy in zip(weights, policies, strict=True):
            objective = Weighted(weight)
            found.append(_drop_exits(problem, problem.settle(policy, objective)[0], objective)[None])
    candidates = np.unique(np.concatenate(found), axis=0)
    quality, cost = problem.values(candidates)
    return np.stack([_repair(problem, target, candidates, quality, cost) for target in targets])


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
    weights: list[float] = []
    policies: list[Policy] = []
    values: list[tuple[float, float]] = []
    for weight in grid:
        weights.append(float(weight))
        policies.append(settled(weights[-1], policies[-1] if policies else nothing))
        values.append(problem.value(policies[-1]))
    spread = np.maximum(np.ptp(np.array(values), axis=0), 1e-9)
    while len(weights) < n_weights:
        gaps = np.abs(np.diff(np.array(values), axis=0) / spread).sum(axis=1)
        i = int(np.argmax(gaps * (np.diff(np.log(weights)) < -1e-3)))
        weight = float(np.sqrt(weights[i] * weights[i + 1]))
        policy = settled(weight, policies[i])
        weights.insert(i + 1, weight)
        policies.insert(i + 1, policy)
        values.insert(i + 1, problem.value(policy))
    return weights, np.stack(policies)


def _drop_exits(problem: Problem, policy: Policy, objective: Weighted) -> Policy:
    """Switch off, one by one, the exit whose loss costs least while the objective rises after the rest adapts."""
    best = float(objective(*problem.value(policy)))
    while (policy > 0).any():
        trials = []
        for k in np.flatnonzero(policy > 0):
            without = policy.copy()
            without[k] = 0
            trials.append((float(objective(*problem.value(without))), without))
        adapted, value = problem.settle(max(trials, key=lambda trial: trial[0])[1], objective)
        if value <= best + 1e-9 * max(1.0, abs(best)):
            break
        policy, best = adapted, value
    return policy


def _repair(
    problem: Problem, target: Target, candidates: Policies, quality: NDArray[np.float64], cost: NDArray[np.float64]
) -> Policy:
    """The nearest candidate beyond the target, scanned to a fixed point under it; else the best that keeps it."""
    objective = _objective(problem, target)
    values = objective(quality, cost)
    nearest = int(np.argmax(values))
    broken = values <= -1e6 * problem.n_samples
    if not broken.any():
        return problem.settle(candidates[nearest], objective)[0]
    beyond, value = problem.settle(candidates[int(np.argmax(np.where(broken, values, -np.inf)))], objective)
    if value > values[nearest]:
        return beyond
    return problem.settle(candidates[nearest], objective)[0]


# -- published and small-sample rules ----------------------------------------------------------------------------------


def geometric(problem: Problem, targets: Sequence[Target]) -> Policies:
    """MSDNet's rule: exit rates proportional to (p/20)^k for p = 1 ... 39, thresholds on those left.

    Where fewer samples are left than an exit's quota, all of them leave; MSDNet's public code then leaves nobody there.
    """
    return _by_subsets(problem, targets, geometric_path)


def geometric_path(problem: Problem, points: Sequence[int] = range(1, 40)) -> Policies:
    """The policies of MSDNet's rule for the p of ``points``, shape (P, K-1), on the exits allowed."""
    exits = np.flatnonzero(problem.allowed)
    policies = np.zeros((len(points), problem.n_early), dtype=np.int64)
    for row, p in enumerate(points):
        shares = (p / 20.0) ** np.arange(len(exits) + 1)
        quotas = np.zeros(problem.n_early, dtype=np.int64)
        quotas[exits] = np.floor(problem.n_samples * shares / shares.sum())[:-1]
        policies[row] = quota_policy(problem, quotas)
    return policies


def quota_policy(problem: Problem, quotas: NDArray[np.int64]) -> Policy:
    """The policy (K-1,) at which every exit takes its quota of the surest samples that reach it, or all of fewer.

    An exit with the quota 0 is switched off. Equal scores leave together, which may be more than the quota.
    """
    policy = np.zeros(problem.n_early, dtype=np.int64)
    alive = np.ones(problem.n_samples, dtype=bool)
    for k in np.flatnonzero(quotas):
        left = np.cumsum(alive[problem.order[k]])
        if not left[-1]:
            break
        reached = int(np.searchsorted(left, min(int(quotas[k]), int(left[-1])))) + 1
        ends = problem.ends[k]
        policy[k] = ends[np.searchsorted(ends, reached)]
        alive &= problem.rank[k] >= policy[k]
    return policy


def shared(problem: Problem, targets: Sequence[Target]) -> Policies:
    """One threshold for all exits on P(correct), estimated at each exit by isotonic regression: for small samples."""
    return _by_subsets(problem, targets, shared_path)


def shared_path(problem: Problem, n_levels: int = 200) -> Policies:
    """One policy for each of up to ``n_levels`` levels of the shared threshold, shape (L, K-1)."""
    exits = np.flatnonzero(problem.allowed)
    estimates = {}
    for k in exits:  # one value a tie, so that the order within it cannot matter
        starts = np.append(0, problem.ends[k][:-1])
        lengths = np.diff(problem.ends[k], prepend=0)
        means = np.add.reduceat(problem.quality[k][problem.order[k]], starts) / lengths
        estimates[k] = np.repeat(isotonic_regression(means, weights=lengths, increasing=False).x, lengths)
    levels = np.unique(np.concatenate([np.append(x, -np.inf) for x in estimates.values()]))
    if len(levels) > n_levels:
        levels = levels[np.linspace(0, len(levels) - 1, n_levels).round().astype(int)]
    policies = np.zeros((len(levels), problem.n_early), dtype=np.int64)
    for k in exits:
        policies[:, k] = np.searchsorted(-estimates[k], -levels, side="left")
    return policies


def _by_subsets(problem: Problem, targets: Sequence[Target], path: Callable[[Problem], Policies]) -> Policies:
    """A rule applied to every subset of the exits (few), or to fewer and fewer of them (many), picked by target."""
    nothing = np.zeros((1, problem.n_early), dtype=np.int64)
    if problem.free or problem.n_early <= MOST_EXHAUSTIVE:
        paths = [path(problem.committed(exits)) for exits in _subsets(problem)]
        return pick(problem, targets, np.unique(np.concatenate([nothing, *paths]), axis=0))
    exits = problem.allowed.copy()

    def merit(candidates: Policies) -> float:
        quality, cost = problem.values(pick(problem, targets, candidates))
        return float(np.sum([_objective(problem, t)(quality[[i]], cost[[i]])[0] for i, t in enumerate(targets)]))

    kept = np.concatenate([nothing, path(problem.committed(exits))])
    best = merit(kept)
    while np.count_nonzero(exits) > 1:
        trials = []
        for k in np.flatnonzero(exits):
            fewer = exits & (np.arange(problem.n_early) != k)
            candidates = np.concatenate([kept, path(problem.committed(fewer))])
            trials.append((merit(candidates), fewer, candidates))
        value, fewer, candidates = max(trials, key=lambda trial: trial[0])
        if value <= best:
            break
        exits, kept, best = fewer, np.unique(candidates, axis=0), value
    return pick(problem, targets, kept)
