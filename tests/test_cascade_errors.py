import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import nn

from adaptexit import CascadeSaver, ThresholdCalibrator
from tests.contract.cases import learned
from tests.nets import Columns, column_cascade, column_data, digits, large_trained, loader_of, small_trained

TRAIN, VAL, TEST = digits()
X, Y = column_data(300)
IRIS = load_iris(return_X_y=True)


def classifiers(**params):
    return CascadeSaver(LogisticRegression(C=10), LogisticRegression(C=0.01), **({"cost": [1, 10]} | params))


# -- labels -----------------------------------------------------------------------------------------------------------


def test_many_labels_outside_the_classes_are_shortened():
    with pytest.raises(ValueError, match=r"among the 3 classes \[0, 1, 2\]; got \[3, 4, \.\.\., 299\]"):
        column_cascade().fit(X, np.arange(300))


# -- models and classes -----------------------------------------------------------------------------------------------


def test_models_of_different_class_counts():
    saver = nn.Sequential(nn.Flatten(), nn.Linear(64, 9))
    with pytest.raises(ValueError, match=r"for the same number of classes; got \{'saver': 9, 'base': 10\}"):
        CascadeSaver(large_trained(), saver).fit(*VAL)


def test_classifiers_of_different_classes():
    x, y = IRIS
    base, saver = LogisticRegression(max_iter=500).fit(x, y), LogisticRegression(max_iter=500).fit(x, y + 1)
    with pytest.raises(ValueError, match=r"fitted on the same classes; saver has \[1, 2, 3\], base has \[0, 1, 2\]"):
        CascadeSaver(base, saver).fit(x, y)


def test_classes_that_are_not_the_classifiers():
    with pytest.raises(ValueError, match=r"classes must be those of the fitted classifiers, \[0, 1, 2\]; got \[2, 1"):
        classifiers(classes=[2, 1, 0]).fit(*IRIS)


def test_no_saver():
    with pytest.raises(ValueError, match="saver must be a model or a list of at least one; got an empty list"):
        CascadeSaver(Columns(1), []).fit(X, Y)


@pytest.mark.parametrize(("base", "saver", "label"), [(3, Columns(0), "base"), (Columns(1), None, "saver")])
def test_things_that_are_no_model(base, saver, label):
    with pytest.raises(TypeError, match=f"{label} must be a timm model name, a factory.*got"):
        CascadeSaver(base, saver, cost=[1, 10]).fit(X, Y)


def test_the_saver_that_is_no_model_is_named():
    with pytest.raises(TypeError, match=r"saver\[1\] must be a timm model name"):
        CascadeSaver(Columns(1), [Columns(0), 7], cost=[1, 2, 10]).fit(X, Y)


def test_preprocessing_for_another_number_of_savers():
    with pytest.raises(ValueError, match="saver_preprocess must be one for all savers or one each; got 3 for 2"):
        column_cascade(3, saver_preprocess=[None, None, None]).fit(*column_data(50, 3))


@pytest.mark.parametrize("what", ["base", "saver", "saver_preprocess"])
def test_models_that_write_into_their_input(what):
    x = VAL[0].copy()
    spoiling = {
        "base": nn.Sequential(nn.Threshold(0.5, 1.0, inplace=True), large_trained()),
        "saver": nn.Sequential(nn.Threshold(0.5, 1.0, inplace=True), small_trained()),
        "saver_preprocess": lambda images: images.sub_(0.5),
    }
    params = {"base": large_trained(), "saver": small_trained()} | {what: spoiling[what]}
    with pytest.raises(ValueError, match=rf"{what.partition('_')[0]} must leave its input as it is.*work on a copy"):
        CascadeSaver(**params).fit(x, VAL[1])
    assert x.tolist() == VAL[0].tolist()


def test_logits_that_are_not_finite():
    base = large_trained()
    with torch.no_grad():
        base[-1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"exit 1 gave a score that is NaN or infinite.*in the weights"):
        CascadeSaver(base, small_trained()).fit(*VAL)


# -- parameters -------------------------------------------------------------------------------------------------------


def test_macs_of_a_module_without_any():
    with pytest.raises(ValueError, match=r"found no multiply-accumulates in saver. Use cost='latency' or give"):
        column_cascade(cost="macs").fit(X, Y)


def test_macs_of_a_classifier():
    with pytest.raises(ValueError, match="cost='macs' cannot be counted for saver, a scikit-learn classifier"):
        classifiers(cost="macs").fit(*IRIS)


@pytest.mark.parametrize(
    ("calibrator", "message"),
    [
        (ThresholdCalibrator("certainty"), "score must be one of"),
        (ThresholdCalibrator(search="random"), "search must be one of"),
        (ThresholdCalibrator(budget=0.01), "budget must be at least 0.1"),
        (ThresholdCalibrator(max_drop=-1.0), "max_drop must be"),
    ],
)
def test_parameters_of_the_calibrator(calibrator, message):
    with pytest.raises(ValueError, match=message):
        column_cascade(calibrator=calibrator).fit(X, Y)


@pytest.mark.parametrize("n", [2, 3])
def test_too_few_samples_to_hold_out(n):
    with pytest.raises(ValueError, match=f"besides one of each class to fit on; got {n} samples of {n} classes"):
        classifiers().fit(IRIS[0][:n], np.arange(n))


def test_a_stream_where_a_classifier_has_to_be_fitted():
    with pytest.raises(ValueError, match="X must be an array where a classifier has to be fitted; got a DataLoader"):
        classifiers().fit(loader_of(*IRIS))


def test_a_classifier_without_probabilities():
    with pytest.raises(TypeError, match="base must offer predict_proba; LinearSVC does not"):
        CascadeSaver(LinearSVC(), LogisticRegression(), cost=[1, 10]).fit(*IRIS)


# -- a failed call leaves the estimator as it was ---------------------------------------------------------------------


@pytest.mark.parametrize("params", [{"base": 3}, {"base": nn.Linear(6, 4)}, {"saver": []}])
def test_a_fit_that_fails_for_a_model_changes_nothing(params):
    cascade = column_cascade().fit(X, Y)
    before = learned(cascade)
    with pytest.raises((ValueError, TypeError)):
        cascade.set_params(**params).fit(X, Y)
    assert learned(cascade).keys() == before.keys()
    assert all(learned(cascade)[name] is value for name, value in before.items())


def test_a_failed_fit_of_classifiers_keeps_the_width_of_the_table():
    x, y = IRIS
    cascade = classifiers().fit(x, y)
    for params, labels in (({}, np.full(len(y), np.nan)), ({"cost": [1, -1]}, y)):
        with pytest.raises(ValueError):
            cascade.set_params(**params).fit(x[:, :2], labels)
        assert cascade.n_features_in_ == 4
