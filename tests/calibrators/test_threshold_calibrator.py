import json
import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from adaptexit.calibrators import ThresholdCalibrator
from adaptexit.core.answer import Answer
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.scores import SCORES
from adaptexit.core.search import choose_search

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, 300)
SIGNAL = np.array([1.0, 2.0, 4.0])[:, None, None] * RNG.random((300, 1)) * np.eye(4)[LABELS]
LOGITS = RNG.normal(size=(3, 300, 4)) + SIGNAL


def first_logit(logits):
    return logits[:, 0]


@pytest.fixture
def outputs():
    return ExitOutputs.from_logits(LOGITS, LABELS, stage_costs=[1, 1, 1], exit_costs=[0.1, 0.1, 1.0])


@pytest.fixture
def without_logits():
    return ExitOutputs.from_logits(LOGITS, LABELS, stage_costs=[1, 1, 1], exit_costs=[0.1, 0.1, 1.0], keep_logits=False)


def same_points(one, other):
    first, second = ([point.thresholds.tolist() for point in c.frontier_.points] for c in (one, other))
    assert first == second
    assert one.thresholds_.tolist() == other.thresholds_.tolist()


@pytest.mark.parametrize("score", SCORES)
def test_a_score_by_name_is_that_score_recorded(outputs, score):
    by_name = ThresholdCalibrator(score, n_points=10).fit(outputs)
    by_record = ExitOutputs.from_logits(LOGITS, LABELS, score=score, stage_costs=[1, 1, 1], exit_costs=[0.1, 0.1, 1.0])
    same_points(by_name, ThresholdCalibrator(n_points=10).fit(by_record))
    assert by_name.exit_index(outputs).tolist() == by_name.exit_index(by_record).tolist()


def test_scores_by_name_differ(outputs):
    thresholds = [ThresholdCalibrator(score, n_points=10, budget=0.7).fit(outputs).thresholds_ for score in SCORES]
    assert len({tuple(t) for t in thresholds}) == len(SCORES)


def test_recorded_scores_are_taken_as_they_are(outputs, without_logits):
    calibrator = ThresholdCalibrator(n_points=10).fit(without_logits)
    assert calibrator.rescored(outputs) is outputs
    early = calibrator.frontier_.points[0].thresholds[:-1]
    assert all(np.isinf(t) or t in row for t, row in zip(early, outputs.scores, strict=False))


def test_a_callable_score_is_given_the_logits(outputs):
    calibrator = ThresholdCalibrator(first_logit, n_points=10).fit(outputs)
    assert np.array_equal(calibrator.rescored(outputs).scores, LOGITS[:, :, 0])
    batch = Answer(predictions=np.zeros(300, int), scores=np.zeros(300), logits=LOGITS[1])
    scores, memory = calibrator.scores(1, batch)
    assert np.array_equal(scores, LOGITS[1, :, 0])
    assert memory is None
    assert np.array_equal(calibrator.policy().decide(1, batch).scores, LOGITS[1, :, 0])


@pytest.mark.parametrize(("score", "needed"), [("recorded", False), ("entropy", True), (first_logit, True)])
def test_logits_are_needed_for_all_but_recorded_scores(score, needed):
    assert ThresholdCalibrator(score).needs_logits is needed


@pytest.mark.parametrize("score", ["max_proba", "entropy", "margin", first_logit])
def test_outputs_without_the_logits_needed_are_refused(without_logits, score):
    with pytest.raises(ValueError, match=r"needs logits, but the outputs have none.*or use score='recorded'"):
        ThresholdCalibrator(score).fit(without_logits)


def test_a_batch_without_the_logits_needed_is_refused(outputs):
    calibrator = ThresholdCalibrator("entropy", n_points=5).fit(outputs)
    with pytest.raises(ValueError, match="score='entropy' needs logits, but the batch has none"):
        calibrator.policy().decide(0, Answer(predictions=np.zeros(1, int), scores=np.zeros(1)))


def test_an_unknown_score_is_refused(outputs):
    names = r"\['recorded', 'entropy', 'margin', 'max_proba'\]"
    with pytest.raises(ValueError, match=f"score must be one of {names}.*got 'gini'"):
        ThresholdCalibrator("gini").fit(outputs)


def test_a_score_that_is_not_finite_is_refused(outputs):
    with pytest.raises(ValueError, match="scores must be finite"):
        ThresholdCalibrator(lambda logits: np.full(len(logits), np.nan)).fit(outputs)


