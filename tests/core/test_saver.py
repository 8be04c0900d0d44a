import numpy as np
import pytest

from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.saver import SaverReport, delta_cost, job_curve, job_ratio, required_cost, saver_reports


def test_the_last_crossing_counts_not_the_first_noisy_one():
    confidence = np.arange(10, 0, -1)
    saver = np.array([1, 0, 1, 1, 1, 1, 0, 0, 0, 0])
    base = np.array([1, 1, 1, 1, 0, 1, 1, 1, 1, 1])
    curve = job_curve(confidence, saver, base)
    assert (curve.saver_accuracy >= curve.base_accuracy).tolist() == [True] + 3 * [False] + 2 * [True] + 4 * [False]
    assert curve.job_ratio == job_ratio(confidence, saver, base) == 0.6


def test_equal_confidences_leave_together():
    assert job_ratio([0.9, 0.5, 0.5], [1, 1, 0], [1, 1, 1]) == pytest.approx(1 / 3)
    assert job_ratio([0.9, 0.5, 0.5], [1, 0, 1], [1, 1, 1]) == pytest.approx(1 / 3)
    assert job_ratio([0.9, 0.5, 0.5], [1, 0, 1], [1, 1, 0]) == 1.0


def test_a_saver_worse_from_the_start_takes_nothing():
    assert job_ratio([3, 2, 1], [0, 0, 0], [1, 1, 1]) == 0.0


def test_qualities_may_be_fractions():
    curve = job_curve([0.3, 0.9], [0.25, 0.75], [0.5, 0.5])
    assert curve.threshold.tolist() == [0.9, 0.3]
    assert curve.exit_ratio.tolist() == [0.5, 1.0]
    assert curve.saver_accuracy.tolist() == [0.75, 0.5]
    assert curve.base_accuracy.tolist() == [0.5, 0.5]
    assert curve.job_ratio == 1.0


def test_sums_that_round_differently_are_still_equal():
    assert job_ratio([3, 2, 1], [0.3, 0.2, 0.1], [0.1, 0.2, 0.3]) == 1.0


def test_delta_cost_is_the_papers():
    assert delta_cost(1.0, 4.0, 0.75) == -0.5
    assert delta_cost(1.0, 4.0, 0.0) == 0.25


def test_required_cost_of_the_papers_columns():
    n = 1000
    confidence = np.arange(n, 0, -1)
    base = np.ones(n)
    saver = np.ones(n)
    saver[[500, 600, 700, 800, 810, 820, 830, 840, 850, 860, 900]] = 0
    required = required_cost(confidence, saver, base, saver_cost=1.0, base_cost=10.0)
    assert required == pytest.approx(1.1 - np.array([900, 820, 600, 500]) / n)


def test_required_cost_lies_above_the_base_where_the_saver_takes_nothing():
    assert required_cost([2, 1], [0, 0], [1, 1], 1.0, 10.0, drops=[0.0]).tolist() == [1.1]


def test_a_drop_that_is_a_whole_number_of_samples_allows_that_many():
    n = 10
    saver = np.ones(n)
    saver[3:6] = 0
    required = required_cost(np.arange(n, 0, -1), saver, np.ones(n), 1.0, 10.0, drops=[0.1, 0.2, 0.3])
    assert required == pytest.approx([1.1 - 0.4, 1.1 - 0.5, 1.1 - 1.0])


def test_a_drop_times_the_samples_may_round_down():
    assert 0.29 * 100 < 29
    saver = np.ones(100)
    saver[50:79] = 0
    assert required_cost(np.arange(100, 0, -1), saver, np.ones(100), 1.0, 10.0, drops=[0.29]) == pytest.approx([0.1])


def cascade(qualities, own_costs):
    n_models, n_samples = np.shape(qualities)
    return ExitOutputs(
        scores=np.tile(np.arange(n_samples, 0, -1.0), (n_models, 1)),
        quality=np.array(qualities, dtype=float),
        stage_costs=np.zeros(n_models),
        exit_costs=own_costs,
    )


def test_a_saver_that_pays_and_one_that_does_not():
    pays = cascade([[1, 1, 1, 0], [1, 1, 1, 1]], [1.0, 10.0])
    assert saver_reports(pays) == [SaverReport(0, pytest.approx(0.1 - 0.75), 0.75)]
    assert saver_reports(pays)[0].pays
    useless = cascade([[0, 1, 1, 1], [1, 0, 0, 1]], [1.0, 10.0])
    assert saver_reports(useless)[0].pays
    hopeless = cascade([[0, 0, 0, 0], [1, 1, 1, 1]], [1.0, 10.0])
    assert saver_reports(hopeless) == [SaverReport(0, pytest.approx(0.1), 0.0)]
    assert not saver_reports(hopeless)[0].pays


def test_a_middle_model_that_only_repeats_the_first_does_not_pay():
    first = [1, 1, 0, 0]
    first_report, middle_report = saver_reports(cascade([first, first, [1, 1, 1, 1]], [1.0, 4.0, 10.0]))
    assert first_report.pays
    assert not middle_report.pays
    assert middle_report.delta_cost == pytest.approx(4.0 * 0.5 / 10.0)
    assert middle_report.job_ratio == 0.5


def test_a_middle_model_that_finishes_most_of_the_job_pays():
    reports = saver_reports(cascade([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]], [1.0, 2.0, 10.0]))
    # with the first: 1 + 0.75 * 2 = 2.5; the middle model alone: 2; the first and the last: 1 + 0.75 * 10
    assert [report.delta_cost for report in reports] == pytest.approx([0.05, 0.2 - 0.85])
    assert [report.pays for report in reports] == [False, True]


@pytest.mark.slow
def test_four_models_are_weighed_against_the_cascade_without_each():
    sure = np.repeat([1.0, 0.0], 20)
    outputs = ExitOutputs(
        scores=np.stack([sure, sure, np.ones(40), np.ones(40)]),
        quality=np.stack([sure, sure, np.ones(40), np.ones(40)]),
        stage_costs=np.zeros(4),
        exit_costs=[1.0, 2.0, 4.0, 20.0],
    )
    reports = saver_reports(outputs)
    # half leave at the first, the rest at the third: 1 + 0.5 * 4 = 3
    assert [report.delta_cost * 20 for report in reports] == pytest.approx([3 - 4, 4 - 3, 3 - 11])
    assert [report.job_ratio for report in reports] == [0.5, 0.5, 1.0]


def test_a_model_alone_has_no_savers():
    assert saver_reports(cascade([[1, 0]], [1.0])) == []


def test_confidences_of_any_number_type_sort_alike():
    assert job_ratio(np.uint8([0, 200, 100]), [0, 1, 1], [1, 1, 1]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("confidence", [[], [1.0, 0.5], [[1.0, 0.5, 0.2]]])
def test_confidences_and_qualities_have_one_shape(confidence):
    with pytest.raises(ValueError, match="must have one shape"):
        job_ratio(confidence, [1, 0, 1], [1, 1, 1])


def test_confidences_are_finite():
    with pytest.raises(ValueError, match="confidence must be finite"):
        job_ratio([1.0, np.nan, 0.5], [1, 0, 1], [1, 1, 1])
