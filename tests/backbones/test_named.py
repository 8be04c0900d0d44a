"""Networks built with exits that an estimator is given by their names."""

import numpy as np
import pytest
import torch
from sklearn.base import clone

import adaptexit
from adaptexit import CascadeSaver, FrozenRecipe, JointRecipe, MultiExitClassifier
from adaptexit.backbones import NAMED, fusion_stem_cifar
from adaptexit.networks.build import as_module
from tests.nets import digits
from tests.training.test_joint import assert_equal_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore::adaptexit.CalibrationWarning"),
    pytest.mark.filterwarnings("ignore::adaptexit.LabelWarning"),
]
QUICK = JointRecipe(epochs=1, batch_size=30, lr=0.01)
NAME = "fusion_stem_cifar"


def colours(part, n):
    """Digits as small colour images (n, 3, 16, 16)."""
    X, y = digits()[part]
    return np.repeat(np.repeat(X[:n], 2, axis=2), 2, axis=3).repeat(3, axis=1), y[:n]


X, Y = colours(0, 40)


def named(name=NAME, **params):
    return MultiExitClassifier(name, **({"classes": range(10), "recipe": QUICK} | params))


@pytest.fixture(scope="module")
def fitted():
    """Tests only ask it questions."""
    return named().fit(X, Y)


def module_of(model):
    return model._network.model.module


def test_it_is_that_network_for_those_classes(fitted):
    assert type(module_of(fitted)) is type(fusion_stem_cifar())
    assert fitted.exits_ == [f"exit {k}" for k in range(5)]
    assert {head.linear.out_features for head in module_of(fitted).heads} == {10}
    assert fitted.predict(X).shape == (40,)
    assert set(fitted.predict(X)) <= set(range(10))
    assert not module_of(fitted).training


@pytest.mark.parametrize(("name", "classes", "n_classes"), [
    (NAME, "abc", 3), pytest.param("msdnet_cifar_budgeted", "xy", 2, marks=pytest.mark.slow),
])  # fmt: skip
def test_classes_say_how_wide_the_answers_are(name, classes, n_classes):
    labels = np.array(list(classes))[np.arange(len(X)) % n_classes]
    model = named(name, classes=sorted(classes)).fit(X, labels)
    assert {head.linear.out_features for head in module_of(model).heads} == {n_classes}
    assert set(model.predict(X)) <= set(classes)


@pytest.mark.parametrize("name", sorted(NAMED))
def test_every_name_is_a_factory_for_so_many_classes(name):
    with torch.device("meta"):
        net = as_module(name, ["a", "b", "c"])()
    assert (net.linear if hasattr(net, "linear") else net.heads[-1].linear).out_features == 3
    assert not net.training


def test_without_classes_it_has_as_many_as_its_data_set():
    with torch.device("meta"):
        assert as_module(NAME, None)().heads[0].linear.out_features == 10
        assert as_module("msdnet_imagenet", None)().heads[0].linear.out_features == 1000


def test_seeds_say_what_weights_it_begins_with():
    one, same, other = (as_module(NAME, range(4), seed)().state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(value, same[key]) for key, value in one.items())
    assert not torch.equal(one["stages.0.0.module.conv1.conv.weight"], other["stages.0.0.module.conv1.conv.weight"])


def test_equal_seeds_give_equal_weights_and_leave_the_global_random_states_alone(fitted):
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = torch.rand(2), np.random.rand(2)  # noqa: NPY002
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    assert_equal_weights(fitted, clone(named()).fit(X, Y))
    assert torch.equal(torch.rand(2), expected[0])
    assert (np.random.rand(2) == expected[1]).all()  # noqa: NPY002


def test_other_seeds_give_other_weights(fitted):
    other = named(random_state=7, recipe=JointRecipe(epochs=1, batch_size=30, lr=1e-12)).fit(X, Y)
    first, second, drawn = (
        next(net.parameters()) for net in (module_of(fitted), module_of(other), as_module(NAME, range(10), 7)())
    )
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, drawn)


def test_parameters_stay_as_they_were_given(fitted):
    assert fitted.backbone == NAME
    assert fitted.classes == range(10)
    assert clone(fitted).get_params(deep=False)["backbone"] == NAME


def test_it_is_saved_and_comes_back_by_name_alone(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    loaded = adaptexit.load(tmp_path / "model")
    assert loaded.backbone == NAME
    assert list(loaded.classes) == list(range(10))
    assert_equal_weights(loaded, fitted)
    np.testing.assert_array_equal(loaded.predict(X), fitted.predict(X))
    assert loaded.history_ == fitted.history_


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["auto", "trained", "frozen", FrozenRecipe()])
def test_without_joint_training_it_is_refused_with_the_way_out(recipe):
    with pytest.raises(ValueError, match=rf"recipe must be 'joint' for '{NAME}'.*adaptexit\.backbones\.{NAME}\(\)"):
        named(recipe=recipe).fit(X, Y)


@pytest.mark.parametrize("name", ["chase_cifra", "msdnet_cifar_anytim", "Ranet_cifar"])
def test_names_that_are_misspelt_lead_to_the_right_ones(name):
    right = {"chase_cifra": "chase_cifar", "msdnet_cifar_anytim": "msdnet_cifar_anytime", "Ranet_cifar": "ranet_cifar"}
    with pytest.raises(ValueError, match=rf"got '{name}'. Near it are .*{right[name]}"):
        named(name).fit(X, Y)


@pytest.mark.parametrize("place", [0, 1])
def test_a_cascade_needs_trained_weights(place):
    models = [as_module(NAME, None)(), as_module(NAME, None)()]
    models[place] = NAME
    with pytest.raises(ValueError, match=rf"must have trained weights; got '{NAME}'.*adaptexit\.backbones\.{NAME}\(\)"):
        CascadeSaver(*models).fit(X, Y)


@pytest.mark.parametrize(
    ("params", "message"), [({"exits": 2}, "exits must be left"), ({"head": "mlp"}, "head must be")]
)
def test_what_says_how_exits_are_made_is_refused(params, message):
    with pytest.raises(ValueError, match=message):
        named(**params).fit(X, Y)


def test_labels_that_are_no_classes_are_refused():
    with pytest.raises(ValueError, match="classes"):
        named(classes=range(4)).fit(X, Y)
