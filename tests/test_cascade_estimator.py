import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from adaptexit import CascadeSaver, SaverWarning, ThresholdCalibrator
from tests.nets import (
    assert_same_learning,
    digits,
    large_trained,
    small_net,
    small_trained,
    trained,
)

TRAIN, VAL, TEST = digits()
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


def test_calibrate_learns_new_thresholds_for_the_same_models():
    fitted = CascadeSaver(large_trained(), small_trained()).fit(*VAL)
    assert fitted.calibrate(*TEST) is fitted
    assert_same_learning(fitted, CascadeSaver(large_trained(), small_trained()).fit(*TEST))
    assert_same_learning(fitted.calibrate(*VAL), CascadeSaver(large_trained(), small_trained()).fit(*VAL))


def test_calibrate_does_not_fit_classifiers_again(iris):
    X, y = iris
    fitted = iris_cascade().fit(X[::2], y[::2])
    before = fitted.predict_anytime(X, 1.0)
    fitted.calibrate(X[1::2], y[1::2])
    assert fitted.outputs_.n_samples == 75
    assert fitted.predict_anytime(X, 1.0).tolist() == before.tolist()


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


# -- bars, precision --------------------------------------------------------------------------------------------------


def test_an_untrained_saver_does_not_pay():
    fitted = CascadeSaver(large_trained(), trained(small_net, epochs=0))
    with pytest.warns(SaverWarning):
        fitted.fit(*VAL)
    assert fitted.trace(VAL[0]).exits.tolist() == [1] * len(VAL[1])
    assert fitted.trace(VAL[0]).relative_costs.tolist() == [1.0] * len(VAL[1])
