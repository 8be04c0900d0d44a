"""What every estimator answers: at any budget, from any source, in any batch."""

import copy
from functools import partial

import numpy as np
import pytest

from adaptexit import Predictor, ThresholdCalibrator
from adaptexit.core.routing import accepts
from tests.contract.cases import CASES, IMAGES, KINDS, SOURCES, answers_of, budgets_of, fitted_once, quietly
from tests.nets import loader_of

pytestmark = pytest.mark.filterwarnings("ignore::adaptexit.SaverWarning")


# -- online and offline -----------------------------------------------------------------------------------------------


def test_leaving_online_is_routing_offline(case, model):
    X, y = case.test
    outputs, samples = model.record(X, y), np.arange(len(y))
    for budget in budgets_of(model):
        trace = model.trace(X, budget=budget)
        exits = model.calibrator_.exit_index(outputs, model.operating_point(budget))
        assert trace.exits.tolist() == exits.tolist()
        assert trace.labels.tolist() == model.classes_[outputs.predictions[exits, samples]].tolist()


def test_scores_of_a_trace_are_those_that_were_compared_with_the_thresholds(case, model):
    X, y = case.test
    rescored = model.calibrator_.rescored(model.record(X, y))
    for budget in budgets_of(model):
        trace, cutoffs = model.trace(X, budget=budget), model.operating_point(budget).cutoffs
        scores = rescored.scores[trace.exits, np.arange(len(y))]
        np.testing.assert_allclose(trace.scores, scores, rtol=1e-4, atol=1e-6)
        for k in range(rescored.n_exits - 1):
            sure = accepts(rescored.predictions[k], rescored.scores[k], cutoffs[k])
            assert sure[trace.exits == k].all()
            assert not sure[trace.exits > k].any()


def test_an_entropys_score_is_its_own_and_not_the_models_confidence():
    case, model = CASES["entropy"], fitted_once("entropy")
    X, y = case.test
    budget = budgets_of(model)[1]
    trace, outputs = model.trace(X, budget=budget), model.record(X, y)
    early = trace.exits == 0
    cutoff = model.operating_point(budget).cutoffs[0]
    assert (trace.scores[early] > cutoff).all()
    assert (trace.scores < 0).all()
    assert outputs.scores[0].min() > 0
    assert (outputs.scores[0][~early] > cutoff).all()  # under the models' own confidence nobody would have stayed


def test_all_that_is_answered_agrees(case, model):
    X, _ = case.test
    for budget in budgets_of(model):
        labels, proba = model.predict(X, budget=budget), model.predict_proba(X, budget=budget)
        assert labels.tolist() == model.trace(X, budget=budget).labels.tolist()
        assert labels.tolist() == model.classes_[proba.argmax(axis=1)].tolist()
        assert proba.shape == (len(X), len(model.classes_))
        np.testing.assert_allclose(proba.sum(axis=1), 1, rtol=1e-5)


# -- batches and sources ----------------------------------------------------------------------------------------------


def test_an_answer_does_not_depend_on_the_other_samples(case, model):
    X = case.test[0][:40]
    order = np.random.default_rng(0).permutation(len(X))
    for budget in budgets_of(model)[:3]:
        whole, shuffled = model.trace(X, budget=budget), model.trace(X[order], budget=budget)
        alone = [model.trace(X[i : i + 1], budget=budget) for i in range(len(X))]
        assert shuffled.labels.tolist() == whole.labels[order].tolist()
        assert shuffled.exits.tolist() == whole.exits[order].tolist()
        assert [trace.labels[0] for trace in alone] == whole.labels.tolist()
        assert [trace.exits[0] for trace in alone] == whole.exits.tolist()


