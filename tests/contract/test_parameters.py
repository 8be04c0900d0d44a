"""Parameters that no estimator takes, and that a call which fails leaves no trace."""

import copy
import re

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError

from adaptexit import CalexNetRecipe, FrozenRecipe, ThresholdCalibrator, ZTWRecipe
from tests.contract.cases import CASES, KINDS, answers_of, fitted_once, learned, quietly, random_states, some
from tests.nets import branched

pytestmark = pytest.mark.filterwarnings("ignore::adaptexit.SaverWarning")


@pytest.fixture(params=["two modules", "classifiers", "branched", "native"])
def name(request):
    """What is refused depends on the kind of estimator, and not on its heads or its calibrator."""
    return request.param


LEARNING = {
    "fit": lambda model, X, y: copy.copy(model).fit(X, y),
    "calibrate": lambda model, X, y: copy.copy(model).calibrate(X, y),
}


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
    "batch_size: 0": ({"batch_size": 0}, ValueError, "batch_size must be a whole number, at least 1; got 0"),
    "batch_size: 1.5": ({"batch_size": 1.5}, ValueError, "batch_size must be a whole number, at least 1; got 1.5"),
    "budget: low": ({"budget": 1e-4}, ValueError, "budget must be at least 0.*got 0.0001"),
    "budget: text": ({"budget": "a"}, ValueError, "budget must be a finite relative cost.*got 'a'"),
    "budget: 40": ({"budget": 40}, ValueError, r"got 40. Was 0\.4 meant\?"),
    "classes: few": ({"classes": ["a"]}, ValueError, "classes must be 10 different labels, one an output; got"),
    "classes: twice": ({"classes": list("aabcdefghi")}, ValueError, "classes must be 10 different labels"),
    "classes: text": ({"classes": "abcdefghij"}, ValueError, "classes must be 10 different labels"),
    "calibrator: text": ({"calibrator": "a"}, TypeError, r"calibrator must be a Calibrator, as Threshold.*got 'a'"),
    "calibrator: class": ({"calibrator": ThresholdCalibrator}, TypeError, "calibrator must be a Calibrator"),
    "verbose": ({"verbose": "yes"}, ValueError, "verbose must be an integer; got 'yes'"),
    "calibration_size: 0": ({"calibration_size": 0}, ValueError, "calibration_size must lie between 0 and 1; got 0"),
    "calibration_size: a": ({"calibration_size": "a"}, ValueError, "calibration_size must lie between .*got 'a'"),
    "calibration_size: auto": ({"calibration_size": "auto"}, ValueError, "calibration_size must lie between.*'auto'"),
    "calibrator: list": ({"calibrator": []}, TypeError, r"calibrator must be a Calibrator, as Threshold.*got \[\]"),
    "batch_size: True": ({"batch_size": True}, ValueError, "batch_size must be a whole number, at least 1; got True"),
    "budget: True": ({"budget": True}, ValueError, "budget must be a finite relative cost.*got True"),
    "device": ({"device": "nowhere"}, ValueError, "device must be a device of torch, as 'cuda' .*got 'nowhere'"),
    "verbose: 1.5": ({"verbose": 1.5}, ValueError, "verbose must be an integer; got 1.5"),
    "memory_limit: 1G": ({"memory_limit": "1G"}, ValueError, "memory_limit must be a whole number, at least 0"),
    "memory_limit: -1": ({"memory_limit": -1}, ValueError, r"memory_limit must be .*number of bytes\); got -1"),
}


@pytest.mark.parametrize("bad", BAD)
def test_parameters_that_cannot_be(case, model, bad):
    params, error, message = BAD[bad]
    for call in LEARNING:
        with pytest.raises(error, match=message):
            LEARNING[call](copy.copy(model).set_params(**params), *some(case))
    if bad in ("batch_size: 0", "memory_limit: -1", "budget: 40"):
        with pytest.raises(error, match=message):
            copy.copy(model).set_params(**params).predict(case.test[0])


IN_FIT = {
    "random_state: text": ({"random_state": "a"}, "random_state must be an integer, a RandomState or None; got 'a'"),
    "random_state: -1": ({"random_state": -1}, "random_state must be an integer, a RandomState or None; got -1"),
    "random_state: True": ({"random_state": True}, "random_state must be an integer, a RandomState or None; got True"),
    "random_state: Generator": ({"random_state": np.random.default_rng(0)}, "random_state must be .*got Generator"),
}


@pytest.mark.parametrize("bad", IN_FIT)
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_cannot_be_fitted_with(kind, bad):
    params, message = IN_FIT[bad]
    with pytest.raises(ValueError, match=message):
        CASES[kind].make(**params).fit(*some(CASES[kind]))


OF_EXITS = {
    "cache_half: text": ({"cache_half": "a"}, ValueError, "cache_half must be True or False; got 'a'"),
    "cache_half: list": ({"cache_half": [1]}, ValueError, r"cache_half must be True or False; got \[1\]"),
    "cache_dir": ({"cache_dir": 3}, TypeError, "cache_dir must be the path of a folder, or None; got 3"),
    "layout": ({"layout": []}, TypeError, r"layout must be a name, a dict of names by cut, or None; got \[\]"),
    "layout: name": ({"layout": "HW"}, ValueError, "layout must be one of .*got 'HW'"),
}


