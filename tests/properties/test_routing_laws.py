import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adaptexit.core.frontier import evaluate
from adaptexit.core.routing import cutoffs_above, exit_index, summarise, switched_on
from tests import reference
from tests.properties.strategies import exit_outputs, thresholds_for


def cutoffs_of(outputs, thresholds):
    """Cutoffs of every cell of (K,) or (K, C) thresholds."""
    return np.stack([cutoffs_above(row, np.sort(s)) for row, s in zip(thresholds, outputs.scores, strict=True)])


@given(st.data())
def test_routing_equals_walking_every_sample(data):
    outputs = data.draw(exit_outputs())
    thresholds = data.draw(thresholds_for(outputs))
    assert exit_index(outputs, thresholds).tolist() == reference.route(outputs, thresholds)


@given(st.data())
def test_routing_by_class_equals_walking_every_sample(data):
    outputs = data.draw(exit_outputs(graded=False))
    thresholds = data.draw(thresholds_for(outputs, per_class=True))
    assert exit_index(outputs, thresholds).tolist() == reference.route(outputs, thresholds)


@given(st.data())
def test_accuracy_and_cost_equal_their_definitions(data):
    outputs = data.draw(exit_outputs())
    thresholds = data.draw(thresholds_for(outputs))
    point = evaluate(outputs, thresholds, cutoffs_of(outputs, thresholds))
    assert (point.accuracy, point.cost) == pytest.approx(reference.outcome(outputs, thresholds), abs=1e-9)


@given(st.data())
def test_accuracy_and_cost_by_class_equal_their_definitions(data):
    outputs = data.draw(exit_outputs(graded=False))
    thresholds = data.draw(thresholds_for(outputs, per_class=True))
    point = evaluate(outputs, thresholds, cutoffs_of(outputs, thresholds))
    assert (point.accuracy, point.cost) == pytest.approx(reference.outcome(outputs, thresholds), abs=1e-9)


@given(st.data())
def test_exit_rates_are_shares_of_the_samples(data):
    outputs = data.draw(exit_outputs())
    thresholds = data.draw(thresholds_for(outputs))
    exits = reference.route(outputs, thresholds)
    rates = evaluate(outputs, thresholds, cutoffs_of(outputs, thresholds)).exit_rates
    assert rates.tolist() == [exits.count(k) / outputs.n_samples for k in range(outputs.n_exits)]


@given(st.data())
def test_cutoffs_exit_the_same_calibration_samples_as_thresholds(data):
    outputs = data.draw(exit_outputs())
    thresholds = data.draw(thresholds_for(outputs))
    assert exit_index(outputs, cutoffs_of(outputs, thresholds)).tolist() == reference.route(outputs, thresholds)


@given(st.data())
def test_cutoffs_by_class_exit_the_same_calibration_samples(data):
    outputs = data.draw(exit_outputs(graded=False))
    thresholds = data.draw(thresholds_for(outputs, per_class=True))
    assert exit_index(outputs, cutoffs_of(outputs, thresholds)).tolist() == reference.route(outputs, thresholds)


@given(st.data())
def test_small_movements_of_the_scores_change_no_exit(data):
    outputs = data.draw(exit_outputs(spacing=0.125))
    thresholds = data.draw(thresholds_for(outputs))
    seed = data.draw(st.integers(0, 2**32 - 1))
    noise = np.random.default_rng(seed).uniform(-1e-7, 1e-7, outputs.scores.shape)
    on_the_spot = np.where(thresholds[:, None] == outputs.scores, 1e-8, 0.0)
    nearby = outputs.with_scores(outputs.scores.astype(np.float64) + noise + on_the_spot)
    cutoffs = cutoffs_of(outputs, thresholds)
    beyond = outputs.scores.max(axis=1) <= thresholds
    assume(not (beyond & np.isfinite(thresholds)).any())  # nothing observed above: no midpoint to keep away from
    assert exit_index(nearby, cutoffs).tolist() == exit_index(outputs, cutoffs).tolist()


@given(exit_outputs())
def test_with_every_exit_off_the_relative_cost_is_one(outputs):
    never = np.full(outputs.n_exits, np.inf)
    never[-1] = -np.inf
    point = evaluate(outputs, never, never)
    assert (point.cost, point.accuracy) == pytest.approx((1.0, outputs.full_accuracy), abs=1e-12)


@given(st.data())
def test_an_exit_that_is_off_is_not_paid_for(data):
    outputs = data.draw(exit_outputs(min_exits=2))
    thresholds = data.draw(thresholds_for(outputs)).copy()
    thresholds[data.draw(st.integers(0, outputs.n_exits - 2)) : -1] = np.inf
    off = [k for k in range(outputs.n_exits - 1) if k not in reference.exits_run(outputs, thresholds)]
    dearer = outputs.exit_costs.copy()
    dearer[data.draw(st.sampled_from(off))] += outputs.full_cost
    after = evaluate(outputs.with_costs(outputs.stage_costs, dearer), thresholds, thresholds)
    assert after.cost == evaluate(outputs, thresholds, thresholds).cost


@given(st.data())
def test_an_exit_that_is_run_is_paid_by_all_who_reach_it(data):
    outputs = data.draw(exit_outputs(min_exits=2))
    thresholds = data.draw(thresholds_for(outputs))
    run = reference.exits_run(outputs, thresholds)
    assume(run)
    k = data.draw(st.sampled_from(run))
    dearer = outputs.exit_costs.copy()
    dearer[k] += outputs.full_cost
    before = evaluate(outputs, thresholds, thresholds)
    after = evaluate(outputs.with_costs(outputs.stage_costs, dearer), thresholds, thresholds)
    share = np.mean(np.array(reference.route(outputs, thresholds)) >= k)
    assert after.cost == pytest.approx(before.cost + share, abs=1e-9)


@given(st.data())
def test_order_of_the_samples_does_not_matter(data):
    outputs = data.draw(exit_outputs(min_exits=2))
    thresholds = data.draw(thresholds_for(outputs))
    order = np.array(data.draw(st.permutations(range(outputs.n_samples))), dtype=np.intp)
    exits = exit_index(outputs, thresholds)
    assert exit_index(outputs.take(order), thresholds).tolist() == exits[order].tolist()


@given(st.data())
def test_each_exit_alone_costs_what_switching_on_only_it_costs(data):
    outputs = data.draw(exit_outputs())
    k = data.draw(st.integers(0, outputs.n_exits - 1))
    alone = np.full(outputs.n_exits, np.inf)
    alone[[k, -1]] = -np.inf
    exits = np.full(outputs.n_samples, k)
    _, cost, _ = summarise(outputs, exits, switched_on(alone))
    assert cost == pytest.approx(outputs.alone_costs()[k] / outputs.full_cost, abs=1e-12)
    assert cost == pytest.approx(reference.outcome(outputs, alone)[1], abs=1e-9)
