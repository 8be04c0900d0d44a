"""Choosing thresholds: from recorded outputs to a frontier of operating points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from joblib import Parallel, delayed

from adaptexit.core.frontier import OperatingPoint, ParetoFrontier, beaten, evaluate, not_dominated
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.search.methods import Policies, Search, coord, exact, geometric, geometric_path, pick, shared
from adaptexit.core.search.problem import Problem
from adaptexit.core.search.spending import cheapest, described, spend
from adaptexit.core.search.targets import Targets, WithinBudget

SearchName = Literal["auto", "smoothed", "exact", "coord", "shared", "geometric"]

SEARCH_NAMES: tuple[SearchName, ...] = get_args(SearchName)

SEARCHES: dict[SearchName, Search] = {"exact": exact, "coord": coord, "shared": shared, "geometric": geometric}
"""Those that take the calibration data at their word: each gives the policy that looks best there for every target."""

STANDARD_DROPS = (0.0, 0.001, 0.005, 0.01)
"""Allowed drops of accuracy that every frontier has a point for: the columns of TinySaver's Table 1."""

N_BAGS = 10

_SHARES = np.linspace(0.05, 0.95, 19)

MOST_SAMPLES_EXACT = 5000
"""Samples up to which ``auto`` pays the O(N^2) of the exact search with two early exits."""


@dataclass(frozen=True)
class SearchReport:
    """What a search took: its name, whether thresholds are bagged, and why."""

    search: SearchName
    bagged: bool
    reason: str


def choose_search(
    search: SearchName, n_exits: int, n_samples: int, effective_size: float | None = None
) -> SearchReport:
    """What a search does with K exits and N calibration samples: ``"auto"`` is ``"smoothed"``, whatever they are.

    ``effective_size`` is what samples with weights are worth.
    """
    if search in ("auto", "smoothed"):
        return SearchReport("smoothed", False, described(n_exits, n_samples, effective_size))
    worth = n_samples if effective_size is None else effective_size
    return SearchReport(search, search == "coord" and worth < 1000 * n_exits, "asked for")


def targets_for(
    problem: Problem, n_points: int, drops: Sequence[float], budgets: Sequence[float], *, rounded_up: bool = False
) -> Targets:
    """Budgets in even steps along a first estimate of the curve, and the budgets and drops asked for.

    The estimate joins the policies of the geometric rule, the cheapest policy and an accurate one; steps count both
    cost and accuracy, so that budgets are close where the curve is steep. ``rounded_up`` as for
    :func:`~adaptexit.core.search.methods.geometric_path`.
    """
    everybody = np.diag(np.full(problem.n_early, problem.n_samples))
    unlimited = WithinBudget(1.0, problem.n_samples)
    accurate, _ = problem.settle(np.zeros(problem.n_early, dtype=np.int64), unlimited)
    rule = geometric_path(problem, range(1, 40, 3), rounded_up=rounded_up)
    quality, cost = problem.values(np.concatenate([everybody, rule, accurate[None]]))
    curve = not_dominated(quality / problem.n_samples, np.minimum(cost / problem.n_samples, 1.0))
    steps = sum(np.diff(v[curve], prepend=v[curve[0]]) / max(np.ptp(v[curve]), 1e-12) for v in (quality, cost))
    length = np.cumsum(np.abs(steps))
    grid = np.interp(np.linspace(0.0, length[-1], n_points), length, cost[curve] / problem.n_samples)
    return Targets.of(np.union1d(np.minimum(grid, 1.0), [*budgets, 1.0]), np.union1d(drops, STANDARD_DROPS))


def search_thresholds(
    outputs: ExitOutputs,
    search: SearchName = "auto",
    *,
    n_points: int = 200,
    drops: Sequence[float] = (),
    budgets: Sequence[float] = (),
    random_state: int = 0,
) -> tuple[ParetoFrontier, SearchReport]:
    """The frontier of operating points on calibration outputs, and what was done to find it.

    Parameters
    ----------
    outputs : ExitOutputs
        Those of weight 0 have no part in it.
    search : {"auto", "smoothed", "exact", "coord", "shared", "geometric"}
    n_points : int
        Budgets on the grid; the frontier has about as many points, fewer where one policy serves several. ``smoothed``
        takes the multiples of 1 / n_points from the cheapest policy's cost to 1.
    drops, budgets : sequences of float
        Allowed drops of accuracy and relative costs to serve beside the grid. ``smoothed`` needs no drops: its points
        lie close, and which of them keeps a drop is read off them.
    random_state : int
        Seed of the bootstrap samples where thresholds are bagged, and of the draw where a search takes some samples
        out of many.
    """
    everybody, outputs = outputs, outputs.counted()
    report = choose_search(search, outputs.n_exits, outputs.n_samples, outputs.effective_size)
    problem = Problem.from_outputs(outputs)
    if report.search == "smoothed":
        points = _smoothed_points(outputs, problem, n_points, budgets, random_state)
        return ParetoFrontier.of(points, everybody), report
    if problem.n_early == 0:
        policies, targets = np.zeros((1, 0), dtype=np.int64), Targets.of(drops=[0.0])
    else:
        # Pairs are found exactly, so that only the budgets they are found for could depend on the number of samples.
        pairs = report.search == "exact" and problem.n_early == 2
        targets = targets_for(problem, n_points, drops, budgets, rounded_up=pairs)
        method = SEARCHES[report.search]
        if report.bagged:
            policies = _kept_drops(problem, targets, _bagged(outputs, problem, method, targets, random_state))
        else:
            policies = method(problem, targets)
    return ParetoFrontier.of(_best_points(outputs, problem, policies, targets), everybody), report


