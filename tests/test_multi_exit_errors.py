import copy
import re

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.svm import LinearSVC
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from adaptexit import FrozenRecipe, MultiExitClassifier, ThresholdCalibrator
from adaptexit.heads import MLPHead
from adaptexit.staging.tracing import SplitError
from tests.nets import branched, branched_model, branched_trained, digits, flat_head, loader_of, native_net

TRAIN, VAL, TEST = digits()
X, Y = TRAIN[0][:200], TRAIN[1][:200]


@pytest.fixture(scope="module")
def model():
    """Tests only ask it questions."""
    return branched_model()


@pytest.fixture
def fitted():
    return copy.deepcopy(branched_model())


def spoiled(value, at=-1):
    x = X.copy()
    x[at, 0, 3, 3] = value
    return x


# -- order of calls ---------------------------------------------------------------------------------------------------

CALLS = {
    "predict": lambda model: model.predict(X),
    "predict_proba": lambda model: model.predict_proba(X),
    "trace": lambda model: model.trace(X),
    "predict_anytime": lambda model: model.predict_anytime(X, 1.0),
    "score": lambda model: model.score(X, Y),
    "calibrate": lambda model: model.calibrate(X, Y),
    "pareto": lambda model: model.pareto(),
    "pareto on data": lambda model: model.pareto(X, Y),
    "record": lambda model: model.record(X, Y),
    "point_index": lambda model: model.point_index(),
    "exit_names": lambda model: model.exit_names,
    "save": lambda model: model.save("never-written"),
}


@pytest.mark.parametrize("call", CALLS)
def test_before_fit(call):
    with pytest.raises(NotFittedError, match="MultiExitClassifier instance is not fitted yet"):
        CALLS[call](branched())


# -- data -------------------------------------------------------------------------------------------------------------

READERS = {
    "fit": lambda model, x: branched().fit(x, Y[: len(x)]),
    "fit unlabelled": lambda model, x: branched().fit(x),
    "calibrate": lambda model, x: model.calibrate(x, Y[: len(x)]),
    "predict": lambda model, x: model.predict(x),
    "predict_proba": lambda model, x: model.predict_proba(x),
    "trace": lambda model, x: model.trace(x),
    "predict_anytime": lambda model, x: model.predict_anytime(x, 1.0),
    "score": lambda model, x: model.score(x, Y[: len(x)]),
    "pareto": lambda model, x: model.pareto(x, Y[: len(x)]),
    "record": lambda model, x: model.record(x, Y[: len(x)]),
}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_data_that_are_not_finite(model, read, bad):
    with pytest.raises(ValueError, match="X must be finite; it contains NaN or infinity"):
        READERS[read](model, spoiled(bad))


@pytest.mark.parametrize("read", READERS)
def test_no_samples(model, read):
    with pytest.raises(ValueError, match="X holds no samples; give at least one"):
        READERS[read](model, X[:0])


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("bad", ["images/", {"x": X}, np.array([["a"]])])
def test_things_that_are_no_data(model, read, bad):
    with pytest.raises(TypeError, match="X must be a"):
        READERS[read](model, bad)


@pytest.mark.parametrize("read", ["predict", "predict_proba", "trace", "predict_anytime"])
def test_a_pair_where_inputs_are_meant(model, read):
    with pytest.raises(ValueError, match=r"X must be inputs alone here; got a pair, which looks like \(X, y\)"):
        READERS[read](model, (X, Y))


@pytest.mark.parametrize("shape", [(9, 3, 8, 8), (9, 64)])
def test_images_of_another_shape(model, shape):
    with pytest.raises((RuntimeError, ValueError)) as caught:
        model.predict(np.zeros(shape, dtype=np.float32))
    if len(shape) == 2:
        assert re.match(r"X must have the shape \(N, 1, 8, 8\) .*got \(9, 64\)", str(caught.value))
    with pytest.raises(RuntimeError) as caught:
        branched().fit(np.zeros(shape, dtype=np.float32), np.arange(9))
    assert any("This is backbone, run on inputs of shape (8, " in note for note in caught.value.__notes__)