def test_without_a_target_no_calibrated_accuracy_is_lost(outputs):
    calibrator = ThresholdCalibrator(search="exact").fit(outputs)
    assert calibrator.point_.accuracy >= outputs.full_accuracy - 1e-9
    assert calibrator.point_.cost < 1.0
    assert calibrator.point_ is calibrator.frontier_.at(max_drop=0.0)


def test_a_budget_is_kept_and_used_up(outputs):
    calibrator = ThresholdCalibrator(search="exact", budget=0.6).fit(outputs)
    assert 0.55 < calibrator.point_.cost <= 0.6 + 1e-9
    assert calibrator.point_ is calibrator.frontier_.at(budget=0.6)


def test_what_is_asked_for_is_searched_for_beside_the_grid(outputs):
    coarse = ThresholdCalibrator(search="exact", n_points=1).fit(outputs).frontier_
    by_budget = ThresholdCalibrator(search="exact", n_points=1, budget=0.6).fit(outputs)
    assert by_budget.point_.accuracy > coarse.at(budget=0.6).accuracy
    by_drop = ThresholdCalibrator(search="exact", n_points=1, max_drop=0.05).fit(outputs)
    assert {"max_drop": 0.05} in [point.params for point in by_drop.frontier_.points]


def test_a_drop_is_kept_and_saves_cost(outputs):
    calibrator = ThresholdCalibrator(search="exact", max_drop=0.05).fit(outputs)
    assert calibrator.point_.accuracy >= outputs.full_accuracy - 0.05 - 1e-9
    assert calibrator.point_.cost < ThresholdCalibrator(search="exact").fit(outputs).point_.cost


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"budget": 0.5, "max_drop": 0.1}, "give budget or max_drop, not both; got budget=0.5, max_drop=0.1"),
        (
            {"search": "grid"},
            r"search must be one of \['auto', 'smoothed', 'exact', 'coord', 'shared', 'geometric'\]; got 'grid'",
        ),
        ({"n_points": 0}, "n_points must be a positive integer; got 0"),
        ({"n_points": 2.5}, "n_points must be a positive integer; got 2.5"),
        ({"search": "exact", "budget": 0.01}, r"budget must be at least 0\.275, .*cheapest operating point; got 0\.01"),
        ({"budget": np.nan}, "budget must be a finite relative cost; got nan"),
        ({"max_drop": -0.1}, "max_drop must be a share of accuracy, at least 0"),
    ],
)
def test_a_parameter_outside_what_is_allowed_is_refused(outputs, parameters, message):
    with pytest.raises(ValueError, match=message):
        ThresholdCalibrator(**parameters).fit(outputs)


def test_a_failed_fit_leaves_the_calibrator_as_it_was(outputs):
    calibrator = ThresholdCalibrator(n_points=5).fit(outputs)
    before = dict(vars(calibrator))
    calibrator.set_params(budget=0.01)
    with pytest.raises(ValueError, match="budget must be at least"):
        calibrator.fit(outputs)
    assert all(vars(calibrator)[name] is before[name] for name in ("frontier_", "point_", "search_report_"))


def test_the_search_taken_is_reported(outputs):
    assert ThresholdCalibrator(n_points=5).fit(outputs).search_report_ == choose_search("auto", 3, 300)
    assert ThresholdCalibrator(search="exact", n_points=5).fit(outputs).search_report_.search == "exact"


def test_a_budget_asked_for_later_is_looked_up(outputs):
    calibrator = ThresholdCalibrator().fit(outputs)
    assert calibrator.policy().point is calibrator.point_
    assert calibrator.policy(budget=0.5).point.cost <= 0.5 + 1e-9
    assert calibrator.policy(max_drop=0.05).point is calibrator.frontier_.at(max_drop=0.05)
    with pytest.raises(ValueError, match="budget must be at least"):
        calibrator.policy(budget=0.1)


def test_the_frontier_on_other_data_keeps_every_point(outputs):
    calibrator = ThresholdCalibrator("entropy", n_points=10).fit(outputs)
    other = outputs.take(np.arange(100))
    frontier = calibrator.pareto(other)
    assert calibrator.pareto() is calibrator.frontier_
    assert frontier.chosen_on is calibrator.frontier_
    assert frontier.n_samples == 100
    for here, there in zip(frontier.points, calibrator.frontier_.points, strict=True):
        exits = calibrator.exit_index(other, there)
        assert here.accuracy == pytest.approx(other.graded[exits, np.arange(100)].mean())


