import numpy as np
import pytest

from adaptexit.core.frontier import evaluate
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.routing import accepts, cutoffs_above, exit_index, midpoint, switched_on

INF = np.inf


@pytest.fixture
def outputs():
    return ExitOutputs(
        predictions=np.array([[0, 1, 1, 0], [0, 1, 0, 1], [0, 1, 0, 1]]),
        scores=np.array([[0.9, 0.8, 0.4, 0.3], [0.5, 0.6, 0.7, 0.2], [0.0, 0.0, 0.0, 0.0]]),
        labels=np.array([0, 1, 0, 1]),
        n_classes=2,
        stage_costs=[1.0, 1.0, 2.0],
        exit_costs=[0.5, 0.25, 4.0],
    )


def test_a_sample_leaves_at_the_first_exit_whose_threshold_its_score_exceeds(outputs):
    assert exit_index(outputs, np.array([0.4, 0.2, -INF])).tolist() == [0, 0, 1, 2]


def test_a_score_equal_to_the_threshold_stays(outputs):
    assert exit_index(outputs, np.array([0.8, INF, -INF])).tolist() == [0, 2, 2, 2]


def test_infinite_thresholds_mean_never_and_always(outputs):
    assert exit_index(outputs, np.array([INF, INF, -INF])).tolist() == [2, 2, 2, 2]
    assert exit_index(outputs, np.array([INF, -INF, -INF])).tolist() == [1, 1, 1, 1]


def test_thresholds_by_class_are_those_of_the_predicted_class(outputs):
    thresholds = np.array([[0.2, INF], [0.9, 0.1], [-INF, -INF]])
    assert exit_index(outputs, thresholds).tolist() == [0, 1, 2, 0]


def test_accuracy_cost_and_rates_of_thresholds_by_class(outputs):
    thresholds = np.array([[0.2, INF], [0.9, 0.1], [-INF, -INF]])
    point = evaluate(outputs, thresholds, thresholds, {"margin": 0.1})
    # exits 0, 1, 2, 0: costs 1.5, 2.75, 8.75, 1.5 of 8
    assert point.accuracy == 0.75
    assert point.cost == pytest.approx(14.5 / 4 / 8)
    assert point.exit_rates.tolist() == [0.5, 0.25, 0.25]
    assert point.params == {"margin": 0.1}
    assert point.on.tolist() == [True, True, True]


def test_an_exit_is_on_when_one_class_can_leave_there():
    assert switched_on(np.array([[INF, INF], [INF, 0.5], [-INF, -INF]])).tolist() == [False, True, True]
    assert switched_on(np.array([INF, -INF, -INF])).tolist() == [False, True, True]


def test_the_last_exit_is_on_whatever_its_threshold():
    assert switched_on(np.array([INF, INF])).tolist() == [False, True]


def test_accepting_a_batch_compares_each_score_with_the_cutoff_of_its_class():
    predictions, scores = np.array([0, 1, 1]), np.array([0.5, 0.5, 0.7], dtype=np.float32)
    assert accepts(predictions, scores, np.array([0.4, 0.6])).tolist() == [True, False, True]
    assert accepts(predictions, scores, 0.6).tolist() == [False, False, True]


def test_single_precision_scores_are_compared_with_the_cutoff_in_double_precision():
    score = np.float32(0.1)
    assert accepts(np.array([0]), np.array([score]), np.nextafter(float(score), 0)).tolist() == [True]
    assert accepts(np.array([0]), np.array([score]), float(score)).tolist() == [False]


def test_outputs_without_classes_are_routed_by_score():
    outputs = ExitOutputs(scores=np.array([[0.9, 0.1], [0.0, 0.0]]), quality=np.array([[1, 0], [0, 1]]), costs=[1, 2])
    assert exit_index(outputs, np.array([0.5, -INF])).tolist() == [0, 1]


def test_cutoffs_lie_half_way_to_the_next_observed_score():
    cutoffs = cutoffs_above(np.array([0.1, 0.2, 0.4, INF, -INF]), np.array([0.1, 0.2, 0.2, 0.4]))
    assert cutoffs == pytest.approx([0.15, 0.3, 0.4, INF, -INF])


@pytest.mark.parametrize(
    ("low", "high"),
    [(1 - 2.0**-53, 1.0), (0.5, 0.5 + 2.0**-53), (0.0, 5e-324), (-5e-324, 0.0), (-1.7e308, 1.7e308), (1.0, 2.0)],
)
def test_the_midpoint_separates_even_neighbouring_numbers(low, high):
    assert low <= midpoint(low, high) < high


def test_scores_one_rounding_apart_are_routed_as_calibrated():
    scores = np.array([[1.0, 1 - 2.0**-53, 0.5], [0, 0, 0]])
    outputs = ExitOutputs(scores=scores, quality=np.zeros((2, 3)), costs=[1, 2])
    cutoff = cutoffs_above(np.array([1 - 2.0**-53]), np.sort(scores[0]))[0]
    assert exit_index(outputs, np.array([cutoff, -INF])).tolist() == [0, 1, 1]
