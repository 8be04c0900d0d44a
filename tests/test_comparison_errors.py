import re

import numpy as np
import pytest
from sklearn.base import clone

from adaptexit import CascadeSaver, CPMCalibrator, EMRouter, ExitOutputs, ThresholdCalibrator
from adaptexit.comparison import compare
from tests.test_comparison import CALIBRATION, TEST, Watched, drawn, methods, recorded


def test_outputs_that_are_none():
    with pytest.raises(TypeError, match="outputs must be ExitOutputs; got list"):
        compare([], {})
    with pytest.raises(TypeError, match="test must be ExitOutputs, or None to report on outputs; got tuple"):
        compare(CALIBRATION, {}, test=())
    with pytest.raises(TypeError, match="training must be ExitOutputs, or None to learn from outputs alone; got list"):
        compare(CALIBRATION, {}, training=[])


@pytest.mark.parametrize("argument", ["test", "training"])
@pytest.mark.parametrize(("shape", "numbers"), [({"n_exits": 2}, "2 and 4"), ({"n_classes": 5}, "3 and 5")])
def test_outputs_of_other_exits_or_classes(argument, shape, numbers):
    message = f"{argument} must have the exits and classes of outputs, 3 and 4; got {numbers}. Record both"
    with pytest.raises(ValueError, match=message):
        compare(CALIBRATION, {}, **{argument: drawn(1, **shape)})


@pytest.mark.parametrize(
    ("methods", "error", "message"),
    [
        ([recorded()], TypeError, r"methods must be a dict of names to calibrators, as .*; got list"),
        ({1: recorded()}, TypeError, r"methods must be a dict of names.*; got the key 1"),
        ({"mine": ThresholdCalibrator}, TypeError, r"methods\['mine'\] is the class ThresholdCalibrator: call it"),
        (
            {"mine": CascadeSaver(None, None)},
            TypeError,
            r"methods\['mine'\] is CascadeSaver. Of a fitted",
        ),
        ({"oracle": recorded()}, ValueError, r"called as a simple rule, which 'oracle' is; choose another name"),
        ({"exit 0 alone": recorded()}, ValueError, r"called as a simple rule, which 'exit 0 alone' is"),
    ],
)
def test_methods_that_are_none(methods, error, message):
    with pytest.raises(error, match=message):
        compare(CALIBRATION, methods)


def test_logits_that_are_missing():
    without = drawn(0, keep_logits=False)
    needing = ThresholdCalibrator("entropy", n_points=4)
    message = r"{} must have logits for methods\['mine'\]; they have none. Record them \(keep_logits=True\)"
    with pytest.raises(ValueError, match=message.format("outputs")):
        compare(without, {"mine": needing}, test=TEST)
    with pytest.raises(ValueError, match=message.format("test")):
        compare(CALIBRATION, {"mine": needing}, test=without)
    fitted = clone(needing).fit(CALIBRATION)
    with pytest.raises(ValueError, match=message.format("outputs")):
        compare(without, {"mine": fitted})
    assert "mine" in compare(without, {"mine": fitted}, test=TEST).frontiers


def with_features(outputs, widths=(5, 6, 7)):
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(outputs.n_samples, width)) for width in widths]
    return ExitOutputs(
        predictions=outputs.predictions, scores=outputs.scores, labels=outputs.labels, n_classes=outputs.n_classes,
        stage_costs=outputs.stage_costs, exit_costs=outputs.exit_costs, logits=outputs.logits, features=features,
    )  # fmt: skip


def router(inputs="auto"):
    return EMRouter(prior="global", inputs=inputs, epochs=1, n_points=4)


READING = with_features(CALIBRATION)


