import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adaptexit.core.frontier import ERRORS, NEGLIGIBLE, ParetoFrontier, not_dominated
from adaptexit.core.search import SEARCH_NAMES, SEARCHES, search_thresholds
from tests import reference
from tests.properties.strategies import (
    at_its_word,
    exit_outputs,
    frontier_through,
    generators,
    permutations_of,
    sizes,
)


@st.composite
def frontiers(draw, searches=SEARCH_NAMES):
    """Outputs and the frontier that one of the searches made of them."""
    search = draw(st.sampled_from(searches))
    outputs = draw(exit_outputs(max_exits=3 if search == "exact" else 4))
    return outputs, search_thresholds(outputs, search, n_points=draw(st.integers(1, 8)))[0]


def is_plain(point):
    return bool(np.isposinf(point.thresholds[:-1]).all())


@given(frontiers())
def test_the_plain_full_model_is_always_a_point(pair):
    outputs, frontier = pair
    plain = [point for point in frontier.points if is_plain(point)]
    assert len(plain) == 1
    assert (plain[0].cost, plain[0].accuracy) == pytest.approx((1.0, outputs.full_accuracy), abs=1e-12)


@given(frontiers(searches=tuple(SEARCHES)))
def test_no_point_of_a_search_that_takes_data_at_their_word_is_dominated_apart_from_the_plain_model(pair):
    _, frontier = pair
    for i, point in enumerate(frontier.points):
        if not is_plain(point):
            for j, other in enumerate(frontier.points):
                assert i == j or other.accuracy < point.accuracy or other.cost > point.cost


@given(frontiers())
def test_cost_rises_along_the_frontier(pair):
    assert (np.diff(pair[1].cost) >= 0).all()


@given(frontiers(), st.data())
def test_points_in_any_order_make_the_same_frontier(pair, data):
    outputs, frontier = pair
    order = data.draw(permutations_of(len(frontier.points)))
    again = ParetoFrontier.of((frontier.points[i] for i in order), outputs)
    assert again.cost.tolist() == frontier.cost.tolist()
    assert again.accuracy.tolist() == frontier.accuracy.tolist()
    for name in ("full_accuracy", "fixed_accuracy", "fixed_cost", "n_samples"):
        assert np.array_equal(getattr(again, name), getattr(frontier, name)), name


@given(frontiers())
def test_the_index_of_every_point_is_its_place(pair):
    _, frontier = pair
    assert [frontier.index(point) for point in frontier.points] == list(range(len(frontier.points)))


@given(frontiers())
def test_accuracy_at_a_points_own_reduction_is_at_least_its_own(pair):
    _, frontier = pair
    assert (frontier.accuracy_at(reduction=1 - frontier.cost) >= frontier.accuracy - 1e-9).all()


@given(frontiers(), st.floats(2.01, 1e6))
def test_a_budget_beyond_every_point_and_twice_the_full_model_is_refused(pair, budget):
    _, frontier = pair
    assume(budget > frontier.cost.max() + 1e-6)
    with pytest.raises(ValueError, match="budget must be a relative cost, at most"):
        frontier.at(budget=budget)


@given(frontiers())
def test_every_point_tells_the_truth_about_its_thresholds(pair):
    outputs, frontier = pair
    for point in frontier.points:
        assert (point.accuracy, point.cost) == pytest.approx(reference.outcome(outputs, point.thresholds), abs=1e-9)


@given(frontiers())
def test_cutoffs_and_thresholds_of_every_point_route_alike(pair):
    outputs, frontier = pair
    for point in frontier.points:
        exits = reference.route(outputs, point.cutoffs)
        assert exits == reference.route(outputs, point.thresholds)
        assert point.exit_rates.tolist() == [exits.count(k) / outputs.n_samples for k in range(outputs.n_exits)]


@given(frontiers(), st.floats(0, 1.2))
def test_the_point_at_a_budget_is_the_dearest_within_it_that_none_beats_beyond_noise(pair, budget):
    _, frontier = pair
    assume(budget >= frontier.cost.min())
    within = [p for p in frontier.points if p.cost <= budget + 1e-9]
    unbeaten = [
        p
        for p in within
        if not any(
            q.accuracy > p.accuracy + 3 * math.hypot(p.drop_se, q.drop_se) + 1e-9
            for q in within
            if q.cost <= p.cost + 1e-9
        )
    ]
    assert frontier.at(budget=budget).cost == pytest.approx(max(p.cost for p in unbeaten))


