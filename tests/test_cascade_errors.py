import re
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import nn
from torch.utils.data import TensorDataset

from adaptexit import CascadeSaver, ThresholdCalibrator
from tests.nets import Columns, column_cascade, column_data, digits, large_trained, loader_of, small_trained

TRAIN, VAL, TEST = digits()
X, Y = column_data(300)
IRIS = load_iris(return_X_y=True)


@pytest.fixture
def fitted():
    return column_cascade().fit(X, Y)


def classifiers(**params):
    return CascadeSaver(LogisticRegression(C=10), LogisticRegression(C=0.01), **({"cost": [1, 10]} | params))


def spoiled(value, at=-1):
    x = X.copy()
    x[at, 2] = value
    return x


# -- order of calls ---------------------------------------------------------------------------------------------------

CALLS = {
    "predict": lambda cascade: cascade.predict(X),
    "predict_proba": lambda cascade: cascade.predict_proba(X),
    "trace": lambda cascade: cascade.trace(X),
    "predict_anytime": lambda cascade: cascade.predict_anytime(X, 1.0),
    "score": lambda cascade: cascade.score(X, Y),
    "calibrate": lambda cascade: cascade.calibrate(X, Y),
    "pareto": lambda cascade: cascade.pareto(),
    "pareto on data": lambda cascade: cascade.pareto(X, Y),
    "record": lambda cascade: cascade.record(X, Y),
    "point_index": lambda cascade: cascade.point_index(),
    "save": lambda cascade: cascade.save("never-written"),
}


@pytest.mark.parametrize("call", CALLS)
def test_before_fit(call):
    with pytest.raises(NotFittedError, match="CascadeSaver instance is not fitted yet"):
        CALLS[call](column_cascade())


# -- data -------------------------------------------------------------------------------------------------------------

READERS = {
    "fit": lambda cascade, x: cascade.fit(x, Y[: len(x)]),
    "calibrate": lambda cascade, x: cascade.calibrate(x, Y[: len(x)]),
    "predict": lambda cascade, x: cascade.predict(x),
    "predict_proba": lambda cascade, x: cascade.predict_proba(x),
    "trace": lambda cascade, x: cascade.trace(x),
    "predict_anytime": lambda cascade, x: cascade.predict_anytime(x, 1.0),
    "score": lambda cascade, x: cascade.score(x, Y[: len(x)]),
    "pareto": lambda cascade, x: cascade.pareto(x, Y[: len(x)]),
    "record": lambda cascade, x: cascade.record(x, Y[: len(x)]),
}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_data_that_are_not_finite(fitted, read, bad):
    with pytest.raises(ValueError, match="X must be finite; it contains NaN or infinity"):
        READERS[read](fitted, spoiled(bad))


@pytest.mark.parametrize("read", READERS)
def test_no_samples(fitted, read):
    with pytest.raises(ValueError, match="X holds no samples; give at least one"):
        READERS[read](fitted, X[:0])


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("bad", ["images/", {"x": X}, np.array([["a"]])])
def test_things_that_are_no_data(fitted, read, bad):
    with pytest.raises(TypeError, match="X must be a"):
        READERS[read](fitted, bad)


@pytest.mark.parametrize("read", ["predict", "predict_proba", "trace", "predict_anytime"])
def test_a_pair_where_inputs_are_meant(fitted, read):
    with pytest.raises(ValueError, match=r"X must be inputs alone here; got a pair, which looks like \(X, y\)"):
        READERS[read](fitted, (X, Y))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_tables_that_are_not_finite(bad):
    x = IRIS[0].copy()
    cascade = classifiers().fit(*IRIS)
    x[3, 1] = bad
    for call in (partial(classifiers().fit, y=IRIS[1]), cascade.predict, partial(cascade.calibrate, y=IRIS[1])):
        with pytest.raises(ValueError, match=r"Input X contains (NaN|infinity)"):
            call(x)


def test_tables_of_another_width():
    cascade = classifiers().fit(*IRIS)
    with pytest.raises(ValueError, match="X has 3 features, but CascadeSaver is expecting 4 features"):
        cascade.predict(IRIS[0][:, :3])


# -- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fit", "calibrate", "record"])
def test_labels_are_missing(fitted, name):
    call = getattr(fitted, name)
    with pytest.raises(ValueError, match=r"y is None: give y, a pair \(X, y\), or a Dataset or DataLoader"):
        call(X)
    with pytest.raises(ValueError, match=r"must give \(x, y\) pairs here; it gave x alone"):
        call(TensorDataset(torch.from_numpy(X)))


