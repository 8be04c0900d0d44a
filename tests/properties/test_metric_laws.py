import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adaptexit.core.frontier import evaluate
from adaptexit.core.metrics import accuracy_at_reduction, exemplars, exit_calibration, flow, survivor_shift
from tests import reference
from tests.properties.strategies import exit_outputs, generators, permutations_of, sizes, thresholds_for


@st.composite
def points(draw, graded=None):
    """Outputs whose scores are probabilities, and an operating point of them."""
    outputs = draw(exit_outputs(max_samples=30, spacing=1 / 64, graded=graded))
    per_class = outputs.predictions is not None and draw(st.booleans())
    thresholds = draw(thresholds_for(outputs, per_class))
    return outputs, evaluate(outputs, thresholds, thresholds)


def samples_of(found):
    return [(near.samples, deep.samples) for near, deep in found.strips]


def classified():
    return points(graded=False)


def permuted(pair, order):
    outputs, point = pair
    return outputs.take(order), point


def fields_of(value):
    return dataclasses.asdict(value)


@given(points(), sizes(1, 12))
def test_calibration_errors_lie_between_zero_and_one(pair, n_bins):
    found = exit_calibration(*pair, n_bins)
    some = found.n > 0
    assert (np.isnan(found.ece) == ~some).all()
    assert (found.ece[some] >= 0).all()
    assert (found.ece[some] <= 1).all()


@given(points(), sizes(1, 12))
def test_everybody_is_in_one_bin_of_the_exit_they_leave_at(pair, n_bins):
    found = exit_calibration(*pair, n_bins)
    exits = reference.route(pair[0], pair[1].thresholds)
    assert found.n.sum() == pair[0].n_samples
    assert found.n.tolist() == [exits.count(k) for k in range(pair[0].n_exits)]
    assert found.count.sum(axis=1).tolist() == found.n.tolist()
    assert ((found.count == 0) == np.isnan(found.accuracy)).all()
    held = found.count > 0
    low, high = (side[held] for side in (found.edges[:, :-1], found.edges[:, 1:]))
    assert (found.confidence[held] >= low - 1e-9).all()
    assert (found.confidence[held] <= high + 1e-9).all()


@given(points())
def test_one_bin_compares_the_means(pair):
    outputs, point = pair
    found = exit_calibration(outputs, point, 1)
    exits = np.array(reference.route(outputs, point.thresholds))
    for k in np.unique(exits):
        gap = outputs.graded[k, exits == k].mean() - outputs.scores[k, exits == k].mean(dtype=np.float64)
        assert found.ece[k] == pytest.approx(abs(gap), abs=1e-9)


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
    found = flow(*pair)
    assert found[0].tolist() == np.bincount(pair[0].labels, minlength=pair[0].n_classes).tolist()
    assert (np.diff(found, axis=0) <= 0).all()
    assert (found >= 0).all()
    exits = np.array(reference.route(pair[0], pair[1].thresholds))
    assert found.sum(axis=1).tolist() == [(exits >= k).sum() for k in range(pair[0].n_exits)]


@given(classified())
def test_what_flow_loses_is_what_calibration_counts(pair):
    left = np.append(flow(*pair).sum(axis=1), 0)
    assert exit_calibration(*pair).n.tolist() == (-np.diff(left)).tolist()


@given(classified())
def test_shift_is_none_at_the_first_exit_and_never_negative(pair):
    found = survivor_shift(*pair)
    some = found.n > 0
    assert found.kl[0] == 0
    assert (found.kl[some] >= -1e-12).all()
    assert (np.isnan(found.kl) == ~some).all()
    counts = flow(*pair)
    gone = ((counts == 0) & (counts[0] > 0)).any(axis=1)
    assert (np.isinf(found.kl) == (gone & some)).all()


@given(classified())
def test_gini_lies_between_even_classes_and_a_single_one(pair):
    found, n_classes = survivor_shift(*pair), pair[0].n_classes
    some = found.n > 0
    assert (found.gini[some] >= -1e-12).all()
    assert (found.gini[some] <= 1 - 1 / n_classes + 1e-12).all()
    single = (flow(*pair) > 0).sum(axis=1) == 1
    assert found.gini[single] == pytest.approx(1 - 1 / n_classes, abs=1e-12)
    assert (found.top3[some] >= min(1, 3 / n_classes) - 1e-12).all()
    assert (found.top3[some] <= 1 + 1e-12).all()


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


# -- accuracy at equal cost -------------------------------------------------------------------------------------------


@st.composite
def curves(draw):
    """Reductions with equal ones among them, some negative, and accuracies."""
    rng, n = draw(generators), draw(sizes(1, 8))
    low = draw(st.sampled_from([-4, 1, -12]))
    return rng.integers(low, low + 12, size=n) / 16, rng.integers(17, size=n) / 16, float(rng.integers(17)) / 16


@given(curves())
def test_at_a_measured_reduction_the_best_accuracy_is_given(curve):
    reduction, accuracy, full = curve
    found = accuracy_at_reduction(reduction, accuracy, full, reduction)
    for r, value in zip(reduction, found, strict=True):
        best = accuracy[reduction == r].max()
        assert value == (max(best, full) if r == 0 else best)


@given(curves(), st.floats(-1, 1))
def test_matched_accuracy_lies_between_its_neighbours(curve, target):
    reduction, accuracy, full = curve
    found = float(accuracy_at_reduction(reduction, accuracy, full, target))
    assume(not np.isnan(found))
    at, worth = np.append(reduction, 0.0), np.append(accuracy, full)
    left, right = at[at <= target + 1e-9].max(), at[at >= target - 1e-9].min()
    best = [worth[at == r].max() for r in (left, right)]
    assert min(best) - 1e-6 <= found <= max(best) + 1e-6


@given(curves(), st.floats(-1, 1), st.floats(0, 0.3), st.booleans())
def test_where_an_answer_is_given(curve, target, below, clamp):
    reduction, accuracy, full = curve
    least, largest = reduction.min(), reduction.max()
    assume(min(abs(target - edge) for edge in (least, largest, least - below, largest + below, 0.0)) > 1e-6)
    inside = least <= target <= largest
    before = max(least - below, 0) <= target <= least
    beyond = clamp and largest <= target <= largest + below
    found = float(accuracy_at_reduction(reduction, accuracy, full, target, below=below, clamp=clamp))
    assert np.isnan(found) == (not (inside or before or beyond))


@given(curves(), st.floats(-1, 1), st.data())
def test_matched_accuracy_does_not_depend_on_the_order_of_the_points(curve, target, data):
    reduction, accuracy, full = curve
    order = data.draw(permutations_of(len(reduction)))
    one = accuracy_at_reduction(reduction, accuracy, full, target)
    other = accuracy_at_reduction(reduction[order], accuracy[order], full, target)
    assert np.array_equal(one, other, equal_nan=True)