@pytest.mark.parametrize(
    "call",
    [
        lambda c, o: c.exit_index(o),
        lambda c, o: c.pareto(),
        lambda c, o: c.get_state(),
        lambda c, o: c.pareto(o),
        lambda c, o: c.policy(budget=0.5),
        lambda c, o: c.policy(),
    ],
)
def test_nothing_works_before_fit(outputs, call):
    with pytest.raises(NotFittedError, match="not fitted yet"):
        call(ThresholdCalibrator(), outputs)


def test_parameters_are_stored_as_given_and_cloned(outputs):
    parameters = {
        "score": "margin",
        "search": "coord",
        "budget": 0.5,
        "max_drop": None,
        "n_points": 7,
        "random_state": 3,
    }
    calibrator = ThresholdCalibrator(**parameters).fit(outputs)
    copy = clone(calibrator)
    assert calibrator.get_params() == copy.get_params() == parameters
    assert not hasattr(copy, "frontier_")
    same_points(copy.fit(outputs), calibrator)


def test_the_seed_reaches_the_bootstrap(outputs):
    frontiers = [ThresholdCalibrator(search="coord", n_points=5, random_state=s).fit(outputs).frontier_ for s in (0, 1)]
    first, second = ([point.thresholds.tolist() for point in frontier.points] for frontier in frontiers)
    assert first != second


def test_state_taken_and_given_back_makes_the_same_calibrator(outputs):
    calibrator = ThresholdCalibrator("margin", budget=0.6, n_points=10).fit(outputs)
    state, arrays = calibrator.get_state()
    again = clone(calibrator)
    again.set_state(json.loads(json.dumps(state)), arrays, outputs)
    same_points(again, calibrator)
    assert again.point_ in again.frontier_.points
    assert again.search_report_ == calibrator.search_report_
    policies = [c.policy(budget=0.5) for c in (again, calibrator)]
    assert policies[0].point.thresholds.tolist() == policies[1].point.thresholds.tolist()
    assert policies[0].path_costs.tolist() == policies[1].path_costs.tolist()


@pytest.mark.parametrize("score", ["recorded", first_logit])
def test_a_fitted_calibrator_survives_pickling(outputs, score):
    calibrator = ThresholdCalibrator(score, n_points=10).fit(outputs)
    again = pickle.loads(pickle.dumps(calibrator))
    same_points(again, calibrator)
    assert again.exit_index(outputs).tolist() == calibrator.exit_index(outputs).tolist()
    assert again.search_report_ == calibrator.search_report_


def test_outputs_with_another_number_of_exits_are_refused(outputs):
    calibrator = ThresholdCalibrator().fit(outputs)
    for ask in (calibrator.exit_index, calibrator.pareto):
        with pytest.raises(ValueError, match="exits that were calibrated; got"):
            ask(outputs.drop_exit(0))
        with pytest.raises(TypeError, match="outputs must be ExitOutputs; got ndarray"):
            ask(np.zeros(3))
    with pytest.raises(TypeError, match="outputs must be ExitOutputs; got ndarray"):
        ThresholdCalibrator().fit(np.zeros(3))


@pytest.mark.parametrize("params", [{"budget": "a"}, {"max_drop": "a"}, {"max_drop": -0.1}, {"budget": float("nan")}])
def test_targets_that_are_no_numbers(outputs, params):
    with pytest.raises(ValueError, match=f"{next(iter(params))} must be a"):
        ThresholdCalibrator(**params).fit(outputs)


@pytest.mark.parametrize("dtype", [np.float16, np.uint8])
def test_scores_do_not_depend_on_how_logits_are_stored(dtype):
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 9, size=(2, 50, 7)).astype(dtype)
    labels = rng.integers(7, size=50)
    narrow, wide = (ExitOutputs.from_logits(x, labels, costs=[1, 2]) for x in (logits, logits.astype(np.float64)))
    assert narrow.scores == pytest.approx(wide.scores, abs=1e-6)
    by_name = ThresholdCalibrator(score="entropy")
    assert by_name.rescored(narrow).scores == pytest.approx(by_name.rescored(wide).scores, abs=1e-6)
