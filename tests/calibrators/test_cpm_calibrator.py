import copy
import json
import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import adaptexit
from adaptexit import CPMCalibrator
from adaptexit.core.answer import Answer
from adaptexit.core.margins import MARGINS, Rule, class_precision, margin_thresholds
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.scores import SCORES
from tests.nets import Columns, branched_model, branched_trained, column_cascade, column_data, digits, flat_head

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, 300)
SIGNAL = np.array([1.0, 2.0, 4.0])[:, None, None] * RNG.random((300, 1)) * np.eye(4)[LABELS]
LOGITS = RNG.normal(size=(3, 300, 4)) + SIGNAL
COSTS = {"stage_costs": [1, 1, 1], "exit_costs": [0.1, 0.1, 1.0]}


@pytest.fixture
def outputs():
    return ExitOutputs.from_logits(LOGITS, LABELS, **COSTS)


def counterexample():
    """Two early exits on four samples: relative cost .45 at margin .6, and .475 at .8."""
    labels = [0, 1, 1, 0]
    return ExitOutputs(
        predictions=[[1, 1, 0, 1], [0, 0, 0, 1], labels],
        scores=[[0.05, 0.7, 0.6, 0.25], [0.65, 0.0, 0.3, 0.2], [0, 0, 0, 0]],
        labels=labels, n_classes=2, costs=[0.3, 0.6, 1.0],
    )  # fmt: skip


def same_points(one, other):
    first, second = ([point.thresholds.tolist() for point in c.frontier_.points] for c in (one, other))
    assert first == second
    assert one.thresholds_.tolist() == other.thresholds_.tolist()


# -- fit --------------------------------------------------------------------------------------------------------------


def test_thresholds_are_those_of_the_margin(outputs):
    for cascade_aware in (False, True):
        calibrator = CPMCalibrator(0.15, cascade_aware=cascade_aware).fit(outputs)
        thresholds, cutoffs = margin_thresholds(outputs, [0.15], cascade_aware=cascade_aware)
        assert calibrator.thresholds_.tolist() == thresholds[0].tolist()
        assert calibrator.point_.cutoffs.tolist() == cutoffs[0].tolist()
        assert calibrator.thresholds_.shape == (3, 4)
        assert (calibrator.thresholds_[-1] == -np.inf).all()


def test_survivors_are_counted_unless_told_otherwise(outputs):
    aware, default, alone = (
        CPMCalibrator(**p).fit(outputs) for p in ({"cascade_aware": True}, {}, {"cascade_aware": False})
    )
    same_points(aware, default)
    assert aware.thresholds_[1].tolist() != alone.thresholds_[1].tolist()


def test_a_margin_saves_cost(outputs):
    calibrator = CPMCalibrator(0.2).fit(outputs)
    assert calibrator.point_.cost < 0.9
    assert calibrator.point_.exit_rates.min() > 0


def test_precision_of_the_full_model_is_kept(outputs):
    calibrator = CPMCalibrator().fit(outputs)
    assert calibrator.precision_.tolist() == class_precision(outputs.predictions[-1], LABELS, 4).tolist()


@pytest.mark.parametrize(
    ("parameters", "rule"),
    [
        ({"min_support": 20}, Rule(20)),
        ({"min_support": np.int64(20)}, Rule(20)),
        ({"bound": "wilson"}, Rule(1, "wilson", 0.1)),
        ({"bound": "wilson", "delta": 0.01}, Rule(1, "wilson", 0.01)),
        ({"bound": "fixed_sequence", "delta": 0.2}, Rule(1, "fixed_sequence", 0.2)),
        ({"bound": "wilson", "delta": 0.2, "joint": True}, Rule(1, "wilson", 0.2 / 8)),
    ],
)
def test_parameters_reach_the_rule(outputs, parameters, rule):
    thresholds = CPMCalibrator(0.2, **parameters).fit(outputs).thresholds_
    expected = margin_thresholds(outputs, [0.2], cascade_aware=True, rule=rule)[0][0]
    without = margin_thresholds(outputs, [0.2], cascade_aware=True)[0][0]
    assert thresholds.tolist() == expected.tolist() != without.tolist()


