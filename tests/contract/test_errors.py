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

from adaptexit import CascadeSaver, InputWarning, LabelWarning
from tests.contract.cases import CASES, IMAGES, KINDS, fitted_once, quietly, some
from tests.nets import branched, branched_trained, digits, loader_of

pytestmark = pytest.mark.filterwarnings("ignore::adaptexit.SaverWarning")


@pytest.fixture(params=KINDS)
def name(request):
    """What is refused depends on the kind of estimator, and not on its heads or its calibrator."""
    return request.param


on_images = pytest.mark.parametrize("name", IMAGES, indirect=True)
"""For what scikit-learn says in its own words where inputs are tables."""


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
    thing, message = NO_DATA[kind]
    for call in READING.values():
        with pytest.raises(TypeError, match=message):
            call(model, thing, np.zeros(1, dtype=int))


@pytest.mark.parametrize("kind", ["path", "Path", "picture", "pictures"])
@pytest.mark.parametrize("call", READING)
@pytest.mark.parametrize("table", ["classifiers", "perceptron"])
def test_things_that_are_no_table(table, call, kind):
    thing, message = NO_DATA[kind]
    with pytest.raises(TypeError, match=message):
        READING[call](fitted_once(table), thing, np.zeros(1, dtype=int))


@pytest.mark.parametrize("call", ANSWERING)
def test_a_pair_where_inputs_are_meant(case, model, call):
    with pytest.raises(ValueError, match=r"X must be inputs alone here; got a pair, which looks like \(X, y\)"):
        ANSWERING[call](model, some(case), None)


@pytest.mark.parametrize("call", [call for call in READING if call != "fit"])
def test_one_input_alone(case, model, call):
    X, y = some(case)
    with pytest.raises(
        ValueError, match=r"looks like one input alone.*for the samples: X\[None|Expected 2D array, got 1D"
    ):
        READING[call](model, X[0], y[:1])


@on_images
@pytest.mark.parametrize(
    ("call", "source"),
    [
        *((call, source) for call in (*ANSWERING, "record") for source in ("array", "loader")),
        ("calibrate", "array"),
        ("calibrate", "loader"),
        ("latencies", "array"),
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
        data = (other, y) if source == "array" else (loader_of(other, y), None)
        with pytest.raises(ValueError, match=message):
            (LEARNING | CALLS)[call](model, *data)


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
    for wrong, excerpt in (
        (y + 1, "[10]"),
        (y - 1, "[-1]"),
        (np.where(y == 0, np.nan, y), "[nan]"),
        (np.where(y == 3, 0.5, y), "[0.5]"),
        (np.array(list("abcdefghij"))[y], "[a, b, ..., j]"),
    ):
        message = (
            f"y must hold labels among the 10 classes [0, 1, ..., 9]; got {excerpt}. Give the labels in the order of"
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
    message = "hardly better than guessing on the .* calibration samples: .*the full model is right on .*% of them"
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
    with pytest.raises(ValueError, match=r"limit must be a relative cost, at most .*got 40. Was 0\.4 meant\?"):
        model.predict_anytime(X, 40)
