import dataclasses
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adaptexit.core.routing import exit_index
from adaptexit.core.search import SEARCHES, search_thresholds, targets_for
from adaptexit.core.search.methods import (
    _exact_two,
    coord,
    exact,
    geometric,
    geometric_path,
    quota_policies,
    shared_path,
)
from adaptexit.core.search.problem import Problem
from adaptexit.core.search.targets import Targets, Weighted, WithinBudget, WithinDrop
from tests import reference
from tests.properties.strategies import (
    at_its_word,
    exit_outputs,
    generators,
    increasing_maps,
    permutations_of,
    policies_for,
    sizes,
)

weights = st.floats(1e-3, 30)
SLOW_COORD = [pytest.param(name, marks=pytest.mark.slow) if name == "coord" else name for name in SEARCHES]
budgets = st.floats(0, 1.2)
drops = st.floats(0, 1)
small = exit_outputs(min_exits=2, max_exits=3, max_samples=6)
two_exits = exit_outputs(min_exits=2, max_exits=2, max_samples=10)
exact_sums = exit_outputs(min_exits=2, max_exits=3, max_samples=10, unit=1.0)


def at_least(value, target):
    return value >= target - 1e-7 * max(1.0, abs(target))


def of(objective, pair):
    quality, cost = pair
    return float(objective(np.array([quality]), np.array([cost]))[0])


def value_of(problem, policy):
    """Summed quality and summed relative cost of one policy."""
    quality, cost = problem.values(policy[None])
    return quality[0], cost[0]


def every_policy(problem):
    return np.array(list(itertools.product(*[[0, *ends] for ends in problem.ends])), dtype=np.int64)


def all_tie_ends(problem, policies):
    return all(end in {0, *ends} for policy in policies for end, ends in zip(policy, problem.ends, strict=True))


