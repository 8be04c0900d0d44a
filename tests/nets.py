"""Networks and data that several tests share."""

import copy
import warnings
from collections import OrderedDict
from functools import cache, partial

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from adaptexit import CalibrationWarning, CascadeSaver, FrozenRecipe, MultiExitClassifier
from adaptexit.calibrators.base import Calibrator
from adaptexit.core.frontier import evaluate
from adaptexit.core.policy import Decision
from adaptexit.core.routing import accepts
from adaptexit.heads import Answer, Head
from adaptexit.networks.base import Network
from adaptexit.networks.readers import LogitsReader

N_CLASSES = 3


class Columns(nn.Module):
    """Answers with ``N_CLASSES`` columns of its input: logits are known exactly and do not depend on batching."""

    def __init__(self, k):
        super().__init__()
        self.columns = slice(k * N_CLASSES, (k + 1) * N_CLASSES)

    def forward(self, x):
        return x[:, self.columns]


def column_data(n, n_models=2, seed=0):
    """Inputs for ``Columns`` 0 ... n_models - 1, each more accurate than the one before, and labels."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, N_CLASSES, n)
    signal = np.linspace(2.0, 4.0, n_models)[:, None, None] * np.eye(N_CLASSES)[y]
    logits = rng.normal(size=(n_models, n, N_CLASSES)) * np.array([0.5, 1.0, 3.0])[rng.integers(0, 3, n)][:, None]
    return (logits + signal).transpose(1, 0, 2).reshape(n, -1), y


class Recording(nn.Module):
    """Another module, with the size of every batch it is called on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.inner(x)


class Constant(nn.Module):
    """The same answer to everything, after ``width`` MACs a class and feature."""

    def __init__(self, n_features, n_classes, answer, width=1):
        super().__init__()
        self.work = nn.ModuleList(nn.Linear(n_features, n_classes) for _ in range(width))
        self.answer = F.one_hot(torch.tensor(answer), n_classes).float()

    def forward(self, x):
        x = x.flatten(1)
        return self.answer + 0.0 * sum(layer(x) for layer in self.work)


def small_net():
    """About 1 k MACs on a digit."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))


def middle_net():
    """About 6 k MACs on a digit."""
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))


def large_net():
    """About 90 k MACs on a digit, with batch normalisation and dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(128, 10),
    )  # fmt: skip


def branched_net():
    """About 98 k MACs on a digit, in three named blocks with batch normalisation, and dropout."""

    def block(inputs, outputs, stride):
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    return nn.Sequential(OrderedDict(
        one=block(1, 8, 1), two=block(8, 16, 2), three=block(16, 32, 1), pool=nn.AdaptiveAvgPool2d(2),
        flat=nn.Flatten(), drop=nn.Dropout(0.2), out=nn.Linear(128, 10),
    ))  # fmt: skip


class NativeNet(nn.Module):
    """``branched_net`` as a network built with exits."""

    def __init__(self, net, heads):
        super().__init__()
        self.stages = nn.ModuleList([net.one, net.two, net.three])
        self.heads = nn.ModuleList([*heads, nn.Sequential(net.pool, net.flat, net.drop, net.out)])

    def forward(self, x):
        logits = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            logits.append(head(x))
        return logits


@cache
def digits():
    """Images (N, 1, 8, 8) in [0, 1] and labels: 600 to train, 600 to calibrate, 597 to test."""
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    order = np.random.default_rng(0).permutation(len(y))
    return [(X[part], y[part]) for part in (order[:600], order[600:1200], order[1200:])]


