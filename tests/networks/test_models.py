import copy

import numpy as np
import pytest
import timm
import torch
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from timm.models import save_for_hf
from torch import nn

from adaptexit.networks.models import (
    SMALLEST_PROBABILITY,
    ScikitModel,
    TorchModel,
    build_model,
    is_fitted,
    is_scikit,
)
from adaptexit.networks.preprocessing import TimmPreprocess
from adaptexit.staging.contexts import evaluating

# -- building ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_timm(tmp_path_factory):
    """A tiny timm model with weights of its own, and a name under which timm finds them."""
    folder = tmp_path_factory.mktemp("timm") / "tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = timm.create_model("test_efficientnet", num_classes=5).eval()
        nn.init.normal_(net.classifier.weight)
    save_for_hf(net, folder)
    return net, f"local-dir:{folder}"


def test_a_timm_name_loads_pretrained_weights(saved_timm):
    net, name = saved_timm
    model = build_model(name, "auto", "base")
    assert not any(module.training for module in model.module.modules())
    x = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        expected = net(timm_normalised(net, x))
        assert expected.std() > 0.01
        assert torch.equal(model(x), expected)
    assert isinstance(model.preprocess, TimmPreprocess)


def timm_normalised(net, x):
    mean, std = (torch.tensor(net.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    return (x - mean) / std


def test_a_timm_module_is_preprocessed_too(saved_timm):
    net, _ = saved_timm
    x = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(build_model(net, "auto", "base")(x), net(timm_normalised(net, x)))
        assert torch.equal(build_model(net, None, "base")(x), net(x))


def test_a_module_is_shared():
    net = nn.Linear(3, 2)
    model = build_model(net, "auto", "saver")
    assert model.module is net
    assert model.preprocess is None
    assert model.label == "saver"
    assert torch.equal(model(torch.ones(1, 3)), net(torch.ones(1, 3)))


def test_a_factory_is_called():
    model = build_model(lambda: nn.Linear(3, 2), None, "base")
    assert isinstance(model, TorchModel)
    assert model(torch.ones(4, 3)).shape == (4, 2)


def test_a_preprocessing_callable_is_applied():
    net = nn.Linear(3, 2)
    x = torch.rand(4, 3)
    assert torch.equal(build_model(net, lambda x: x * 2 + 1, "base")(x), net(x * 2 + 1))


def test_inputs_take_the_dtype_of_the_parameters():
    net = nn.Linear(3, 2)
    assert build_model(net, None, "base")(torch.ones(1, 3, dtype=torch.float64)).dtype == torch.float32
    assert build_model(net.double(), None, "base")(torch.ones(1, 3)).dtype == torch.float64


def test_integer_inputs_are_left_to_modules_that_take_them():
    net = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    tokens = torch.tensor([[0, 4], [2, 2]])
    assert torch.equal(build_model(net, None, "base")(tokens), net(tokens))


def test_integer_images_need_preprocessing():
    with pytest.raises(
        TypeError, match=r"X must hold floats for base.*without preprocessing; got images of torch.uint8"
    ):
        build_model(nn.Conv2d(3, 2, 1), None, "base")(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


@pytest.fixture
def classifier():
    X = np.random.default_rng(0).normal(size=(60, 4))
    return LogisticRegression().fit(X, np.array(["no", "yes"])[(X[:, 0] > 0).astype(int)])


def test_a_classifier_answers_with_log_probabilities(classifier):
    model = build_model(classifier, "auto", "saver")
    x = torch.randn(5, 2, 2, dtype=torch.float64)
    assert isinstance(model, ScikitModel)
    assert model.classes.tolist() == ["no", "yes"]
    proba = classifier.predict_proba(x.numpy().reshape(5, 4))
    np.testing.assert_allclose(np.exp(model(x).numpy()), proba, rtol=1e-12)


def test_probabilities_of_zero_have_a_finite_logarithm():
    X, y = np.zeros((4, 1)), [0, 0, 0, 1]
    model = build_model(DummyClassifier(strategy="most_frequent").fit(X, y), None, "saver")
    assert model(torch.zeros(1, 1)).tolist() == [[0.0, np.log(SMALLEST_PROBABILITY)]]


def test_what_counts_as_a_fitted_classifier(classifier):
    assert is_scikit(classifier)
    assert is_scikit(make_pipeline(StandardScaler(), classifier))
    assert not any(is_scikit(other) for other in (LinearRegression(), LogisticRegression, nn.Linear(1, 1), "resnet18"))
    assert is_fitted(classifier)
    assert not is_fitted(LogisticRegression())


# -- errors of building -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [3, None, LinearRegression, LogisticRegression, nn.Linear, [nn.Linear(1, 1)]])
def test_things_that_are_no_model(given):
    with pytest.raises(TypeError, match=r"base must be a timm model name, a factory.*got"):
        build_model(given, "auto", "base")


def a_model(x, scale=2.0):
    return x * scale


@pytest.mark.parametrize("model", [a_model, lambda x: x, torch.relu_, torch.nn.functional.gelu])
def test_a_function_that_is_the_model_itself(model):
    with pytest.raises(TypeError, match=r"base must be a module, or a factory .*If it is the model itself, put"):
        build_model(model, None, "base")


def test_a_factory_whose_arguments_have_defaults():
    assert isinstance(build_model(lambda width=3: nn.Linear(width, 2), None, "base").module, nn.Linear)


def test_a_factory_of_something_else():
    with pytest.raises(TypeError, match=r"saver\[1\], called as a factory, must return an nn.Module; got int"):
        build_model(lambda: 3, "auto", "saver[1]")


def test_a_timm_name_that_does_not_exist():
    with pytest.raises(
        ValueError, match=r"base must be the name of a timm model; got 'resnet1888'. Near it are .*resnet18"
    ):
        build_model("resnet1888", "auto", "base")
    with pytest.raises(ValueError, match=r"'no_such_network'. See timm.list_models"):
        build_model("no_such_network", "auto", "base")


def test_a_classifier_without_probabilities():
    with pytest.raises(TypeError, match=r"base must offer predict_proba; LinearSVC does not.*CalibratedClassifierCV"):
        build_model(LinearSVC(), "auto", "base")


def test_a_classifier_that_is_not_fitted():
    with pytest.raises(NotFittedError):
        build_model(LogisticRegression(), "auto", "base")


def test_a_classifier_with_preprocessing(classifier):
    with pytest.raises(ValueError, match=r"preprocessing of saver must be left out.*Put it into a Pipeline"):
        build_model(classifier, lambda x: x, "saver")


@pytest.mark.parametrize("preprocess", ["timm", 3, ["auto"]])
def test_preprocessing_that_is_none(preprocess):
    with pytest.raises(ValueError, match=r"preprocessing of base must be 'auto' .* None, .* or a callable.*got"):
        build_model(nn.Linear(1, 1), preprocess, "base")


@pytest.mark.parametrize(("form", "name"), [(lambda x: [x], "list"), (lambda x: {"answers": x}, "dict")])
def test_a_module_that_returns_no_tensor(form, name):
    class Wrapped(nn.Module):
        def forward(self, x):
            return form(x)

    with pytest.raises(
        TypeError,
        match=rf"base must return a tensor of logits \(B, C\), or an object with .logits; got {name}. Wrap the module",
    ):
        build_model(Wrapped(), None, "base")(torch.zeros(1, 2))


# -- modules are given back as they were ------------------------------------------------------------------------------


def mixed_modes():
    """A net in training mode with one layer frozen in evaluation mode."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.9)), nn.Linear(4, 2)).train()
    net[1][0].eval()
    net[0].weight.requires_grad_(False)
    return net


def modes(net):
    return [module.training for module in net.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_given_back_submodule_by_submodule(fails):
    nets = [mixed_modes(), nn.Linear(4, 2).eval(), nn.Dropout().train()]
    before, state = [modes(net) for net in nets], copy.deepcopy(nets[0].state_dict())
    models = [build_model(net, None, "base") for net in nets]
    called = []
    nets[0].register_forward_hook(lambda module, inputs, output: called.append(module.training))

    def use():
        with evaluating(nets):
            assert not any(any(modes(net)) for net in nets)
            models[0](torch.randn(3, 4))
            if fails:
                raise KeyError("stop")

    if fails:
        with pytest.raises(KeyError):
            use()
    else:
        use()
    assert [modes(net) for net in nets] == before
    assert called == [False]
    assert [p.requires_grad for p in nets[0].parameters()] == [False, True, True, True, True, True]
    assert all(torch.equal(value, state[key]) for key, value in nets[0].state_dict().items())


def test_the_same_module_twice_is_given_back():
    net = mixed_modes()
    before = modes(net)
    with evaluating([net, net]):
        assert not any(modes(net))
    assert modes(net) == before


def test_the_random_state_is_given_back():
    before = torch.random.get_rng_state()
    with evaluating([]):
        torch.rand(3)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_models_go_to_a_device_and_data_follow():
    model = build_model(lambda: nn.Linear(3, 2), None, "base", "cuda")
    assert model.device.type == "cuda"
    assert model(torch.ones(1, 3)).device.type == "cuda"


def test_a_device_for_names_and_factories_only():
    assert build_model(lambda: nn.Linear(3, 2), None, "base", "meta").device.type == "meta"
    assert build_model(nn.Linear(3, 2), None, "base", "meta").device.type == "cpu"
    assert build_model(lambda: nn.Linear(3, 2), None, "base").device.type == "cpu"
