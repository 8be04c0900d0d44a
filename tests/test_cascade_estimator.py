import copy
import io
import pickle
import random
from contextlib import redirect_stderr, redirect_stdout
from functools import partial

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier
from torch import nn

from adaptexit import CascadeSaver, SaverWarning, ThresholdCalibrator
from adaptexit.core.scores import max_proba
from tests.nets import (
    assert_same_learning,
    digits,
    large_trained,
    loader_of,
    middle_trained,
    small_net,
    small_trained,
    trained,
)

TRAIN, VAL, TEST = digits()
BUDGETS = [None, 0.05, 0.2, 0.5, 1.0]
confidence = partial(max_proba, xp=torch)
saver_may_not_pay = pytest.mark.filterwarnings("ignore::adaptexit.SaverWarning")


# -- scikit-learn classifiers -----------------------------------------------------------------------------------------


@pytest.fixture
def iris():
    X, y = load_iris(return_X_y=True)
    return X, np.array(["setosa", "versicolor", "virginica"])[y]


def iris_cascade(**params):
    shallow = DecisionTreeClassifier(max_depth=2, random_state=0)
    return CascadeSaver(LogisticRegression(max_iter=1000), shallow, **({"cost": [1, 10]} | params))


def test_unfitted_classifiers_are_cloned_and_fitted_on_the_held_in_part(iris):
    X, y = iris
    fitted = iris_cascade().fit(X, y)
    assert not hasattr(fitted.base, "classes_")
    assert not hasattr(fitted.saver, "tree_")
    assert fitted.classes_.tolist() == ["setosa", "versicolor", "virginica"]
    assert fitted.outputs_.n_samples == round(0.25 * len(y))
    assert np.bincount(fitted.outputs_.labels).tolist() in ([13, 13, 12], [13, 12, 13], [12, 13, 13])
    assert fitted.n_features_in_ == 4
    assert fitted.score(X, y) > 0.9


@saver_may_not_pay
def test_the_held_out_part_is_not_learned_from(iris):
    X, _ = iris
    y = np.random.default_rng(0).integers(0, 2, len(X))
    by_heart = DecisionTreeClassifier(random_state=0)
    fitted = CascadeSaver(by_heart, LogisticRegression(), cost=[1, 10], calibrator=ThresholdCalibrator(budget=1.0))
    fitted.fit(X, y)
    assert fitted.outputs_.full_accuracy < 0.7
    assert np.mean(fitted.predict_anytime(X, 1.0) == y) > 0.8


@pytest.mark.parametrize("size", [0.1, 0.5])
def test_the_share_held_out(iris, size):
    assert iris_cascade(calibration_size=size).fit(*iris).outputs_.n_samples == round(size * 150)


def test_the_split_follows_random_state(iris):
    one, same, other = (iris_cascade(random_state=seed).fit(*iris) for seed in (0, 0, 1))
    assert_same_learning(one, same)
    assert one.outputs_.scores.tolist() != other.outputs_.scores.tolist()


def test_a_class_of_one_sample_is_fitted_on(iris):
    X, y = iris[0][:101], iris[1][:101]
    fitted = iris_cascade().fit(X, y)
    assert fitted.classes_.tolist() == ["setosa", "versicolor", "virginica"]
    assert np.bincount(fitted.outputs_.labels, minlength=3)[2] == 0


def test_fitted_classifiers_are_used_as_they_are(iris):
    X, y = iris
    base, saver = LogisticRegression(max_iter=1000).fit(X, y), DecisionTreeClassifier(max_depth=2).fit(X, y)
    fitted = CascadeSaver(base, saver, cost=[1, 10]).fit(X, y)
    assert fitted.outputs_.n_samples == 150
    assert fitted.predict_anytime(X, 1.0).tolist() == base.predict(X).tolist()
    assert fitted.predict_anytime(X, 0.1).tolist() == saver.predict(X).tolist()
    np.testing.assert_allclose(fitted.predict_proba(X, budget=0.1), saver.predict_proba(X), atol=1e-9)


