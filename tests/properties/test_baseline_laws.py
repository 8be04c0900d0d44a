import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adaptexit.core.baselines import fixed_exits, oracle, oracle_exits, patience, patience_exits, random_routing
from adaptexit.core.frontier import evaluate
from tests.properties.strategies import exit_outputs, increasing_maps, permutations_of, thresholds_for


def rules(outputs):
    """Every simple rule's points."""
    by_class = [] if outputs.predictions is None else patience(outputs)
    return [*fixed_exits(outputs), random_routing(outputs), oracle(outputs), *by_class]


def figures(outputs):
    return [(point.accuracy, point.cost, *point.exit_rates) for point in rules(outputs)]


# -- the oracle -------------------------------------------------------------------------------------------------------


@given(exit_outputs())
def test_no_simple_rule_is_more_accurate_than_the_oracle(outputs):
    assert all(oracle(outputs).accuracy >= point.accuracy - 1e-12 for point in rules(outputs))


@given(st.data())
def test_no_thresholds_beat_the_oracle(data):
    outputs = data.draw(exit_outputs())
    thresholds = data.draw(thresholds_for(outputs))
    point, best = evaluate(outputs, thresholds, thresholds), oracle(outputs)
    assert point.accuracy <= best.accuracy + 1e-12
    if point.accuracy >= best.accuracy - 1e-9:
        assert best.cost <= point.cost + 1e-12


@given(st.data())
def test_no_choice_of_exits_beats_the_oracle(data):
    outputs = data.draw(exit_outputs())
    samples = np.arange(outputs.n_samples)
    choice = data.draw(st.sampled_from([0.0, 0.1, 1.0]).flatmap(lambda share: other_choice(outputs, share)))
    costs, quality = outputs.alone_costs(), outputs.graded.astype(float)
    best = oracle(outputs)
    accuracy, cost = quality[choice, samples].mean(), costs[choice].mean() / outputs.full_cost
    assert accuracy <= best.accuracy + 1e-12
    if accuracy >= best.accuracy - 1e-9:
        assert best.cost <= cost + 1e-12