@cache
def _weights(factory, epochs):
    X, y = (torch.from_numpy(array) for array in digits()[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = factory().train()
        optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(X)).split(50):
                optimizer.zero_grad()
                F.cross_entropy(net(X[batch]), y[batch]).backward()
                optimizer.step()
    return net.state_dict()


def trained(factory, epochs):
    """A new module with weights that were trained once."""
    with torch.random.fork_rng(devices=[]):
        net = factory()
    net.load_state_dict(_weights(factory, epochs))
    return net.eval()


small_trained = partial(trained, small_net, 8)
middle_trained = partial(trained, middle_net, 8)
large_trained = partial(trained, large_net, 8)
branched_trained = partial(trained, branched_net, 8)

EXITS = ["one", "two", "three"]
"""Of ``branched_net``."""
QUICK = FrozenRecipe(epochs=6, lr=2e-2, batch_size=150)


def flat_head(spec, n_classes):
    """A linear layer on 4x4 pixels of a map: good answers after a few epochs."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * spec.channels, n_classes))


class AddingHead(Head):
    """Chained: logits of its own plus those of all heads before it."""

    chained = True

    def __init__(self, spec, n_classes):
        super().__init__(spec, n_classes)
        self.linear = nn.Linear(16 * spec.channels, n_classes)

    def reduce(self, feature):
        return F.adaptive_avg_pool2d(feature, 4).flatten(1)

    def answer(self, reduced, state=None):
        logits = self.linear(reduced) if state is None else self.linear(reduced) + state["logits"]
        return Answer(logits, None, {"logits": logits})


class Fixed(Calibrator):
    """One operating point, of given thresholds."""

    def __init__(self, thresholds):
        self.thresholds = thresholds

    def fit(self, outputs):
        thresholds = np.array(self.thresholds, dtype=np.float64)
        point = evaluate(outputs, thresholds, thresholds)
        self._keep([point], point, outputs)
        return self


def branched(backbone=None, **params):
    """An unfitted classifier with exits at the blocks of ``branched_net``."""
    params = {"exits": EXITS, "head": flat_head, "recipe": QUICK} | params
    return MultiExitClassifier(branched_trained() if backbone is None else backbone, **params)


@cache
def branched_model():
    """One for all tests that only ask it questions."""
    return branched().fit(*digits()[0]).calibrate(*digits()[1])


def native_net():
    """A trained network built with exits, its early ones those of ``branched_model``."""
    heads = [head.net for head in copy.deepcopy(branched_model()._network.early[:2])]
    return NativeNet(branched_trained(), heads).eval()


def naive_cascade(models, x, thresholds, confidence):
    """Class and exit of every sample, one at a time: a model after the other until one is sure enough."""
    answers = []
    with torch.inference_mode():
        for i in range(len(x)):
            for k, model in enumerate(models):
                logits = model(x[i : i + 1])
                if k == len(models) - 1 or float(confidence(logits)[0]) > thresholds[k]:
                    answers.append((int(logits.argmax()), k))
                    break
    predictions, exits = zip(*answers, strict=True)
    return list(predictions), list(exits)


def assert_same_branches(one, other):
    """The same of two classifiers with exits, whose heads, costs and losses are bit-equal too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        assert_same_learning(one, other)
    for first, second in zip(one._network.early, other._network.early, strict=True):
        known = second.state_dict()
        assert {key: value.tolist() for key, value in first.state_dict().items()} == {
            key: value.tolist() for key, value in known.items()
        }
    assert one.history_ == other.history_
    assert one.outputs_.labels.tolist() == other.outputs_.labels.tolist()
    for name in ("stage_costs", "exit_costs"):
        assert getattr(one.outputs_, name).tolist() == getattr(other.outputs_, name).tolist()


def naive_branches(net, exits, heads, x, cutoffs):
    """Class, exit, score and logits of every sample, one at a time: the plain model, its features under hooks."""
    features, answers = {}, []

    def keep(name):
        return lambda module, inputs, output: features.update({name: output.clone()})

    handles = [net.get_submodule(name).register_forward_hook(keep(name)) for name in exits]
    with torch.inference_mode():
        for i in range(len(x)):
            last, state = net(x[i : i + 1]), None
            for k, (name, head) in enumerate(zip(exits, heads, strict=True)):
                output = head(features[name], state) if head.chained else head(features[name])
                state = output.state
                score = float(output.logits.softmax(dim=1).max())
                if output.confidence_logits is not None:
                    score = float(output.confidence_logits[0, output.logits.argmax()].sigmoid())
                if score > cutoffs[k]:
                    answers.append((int(output.logits.argmax()), k, score, output.logits[0].numpy()))
                    break
            else:
                score = float(last.softmax(dim=1).max())
                answers.append((int(last.argmax()), len(heads), score, last[0].numpy()))
    for handle in handles:
        handle.remove()
    return [np.array(column) for column in zip(*answers, strict=True)]


class Called(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, carried):
        return self.function(carried)


class FunctionNetwork(Network):
    """A network whose stages and exits are given as functions or modules.

    A stage makes what goes on of what is carried (None passes it on); an exit gives an output for the reader, or a pair
    of one and of what goes on.
    """

    def __init__(self, stages, exits, confidence="max_proba", *, reader=None, chained=False):
        self.stages = nn.ModuleList(nn.Identity() if stage is None else as_module(stage) for stage in stages)
        self.heads = nn.ModuleList(map(as_module, exits))
        self.exit_names = [f"exit {k}" for k in range(len(exits))]
        self.reader = LogitsReader(confidence) if reader is None else reader
        self.chained = chained

    @property
    def modules(self):
        return [*self.stages, *self.heads]

    def stage(self, k, carried):
        return self.stages[k](carried)

    def exit(self, k, carried, features=False):
        output = self.heads[k](carried)
        return output if isinstance(output, tuple) else (output, carried)

    def get_state(self):
        raise NotImplementedError("functions cannot be written")


def as_module(function):
    return function if isinstance(function, nn.Module) else Called(function)


class RulePolicy:
    """A policy made of a function (k, batch, memory) -> who leaves, or a whole Decision."""

    def __init__(self, rule, runs, *, needs_logits=False, needs_features=False):
        self.rule, self.runs = rule, np.array(runs, dtype=bool)
        self.runs[-1] = True
        self.path_costs = np.cumsum(self.runs, dtype=float)
        self.full_cost = 1.0
        self.needs_logits, self.needs_features = needs_logits, needs_features

    def decide(self, k, batch, memory=None):
        decision = self.rule(k, batch, memory)
        return decision if isinstance(decision, Decision) else Decision(decision, batch.scores)


def leaving_above(cutoffs):
    """The policy that asks the scores to be above cutoffs, one or one a class for every exit, inf for exits to skip."""
    runs = [np.min(cutoff) < np.inf for cutoff in cutoffs]
    return RulePolicy(lambda k, batch, memory: accepts(batch.predictions, batch.scores, cutoffs[k]), runs)


def column_cascade(n_models=2, **params):
    """An unfitted cascade for ``column_data``, ten times dearer from model to model."""
    savers = [Columns(k) for k in range(n_models - 1)]
    params = {"cost": [10.0**k for k in range(n_models)]} | params
    return CascadeSaver(Columns(n_models - 1), savers[0] if n_models == 2 else savers, **params)


def loader_of(X, y, batch_size=50, **options):
    """A DataLoader of arrays."""
    dataset = TensorDataset(torch.from_numpy(X), torch.from_numpy(y))
    return DataLoader(dataset, batch_size=batch_size, **options)


def assert_same_learning(one, other):
    """Two fitted cascades are bit-equal in what they learned and in what they answer."""
    for first, second in zip(one.pareto().points, other.pareto().points, strict=True):
        assert first.thresholds.tobytes() == second.thresholds.tobytes()
        assert first.cutoffs.tobytes() == second.cutoffs.tobytes()
        assert (first.accuracy, first.cost) == (second.accuracy, second.cost)
    assert one.outputs_.scores.tobytes() == other.outputs_.scores.tobytes()
    assert one.outputs_.predictions.tobytes() == other.outputs_.predictions.tobytes()
    assert one.calibrator_.thresholds_.tobytes() == other.calibrator_.thresholds_.tobytes()