def tried_budgets(outcomes, more):
    """Budgets that a policy meets exactly, and others."""
    costs = sorted({cost for _, cost in outcomes})
    return [*costs[:: max(1, len(costs) // 8)], *more]


# -- the problem -------------------------------------------------------------------------------------------------------


@given(st.data())
def test_value_of_a_policy_equals_its_thresholds_walked(data):
    outputs = data.draw(exit_outputs(min_exits=2))
    problem = Problem.from_outputs(outputs)
    policy = data.draw(policies_for(problem))
    quality, cost = value_of(problem, policy)
    thresholds, _ = problem.thresholds(policy)
    n = outputs.n_samples
    assert (quality / n, cost / n) == pytest.approx(reference.outcome(outputs, thresholds), abs=1e-9)


@pytest.mark.parametrize("cells", [1, 2**16])
@given(data=st.data())
def test_policies_together_are_worth_what_each_is_worth_alone(cells, data):
    problem = Problem.from_outputs(data.draw(exit_outputs(min_exits=2)))
    policies = np.stack([data.draw(policies_for(problem)) for _ in range(data.draw(sizes(1, 5)))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adaptexit.core.search.problem._BLOCK", cells)
        together = problem.outcomes(policies)
    for sums, alone in zip(
        together, zip(*(problem.outcomes(policy[None]) for policy in policies), strict=True), strict=True
    ):
        assert sums.tolist() == np.concatenate(alone).tolist()
    for limits, one in zip(
        problem.thresholds(policies), zip(*map(problem.thresholds, policies), strict=True), strict=True
    ):
        assert limits.tolist() == np.stack(one).tolist()
    assert problem.snap(policies).tolist() == policies.tolist()


@pytest.mark.parametrize("cells", [1, 2**16])
@given(data=st.data())
def test_quotas_together_give_the_policies_that_each_gives_alone(cells, data):
    problem = Problem.from_outputs(data.draw(exit_outputs(min_exits=2)))
    quotas = data.draw(generators).integers(problem.n_samples + 1, size=(data.draw(sizes(1, 5)), problem.n_early))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adaptexit.core.search.problem._BLOCK", cells)
        policies = quota_policies(problem, quotas)
    assert policies.tolist() == [quota_policies(problem, row[None])[0].tolist() for row in quotas]


@given(st.data())
def test_committing_to_the_exits_that_are_on_changes_no_value(data):
    problem = Problem.from_outputs(data.draw(exit_outputs(min_exits=2)))
    policy = data.draw(policies_for(problem))
    assert value_of(problem.committed(policy > 0), policy) == pytest.approx(value_of(problem, policy), abs=1e-9)


@given(st.data())
def test_committing_to_more_exits_is_never_cheaper(data):
    problem = Problem.from_outputs(data.draw(exit_outputs(min_exits=2)))
    policy = data.draw(policies_for(problem))
    more = (policy > 0) | np.array(data.draw(st.lists(st.booleans(), min_size=len(policy), max_size=len(policy))))
    assert value_of(problem.committed(more), policy)[1] >= value_of(problem, policy)[1] - 1e-9


@given(st.data(), weights)
def test_a_price_on_cost_makes_quality_less_weighted_cost(data, weight):
    problem = Problem.from_outputs(data.draw(exit_outputs(min_exits=2, free=True)))
    policy = data.draw(policies_for(problem))
    quality, cost = value_of(problem.priced(weight), policy)
    assert quality == pytest.approx(of(Weighted(weight), value_of(problem, policy)), abs=1e-6 * problem.n_samples)
    assert cost == 0


@given(st.data())
def test_snapping_finds_the_nearest_tie_end(data):
    problem = Problem.from_outputs(data.draw(exit_outputs(min_exits=2)))
    positions = np.array([data.draw(st.floats(0, problem.n_samples)) for _ in range(problem.n_early)])
    for position, end, ends in zip(positions, problem.snap(positions), problem.ends, strict=True):
        distance = 0 if position == 0 else min(abs(ends - position))
        assert abs(end - position) == pytest.approx(distance)
        assert (end == 0) == (position == 0)


# -- sweeps ------------------------------------------------------------------------------------------------------------


def check_sweep(problem, policy, objective):
    swept, totals = problem.sweep(policy, objective)
    assert at_least(of(objective, value_of(problem, swept)), of(objective, value_of(problem, policy)))
    quality, _, cost = problem.outcomes(swept[None])
    assert totals == (quality[0], cost[0])
    assert all_tie_ends(problem, [swept])


@given(st.data(), weights)
def test_a_sweep_never_lowers_quality_minus_weighted_cost(data, weight):
    problem = Problem.from_outputs(data.draw(exit_outputs(min_exits=2)))
    check_sweep(problem, data.draw(policies_for(problem)), Weighted(weight))


@given(st.data(), budgets)
def test_a_sweep_never_lowers_what_a_budget_asks_for(data, budget):
    problem = Problem.from_outputs(data.draw(exit_outputs(min_exits=2)))
    check_sweep(problem, data.draw(policies_for(problem)), WithinBudget(budget, problem.n_samples))


@given(st.data(), drops)
def test_a_sweep_never_lowers_what_a_drop_asks_for(data, drop):
    problem = Problem.from_outputs(data.draw(exit_outputs(min_exits=2)))
    objective = WithinDrop(drop, problem.n_samples, problem.full_quality)
    check_sweep(problem, data.draw(policies_for(problem)), objective)


@given(st.data(), weights)
def test_sums_handed_from_sweep_to_sweep_stay_those_of_the_policy(data, weight):
    problem = Problem.from_outputs(data.draw(exit_outputs(min_exits=2)))
    once, totals = problem.sweep(data.draw(policies_for(problem)), Weighted(weight))
    with_totals, totals_with = problem.sweep(once, Weighted(weight), totals)
    anew, totals_anew = problem.sweep(once, Weighted(weight))
    assert with_totals.tolist() == anew.tolist()
    assert totals_with == pytest.approx(totals_anew, rel=1e-9)


@given(st.data(), weights)
def test_those_who_pass_a_chained_exit_that_is_off_pay_for_it_in_every_sum(data, weight):
    outputs = data.draw(exit_outputs(min_exits=4, chained=True, free=False))
    ends_only = np.isin(np.arange(outputs.n_exits - 1), [0, outputs.n_exits - 2])
    problem = dataclasses.replace(Problem.from_outputs(outputs), allowed=ends_only)
    check_sweep(problem, data.draw(policies_for(problem)) * ends_only, Weighted(weight))


@given(st.data(), weights)
def test_a_sweep_sets_the_last_early_exit_to_its_best(data, weight):
    problem = Problem.from_outputs(data.draw(exit_outputs(min_exits=2)))
    policy = data.draw(policies_for(problem))
    swept, _ = problem.sweep(policy, Weighted(weight))
    for end in [0, *problem.ends[-1]]:
        other = policy.copy()
        other[-1] = end
        best = np.append(policy[:-1], swept[-1])
        assert at_least(of(Weighted(weight), value_of(problem, best)), of(Weighted(weight), value_of(problem, other)))


@given(st.data(), weights)
def test_no_single_exit_can_improve_a_settled_policy(data, weight):
    problem = Problem.from_outputs(data.draw(exit_outputs(min_exits=2, max_samples=7)))
    fixed_point, value = problem.settle(data.draw(policies_for(problem)), Weighted(weight))
    assert value == pytest.approx(of(Weighted(weight), value_of(problem, fixed_point)), abs=1e-8)
    for k, ends in enumerate(problem.ends):
        for end in [0, *ends]:
            other = fixed_point.copy()
            other[k] = end
            assert at_least(value, of(Weighted(weight), value_of(problem, other)))


# -- optima ------------------------------------------------------------------------------------------------------------


@given(small, st.lists(budgets, max_size=4))
def test_exact_search_is_the_best_of_all_thresholds_for_every_budget(outputs, more):
    outcomes = reference.every_outcome(outputs)
    some_budgets = tried_budgets(outcomes, more)
    frontier = at_its_word(search_thresholds(outputs, "exact", n_points=3, budgets=some_budgets)[0])
    for budget in some_budgets:
        best = reference.best_accuracy(outcomes, budget)
        if best is None:
            with pytest.raises(ValueError, match="cheapest operating point"):
                frontier.at(budget=budget)
        else:
            assert frontier.at(budget=budget).accuracy == pytest.approx(best, abs=1e-9)


@given(small, st.lists(drops, max_size=4))
def test_exact_search_is_the_cheapest_of_all_thresholds_for_every_drop(outputs, more):
    outcomes = reference.every_outcome(outputs)
    some_drops = [*(j / outputs.n_samples for j in range(outputs.n_samples)), *more]
    frontier, _ = search_thresholds(outputs, "exact", n_points=3, drops=some_drops)
    for drop in some_drops:
        least = reference.least_cost(outcomes, outputs.full_accuracy - drop)
        kept = frontier.accuracy >= outputs.full_accuracy - drop - 1e-9
        assert frontier.cost[kept].min() == pytest.approx(least, abs=1e-9)


three_exits = exit_outputs(min_exits=3, max_exits=3, max_samples=12, unit=1.0)


@given(three_exits, st.lists(budgets, min_size=1, max_size=4))
def test_pairs_are_the_cheapest_of_the_equally_accurate_for_every_budget(outputs, some_budgets):
    problem, n = Problem.from_outputs(outputs).committed(np.ones(2, dtype=bool)), outputs.n_samples
    quality, cost = problem.values(every_policy(problem))
    reachable = [budget for budget in (*some_budgets, *np.unique(cost / n)) if budget * n >= cost.min()]
    pairs = _exact_two(problem, Targets.of(budgets=reachable))
    for budget, pair in zip(reachable, zip(*problem.values(pairs), strict=True), strict=True):
        within = cost <= (budget + 1e-9) * n
        best = quality[within].max()
        assert pair == (best, cost[within & (quality == best)].min())


@given(three_exits, st.lists(drops, min_size=1, max_size=4))
def test_pairs_are_the_most_accurate_of_the_equally_cheap_for_every_drop(outputs, some_drops):
    problem, n = Problem.from_outputs(outputs).committed(np.ones(2, dtype=bool)), outputs.n_samples
    quality, cost = problem.values(every_policy(problem))
    more_drops = [*some_drops, *(np.arange(n) / n)]
    pairs = _exact_two(problem, Targets.of(drops=more_drops))
    for drop, pair in zip(more_drops, zip(*problem.values(pairs), strict=True), strict=True):
        good = quality >= problem.full_quality - (drop + 1e-9) * n
        least = cost[good].min()
        assert pair == (quality[good & (cost == least)].max(), least)


@given(small)
def test_the_cheapest_point_is_the_cheapest_of_all_thresholds(outputs):
    frontier, _ = search_thresholds(outputs, "exact", n_points=1)
    assert frontier.cost.min() == pytest.approx(min(cost for _, cost in reference.every_outcome(outputs)), abs=1e-9)


@given(two_exits, weights)
def test_with_two_exits_settling_finds_the_optimum_of_a_cost_weight(outputs, weight):
    problem, n = Problem.from_outputs(outputs), outputs.n_samples
    _, value = problem.settle(np.zeros(1, dtype=np.int64), Weighted(weight))
    best = max(accuracy - weight * cost for accuracy, cost in reference.every_outcome(outputs))
    assert value / n == pytest.approx(best, abs=1e-7 * (1 + weight))


@given(two_exits, st.lists(budgets, max_size=4))
def test_with_two_exits_coord_finds_the_optimum_of_every_budget(outputs, more):
    outcomes = reference.every_outcome(outputs)
    some_budgets = [b for b in tried_budgets(outcomes, more) if reference.best_accuracy(outcomes, b) is not None]
    problem = Problem.from_outputs(outputs)
    quality, cost = problem.values(coord(problem, Targets.of(budgets=some_budgets)))
    assert (cost / outputs.n_samples <= np.array(some_budgets) + 1e-8).all()
    best = [reference.best_accuracy(outcomes, budget) for budget in some_budgets]
    assert quality / outputs.n_samples == pytest.approx(best, abs=1e-8)


@given(two_exits, st.lists(drops, min_size=1, max_size=4))
def test_with_two_exits_coord_finds_the_optimum_of_every_drop(outputs, some_drops):
    outcomes = reference.every_outcome(outputs)
    problem = Problem.from_outputs(outputs)
    quality, cost = problem.values(coord(problem, Targets.of(drops=some_drops)))
    floors = outputs.full_accuracy - np.array(some_drops)
    assert (quality / outputs.n_samples >= floors - 1e-8).all()
    least = [reference.least_cost(outcomes, floor) for floor in floors]
    assert cost / outputs.n_samples == pytest.approx(least, abs=1e-7)


@given(exit_outputs(min_exits=2, max_exits=4, max_samples=6), st.lists(budgets, min_size=1, max_size=3))
def test_coord_keeps_every_budget_that_can_be_kept(outputs, some_budgets):
    problem = Problem.from_outputs(outputs)
    cheapest = outputs.alone_costs().min() / outputs.full_cost
    targets = Targets.of(budgets=[max(b, cheapest) for b in some_budgets])
    _, cost = problem.values(coord(problem, targets))
    assert (cost / outputs.n_samples <= targets.budgets + 1e-8).all()


@given(small, weights, st.floats(1.01, 10))
def test_cost_of_the_global_optimum_does_not_rise_with_its_weight(outputs, weight, factor):
    problem = Problem.from_outputs(outputs)
    quality, cost = problem.values(every_policy(problem))
    low, high = (cost[np.argmax(Weighted(w)(quality, cost))] for w in (weight, weight * factor))
    assert high <= low + 1e-9


@given(two_exits, weights, st.floats(1.01, 10))
def test_with_two_exits_settled_cost_does_not_rise_with_the_weight(outputs, weight, factor):
    problem = Problem.from_outputs(outputs)
    nothing = np.zeros(1, dtype=np.int64)
    low, high = (value_of(problem, problem.settle(nothing, Weighted(w))[0])[1] for w in (weight, weight * factor))
    assert high <= low + 1e-4


# -- published and small-sample rules ----------------------------------------------------------------------------------


@given(exit_outputs(min_exits=2, max_samples=12), st.integers(1, 39))
def test_geometric_rule_equals_msdnets_loop(outputs, p):
    powers = [Fraction(p, 20) ** k for k in range(outputs.n_exits)]
    shares = [outputs.n_samples * power / sum(powers) for power in powers]
    assume(p == 20 or all(abs(share - round(share)) > 1e-9 for share in shares))
    problem = Problem.from_outputs(outputs)
    thresholds, cutoffs = problem.thresholds(geometric_path(problem)[p - 1])
    exits = reference.msdnet_rule(outputs.scores.tolist(), [math.floor(share) for share in shares])
    assert exit_index(outputs, cutoffs).tolist() == exits
    assert reference.route(outputs, thresholds) == exits


@pytest.mark.parametrize("search", SEARCHES)
@given(data=st.data())
def test_every_search_proposes_tie_ends(search, data):
    problem = Problem.from_outputs(data.draw(exit_outputs(min_exits=2, max_exits=3 if search == "exact" else 4)))
    assert all_tie_ends(problem, SEARCHES[search](problem, targets_for(problem, 3, (), ())))


@given(exit_outputs(min_exits=2, max_exits=4), st.lists(budgets, max_size=3), st.lists(drops, max_size=3))
def test_coord_serves_no_target_worse_than_the_geometric_rule(outputs, some_budgets, some_drops):
    problem = Problem.from_outputs(outputs)
    targets = targets_for(problem, 3, some_drops, some_budgets)
    policies = coord(problem, targets), geometric(problem, targets)
    for objective, one, other in zip(targets.objectives(problem), *policies, strict=True):
        assert at_least(of(objective, value_of(problem, one)), of(objective, value_of(problem, other)))


@given(exit_outputs(min_exits=2, graded=False))
def test_shared_policies_hold_every_level_of_the_isotonic_estimates(outputs):
    problem = Problem.from_outputs(outputs)
    estimates = [reference.falling_fit(outputs, k) for k in range(outputs.n_exits - 1)]
    policies = shared_path(problem).tolist()
    for level in {value for fit in estimates for value in fit} | {-1}:
        assert [sum(value > level for value in fit) for fit in estimates] in policies


@given(exit_outputs(min_exits=2))
def test_shared_policies_put_one_level_on_estimates_that_fall_with_the_score(outputs):
    problem = Problem.from_outputs(outputs)
    policies = shared_path(problem)
    assert (np.diff(policies, axis=0) <= 0).all()
    assert (policies[0] == problem.n_samples).all()
    assert (policies[-1] == 0).any()


# -- what must not matter ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", SEARCHES)
@given(data=st.data())
def test_permuting_the_samples_changes_no_policy(search, data):
    outputs = data.draw(exact_sums)
    order = data.draw(permutations_of(outputs.n_samples))
    problem, other = Problem.from_outputs(outputs), Problem.from_outputs(outputs.take(order))
    targets = targets_for(problem, 4, (), ())
    assert SEARCHES[search](other, targets).tolist() == SEARCHES[search](problem, targets).tolist()


@given(exact_sums)
def test_duplicating_the_samples_doubles_the_exact_policies(outputs):
    twice = outputs.take(np.repeat(np.arange(outputs.n_samples), 2))
    problem, double = Problem.from_outputs(outputs), Problem.from_outputs(twice)
    targets = targets_for(problem, 4, (), ())
    assert exact(double, targets).tolist() == (2 * exact(problem, targets)).tolist()


@given(three_exits, sizes(2, 3), st.sampled_from([4, 100]))
def test_copies_of_all_samples_change_no_point_of_the_exact_search_for_pairs(outputs, n_copies, n_points):
    copies = outputs.take(np.repeat(np.arange(outputs.n_samples), n_copies))
    (one, _), (other, _) = (search_thresholds(o, "exact", n_points=n_points) for o in (outputs, copies))
    assert [p.thresholds.tolist() for p in other.points] == [p.thresholds.tolist() for p in one.points]
    assert other.cost == pytest.approx(one.cost, abs=1e-9)
    assert other.accuracy == pytest.approx(one.accuracy, abs=1e-9)


@given(exact_sums)
def test_duplicating_the_samples_doubles_the_shared_policies(outputs):
    twice = outputs.take(np.repeat(np.arange(outputs.n_samples), 2))
    paths = [shared_path(Problem.from_outputs(o)) for o in (outputs, twice)]
    assert paths[1].tolist() == (2 * paths[0]).tolist()


@pytest.mark.parametrize("search", SLOW_COORD)
@given(data=st.data())
def test_an_increasing_map_of_the_scores_changes_no_exit(search, data):
    outputs = data.draw(exit_outputs(min_exits=1, max_exits=3))
    image = outputs.with_scores(np.stack([data.draw(increasing_maps())(row) for row in outputs.scores]))
    before, _ = search_thresholds(outputs, search, n_points=3)
    after, _ = search_thresholds(image, search, n_points=3)
    assert len(before.points) == len(after.points)
    for one, other in zip(before.points, after.points, strict=True):
        assert exit_index(outputs, one.cutoffs).tolist() == exit_index(image, other.cutoffs).tolist()


@given(st.data())
def test_an_increasing_map_maps_the_thresholds(data):
    outputs = data.draw(exit_outputs(min_exits=2, max_exits=3))
    maps = [data.draw(increasing_maps())(row) for row in outputs.scores]
    before, _ = search_thresholds(outputs, "exact", n_points=4)
    after, _ = search_thresholds(outputs.with_scores(np.stack(maps)), "exact", n_points=4)
    for one, other in zip(before.points, after.points, strict=True):
        for k, t in enumerate(one.thresholds):
            expected = maps[k][outputs.scores[k] == t][0] if np.isfinite(t) else t
            assert other.thresholds[k] == expected
