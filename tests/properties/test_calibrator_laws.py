import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adaptexit.calibrators import ThresholdCalibrator
from adaptexit.core.outputs import ExitBatch, ExitOutputs
from tests.properties.strategies import exit_outputs


def online_exits(calibrator, outputs, batches, point):
    """Exits of all samples when each batch goes on with whoever has not been accepted."""
    exits = np.full(outputs.n_samples, -1)
    for alive in batches:
        for k in range(outputs.n_exits):
            if len(alive) == 0:
                break
            batch = ExitBatch(
                predictions=outputs.predictions[k][alive],
                scores=outputs.scores[k][alive],
                logits=None if outputs.logits is None else outputs.logits[k][alive],
            )
            leaves = calibrator.accept(k, batch, point)
            exits[alive[leaves]] = k
            alive = alive[~leaves]
    return exits


@st.composite
def batched(draw, n):
    """The samples in any order, cut into batches."""
    order = np.array(draw(st.permutations(range(n))), dtype=np.intp)
    cuts = draw(st.lists(st.integers(0, n), max_size=3))
    return np.split(order, sorted(cuts))


searches = st.sampled_from(["shared", "geometric", "auto", "coord"])


@given(st.data(), searches)
def test_online_accept_equals_offline_routing(data, search):
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
    rounded = outputs.with_scores(outputs.scores + noise)
    batches = data.draw(batched(outputs.n_samples))
    for point in calibrator.frontier_.points:
        offline = calibrator.exit_index(outputs, point)
        assert online_exits(calibrator, rounded, batches, point).tolist() == offline.tolist()


@given(st.data(), st.sampled_from(["max_proba", "entropy", "margin"]))
def test_online_accept_equals_offline_routing_for_scores_from_logits(data, score):
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
def test_the_point_of_a_budget_is_the_frontiers(outputs, budget):
    calibrator = ThresholdCalibrator(n_points=4).fit(outputs)
    budget = max(budget, calibrator.frontier_.cost.min())
    assert calibrator.operating_point(budget) is calibrator.frontier_.at(budget=budget)
