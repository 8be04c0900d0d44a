"""The estimators that keep one contract: how each is made, and what it is fitted, calibrated and asked on."""

import json
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier
from torch import nn

from adaptexit import (
    BoostNetRecipe,
    CascadeSaver,
    CPMCalibrator,
    EENetScheduler,
    EMRouter,
    MultiExitClassifier,
    ThresholdCalibrator,
    ZTWRecipe,
)
from adaptexit.saved_config import UNSIGNED, with_checksum
from adaptexit.utils.files import sha256_of
from tests.nets import (
    QUICK,
    branched,
    branched_trained,
    digits,
    large_trained,
    loader_of,
    middle_trained,
    native_net,
    small_trained,
)

TRAIN, VAL, TEST = digits()
ROUTED = {"prior": "global", "epochs": 4, "hidden": 4, "n_points": 10}
CHAINED = {"epochs": 4, "batch_size": 150, "lr": 1e-2}


def flattened(data):
    """Images as a table."""
    return data[0].reshape(len(data[0]), -1), data[1]


def stages_of(net):
    """``branched_net`` as the list of its stages."""
    return [net.one, net.two, net.three, nn.Sequential(net.pool, net.flat, net.drop, net.out)]


def pair(**params):
    """A cascade of two modules."""
    return CascadeSaver(large_trained(), small_trained(), **params)


def triple(**params):
    """A cascade of three modules."""
    return CascadeSaver(large_trained(), [small_trained(), middle_trained()], **params)


def classifiers(**params):
    """A cascade of classifiers for tables, which are fitted in it."""
    params = {"cost": [1, 10], "calibrator": ThresholdCalibrator(n_points=20)} | params
    return CascadeSaver(LogisticRegression(max_iter=50), DecisionTreeClassifier(max_depth=7, random_state=0), **params)


def chained(recipe, **params):
    """A classifier with heads that read earlier ones."""
    return branched(**{"exits": ["one", "two"], "head": "auto", "recipe": recipe} | params)


@dataclass(frozen=True)
class Case:
    """One of them: ``make(**params)`` gives it unfitted, ``of`` takes digits as it takes inputs."""

    make: Callable[..., Any]
    of: Callable[[Any], Any] = lambda data: data

    @property
    def table(self):
        return self.of is flattened

    @property
    def train(self):
        return self.of(TRAIN)

    @property
    def val(self):
        return self.of(VAL)

    @property
    def test(self):
        X, y = self.of(TEST)
        return X[:300], y[:300]

    @property
    def cascade(self):
        return isinstance(self.make(), CascadeSaver)

    def fitted(self, **params):
        """A new one, calibrated on data that ``fit`` has not seen."""
        return quietly(lambda: self.make(**params).fit(*self.train).calibrate(*self.val))

    def given_again(self, model):
        """What :func:`adaptexit.load` may have to be given for a model, by name."""
        again = self.make().get_params(deep=False)
        if self.table and self.cascade:
            saver, base = (head.classifier for head in model.heads_)
            again |= {"base": FrozenEstimator(base), "saver": saver}
        return again

    def needed_again(self, model, config):
        """Those of them that the config of a save does not hold."""
        again = self.given_again(model)
        return {name: again[name] for name in config["given_again"]}


CASES = {
    "two modules": Case(pair),
    "three modules": Case(lambda **p: triple(**{"calibrator": ThresholdCalibrator(search="exact", n_points=30)} | p)),
    "entropy": Case(lambda **p: pair(**{"calibrator": ThresholdCalibrator("entropy")} | p)),
    "EM routers": Case(lambda **p: pair(**{"calibrator": EMRouter(**ROUTED)} | p)),
    "EENet": Case(lambda **p: triple(**{"calibrator": EENetScheduler(epochs=4, hidden=4, n_points=10)} | p)),
    "classifiers": Case(classifiers, flattened),
    "branched": Case(branched),
    "branched, EM routers": Case(lambda **p: branched(**{"calibrator": EMRouter(**ROUTED)} | p)),
    "ztw": Case(lambda **p: chained(ZTWRecipe(**CHAINED), **{"calibrator": CPMCalibrator(0.3)} | p)),
    "boostnet": Case(
        lambda **p: chained(BoostNetRecipe(**CHAINED), **{"calibrator": ThresholdCalibrator(search="geometric")} | p)
    ),
    "stages": Case(lambda **p: branched(stages_of(branched_trained()), **{"exits": "auto"} | p)),
    "native": Case(
        lambda **p: MultiExitClassifier(native_net(), **{"calibrator": ThresholdCalibrator(search="geometric")} | p)
    ),
    "perceptron": Case(lambda **p: MultiExitClassifier("mlp", **{"recipe": QUICK} | p), flattened),
}

KINDS = ["two modules", "classifiers", "branched", "native", "perceptron"]
"""One of each kind, whatever its heads and its calibrator."""

IMAGES = ["two modules", "branched", "native"]
"""Those of them that take images and are made from modules."""
LEARNED = ["EM routers", "EENet", "branched, EM routers"]
"""Those whose calibrators train small modules."""

