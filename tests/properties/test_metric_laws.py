import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptexit.core.frontier import evaluate
from adaptexit.core.metrics import exemplars, exit_calibration, flow, survivor_shift
from tests import reference
from tests.properties.strategies import exit_outputs, permutations_of, sizes, thresholds_for


@st.composite
def points(draw, graded=None):
    """Outputs whose scores are probabilities, and an operating point of them."""
    outputs = draw(exit_outputs(max_samples=30, spacing=1 / 64, graded=graded))
    per_class = outputs.predictions is not None and draw(st.booleans())
    thresholds = draw(thresholds_for(outputs, per_class))
    return outputs, evaluate(outputs, thresholds, thresholds)


def samples_of(examples):
    return [(near.samples, deep.samples) for near, deep in examples.strips]


def classified():
    return points(graded=False)


def permuted(pair, order):
    outputs, point = pair
    return outputs.take(order), point


def fields_of(value):
    return dataclasses.asdict(value)


@given(points(), sizes(1, 12))
def test_calibration_errors_lie_between_zero_and_one(pair, n_bins):
    calibration = exit_calibration(*pair, n_bins)
    some = calibration.n > 0
    assert (np.isnan(calibration.ece) == ~some).all()
    assert (calibration.ece[some] >= 0).all()
    assert (calibration.ece[some] <= 1).all()


@given(points(), sizes(1, 12))
def test_everybody_is_in_one_bin_of_the_exit_they_leave_at(pair, n_bins):
    calibration = exit_calibration(*pair, n_bins)
    exits = reference.route(pair[0], pair[1].thresholds)
    assert calibration.n.sum() == pair[0].n_samples
    assert calibration.n.tolist() == [exits.count(k) for k in range(pair[0].n_exits)]
    assert calibration.count.sum(axis=1).tolist() == calibration.n.tolist()
    assert ((calibration.count == 0) == np.isnan(calibration.accuracy)).all()
    filled = calibration.count > 0
    low, high = (side[filled] for side in (calibration.edges[:, :-1], calibration.edges[:, 1:]))
    assert (calibration.confidence[filled] >= low - 1e-9).all()
    assert (calibration.confidence[filled] <= high + 1e-9).all()


@given(points())
def test_one_bin_compares_the_means(pair):
    outputs, point = pair
    calibration = exit_calibration(outputs, point, 1)
    exits = np.array(reference.route(outputs, point.thresholds))
    for k in np.unique(exits):
        gap = outputs.graded[k, exits == k].mean() - outputs.scores[k, exits == k].mean(dtype=np.float64)
        assert calibration.ece[k] == pytest.approx(abs(gap), abs=1e-9)


@given(points(), st.data())
def test_calibration_does_not_depend_on_the_order_of_the_samples(pair, data):
    order = data.draw(permutations_of(pair[0].n_samples))
    one, other = exit_calibration(*pair), exit_calibration(*permuted(pair, order))
    for name, values in fields_of(one).items():
        assert fields_of(other)[name] == pytest.approx(values, nan_ok=True)


@given(classified(), st.data())
def test_survivors_do_not_depend_on_the_order_of_the_samples(pair, data):
    order = data.draw(permutations_of(pair[0].n_samples))
    assert flow(*permuted(pair, order)).tolist() == flow(*pair).tolist()


@given(classified())
def test_flow_falls_from_exit_to_exit_and_begins_with_everybody(pair):
    counts = flow(*pair)
    assert counts[0].tolist() == np.bincount(pair[0].labels, minlength=pair[0].n_classes).tolist()
    assert (np.diff(counts, axis=0) <= 0).all()
    assert (counts >= 0).all()
    exits = np.array(reference.route(pair[0], pair[1].thresholds))
    assert counts.sum(axis=1).tolist() == [(exits >= k).sum() for k in range(pair[0].n_exits)]


@given(classified())
def test_what_flow_loses_is_what_calibration_counts(pair):
    arrivals = np.append(flow(*pair).sum(axis=1), 0)
    assert exit_calibration(*pair).n.tolist() == (-np.diff(arrivals)).tolist()


@given(classified())
def test_shift_is_none_at_the_first_exit_and_never_negative(pair):
    shift = survivor_shift(*pair)
    some = shift.n > 0
    assert shift.kl[0] == 0
    assert (shift.kl[some] >= -1e-12).all()
    assert (np.isnan(shift.kl) == ~some).all()
    counts = flow(*pair)
    absent = ((counts == 0) & (counts[0] > 0)).any(axis=1)
    assert (np.isinf(shift.kl) == (absent & some)).all()


@given(classified())
def test_gini_lies_between_even_classes_and_a_single_one(pair):
    shift, n_classes = survivor_shift(*pair), pair[0].n_classes
    some = shift.n > 0
    assert (shift.gini[some] >= -1e-12).all()
    assert (shift.gini[some] <= 1 - 1 / n_classes + 1e-12).all()
    single = (flow(*pair) > 0).sum(axis=1) == 1
    assert shift.gini[single] == pytest.approx(1 - 1 / n_classes, abs=1e-12)
    assert (shift.top3[some] >= min(1, 3 / n_classes) - 1e-12).all()
    assert (shift.top3[some] <= 1 + 1e-12).all()


@given(exit_outputs(max_samples=30, spacing=1 / 64, graded=False), st.data())
def test_shift_does_not_depend_on_what_classes_are_called(outputs, data):
    thresholds = data.draw(thresholds_for(outputs))
    point = evaluate(outputs, thresholds, thresholds)
    names = data.draw(permutations_of(outputs.n_classes))
    renamed = dataclasses.replace(outputs, labels=names[outputs.labels], predictions=names[outputs.predictions])
    one, other = survivor_shift(outputs, point), survivor_shift(renamed, point)
    for name, values in fields_of(one).items():
        assert fields_of(other)[name] == pytest.approx(values, nan_ok=True, abs=1e-12)
    assert flow(renamed, point)[:, names].tolist() == flow(outputs, point).tolist()


@given(points(), sizes(1, 8))
def test_exemplars_leave_where_they_are_shown_and_are_right(pair, n):
    outputs, point = pair
    exits = np.array(reference.route(outputs, point.thresholds))
    for k, (near, deep) in enumerate(samples_of(exemplars(outputs, point, n))):
        right = (exits == k) & (outputs.graded[k] == 1)
        assert len(near) == len(deep) == min(n, right.sum())
        assert len(set(near.tolist())) == len(near)
        assert right[near].all()
        assert right[deep].all()
        assert (np.diff(outputs.scores[k, deep]) <= 0).all()
        shallower = np.setdiff1d(np.flatnonzero(right), deep)
        assert not len(shallower) or outputs.scores[k, shallower].max() <= outputs.scores[k, deep].min()