def test_frozen_classifiers_stay_fitted_when_cloned(iris):
    X, y = iris
    base, saver = LogisticRegression(max_iter=1000).fit(X, y), DecisionTreeClassifier(max_depth=2).fit(X, y)
    cascade = CascadeSaver(FrozenEstimator(base), FrozenEstimator(saver), cost=[1, 10])
    assert clone(cascade).fit(X, y).predict_anytime(X, 1.0).tolist() == base.predict(X).tolist()


def test_a_module_and_a_classifier_together():
    X, y = VAL
    saver = LogisticRegression(max_iter=500).fit(TRAIN[0].reshape(len(TRAIN[0]), -1), TRAIN[1])
    fitted = CascadeSaver(large_trained(), saver, cost=[1, 10]).fit(X, y)
    assert fitted.predict_anytime(TEST[0], 0.1).tolist() == saver.predict(TEST[0].reshape(len(TEST[0]), -1)).tolist()
    assert fitted.score(*TEST) > 0.9
    unfitted = CascadeSaver(large_trained(), LogisticRegression(max_iter=500), cost=[1, 10]).fit(X, y)
    assert unfitted.outputs_.n_samples == 150


def test_data_frames(iris):
    pandas = pytest.importorskip("pandas")
    X, y = pandas.DataFrame(iris[0], columns=list("abcd")), pandas.Series(iris[1])
    fitted = iris_cascade().fit(X, y)
    assert fitted.feature_names_in_.tolist() == list("abcd")
    assert fitted.predict(X).tolist() == iris_cascade().fit(*iris).predict(iris[0]).tolist()
    with pytest.raises(ValueError, match="feature names"):
        fitted.predict(X[list("dcba")])


# -- calibrating anew -------------------------------------------------------------------------------------------------


def test_calibrate_learns_new_thresholds_for_the_same_models(cascade):
    fitted = CascadeSaver(large_trained(), small_trained()).fit(*VAL)
    assert fitted.calibrate(*TEST) is fitted
    assert_same_learning(fitted, CascadeSaver(large_trained(), small_trained()).fit(*TEST))
    assert_same_learning(fitted.calibrate(*VAL), cascade)


def test_calibrate_does_not_fit_classifiers_again(iris):
    X, y = iris
    fitted = iris_cascade().fit(X[::2], y[::2])
    before = fitted.predict_anytime(X, 1.0)
    fitted.calibrate(X[1::2], y[1::2])
    assert fitted.outputs_.n_samples == 75
    assert fitted.predict_anytime(X, 1.0).tolist() == before.tolist()


# -- modules are given back as they were ------------------------------------------------------------------------------


class Fails(nn.Module):
    """Raises after some calls."""

    def __init__(self, inner, calls):
        super().__init__()
        self.inner, self.left = inner, calls

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of calls")
        return self.inner(x)


def modes(*nets):
    return [module.training for net in nets for module in net.modules()]


def test_modules_are_shared_and_given_back_as_they_were():
    base, saver = large_trained().train(), small_trained()
    base[1].eval()
    base[0].weight.requires_grad_(False)
    state = copy.deepcopy(base.state_dict())
    before, grads = modes(base, saver), [p.requires_grad for p in base.parameters()]
    seen = []
    base.register_forward_hook(lambda module, inputs, output: seen.append((module.training, len(output))))
    fitted = CascadeSaver(base, saver).fit(*VAL)
    seen.clear()
    exits = fitted.trace(TEST[0]).exits
    assert sum(n for _, n in seen) == exits.sum() > 0
    assert not any(training for training, _ in seen)
    fitted.predict_proba(TEST[0])
    fitted.score(*TEST)
    fitted.pareto(*TEST)
    fitted.predict_anytime(TEST[0], 1.0)
    assert modes(base, saver) == before
    assert [p.requires_grad for p in base.parameters()] == grads
    assert all(p.grad is None for p in base.parameters())
    assert all(torch.equal(value, state[key]) for key, value in base.state_dict().items())
    assert fitted.base is base