def test_a_joint_error_level_is_shared_by_early_exits_and_classes(outputs):
    joint = CPMCalibrator(0.2, bound="wilson", delta=0.2, joint=True).fit(outputs)
    each = CPMCalibrator(0.2, bound="wilson", delta=0.2).fit(outputs)
    same_points(joint, CPMCalibrator(0.2, bound="wilson", delta=0.2 / (2 * 4)).fit(outputs))
    assert joint.thresholds_.tolist() != each.thresholds_.tolist()


def test_one_exit_alone(outputs):
    alone = outputs.drop_exit(0).drop_exit(0)
    calibrator = CPMCalibrator(margins=[], bound="wilson", joint=True).fit(alone)
    assert calibrator.thresholds_.tolist() == [[-np.inf] * 4]
    assert [(point.cost, point.params) for point in calibrator.pareto().points] == [(1.0, {"margin": 0.1})]


# -- the sweep --------------------------------------------------------------------------------------------------------


def test_every_margin_has_its_point_in_rising_cost(outputs):
    frontier = CPMCalibrator(0.15).fit(outputs).pareto()
    assert (np.diff(frontier.cost) >= 0).all()
    assert frontier.points[-1].cost == 1.0
    assert frontier.points[-1].params == {}
    assert frontier.points[-1].thresholds.tolist() == [[np.inf] * 4] * 2 + [[-np.inf] * 4]
    assert frontier.points[-1].accuracy == frontier.full_accuracy == outputs.full_accuracy
    assert sorted(point.params["margin"] for point in frontier.points[:-1]) == sorted([*MARGINS, 0.15])


def test_a_margin_of_the_sweep_is_not_repeated(outputs):
    frontier = CPMCalibrator(0.1, margins=np.array([0.4, 0.1, 0.4])).fit(outputs).pareto()
    assert sorted(point.params.get("margin", -1) for point in frontier.points) == [-1, 0.1, 0.4]


def test_the_full_model_is_not_repeated_where_a_margin_leaves_nobody_early(outputs):
    frontier = CPMCalibrator(0.0, margins=[0.5], min_support=150).fit(outputs).pareto()
    assert [point.cost for point in frontier.points] == [1.0, 1.0]
    assert sorted(point.params["margin"] for point in frontier.points) == [0.0, 0.5]


def test_a_dominated_margin_stays_in_use():
    calibrator = CPMCalibrator(0.8, margins=[0.6]).fit(counterexample())
    assert calibrator.point_.params == {"margin": 0.8}
    assert calibrator.point_.cost == pytest.approx(0.475)
    assert (
        calibrator.thresholds_.tolist() == margin_thresholds(counterexample(), [0.8], cascade_aware=True)[0][0].tolist()
    )
    assert calibrator.frontier_.cost == pytest.approx([0.45, 0.475, 1.0])


def test_a_budget_chooses_among_the_margins(outputs):
    calibrator = CPMCalibrator().fit(outputs)
    assert calibrator.policy().point is calibrator.point_
    for budget in (0.6, 0.8, 1.0):
        point = calibrator.policy(budget=budget).point
        within = [p.accuracy for p in calibrator.frontier_.points if p.cost <= budget]
        assert point in calibrator.frontier_.points
        assert point.cost <= budget
        assert point.accuracy == max(within)
    with pytest.raises(ValueError, match="budget must be at least"):
        calibrator.policy(budget=0.1)


def test_the_frontier_on_other_data_keeps_every_point(outputs):
    calibrator = CPMCalibrator(score="entropy").fit(outputs)
    other = outputs.take(np.arange(0, 300, 3))
    frontier = calibrator.pareto(other)
    assert frontier.chosen_on is calibrator.pareto() is calibrator.frontier_
    assert [p.params for p in frontier.points] == [p.params for p in calibrator.frontier_.points]
    for here, there in zip(frontier.points, calibrator.frontier_.points, strict=True):
        exits = calibrator.exit_index(other, there)
        assert here.accuracy == pytest.approx(other.graded[exits, np.arange(100)].mean())


