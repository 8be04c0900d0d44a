"""Quantised, scripted and frozen models: what they can be, their weights as plain tensors, their saves."""

import copy
import warnings
from functools import wraps

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.ao import quantization

import adaptexit
from adaptexit import CascadeSaver
from adaptexit.exceptions import SplitError
from adaptexit.networks.weights import can_be_set, plain_weights
from adaptexit.staging.splitting import split
from adaptexit.training.feature_store import cache_key
from tests.nets import branched, branched_trained, digits, flat_head, large_trained, small_net, small_trained

TRAIN, VAL, TEST = digits()
IMAGES = torch.from_numpy(TRAIN[0][:64])

pytestmark = pytest.mark.filterwarnings("ignore::adaptexit.LabelWarning")


def quietly(make):
    """Without what torch says of its own deprecations while it makes them."""

    @wraps(make)
    def made(*args):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(*args)

    return made


@quietly
def frozen(model):
    return torch.jit.freeze(torch.jit.script(model.eval()))


@quietly
def scripted(model):
    return torch.jit.trace(model.eval(), IMAGES[:2])


@quietly
def dynamic(model, dtype=torch.qint8):
    return quantization.quantize_dynamic(model, {nn.Linear, nn.LSTM}, dtype=dtype)


def half(model):
    return dynamic(model, torch.float16)


@quietly
def static(model):
    model = nn.Sequential(quantization.QuantStub(), model, quantization.DeQuantStub()).eval()
    model.qconfig = quantization.get_default_qconfig()
    quantization.prepare(model, inplace=True)
    model(IMAGES)
    return quantization.convert(model).eval()


KINDS = {"frozen": frozen, "scripted": scripted, "dynamic": dynamic, "half": half, "static": static}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def changed(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.5
    return model


# -- weights as plain tensors ------------------------------------------------------------------------------------------


@every_kind
def test_weights_are_tensors_that_a_file_holds_and_tell_models_apart(make, tmp_path):
    one, again, other = (plain_weights(make(m)) for m in (small_net_of(1), small_net_of(1), small_net_of(2)))
    assert one.keys() == again.keys() == other.keys()
    assert sum(tensor.numel() for tensor in one.values()) >= 10 * 16
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in one.items()}, tmp_path / "weights")
    assert all(torch.equal(tensor, one[key]) for key, tensor in load_file(tmp_path / "weights").items())


def small_net_of(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return small_net().eval()


def test_ordinary_modules_have_their_state():
    model = branched_trained()
    assert plain_weights(model).keys() == model.state_dict().keys()
    assert can_be_set(model)
    assert not can_be_set(dynamic(model))
    assert not can_be_set(frozen(copy.deepcopy(model)))


@quietly
def quantised(values, per_channel):
    if per_channel:
        scales, zeros = torch.tensor([0.01, 0.02, 0.04]), torch.zeros(3, dtype=torch.long)
        return torch.quantize_per_channel(values, scales, zeros, 0, torch.qint8)
    return torch.quantize_per_tensor(values, 0.02, 3, torch.qint8)


@pytest.mark.parametrize("per_channel", [False, True])
def test_quantised_tensors_come_in_pieces(per_channel):
    values = torch.linspace(-1, 1, 12).reshape(3, 4)
    module = nn.Module()
    if per_channel:
        tensor = torch.quantize_per_channel(
            values, torch.tensor([0.01, 0.02, 0.04]), torch.zeros(3).long(), 0, torch.qint8
        )
    else:
        tensor = torch.quantize_per_tensor(values, 0.02, 3, torch.qint8)
    module.register_buffer("weight", tensor)
    pieces = plain_weights(module)
    assert pieces.keys() == {"weight.integers", "weight.scale", "weight.zero_point"}
    scale, zero = (pieces[f"weight.{part}"].reshape(-1, 1) for part in ("scale", "zero_point"))
    assert torch.allclose((pieces["weight.integers"] - zero) * scale, module.weight.dequantize().double())


def test_packed_recurrent_layers_come_in_pieces():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 5)

    weights = plain_weights(dynamic(Recurrent()))
    assert sum(tensor.numel() for tensor in weights.values() if tensor.dtype == torch.float32) >= 2 * 4 * 5
    assert all(isinstance(tensor, torch.Tensor) for tensor in weights.values())


