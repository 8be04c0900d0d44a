"""One fitted estimator in evaluation mode answers several threads at once."""

import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn

from tests.contract.cases import LEARNED, budgets_of, fitted_once, in_turn, quietly
from tests.threads import frequent_turns, together

pytestmark = pytest.mark.filterwarnings("ignore::adaptexit.SaverWarning")
N_THREADS = 8


@pytest.fixture(autouse=True)
def often():
    with frequent_turns():
        yield


def test_threads_at_different_budgets_answer_as_one_alone(case, own, model):
    X = case.test[0][:150]
    budgets = (budgets_of(model) * N_THREADS)[:N_THREADS]
    own.set_params(batch_size=64)
    expected = [model.trace(X, budget=budget) for budget in budgets]
    for _ in range(3):
        traces = together([lambda budget=budget: own.trace(X, budget=budget) for budget in budgets])
        for ours, theirs in zip(traces, expected, strict=True):
            assert ours.labels.tolist() == theirs.labels.tolist()
            assert ours.exits.tolist() == theirs.exits.tolist()
            assert ours.costs.tolist() == theirs.costs.tolist()
            np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-5)
        own._prepared.clear()


def test_threads_that_do_different_things_do_not_meet(case, own, model):
    X, y = case.test[0][:150], case.test[1][:150]
    calls = {
        "predict": lambda m: m.predict(X).tolist(),
        "predict_proba": lambda m: m.predict_proba(X).round(4).tolist(),
        "record": lambda m: m.record(X, y).predictions.tolist(),
        "pareto": lambda m: m.pareto(X, y).accuracy.tolist(),
        "anytime": lambda m: m.predict_anytime(X, 1.0).tolist(),
        "score": lambda m: m.score(X, y, max_drop=0.1),
    }
    expected = [call(model) for call in calls.values()]
    assert together([lambda call=call: call(own) for call in calls.values()]) == expected


@pytest.mark.parametrize("name", in_turn(["two modules", "branched", *LEARNED]), indirect=True)
def test_a_predictor_answers_as_before_while_the_estimator_is_calibrated(case, own):
    X, y = case.test
    predictors = [own.at(budget=budget) for budget in budgets_of(own)]
    expected = [predictor.predict(X).tolist() for predictor in predictors]
    done = threading.Event()

    def ask():
        answers = []
        while not done.is_set() or not answers:
            answers.append([predictor.predict(X).tolist() for predictor in predictors])
        return answers

    def calibrate():
        try:
            for part in (slice(0, 150), slice(150, None)):
                quietly(lambda part=part: own.calibrate(X[part], y[part]))
        finally:
            done.set()

    answers_meanwhile, _ = together([ask, calibrate])
    assert all(answers == expected for answers in answers_meanwhile)
    assert own.outputs_.n_samples == len(y) - 150


@pytest.mark.parametrize("learned", in_turn(LEARNED))
def test_what_a_calibrator_has_learned_stays_as_it_is_while_it_is_asked(learned):
    """Another thread may ask the same module at any moment."""
    own = copy.deepcopy(fitted_once(learned))
    modules = getattr(own.calibrator_, "routers_", None) or own.calibrator_.scorers_
    before = [[(p.dtype, p.data_ptr()) for p in module.parameters()] for module in modules]
    meanwhile = []

    def look(module, inputs):
        meanwhile.append([[(p.dtype, p.data_ptr()) for p in module.parameters()] for module in modules])

    for module in modules:
        next(part for part in module.modules() if isinstance(part, nn.Linear)).register_forward_pre_hook(look)
    own.calibrator_.rescored(own.outputs_)
    assert meanwhile
    assert all(weights == before for weights in meanwhile)


def test_modules_in_training_mode_answer_all_threads_as_in_evaluation_mode(case, own, model):
    X = case.test[0][:90]
    expected = [model.predict(X[:n]).tolist() for n in (90, 40)]
    for module in own._network.modules:
        module.train()
    before = [{key: value.clone() for key, value in module.state_dict().items()} for module in own._network.modules]
    answers = together([lambda: [own.predict(X[:n]).tolist() for _ in range(4) for n in (90, 40)]] * 4)
    assert all(answer == expected * 4 for answer in answers)
    for module, state in zip(own._network.modules, before, strict=True):
        assert all(part.training for part in module.modules())
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def test_threads_leave_random_states_and_modes(case, own):
    X = case.test[0][:100]
    before, modes = torch.random.get_rng_state(), [part.training for part in own.heads_.modules()]
    together([lambda: own.predict(X)] * 4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [part.training for part in own.heads_.modules()] == modes


@pytest.mark.parametrize("name", in_turn(["two modules", "branched", *LEARNED]), indirect=True)
def test_whoever_asks_during_a_calibration_is_answered_by_the_old_or_the_new_one(case, own):
    """The estimator itself, whose thresholds, scores and temperatures belong together at every moment."""
    X, y = case.test[0][:60], case.test[1]
    halves = (slice(0, 150), slice(150, None))
    allowed = set()
    for half in halves:
        quietly(lambda half=half: own.calibrate(case.test[0][half], y[half]))
        allowed.add(answer_of(own, X))
    done = threading.Event()

    def ask():
        answers = set()
        while not done.is_set():
            answers.add(answer_of(own, X))
        return answers

    def calibrate():
        try:
            for half in halves * 2:
                quietly(lambda half=half: own.calibrate(case.test[0][half], y[half]))
        finally:
            done.set()

    first, second, _ = together([ask, ask, calibrate])
    assert first | second <= allowed


def answer_of(model, X):
    trace = model.trace(X)
    return tuple(trace.labels.tolist()), tuple(trace.exits.tolist()), tuple(trace.costs.tolist())


@pytest.mark.parametrize("name", in_turn(["two modules", "EM routers", "EENet"]), indirect=True)
def test_a_calibrator_fitted_anew_is_the_old_or_the_new_one(model):
    outputs = model.outputs_
    samples = [outputs.take(np.arange(0, outputs.n_samples, 2)), outputs.take(np.arange(1, outputs.n_samples, 2))]
    calibrator = copy.copy(model.calibrator_)
    allowed = set()
    for part in samples:
        allowed.add(tuple(quietly(lambda part=part: calibrator.fit(part)).exit_index(outputs).tolist()))
    done = threading.Event()

    def ask():
        answers = set()
        while not done.is_set():
            policy = calibrator.policy()
            assert policy.path_costs.tolist() == pytest.approx(calibrator.costs_.paths(policy.point.on).tolist())
            answers.add(tuple(calibrator.exit_index(outputs).tolist()))
        return answers

    def fit():
        try:
            for part in samples * 3:
                quietly(lambda part=part: calibrator.fit(part))
        finally:
            done.set()

    first, second, _ = together([ask, ask, fit])
    assert first | second <= allowed
