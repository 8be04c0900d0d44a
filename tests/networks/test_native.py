import copy

import numpy as np
import pytest
import torch
from torch import nn

from adaptexit import EMRouter, FrozenRecipe, MultiExitClassifier, SplitError, ThresholdCalibrator
from adaptexit.networks.models import build_model
from adaptexit.networks.native import NativeNetwork, is_native
from adaptexit.networks.readers import LogitsReader
from tests.contract.cases import fitted_once
from tests.nets import NativeNet, branched_model, branched_trained, digits, native_net
from tests.networks.stand_ins import FORMS, Wrapped

TRAIN, VAL, TEST = digits()
STAGE_MACS = [1 * 8 * 9 * 64, 8 * 16 * 9 * 16, 16 * 32 * 9 * 16]
HEAD_MACS = [16 * 8 * 10, 16 * 16 * 10, 128 * 10]


def native(net, label="backbone"):
    return NativeNetwork(build_model(net, None, label))


# -- the network ------------------------------------------------------------------------------------------------------


def test_stages_and_heads_are_the_modules_own():
    net = native_net()
    network = native(net)
    assert network.stages is net.stages
    assert network.heads is net.heads
    assert network.modules == [net]
    assert network.exit_names == ["exit 0", "exit 1", "full model"]
    assert not network.chained
    wrapped = native(nn.DataParallel(net))
    assert wrapped.heads is net.heads


def test_running_it_is_running_stages_and_heads_by_hand():
    net = native_net()
    network, x = native(net), torch.from_numpy(TEST[0][:9])
    with torch.inference_mode():
        expected, carried = net(x), network.prepare(x)
        for k in range(3):
            carried = network.stage(k, carried)
            output, onward = network.exit(k, carried)
            assert onward is carried
            assert torch.equal(output, expected[k])
            answer, _ = network.read(k, carried, logits=True, features=True)
            assert answer.predictions.tolist() == expected[k].argmax(1).tolist()
            inside = net.heads[k][:-1](carried)
            assert answer.features.tolist() == inside.tolist()


def test_costs_are_those_of_its_stages_and_heads():
    costs = native(native_net()).costs(torch.from_numpy(TEST[0][:2]))
    assert costs.stages.tolist() == STAGE_MACS
    assert costs.exits.tolist() == HEAD_MACS
    assert costs.unit == "MACs"
    by_hand = native(native_net()).costs(torch.from_numpy(TEST[0][:2]), [1, 3, 9])
    assert (by_hand.stages.tolist(), by_hand.exits.tolist()) == ([1, 2, 6], [0, 0, 0])
    with pytest.raises(ValueError, match=r"cost must not fall from exit to exit.*got \[1.0, 3.0, 2.0\]"):
        native(native_net()).costs(torch.from_numpy(TEST[0][:2]), [1, 3, 2])


def test_what_counts_as_built_with_exits():
    assert is_native(native_net())
    assert is_native(nn.DataParallel(native_net()))
    one_too_few = native_net()
    one_too_few.heads = one_too_few.heads[:-1]
    listed = native_net()
    listed.__dict__["stages"] = list(listed._modules.pop("stages"))
    assert not any(is_native(other) for other in (one_too_few, listed, branched_trained(), None))


@pytest.mark.parametrize(
    ("forward", "error", "message"),
    [
        (lambda whole, x: whole(2 * x - 0.5), SplitError, "exit 0 of the network answers otherwise through its stages"),
        (lambda whole, x: whole(x - x.mean()), SplitError, "exit 0 of the network answers otherwise"),
        (
            lambda whole, x: whole(x)[-1],
            ValueError,
            "a network with 3 exits must return a list of as many logits; got Ten",
        ),
        (
            lambda whole, x: whole(x)[:-1],
            ValueError,
            "a network with 3 exits must return a list of as many logits; got 2",
        ),
    ],
)
def test_it_answers_through_its_stages_as_through_its_forward(forward, error, message):
    class Other(NativeNet):
        def forward(self, x):
            return forward(super().forward, x)

    net = Other(branched_trained(), list(native_net().heads[:2])).eval()
    with pytest.raises(error, match=message):
        MultiExitClassifier(net).fit(*VAL)


@pytest.mark.parametrize("form", ["record", "strict dict"])
def test_its_heads_may_return_objects(form):
    net = native_net()
    net.heads = nn.ModuleList(Wrapped(head, FORMS[form]) for head in net.heads)
    model = MultiExitClassifier(net, calibrator=ThresholdCalibrator(search="geometric")).fit(*TRAIN).calibrate(*VAL)
    assert model.predict(TEST[0]).tolist() == fitted_once("native").predict(TEST[0]).tolist()