@pytest.mark.parametrize(
    ("outputs", "others", "inputs", "argument"),
    [
        (CALIBRATION, {}, "features", "outputs"),
        (with_features(CALIBRATION, (5, 0, 7)), {}, "features", "outputs"),
        (READING, {"training": CALIBRATION}, "features", "training"),
        (READING, {"test": TEST}, "features", "test"),
        (READING, {"test": TEST}, "auto", "test"),
        (READING, {"test": TEST, "training": READING}, "auto", "test"),
    ],
)
def test_features_that_are_missing_are_refused_before_anything_is_fitted(outputs, others, inputs, argument):
    Watched.calls.clear()
    amount = "not all" if argument == "outputs" and outputs.features else "none"
    message = (
        rf"{argument} must have features of every early exit for methods\['mine'\]; they have {amount}. Record them"
    )
    with pytest.raises(ValueError, match=message):
        compare(outputs, {"watched": Watched(n_points=4), "mine": router(inputs)}, **others)
    assert Watched.calls == []


def test_features_that_are_not_read_may_be_missing():
    for outputs, others, inputs in (
        (CALIBRATION, {"test": TEST}, "auto"),
        (CALIBRATION, {"test": with_features(TEST)}, "auto"),
        (READING, {"training": CALIBRATION, "test": TEST}, "auto"),
        (READING, {"test": TEST}, "logits"),
        (READING, {"training": CALIBRATION, "test": with_features(TEST, (5, 6, 0))}, "auto"),
        (with_features(CALIBRATION, (5, 6, 0)), {"test": with_features(TEST, (5, 6, 0))}, "features"),
    ):
        assert list(compare(outputs, {"mine": router(inputs)}, **others).frontiers) == ["mine"]


def test_a_fitted_method_that_reads_features():
    fitted = router().fit(READING)
    message = r"{} must have features of every early exit for methods\['mine'\]; they have none. Record them \(an esti"
    with pytest.raises(ValueError, match=message.format("outputs")):
        compare(CALIBRATION, {"mine": fitted})
    with pytest.raises(ValueError, match=message.format("test")):
        compare(CALIBRATION, {"mine": fitted}, test=TEST)
    assert "mine" in compare(CALIBRATION, {"mine": fitted}, test=with_features(TEST)).frontiers


def test_logits_of_the_training_data_that_are_missing():
    Watched.calls.clear()
    with pytest.raises(ValueError, match=r"training must have logits for methods\['mine'\]; they have none"):
        compare(CALIBRATION, {"watched": Watched(n_points=4), "mine": router()}, training=drawn(0, keep_logits=False))
    assert Watched.calls == []
    without = drawn(0, keep_logits=False)
    assert (
        "mine" in compare(CALIBRATION, {"mine": ThresholdCalibrator("entropy", n_points=4)}, training=without).frontiers
    )


@pytest.mark.parametrize(
    ("fit", "numbers"),
    [
        (lambda: recorded().fit(drawn(0, n_exits=2)), "2 exits"),
        (lambda: CPMCalibrator(margins=[0.1]).fit(drawn(0, n_classes=3)), "3 exits and 3 classes"),
    ],
)
def test_methods_that_were_fitted_on_other_exits(fit, numbers):
    with pytest.raises(
        ValueError,
        match=rf"on the 3 exits and 4 classes of outputs, .*; methods\['mine'\] was on {numbers}. Give clone",
    ):
        compare(CALIBRATION, {"mine": fit()})


@pytest.mark.parametrize("names", ["abc", ["a", "b"], ["a", "b", "a"], list("abcd")])
def test_names_that_are_not_one_an_exit(names):
    with pytest.raises(ValueError, match=re.escape(f"exit_names must be 3 distinct names, one an exit; got {names!r}")):
        compare(CALIBRATION, {}, exit_names=names)


@pytest.mark.parametrize("budget", ["cheap", np.nan])
def test_a_budget_that_is_no_number(budget):
    own = compare(CALIBRATION, methods(), test=TEST)
    for ask in (own.at, own.to_frame):
        with pytest.raises(ValueError, match="budget must be a finite relative cost"):
            ask(budget)