@pytest.mark.parametrize("call", ["fit", "predict"])
def test_modes_are_given_back_after_a_failure(call):
    base = Fails(large_trained().train(), calls=100)
    saver = small_trained().train()
    fitted = CascadeSaver(base, saver)
    if call == "predict":
        fitted.fit(*VAL)
    base.left = 1
    before = modes(base, saver)
    with pytest.raises(RuntimeError, match="out of calls"):
        fitted.fit(*VAL) if call == "fit" else [fitted.predict(TEST[0]) for _ in range(3)]
    assert modes(base, saver) == before


def test_answers_are_those_of_evaluation_mode(cascade):
    fitted = CascadeSaver(large_trained().train(), small_trained().train()).fit(*VAL)
    assert_same_learning(fitted, cascade)
    assert fitted.predict(TEST[0]).tolist() == cascade.predict(TEST[0]).tolist()


# -- repeatability ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [lambda: VAL, lambda: (loader_of(*VAL), None), lambda: (loader_of(*VAL).dataset, None)]
)
def test_refit_and_clone_are_bit_equal(data):
    calibrator = ThresholdCalibrator(n_points=20)
    one = CascadeSaver(large_trained(), [small_trained(), middle_trained()], calibrator=calibrator).fit(*data())
    copied = clone(one)
    assert not hasattr(copied, "calibrator_")
    labels, proba = one.predict(TEST[0], budget=0.3), one.predict_proba(TEST[0])
    for again in (copied.fit(*data()), clone(one).fit(*data()), one.fit(*data())):
        assert_same_learning(one, again)
        assert again.predict(TEST[0], budget=0.3).tobytes() == labels.tobytes()
        assert again.predict_proba(TEST[0]).tobytes() == proba.tobytes()


def test_refit_of_classifiers_is_bit_equal(iris):
    one = iris_cascade().fit(*iris)
    assert_same_learning(one, clone(one).fit(*iris))
    assert clone(one).fit(*iris).predict_proba(iris[0]).tobytes() == one.predict_proba(iris[0]).tobytes()


def random_states():
    return torch.random.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002


@pytest.mark.parametrize("bagged", [False, True])
def test_global_random_states_are_untouched(iris, bagged):
    calibrator = ThresholdCalibrator(search="coord" if bagged else "geometric", n_points=20)
    before = random_states()
    fitted = CascadeSaver(large_trained(), [small_trained(), middle_trained()], calibrator=calibrator)
    for data in (VAL, (loader_of(*VAL), None), (loader_of(*VAL, shuffle=True), None)):
        fitted.fit(*data)
        assert fitted.calibrator_.search_report_.bagged == bagged
        fitted.predict(TEST[0])
        fitted.predict(loader_of(*TEST))
        fitted.predict(loader_of(*TEST).dataset)
        fitted.score(loader_of(*TEST, shuffle=True))
        fitted.pareto(*TEST)
    iris_cascade().fit(*iris).predict(iris[0])
    assert random_states() == before


# -- with scikit-learn ------------------------------------------------------------------------------------------------


def test_grid_search_over_parameters_of_a_cascade_of_modules():
    grid = {"budget": [0.02, 0.5], "batch_size": [32, 100], "calibrator__n_points": [20]}
    cascade = CascadeSaver(large_trained(), small_trained(), calibrator=ThresholdCalibrator())
    search = GridSearchCV(cascade, grid, cv=3, error_score="raise").fit(*VAL)
    by_budget = {
        (params["budget"], params["batch_size"]): score
        for params, score in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True)
    }
    assert search.best_params_["budget"] == 0.5
    assert by_budget[0.5, 32] == by_budget[0.5, 100] > by_budget[0.02, 32] == by_budget[0.02, 100]
    assert search.score(*TEST) == search.best_estimator_.score(*TEST)


