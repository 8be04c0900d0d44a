import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adaptexit.core.answer import Answer
from adaptexit.core.costs import Costs
from adaptexit.core.frontier import evaluate
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.policy import ExitAlone, ThresholdPolicy, recorded_scores
from adaptexit.core.routing import exit_index
from adaptexit.core.scores import max_proba, widened
from tests import reference
from tests.properties.strategies import batched, exit_outputs, thresholds_for

INF = np.inf


def point_of(outputs, thresholds):
    return evaluate(outputs, np.array(thresholds, dtype=float), np.array(thresholds, dtype=float))


def three_exits(**more):
    costs = {"stage_costs": [1.0, 2.0, 4.0], "exit_costs": [0.5, 0.25, 1.0]}
    scores = [[0.9, 0.2, 0.4], [0.1, 0.8, 0.6], [0.0, 0.0, 0.0]]
    return ExitOutputs(scores=np.array(scores), quality=np.ones((3, 3)), **costs, **more)


def answer_of(scores, **more):
    return Answer(predictions=np.zeros(len(scores), dtype=int), scores=np.array(scores), **more)


def cumulative_scores(k, batch, memory):
    """Scores added up over the exits: what is remembered is the sum so far."""
    total = batch.scores if memory is None else batch.scores + memory[:, 0]
    return total, total[:, None]


def scores_of_logits(k, batch, memory):
    return max_proba(widened(batch.logits)), None


# -- thresholds --------------------------------------------------------------------------------------------------------


def test_scores_above_the_cutoff_leave_and_are_what_the_decision_shows():
    outputs = three_exits()
    policy = ThresholdPolicy.of(point_of(outputs, [0.4, INF, -INF]), outputs.pricing)
    decision = policy.decide(0, answer_of([0.9, 0.4, 0.2]))
    assert decision.leave.tolist() == [True, False, False]
    assert decision.scores.tolist() == [0.9, 0.4, 0.2]
    assert decision.memory is None


def test_the_scores_of_a_decision_are_those_that_were_compared():
    outputs = three_exits()
    policy = ThresholdPolicy.of(
        point_of(outputs, [-0.5, INF, -INF]), outputs.pricing, lambda k, batch, memory: (-batch.scores, None)
    )
    decision = policy.decide(0, answer_of([0.9, 0.4, 0.2]))
    assert decision.scores.tolist() == [-0.9, -0.4, -0.2]
    assert decision.leave.tolist() == [False, True, True]


def test_a_cutoff_by_class_is_that_of_the_predicted_class():
    outputs = ExitOutputs(
        predictions=np.array([[0, 1], [0, 1]]), scores=np.full((2, 2), 0.5), labels=np.array([0, 1]), n_classes=2,
        costs=[1, 2],
    )  # fmt: skip
    policy = ThresholdPolicy.of(point_of(outputs, [[0.4, 0.6], [-INF, -INF]]), outputs.pricing)
    batch = Answer(predictions=np.array([0, 1, 1]), scores=np.array([0.5, 0.5, 0.7]))
    assert policy.decide(0, batch).leave.tolist() == [True, False, True]


def test_what_is_run_and_paid_is_what_the_point_switches_on():
    outputs = three_exits()
    policy = ThresholdPolicy.of(point_of(outputs, [INF, 0.5, -INF]), outputs.pricing)
    assert policy.runs.tolist() == [False, True, True]
    assert policy.path_costs.tolist() == [1.0, 3.25, 8.25]
    assert policy.full_cost == 8.0
    assert not policy.needs_logits
    assert not policy.needs_features


def test_exits_before_a_chained_one_are_run_and_let_nobody_leave():
    outputs = three_exits(chained=True)
    policy = ThresholdPolicy.of(point_of(outputs, [INF, 0.5, -INF]), outputs.pricing)
    assert policy.runs.tolist() == [True, True, True]
    assert policy.path_costs.tolist() == [1.5, 3.75, 8.75]
    assert policy.decide(0, answer_of([INF, 1.0])).leave.tolist() == [False, False]


def test_memory_goes_from_exit_to_exit_with_those_who_stay():
    outputs = three_exits()
    policy = ThresholdPolicy.of(point_of(outputs, [0.8, 0.9, -INF]), outputs.pricing, cumulative_scores)
    first = policy.decide(0, answer_of([0.9, 0.2, 0.4]))
    assert first.leave.tolist() == [True, False, False]
    second = policy.decide(1, answer_of([0.75, 0.25]), first.memory[~first.leave])
    assert second.scores == pytest.approx([0.95, 0.65])
    assert second.leave.tolist() == [True, False]


def test_needs_are_those_of_the_scoring():
    outputs = three_exits()
    point = point_of(outputs, [0.4, INF, -INF])
    policy = ThresholdPolicy.of(point, outputs.pricing, scores_of_logits, needs_logits=True, needs_features=True)
    assert policy.needs_logits
    assert policy.needs_features
    assert policy.decide(0, answer_of([0.0], logits=np.array([[0.0, 0.0]]))).leave.tolist() == [True]


