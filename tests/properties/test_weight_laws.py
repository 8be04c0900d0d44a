"""Laws of weights of samples: whole ones are repetitions, 0 is absence, and only ratios count."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptexit import CPMCalibrator, ThresholdCalibrator
from adaptexit.core.frontier import evaluate
from adaptexit.core.metrics import exit_calibration, survivor_shift
from adaptexit.core.routing import cutoffs_above
from adaptexit.core.saver import job_curve
from adaptexit.core.search import SEARCH_NAMES, search_thresholds
from adaptexit.core.search.methods import geometric_path, shared_path
from adaptexit.core.search.problem import Problem
from tests.properties.strategies import class_outputs, exit_outputs, generators, policies_for, thresholds_for


@st.composite
def weighted(draw, outputs, least=0):
    """Outputs with small whole weights, and the weights."""
    weights = draw(generators).integers(least, 4, size=outputs.n_samples)
    weights[draw(st.integers(0, outputs.n_samples - 1))] = 3
    return dataclasses.replace(outputs, sample_weight=weights), weights


QUICK = [name for name in SEARCH_NAMES[1:] if name != "coord"]

PATHS = (lambda problem: geometric_path(problem, rounded_up=True), shared_path)


def cutoffs_of(outputs, thresholds):
    rows = zip(thresholds, outputs.scores, strict=True)
    return np.stack([cutoffs_above(row, np.sort(scores)) for row, scores in rows])


def same_point(one, other, **tolerance):
    for name in ("accuracy", "cost", "exit_rates"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-9, abs=1e-12), name


@given(st.data(), exit_outputs())
def test_whole_weights_repeat_samples(data, outputs):
    own, weights = data.draw(weighted(outputs))
    repeated = outputs.take(np.repeat(np.arange(outputs.n_samples), weights))
    thresholds = data.draw(thresholds_for(outputs))
    cutoffs = cutoffs_of(outputs, thresholds)
    same_point(*(evaluate(o, thresholds, cutoffs) for o in (own, repeated)))
    assert own.accuracies == pytest.approx(repeated.accuracies, abs=1e-12)
    assert own.full_accuracy == own.accuracies[-1]
    assert 1 - 1e-9 <= own.effective_size <= np.count_nonzero(weights) + 1e-9


@given(st.data(), exit_outputs())
def test_standard_errors_are_those_of_weighted_means(data, outputs):
    own, _ = data.draw(weighted(outputs))
    thresholds = data.draw(thresholds_for(outputs))
    point = evaluate(own, thresholds, cutoffs_of(outputs, thresholds))
    w = np.ones(outputs.n_samples) if own.sample_weight is None else own.sample_weight
    exits = np.argmax(own.scores > point.cutoffs[:, None], axis=0)
    x = own.graded[exits, np.arange(len(w))].astype(float)
    c = own.path_costs(point.on)[exits] / own.full_cost
    d = x - own.graded[-1]
    step = 1.0 if own.graded.dtype == bool else np.abs(own.graded - own.graded[-1])[:, w > 0].max()
    errors = [np.sqrt((w**2 * (v - np.average(v, weights=w)) ** 2).sum()) / w.sum() for v in (x, c)]
    expected = [*errors, np.sqrt((w**2 * d**2).sum() + step**2) / w.sum()]
    assert [point.accuracy_se, point.cost_se, point.drop_se] == pytest.approx(expected, abs=1e-7)


@given(st.data(), exit_outputs(min_exits=2))
def test_problems_sum_as_over_repeated_samples(data, outputs):
    own, weights = data.draw(weighted(outputs, least=1))
    repeated = outputs.take(np.repeat(np.arange(outputs.n_samples), weights))
    problem, many = Problem.from_outputs(own), Problem.from_outputs(repeated)
    policy = data.draw(policies_for(problem))
    sizes = [np.append(0, np.cumsum(weights[order])) for order in problem.order]
    same = np.array([sizes[k][end] for k, end in enumerate(policy)])
    scale = weights.sum() / len(weights)
    for here, there in zip(problem.values(policy[None]), many.values(same[None]), strict=True):
        assert here * scale == pytest.approx(there, abs=1e-6)
    swept, totals = problem.sweep(policy, lambda quality, cost: quality - 0.7 * cost)
    assert totals[0] * problem.quality_unit == pytest.approx(problem.values(swept[None])[0][0], abs=1e-6)
    assert totals[1] == pytest.approx(problem.outcomes(swept[None])[2][0], abs=len(weights))
    rule, estimated = ([[sizes[k][end] for k, end in enumerate(row)] for row in path(problem)] for path in PATHS)
    assert rule == PATHS[0](many).tolist()
    # Means that are equal may differ in rounding by weight, which tells a policy more apart, and loses none.
    assert {*map(tuple, PATHS[1](many).tolist())} <= {*map(tuple, estimated)}


@given(st.data(), exit_outputs(min_exits=2, max_exits=3))
def test_exact_searches_are_those_of_repeated_samples(data, outputs):
    own, weights = data.draw(weighted(outputs))
    repeated = outputs.take(np.repeat(np.arange(outputs.n_samples), weights))
    frontiers = [search_thresholds(o, "exact", n_points=8, drops=(0.1,))[0] for o in (own, repeated)]
    for request in ({"max_drop": 0.0}, {"budget": 1.0}):
        points = [dataclasses.replace(f, points=[_certain(p) for p in f.points]).at(**request) for f in frontiers]
        assert points[0].accuracy == pytest.approx(points[1].accuracy, abs=1e-6)
        assert points[0].cost == pytest.approx(points[1].cost, abs=1e-6)


def _certain(point):
    return dataclasses.replace(point, drop_se=0.0)


SLOW_COORD = [pytest.param(name, marks=pytest.mark.slow) if name == "coord" else name for name in SEARCH_NAMES[1:]]


@pytest.mark.parametrize("search", SLOW_COORD)
@given(st.data(), exit_outputs(min_exits=2, max_exits=3))
def test_a_weight_of_0_is_absence(search, data, outputs):
    own, weights = data.draw(weighted(outputs))
    present = own.take(weights > 0)
    whole, part = (search_thresholds(o, search, n_points=8)[0] for o in (own, present))
    assert [p.cutoffs.tolist() for p in whole.points] == [p.cutoffs.tolist() for p in part.points]
    assert whole.accuracy.tolist() == part.accuracy.tolist()
    assert whole.on(own).cost == pytest.approx(part.cost, abs=1e-12)
    assert whole.full_accuracy == pytest.approx(part.full_accuracy, abs=1e-12)
    assert (whole.effective_size or len(weights)) == pytest.approx(part.effective_size or present.n_samples)


@pytest.mark.parametrize("search", QUICK)
@given(st.data(), exit_outputs(min_exits=2, max_exits=3), st.sampled_from([0.25, 2.0, 2.0**60]))
def test_only_ratios_count(search, data, outputs, factor):
    _, weights = data.draw(weighted(outputs))
    small = weights * 2.0**-10  # of a mean below 1, so that both are scaled by the same steps
    both = [dataclasses.replace(outputs, sample_weight=w) for w in (small, small * factor)]
    both = [search_thresholds(o, search, n_points=8)[0] for o in both]
    assert both[0].to_arrays()[0] == both[1].to_arrays()[0]
    assert all(np.array_equal(a, both[1].to_arrays()[1][name]) for name, a in both[0].to_arrays()[1].items())


@pytest.mark.parametrize("search", QUICK)
@given(exit_outputs(min_exits=2, max_exits=3), st.sampled_from([0.1, 1.0, 3.0]))
def test_equal_weights_are_none(search, outputs, weight):
    equal = dataclasses.replace(outputs, sample_weight=np.full(outputs.n_samples, weight))
    own, plain = (ThresholdCalibrator(search=search, budget=1.0, n_points=8).fit(o).frontier_ for o in (equal, outputs))
    assert own.to_arrays()[0] == plain.to_arrays()[0]
    assert own.accuracy.tolist() == plain.accuracy.tolist()


@pytest.mark.filterwarnings("ignore::adaptexit.CalibrationWarning")
@pytest.mark.filterwarnings("ignore::adaptexit.LabelWarning")
@pytest.mark.parametrize("cascade_aware", [True, False])
@given(st.data(), class_outputs(min_exits=2))
def test_class_precision_counts_as_over_repeated_samples(cascade_aware, data, outputs):
    own, weights = data.draw(weighted(outputs))
    repeated = outputs.take(np.repeat(np.arange(outputs.n_samples), weights))
    fitted = [CPMCalibrator(0.5, cascade_aware=cascade_aware, margins=(0.0, 0.5)).fit(o) for o in (own, repeated)]
    assert fitted[0].thresholds_.tolist() == fitted[1].thresholds_.tolist()
    assert fitted[0].precision_ == pytest.approx(fitted[1].precision_, abs=1e-9, nan_ok=True)
    same_point(fitted[0].point_, fitted[1].point_)


@given(st.data(), class_outputs(min_exits=2, spacing=1e-2))
def test_reports_count_as_over_repeated_samples(data, outputs):
    scores = (outputs.scores - outputs.scores.min()) / max(np.ptp(outputs.scores), 1e-9)
    own, weights = data.draw(weighted(outputs.with_scores(scores)))
    repeated = outputs.with_scores(scores).take(np.repeat(np.arange(outputs.n_samples), weights))
    thresholds = data.draw(thresholds_for(own))
    point = evaluate(own, thresholds, cutoffs_of(own, thresholds))
    both = [exit_calibration(o, point) for o in (own, repeated)]
    assert both[0].ece == pytest.approx(both[1].ece, abs=1e-9, nan_ok=True)
    assert both[0].accuracy == pytest.approx(both[1].accuracy, abs=1e-9, nan_ok=True)
    shifts = [survivor_shift(o, point) for o in (own, repeated)]
    for name in ("kl", "gini", "top3"):
        assert getattr(shifts[0], name) == pytest.approx(getattr(shifts[1], name), abs=1e-9, nan_ok=True)
    curves = [job_curve(o.scores[0], o.graded[0], o.graded[-1], o.sample_weight) for o in (own, repeated)]
    assert curves[0].threshold.tolist() == curves[1].threshold.tolist()
    for name in ("exit_ratio", "saver_accuracy", "base_accuracy", "job_ratio"):
        assert getattr(curves[0], name) == pytest.approx(getattr(curves[1], name), abs=1e-9)