@given(frontiers(), st.floats(0, 1.2))
def test_without_noise_the_point_at_a_budget_is_the_best_within_it(pair, budget):
    frontier = at_its_word(pair[1])
    assume(budget >= frontier.cost.min())
    point = frontier.at(budget=budget)
    assert point.cost <= budget + 1e-9
    assert point.accuracy == pytest.approx(max(p.accuracy for p in frontier.points if p.cost <= budget + 1e-9))


@given(frontiers(), st.floats(0, 1))
def test_without_noise_the_point_at_a_drop_is_the_cheapest_that_keeps_it(pair, drop):
    outputs, frontier = pair[0], at_its_word(pair[1])
    floor = outputs.full_accuracy - drop - NEGLIGIBLE
    assume(all(abs(p.accuracy - floor) > 1e-9 for p in frontier.points))
    point = frontier.at(max_drop=drop)
    assert point.accuracy >= floor
    assert point.cost == pytest.approx(min(p.cost for p in frontier.points if p.accuracy >= floor))


@given(frontiers(), st.floats(0, 1))
def test_the_point_at_a_drop_keeps_it_with_its_error_or_is_the_plain_model(pair, drop):
    outputs, frontier = pair
    point = frontier.at(max_drop=drop)
    assert is_plain(point) or point.accuracy - 0.6 * point.drop_se >= outputs.full_accuracy - drop - NEGLIGIBLE


@given(frontiers())
def test_cost_at_the_budget_does_not_fall_as_the_budget_rises(pair):
    _, frontier = pair
    assert (np.diff([frontier.at(budget=cost).cost for cost in frontier.cost]) >= -1e-9).all()


@given(frontiers())
def test_without_noise_accuracy_at_the_budget_does_not_fall_as_the_budget_rises(pair):
    frontier = at_its_word(pair[1])
    accuracy = [frontier.at(budget=cost).accuracy for cost in frontier.cost]
    assert (np.diff(accuracy) >= -1e-9).all()


@given(frontiers(), st.floats(0, 1), st.data())
def test_on_other_data_the_choice_stays_the_calibrated_one(pair, drop, data):
    outputs, frontier = pair
    samples = data.draw(st.lists(st.integers(0, outputs.n_samples - 1), min_size=1))
    elsewhere = frontier.on(outputs.take(np.array(samples)))
    assert elsewhere.index_at(max_drop=drop) == frontier.index_at(max_drop=drop)
    assert elsewhere.at(max_drop=drop).thresholds.tolist() == frontier.at(max_drop=drop).thresholds.tolist()


@given(frontiers())
def test_on_the_same_data_every_point_is_the_same(pair):
    outputs, frontier = pair
    again = frontier.on(outputs)
    assert again.accuracy == pytest.approx(frontier.accuracy, abs=1e-12)
    assert again.cost == pytest.approx(frontier.cost, abs=1e-12)
    for name in ("accuracy_se", "cost_se", "drop_se"):
        one, other = ([getattr(point, name) for point in f.points] for f in (again, frontier))
        assert one == pytest.approx(other, abs=1e-9), name


@given(frontiers())
def test_standard_errors_are_those_of_the_samples(pair):
    outputs, frontier = pair
    n, graded = outputs.n_samples, np.asarray(outputs.graded, dtype=float)
    largest = np.abs(graded - graded[-1]).max() if outputs.graded.dtype != bool else 1.0
    for point in frontier.points:
        exits = np.array(reference.route(outputs, point.thresholds))
        quality = graded[exits, np.arange(n)]
        cost = (outputs.path_costs(point.on) / outputs.full_cost)[exits]
        assert point.accuracy_se == pytest.approx(quality.std() / math.sqrt(n), abs=1e-7)
        assert point.cost_se == pytest.approx(cost.std() / math.sqrt(n), abs=1e-7)
        lost = np.square(quality - graded[-1]).sum() + largest**2
        assert point.drop_se == pytest.approx(math.sqrt(lost) / n, abs=1e-9)


@given(frontiers())
def test_fixed_exits_equal_switching_on_each_alone(pair):
    outputs, frontier = pair
    for k in range(outputs.n_exits):
        alone = [-np.inf if j == k else np.inf for j in range(outputs.n_exits - 1)] + [-np.inf]
        fixed = (frontier.fixed_accuracy[k], frontier.fixed_cost[k])
        assert fixed == pytest.approx(reference.outcome(outputs, alone), abs=1e-9)