def _smoothed_points(
    outputs: ExitOutputs, problem: Problem, n_points: int, budgets: Sequence[float], random_state: int
) -> list[OperatingPoint]:
    """Points at even steps of cost and at the budgets, without those that a cheaper one beats beyond their noise."""
    plain = np.zeros((1, problem.n_early), dtype=np.int64)
    if problem.n_early == 0:
        return _points(outputs, problem, plain, [{}])
    everybody = cheapest(problem)
    least = float(problem.costs(everybody)[0]) / problem.n_samples
    # Round numbers, so that the budgets people ask for are on the grid.
    grid = np.union1d(np.arange(1, n_points + 1) / n_points, [least, *budgets])
    grid = grid[(grid >= least) & (grid <= 1.0)]  # none where the cheapest exit is dearer than the full model
    spending = [spend(outputs, problem, grid.tolist(), random_state)] if len(grid) else []
    policies = np.concatenate([*spending, everybody, plain])
    distinct, first = np.unique(policies, axis=0, return_index=True)
    params: list[dict[str, float]] = [*({"budget": budget} for budget in grid.tolist()), {}, {}]
    points = _points(outputs, problem, distinct, [params[i] for i in first])
    accuracy, cost, drop_se = (np.array([getattr(p, name) for p in points]) for name in ("accuracy", "cost", "drop_se"))
    worth = ~beaten(accuracy, cost, drop_se) | ~distinct.any(axis=1)
    return [point for point, keep in zip(points, worth, strict=True) if keep]


def _bagged(outputs: ExitOutputs, problem: Problem, method: Search, targets: Targets, random_state: int) -> Policies:
    """Positions averaged over bootstrap samples; an exit is on where most of them switch it on.

    One after the other, or in threads inside ``joblib.parallel_config(backend="threading", n_jobs=...)``: samples are
    drawn before any is searched, so that the result is the same.
    """
    rng = np.random.default_rng(random_state)
    n = outputs.n_samples
    bags = [rng.integers(n, size=n) for _ in range(N_BAGS)]
    runs = np.stack(
        Parallel(prefer="threads")(
            delayed(lambda bag: method(Problem.from_outputs(outputs.take(bag)), targets))(bag) for bag in bags
        )
    )
    if problem.free:  # 0 is a position like any other
        return problem.snap(runs.mean(axis=0))
    on = np.count_nonzero(runs, axis=0)
    return problem.snap(np.where(2 * on > N_BAGS, runs.sum(axis=0) / np.maximum(on, 1), 0.0))


def _kept_drops(problem: Problem, targets: Targets, policies: Policies) -> Policies:
    """Averaged policies (T, K-1), mended where they were to keep the accuracy.

    An average of policies that lose nothing may lose a sample. Then fewer samples leave, in proportion, or another
    target's policy serves, whichever is cheaper.
    """
    final = policies.copy()
    for i, drop in enumerate(targets.drops, start=len(targets.budgets)):
        # An exit that is on stays on, with one sample at least.
        fewer = problem.snap(np.maximum(_SHARES[:, None] * policies[i], policies[i] > 0))
        final[i] = pick(problem, Targets.of(drops=[drop]), np.concatenate([policies, fewer]))[0]
    return final


def _best_points(outputs: ExitOutputs, problem: Problem, policies: Policies, targets: Targets) -> list[OperatingPoint]:
    """The policies that no other dominates, as operating points.

    That everybody leaves at the cheapest exit is among the choices, and the plain full model is a point in any case.
    """
    choices = np.concatenate([policies, cheapest(problem), np.zeros_like(policies[:1])])
    distinct, first = np.unique(choices, axis=0, return_index=True)
    params = [*targets.described(), {}, {}]
    points = _points(outputs, problem, distinct, [params[i] for i in first])
    plain = np.flatnonzero(~distinct.any(axis=1))
    survivors = np.union1d(not_dominated([p.accuracy for p in points], [p.cost for p in points]), plain)
    return [points[i] for i in survivors]


def _points(
    outputs: ExitOutputs, problem: Problem, policies: Policies, params: Sequence[dict[str, float]]
) -> list[OperatingPoint]:
    """What :func:`evaluate` gives for policies (P, K-1), from sums that are there already where these are exact."""
    thresholds, cutoffs = problem.thresholds(policies)
    if problem.quality_unit != 1.0 or problem.weights is not None:
        return [evaluate(outputs, *setting) for setting in zip(thresholds, cutoffs, params, strict=True)]
    n = problem.n_samples
    quality, counts, _ = problem.outcomes(policies)
    accuracies, rates = quality / n, counts / n
    accuracy_se, drop_se = np.sqrt(accuracies * (1 - accuracies) / n), np.sqrt(problem.disagreements(policies) + 1) / n
    on, places = np.unique(policies > 0, axis=0, return_inverse=True)  # few, however many policies there are
    paths = np.stack([outputs.path_costs(np.append(early, True)) for early in on])[places.ravel()]
    full_cost = outputs.full_cost
    costs = np.array([float(rate @ path) / full_cost for rate, path in zip(rates, paths, strict=True)])
    cost_se = np.sqrt(np.sum(rates * (paths / full_cost - costs[:, None]) ** 2, axis=1) / n)
    numbers = (values.tolist() for values in (accuracy_se, cost_se, drop_se))
    return list(map(OperatingPoint, accuracies.tolist(), costs.tolist(), rates, thresholds, cutoffs, params, *numbers))
