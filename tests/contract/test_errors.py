"""What every estimator refuses or warns of, in the same words, and that a failure leaves no trace."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.exceptions import NotFittedError
from torch.utils.data import TensorDataset

from adaptexit import CascadeSaver, InputWarning, LabelWarning, ThresholdCalibrator
from tests.contract.cases import CASES, IMAGES, KINDS, answers_of, fitted_once, learned, quietly
from tests.nets import branched, branched_trained, digits, loader_of

pytestmark = pytest.mark.filterwarnings("ignore::adaptexit.SaverWarning")


@pytest.fixture(params=KINDS)
def name(request):
    """What is refused depends on the kind of estimator, and not on its heads or its calibrator."""
    return request.param


on_images = pytest.mark.parametrize("name", IMAGES, indirect=True)
"""For what scikit-learn says in its own words where inputs are tables."""


def some(case):
    """Inputs and labels, few enough to be quick and for every class to be held out."""
    X, y = case.train
    return X[:200].copy(), y[:200].copy()


# -- order of calls ---------------------------------------------------------------------------------------------------

CALLS = {
    "at": lambda model, X, y: model.at(budget=0.5),
    "predict": lambda model, X, y: model.predict(X),
    "predict_proba": lambda model, X, y: model.predict_proba(X),
    "trace": lambda model, X, y: model.trace(X),
    "predict_anytime": lambda model, X, y: model.predict_anytime(X, 1.0),
    "score": lambda model, X, y: model.score(X, y),
    "calibrate": lambda model, X, y: model.calibrate(X, y),
    "pareto": lambda model, X, y: model.pareto(),
    "pareto on data": lambda model, X, y: model.pareto(X, y),
    "record": lambda model, X, y: model.record(X, y),
    "operating_point": lambda model, X, y: model.operating_point(),
    "latencies": lambda model, X, y: model.latencies(X),
    "exit_names": lambda model, X, y: model.exit_names,
    "stages_": lambda model, X, y: model.stages_,
    "heads_": lambda model, X, y: model.heads_,
    "save": lambda model, X, y: model.save("never-written"),
}


def test_before_fit(case):
    unfitted = case.make()
    for call in CALLS.values():
        with pytest.raises(NotFittedError, match=f"{type(unfitted).__name__} instance is not fitted yet"):
            call(unfitted, *some(case))


# -- data -------------------------------------------------------------------------------------------------------------

LEARNING = {
    "fit": lambda model, X, y: copy.copy(model).fit(X, y),
    "calibrate": lambda model, X, y: copy.copy(model).calibrate(X, y),
}
ANSWERING = {call: CALLS[call] for call in ("predict", "predict_proba", "trace", "predict_anytime")}
RECORDING = {call: CALLS[call] for call in ("score", "record", "pareto on data")}
READING = LEARNING | ANSWERING | RECORDING


@pytest.mark.parametrize("call", READING)
def test_data_that_are_not_finite(case, model, call):
    X, y = some(case)
    for bad in (np.nan, -np.inf):
        X.reshape(len(X), -1)[-1, 20] = bad
        with pytest.raises(
            ValueError, match=r"X must be finite; it contains NaN or inf|Input X contains (NaN|infinity)"
        ):
            READING[call](model, X, y)


@pytest.mark.parametrize("call", READING)
def test_no_samples(case, model, call):
    X, y = some(case)
    with pytest.raises(ValueError, match=r"X holds no samples; give at least one|Found array with 0 sample"):
        READING[call](model, X[:0], y[:0])


PICTURE = Image.fromarray(np.zeros((8, 8), dtype=np.uint8))
NO_DATA = {
    "path": ("images/", r"got the path 'images/'\. For a folder of images give torchvision\.datasets\.ImageFolder"),
    "Path": (Path("images"), r"got the path .*ImageFolder"),
    "picture": (PICTURE, "got PIL images.*Turn them into tensors: give the data set transform="),
    "pictures": ([PICTURE] * 3, "got PIL images.*Turn them into tensors"),
    "dict": ({"x": np.zeros((3, 4))}, "X must be an array or tensor|X must be a numeric array"),
    "texts": (np.array([["a"]]), "X must be a numeric array"),
    "ragged": ([[1.0, 2.0], [3.0]], "got entries of different shapes"),
}


@on_images
@pytest.mark.parametrize("kind", NO_DATA)
def test_things_that_are_no_data(model, kind):
    given, message = NO_DATA[kind]
    for call in READING.values():
        with pytest.raises(TypeError, match=message):
            call(model, given, np.zeros(1, dtype=int))


unsaid = pytest.mark.xfail(strict=True, reason="a table is looked at by scikit-learn before its source is")


@pytest.mark.parametrize("kind", ["path", "Path", "picture", "pictures"])
@pytest.mark.parametrize("call", [pytest.param(call, marks=() if call in LEARNING else unsaid) for call in READING])
@pytest.mark.parametrize("table", ["classifiers", "perceptron"])
def test_things_that_are_no_table(table, call, kind):
    if call in ("record", "pareto on data"):
        pytest.xfail("one of two ways looks at the source first")
    given, message = NO_DATA[kind]
    with pytest.raises(TypeError, match=message):
        READING[call](fitted_once(table), given, np.zeros(1, dtype=int))


@pytest.mark.parametrize("call", ANSWERING)
def test_a_pair_where_inputs_are_meant(case, model, call):
    with pytest.raises(ValueError, match=r"X must be inputs alone here; got a pair, which looks like \(X, y\)"):
        ANSWERING[call](model, some(case), None)


@pytest.mark.parametrize("call", READING.keys() - {"fit"})
def test_one_input_alone(case, model, call):
    X, y = some(case)
    with pytest.raises(
        ValueError, match=r"looks like one input alone.*for the samples: X\[None|Expected 2D array, got 1D"
    ):
        READING[call](model, X[0], y[:1])


unchecked = pytest.mark.xfail(strict=True, reason="the first batch is run before it is looked at")


@on_images
@pytest.mark.parametrize(
    ("call", "source"),
    [
        *((call, source) for call in (*ANSWERING, "record") for source in ("array", "loader")),
        ("calibrate", "array"),
        pytest.param("calibrate", "loader", marks=unchecked),
        pytest.param("latencies", "array", marks=unchecked),
    ],
)
def test_inputs_of_other_channels_or_axes(case, model, call, source):
    X, y = some(case)
    for other, message in (
        (X.repeat(3, axis=1), r"X must have the shape \(N, 1, 8, 8\) of the inputs of fit; got .* 3 channels instead"),
        (X.transpose(0, 2, 3, 1), r"got .*, 8, 8, 1\): 8 channels instead of 1"),
        (X[:, 0], r"got .*, 8, 8\): other axes. Convert the inputs"),
        (X.reshape(len(X), -1), r"got .*, 64\): other axes"),
    ):
        given = (other, y) if source == "array" else (loader_of(other, y), None)
        with pytest.raises(ValueError, match=message):
            (LEARNING | CALLS)[call](model, *given)


@pytest.mark.parametrize("table", ["classifiers", "perceptron"])
def test_tables_of_another_width(table):
    model, (X, y) = fitted_once(table), some(CASES[table])
    for call in (*ANSWERING.values(), *RECORDING.values(), LEARNING["calibrate"]):
        with pytest.raises(ValueError, match=f"X has 63 features, but {type(model).__name__} is expecting 64 features"):
            call(model, X[:, 1:], y)


POOLED = {
    "cascade": lambda: CascadeSaver(branched_trained(), branched_trained(), cost=[1, 2]),
    "branched": branched,
    "native": CASES["native"].make,
}


@pytest.mark.parametrize("kind", POOLED)
def test_images_of_another_size_are_warned_of_where_the_model_takes_them(kind):
    (X, y), (x_val, y_val) = digits()[:2]
    model = quietly(lambda: POOLED[kind]().fit(X, y).calibrate(x_val, y_val))
    larger = x_val[:50].repeat(2, axis=2)
    for call in (*ANSWERING.values(), *RECORDING.values()):
        with pytest.warns(InputWarning, match=r"have shape \(1, 16, 8\), those of fit had \(1, 8, 8\)") as warned:
            call(model, larger, y_val[:50])
        assert {warning.filename for warning in warned} == {__file__}
    with pytest.warns(InputWarning):
        model.calibrate(x_val.repeat(2, axis=2), y_val)  # from here on that is the size of the inputs
    model.predict(larger)
    with pytest.warns(InputWarning, match=r"have shape \(1, 8, 8\), those of fit had \(1, 16, 8\)"):
        model.predict(x_val)


@on_images
@pytest.mark.parametrize("call", [*LEARNING, *ANSWERING, "record"])
def test_whole_numbers_as_images_name_the_model_and_the_mend(case, model, call):
    X, y = some(case)
    message = r"X must hold floats for \S+, a (Sequential|NativeNet) without preprocessing; got images of torch.uint8"
    with pytest.raises(TypeError, match=message + r"\. Scale them"):
        READING[call](model, (X * 255).astype(np.uint8), y)


# -- labels -----------------------------------------------------------------------------------------------------------


@on_images
@pytest.mark.parametrize("call", ["fit", "calibrate", "record", "pareto on data"])
def test_labels_outside_the_classes(case, model, call):
    X, y = some(case)
    for wrong, shown in (
        (y + 1, "[10]"),
        (y - 1, "[-1]"),
        (np.where(y == 0, np.nan, y), "[nan]"),
        (np.where(y == 3, 0.5, y), "[0.5]"),
        (np.array(list("abcdefghij"))[y], "[a, b, ..., j]"),
    ):
        message = (
            f"y must hold labels among the 10 classes [0, 1, ..., 9]; got {shown}. Give the labels in the order of"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            READING[call](model, X, wrong)
    named = copy.copy(model).set_params(classes=list("abcdefghij"))
    if call in LEARNING:
        with pytest.raises(
            ValueError, match=r"\[a, b, .*j\], or their positions 0 \.\.\. 9; got positions from 1 to 10"
        ):
            READING[call](named, X, y + 1)


@pytest.mark.parametrize("call", [*LEARNING, "record", "pareto on data"])
def test_labels_of_another_shape(case, model, call):
    X, y = some(case)
    for wrong in (y[:-1], np.append(y, 0), np.eye(10)[y]):
        with pytest.raises(ValueError, match=r"y must have shape \(200,\)|inconsistent numbers|y should be a 1d array"):
            READING[call](model, X, wrong)
    if not (case.table and call == "fit"):
        with pytest.raises(ValueError, match=r"y must be one label a sample; got shape \(200, 10\)"):
            READING[call](model, loader_of(X, np.eye(10)[y]), None)


@pytest.mark.parametrize("call", [*LEARNING, *RECORDING])
def test_labels_given_twice(case, model, call):
    X, y = some(case)
    with pytest.raises(
        ValueError, match=r"y is taken from X where X is a DataLoader|X must be an array where .*fitted"
    ):
        READING[call](model, loader_of(X, y), y)


@pytest.mark.parametrize("call", [*LEARNING, *RECORDING])
def test_labels_that_are_missing(case, model, call):
    X, _ = some(case)
    if call in LEARNING and not case.cascade:
        return  # the full model's answers take their place
    with pytest.raises(ValueError, match=r"give y, a pair \(X, y\), or a Dataset or DataLoader"):
        READING[call](model, X, None)
    if not (case.table and call == "fit"):
        with pytest.raises(ValueError, match=r"must give \(x, y\) pairs here; it gave x alone"):
            READING[call](model, TensorDataset(torch.from_numpy(X)), None)


def test_labels_in_another_order_than_the_logits_are_remarked_on(case, own):
    X, y = case.val
    message = rf"the {own.exit_names[-1]} is right on .*% of the calibration data, no more than the commonest label"
    with pytest.warns(LabelWarning, match=message) as warned:
        own.calibrate(X, (y + 1) % 10)
    assert {warning.filename for warning in warned} == {__file__}


# -- budgets ----------------------------------------------------------------------------------------------------------

AT_A_BUDGET = {
    "at": lambda model, X, y, **at: model.at(**at),
    "predict": lambda model, X, y, **at: model.predict(X, **at),
    "predict_proba": lambda model, X, y, **at: model.predict_proba(X, **at),
    "trace": lambda model, X, y, **at: model.trace(X, **at),
    "score": lambda model, X, y, **at: model.score(X, y, **at),
    "operating_point": lambda model, X, y, **at: model.operating_point(**at),
}


@pytest.mark.parametrize("call", AT_A_BUDGET)
def test_budgets_that_cannot_be(case, model, call):
    X, y = some(case)
    cheapest = model.pareto().cost.min()
    for at, message in (
        ({"budget": cheapest / 2}, f"budget must be at least {cheapest:.4g}, .*cheapest.*got {cheapest / 2:.4g}"),
        ({"budget": 40}, r"budget must be a relative cost.*got 40. Was 0\.4 meant\?"),
        ({"budget": float("nan")}, "budget must be a finite relative cost"),
        ({"budget": "0.3"}, "budget must be a finite relative cost.*got '0.3'"),
        ({"budget": [0.5, 0.6]}, "budget must be a finite relative cost"),
        ({"max_drop": -0.1}, "max_drop must be a share of accuracy, at least 0"),
        ({"max_drop": "1%"}, "max_drop must be a share of accuracy"),
        (
            {"budget": 0.5, "max_drop": 0.01},
            "give at most one of budget, max_drop and point; got budget=0.5, max_drop=",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            AT_A_BUDGET[call](model, X, y, **at)
    for limit in (float("nan"), float("inf"), None, "0.4", [0.4, 0.5]):
        with pytest.raises(ValueError, match="limit must be a finite relative cost"):
            model.predict_anytime(X, limit)


# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", LEARNING)
def test_costs_that_cannot_be(case, model, call):
    X, y = some(case)
    n_exits = len(model.exit_names)
    message = f"cost must be {n_exits} positive numbers, what a sample costs that each exit answers alone"
    rising = list(range(1, n_exits + 2))
    for cost in (
        rising[:-2],
        rising,
        [0, *rising[:-2]],
        [*rising[:-2], np.inf],
        [np.nan] * n_exits,
        ["a"] * n_exits,
        5,
    ):
        with pytest.raises(ValueError, match=re.escape(f"{message} ({', '.join(model.exit_names)}); got {cost!r}")):
            LEARNING[call](copy.copy(model).set_params(cost=cost), X, y)
    with pytest.raises(ValueError, match=r"cost must be 'auto', 'macs', 'latency' or a sequence.*got 'flops'"):
        LEARNING[call](copy.copy(model).set_params(cost="flops"), X, y)


BAD = {
    "confidence: text": ({"confidence": "sure"}, ValueError, "confidence must be one of .*got 'sure'"),
    "confidence: number": ({"confidence": 3}, ValueError, "confidence must be one of .* or a callable.*got 3"),
    "confidence: shape": ({"confidence": lambda logits: logits}, ValueError, "confidence must turn an output of B"),
    "confidence: sum": ({"confidence": lambda logits: logits.sum()}, ValueError, r"expected shape \(\d+,\), got \(\)"),
    "confidence: nan": ({"confidence": lambda logits: logits[:, 0] / 0}, ValueError, "exit 0 gave a score that is NaN"),
    "calibrator: score": ({"calibrator": ThresholdCalibrator("sure")}, ValueError, "score must be one of"),
    "calibrator: search": ({"calibrator": ThresholdCalibrator(search="no")}, ValueError, "search must be one of"),
    "batch_size: 0": ({"batch_size": 0}, ValueError, "batch_size must be a positive integer; got 0"),
    "batch_size: 1.5": ({"batch_size": 1.5}, ValueError, "batch_size must be a positive integer; got 1.5"),
    "budget: low": ({"budget": 1e-4}, ValueError, "budget must be at least 0.*got 0.0001"),
    "budget: text": ({"budget": "a"}, ValueError, "budget must be a finite relative cost.*got 'a'"),
    "budget: 40": ({"budget": 40}, ValueError, r"got 40. Was 0\.4 meant\?"),
    "classes: few": ({"classes": ["a"]}, ValueError, "classes must be 10 different labels, one an output; got"),
    "classes: twice": ({"classes": list("aabcdefghi")}, ValueError, "classes must be 10 different labels"),
    "classes: text": ({"classes": "abcdefghij"}, ValueError, "classes must be 10 different labels"),
}
BAD_IN_FIT = {
    "calibrator: text": ({"calibrator": "a"}, TypeError, r"calibrator must be a Calibrator, as Threshold.*got 'a'"),
    "calibrator: class": ({"calibrator": ThresholdCalibrator}, TypeError, "calibrator must be a Calibrator"),
    "verbose": ({"verbose": "yes"}, ValueError, "verbose must be an integer; got 'yes'"),
    "calibration_size: 0": ({"calibration_size": 0}, ValueError, "calibration_size must lie between 0 and 1; got 0"),
    "calibration_size: a": ({"calibration_size": "a"}, ValueError, "calibration_size must lie between .*got 'a'"),
    "memory_limit: 1G": ({"memory_limit": "1G"}, ValueError, "memory_limit must be a whole number, at least 0"),
    "memory_limit: -1": ({"memory_limit": -1}, ValueError, r"memory_limit must be .*number of bytes\); got -1"),
}


@pytest.mark.parametrize("bad", [*BAD, *BAD_IN_FIT])
def test_parameters_that_cannot_be(case, model, bad):
    params, error, message = (BAD | BAD_IN_FIT)[bad]
    for call in LEARNING if bad in BAD else ["fit"]:
        with pytest.raises(error, match=message):
            LEARNING[call](copy.copy(model).set_params(**params), *some(case))
    if bad in ("batch_size: 0", "memory_limit: -1", "budget: 40"):
        with pytest.raises(error, match=message):
            copy.copy(model).set_params(**params).predict(case.test[0])


# -- a failed call leaves the estimator as it was ---------------------------------------------------------------------


def interrupted(logits):
    raise KeyboardInterrupt


def half_spoiled(X):
    """The inputs with NaN in the last batch."""
    X = X.copy()
    X.reshape(len(X), -1)[-1, 20] = np.nan
    return X


FAILURES = {
    "not finite": lambda X, y: ({"batch_size": 50}, half_spoiled(X), y),
    "labels outside": lambda X, y: ({}, X, np.where(y == 3, np.nan, y)),
    "empty": lambda X, y: ({}, X[:0], y[:0]),
    "other axes": lambda X, y: ({}, X[..., None], y),
    "budget": lambda X, y: ({"budget": 1e-4}, X, y),
    "cost": lambda X, y: ({"cost": [1]}, X, y),
    "classes": lambda X, y: ({"classes": ["a"]}, X, y),
    "confidence": lambda X, y: ({"confidence": lambda logits: logits / 0}, X, y),
    "calibrator": lambda X, y: ({"calibrator": ThresholdCalibrator("no")}, X, y),
    "interrupted": lambda X, y: ({"confidence": interrupted}, X, y),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_call_changes_nothing(case, own, failure):
    given, answers, before = own.get_params(deep=False), answers_of(own, case.test[0][:100]), learned(own)
    params, X, y = FAILURES[failure](*some(case))
    for call in LEARNING:
        with pytest.raises((ValueError, TypeError, RuntimeError, KeyboardInterrupt)):
            getattr(own.set_params(**params), call)(X, y)
        after = learned(own)
        assert before.keys() == after.keys()
        assert all(after[name] is value for name, value in before.items())
    own.set_params(**given)
    assert answers_of(own, case.test[0][:100]) == answers
    unfitted = case.make().set_params(**params)
    with pytest.raises((ValueError, TypeError, RuntimeError, KeyboardInterrupt)):
        unfitted.fit(X, y)
    assert learned(unfitted) == {}
    with pytest.raises(NotFittedError):
        unfitted.predict(X)