@pytest.mark.parametrize(("batch_size", "memory_limit"), [(1, 1 << 30), (7, 0), (64, 2000), (1000, 1 << 30)])
def test_batch_size_and_memory_limit_do_not_change_answers(case, model, batch_size, memory_limit):
    X = case.test[0][:80]
    other = copy.copy(model).set_params(batch_size=batch_size, memory_limit=memory_limit)
    assert other.trace(X).labels.tolist() == model.trace(X).labels.tolist()
    assert other.trace(X).exits.tolist() == model.trace(X).exits.tolist()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same(kind, source):
    case, model = CASES[kind], fitted_once(kind)
    X, y = case.test
    data, labels = SOURCES[source](X, y)
    assert model.score(data, labels) == model.score(X, y)
    frontier = model.pareto(data, labels)
    assert frontier.accuracy.tolist() == pytest.approx(model.pareto(X, y).accuracy.tolist())
    if source == "shuffled":
        for call in (model.predict, model.predict_proba, model.trace, partial(model.predict_anytime, limit=1.0)):
            with pytest.raises(ValueError, match="X must keep its order"):
                call(data)
    else:
        assert model.predict(data[0] if source == "pair" else data).tolist() == model.predict(X).tolist()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_source_calibrates_the_same(kind, source):
    case, model = CASES[kind], fitted_once(kind)
    own = copy.deepcopy(model)
    own.calibrate(*SOURCES[source](*case.val))
    assert own.pareto().full_accuracy == model.pareto().full_accuracy
    assert sorted(own.outputs_.labels) == sorted(model.outputs_.labels)
    if source != "shuffled":  # among equals the order of the samples counts
        assert own.outputs_.labels.tolist() == model.outputs_.labels.tolist()
        np.testing.assert_allclose(own.pareto().accuracy, model.pareto().accuracy)


def test_scores_weigh_samples(case, model):
    X, y = case.test
    right = model.predict(X) == y
    assert 0 < right.mean() < 1
    assert model.score(X, y) == right.mean()
    assert model.score(X, y, sample_weight=right.astype(float)) == 1.0
    assert model.score(loader_of(X, y), sample_weight=(~right).astype(float)) == 0.0


# -- predictors -------------------------------------------------------------------------------------------------------


def test_a_predictor_answers_as_the_estimator_at_its_point(case, model):
    X = case.test[0][:100]
    for budget in budgets_of(model):
        predictor = model.at(budget=budget)
        assert isinstance(predictor, Predictor)
        assert predictor.policy.point is model.operating_point(budget)
        assert predictor.predict(X).tolist() == model.predict(X, budget=budget).tolist()
        assert predictor.predict_proba(X).tobytes() == model.predict_proba(X, budget=budget).tobytes()
        ours, theirs = predictor.trace(X), model.trace(X, budget=budget)
        assert ours.exits.tolist() == theirs.exits.tolist()
        assert ours.scores.tobytes() == theirs.scores.tobytes()


def test_a_predictor_is_made_once(own):
    budget = float(own.pareto().cost[0])
    predictor = own.at(budget=budget)
    assert own.at(budget=budget) is predictor
    assert own.at() is not predictor
    assert own.at(max_drop=0.1) is own.at(max_drop=0.1)
    assert own.set_params(batch_size=7).at(budget=budget) is not predictor
    assert own.set_params(budget=budget).at().policy.point is predictor.policy.point


def test_a_predictor_outlives_the_next_calibration(case, own):
    X, y = case.test
    before = {budget: own.at(budget=budget) for budget in budgets_of(own)}
    scores = {budget: predictor.trace(X).scores.tobytes() for budget, predictor in before.items()}
    labels = {budget: predictor.predict(X).tolist() for budget, predictor in before.items()}
    quietly(lambda: own.calibrate(X[:200], y[:200]))
    for budget, predictor in before.items():
        assert predictor.trace(X).scores.tobytes() == scores[budget]
        assert predictor.predict(X).tolist() == labels[budget]
    assert own.at().policy is not before[None].policy
    assert own.at().policy.point is own.operating_point()


def test_a_predictor_says_what_it_runs(model):
    predictor = model.at(budget=1.0)
    point, on = model.operating_point(1.0), model.at(budget=1.0).policy.runs
    names = [name for name, run in zip(model.exit_names, on, strict=True) if run]
    assert repr(predictor) == (
        f"Predictor({' → '.join(names)}, cost {point.cost:.3f}, accuracy {point.accuracy:.4f} on the calibration data)"
    )


# -- budgets ----------------------------------------------------------------------------------------------------------


def test_a_budget_is_kept_on_the_calibration_data(case, model):
    X, y = case.val
    for budget in (*budgets_of(model)[1:], 2.0):
        trace, point = model.trace(X, budget=budget), model.pareto().at(budget=budget)
        assert model.operating_point(budget) is point
        assert trace.relative_costs.mean() <= budget + 1e-9
        assert trace.relative_costs.mean() == pytest.approx(point.cost, abs=1e-12)
        assert model.score(X, y, budget=budget) == pytest.approx(point.accuracy, abs=1e-12)
        unbeaten = model.pareto().cost[~model.pareto().beaten]
        assert point.cost == max(cost for cost in unbeaten if cost <= budget)