def test_labels_are_missing_in_score(fitted):
    with pytest.raises(ValueError, match=r"labels are needed: give y, a pair \(X, y\).*got y=None"):
        fitted.score(X)
    with pytest.raises(ValueError, match=r"must give \(x, y\) pairs here; it gave x alone"):
        fitted.score(TensorDataset(torch.from_numpy(X)))


@pytest.mark.parametrize("name", ["fit", "calibrate", "record", "pareto", "score"])
def test_labels_are_given_twice(fitted, name):
    with pytest.raises(ValueError, match="y is taken from X where X is a DataLoader"):
        getattr(fitted, name)(loader_of(X, Y), Y)


@pytest.mark.parametrize("name", ["fit", "calibrate", "record", "pareto"])
@pytest.mark.parametrize("y", [Y[:-1], np.append(Y, 0), Y[:, None], np.eye(3)[Y]])
def test_labels_of_the_wrong_shape(fitted, name, y):
    with pytest.raises(ValueError, match=r"y must have shape \(300,\), one label a sample of X; got shape"):
        getattr(fitted, name)(X, y)


@pytest.mark.parametrize("name", ["fit", "calibrate", "record", "pareto"])
@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        (Y + 1, "[3]"),
        (Y - 1, "[-1]"),
        (np.where(Y == 0, np.nan, Y), "[nan]"),
        (Y + 0.5, "[0.5, 1.5, 2.5]"),
        (np.array(["a", "b", "c"])[Y], "['a', 'b', 'c']"),
    ],
)
def test_labels_outside_the_classes(fitted, name, wrong, shown):
    message = f"y must hold labels among the 3 classes [0, 1, 2]; got {shown}. Give the labels in the order"
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(fitted, name)(X, wrong)


def test_many_labels_outside_the_classes_are_shortened(fitted):
    with pytest.raises(ValueError, match=r"among the 3 classes \[0, 1, 2\]; got \[3, 4, \.\.\., 299\]"):
        fitted.fit(X, np.arange(300))


def test_labels_of_a_dataset_that_are_no_numbers_each(fitted):
    with pytest.raises(ValueError, match=r"y must be one label a sample; got shape \(300, 3\)"):
        fitted.fit(loader_of(X, np.eye(3)[Y]))


# -- models and classes -----------------------------------------------------------------------------------------------


def test_models_of_different_class_counts():
    saver = nn.Sequential(nn.Flatten(), nn.Linear(64, 9))
    with pytest.raises(ValueError, match=r"for the same number of classes; got \{'saver': 9, 'base': 10\}"):
        CascadeSaver(large_trained(), saver).fit(*VAL)


@pytest.mark.parametrize("classes", [["a", "b"], ["a", "b", "b"], [["a", "b", "c"]], "abc", 3])
def test_classes_that_do_not_fit_the_outputs(classes):
    with pytest.raises(ValueError, match="classes must be 3 different labels, one an output; got"):
        column_cascade(classes=classes).fit(X, Y)


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


@pytest.mark.parametrize(
    "cost", [[1.0], [1, 2, 3], [0, 1], [-1, 2], [np.nan, 1], [1, np.inf], ["a", 1], None, 5, [[1], [1, 2]]]
)
def test_costs_that_cannot_be(cost):
    with pytest.raises(ValueError, match="cost must be 2 positive numbers, savers first and base last; got"):
        column_cascade(cost=cost).fit(X, Y)


def test_costs_of_unknown_name():
    with pytest.raises(ValueError, match=r"cost must be 'auto', 'macs', 'latency' or a sequence.*got 'flops'"):
        column_cascade(cost="flops").fit(X, Y)


def test_macs_of_a_module_without_any():
    with pytest.raises(ValueError, match=r"found no multiply-accumulates in saver. Use cost='latency' or give"):
        column_cascade(cost="macs").fit(X, Y)


def test_macs_of_a_classifier():
    with pytest.raises(ValueError, match="cost='macs' cannot be counted for saver, a scikit-learn classifier"):
        classifiers(cost="macs").fit(*IRIS)


@pytest.mark.parametrize("name", ["certainty", 3])
def test_confidence_of_unknown_name(name):
    with pytest.raises(ValueError, match=r"confidence must be one of \['entropy', 'margin', 'max_proba'\] or a call"):
        column_cascade(confidence=name).fit(X, Y)


