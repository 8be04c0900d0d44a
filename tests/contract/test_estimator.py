"""Every estimator is a scikit-learn estimator, shows what it is made of, and leaves what is not its own as it was."""

import copy
import inspect
import io
import re
from contextlib import redirect_stderr, redirect_stdout
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from adaptexit import CascadeSaver, MultiExitClassifier, ThresholdCalibrator
from adaptexit.staging.cost import measure_latency
from tests.contract.cases import (
    CASES,
    IMAGES,
    KINDS,
    LEARNED,
    assert_as_before,
    fitted_once,
    in_turn,
    learned,
    quietly,
    random_states,
    snapshot,
)
from tests.nets import loader_of

pytestmark = pytest.mark.filterwarnings("ignore::adaptexit.SaverWarning")


def modules_of(estimator):
    """The modules that a user gave."""
    entries = [estimator.get_params(deep=False).get(name) for name in ("base", "saver", "backbone")]
    flat = [part for entry in entries for part in (entry if isinstance(entry, list) else [entry])]
    return [part for part in flat if isinstance(part, nn.Module)]


# -- parameters -------------------------------------------------------------------------------------------------------


def test_parameters_are_stored_as_they_were_given(case):
    unfitted = case.make()
    assert learned(unfitted) == {}
    for name in inspect.signature(type(unfitted).__init__).parameters.keys() - {"self"}:
        value = object()
        assert unfitted.set_params(**{name: value}) is unfitted
        assert getattr(unfitted, name) is unfitted.get_params(deep=False)[name] is value
    with pytest.raises(ValueError, match="Invalid parameter 'backbones'"):
        unfitted.set_params(backbones=1)


def test_parameters_of_the_calibrator_are_nested(model):
    other = clone(model).set_params(calibrator=ThresholdCalibrator(), calibrator__max_drop=0.1)
    assert other.calibrator.max_drop == other.get_params()["calibrator__max_drop"] == 0.1


def test_a_clone_is_unfitted_and_shares_no_parameter_that_learns(case, model):
    other = clone(model)
    assert learned(other) == {}
    assert other.get_params(deep=False).keys() == model.get_params(deep=False).keys()
    for theirs, ours in zip(modules_of(other), modules_of(model), strict=True):
        assert theirs is not ours
        assert theirs.state_dict().keys() == ours.state_dict().keys()
    if model.calibrator is not None:
        assert other.calibrator is not model.calibrator
        assert not hasattr(model.calibrator, "frontier_")


def test_defaults_that_both_estimators_have_are_the_same():
    cascade, branched = (
        {name: p.default for name, p in inspect.signature(kind.__init__).parameters.items()}
        for kind in (CascadeSaver, MultiExitClassifier)
    )
    both = (cascade.keys() & branched.keys()) - {"self"}
    assert both >= {"calibrator", "confidence", "cost", "budget", "classes", "calibration_size", "batch_size"}
    assert {name: cascade[name] for name in both} == {name: branched[name] for name in both}
    assert cascade["cost"] == "auto"


def test_costs_are_counted_where_they_can_be(case, model):
    countable = not (case.table and case.cascade)
    assert model.cost_unit_ == ("MACs" if countable else "given")
    counted = {"cost": "macs"} if countable else {"cost": [1, 10]}
    other = quietly(lambda: copy.copy(model).set_params(**counted).calibrate(*case.val))
    assert other.outputs_.stage_costs.tolist() == model.outputs_.stage_costs.tolist()
    assert other.outputs_.exit_costs.tolist() == model.outputs_.exit_costs.tolist()


@pytest.mark.parametrize("name", [*KINDS, "EENet", "boostnet"], indirect=True)
def test_given_costs_are_what_each_exit_costs_alone(case, own):
    n_exits = len(own.exit_names)
    alone = 10.0 ** np.arange(1, n_exits + 1)
    for cost in (alone.tolist(), tuple(alone), alone):
        own.set_params(cost=cost, calibrator=ThresholdCalibrator(search="geometric"))
        quietly(lambda: own.calibrate(*case.val))
        assert own.cost_unit_ == "given"
        assert own.outputs_.alone_costs().tolist() == alone.tolist()
        trace = own.trace(case.test[0])
        assert trace.full_cost == alone[-1]
        on = own.operating_point().on
        passed = np.cumsum(np.where(on, alone, 0)) if case.cascade else alone
        assert trace.costs.tolist() == passed[trace.exits].tolist()


@pytest.mark.parametrize("name", KINDS, indirect=True)
def test_costs_that_are_measured(case, own, monkeypatch):
    monkeypatch.setattr("adaptexit.networks.base.measure_latency", partial(measure_latency, min_seconds=0.002))
    own.set_params(cost="latency", calibrator=ThresholdCalibrator(search="geometric"))
    quietly(lambda: own.calibrate(*case.val))
    assert own.cost_unit_ == "seconds"
    assert 0 < own.outputs_.full_cost < 0.1
    assert (own.outputs_.alone_costs() > 0).all()