def test_the_calibrated_order_is_kept_on_other_data():
    calibrator = CPMCalibrator(0.8, margins=[0.6]).fit(counterexample())
    frontier = calibrator.pareto(counterexample().take([0]))
    assert [point.params.get("margin") for point in frontier.points] == [0.6, 0.8, None]
    assert frontier.cost == pytest.approx([0.6, 0.3, 1.0])


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
def test_a_score_by_name_is_that_score_recorded(outputs, score):
    by_name = CPMCalibrator(score=score).fit(outputs)
    by_record = ExitOutputs.from_logits(LOGITS, LABELS, score=score, **COSTS)
    same_points(by_name, CPMCalibrator().fit(by_record))
    assert by_name.exit_index(outputs).tolist() == by_name.exit_index(by_record).tolist()
    batch = Answer(predictions=outputs.predictions[0], scores=np.zeros(300), logits=LOGITS[0])
    assert (by_name.policy().decide(0, batch).leave == (by_name.exit_index(outputs) == 0)).all()


@pytest.mark.parametrize("score", ["entropy", lambda logits: logits[:, 0]])
def test_outputs_without_the_logits_needed_are_refused(score):
    without = ExitOutputs.from_logits(LOGITS, LABELS, keep_logits=False, **COSTS)
    assert CPMCalibrator(score=score).needs_logits
    with pytest.raises(ValueError, match=r"needs logits, but the outputs have none.*or use score='recorded'"):
        CPMCalibrator(score=score).fit(without)


# -- refusals ---------------------------------------------------------------------------------------------------------

margin_refused = "margin must be a share of the full model's precision, at least 0 .*; got "
margins_refused = "margins must be numbers, each a share of the full model's precision, at least 0 .*; got "
sequence_refused = "margins must be a sequence of numbers, each a share of the full model's precision.*; got "
support_refused = "min_support must be a whole number, at least 1; got "
delta_refused = "delta must lie above 0 and be at most 0.5; got "


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"margin": -0.1}, margin_refused + r"-0\.1"),
        ({"margin": np.nan}, margin_refused + "nan"),
        ({"margin": np.inf}, margin_refused + "inf"),
        ({"margin": "0.1"}, margin_refused + r"'0\.1'"),
        ({"margin": None}, margin_refused + "None"),
        ({"margins": "0.1"}, sequence_refused + r"'0\.1'"),
        ({"margins": 0.1}, sequence_refused + r"0\.1"),
        ({"margins": None}, sequence_refused + "None"),
        ({"margins": [0.1, np.nan]}, margins_refused + "nan"),
        ({"margins": [0.1, -1]}, margins_refused + "-1"),
        ({"margins": ["a"]}, margins_refused + "'a'"),
        ({"min_support": 0}, support_refused + "0"),
        ({"min_support": True}, support_refused + "True"),
        ({"min_support": 1.5}, support_refused + r"1\.5"),
        ({"bound": "hoeffding"}, r"bound must be one of \['none', 'wilson', 'fixed_sequence'\]; got 'hoeffding'"),
        ({"bound": None}, r"bound must be one of \['none', 'wilson', 'fixed_sequence'\]; got None"),
        ({"delta": 0}, delta_refused + "0"),
        ({"delta": 0.6}, delta_refused + "0.6"),
        ({"delta": np.nan}, delta_refused + "nan"),
        ({"delta": "0.1"}, delta_refused + r"'0\.1'"),
        ({"score": "gini"}, r"score must be one of \['recorded', 'entropy', 'margin', 'max_proba'\].*got 'gini'"),
    ],
)
def test_a_parameter_outside_what_is_allowed_is_refused(outputs, parameters, message):
    with pytest.raises(ValueError, match=message):
        CPMCalibrator(**parameters).fit(outputs)


def test_outputs_without_classes_are_refused():
    graded = ExitOutputs(scores=np.zeros((2, 3)), quality=np.ones((2, 3)), costs=[1, 2])
    with pytest.raises(ValueError, match=r"needs predictions and labels; .*quality alone.*Use ThresholdCalibrator"):
        CPMCalibrator().fit(graded)


def test_what_is_no_outputs_is_refused(outputs):
    with pytest.raises(TypeError, match="outputs must be ExitOutputs; got ndarray"):
        CPMCalibrator().fit(LOGITS)
    calibrator = CPMCalibrator().fit(outputs)
    for ask in (calibrator.exit_index, calibrator.pareto):
        with pytest.raises(ValueError, match="exits that were calibrated; got 2"):
            ask(outputs.drop_exit(0))


