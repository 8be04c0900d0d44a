import copy
import re

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.svm import LinearSVC
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from adaptexit import FrozenRecipe, MultiExitClassifier
from adaptexit.exceptions import SplitError
from adaptexit.heads import MLPHead
from tests.contract.cases import learned
from tests.nets import branched, branched_model, branched_trained, digits, flat_head

TRAIN, VAL, TEST = digits()
X, Y = TRAIN[0][:200], TRAIN[1][:200]


@pytest.fixture(scope="module")
def model():
    """Tests only ask it questions."""
    return branched_model()


# -- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 3, 8, 8), (9, 64)])
def test_images_that_the_backbone_does_not_take(shape):
    with pytest.raises(RuntimeError) as caught:
        branched().fit(np.zeros(shape, dtype=np.float32), np.arange(9))
    assert any("This is backbone, run on inputs of shape (8, " in note for note in caught.value.__notes__)


# -- labels -----------------------------------------------------------------------------------------------------------


def test_labels_for_some_samples_only(model):
    class Half(IterableDataset):
        def __iter__(self):
            yield torch.from_numpy(X[:50]), torch.from_numpy(Y[:50])
            yield torch.from_numpy(X[50:])

    loader = DataLoader(Half(), batch_size=None)
    for call in (branched().fit, copy.copy(model).calibrate):
        with pytest.raises(ValueError, match="X must give a label for every sample or for none; got 50 of 200"):
            call(loader)


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
    "head: name": ({"head": "mpl"}, ValueError, "head must be one of linear, mlp, .*got 'mpl'.*Near it: mlp"),
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
    "recipe: name": (
        {"recipe": "frozn"},
        ValueError,
        "recipe must be one of 'auto', 'frozen', .*got 'frozn'. Near it is 'fr",
    ),
    "recipe: class": ({"recipe": FrozenRecipe}, TypeError, "recipe must be a name .*got <class"),
    "recipe: epochs": (
        {"recipe": FrozenRecipe(epochs=0)},
        ValueError,
        "epochs must be a whole number, at least 1 or 'auto'; got",
    ),
    "recipe: lr": ({"recipe": FrozenRecipe(lr=-1)}, ValueError, "lr must be a finite number above 0; got -1"),
    "cost: falling": ({"cost": [1, 3, 2, 4]}, ValueError, "cost must not fall from exit to exit"),
    "preprocess": ({"preprocess": "x"}, ValueError, "preprocessing of backbone must be 'auto' .*got 'x'"),
    "layout: name": ({"layout": "NHCW"}, ValueError, "layout must be one of NC, NLC, .*got 'NHCW'"),
    "layout: axes": ({"layout": "NLC"}, ValueError, r"layout NLC needs 2 axes .*got shape \(8, 8, 8\)"),
    "layout: cut": ({"layout": {"uno": "NCHW"}}, ValueError, r"layout must name cuts among \['one'.*got \['uno'\]"),
    "cache_dir": ({"cache_dir": __file__}, OSError, f"cache_dir must be .*{re.escape(__file__)}"),
    "cache_memory": ({"cache_memory": -1}, ValueError, "cache_memory must be .*number of bytes.; got -1"),
    "cache_memory: text": ({"cache_memory": "1G"}, ValueError, "cache_memory must be .*number of bytes.; got '1G'"),
    "random_state: below": ({"random_state": -1}, ValueError, "random_state.*-1"),
    "random_state: text": ({"random_state": "a"}, (ValueError, TypeError), "random_state.*'a'"),
}


@pytest.mark.parametrize("name", BAD)
def test_parameters_that_cannot_be(name):
    params, error, message = BAD[name]
    with pytest.raises(error, match=message):
        branched(**params).fit(X, Y)


def test_modules_without_macs():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.scale = nn.BatchNorm2d(1), nn.Flatten()

        def forward(self, x):
            return self.scale(self.first(x))[:, :10] * 2

    with pytest.raises(ValueError, match="cost='macs' found no multiply-accumulates"):
        branched(Sums().eval(), exits=["first"], classes=None).fit(X, Y)


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


MODEL_FAILURES = {
    "backbone": {"backbone": 3},
    "classifier": {"backbone": MLPClassifier()},
    "exits": {"exits": ["four"]},
    "head": {"head": "four"},
    "recipe": {"recipe": FailingRecipe()},
}


@pytest.mark.parametrize("failure", MODEL_FAILURES)
def test_a_failed_fit_changes_nothing(failure):
    fitted = copy.deepcopy(branched_model())
    before, answers, backbone = learned(fitted), fitted.predict_proba(X), fitted.backbone
    with pytest.raises((ValueError, TypeError)):
        fitted.set_params(**MODEL_FAILURES[failure]).fit(X, Y)
    assert learned(fitted).keys() == before.keys()
    assert all(learned(fitted)[name] is value for name, value in before.items())
    fitted.set_params(**branched(backbone).get_params(deep=False))
    assert fitted.predict_proba(X).tobytes() == answers.tobytes()
