"""Weights of samples given to estimators: read where thresholds are found, in the order of the samples."""

import copy

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import adaptexit
from adaptexit import CalibrationWarning, CascadeSaver, EENetScheduler, ThresholdCalibrator
from tests.nets import branched_model, digits, large_trained, loader_of, small_trained

_, VAL, TEST = digits()
WEIGHTS = np.where(VAL[1] < 5, 0.25, 2.0)
TEST_WEIGHTS = np.where(TEST[1] < 5, 0.0, 3.0)

pytestmark = [
    pytest.mark.filterwarnings("ignore::adaptexit.SaverWarning"),
    pytest.mark.filterwarnings("ignore::adaptexit.LabelWarning"),
]


def cascade(**params):
    return CascadeSaver(large_trained(), small_trained(), **({"calibrator": ThresholdCalibrator(budget=0.5)} | params))


@pytest.fixture(params=["cascade", "exits"])
def calibrated(request):
    """An estimator calibrated by weight, and the function that did it."""
    if request.param == "cascade":
        return cascade().fit(*VAL, WEIGHTS), lambda *data: cascade().fit(*data)
    model = copy.deepcopy(branched_model()).set_params(calibrator=ThresholdCalibrator(budget=0.5))
    return model.calibrate(*VAL, sample_weight=WEIGHTS), model.calibrate


def test_thresholds_are_found_by_weight(calibrated, tmp_path):
    model, _ = calibrated
    outputs, point = model.outputs_, model.calibrator_.point_
    assert outputs.sample_weight == pytest.approx(WEIGHTS / WEIGHTS.mean())
    expected = ThresholdCalibrator(budget=0.5).fit(outputs)
    assert point.thresholds.tolist() == expected.thresholds_.tolist()
    right = model.predict(VAL[0]) == VAL[1]
    assert point.accuracy == pytest.approx(np.average(right, weights=WEIGHTS))
    model.save(tmp_path / "model")
    again = adaptexit.load(tmp_path / "model", **_given_again(model))
    assert again.outputs_.sample_weight.tolist() == outputs.sample_weight.tolist()
    assert again.calibrator_.frontier_.effective_size == outputs.effective_size


def _given_again(model):
    if isinstance(model, CascadeSaver):
        return {"base": large_trained(), "saver": small_trained()}
    return {"backbone": model.backbone, "head": model.head}


def test_curves_on_other_data_are_by_weight(calibrated):
    model, _ = calibrated
    frontier = model.pareto(*TEST, sample_weight=TEST_WEIGHTS)
    some = TEST_WEIGHTS > 0
    alone = model.pareto(TEST[0][some], TEST[1][some])
    assert frontier.accuracy == pytest.approx(alone.accuracy)
    assert frontier.cost == pytest.approx(alone.cost)
    with pytest.raises(ValueError, match="X must be given where sample_weight is"):
        model.pareto(sample_weight=TEST_WEIGHTS)


def test_weights_follow_the_order_of_a_loader(calibrated):
    model, calibrate = calibrated
    other = calibrate(loader_of(*VAL), None, WEIGHTS)
    assert other.outputs_.sample_weight.tolist() == model.outputs_.sample_weight.tolist()
    assert other.outputs_.labels.tolist() == VAL[1].tolist()
    with pytest.raises(ValueError, match="X must keep its order, since answers and weights are in input order"):
        calibrate(loader_of(*VAL, shuffle=True), None, WEIGHTS)
    with pytest.raises(ValueError, match=r"sample_weight must have shape \(\d+,\), one weight a sample"):
        calibrate(loader_of(*VAL), None, WEIGHTS[1:])
    with pytest.raises(ValueError, match=r"sample_weight must have shape \(\d+,\), one weight a sample"):
        model.record(*TEST, TEST_WEIGHTS[1:])


def test_what_cannot_be_read_is_refused_before_anything_runs():
    model = CascadeSaver(None, None, calibrator=EENetScheduler())
    with pytest.raises(ValueError, match="EENetScheduler does not read sample_weight"):
        model.fit(*VAL, WEIGHTS)


def test_classifiers_are_fitted_by_weight_where_they_can_be():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(400, 2)), rng.integers(2, size=400)
    weights = np.where((X[:, 0] > 0) == y, 3.0, 0.0)
    model = CascadeSaver(LogisticRegression(), LogisticRegression(C=0.01), cost=[1, 10]).fit(X, y, weights)
    assert model.score(X, y, weights) > 0.95
    assert model.outputs_.n_samples == 100
    by_neighbours = CascadeSaver(LogisticRegression(), KNeighborsClassifier(), cost=[1, 10])
    with pytest.warns(CalibrationWarning, match="saver is fitted without sample_weight, which KNeighborsClassifier"):
        by_neighbours.fit(X, y, weights)