@pytest.mark.parametrize("bad", OF_EXITS)
def test_parameters_of_exits_that_cannot_be(bad):
    params, error, message = OF_EXITS[bad]
    with pytest.raises(error, match=message):
        CASES["branched"].make(**params).fit(*some(CASES["branched"]))


@pytest.mark.parametrize("random_state", [None, np.random.RandomState(3)], ids=["None", "RandomState"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_global_random_state_is_left_alone(kind, random_state):
    before = random_states()
    quietly(lambda: CASES[kind].make(random_state=random_state).fit(*some(CASES[kind])))
    assert random_states() == before


@pytest.mark.parametrize("kind", KINDS)
def test_integers_of_numpy_are_integers(kind):
    numbers = {"batch_size": np.int64(64), "memory_limit": np.int64(1 << 20), "verbose": np.int64(0)}
    case = CASES[kind]
    model = quietly(lambda: case.make(**numbers, random_state=np.int64(0)).fit(*some(case)))
    plain = {name: int(value) for name, value in numbers.items()}
    other = quietly(lambda: case.make(**plain).fit(*some(case)))
    assert model.outputs_.scores.tobytes() == other.outputs_.scores.tobytes()


@pytest.mark.parametrize("recipe", [FrozenRecipe, CalexNetRecipe, ZTWRecipe])
def test_integers_of_numpy_are_integers_in_recipes(recipe):
    recipe = recipe(batch_size=np.int64(64), epochs=np.int64(1))
    model = branched(exits=["one", "two"], head="auto", recipe=recipe).fit(*some(CASES["branched"]))
    assert model.exits_ == ["one", "two"]


def test_a_cache_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    branched(cache_dir="~/features").fit(*some(CASES["branched"]))
    assert [path.name for path in tmp_path.iterdir()] == ["features"]
    assert list((tmp_path / "features").iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_first_batches_of_one_sample(kind):
    case = CASES[kind]
    X, y = some(case)
    models = [quietly(lambda size=size: case.make(batch_size=size).fit(X, y)) for size in (1, 100)]
    answers = [quietly(lambda model=model: model.predict(X)) for model in models]
    assert np.mean(answers[0] == answers[1]) > 0.9


@pytest.mark.parametrize("call", ["pareto", "exit_calibration", "exit_flow", "survivor_shift", "exemplars"])
def test_labels_without_data(case, model, call):
    with pytest.raises(ValueError, match="X must be given where y is; got y alone"):
        getattr(model, call)(None, some(case)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_labels_with_gradients(kind):
    case, model = CASES[kind], fitted_once(kind)
    X, y = some(case)
    assert model.score(X, torch.from_numpy(y).double().requires_grad_()) == model.score(X, y)


@pytest.mark.parametrize("spoil", [lambda a: np.ma.masked_array(a, a == a.max()), lambda a: a.astype(complex)])
def test_masked_arrays_and_complex_numbers(case, model, spoil):
    X, y = some(case)
    message = "must be a plain array; got a masked one|Complex data not supported"
    for call in (*LEARNING.values(), model.__class__.record, model.__class__.score):
        for data in ((spoil(X), y), (X, spoil(y))):
            with pytest.raises((TypeError, ValueError), match=message):
                call(model, *data)
    with pytest.raises((TypeError, ValueError), match=message):
        model.predict(spoil(X))


def test_a_budget_in_percent_is_asked_about_before_anything_runs(case, model):
    looks = []

    def confidence(logits):
        looks.append(len(logits))
        return logits[:, 0]

    for call in LEARNING:
        with pytest.raises(ValueError, match=r"budget must be a relative cost, at most 10: .*Was 0\.4 meant\?"):
            LEARNING[call](copy.copy(model).set_params(budget=40, confidence=confidence), *some(case))
    assert looks == []


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
    params_before, answers, before = own.get_params(deep=False), answers_of(own, case.test[0][:100]), learned(own)
    params, X, y = FAILURES[failure](*some(case))
    for call in LEARNING:
        with pytest.raises((ValueError, TypeError, RuntimeError, KeyboardInterrupt)):
            getattr(own.set_params(**params), call)(X, y)
        after = learned(own)
        assert before.keys() == after.keys()
        assert all(after[name] is value for name, value in before.items())
    own.set_params(**params_before)
    assert answers_of(own, case.test[0][:100]) == answers
    unfitted = case.make().set_params(**params)
    with pytest.raises((ValueError, TypeError, RuntimeError, KeyboardInterrupt)):
        unfitted.fit(X, y)
    assert learned(unfitted) == {}
    with pytest.raises(NotFittedError):
        unfitted.predict(X)


@pytest.mark.parametrize("call", ["at", "predict", "predict_proba", "trace", "score", "record", "pareto"])
def test_a_confidence_changed_since_the_thresholds_were_found(case, own, call):
    X, y = some(case)
    asked = {
        "at": lambda: own.at(budget=1.0), "predict": lambda: own.predict(X), "trace": lambda: own.trace(X),
        "predict_proba": lambda: own.predict_proba(X), "score": lambda: own.score(X, y),
        "record": lambda: own.record(X, y), "pareto": lambda: own.pareto(X, y),
    }  # fmt: skip
    asked[call]()
    own.set_params(confidence="entropy")
    with pytest.raises(ValueError, match=r"confidence was .* thresholds were found; got 'entropy' since"):
        asked[call]()
    quietly(lambda: own.calibrate(*case.val))
    asked[call]()