# -- in the estimator -------------------------------------------------------------------------------------------------


def test_it_is_only_calibrated():
    net = native_net()
    state = copy.deepcopy(net.state_dict())
    model = MultiExitClassifier(net, calibrator=ThresholdCalibrator(search="geometric")).fit(*TRAIN).calibrate(*VAL)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert model.exits_ == ["exit 0", "exit 1"]
    assert model.history_ == {}
    outputs = model.record(*TEST)
    with torch.inference_mode():
        logits = torch.stack(net(torch.from_numpy(TEST[0]))).numpy()
    assert outputs.predictions.tolist() == logits.argmax(axis=2).tolist()
    assert outputs.predictions.tolist() == branched_model().record(*TEST).predictions[[0, 1, 3]].tolist()


def test_answers_equal_a_hand_written_loop():
    model, net = fitted_once("native"), native_net()
    point = next(point for point in model.pareto().points if min(point.exit_rates) > 0.1)
    cutoffs, expected = point.cutoffs, []
    with torch.inference_mode():
        for i in range(150):
            logits = net(torch.from_numpy(TEST[0][i : i + 1]))
            k = next(k for k in range(3) if k == 2 or float(logits[k].softmax(dim=1).max()) > cutoffs[k])
            expected.append((int(logits[k].argmax()), k))
    trace = model.trace(TEST[0][:150], budget=point.cost)
    assert list(zip(trace.labels.tolist(), trace.exits.tolist(), strict=True)) == expected
    assert len(set(trace.exits.tolist())) == 3


def test_thresholds_come_from_fit_until_it_is_calibrated():
    model = MultiExitClassifier(native_net(), calibrator=ThresholdCalibrator(search="geometric")).fit(*VAL)
    assert model.self_calibrated_ is True
    assert model.outputs_.n_samples == len(VAL[1])
    assert model.calibrate(*VAL).self_calibrated_ is False


def test_it_needs_no_labels():
    model = MultiExitClassifier(native_net(), calibrator=ThresholdCalibrator(search="geometric")).fit(TRAIN[0])
    assert model.calibrate(VAL[0]).pareto().full_accuracy == 1.0
    assert model.calibrate(*VAL).pareto().full_accuracy < 1.0


def test_routers_learn_from_other_samples_than_thresholds():
    router = EMRouter(prior="per_sample", epochs=1, search="geometric")
    model = MultiExitClassifier(native_net(), calibrator=router, calibration_size=0.25).fit(*TRAIN)
    assert model.training_outputs_.n_samples + model.outputs_.n_samples == len(TRAIN[1])
    assert model.outputs_.n_samples == pytest.approx(0.25 * len(TRAIN[1]), abs=1)
    assert len(model.calibrator_.posterior_.log_responsibilities) == model.training_outputs_.n_samples
    assert [feature.shape[1] for feature in model.outputs_.features] == [head[-1].in_features for head in model.heads_]
    assert model.calibrator_._reads_logits is False


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exits", ["stages.0"]), ("exits", 1), ("head", "nosuchhead"), ("head", "mlp"), ("layout", "NCHW"),
        ("cache_dir", "somewhere"), ("cache_half", True),
    ],
)  # fmt: skip
def test_parameters_that_mean_nothing_to_it_are_refused(name, value):
    with pytest.raises(
        ValueError, match=rf"{name} must be left at .* for a network built with exits, whose heads are its own"
    ):
        MultiExitClassifier(native_net(), **{name: value}).fit(*VAL)


@pytest.mark.parametrize("recipe", ["calexnet", FrozenRecipe()])
def test_a_recipe_that_trains_heads_alone_is_refused(recipe):
    with pytest.raises(ValueError, match=r"recipe must be 'trained' .* or 'joint' for a network built with exits; got"):
        MultiExitClassifier(native_net(), recipe=recipe).fit(*VAL)


def test_a_reader_of_its_own_confidence():
    network = native(native_net())
    network.reader = LogitsReader("margin")
    x = torch.from_numpy(TEST[0][:5])
    with torch.inference_mode():
        answer, _ = network.read(0, network.stage(0, x))
        top = native_net()(x)[0].softmax(1).topk(2).values
    np.testing.assert_allclose(answer.scores, top[:, 0] - top[:, 1], rtol=1e-4)
