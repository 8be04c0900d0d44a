import copy
import json
import pickle

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.base import clone

import adaptexit
from adaptexit import TemperatureCalibrator, ThresholdCalibrator
from adaptexit.core.answer import Answer
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.temperature import RANGE, fit_temperature
from tests.nets import Columns, column_cascade, column_data
from tests.properties.test_calibrator_laws import online_exits

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, 300)
SIGNAL = np.array([1.0, 2.0, 4.0])[:, None, None] * RNG.random((300, 1)) * np.eye(4)[LABELS]
LOGITS = 3.0 * (RNG.normal(size=(3, 300, 4)) + SIGNAL)


@pytest.fixture
def outputs():
    return ExitOutputs.from_logits(LOGITS, LABELS, costs=[1, 2, 3])


def loss(logits, labels, temperature):
    """Mean negative log-likelihood."""
    return -log_softmax(logits / temperature, axis=1)[np.arange(len(labels)), labels].mean()


def honest(n, n_classes=5, seed=0):
    """Logits, and labels drawn with the probabilities that these mean."""
    rng = np.random.default_rng(seed)
    logits = 2.0 * rng.normal(size=(n, n_classes))
    cumulative = softmax(logits, axis=1).cumsum(axis=1)
    return logits, (rng.random((n, 1)) > cumulative[:, :-1]).sum(axis=1)


# -- one temperature --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(3))
def test_no_temperature_of_a_dense_grid_has_a_smaller_loss(k):
    temperature = fit_temperature(LOGITS[k], LABELS)
    grid = np.geomspace(*RANGE, 2001)
    losses = [loss(LOGITS[k], LABELS, t) for t in grid]
    assert loss(LOGITS[k], LABELS, temperature) <= min(losses)
    assert abs(np.log(temperature / grid[np.argmin(losses)])) <= np.log(grid[1] / grid[0])


def test_honest_logits_have_temperature_1():
    assert fit_temperature(*honest(20_000)) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("factor", [0.2, 1.7, 6.0])
def test_scaled_logits_scale_the_temperature(factor):
    logits, labels = honest(500)
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor * fit_temperature(logits, labels), rel=1e-4)


def test_shifting_the_logits_of_a_sample_changes_nothing():
    shifts = RNG.normal(scale=50, size=(300, 1))
    assert fit_temperature(LOGITS[0] + shifts, LABELS) == pytest.approx(fit_temperature(LOGITS[0], LABELS), rel=1e-4)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8])
def test_the_precision_in_which_logits_are_stored_does_not_matter(dtype):
    narrow = np.round(LOGITS[0]).astype(dtype)
    assert fit_temperature(narrow, LABELS) == fit_temperature(narrow.astype(np.float64), LABELS)


def test_large_logits_in_half_precision_do_not_overflow():
    narrow = np.where(np.arange(4) == LABELS[:, None], 6e4, 0).astype(np.float16)
    narrow[:30] = narrow[:30, ::-1]
    assert np.isfinite(fit_temperature(narrow, LABELS))


@pytest.mark.parametrize(("logits", "limit"), [(0.1 * np.eye(4)[LABELS], RANGE[0]), (-np.eye(4)[LABELS], RANGE[1])])
def test_logits_that_are_always_right_or_wrong_end_at_a_limit(logits, limit):
    temperature = fit_temperature(logits, LABELS)
    assert RANGE[0] <= temperature <= RANGE[1]
    assert temperature == pytest.approx(limit, rel=1e-2)


# -- the calibrator ---------------------------------------------------------------------------------------------------


def test_every_exit_has_its_temperature(outputs):
    calibrator = TemperatureCalibrator(n_points=10).fit(outputs)
    assert calibrator.temperatures_.tolist() == [fit_temperature(exit_logits, LABELS) for exit_logits in LOGITS]
    assert len(set(calibrator.temperatures_)) == 3


def test_the_scaled_probabilities_are_no_less_likely(outputs):
    for logits, temperature in zip(LOGITS, TemperatureCalibrator(n_points=5).fit(outputs).temperatures_, strict=True):
        assert loss(logits, LABELS, temperature) < loss(logits, LABELS, 1.0)


def test_scaled_confidences_are_what_is_thresholded(outputs):
    calibrator = TemperatureCalibrator("exact", n_points=10).fit(outputs)
    confidences = softmax(LOGITS / calibrator.temperatures_[:, None, None], axis=2).max(axis=2)
    assert calibrator.rescored(outputs).scores == pytest.approx(confidences)
    by_record = ThresholdCalibrator(search="exact", n_points=10).fit(calibrator.rescored(outputs))
    assert calibrator.thresholds_.tolist() == by_record.thresholds_.tolist()
    assert calibrator.frontier_.cost.tolist() == by_record.frontier_.cost.tolist()
    assert calibrator.exit_index(outputs).tolist() == by_record.exit_index(calibrator.rescored(outputs)).tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_deciding_online_equals_offline_routing(dtype):
    outputs = ExitOutputs.from_logits(LOGITS.astype(dtype), LABELS, costs=[1, 2, 3])
    calibrator = TemperatureCalibrator(n_points=5).fit(outputs)
    batches = np.split(np.random.default_rng(1).permutation(300), [1, 40, 200])
    for point in calibrator.frontier_.points:
        offline = calibrator.exit_index(outputs, point)
        assert online_exits(calibrator, outputs, batches, point).tolist() == offline.tolist()
    assert len(set(calibrator.exit_index(outputs, calibrator.frontier_.at(budget=0.6)))) == 3