def test_without_a_budget_it_is_the_calibrators_point(case, model):
    X, y = case.val
    point = model.calibrator_.point_
    assert model.operating_point() is point
    assert model.score(X, y) == pytest.approx(point.accuracy, abs=1e-12)
    if isinstance(model.calibrator_, ThresholdCalibrator):
        assert point.accuracy >= model.pareto().full_accuracy


def test_a_drop_that_is_allowed(case, model):
    X, y = case.val
    frontier = model.pareto()
    for drop in (0.0, 0.02, 0.5):
        point = model.operating_point(max_drop=drop)
        assert point is frontier.at(max_drop=drop)
        assert model.score(X, y, max_drop=drop) >= frontier.full_accuracy - drop - 1e-3
        assert np.mean(model.predict(X, max_drop=drop) == y) == pytest.approx(point.accuracy)
        assert model.trace(X, max_drop=drop).relative_costs.mean() == pytest.approx(point.cost)
        assert model.predict_proba(X, max_drop=drop).argmax(axis=1).tolist() == np.searchsorted(
            model.classes_, model.predict(X, max_drop=drop)
        ).tolist()  # fmt: skip


def test_the_calls_budget_goes_before_the_constructors(case, own, model):
    X, y = case.test
    low, high = budgets_of(model)[1], 1.0
    own.set_params(budget=low)
    assert own.predict(X).tolist() == model.predict(X, budget=low).tolist()
    assert own.score(X, y) == model.score(X, y, budget=low)
    assert own.operating_point() is own.pareto().at(budget=low)
    assert own.predict(X, budget=high).tolist() == model.predict(X, budget=high).tolist()
    assert own.predict(X, max_drop=0.0).tolist() == model.predict(X, max_drop=0.0).tolist()


@pytest.mark.parametrize("kind", ["two modules", "native"])
def test_the_constructors_budget_goes_before_the_calibrators(kind):
    case = CASES[kind]
    calibrator = ThresholdCalibrator(search="geometric", budget=0.7)
    model = case.fitted(calibrator=calibrator)
    assert not hasattr(calibrator, "frontier_")
    X, _ = case.test
    assert model.operating_point().cost <= 0.7
    own = model.predict(X).tolist()
    assert own != model.predict(X, budget=0.1).tolist()
    assert model.set_params(budget=0.1).predict(X).tolist() == model.predict(X, budget=0.1).tolist()
    assert model.set_params(budget=None).predict(X).tolist() == own


def test_costs_of_a_trace_are_the_policys(case, model):
    X, _ = case.test
    for budget in budgets_of(model):
        trace, policy = model.trace(X, budget=budget), model.at(budget=budget).policy
        assert trace.costs.tolist() == policy.path_costs[trace.exits].tolist()
        assert trace.full_cost == policy.full_cost == model.outputs_.full_cost
        assert trace.relative_costs.tolist() == (trace.costs / trace.full_cost).tolist()
        assert policy.runs[trace.exits].all()


def test_anytime_the_deepest_exit_within_the_limit_answers(case, model):
    X, y = case.test
    alone = model.outputs_.alone_costs() / model.outputs_.full_cost
    predictions = model.record(X, y).predictions
    for limit in (*alone, *(alone * 0.999), 2.0):
        if limit < alone.min():
            with pytest.raises(ValueError, match=f"limit must be at least {alone.min():.4g}.*cheapest exit; got"):
                model.predict_anytime(X, limit)
        else:
            deepest = np.flatnonzero(alone <= limit + 1e-12)[-1]
            assert model.predict_anytime(X, limit).tolist() == model.classes_[predictions[deepest]].tolist()


# -- curves -----------------------------------------------------------------------------------------------------------


def test_the_frontier_on_the_calibration_data(case, model):
    X, y = case.val
    frontier, outputs = model.pareto(), model.record(X, y)
    assert frontier is model.calibrator_.frontier_
    assert (np.diff(frontier.cost) >= 0).all()
    assert frontier.full_accuracy == pytest.approx(outputs.full_accuracy)
    assert frontier.n_samples == len(y)
    assert outputs.labels.tolist() == y.tolist()
    assert outputs.predictions.tolist() == model.outputs_.predictions.tolist()
    np.testing.assert_allclose(outputs.scores, model.outputs_.scores, rtol=1e-5)


