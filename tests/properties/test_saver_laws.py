import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adaptexit.core.saver import delta_cost, job_curve, job_ratio, required_cost, saver_reports
from tests import reference
from tests.properties.strategies import exit_outputs, increasing_maps, permutations_of, saver_pairs

costs = st.floats(0.01, 100)


@given(saver_pairs())
def test_job_ratio_equals_trying_every_confidence(pair):
    assert job_ratio(*pair) == reference.job_ratio(*pair)


@given(saver_pairs(), st.data())
def test_job_ratio_does_not_depend_on_the_order_of_the_samples(pair, data):
    order = data.draw(permutations_of(len(pair[0])))
    assert job_ratio(*(values[order] for values in pair)) == job_ratio(*pair)


@given(saver_pairs(), increasing_maps())
def test_job_ratio_does_not_change_under_an_increasing_map(pair, increasing):
    confidence, saver, base = pair
    assert job_ratio(increasing(confidence), saver, base) == job_ratio(*pair)


@given(saver_pairs(), st.integers(2, 4))
def test_job_ratio_does_not_change_when_the_data_are_repeated(pair, times):
    assert job_ratio(*(np.tile(values, times) for values in pair)) == job_ratio(*pair)


@given(saver_pairs())
def test_a_saver_that_is_right_where_the_base_is_takes_the_whole_job(pair):
    confidence, saver, _ = pair
    assert job_ratio(confidence, saver, saver) == 1.0


@given(saver_pairs(), st.data())
def test_a_saver_right_wherever_another_is_never_has_a_lower_job_ratio(pair, data):
    confidence, saver, base = pair
    better = saver | data.draw(arrays(np.bool_, len(saver)))
    assert job_ratio(confidence, better, base) >= job_ratio(confidence, saver, base)


@given(saver_pairs(), st.data())
def test_a_base_right_wherever_another_is_never_gives_a_higher_job_ratio(pair, data):
    confidence, saver, base = pair
    better = base | data.draw(arrays(np.bool_, len(base)))
    assert job_ratio(confidence, saver, better) <= job_ratio(confidence, saver, base)


@given(saver_pairs(), costs, costs)
def test_delta_cost_lies_between_taking_all_and_taking_nothing(pair, saver_cost, base_cost):
    ratio = saver_cost / base_cost
    assert ratio - 1 <= delta_cost(saver_cost, base_cost, job_ratio(*pair)) <= ratio


@given(saver_pairs(), costs, costs, st.floats(0, 1))
def test_delta_cost_equals_the_change_of_the_mean_cost(pair, saver_cost, base_cost, ratio):
    spent = ratio * saver_cost + (1 - ratio) * (base_cost + saver_cost)
    assert delta_cost(saver_cost, base_cost, ratio) == pytest.approx((spent - base_cost) / base_cost, abs=1e-9)


@given(saver_pairs())
def test_every_entry_of_the_curve_equals_its_definition(pair):
    confidence, saver, base = pair
    curve = job_curve(*pair)
    assert curve.threshold.tolist() == sorted(set(confidence.tolist()), reverse=True)
    for ratio, t, one, other in zip(
        curve.exit_ratio, curve.threshold, curve.saver_accuracy, curve.base_accuracy, strict=True
    ):
        leaving = confidence >= t
        assert ratio == leaving.mean()
        assert (one, other) == pytest.approx((saver[leaving].mean(), base[leaving].mean()))


@given(saver_pairs(), costs, costs, st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_required_cost_equals_trying_every_confidence(pair, saver_cost, base_cost, drops):
    drops = [*drops, 0.0, 1 / len(pair[0])]
    required = required_cost(*pair, saver_cost, base_cost, drops)
    expected = [reference.required_cost(*pair, saver_cost, base_cost, drop) for drop in drops]
    assert required == pytest.approx(expected)


@given(saver_pairs(), costs, costs, st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_required_cost_does_not_rise_with_the_drop(pair, saver_cost, base_cost, drops):
    assert (np.diff(required_cost(*pair, saver_cost, base_cost, sorted(drops))) <= 0).all()


@given(saver_pairs(), costs, costs)
def test_required_cost_without_a_drop_is_the_full_cost_and_delta_cost(pair, saver_cost, base_cost):
    lossless = required_cost(*pair, saver_cost, base_cost, [0.0])[0]
    assert lossless == pytest.approx(1 + delta_cost(saver_cost, base_cost, job_ratio(*pair)))


@st.composite
def cascades(draw, n_models, max_samples):
    """A cascade of whole models: no stages, every exit costs something."""
    outputs = draw(exit_outputs(n_models, n_models, max_samples, chained=False, graded=False))
    own = draw(st.lists(st.integers(1, 9), min_size=n_models - 1, max_size=n_models - 1))
    return outputs.with_costs(np.zeros(n_models), [*own, 10.0])


@given(cascades(2, 12))
def test_the_report_of_one_saver_is_delta_cost(cascade):
    (report,) = saver_reports(cascade)
    ratio = reference.job_ratio(cascade.scores[0], cascade.graded[0], cascade.graded[1])
    assert report.saver == 0
    assert report.job_ratio == ratio
    assert report.delta_cost == pytest.approx(cascade.exit_costs[0] / cascade.exit_costs[1] - ratio)


@given(cascades(2, 7))
def test_the_report_of_one_saver_is_the_cheapest_lossless_cascade_less_the_base(cascade):
    (report,) = saver_reports(cascade)
    cheapest = reference.least_cost(reference.every_outcome(cascade, always=(0,)), cascade.full_accuracy)
    assert report.delta_cost == pytest.approx(cheapest - 1)


@given(cascades(3, 6))
def test_reports_of_two_savers_equal_trying_all_thresholds_with_and_without_each(cascade):
    for k, report in enumerate(saver_reports(cascade)):
        with_it = reference.least_cost(reference.every_outcome(cascade, always=(k,)), cascade.full_accuracy)
        without = reference.least_cost(reference.every_outcome(cascade.drop_exit(k)), cascade.full_accuracy)
        assert report.saver == k
        assert report.delta_cost == pytest.approx(with_it - without, abs=1e-9)
        assert report.job_ratio == reference.job_ratio(cascade.scores[k], cascade.graded[k], cascade.graded[-1])
        assert report.pays == (report.delta_cost < 0)


@given(cascades(3, 6), st.floats(0.1, 1e9))
def test_reports_do_not_depend_on_the_unit_of_cost(cascade, unit):
    scaled = cascade.with_costs(cascade.stage_costs * unit, cascade.exit_costs * unit)
    for one, other in zip(saver_reports(cascade), saver_reports(scaled), strict=True):
        assert dataclasses.astuple(other) == pytest.approx(dataclasses.astuple(one), abs=1e-9)