@pytest.mark.parametrize(
    ("parameters", "point"), [({"budget": 0.6}, {"budget": 0.6}), ({"max_drop": 0.05}, {"max_drop": 0.05})]
)
def test_the_point_in_use_is_that_asked_for(outputs, parameters, point):
    calibrator = TemperatureCalibrator("exact", n_points=10, **parameters).fit(outputs)
    assert calibrator.point_ is calibrator.frontier_.at(**point)
    assert calibrator.point_ is not calibrator.frontier_.at(max_drop=0.0)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_logits_and_labels_are_needed(outputs):
    without = ExitOutputs.from_logits(LOGITS, LABELS, costs=[1, 2, 3], keep_logits=False)
    graded = ExitOutputs(scores=outputs.scores, quality=outputs.graded, logits=LOGITS, n_classes=4, costs=[1, 2, 3])
    for lacking, gap in ((without, r"logits \(record them with keep_logits=True\)"), (graded, "labels")):
        with pytest.raises(ValueError, match=f"must have logits and labels .*; they lack {gap}"):
            TemperatureCalibrator().fit(lacking)
    with pytest.raises(TypeError, match="outputs must be ExitOutputs; got ndarray"):
        TemperatureCalibrator().fit(LOGITS)


def test_logits_are_needed_later(outputs):
    calibrator = TemperatureCalibrator(n_points=5).fit(outputs)
    without = ExitOutputs.from_logits(LOGITS, LABELS, costs=[1, 2, 3], keep_logits=False)
    for ask in (calibrator.exit_index, calibrator.pareto):
        with pytest.raises(ValueError, match=r"need logits, but the outputs have none.*keep_logits=True"):
            ask(without)
    with pytest.raises(ValueError, match="need logits, but the batch has none"):
        calibrator.policy().decide(0, Answer(predictions=np.zeros(1, int), scores=np.zeros(1)))


def test_a_failed_fit_leaves_the_calibrator_as_it_was(outputs):
    calibrator = TemperatureCalibrator(n_points=5).fit(outputs)
    before = dict(vars(calibrator))
    with pytest.raises(ValueError, match="budget must be at least"):
        calibrator.set_params(budget=0.01).fit(outputs.take(np.arange(100)))
    attributes = ("temperatures_", "frontier_", "point_", "search_report_")
    assert all(vars(calibrator)[name] is before[name] for name in attributes)


# -- copies and estimators --------------------------------------------------------------------------------------------


def through_state(calibrator, outputs):
    state, arrays = calibrator.get_state()
    again = clone(calibrator)
    again.set_state(json.loads(json.dumps(state)), arrays, outputs)
    return again


@pytest.mark.parametrize(
    "copied",
    [
        through_state,
        lambda calibrator, outputs: copy.deepcopy(calibrator),
        lambda calibrator, outputs: pickle.loads(pickle.dumps(calibrator)),
    ],
)
def test_copies_hold_what_was_learned(outputs, copied):
    calibrator = TemperatureCalibrator(budget=0.6, n_points=10).fit(outputs)
    again = copied(calibrator, outputs)
    assert again.temperatures_.tolist() == calibrator.temperatures_.tolist()
    assert again.thresholds_.tolist() == calibrator.thresholds_.tolist()
    assert again.search_report_ == calibrator.search_report_
    assert again.exit_index(outputs).tolist() == calibrator.exit_index(outputs).tolist()


def test_parameters_are_stored_as_given_and_cloned(outputs):
    parameters = {"search": "coord", "budget": 0.6, "max_drop": None, "n_points": 7, "random_state": 3}
    calibrator = TemperatureCalibrator(**parameters).fit(outputs)
    assert calibrator.get_params() == clone(calibrator).get_params() == parameters
    assert clone(calibrator).fit(outputs).thresholds_.tolist() == calibrator.thresholds_.tolist()


def test_a_cascade_leaves_as_its_temperatures_say(tmp_path):
    X, y = column_data(300, n_models=3)
    cascade = column_cascade(3, calibrator=TemperatureCalibrator(budget=0.3, n_points=10)).fit(X[:200], y[:200])
    cascade.save(tmp_path / "cascade")
    loaded = adaptexit.load(tmp_path / "cascade", base=Columns(2), saver=[Columns(0), Columns(1)])
    assert loaded.calibrator_.temperatures_.tolist() == cascade.calibrator_.temperatures_.tolist()
    for fitted in (cascade, loaded):
        exits = fitted.calibrator_.exit_index(fitted.record(X, y))
        assert fitted.trace(X).exits.tolist() == exits.tolist()
    assert len(set(exits.tolist())) > 1
    assert loaded.predict(X).tolist() == cascade.predict(X).tolist()