@pytest.mark.parametrize("refused", [{"margin": -1}, {"delta": 2}, {"score": "gini"}])
def test_a_failed_fit_leaves_the_calibrator_as_it_was(outputs, refused):
    calibrator = CPMCalibrator().fit(outputs)
    before = dict(vars(calibrator))
    with pytest.raises(ValueError, match="must"):
        calibrator.set_params(**refused).fit(outputs.take(np.arange(50)))
    assert all(vars(calibrator)[name] is before[name] for name in ("frontier_", "point_", "precision_"))


@pytest.mark.parametrize(
    "call",
    [lambda c, o: c.exit_index(o), lambda c, o: c.pareto(), lambda c, o: c.get_state(), lambda c, o: c.policy()],
)
def test_nothing_works_before_fit(outputs, call):
    with pytest.raises(NotFittedError, match="not fitted yet"):
        call(CPMCalibrator(), outputs)


# -- classes that the full model never answers ------------------------------------------------------------------------


def with_classes(n_classes, labels):
    """The full model answers 0 and 2 of so many classes."""
    answers = np.tile([0, 2], len(labels))[: len(labels)]
    return ExitOutputs(
        predictions=[answers, answers], scores=np.ones((2, len(labels))), labels=labels, n_classes=n_classes,
        costs=[1, 2],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("n_classes", "labels", "message"),
    [
        (4, [0, 2], r"2 of the 4 classes have no calibration sample \(1, 3\), so nothing leaves"),
        (9, [0, 2], r"7 of the 9 classes have no calibration sample \(1, 3, 4, 5, 6 \.\.\.\), so"),
        (4, [0, 2, 1, 3], r"2 of the 4 classes are never answered by the full model \(1, 3\), so nothing leaves"),
    ],
)
def test_missing_classes_are_counted_and_named(n_classes, labels, message):
    with pytest.warns(adaptexit.CalibrationWarning, match=message) as warned:
        calibrator = CPMCalibrator().fit(with_classes(n_classes, labels))
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert np.isnan(calibrator.precision_).sum() == n_classes - 2
    assert calibrator.thresholds_[0, [1, 3]].tolist() == [np.inf, np.inf]
    assert calibrator.thresholds_[0, [0, 2]].tolist() == [-np.inf, -np.inf]


# -- copies -----------------------------------------------------------------------------------------------------------


def test_parameters_are_stored_as_given_and_cloned(outputs):
    parameters = {
        "margin": 0.2, "margins": [0.1, 0.3], "cascade_aware": False, "min_support": 3, "bound": "wilson",
        "delta": 0.2, "joint": True, "score": "margin",
    }  # fmt: skip
    calibrator = CPMCalibrator(**parameters).fit(outputs)
    copy = clone(calibrator)
    assert calibrator.get_params() == copy.get_params() == parameters
    assert not hasattr(copy, "frontier_")
    same_points(copy.fit(outputs), calibrator)


def through_state(calibrator, outputs):
    state, arrays = calibrator.get_state()
    again = clone(calibrator)
    again.set_state(json.loads(json.dumps(state)), arrays, outputs)
    return again


@pytest.mark.parametrize("copied", [through_state, lambda calibrator, outputs: pickle.loads(pickle.dumps(calibrator))])
def test_copies_hold_what_was_learned(outputs, copied):
    calibrator = CPMCalibrator(0.3, score="entropy").fit(outputs)
    again = copied(calibrator, outputs)
    same_points(again, calibrator)
    assert again.point_ in again.frontier_.points
    assert again.point_.params == {"margin": 0.3}
    assert again.precision_.tolist() == calibrator.precision_.tolist()
    assert again.exit_index(outputs).tolist() == calibrator.exit_index(outputs).tolist()


# -- within estimators ------------------------------------------------------------------------------------------------

X, Y = column_data(300, n_models=3)


@pytest.mark.parametrize("score", ["recorded", "entropy"])
def test_a_cascade_leaves_by_class_as_its_calibrator_says(score):
    cascade = column_cascade(3, calibrator=CPMCalibrator(0.02, score=score)).fit(X[:200], Y[:200])
    record = cascade.record(X, Y)
    assert cascade.calibrator_.thresholds_.shape == (3, 3)
    for budget in (None, *cascade.pareto().cost):
        point = cascade.operating_point(budget)
        exits = cascade.calibrator_.exit_index(record, point)
        assert cascade.trace(X, budget=budget).exits.tolist() == exits.tolist()
        assert cascade.predict(X, budget=budget).tolist() == record.predictions[exits, np.arange(300)].tolist()
    assert len(set(cascade.trace(X).exits)) == 3
    assert cascade.pareto(X, Y).points[0].params == cascade.pareto().points[0].params