# -- what it is made of -----------------------------------------------------------------------------------------------


def test_stages_and_heads_are_made_once(case, own):
    n_exits = len(own.exit_names)
    stages, heads = own.stages_, own.heads_
    for part in (stages, heads):
        assert isinstance(part, nn.ModuleList)
        assert len(part) == n_exits
    own.predict(case.test[0])
    quietly(lambda: own.calibrate(*case.val))
    assert own.stages_ is stages
    assert own.heads_ is heads
    assert own.outputs_.n_exits == n_exits


def test_their_parameters_are_the_users(case, model):
    modules = modules_of(model)
    made_of = {id(p) for part in (*model.stages_, *model.heads_) for p in part.parameters()}
    assert {id(p) for module in modules for p in module.parameters()} <= made_of
    if case.cascade and modules:
        assert set(model.heads_) == set(modules)
        assert model.heads_[-1] is model.base


@pytest.mark.parametrize("kind", ["two modules", "three modules", "native"])
def test_stages_and_heads_answer_by_hand_as_the_estimator(kind):
    case, model = CASES[kind], fitted_once(kind)
    X, y = case.test[0][:40], case.test[1][:40]
    expected, x = model.record(X, y).predictions, torch.from_numpy(X)
    with torch.inference_mode():
        for k, (stage, head) in enumerate(zip(model.stages_, model.heads_, strict=True)):
            x = stage(x)
            assert head(x).argmax(1).tolist() == expected[k].tolist()


@pytest.mark.parametrize("name", KINDS, indirect=True)
def test_latencies(case, model, monkeypatch):
    monkeypatch.setattr("adaptexit.networks.base.measure_latency", partial(measure_latency, min_seconds=0.002))
    measured = model.latencies(case.test[0], batch_sizes=(1, 40))
    shape = (len(model.exit_names), 2)
    assert measured.stage_s.shape == measured.exit_s.shape == shape
    total = measured.stage_s + measured.exit_s
    assert (total > 0).all()
    frame = measured.to_frame()
    assert list(frame.columns) == ["exit", "batch_size", "stage_s", "exit_s"]
    assert frame["exit"].tolist() == [name for name in model.exit_names for _ in range(2)]
    assert frame["stage_s"].tolist() == measured.stage_s.reshape(-1).tolist()
    for wrong in ((0, 1), [], 3, [1.5]):
        with pytest.raises(ValueError, match="batch_sizes must be positive integers; got"):
            model.latencies(case.test[0], batch_sizes=wrong)


def largest(logits):
    return logits.softmax(1).amax(1)


def test_it_is_shown_in_few_words(case, model):
    unfitted, fitted = repr(case.make()), repr(model)
    assert "\n" not in unfitted
    first, exits, calibrated = fitted.split("\n")
    assert exits == f"  exits: {' → '.join(model.exit_names)}"
    point, frontier = model.calibrator_.point_, model.pareto()
    assert calibrated == (
        f"  calibrated on 600 samples, 10 classes: accuracy {point.accuracy:.4f} at relative cost {point.cost:.3f} "
        f"(full model {frontier.full_accuracy:.4f}), {len(frontier.points)} operating points"
    )
    for text in (unfitted, first):
        assert text.startswith(f"{type(model).__name__}(")
        assert len(text) < 300
        assert "Conv2d" not in text
        assert "in_features" not in text
    named = re.sub(r"calibrator=.*?\)|recipe=.*?\)|0x\w+", "", first)
    n_modules = len(modules_of(model))
    assert named.count("Sequential") + named.count("NativeNet") == n_modules
    budgeted = case.make(budget=0.4, verbose=0)
    assert "budget=0.4" in repr(budgeted)
    assert "verbose" not in repr(budgeted)
    assert "confidence=largest" in repr(case.make(confidence=largest))


# -- what is not ours -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS, indirect=True)
def test_modules_are_run_in_evaluation_mode_and_stay_as_they_were(case, model):
    estimator = case.make()
    modules = modules_of(estimator)
    for module in modules:
        module.train()
        parts = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
        for part in parts:
            part.eval()
        next(module.parameters(), torch.zeros(1)).requires_grad_(False)
    before = [snapshot(module) for module in modules]
    modes = []
    handles = [
        part.register_forward_hook(lambda part, inputs, output: modes.append(part.training))
        for module in modules
        for part in module.modules()
        if isinstance(part, (nn.Linear, nn.Conv2d))
    ]
    (X, y), (x_val, y_val), (x_test, y_test) = case.train, case.val, case.test
    data = [array.copy() for array in (X, x_val, x_test)]
    quietly(lambda: estimator.fit(X, y).calibrate(x_val, y_val))
    for call in ("predict", "predict_proba", "trace"):
        getattr(estimator, call)(x_test)
    estimator.score(x_test, y_test)
    estimator.pareto(x_test, y_test)
    estimator.predict_anytime(x_test, 1.0)
    for handle in handles:
        handle.remove()
    assert not any(modes)
    assert bool(modes) == bool(modules)
    assert estimator.outputs_.scores.tobytes() == model.outputs_.scores.tobytes()
    for module, known in zip(modules, before, strict=True):
        assert_as_before(module, known)
    assert [array.tobytes() for array in (X, x_val, x_test)] == [array.tobytes() for array in data]


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("when", ["fit", "calibrate", "predict", "predict_anytime"])
def test_modes_are_given_back_after_a_failure(kind, when):
    case, model = CASES[kind], copy.deepcopy(fitted_once(kind))
    module = modules_of(model)[0].train()
    before = [part.training for part in module.modules()]
    last = [part for part in module.modules() if isinstance(part, nn.Linear)][-1]

    def failing(part, inputs, output):
        raise RuntimeError("out of calls")

    last.register_forward_hook(failing)
    arguments = {"predict": [case.test[0], 1.0], "predict_anytime": [case.test[0], 1.0]}.get(when, case.val)
    with pytest.raises(RuntimeError, match="out of calls"):
        getattr(model, when)(*arguments)
    assert [part.training for part in module.modules()] == before