# -- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fit", "calibrate", "record", "pareto"])
def test_labels_outside_the_classes(model, name):
    call = branched().fit if name == "fit" else getattr(model, name)
    with pytest.raises(ValueError, match=r"y must hold labels among the 10 classes \[0, 1, \.\.\., 9\]; got \[10\]"):
        call(X, Y + 1)


@pytest.mark.parametrize("name", ["fit", "calibrate", "record"])
def test_labels_of_another_number(model, name):
    call = branched().fit if name == "fit" else getattr(model, name)
    with pytest.raises(ValueError, match=r"y must have shape \(200,\), one label a sample of X; got shape \(199,\)"):
        call(X, Y[:-1])


@pytest.mark.parametrize("name", ["fit", "calibrate"])
def test_labels_that_are_no_numbers_a_sample(model, name):
    call = branched().fit if name == "fit" else getattr(model, name)
    with pytest.raises(ValueError, match=r"y must have shape \(200,\).*got shape \(200, 10\)"):
        call(X, np.eye(10)[Y])
    with pytest.raises(ValueError, match=r"y must be one label a sample; got shape \(200, 10\)"):
        call(loader_of(X, np.eye(10)[Y]))


def test_labels_given_twice(model):
    for call in (branched().fit, model.calibrate, model.score):
        with pytest.raises(ValueError, match="y is taken from X where X is a DataLoader"):
            call(loader_of(X, Y), Y)


def test_labels_for_some_samples_only(model):
    class Half(IterableDataset):
        def __iter__(self):
            yield torch.from_numpy(X[:50]), torch.from_numpy(Y[:50])
            yield torch.from_numpy(X[50:])

    loader = DataLoader(Half(), batch_size=None)
    for call in (branched().fit, model.calibrate):
        with pytest.raises(ValueError, match="X must give a label for every sample or for none; got 50 of 200"):
            call(loader)


@pytest.mark.parametrize("call", ["score", "record", "pareto"])
def test_labels_that_are_missing(model, call):
    with pytest.raises(ValueError, match=r"give y, a pair \(X, y\), or a Dataset or DataLoader"):
        getattr(model, call)(X)
    with pytest.raises(ValueError, match=r"must give \(x, y\) pairs here; it gave x alone"):
        getattr(model, call)(TensorDataset(torch.from_numpy(X)))


# -- exits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exits", "error", "message"),
    [
        (["one", "tow"], ValueError, r"has no 'tow' \(near it: .*'two'"),
        (["one.7"], ValueError, r"has no 'one.7' \(near it: 'one.0', 'one.1', 'one.2'"),
        (
            ["two", "one"],
            ValueError,
            r"in the order in which the model runs them: \['one', 'two'\]; got \['two', 'one'\]",
        ),
        (["one", "one"], ValueError, "must be different modules; got 'one' twice"),
        (["one", "one.2"], ValueError, "'one' and 'one.2' are the same point"),
        (["out"], SplitError, "nothing is left to compute after 'out'"),
        ([], ValueError, "must name at least one module; got none"),
        ([3], TypeError, "must be module names .*got 3"),
        ("one", ValueError, r"exits must be 'auto', a number of at least 1 or a list of module names; got 'one'"),
    ],
)
def test_exits_that_cannot_be(exits, error, message):
    with pytest.raises(error, match=message):
        branched(exits=exits).fit(X, Y)


@pytest.mark.parametrize("exits", [0, -1, True, None, 2.5])
def test_exits_that_are_neither_names_nor_a_number(exits):
    with pytest.raises((ValueError, TypeError), match=f"exits must be .*got {exits!r}"):
        branched(exits=exits).fit(X, Y)


@pytest.mark.parametrize("exits", [["stages.0"], 1])
def test_exits_of_a_network_that_has_its_own(exits):
    with pytest.raises(ValueError, match="exits must be 'auto' for a network built with exits or given as its stages"):
        MultiExitClassifier(native_net(), exits).fit(X, Y)
    net = branched_trained()
    with pytest.raises(ValueError, match=rf"exits must be 'auto' .*got {re.escape(repr(exits))}"):
        MultiExitClassifier([net.one, nn.Sequential(*list(net)[1:])], exits).fit(X, Y)


