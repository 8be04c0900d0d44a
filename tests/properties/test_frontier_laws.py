import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adaptexit.core.frontier import ParetoFrontier, not_dominated
from adaptexit.core.search import SEARCHES, search_thresholds
from tests import reference
from tests.properties.strategies import exit_outputs


@st.composite
def frontiers(draw):
    """Outputs and the frontier that one of the searches made of them."""
    search = draw(st.sampled_from([*SEARCHES, "auto"]))
    outputs = draw(exit_outputs(max_exits=3 if search == "exact" else 4))
    return outputs, search_thresholds(outputs, search, n_points=draw(st.integers(1, 8)))[0]


def is_plain(point):
    return bool(np.isposinf(point.thresholds[:-1]).all())


@given(frontiers())
def test_the_plain_full_model_is_always_a_point(made):
    outputs, frontier = made
    plain = [point for point in frontier.points if is_plain(point)]
    assert len(plain) == 1
    assert (plain[0].cost, plain[0].accuracy) == pytest.approx((1.0, outputs.full_accuracy), abs=1e-12)


@given(frontiers())
def test_no_point_is_dominated_apart_from_the_plain_full_model(made):
    _, frontier = made
    for i, point in enumerate(frontier.points):
        if not is_plain(point):
            for j, other in enumerate(frontier.points):
                assert i == j or other.accuracy < point.accuracy or other.cost > point.cost


@given(frontiers())
def test_cost_rises_along_the_frontier(made):
    assert (np.diff(made[1].cost) >= 0).all()


@given(frontiers())
def test_every_point_tells_the_truth_about_its_thresholds(made):
    outputs, frontier = made
    for point in frontier.points:
        assert (point.accuracy, point.cost) == pytest.approx(reference.outcome(outputs, point.thresholds), abs=1e-9)


@given(frontiers())
def test_cutoffs_and_thresholds_of_every_point_route_alike(made):
    outputs, frontier = made
    for point in frontier.points:
        exits = reference.route(outputs, point.cutoffs)
        assert exits == reference.route(outputs, point.thresholds)
        assert point.exit_rates.tolist() == [exits.count(k) / outputs.n_samples for k in range(outputs.n_exits)]


@given(frontiers(), st.floats(0, 1.2))
def test_the_point_at_a_budget_is_the_best_within_it(made, budget):
    _, frontier = made
    assume(budget >= frontier.cost.min())
    point = frontier.at(budget=budget)
    assert point.cost <= budget + 1e-9
    assert point.accuracy == pytest.approx(max(p.accuracy for p in frontier.points if p.cost <= budget + 1e-9))


@given(frontiers(), st.floats(0, 1))
def test_the_point_at_a_drop_is_the_cheapest_that_keeps_it(made, drop):
    outputs, frontier = made
    floor = outputs.full_accuracy - drop - 1e-9
    point = frontier.at(max_drop=drop)
    assert point.accuracy >= floor
    assert point.cost == pytest.approx(min(p.cost for p in frontier.points if p.accuracy >= floor))


@given(frontiers())
def test_accuracy_at_the_budget_does_not_fall_as_the_budget_rises(made):
    _, frontier = made
    accuracy = [frontier.at(budget=cost).accuracy for cost in frontier.cost]
    assert (np.diff(accuracy) >= -1e-9).all()


@given(frontiers(), st.floats(0, 1), st.data())
def test_on_other_data_the_choice_stays_the_calibrated_one(made, drop, data):
    outputs, frontier = made
    samples = data.draw(st.lists(st.integers(0, outputs.n_samples - 1), min_size=1))
    elsewhere = frontier.on(outputs.take(np.array(samples)))
    assert elsewhere.index_at(max_drop=drop) == frontier.index_at(max_drop=drop)
    assert elsewhere.at(max_drop=drop).thresholds.tolist() == frontier.at(max_drop=drop).thresholds.tolist()


@given(frontiers())
def test_on_the_same_data_every_point_is_the_same(made):
    outputs, frontier = made
    again = frontier.on(outputs)
    assert again.accuracy == pytest.approx(frontier.accuracy, abs=1e-12)
    assert again.cost == pytest.approx(frontier.cost, abs=1e-12)


@given(frontiers())
def test_fixed_exits_equal_switching_on_each_alone(made):
    outputs, frontier = made
    for k in range(outputs.n_exits):
        alone = [-np.inf if j == k else np.inf for j in range(outputs.n_exits - 1)] + [-np.inf]
        fixed = (frontier.fixed_accuracy[k], frontier.fixed_cost[k])
        assert fixed == pytest.approx(reference.outcome(outputs, alone), abs=1e-9)


@given(frontiers())
def test_writing_and_reading_gives_the_same_frontier(made):
    _, frontier = made
    described, arrays = frontier.to_arrays()
    again = ParetoFrontier.from_arrays(json.loads(json.dumps(described)), arrays)
    for one, other in zip(frontier.points, again.points, strict=True):
        for name in ("accuracy", "cost", "exit_rates", "thresholds", "cutoffs", "params"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
    for name in ("full_accuracy", "fixed_accuracy", "fixed_cost", "n_samples"):
        assert np.array_equal(getattr(frontier, name), getattr(again, name)), name


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_not_dominated_equals_comparing_every_pair(pairs):
    kept = [
        i
        for i, (a, c) in enumerate(pairs)
        if not any((b >= a and d <= c and (b, d) != (a, c)) or ((b, d) == (a, c) and j < i)
                   for j, (b, d) in enumerate(pairs))
    ]  # fmt: skip
    found = not_dominated([a for a, _ in pairs], [float(c) for _, c in pairs])
    assert found.tolist() == sorted(kept, key=lambda i: pairs[i][1])


@pytest.mark.parametrize("search", ["auto", *SEARCHES])
@given(data=st.data())
def test_the_cheapest_exit_for_everybody_can_be_had(search, data):
    outputs = data.draw(exit_outputs(min_exits=1, max_exits=3 if search == "exact" else 5))
    frontier, _ = search_thresholds(outputs, search, n_points=5)
    assert frontier.cost.min() <= frontier.fixed_cost.min() + 1e-9