@given(frontiers())
def test_writing_and_reading_gives_the_same_frontier(pair):
    _, frontier = pair
    description, arrays = frontier.to_arrays()
    again = ParetoFrontier.from_arrays(json.loads(json.dumps(description)), arrays)
    for one, other in zip(frontier.points, again.points, strict=True):
        for name in ("accuracy", "cost", *ERRORS, "exit_rates", "thresholds", "cutoffs", "params"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
    for name in ("full_accuracy", "fixed_accuracy", "fixed_cost", "n_samples"):
        assert np.array_equal(getattr(frontier, name), getattr(again, name)), name


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_not_dominated_equals_comparing_every_pair(pairs):
    survivors = [
        i
        for i, (a, c) in enumerate(pairs)
        if not any((b >= a and d <= c and (b, d) != (a, c)) or ((b, d) == (a, c) and j < i)
                   for j, (b, d) in enumerate(pairs))
    ]  # fmt: skip
    indices = not_dominated([a for a, _ in pairs], [float(c) for _, c in pairs])
    assert indices.tolist() == sorted(survivors, key=lambda i: pairs[i][1])


SLOW_COORD = [pytest.param(name, marks=pytest.mark.slow) if name == "coord" else name for name in SEARCH_NAMES]


@pytest.mark.parametrize("search", SLOW_COORD)
@given(data=st.data())
def test_the_cheapest_exit_for_everybody_can_be_had(search, data):
    outputs = data.draw(exit_outputs(min_exits=1, max_exits=3 if search == "exact" else 5))
    frontier, _ = search_thresholds(outputs, search, n_points=2)
    assert frontier.cost.min() <= frontier.fixed_cost.min() + 1e-9


# -- accuracy at equal cost -------------------------------------------------------------------------------------------


@st.composite
def curves(draw):
    """Reductions with equal ones among them, some negative, accuracies, the full model's, and their frontier."""
    rng, n = draw(generators), draw(sizes(1, 8))
    low = draw(st.sampled_from([-4, 1, -12]))
    reduction, accuracy = rng.integers(low, low + 12, size=n) / 16, rng.integers(17, size=n) / 16
    full = float(rng.integers(17)) / 16
    return reduction, accuracy, full, frontier_through(reduction, accuracy, full)


@given(curves())
def test_at_a_measured_reduction_the_best_accuracy_is_given(curve):
    reduction, accuracy, full, frontier = curve
    for r, value in zip(reduction, frontier.accuracy_at(reduction=reduction), strict=True):
        best = accuracy[reduction == r].max()
        assert value == (max(best, full) if r == 0 else best)


@given(curves(), st.floats(0, 1))
def test_matched_accuracy_lies_between_its_neighbours(curve, share):
    reduction, accuracy, full, frontier = curve
    target = reduction.min() + share * np.ptp(reduction)
    accuracy_there = float(frontier.accuracy_at(reduction=target))
    assume(not np.isnan(accuracy_there))
    at, worth = np.append(reduction, 0.0), np.append(accuracy, full)
    neighbours = at[at <= target + 1e-9].max(), at[at >= target - 1e-9].min()
    best = [worth[at == r].max() for r in neighbours]
    assert min(best) - 1e-6 <= accuracy_there <= max(best) + 1e-6


@given(curves(), st.floats(-1, 1), st.floats(0, 0.3), st.booleans())
def test_where_an_answer_is_given(curve, target, below, clamp):
    reduction, _, _, frontier = curve
    least, largest = reduction.min(), reduction.max()
    assume(min(abs(target - edge) for edge in (least, largest, least - below, largest + below, 0.0)) > 1e-6)
    inside = least <= target <= largest
    before = max(least - below, 0) <= target <= least
    beyond = clamp and largest <= target <= largest + below
    accuracy = float(frontier.accuracy_at(reduction=target, below=below, clamp=clamp))
    assert np.isnan(accuracy) == (not (inside or before or beyond))


@given(curves(), st.floats(-1, 1), st.data())
def test_matched_accuracy_does_not_depend_on_the_order_of_the_points(curve, target, data):
    reduction, accuracy, full, frontier = curve
    order = data.draw(permutations_of(len(reduction)))
    one = frontier.accuracy_at(reduction=target)
    other = frontier_through(reduction[order], accuracy[order], full).accuracy_at(reduction=target)
    assert np.array_equal(one, other, equal_nan=True)