@st.composite
def other_choice(draw, outputs, share):
    """One of the best exits of each sample, and for a share of the samples any exit."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    quality = outputs.graded.astype(float)
    best = np.argmax(rng.random(quality.shape) * (quality == quality.max(axis=0)), axis=0)
    return np.where(rng.random(outputs.n_samples) < share, rng.integers(outputs.n_exits, size=len(best)), best)


@given(exit_outputs(graded=False))
def test_the_oracle_is_right_where_any_exit_is(outputs):
    assert oracle(outputs).accuracy == pytest.approx(outputs.graded.any(axis=0).mean())


@given(exit_outputs())
def test_where_no_exit_beats_the_full_model_the_oracle_costs_no_more(outputs):
    quality = np.minimum(outputs.graded, outputs.graded[-1])
    bounded = dataclasses.replace(outputs, quality=quality)
    assert oracle(bounded).accuracy == pytest.approx(bounded.full_accuracy)
    assert oracle(bounded).cost <= 1.0 + 1e-12


@given(st.data())
def test_another_exit_never_makes_the_oracle_less_accurate(data):
    outputs = data.draw(exit_outputs(min_exits=2))
    fewer = outputs.drop_exit(data.draw(st.integers(0, outputs.n_exits - 2)))
    assert oracle(outputs).accuracy >= oracle(fewer).accuracy - 1e-12


@given(st.data())
def test_the_oracle_keeps_the_order_of_qualities_only(data):
    outputs = data.draw(exit_outputs(graded=True))
    quality = data.draw(increasing_maps())(outputs.quality)
    assert oracle_exits(dataclasses.replace(outputs, quality=quality)).tolist() == oracle_exits(outputs).tolist()


# -- exits alone and at random ----------------------------------------------------------------------------------------


@given(exit_outputs())
def test_each_exit_alone_is_the_thresholds_that_let_everybody_leave_there(outputs):
    for k, point in enumerate(fixed_exits(outputs)):
        alone = np.full(outputs.n_exits, np.inf)
        alone[[k, -1]] = -np.inf
        expected = evaluate(outputs, alone, alone)
        assert (point.accuracy, point.cost) == pytest.approx((expected.accuracy, expected.cost), abs=1e-12)
        assert point.exit_rates.tolist() == expected.exit_rates.tolist()


@given(exit_outputs())
def test_the_last_exit_alone_is_the_full_model(outputs):
    full = fixed_exits(outputs)[-1]
    assert (full.accuracy, full.cost) == pytest.approx((outputs.full_accuracy, 1.0), abs=1e-12)


@given(exit_outputs())
def test_random_routing_is_the_mean_of_the_exits_alone(outputs):
    at_random, alone = random_routing(outputs), fixed_exits(outputs)
    for name in ("accuracy", "cost", "exit_rates"):
        mean = np.mean([getattr(point, name) for point in alone], axis=0)
        np.testing.assert_allclose(getattr(at_random, name), mean, atol=1e-12)


# -- patience ---------------------------------------------------------------------------------------------------------


@given(st.data())
def test_more_patience_leaves_no_sample_earlier_and_costs_no_less(data):
    outputs = data.draw(exit_outputs(min_exits=2, graded=False))
    count = data.draw(st.integers(1, outputs.n_exits))
    assert (patience_exits(outputs, count) <= patience_exits(outputs, count + 1)).all()
    costs = [point.cost for point in patience(outputs)]
    assert costs == pytest.approx(sorted(costs), abs=1e-12)


@given(exit_outputs(min_exits=2, graded=False))
def test_the_largest_patience_is_the_full_model_that_pays_for_every_exit(outputs):
    largest = patience(outputs)[-1]
    cost = (outputs.stage_costs.sum() + outputs.exit_costs.sum()) / outputs.full_cost
    assert (largest.accuracy, largest.cost) == pytest.approx((outputs.full_accuracy, cost), abs=1e-12)


@given(exit_outputs(graded=False, max_exits=7))
def test_nobody_leaves_before_patience_can_be_over(outputs):
    for point in patience(outputs):
        early = min(point.params["patience"], outputs.n_exits - 1)
        assert not point.exit_rates[:early].any()


@given(st.data())
def test_patience_looks_at_nothing_but_whether_answers_are_the_same(data):
    outputs = data.draw(exit_outputs(min_exits=2, graded=False))
    count = data.draw(st.integers(1, outputs.n_exits))
    renamed = data.draw(permutations_of(outputs.n_classes))[outputs.predictions]
    other = dataclasses.replace(
        outputs, predictions=renamed, scores=-outputs.scores, labels=np.zeros_like(outputs.labels),
        chained=not outputs.chained,
    )  # fmt: skip
    assert patience_exits(other, count).tolist() == patience_exits(outputs, count).tolist()
    costs = [[point.cost for point in patience(o)] for o in (outputs, other)]
    assert costs[0] == costs[1]


# -- all rules --------------------------------------------------------------------------------------------------------


@given(exit_outputs())
def test_everybody_is_answered_once(outputs):
    for point in rules(outputs):
        assert point.exit_rates.shape == (outputs.n_exits,)
        assert point.exit_rates.sum() == pytest.approx(1.0)
        assert (point.exit_rates >= 0).all()


@given(st.data())
def test_order_of_the_samples_does_not_matter(data):
    outputs = data.draw(exit_outputs())
    order = data.draw(permutations_of(outputs.n_samples))
    assert oracle_exits(outputs.take(order)).tolist() == oracle_exits(outputs)[order].tolist()
    np.testing.assert_allclose(figures(outputs.take(order)), figures(outputs), atol=1e-12)


@given(exit_outputs())
def test_samples_counted_twice_change_nothing(outputs):
    twice = outputs.take(np.repeat(np.arange(outputs.n_samples), 2))
    np.testing.assert_allclose(figures(twice), figures(outputs), atol=1e-12)


@given(st.data())
def test_the_unit_of_cost_does_not_matter(data):
    outputs = data.draw(exit_outputs())
    unit = data.draw(st.sampled_from([0.5, 8.0, 1024.0]))
    scaled = outputs.with_costs(outputs.stage_costs * unit, outputs.exit_costs * unit)
    np.testing.assert_allclose(figures(scaled), figures(outputs), atol=1e-12)


@given(st.data())
def test_what_the_full_model_alone_runs_is_paid_by_those_it_answers(data):
    outputs = data.draw(exit_outputs(min_exits=2))
    more = outputs.exit_costs.copy()
    more[-1] += outputs.full_cost
    dearer = outputs.with_costs(outputs.stage_costs, more)
    assume((oracle_exits(dearer) == oracle_exits(outputs)).all())
    for before, after in zip(rules(outputs), rules(dearer), strict=True):
        assert 2.0 * after.cost == pytest.approx(before.cost + before.exit_rates[-1], abs=1e-9)