@pytest.mark.parametrize(
    ("confidence", "message"),
    [
        (lambda logits: logits, r"expected shape \(128,\), got \(128, 3\)"),
        (lambda logits: logits.sum(), r"expected shape \(128,\), got \(\)"),
        (lambda logits: logits[:, 0] / 0, "exit 0 gave a score that is NaN or infinite"),
    ],
)
def test_confidences_that_cannot_be(confidence, message):
    with pytest.raises(ValueError, match=message):
        column_cascade(confidence=confidence).fit(X, Y)


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


@pytest.mark.parametrize("batch_size", [0, -3, 1.5])
def test_batch_sizes(batch_size):
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        column_cascade(batch_size=batch_size).fit(X, Y)


@pytest.mark.parametrize("size", [0, 1, -0.1, 1.5, 30])
def test_shares_that_cannot_be_held_out(size):
    with pytest.raises(ValueError, match=f"calibration_size must lie between 0 and 1; got {size}"):
        classifiers(calibration_size=size).fit(*IRIS)


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

FAILURES = {
    "not finite, in the last batch": lambda cascade, call: call(spoiled(np.nan), Y),
    "labels outside": lambda cascade, call: call(X, Y + 1),
    "labels missing": lambda cascade, call: call(X),
    "labels missing in a dataset": lambda cascade, call: call(TensorDataset(torch.from_numpy(X))),
    "empty": lambda cascade, call: call(X[:0], Y[:0]),
    "budget": lambda cascade, call: (cascade.set_params(budget=0.01), call(X, Y)),
    "cost": lambda cascade, call: (cascade.set_params(cost=[1]), call(X, Y)),
    "classes": lambda cascade, call: (cascade.set_params(classes=["a"]), call(X, Y)),
    "confidence": lambda cascade, call: (cascade.set_params(confidence=lambda logits: logits / 0), call(X, Y)),
    "calibrator": lambda cascade, call: (cascade.set_params(calibrator=ThresholdCalibrator("no")), call(X, Y)),
}
MODEL_FAILURES = {
    "base": lambda cascade, call: (cascade.set_params(base=3), call(X, Y)),
    "class count": lambda cascade, call: (cascade.set_params(base=nn.Linear(6, 4)), call(X, Y)),
}


def learned(cascade):
    return {name: value for name, value in vars(cascade).items() if name not in cascade.get_params(deep=False)}


def assert_untouched(cascade, failure, call):
    before = learned(cascade)
    with pytest.raises((ValueError, TypeError)):
        failure(cascade, call)
    after = learned(cascade)
    assert before.keys() == after.keys()
    assert all(after[name] is value for name, value in before.items())


@pytest.mark.parametrize("failure", [*FAILURES, *MODEL_FAILURES])
def test_a_failed_fit_changes_nothing(fitted, failure):
    answers = fitted.predict_proba(X)
    points = [vars(point).copy() for point in fitted.pareto().points]
    assert_untouched(fitted, (FAILURES | MODEL_FAILURES)[failure], fitted.fit)
    fitted.set_params(**column_cascade().get_params(deep=False) | {"base": fitted.base, "saver": fitted.saver})
    assert fitted.predict_proba(X).tolist() == answers.tolist()
    assert [vars(point) for point in fitted.pareto().points] == points


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_calibration_changes_nothing(fitted, failure):
    assert_untouched(fitted, FAILURES[failure], fitted.calibrate)


@pytest.mark.parametrize("failure", [*FAILURES, *MODEL_FAILURES])
def test_a_failed_first_fit_leaves_the_cascade_unfitted(failure):
    cascade = column_cascade()
    assert_untouched(cascade, (FAILURES | MODEL_FAILURES)[failure], cascade.fit)
    assert learned(cascade) == {}
    with pytest.raises(NotFittedError):
        cascade.predict(X)


def test_a_failed_fit_of_classifiers_changes_nothing():
    x, y = IRIS
    cascade = classifiers().fit(x, y)
    assert_untouched(cascade, lambda cascade, call: call(x[:, :2], np.full(len(y), np.nan)), cascade.fit)
    assert_untouched(cascade.set_params(cost=[1, -1]), lambda cascade, call: call(x[:, :2], y), cascade.fit)
    assert cascade.n_features_in_ == 4