def test_a_state_that_is_no_tensor_is_refused_by_name():
    class Stateful(nn.Linear):
        def get_extra_state(self):
            return object()

    with pytest.raises(TypeError, match=r"got _extra_state, a object\. Return plain tensors from get_extra_state"):
        plain_weights(Stateful(2, 3))
    cache_key(Stateful(2, 3), ["cut"], ["mean"])  # features can be cached all the same


@pytest.mark.parametrize("make", [half, static])
def test_features_of_other_quantised_weights_are_others(make):
    keys = [cache_key(make(m), ["one"], ["mean"]) for m in (branched_trained(), branched_trained(), other_last_layer())]
    assert keys[0] == keys[1] != keys[2]


def other_last_layer():
    model = copy.deepcopy(branched_trained())
    with torch.no_grad():
        model.out.weight *= -1
    return model


# -- in estimators -----------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("role", ["base", "saver"])
def test_they_serve_as_base_and_saver_and_are_saved(make, role, tmp_path):
    models = {"base": large_trained(), "saver": small_trained()}
    models[role] = make(copy.deepcopy(models[role]))
    cascade = CascadeSaver(**models, cost=[1.0, 20.0]).fit(*VAL)
    labels = cascade.predict(TEST[0])
    assert np.mean(labels == TEST[1]) > 0.85
    cascade.save(tmp_path / "saved")
    again = dict(models)
    again[role] = make(copy.deepcopy({"base": large_trained(), "saver": small_trained()}[role]))
    assert adaptexit.load(tmp_path / "saved", **again).predict(TEST[0]).tolist() == labels.tolist()


@pytest.mark.parametrize("make", [frozen, dynamic, half, static])
def test_they_are_not_loaded_with_other_weights(make, tmp_path):
    CascadeSaver(large_trained(), make(copy.deepcopy(small_trained())), cost=[1.0, 20.0]).fit(*VAL).save(tmp_path / "s")
    with pytest.raises(
        ValueError, match=r"saver must be given with the weights .*quantised or frozen .* cannot be set"
    ):
        adaptexit.load(tmp_path / "s", base=large_trained(), saver=make(changed(small_trained())))


@every_kind
def test_images_of_another_precision_are_converted(make):
    model = make(copy.deepcopy(small_trained()))
    cascade = CascadeSaver(large_trained(), model, cost=[1.0, 20.0]).fit(*VAL)
    assert cascade.predict(TEST[0].astype(np.float64)).tolist() == cascade.predict(TEST[0]).tolist()


@pytest.mark.parametrize(
    ("make", "exits"), [(half, ["one", "two", "three"]), (static, ["1.one.0", "1.two", "1.three.0"])]
)
def test_backbones_whose_samples_stay_independent_are_split(make, exits, tmp_path):
    layout = dict.fromkeys(exits, "NCHW")
    backbone = make(copy.deepcopy(branched_trained()))
    model = branched(backbone, exits=exits, layout=layout, cost=[1, 2, 3, 4]).fit(*TRAIN).calibrate(*VAL)
    traced = model.trace(TEST[0][:60], budget=0.6)
    singles = [model.trace(image[None], budget=0.6) for image in TEST[0][:60]]
    assert traced.labels.tolist() == [int(single.labels[0]) for single in singles]
    assert traced.exits.tolist() == [int(single.exits[0]) for single in singles]
    assert len(set(traced.exits.tolist())) > 1
    model.save(tmp_path / "saved")
    loaded = adaptexit.load(tmp_path / "saved", backbone=backbone, head=flat_head)
    assert loaded.predict(TEST[0][:60], budget=0.6).tolist() == traced.labels.tolist()


def test_quantised_convolutions_tell_their_layout():
    backbone = static(copy.deepcopy(branched_trained()))
    network = branched(backbone, exits=["1.one.0", "1.two.0"], cost=[1, 2, 3]).fit(*TRAIN)
    assert [head.spec.layout for head in list(network.heads_)[:-1]] == ["NCHW", "NCHW"]


def test_backbones_whose_samples_hang_together_are_refused_with_the_reason():
    words = (
        r"'out' is quantised dynamically, with scales taken from the whole batch, .*none may leave\. Split the model"
    )
    with pytest.raises(SplitError, match=words):
        split(dynamic(copy.deepcopy(branched_trained())), ["one"], IMAGES)
    for make in (frozen, scripted):
        with pytest.raises(TypeError, match=r"got TorchScript .* Give the module that it was scripted or traced from"):
            branched(make(copy.deepcopy(branched_trained()))).fit(*TRAIN)