@pytest.mark.parametrize("name", in_turn([*KINDS, *LEARNED, "ztw"]), indirect=True)
def test_random_states_are_untouched(case):
    estimator = case.make()
    before = random_states()
    quietly(lambda: estimator.fit(*case.train).calibrate(*case.val))
    X, y = case.test
    for data in ((X, y), (loader_of(X, y), None), (loader_of(X, y).dataset, None)):
        estimator.predict(data[0])
        estimator.score(*data)
        estimator.pareto(*data)
    quietly(lambda: estimator.calibrate(loader_of(X, y, shuffle=True)))
    assert random_states() == before


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("name", in_turn([*KINDS, *LEARNED]), indirect=True)
def test_fit_where_gradients_are_off(name, case, model, mode):
    with mode():
        other = case.fitted()
    assert other.outputs_.scores.tobytes() == model.outputs_.scores.tobytes()
    assert other.predict(case.test[0]).tolist() == model.predict(case.test[0]).tolist()


@pytest.mark.parametrize("verbose", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_bars_are_shown_on_request(kind, verbose):
    case, out, err = CASES[kind], io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        estimator = case.fitted(verbose=verbose)
        estimator.predict(case.test[0])
        estimator.pareto(*case.test)
    assert out.getvalue() == ""
    words = {"calibrating", "predicting", "recording"}
    if kind in ("branched", "perceptron"):
        words |= {"recording features", "training heads"}
    assert {word for word in words if word in err.getvalue()} == (words if verbose else set())
    assert verbose or err.getvalue() == ""


# -- where models come from, and how exact they are -------------------------------------------------------------------


def as_factories(estimator):
    """The modules of an estimator as factories of them, and how often those were called."""
    calls = []

    def factory(module):
        def make():
            calls.append(1)
            return module

        return make

    params = estimator.get_params(deep=False)
    modules = {name: params[name] for name in ("base", "saver", "backbone") if isinstance(params.get(name), nn.Module)}
    return {name: factory(module) for name, module in modules.items()}, calls


@pytest.mark.parametrize("kind", IMAGES)
def test_factories_are_called_once_a_fit(kind):
    case, model = CASES[kind], fitted_once(kind)
    estimator = case.make(device="cpu")
    factories, calls = as_factories(estimator)
    estimator.set_params(**factories).fit(*case.train).calibrate(*case.val)
    assert estimator.predict(case.test[0]).tolist() == model.predict(case.test[0]).tolist()
    assert len(calls) == len(factories) > 0
    assert estimator.outputs_.scores.tobytes() == model.outputs_.scores.tobytes()


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_modules_of_other_precision(kind, dtype):
    case, model = CASES[kind], fitted_once(kind)
    estimator = case.make()
    for module in modules_of(estimator):
        module.to(dtype)
    quietly(lambda: estimator.fit(*case.train).calibrate(*case.val))
    assert estimator.outputs_.scores.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    assert estimator.score(*case.test) == pytest.approx(model.score(*case.test), abs=0.02)
    np.testing.assert_allclose(estimator.predict_proba(case.test[0]).sum(axis=1), 1, atol=1e-5)
    if dtype == torch.float64:
        np.testing.assert_allclose(estimator.outputs_.scores[-1], model.outputs_.scores[-1], rtol=1e-5)


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("fitted_under_it", [False, True])
def test_autocast(kind, fitted_under_it):
    case, model = CASES[kind], fitted_once(kind)
    X, y = case.test
    with torch.autocast("cpu", dtype=torch.bfloat16):
        estimator = case.fitted() if fitted_under_it else model
        trace, labels = estimator.trace(X), estimator.predict(X)
    assert trace.labels.tolist() == labels.tolist()
    assert np.mean(labels == y) == pytest.approx(model.score(X, y), abs=0.03)
    assert estimator.outputs_.scores.dtype == np.float32
    assert trace.scores.tolist() != model.trace(X).scores.tolist()