# -- backbones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "error", "message"),
    [
        (3, TypeError, "backbone must be a timm model name, a factory of a module, an nn.Module or .*got 3"),
        (None, TypeError, "backbone must be .*got None"),
        (nn.Linear, TypeError, "backbone must be .*got <class"),
        ("resnet1", ValueError, "backbone must be the name of a timm model; got 'resnet1'. Near it are resnet18"),
        (lambda: 3, TypeError, "backbone, called as a factory, must return an nn.Module; got int"),
        ([], ValueError, r"backbone must have at least two stages, all modules; got \[\]"),
        ([nn.Flatten()], ValueError, "backbone must have at least two stages"),
        ([nn.Flatten(), 3], ValueError, "backbone must have at least two stages, all modules"),
        (nn.Conv2d(1, 3, 3), ValueError, r"backbone must answer with logits of shape \(B, C\); got \(8, 3, 6, 6\)"),
    ],
)
def test_backbones_that_cannot_be(backbone, error, message):
    with pytest.raises(error, match=message):
        MultiExitClassifier(backbone).fit(X, Y)


OTHERS = {
    "fitted": lambda: LogisticRegression(max_iter=500).fit(X.reshape(len(X), -1), Y),
    "unfitted": LogisticRegression,
    "forest": RandomForestClassifier,
    "without probabilities": LinearSVC,
    "regressor": MLPRegressor,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_classifiers_are_refused(kind):
    other = OTHERS[kind]()
    message = rf"(?s)backbone must be a module, or scikit-learn's MLPClassifier.*got {type(other).__name__}\("
    with pytest.raises(TypeError, match=message):
        MultiExitClassifier(other).fit(X.reshape(len(X), -1), Y)


def test_a_backbone_that_returns_a_tuple():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = branched_trained()

        def forward(self, x):
            return self.net(x), None

    with pytest.raises(TypeError, match=r"backbone must return a tensor of logits .*got tuple"):
        branched(Pair(), exits=["net.one"]).fit(X, Y)


def test_a_backbone_with_nan_in_its_weights():
    net = branched_trained()
    with torch.no_grad():
        net.out.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        branched(net).fit(X, Y)


# -- parameters -------------------------------------------------------------------------------------------------------

BAD = {
    "head: name": ({"head": "mpl"}, ValueError, "head must be one of mlp, conv, .*got 'mpl'.*Near it: mlp"),
    "head: module": ({"head": nn.Linear(2, 2)}, TypeError, "head must be one of .*got the module Linear"),
    "head: number": ({"head": 3}, TypeError, "head must be one of .*got 3"),
    "head: returns none": ({"head": lambda s, c: None}, TypeError, "head, called as a factory, must return an nn.Mod"),
    "head: too narrow": (
        {"head": lambda spec, n: flat_head(spec, n - 1)},
        ValueError,
        r"must return logits of shape \(2, 10\).*\(2, 9\)",
    ),
    "head: too wide": (
        {"head": lambda spec, n: MLPHead(spec, n + 1)},
        ValueError,
        r"head 0 must answer .*= \(\d+, 10\).*\(\d+, 11\)",
    ),
    "recipe: name": ({"recipe": "frozn"}, ValueError, "recipe must be one of 'frozen', .*got 'frozn'. Near it is 'fr"),
    "recipe: class": ({"recipe": FrozenRecipe}, TypeError, "recipe must be a name .*got <class"),
    "recipe: epochs": (
        {"recipe": FrozenRecipe(epochs=0)},
        ValueError,
        "epochs must be a whole number, at least 1 or 'auto'; got",
    ),
    "recipe: lr": ({"recipe": FrozenRecipe(lr=-1)}, ValueError, "lr must be a finite number above 0; got -1"),
    "calibrator": ({"calibrator": "threshold"}, TypeError, "calibrator must be .*got 'threshold'"),
    "calibrator: search": ({"calibrator": ThresholdCalibrator(search="no")}, ValueError, "search must be one of"),
    "confidence: name": (
        {"confidence": "sure"},
        ValueError,
        r"confidence must be one of .*'auto'.*or a callable.*got 'sure'",
    ),
    "confidence: shape": ({"confidence": lambda logits: logits}, ValueError, "confidence must turn an output of B"),
    "confidence: nan": ({"confidence": lambda logits: logits[:, 0] / 0}, ValueError, "score that is NaN or infinite"),
    "budget: low": ({"budget": 1e-4}, ValueError, "budget must be at least 0.06.*got 0.0001"),
    "budget: text": ({"budget": "a"}, ValueError, "budget must be a finite relative cost.*got 'a'"),
    "cost: name": ({"cost": "flops"}, ValueError, "cost must be 'macs', 'latency' or a sequence.*got 'flops'"),
    "cost: few": ({"cost": [1, 2]}, ValueError, r"cost must be 4 positive numbers .*got \[1, 2\]"),
    "cost: falling": ({"cost": [1, 3, 2, 4]}, ValueError, "cost must be 4 positive numbers that do not fall"),
    "cost: free": ({"cost": [0, 1, 2, 3]}, ValueError, "cost must be 4 positive numbers"),
    "cost: nan": ({"cost": [1, np.nan, 2, 3]}, ValueError, "cost must be 4 positive numbers"),
    "cost: texts": ({"cost": ["a", 1, 2, 3]}, ValueError, "cost must be 4 positive numbers"),
    "cost: none": ({"cost": None}, ValueError, "cost must be 4 positive numbers .*got None"),
    "preprocess": ({"preprocess": "x"}, ValueError, "preprocessing of backbone must be 'auto' .*got 'x'"),
    "layout: name": ({"layout": "NHCW"}, ValueError, "layout must be one of NC, NLC, .*got 'NHCW'"),
    "layout: axes": ({"layout": "NLC"}, ValueError, r"layout NLC needs 2 axes .*got shape \(8, 8, 8\)"),
    "layout: cut": ({"layout": {"uno": "NCHW"}}, ValueError, r"layout must name cuts among \['one'.*got \['uno'\]"),
    "classes: few": (
        {"classes": ["a"]},
        ValueError,
        r"classes must be 10 different labels, one an output; got \['a'\]",
    ),
    "classes: twice": ({"classes": list("aabcdefghi")}, ValueError, "classes must be 10 different labels"),
    "calibration_size: 0": ({"calibration_size": 0}, ValueError, "calibration_size must lie between 0 and 1; got 0"),
    "calibration_size: 30": ({"calibration_size": 30}, ValueError, "calibration_size must lie between 0 and 1; got 30"),
    "cache_dir": ({"cache_dir": __file__}, OSError, f"cache_dir must be .*{re.escape(__file__)}"),
    "cache_memory": ({"cache_memory": -1}, ValueError, "cache_memory must be a number of bytes; got -1"),
    "cache_memory: text": ({"cache_memory": "1G"}, ValueError, "cache_memory must be a number of bytes; got '1G'"),
    "batch_size": ({"batch_size": 0}, ValueError, "batch_size must be a positive integer; got 0"),
    "batch_size: float": ({"batch_size": 1.5}, ValueError, "batch_size must be a positive integer; got 1.5"),
    "random_state: below": ({"random_state": -1}, ValueError, "random_state.*-1"),
    "random_state: text": ({"random_state": "a"}, (ValueError, TypeError), "random_state.*'a'"),
}


@pytest.mark.parametrize("name", BAD)
def test_parameters_that_cannot_be(name):
    params, error, message = BAD[name]
    with pytest.raises(error, match=message):
        branched(**params).fit(X, Y)


@pytest.mark.parametrize("memory_limit", ["1G", -1, 2.5])
def test_a_memory_limit_that_is_no_number_of_bytes(memory_limit):
    with pytest.raises(ValueError, match="memory_limit must be a number of bytes"):
        branched(memory_limit=memory_limit).fit(X, Y)
    fitted = branched().fit(X, Y).calibrate(*VAL).set_params(memory_limit=memory_limit)
    with pytest.raises(ValueError, match="memory_limit must be a number of bytes"):
        fitted.predict(X)


def test_modules_without_macs():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.scale = nn.BatchNorm2d(1), nn.Flatten()

        def forward(self, x):
            return self.scale(self.first(x))[:, :10] * 2

    with pytest.raises(ValueError, match="cost='macs' found no multiply-accumulates"):
        branched(Sums().eval(), exits=["first"], classes=None).fit(X, Y)


@pytest.mark.parametrize("limit", [float("nan"), None, "0.4", [0.4]])
def test_a_limit_that_is_no_number(model, limit):
    with pytest.raises(ValueError, match="limit must be a finite relative cost"):
        model.predict_anytime(X, limit)


@pytest.mark.parametrize("budget", [float("nan"), "0.3", [0.5]])
def test_a_budget_that_is_no_number(model, budget):
    with pytest.raises(ValueError, match="budget must be a finite relative cost"):
        model.predict(X, budget=budget)


def test_too_few_samples_to_hold_out():
    with pytest.raises(
        ValueError, match="calibration needs samples besides one of each class to fit on; got 3 samples"
    ):
        branched().fit(X[:3], np.arange(3))


def test_a_diverging_training_says_so():
    with pytest.raises(FloatingPointError, match=r"training heads: .*Lower lr"):
        branched(head="mlp", recipe=FrozenRecipe(lr=1e30, epochs=5)).fit(X, Y)


# -- a failed call leaves the estimator as it was ---------------------------------------------------------------------


class FailingRecipe:
    def train(self, heads, cache, rows, targets, *, random_state=0, verbose=0):
        with torch.no_grad():
            for head in heads:
                for parameter in head.parameters():
                    parameter.zero_()
        raise ValueError("no more")


DATA_FAILURES = {
    "not finite, in the last batch": lambda model, call: call(spoiled(np.nan), Y),
    "labels outside": lambda model, call: call(X, Y + 1),
    "empty": lambda model, call: call(X[:0], Y[:0]),
    "budget": lambda model, call: (model.set_params(budget=1e-4), call(X, Y)),
    "cost": lambda model, call: (model.set_params(cost=[1]), call(X, Y)),
    "classes": lambda model, call: (model.set_params(classes=["a"]), call(X, Y)),
    "confidence": lambda model, call: (model.set_params(confidence=lambda logits: logits / 0), call(X, Y)),
    "calibrator": lambda model, call: (model.set_params(calibrator=ThresholdCalibrator("no")), call(X, Y)),
}
FIT_FAILURES = DATA_FAILURES | {
    "backbone": lambda model, call: (model.set_params(backbone=3), call(X, Y)),
    "classifier": lambda model, call: (model.set_params(backbone=MLPClassifier()), call(X, Y)),
    "exits": lambda model, call: (model.set_params(exits=["four"]), call(X, Y)),
    "head": lambda model, call: (model.set_params(head="four"), call(X, Y)),
    "recipe": lambda model, call: (model.set_params(recipe=FailingRecipe()), call(X, Y)),
    "held out": lambda model, call: (model.set_params(calibration_size=3), call(X, Y)),
}


def learned(model):
    return {name: value for name, value in vars(model).items() if name not in model.get_params(deep=False)}


def assert_untouched(model, failure, call):
    before = learned(model)
    with pytest.raises((ValueError, TypeError)):
        failure(model, call)
    after = learned(model)
    assert before.keys() == after.keys()
    assert all(after[name] is value for name, value in before.items())


@pytest.mark.parametrize("failure", FIT_FAILURES)
def test_a_failed_fit_changes_nothing(fitted, failure):
    answers, losses = fitted.predict_proba(X), fitted.history_
    backbone = fitted.backbone
    assert_untouched(fitted, FIT_FAILURES[failure], fitted.fit)
    fitted.set_params(**branched(backbone).get_params(deep=False))
    assert fitted.predict_proba(X).tobytes() == answers.tobytes()
    assert fitted.history_ is losses


@pytest.mark.parametrize("failure", DATA_FAILURES)
def test_a_failed_calibration_changes_nothing(failure):
    fitted = branched().fit(X, Y)
    assert_untouched(fitted, DATA_FAILURES[failure], fitted.calibrate)
    assert fitted.self_calibrated_ is True


@pytest.mark.parametrize("failure", FIT_FAILURES)
def test_a_failed_first_fit_leaves_it_unfitted(failure):
    model = branched()
    assert_untouched(model, FIT_FAILURES[failure], model.fit)
    assert learned(model) == {}
    with pytest.raises(NotFittedError):
        model.predict(X)