def test_a_cascade_is_saved_and_loaded_with_its_margins(tmp_path):
    calibrator = CPMCalibrator(0.2, margins=[0.05, 0.4], bound="wilson")
    cascade = column_cascade(3, calibrator=calibrator).fit(X, Y)
    cascade.save(tmp_path / "cascade")
    loaded = adaptexit.load(tmp_path / "cascade", base=Columns(2), saver=[Columns(0), Columns(1)])
    assert isinstance(loaded.calibrator_, CPMCalibrator)
    assert loaded.calibrator_.get_params() == calibrator.get_params()
    assert loaded.calibrator_.precision_.tolist() == cascade.calibrator_.precision_.tolist()
    same_points(loaded.calibrator_, cascade.calibrator_)
    for budget in (None, 0.5):
        assert loaded.trace(X, budget=budget).exits.tolist() == cascade.trace(X, budget=budget).exits.tolist()
    assert clone(loaded).fit(X, Y).predict(X).tolist() == cascade.predict(X).tolist()


@pytest.fixture(scope="module")
def branched_by_class():
    model = copy.deepcopy(branched_model()).set_params(calibrator=CPMCalibrator(0.01))
    return model.calibrate(*digits()[1])


def test_a_classifier_with_exits_leaves_by_class_as_its_calibrator_says(branched_by_class):
    images, labels = digits()[2]
    record = branched_by_class.record(images, labels)
    for budget in (None, branched_by_class.pareto().cost[0]):
        point = branched_by_class.operating_point(budget)
        exits = branched_by_class.calibrator_.exit_index(record, point)
        assert branched_by_class.trace(images, budget=budget).exits.tolist() == exits.tolist()
        answers = record.predictions[exits, np.arange(len(images))]
        assert branched_by_class.predict(images, budget=budget).tolist() == answers.tolist()
    assert set(branched_by_class.trace(images).exits) == {0, 1, 2, 3}


def test_a_classifier_with_exits_is_saved_and_loaded_with_its_margins(branched_by_class, tmp_path):
    images = digits()[2][0]
    branched_by_class.save(tmp_path / "model")
    loaded = adaptexit.load(tmp_path / "model", backbone=branched_trained(), head=flat_head)
    same_points(loaded.calibrator_, branched_by_class.calibrator_)
    assert loaded.trace(images).exits.tolist() == branched_by_class.trace(images).exits.tolist()


@pytest.mark.filterwarnings("ignore::adaptexit.LabelWarning")
def test_outputs_of_other_classes_are_refused():
    rng = np.random.default_rng(0)

    def outputs(n_classes, **given):
        answers = {"predictions": rng.integers(n_classes, size=(3, 50)), "labels": rng.integers(n_classes, size=50)}
        answers = given or answers | {"n_classes": n_classes}
        return ExitOutputs(scores=rng.random((3, 50)), costs=[1, 2, 3], **answers)

    calibrator = CPMCalibrator().fit(outputs(2))
    for others, nature in ((outputs(3), "3 classes"), (outputs(2, quality=np.ones((3, 50))), "no predictions")):
        for ask in (calibrator.exit_index, calibrator.pareto):
            with pytest.raises(ValueError, match=f"predictions of the 2 classes that were calibrated.*got {nature}"):
                ask(others)


def test_a_class_without_samples_that_the_full_model_answers_with():
    labels = np.repeat([0, 1], 20)
    answered = labels.copy()
    answered[:3] = 2
    outputs = ExitOutputs(
        predictions=np.stack([answered, answered]), scores=np.random.default_rng(0).random((2, 40)), labels=labels,
        n_classes=3, costs=[1, 2],
    )  # fmt: skip
    with pytest.warns(adaptexit.CalibrationWarning, match=r"1 of the 3 classes have no calibration sample \(2\)"):
        calibrator = CPMCalibrator().fit(outputs)
    assert calibrator.thresholds_[0, 2] == np.inf


@pytest.mark.parametrize("name", ["cascade_aware", "joint"])
def test_switches_are_true_or_false(name):
    with pytest.raises(ValueError, match=f"{name} must be True or False; got 'off'"):
        CPMCalibrator(**{name: "off"}).fit(counterexample())