@given(st.data())
def test_online_decisions_equal_offline_routing(data):
    outputs = data.draw(exit_outputs())
    per_class = outputs.predictions is not None and data.draw(st.booleans())
    point = point_of(outputs, data.draw(thresholds_for(outputs, per_class)))
    policy = ThresholdPolicy.of(point, outputs.pricing)
    exits = reference.online_exits(policy, outputs, data.draw(batched(outputs.n_samples)))
    assert exits == exit_index(outputs, point.cutoffs).tolist()
    assert exits == reference.route(outputs, point.thresholds)


@given(st.data())
def test_online_decisions_on_logits_equal_offline_routing(data):
    n_exits, n_samples = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    logits = data.draw(arrays(np.float32, (n_exits, n_samples, 3), elements=st.integers(-40, 40))) / np.float32(4)
    labels = data.draw(arrays(np.int64, n_samples, elements=st.integers(0, 2)))
    outputs = ExitOutputs.from_logits(logits, labels, score="max_proba", costs=np.arange(1, n_exits + 1))
    point = point_of(outputs, data.draw(thresholds_for(outputs, data.draw(st.booleans()))))
    policy = ThresholdPolicy.of(point, outputs.pricing, scores_of_logits, needs_logits=True)
    elsewhere = outputs.with_scores(np.zeros_like(outputs.scores))  # the recorded scores must not matter
    exits = reference.online_exits(policy, elsewhere, data.draw(batched(n_samples)))
    assert exits == exit_index(outputs, point.cutoffs).tolist()


@given(st.data())
def test_online_decisions_that_remember_equal_offline_routing(data):
    outputs = data.draw(exit_outputs(chained=True, spacing=0.125))
    summed = outputs.with_scores(np.cumsum(outputs.scores, axis=0, dtype=np.float64))
    point = point_of(summed, data.draw(thresholds_for(summed, outputs.predictions is not None)))
    policy = ThresholdPolicy.of(point, outputs.pricing, cumulative_scores)
    exits = reference.online_exits(policy, outputs, data.draw(batched(outputs.n_samples)))
    assert exits == exit_index(summed, point.cutoffs).tolist()


@given(st.data())
def test_what_samples_spend_on_average_is_the_cost_of_the_point(data):
    outputs = data.draw(exit_outputs())
    point = point_of(outputs, data.draw(thresholds_for(outputs, outputs.predictions is not None)))
    policy = ThresholdPolicy.of(point, outputs.pricing)
    exits = reference.online_exits(policy, outputs, [np.arange(outputs.n_samples)])
    assert policy.path_costs[exits].mean() / policy.full_cost == pytest.approx(point.cost, abs=1e-9)
    run = [*reference.exits_run(outputs, point.thresholds), outputs.n_exits - 1]
    assert np.flatnonzero(policy.runs).tolist() == run


def test_recorded_scores_are_passed_on_untouched():
    scores = np.array([0.5, 0.25], dtype=np.float32)
    unchanged, memory = recorded_scores(0, Answer(predictions=np.array([0, 0]), scores=scores), None)
    assert unchanged is scores
    assert memory is None


# -- one exit alone ----------------------------------------------------------------------------------------------------


@given(st.data())
def test_an_exit_alone_answers_for_everybody_at_what_it_costs_alone(data):
    outputs = data.draw(exit_outputs())
    k = data.draw(st.integers(0, outputs.n_exits - 1))
    policy = ExitAlone.of(k, outputs.pricing)
    assert reference.online_exits(policy, outputs, data.draw(batched(outputs.n_samples))) == [k] * outputs.n_samples
    assert policy.path_costs[k] == outputs.alone_costs()[k]
    assert policy.full_cost == outputs.full_cost


def test_an_exit_alone_runs_earlier_ones_only_where_it_reads_them():
    stages, exits = np.ones(4), np.full(4, 0.5)
    assert ExitAlone.of(2, Costs(stages, exits)).runs.tolist() == [False, False, True, True]
    assert ExitAlone.of(2, Costs(stages, exits, chained=True)).runs.tolist() == [True, True, True, True]


def test_an_exit_alone_lets_nobody_leave_before_it_and_needs_nothing():
    policy = ExitAlone.of(1, Costs(np.ones(3), np.ones(3), chained=True))
    batch = answer_of([0.5, 0.75])
    assert [policy.decide(k, batch).leave.tolist() for k in range(3)] == [[False] * 2, [True] * 2, [True] * 2]
    assert policy.decide(1, batch).scores is batch.scores
    assert policy.decide(1, batch).memory is None
    assert not policy.needs_logits
    assert not policy.needs_features
