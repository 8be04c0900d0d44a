import copy

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from timm.data import create_transform
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

PREPROCESS = TimmPreprocess((40, 40), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), "bicubic")


def picture(height, width, seed=0, low=0, high=256):
    """A PIL image and the same as a tensor (1, 3, H, W), uint8."""
    image = Image.fromarray(np.random.default_rng(seed).integers(low, high, (height, width, 3), dtype=np.uint8))
    return image, torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def timm_transform(preprocess, crop_pct=1.0):
    return create_transform(
        (3, *preprocess.size),
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=crop_pct,
    )


# -- preprocessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 40), (60, 40), (40, 77)])
def test_images_whose_shorter_side_fits_are_treated_as_by_timm(shape):
    image, pixels = picture(*shape)
    expected = timm_transform(PREPROCESS)(image)[None]
    assert expected.shape == (1, 3, 40, 40)
    torch.testing.assert_close(PREPROCESS(pixels / 255), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(PREPROCESS(pixels), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(20, 20), (55, 55), (130, 91), (30, 80), (80, 27)])
def test_other_sizes_are_resized_as_by_timm(shape, interpolation):
    preprocess = TimmPreprocess((40, 40), PREPROCESS.mean, PREPROCESS.std, interpolation)
    image, pixels = picture(*shape, low=60, high=200)
    expected = timm_transform(preprocess)(image)[None]
    grey_level = 1 / 255 / min(PREPROCESS.std)
    torch.testing.assert_close(preprocess(pixels / 255), expected, rtol=0, atol=1.5 * grey_level)


def test_resized_images_stay_within_0_and_1():
    plain = TimmPreprocess((40, 40), (0.0,) * 3, (1.0,) * 3, "bicubic")
    x = plain(picture(20, 20)[1] / 255)
    assert x.min() == 0.0
    assert x.max() == 1.0


def test_an_input_size_that_is_not_square():
    preprocess = TimmPreprocess((30, 50), (0.5,), (0.5,), "bilinear")
    ramp = torch.linspace(0, 1, 100).expand(1, 1, 90, 100)
    out = preprocess(ramp)
    assert out.shape == (1, 1, 30, 50)
    torch.testing.assert_close(out[0, 0, 0], out[0, 0, 29])
    assert (out[0, 0, 0].diff() > 0).all()


def test_a_batch_is_preprocessed_image_by_image():
    batch = torch.cat([picture(50, 60, seed)[1] for seed in range(3)])
    assert torch.equal(PREPROCESS(batch)[1:2], PREPROCESS(batch[1:2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floats_become_single_precision(dtype):
    x = picture(40, 40)[1] / 255
    assert PREPROCESS(x.to(dtype)).dtype == torch.float32
    torch.testing.assert_close(PREPROCESS(x.to(dtype)), PREPROCESS(x), rtol=0, atol=5e-3)


def test_the_input_is_not_changed():
    x = torch.rand(1, 3, 40, 40)
    before = x.clone()
    PREPROCESS(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("value", [-0.5, 1.5, 255.0])
def test_values_outside_0_and_1(value):
    x = torch.full((1, 3, 40, 40), 0.5)
    x[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"X must hold images in \[0, 1\] \(or uint8\).*got values from.*normalised"):
        PREPROCESS(x)


@pytest.mark.parametrize("shape", [(2, 1, 40, 40), (2, 40, 40, 3), (3, 40, 40), (2, 12)])
def test_images_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"X must be images of shape \(N, 3, H, W\) for this model; got shape \("):
        PREPROCESS(torch.zeros(shape))


def test_the_data_config_of_a_timm_model():
    net = timm.create_model("test_vit", num_classes=3)
    known = TimmPreprocess.of(net)
    config = net.pretrained_cfg
    assert known.size == config["input_size"][1:]
    assert (known.mean, known.std, known.interpolation) == (config["mean"], config["std"], config["interpolation"])


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