ALIKE = ["three modules", "entropy", "EM routers", "boostnet", "stages"]
"""Those whose network, heads and calibrator others of them have too, in other combinations or with other settings."""


def in_turn(names):
    """Parameters of a test of these estimators: those that are much like others come with the slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in names]


SOURCES = {
    "tensors": lambda X, y: (torch.from_numpy(X), torch.from_numpy(y)),
    "pair": lambda X, y: ((X, y), None),
    "dataset": lambda X, y: (loader_of(X, y).dataset, None),
    "loader": lambda X, y: (loader_of(X, y), None),
    "shuffled": lambda X, y: (loader_of(X, y, shuffle=True), None),
    "double": lambda X, y: (X.astype(np.float64), y),
    "lists": lambda X, y: (X.tolist(), y.tolist()),
    "list of pairs": lambda X, y: (list(zip(X, y, strict=True)), None),
}
"""Ways to give inputs and labels; a loader that shuffles serves where order does not matter."""


@cache
def fitted_once(name):
    """A fitted one for all tests that only ask it questions."""
    return CASES[name].fitted()


def quietly(make):
    """What ``make()`` gives; that a saver hardly pays, or EM could go on, is not what is tested here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return make()


def budgets_of(model):
    """No budget, the cheapest, one between and the full model's."""
    costs = model.pareto().cost
    return [None, costs[0], costs[len(costs) // 2], 1.0]


def answers_of(model, X):
    """All that a model answers at several budgets, as bytes."""
    answers = []
    for budget in budgets_of(model):
        trace = model.trace(X, budget=budget)
        arrays = (trace.labels, trace.exits, trace.costs, trace.scores, model.predict_proba(X, budget=budget))
        answers.append([np.asarray(array).tobytes() for array in arrays])
    return answers


def assert_same(one, other, X, y):
    """The same in all that was learned and in every answer, bit by bit."""
    X, y = X[:150], y[:150]
    assert type(other) is type(one)
    assert repr(other).splitlines()[1:] == repr(one).splitlines()[1:]
    assert answers_of(other, X) == answers_of(one, X)
    assert other.predict_anytime(X, 1.0).tolist() == one.predict_anytime(X, 1.0).tolist()
    for ours, theirs in zip(one.pareto().points, other.pareto().points, strict=True):
        assert (theirs.accuracy, theirs.cost, theirs.params) == (ours.accuracy, ours.cost, ours.params)
        for name in ("thresholds", "cutoffs", "exit_rates"):
            assert getattr(theirs, name).tobytes() == getattr(ours, name).tobytes()
    assert other.pareto(X, y).accuracy.tolist() == one.pareto(X, y).accuracy.tolist()
    for name in ("scores", "predictions", "labels", "stage_costs", "exit_costs"):
        assert getattr(other.outputs_, name).tobytes() == getattr(one.outputs_, name).tobytes()
    assert other.classes_.dtype == one.classes_.dtype
    assert other.classes_.tolist() == one.classes_.tolist()
    for name in ("exit_names", "cost_unit_", "labelled_", "exits_", "history_", "self_calibrated_", "saver_reports_"):
        assert getattr(other, name, None) == getattr(one, name, None)
    for name in ("search_report_", "extra_costs_"):
        ours, theirs = getattr(one.calibrator_, name, None), getattr(other.calibrator_, name, None)
        assert np.array_equal(theirs, ours)
    training = getattr(one, "training_outputs_", None)
    if training is not None:
        assert other.training_outputs_.scores.tobytes() == training.scores.tobytes()


def config_of(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((folder / "config.json").read_text(), parse_constant=refuse)


def sign(folder, config=None):
    """Give a save that a test has changed the checksums of what now lies there."""
    config = config_of(folder) if config is None else config
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "config.json")
    files = {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}
    (folder / "config.json").write_text(with_checksum(json.dumps({**config, "sha256": UNSIGNED, "files": files})))


def some(case):
    """Inputs and labels, few enough to be quick and for every class to be held out."""
    X, y = case.train
    return X[:200].copy(), y[:200].copy()


def learned(estimator):
    """What a fit has left in an estimator."""
    return {name: value for name, value in vars(estimator).items() if name not in estimator.get_params(deep=False)}


def snapshot(module):
    """All that a user could find changed in a module."""
    return {
        "weights": {key: value.clone() for key, value in module.state_dict().items()},
        "modes": [part.training for part in module.modules()],
        "grads": [(p.requires_grad, p.grad) for p in module.parameters()],
        "places": [p.data_ptr() for p in module.parameters()],
        "hooks": [
            (list(part._forward_hooks), list(part._forward_pre_hooks), list(part._backward_hooks))
            for part in module.modules()
        ],
        "attributes": [sorted(vars(part)) for part in module.modules()],
    }


def assert_as_before(module, before):
    now = snapshot(module)
    weights, known = now.pop("weights"), before["weights"]
    assert list(weights) == list(known)
    assert all(torch.equal(value, known[key]) for key, value in weights.items())
    assert now == {key: value for key, value in before.items() if key != "weights"}


def random_states():
    """The states of all global generators."""
    return torch.random.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
