import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adaptexit import CalibrationWarning
from adaptexit.calibrators import CPMCalibrator, PatienceCalibrator, ThresholdCalibrator
from adaptexit.core.outputs import ExitOutputs
from tests import reference
from tests.properties.strategies import batched, exit_outputs


def online_exits(calibrator, outputs, batches, point):
    """The exit of every sample, shape (N,), by the policy of a point, batch by batch."""
    return np.array(reference.online_exits(calibrator.policy(point=point), outputs, batches))


searches = st.sampled_from(["shared", "geometric", "auto", "coord"])


@given(st.data(), searches)
def test_online_decisions_equal_offline_routing(data, search):
    outputs = data.draw(exit_outputs(graded=False))
    calibrator = ThresholdCalibrator(search=search, n_points=4).fit(outputs)
    batches = data.draw(batched(outputs.n_samples))
    for point in calibrator.frontier_.points:
        offline = calibrator.exit_index(outputs, point)
        assert online_exits(calibrator, outputs, batches, point).tolist() == offline.tolist()


@given(st.data(), searches, st.integers(0, 2**32 - 1))
def test_rounding_of_the_scores_online_changes_no_exit(data, search, seed):
    outputs = data.draw(exit_outputs(graded=False, spacing=0.125))
    calibrator = ThresholdCalibrator(search=search, n_points=4).fit(outputs)
    noise = np.random.default_rng(seed).uniform(-1e-7, 1e-7, outputs.scores.shape)
    online = outputs.with_scores(outputs.scores + noise)
    batches = data.draw(batched(outputs.n_samples))
    for point in calibrator.frontier_.points:
        offline = calibrator.exit_index(outputs, point)
        assert online_exits(calibrator, online, batches, point).tolist() == offline.tolist()


@given(st.data(), st.sampled_from(["max_proba", "entropy", "margin"]))
def test_online_decisions_equal_offline_routing_for_scores_from_logits(data, score):
    n_exits, n_samples = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    logits = data.draw(arrays(np.float32, (n_exits, n_samples, 3), elements=st.integers(-40, 40))) / np.float32(4)
    labels = data.draw(arrays(np.int64, n_samples, elements=st.integers(0, 2)))
    outputs = ExitOutputs.from_logits(logits, labels, costs=np.arange(1, n_exits + 1))
    calibrator = ThresholdCalibrator(score, n_points=4).fit(outputs)
    batches = data.draw(batched(n_samples))
    for point in calibrator.frontier_.points:
        offline = calibrator.exit_index(outputs, point)
        assert online_exits(calibrator, outputs, batches, point).tolist() == offline.tolist()


@given(exit_outputs(graded=False), st.floats(0, 1.2))
def test_the_policy_of_a_budget_is_that_of_the_frontiers_point(outputs, budget):
    calibrator = ThresholdCalibrator(n_points=4).fit(outputs)
    budget = max(budget, calibrator.frontier_.cost.min())
    policy = calibrator.policy(budget=budget)
    assert policy.point is calibrator.frontier_.at(budget=budget)
    assert policy.full_cost == outputs.full_cost
    assert policy.path_costs.tolist() == outputs.path_costs(policy.point.on).tolist()


@given(exit_outputs(graded=False), st.floats(0, 1))
def test_the_policy_of_a_drop_is_that_of_the_frontiers_point(outputs, drop):
    calibrator = ThresholdCalibrator(n_points=4).fit(outputs)
    assert calibrator.policy(max_drop=drop).point is calibrator.frontier_.at(max_drop=drop)


CALIBRATORS = [lambda: ThresholdCalibrator(n_points=4), lambda: CPMCalibrator(margins=[0.0, 0.5]), PatienceCalibrator]


@given(st.data(), st.sampled_from(CALIBRATORS))
def test_samples_that_leave_online_spend_what_the_point_says(data, make):
    outputs = data.draw(exit_outputs(graded=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # few samples lack classes
        calibrator = make().fit(outputs)
    batches = data.draw(batched(outputs.n_samples))
    for point in calibrator.frontier_.points:
        policy = calibrator.policy(point=point)
        exits = online_exits(calibrator, outputs, batches, point)
        assert exits.tolist() == calibrator.exit_index(outputs, point).tolist()
        assert policy.runs[exits].all()
        assert policy.path_costs[exits].mean() / policy.full_cost == pytest.approx(point.cost)
        assert policy.runs.tolist() == calibrator.rescored(outputs).pricing.runs(point.on).tolist()