def test_a_cascade_of_classifiers_in_a_pipeline(iris):
    X, y = iris
    pipeline = make_pipeline(StandardScaler(), iris_cascade()).fit(X, y)
    alone = iris_cascade().fit(StandardScaler().fit_transform(X), y)
    assert pipeline.predict(X).tolist() == alone.predict(StandardScaler().fit_transform(X)).tolist()
    assert pipeline.score(X, y) > 0.9
    search = GridSearchCV(pipeline, {"cascadesaver__base__C": [0.01, 10.0]}, cv=2, error_score="raise").fit(X, y)
    assert search.best_params_ == {"cascadesaver__base__C": 10.0}


def test_nested_parameters(cascade):
    other = clone(cascade).set_params(calibrator=ThresholdCalibrator(), calibrator__max_drop=0.1)
    assert other.calibrator.max_drop == 0.1
    assert other.get_params()["calibrator__max_drop"] == 0.1
    with pytest.raises(ValueError, match="Invalid parameter 'bases'"):
        other.set_params(bases=1)


@pytest.mark.parametrize("protocol", ["pickle", "joblib"])
def test_pickles(three, protocol, tmp_path):
    if protocol == "pickle":
        loaded = pickle.loads(pickle.dumps(three))
    else:
        joblib.dump(three, tmp_path / "cascade.joblib")
        loaded = joblib.load(tmp_path / "cascade.joblib")
    assert_same_learning(three, loaded)
    assert loaded.point_index(0.3) == three.point_index(0.3)
    assert loaded.predict_proba(TEST[0], budget=0.3).tobytes() == three.predict_proba(TEST[0], budget=0.3).tobytes()


def test_factories_are_called_once_a_fit(cascade):
    calls = []

    def factory():
        calls.append(1)
        return large_trained()

    fitted = CascadeSaver(factory, small_trained, device="cpu").fit(*VAL)
    fitted.predict(TEST[0])
    fitted.calibrate(*VAL)
    assert len(calls) == 1
    assert_same_learning(fitted, cascade)


# -- bars, precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verbose", [0, 1])
def test_bars_are_shown_on_request(verbose):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        fitted = CascadeSaver(large_trained(), small_trained(), verbose=verbose).fit(*VAL)
        fitted.predict(TEST[0])
        fitted.pareto(*TEST)
    assert out.getvalue() == ""
    shown = err.getvalue()
    assert (shown != "") == bool(verbose)
    if verbose:
        assert all(word in shown for word in ("calibrating", "predicting", "recording", "5/5"))


@pytest.mark.parametrize("when", ["predict", "both"])
def test_autocast(cascade, when):
    fitted = cascade
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if when == "both":
            fitted = CascadeSaver(large_trained(), small_trained()).fit(*VAL)
            assert fitted.outputs_.scores.dtype == np.float32
        labels, trace = fitted.predict(TEST[0]), fitted.trace(TEST[0])
    assert np.mean(labels == TEST[1]) == pytest.approx(cascade.score(*TEST), abs=0.02)
    assert 0.2 < trace.exits.mean() < 0.8
    assert cascade.trace(TEST[0]).scores.tolist() != trace.scores.tolist()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_fit_where_gradients_are_off(cascade, mode):
    with mode():
        fitted = CascadeSaver(large_trained(), small_trained()).fit(*VAL)
    assert fitted.outputs_.exit_costs.tolist() == cascade.outputs_.exit_costs.tolist()
    assert_same_learning(fitted, cascade)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_modules_of_other_precision(dtype):
    fitted = CascadeSaver(large_trained().to(dtype), small_trained()).fit(*VAL)
    assert fitted.score(*TEST) > 0.95
    assert fitted.predict_proba(TEST[0]).sum(axis=1) == pytest.approx(np.ones(len(TEST[0])), abs=1e-5)


def test_an_untrained_saver_does_not_pay():
    fitted = CascadeSaver(large_trained(), trained(small_net, epochs=0))
    with pytest.warns(SaverWarning):
        fitted.fit(*VAL)
    assert fitted.trace(VAL[0]).exits.tolist() == [1] * len(VAL[1])
    assert fitted.trace(VAL[0]).relative_costs.tolist() == [1.0] * len(VAL[1])