def test_the_frontier_on_other_data_is_what_predict_gives_there(case, model):
    X, y = case.test
    frontier = model.pareto(X, y)
    assert len(frontier.points) == len(model.pareto().points)
    for budget in budgets_of(model)[1:]:
        point = frontier.at(budget=budget)
        assert point.accuracy == pytest.approx(model.score(X, y, budget=budget))
        assert point.cost == pytest.approx(model.trace(X, budget=budget).relative_costs.mean())


def test_reports_are_of_those_who_leave(case, model):
    X, y = case.test
    budget = budgets_of(model)[2]
    trace, outputs, n_exits = model.trace(X, budget=budget), model.record(X, y), len(model.exit_names)
    reach = [[int(((trace.exits >= k) & (y == label)).sum()) for label in range(10)] for k in range(n_exits)]
    assert model.exit_flow(X, y, budget=budget).tolist() == reach
    assert model.survivor_shift(X, y, budget=budget).n.tolist() == [sum(row) for row in reach]
    if model.calibrator_.rescored(outputs).scores.min() >= 0:
        leave = np.bincount(trace.exits, minlength=n_exits).tolist()
        assert model.exit_calibration(X, y, budget=budget).n.tolist() == leave
    for k, strips in enumerate(model.exemplars(X, y, budget=budget).strips):
        for strip in strips:
            assert (trace.exits[strip.samples] == k).all()
            assert (trace.labels[strip.samples] == y[strip.samples]).all()
            np.testing.assert_allclose(strip.scores, trace.scores[strip.samples], rtol=1e-4)
    assert model.exit_flow(max_drop=0.0)[0].tolist() == np.bincount(case.val[1], minlength=10).tolist()


# -- labels -----------------------------------------------------------------------------------------------------------

NAMES = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])


@pytest.mark.parametrize("labels", ["names", "numbers", "positions of names"])
@pytest.mark.parametrize("kind", IMAGES)
def test_labels_of_any_kind(kind, labels):
    case, model, own = CASES[kind], fitted_once(kind), copy.deepcopy(fitted_once(kind))
    classes = np.arange(10) * 3 + 5 if labels == "numbers" else NAMES
    (X, y), (x_val, y_val) = case.test, case.val
    own.set_params(classes=classes.tolist() if labels == "numbers" else classes)
    own.calibrate(x_val, y_val if labels == "positions of names" else classes[y_val])
    assert own.outputs_.labels.tolist() == y_val.tolist()
    assert own.classes_.tolist() == classes.tolist()
    for budget in budgets_of(model)[:2]:
        expected = classes[model.predict(X, budget=budget)].tolist()
        assert own.predict(X, budget=budget).tolist() == own.trace(X, budget=budget).labels.tolist() == expected
    assert own.predict_anytime(X, 1.0).tolist() == classes[model.predict_anytime(X, 1.0)].tolist()
    assert own.score(X, classes[y]) == model.score(X, y)
    assert own.pareto(X, classes[y]).accuracy.tolist() == model.pareto(X, y).accuracy.tolist()


@pytest.mark.parametrize("kind", ["classifiers", "perceptron"])
def test_classes_of_fitted_classifiers_are_their_own(kind):
    case, own = CASES[kind], copy.copy(fitted_once(kind))
    with pytest.raises(ValueError, match="classes must be those of the fitted classifiers"):
        own.set_params(classes=NAMES).calibrate(*case.val)


@pytest.mark.parametrize("source", [lambda X, y: (X, y), lambda X, y: (loader_of(X, y), None)])
def test_positions_serve_to_score_where_classes_have_names(source):
    case, model = CASES["two modules"], fitted_once("two modules")
    named = case.make(classes=NAMES).fit(*case.val)
    assert named.score(*source(*case.test)) == model.score(*case.test)


def test_calibration_data_may_lack_a_class(case, own, model):
    X, y = case.val
    few = y < 7
    quietly(lambda: own.calibrate(X[few], y[few]))
    assert own.classes_.tolist() == list(range(10))
    assert own.predict_proba(case.test[0]).shape == (len(case.test[0]), 10)
    assert own.predict_anytime(case.test[0], 1.0).tolist() == model.predict_anytime(case.test[0], 1.0).tolist()


def test_answers_are_repeated(case, model):
    X = case.test[0][:100]
    assert answers_of(model, X) == answers_of(model, X)


def test_prepared_points_do_not_pile_up(case, own):
    point = own.operating_point(budget=1.0)
    for budget in np.linspace(point.cost, 1.5, 200):
        assert own.at(budget=float(budget)).policy.point.cost <= budget
    assert len(own._prepared) <= 64
    assert own.at(budget=1.5) is own.at(budget=1.5)
