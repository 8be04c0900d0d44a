import copy
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import adaptexit
from adaptexit import FullModelWarning, JointRecipe, MultiExitClassifier
from adaptexit.training.joint import JointTraining, trainable_parameters
from tests.nets import EXITS, branched_net, branched_trained, digits, flat_head, loader_of, native_net

TRAIN, VAL, TEST = digits()
pytestmark = [
    pytest.mark.filterwarnings("ignore::adaptexit.LabelWarning"),
    pytest.mark.filterwarnings("ignore::adaptexit.CalibrationWarning"),
]
QUICK = {"epochs": 2, "batch_size": 100, "lr": 0.02}


def joint(backbone=None, head=flat_head, **settings):
    """An unfitted classifier whose exits learn together with their network."""
    backbone = branched_trained() if backbone is None else backbone
    return MultiExitClassifier(backbone, EXITS, head=head, recipe=JointRecipe(**(QUICK | settings)))


def native(module=None, **settings):
    module = native_net() if module is None else module
    return MultiExitClassifier(module, recipe=JointRecipe(**(QUICK | settings)))


def weights_of(model):
    return {
        name: value.clone()
        for k, module in enumerate(model._network.modules)
        for name, value in ((f"{k}.{name}", value) for name, value in module.state_dict().items())
    }


def assert_equal_weights(one, other):
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def fitted():
    """Tests only ask it questions."""
    return joint(epochs=6).fit(*TRAIN).calibrate(*VAL)


def test_exits_are_better_than_frozen_ones_and_the_full_model_is_no_worse(fitted):
    frozen = MultiExitClassifier(branched_trained(), EXITS, head=flat_head, recipe=adaptexit.FrozenRecipe(epochs=10))
    frozen.fit(*TRAIN).calibrate(*VAL)
    learned, still = fitted.record(*TEST).accuracies, frozen.record(*TEST).accuracies
    assert np.mean(learned[:-1]) > np.mean(still[:-1]) + 0.01
    assert learned[-1] > still[-1] - 0.01


def test_what_users_will_ask_first_is_in_the_history():
    history = joint(epochs=6).fit(*TRAIN).history_
    told = history["full_model"]
    assert told.keys() == {"accuracy", "original_accuracy", "agreement", "n"}
    assert told["n"] == 150
    assert 0.8 < told["agreement"] <= 1
    assert np.shape(history["loss"]) == np.shape(history["accuracy"]) == (4, 6)
    assert len(history["heads"]["loss"]) == 3
    assert json.loads(json.dumps(history)) == history
    losses = np.array(history["loss"])
    assert losses[:, -1].sum() < losses[:, 0].sum()


def test_the_history_counts_what_was_met():
    """With nothing that moves, loss and accuracy of an epoch are those of the samples."""
    model = joint(epochs=1, lr=1e-12, head_lr=1e-12, batch_norm="freeze", teacher=None).fit(*TRAIN)
    held_in, _ = adaptexit.data.classes.hold_out(TRAIN[1], 0.25, 0)
    outputs = model.record(TRAIN[0][held_in], TRAIN[1][held_in])
    accuracy = np.array(model.history_["accuracy"])[:, 0]
    np.testing.assert_allclose(accuracy[:-1], outputs.accuracies[:-1], atol=1e-9)  # the last one has dropout


def test_the_users_module_is_not_changed():
    net = branched_trained().train()
    before, modes = copy.deepcopy(net.state_dict()), [part.training for part in net.modules()]
    model = joint(net).fit(*TRAIN)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [part.training for part in net.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    assert not any(part._forward_hooks for part in net.modules())
    assert model._network.model.module is not net


def test_equal_seeds_give_equal_weights_and_others_do_not():
    one, other = joint().fit(*TRAIN), clone(joint()).fit(*TRAIN)
    assert_equal_weights(one, other)
    different = joint().set_params(random_state=1).fit(*TRAIN)
    assert not torch.equal(different.stages_[0].model.one[0].weight, one.stages_[0].model.one[0].weight)


def test_global_random_states_are_left_alone():
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = torch.rand(2), np.random.rand(2)  # noqa: NPY002
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    joint(epochs=1, mixup=0.5).fit(*TRAIN)
    assert torch.equal(torch.rand(2), expected[0])
    assert (np.random.rand(2) == expected[1]).all()  # noqa: NPY002


@pytest.mark.parametrize(
    ("trainable", "moving"),
    [
        ("all", ["one", "two", "three", "out"]),
        ("norm", ["one.1", "two.1", "three.1"]),
        (["three", "out"], ["three", "out"]),
        (["*.0.weight"], ["one.0.weight", "two.0.weight", "three.0.weight"]),
    ],
)
def test_everything_trainable_moves_and_nothing_else_to_the_bit(trainable, moving):
    net = branched_trained()
    model = joint(net, trainable=trainable, batch_norm="learn" if trainable == "all" else "freeze").fit(*TRAIN)
    after = model._network.model.module.state_dict()
    counters = "num_batches_tracked", "running_mean", "running_var"
    for name, before in net.state_dict().items():
        learns = any(name.startswith(prefix) for prefix in moving)
        if name.endswith(counters):
            assert torch.equal(before, after[name]) == (trainable != "all"), name
        else:
            assert torch.equal(before, after[name]) != learns, name
    for head in model.heads_[:-1]:
        assert all(not parameter.requires_grad or parameter.grad is None for parameter in head.parameters())


def test_batch_statistics_of_layers_that_do_not_learn_stand_still():
    net = branched_trained()
    after = joint(net, trainable=["three.*"]).fit(*TRAIN)._network.model.module
    assert torch.equal(net.one[1].running_mean, after.one[1].running_mean)
    assert not torch.equal(net.three[1].running_mean, after.three[1].running_mean)


def test_an_average_leaves_batch_statistics_of_layers_that_do_not_learn_alone():
    net = branched_trained()
    after = joint(net, trainable=["three.*"], averaging="swa").fit(*TRAIN)._network.model.module
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(net.one[1], name), getattr(after.one[1], name))
        assert not torch.equal(getattr(net.three[1], name), getattr(after.three[1], name))


def test_what_a_head_keeps_still_does_not_learn():
    def head(spec, n_classes):
        net = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(spec.channels, 16), nn.Linear(16, n_classes)
        )
        net[2].requires_grad_(False)
        return net

    kept, moved = joint(head=head), joint(head=head, head_recipe=None)
    firsts = [model.fit(*TRAIN).heads_[0].net for model in (kept, moved)]
    assert torch.equal(firsts[0][2].weight, firsts[1][2].weight)
    assert not torch.equal(firsts[0][3].weight, firsts[1][3].weight)


def test_what_learns_by_its_name():
    net = branched_net()
    assert len(trainable_parameters(net, "all")) == 14
    assert len(trainable_parameters(net, "norm")) == 6
    assert trainable_parameters(net, ["out"]) == [net.out.weight, net.out.bias]
    with pytest.raises(ValueError, match=r"\['four'\] fits none of 14, as 'one.0.weight'"):
        trainable_parameters(net, ["out", "four"])
    with pytest.raises(ValueError, match="trainable must leave something to learn"):
        trainable_parameters(nn.Sequential(nn.Linear(2, 2)), "norm")


def rates_of(**settings):
    """Learning rates of the network and of the heads at every step."""
    steps = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            steps.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    joint(optimizer=lambda groups: Watched(groups, 0.1), head_recipe=None, **settings).fit(*TRAIN)
    return np.array(steps)


def test_the_rate_rises_and_falls_as_published():
    """450 samples in batches of 50: 9 steps an epoch, one epoch of warm-up, three of a half cosine."""
    rates = rates_of(epochs=4, batch_size=50, lr=0.1, head_lr=0.2, warmup_epochs=1.0)
    np.testing.assert_allclose(rates[:, 1], 2 * rates[:, 0])
    np.testing.assert_allclose(rates[:9, 0], 0.1 * np.arange(9) / 9, atol=1e-12)
    np.testing.assert_allclose(rates[9:, 0], 0.05 * (1 + np.cos(np.pi * np.arange(27) / 27)), atol=1e-12)


def test_constant_falling_and_one_cycle_rates():
    constant = rates_of(epochs=2, batch_size=50, lr=0.1, scheduler="constant", warmup_epochs=1.0)[:, 0]
    np.testing.assert_allclose(constant[9:], 0.1)
    np.testing.assert_allclose(constant[:9], 0.1 * np.arange(9) / 9, atol=1e-12)
    falling = rates_of(epochs=4, batch_size=50, lr=0.1, scheduler="multistep", warmup_epochs=1.0)[:, 0]
    np.testing.assert_allclose(falling[:9], 0.1 * np.arange(9) / 9, atol=1e-12)
    np.testing.assert_allclose(falling[9:], 0.1 * np.repeat([1, 0.1, 0.01], 9), atol=1e-12)
    cycle = rates_of(epochs=2, batch_size=50, lr=0.1, scheduler="onecycle")[:, 0]
    assert cycle.max() == pytest.approx(0.1, rel=0.01)
    assert 0 < cycle.argmax() < 17
    assert cycle[-1] < cycle[0] < 0.01


def steps_of(**settings):
    """What the optimizer is in the first step."""
    optimizers = []
    step = JointTraining._step

    def watched(self, *args):
        optimizers.append(copy.deepcopy(self.optimizer))
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JointTraining, "_step", watched)
        joint(epochs=2, head_recipe=None, **settings).fit(*TRAIN)
    return optimizers


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_plain_gradient_descent_without_a_momentum_and_nesterovs_with_one(momentum):
    first = steps_of(momentum=momentum, weight_decay=1e-3)[0]
    assert isinstance(first, torch.optim.SGD)
    for group in first.param_groups:
        assert group["momentum"] == momentum
        assert group["nesterov"] == (momentum > 0)
        assert group["weight_decay"] == 1e-3


@pytest.mark.parametrize(("optimizer", "cycling"), [("adagrad", []), ("sgd", []), ("adamw", ["betas"])])
def test_one_cycle_moves_the_momentum_of_what_has_one_alone(optimizer, cycling):
    optimizers = steps_of(optimizer=optimizer, scheduler="onecycle", lr=1e-3, momentum=0.0)
    for name in ("betas", "momentum"):
        values = {group[name] for step in optimizers for group in step.param_groups if name in group}
        assert (len(values) > 1) == (name in cycling), name


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher": "last"},
        {"teacher": None, "weights": [0.5, 0.5, 0.5, 1]},
        {"weights": "scheduled", "rescale": True},
        {"mixup": 0.4, "cutmix": 0.4, "label_smoothing": 0.1},
        {"optimizer": "adamw", "lr": 1e-3, "clip_grad": 1.0},
        {"precision": "bf16", "channels_last": True},
        {"precision": "fp16", "clip_grad": 1.0},
        {"averaging": "ema", "average_decay": 0.8},
        {"averaging": "swa", "epochs": 4},
        {"scheduler": "onecycle"},
        {"augment": lambda x: x.flip(-1) if torch.rand(()) < 0.1 else x},
        {"head_recipe": None, "epochs": 4},
    ],
    ids=lambda settings: ", ".join(settings),
)
def test_every_setting_learns(settings):
    model = joint(**settings).fit(*TRAIN)
    assert model.record(*TEST).accuracies.mean() > 0.8
    modules = [model._network.model.module, *model._network.early]
    assert not any(part.training for module in modules for part in module.modules())


def test_the_average_is_that_of_the_steps():
    """With constant weights after it, an average of a single step is the weights themselves."""
    one = joint(epochs=1, averaging="ema", average_decay=0.0).fit(*TRAIN)
    other = joint(epochs=1).fit(*TRAIN)
    assert_equal_weights(one, other)
    slow = joint(epochs=1, averaging="ema", average_decay=1.0).fit(*TRAIN)
    assert not torch.equal(slow.heads_[0].net[2].weight, other.heads_[0].net[2].weight)


def test_without_labels_the_original_is_the_teacher():
    model = joint(epochs=4).fit(TRAIN[0])
    assert model.history_["full_model"]["original_accuracy"] == 1.0  # agreement with itself
    assert model.record(*TEST).accuracies.min() > 0.75
    with pytest.raises(ValueError, match="teacher must be 'original' where there are no labels"):
        joint(teacher="last").fit(TRAIN[0])


@pytest.mark.parametrize("shuffle", [False, True])
def test_data_sets_and_loaders_give_what_arrays_give(shuffle):
    dataset = TensorDataset(torch.from_numpy(TRAIN[0]), torch.from_numpy(TRAIN[1]))
    array = joint(epochs=1).set_params(batch_size=64).fit(*TRAIN)
    loader = joint(epochs=1).fit(DataLoader(dataset, batch_size=64, shuffle=shuffle))
    assert_equal_weights(array, loader)
    assert_equal_weights(array, joint(epochs=1).set_params(batch_size=64).fit(dataset))


def test_heads_with_a_confidence_learn_it_last():
    model = joint(head="residual", epochs=1, head_recipe=None).fit(*TRAIN)
    losses = model.history_["confidence_loss"]
    assert len(losses) == 3
    assert all(loss[-1] < loss[0] for loss in losses)


def test_the_head_left_open_is_a_wide_block_on_maps_and_a_perceptron_elsewhere():
    model = joint(head="auto", epochs=1, head_recipe=None).fit(*TRAIN)
    assert {type(head).__name__ for head in model.heads_[:-1]} == {"WideHead"}
    vectors = MultiExitClassifier("mlp", recipe=JointRecipe(epochs=2)).fit(TRAIN[0].reshape(600, -1), TRAIN[1])
    assert {type(head).__name__ for head in vectors.heads_[:-1]} == {"MLPHead"}
    assert vectors.score(TEST[0].reshape(len(TEST[1]), -1), TEST[1]) > 0.8


def test_a_saved_model_keeps_the_weights_that_were_learned(tmp_path, fitted):
    fitted.set_params(recipe="joint").save(tmp_path / "model")
    loaded = adaptexit.load(tmp_path / "model", backbone=branched_trained(), head=flat_head)
    assert_equal_weights(fitted, loaded)
    np.testing.assert_array_equal(fitted.predict(TEST[0], budget=0.6), loaded.predict(TEST[0], budget=0.6))


def test_a_recipe_is_saved_with_its_settings(tmp_path):
    model = joint(head="mlp", weights=[1, 1, 1, 2], checkpoint_dir=tmp_path / "state").fit(*TRAIN)
    model.save(tmp_path / "model")
    loaded = adaptexit.load(tmp_path / "model", backbone=branched_trained())
    assert isinstance(loaded.recipe, JointRecipe)
    assert loaded.recipe.weights == [1, 1, 1, 2]


@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.compile])
def test_a_wrapped_module_is_saved_and_loaded(tmp_path, wrapper):
    model = joint(wrapper(branched_trained()), head="mlp", epochs=1).fit(*TRAIN)
    model.save(tmp_path / "model")
    for backbone in (wrapper(branched_trained()), branched_trained()):
        loaded = adaptexit.load(tmp_path / "model", backbone=backbone)
        np.testing.assert_array_equal(model.predict(TEST[0], budget=0.6), loaded.predict(TEST[0], budget=0.6))


# -- networks built with exits ----------------------------------------------------------------------------------------


def fresh_native():
    module = native_net()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part in module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    return module


def test_a_network_built_with_exits_learns_from_scratch():
    module = fresh_native()
    before = copy.deepcopy(module.state_dict())
    model = native(module, epochs=10, batch_size=50, lr=0.05).fit(*TRAIN).calibrate(*VAL)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert model.record(*TEST).accuracies.min() > 0.85
    assert model.history_["heads"] is None
    assert model.history_["full_model"].keys() == {"accuracy", "n"}


def test_batch_statistics_of_built_in_heads_follow_the_data():
    module = native_net()
    module.heads[0] = nn.Sequential(nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    for settings in ({}, {"trainable": ["stages.1.*"]}):
        after = native(module.eval(), **settings).fit(*TRAIN)._network.model.module
        assert not torch.equal(module.heads[0][0].running_mean, after.heads[0][0].running_mean)


class Shared(nn.Module):
    """Both exits answer by the same head."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            [nn.Conv2d(1, 8, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
        )
        head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))
        self.heads = nn.ModuleList([head, head])

    def forward(self, x):
        first = self.stages[0](x)
        return [self.heads[0](first), self.heads[1](self.stages[1](first))]


def test_a_head_that_exits_share_learns_once_a_step():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "optimizer contains")  # torch says so where a parameter is listed twice
        assert native(Shared(), epochs=1).fit(*TRAIN).history_["loss"]


@pytest.mark.parametrize(
    ("settings", "name"), [({"boost": 0.5}, "boost"), ({"head_recipe": adaptexit.FrozenRecipe()}, "head_recipe")]
)
def test_what_says_how_heads_are_made_is_refused_for_built_in_ones(settings, name):
    with pytest.raises(ValueError, match=f"{name} must be left at .* for a network built with exits"):
        native(**settings).fit(*TRAIN)


def test_the_settings_published_for_msdnet_are_those_of_a_network_built_with_exits():
    settings = JointRecipe().settled(native=True, labelled=True)
    published = {"epochs": 300, "batch_size": 512, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    assert published.items() <= settings.items()
    assert settings["warmup_epochs"] == 20
    assert settings["teacher"] is None
    assert settings["optimizer"] == "sgd"
    model = native(epochs=1, batch_size=300)
    assert model.recipe.settled(native=True, labelled=True)["warmup_epochs"] == 0.1


def test_only_when_asked_so_is_it_only_calibrated():
    module = native_net()
    model = MultiExitClassifier(module, recipe="trained").fit(*TRAIN)
    assert model._network.model.module is module
    for recipe in ("frozen", adaptexit.CalexNetRecipe()):
        with pytest.raises(ValueError, match="recipe must be 'trained'"):
            MultiExitClassifier(module, recipe=recipe).fit(*TRAIN)
    for name, value in {"exits": ["one"], "head": "mlp", "cache_half": True}.items():
        with pytest.raises(ValueError, match=f"{name} must be left at"):
            MultiExitClassifier(module, recipe="joint").set_params(**{name: value}).fit(*TRAIN)
    with pytest.raises(ValueError, match="recipe must train the new heads; got 'trained'"):
        joint().set_params(recipe="trained").fit(*TRAIN)


@pytest.mark.parametrize("trainable", ["norm", ["stages.1.*"]])
def test_parts_of_a_network_built_with_exits(trainable):
    module = native_net()
    after = native(module, trainable=trainable, teacher="original").fit(*TRAIN)._network.model.module
    assert torch.equal(module.stages[0][0].weight, after.stages[0][0].weight)
    assert torch.equal(module.stages[1][0].weight, after.stages[1][0].weight) == (trainable == "norm")
    assert not torch.equal(module.heads[0][2].weight, after.heads[0][2].weight)


def test_a_trained_one_may_learn_from_itself_without_labels():
    model = native(teacher="original").fit(TRAIN[0])
    assert model.history_["full_model"]["original_accuracy"] == 1.0


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number, at least 1"),
        ({"batch_size": 1}, "batch_size must be a whole number, at least 2"),
        ({"lr": -1.0}, "lr must be"),
        ({"head_lr": "fast"}, "head_lr must be"),
        ({"warmup_epochs": -1}, "warmup_epochs must be"),
        ({"distillation": 1.5}, "distillation must lie between 0 and 1"),
        ({"temperature": 0}, "temperature must be"),
        ({"teacher": "first"}, "teacher must be one of 'auto', 'original', 'last', None"),
        ({"weights": "falling"}, "weights must be one of 'equal', 'rising', 'scheduled' or K numbers"),
        ({"scheduler": "linear"}, "scheduler must be one of"),
        ({"batch_norm": True}, "batch_norm must be one of"),
        ({"averaging": "mean"}, "averaging must be one of"),
        ({"precision": "int8"}, "precision must be one of"),
        ({"optimizer": "sgdd"}, "optimizer must be the name of one of timm's"),
        ({"trainable": "heads"}, "trainable must be one of"),
        ({"trainable": []}, "trainable must be 'all', 'norm' or a list"),
        ({"rescale": 1}, "rescale must be True or False"),
        ({"augment_batches": "yes"}, "augment_batches must be True or False"),
        ({"mixup": -0.1}, "mixup must be"),
        ({"clip_grad": 0}, "clip_grad must be"),
        ({"boost": -1}, "boost must be"),
    ],
)
def test_settings_that_cannot_be_are_named_before_anything_runs(monkeypatch, settings, message):
    monkeypatch.setattr("adaptexit.multi_exit.build_model", lambda *args: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=message):
        joint(**settings).fit(*TRAIN)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": 3}, "optimizer must be a name"),
        ({"augment": "flip"}, "augment must be callable"),
        ({"head_recipe": "frozen!"}, "head_recipe must be"),
        ({"optimizer": lambda groups: None}, "optimizer must return a torch Optimizer"),
    ],
)
def test_what_is_of_the_wrong_kind_is_refused(settings, message):
    with pytest.raises(TypeError, match=message):
        joint(**settings).fit(*TRAIN)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": [1, 1]}, "weights must be 4 numbers"),
        ({"trainable": ["four"]}, r"\['four'\] fits none"),
        ({"head_recipe": adaptexit.FrozenRecipe(lr=-1)}, "lr must be"),
        ({"head_recipe": adaptexit.ZTWRecipe()}, "ZTW"),
    ],
)
def test_settings_that_do_not_fit_the_network_are_named_before_it_runs_over_the_samples(monkeypatch, settings, message):
    monkeypatch.setattr("adaptexit.training.retrofit.record_features", lambda *args, **kwargs: pytest.fail("it ran"))
    with pytest.raises((ValueError, TypeError), match=message):
        joint(**settings).fit(*TRAIN)


def test_rectangles_are_not_cut_out_of_tables():
    model = MultiExitClassifier("mlp", recipe=JointRecipe(epochs=1, cutmix=0.5))
    with pytest.raises(ValueError, match="cutmix must be 0 for inputs that are no images"):
        model.fit(TRAIN[0].reshape(600, -1), TRAIN[1])


def test_a_diverging_loss_is_named_and_the_estimator_stays_as_it_was(fitted):
    model = copy.deepcopy(fitted)
    before = model.predict(TEST[0])
    model.set_params(recipe=JointRecipe(**QUICK, head_recipe=None, weight_decay=0.0).set_params(lr=1e15))
    with pytest.raises(FloatingPointError, match=r"the loss of exit \d \(of 4\) became (nan|inf) in epoch 1 of 2"):
        model.fit(*TRAIN)
    np.testing.assert_array_equal(model.predict(TEST[0]), before)


def test_a_full_model_that_has_lost_is_warned_of():
    model = joint(epochs=1, lr=0.5, weights=[1, 1, 1, 0], teacher=None).fit(*TRAIN)
    with pytest.warns(FullModelWarning, match=r"the full model has lost .* points of accuracy .* 600 samples"):
        model.calibrate(*VAL)


def test_calibration_compares_with_the_original_on_samples_that_it_has_not_seen():
    net = branched_trained()
    model = joint(net).fit(*TRAIN)
    seen = model.history_["full_model"]
    story = model.calibrate(loader_of(*VAL, shuffle=True)).history_["full_model"]
    with torch.no_grad():
        before = net(torch.from_numpy(VAL[0])).argmax(1).numpy()
    after = model.record(*VAL).predictions[-1]
    expected = {"accuracy": np.mean(after == VAL[1]), "original_accuracy": np.mean(before == VAL[1]), "n": 600}
    assert story == pytest.approx(expected | {"agreement": np.mean(after == before)})
    assert seen["n"] == 150
    copied = pickle.loads(pickle.dumps(model)).calibrate(*VAL)  # without the original
    assert copied.history_["full_model"] == pytest.approx({"accuracy": story["accuracy"], "n": 600})


def test_a_bar_shows_epochs_loss_and_each_exits_running_accuracy(capsys):
    joint(epochs=1, batch_size=20).fit(*TRAIN)
    assert capsys.readouterr() == ("", "")
    joint(epochs=1, batch_size=20).set_params(verbose=1).fit(*TRAIN)
    shown = capsys.readouterr().err
    assert re.search(r"epoch 1/1, loss \d+\.\d+, right % by exit( \d+\.\d){4}", shown)
    assert "23/23" in shown


# -- interruptions -----------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
from tests.training.test_joint import TRAIN, joint
from adaptexit.training.checkpoints import Checkpoints

folder, settings = sys.argv[1], eval(sys.argv[2])
keep = Checkpoints.keep
def slowly(self, epoch, state):
    keep(self, epoch, state)
    print(epoch, flush=True)
    if len(sys.argv) > 3 and epoch == 2:
        import time
        time.sleep(60)  # until it is killed
Checkpoints.keep = slowly
joint(epochs=4, checkpoint_dir=folder, **settings).fit(*TRAIN)
"""


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw", "lr": 1e-3, "averaging": "ema", "mixup": 0.2},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"scheduler": "onecycle", "averaging": "swa", "precision": "bf16"}, marks=pytest.mark.slow),
    ],
    ids=["adamw", "as by default", "onecycle"],
)
def test_a_run_that_was_killed_ends_with_the_same_weights(tmp_path, settings):
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path), repr(settings), "wait"],
        cwd=root, env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, text=True,
    ) as run:  # fmt: skip
        epochs = [run.stdout.readline().strip() for _ in range(3)]
        run.send_signal(signal.SIGKILL)
    assert epochs == ["0", "1", "2"]
    resumed = joint(epochs=4, checkpoint_dir=tmp_path, **settings).fit(*TRAIN)
    straight = joint(epochs=4, **settings).fit(*TRAIN)
    assert_equal_weights(resumed, straight)
    assert resumed.history_ == straight.history_


def test_a_checkpoint_of_other_settings_or_data_is_not_taken_up(tmp_path):
    quick = {"epochs": 1, "head_recipe": None}
    joint(checkpoint_dir=tmp_path, **quick).fit(*TRAIN)
    for settings, data in (({"distillation": 0.4}, TRAIN), ({}, (TRAIN[0] + 0.01, TRAIN[1])), ({}, VAL)):
        actual = joint(checkpoint_dir=tmp_path, **quick, **settings).fit(*data)
        assert_equal_weights(actual, joint(**quick, **settings).fit(*data))
    assert len(list(tmp_path.iterdir())) == 4
    for params in ({}, {"preprocess": lambda x: x / 2}, {"cost": [1, 2, 3, 4]}, {"cache_half": True}, {"head": "mlp"}):
        joint(checkpoint_dir=tmp_path, epochs=1, head_recipe=None).set_params(**params).fit(*TRAIN)
    assert len(list(tmp_path.iterdir())) == 8  # the first of these is a run that was


def test_numbers_of_numpy_and_measured_costs_are_taken_up_again(tmp_path, monkeypatch):
    """Latencies weigh the losses here, and are never measured twice the same."""
    settings = {"lr": np.float64(0.02), "weights": "scheduled", "checkpoint_dir": tmp_path}
    first = joint(**settings).set_params(cost="latency").fit(*TRAIN)
    monkeypatch.setattr("adaptexit.training.joint.JointTraining._step", lambda *args: pytest.fail("it ran"))
    assert_equal_weights(first, joint(**settings).set_params(cost="latency").fit(*TRAIN))


def test_a_finished_run_is_read_back(tmp_path, monkeypatch):
    first = joint(checkpoint_dir=tmp_path).fit(*TRAIN)
    monkeypatch.setattr("adaptexit.training.joint.JointTraining._step", lambda *args: pytest.fail("it ran"))
    assert_equal_weights(first, joint(checkpoint_dir=tmp_path).fit(*TRAIN))


# -- several processes -------------------------------------------------------------------------------------------------

DISTRIBUTED = """
import sys, json, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from tests.training.test_joint import TRAIN, VAL, branched_trained, joint
from adaptexit.training.samples import Samples

rows_read = []
read = Samples.read
def noted(self, batches, seed):
    rows_read.append(torch.cat(list(batches)).tolist())
    return read(self, batches, seed)
Samples.read = noted
net = branched_trained()
net.drop.p = 0.0  # what it draws differs from process to process, as batch statistics do
model = joint(net, head="mlp", batch_norm="freeze", lr=0.005, checkpoint_dir=sys.argv[1] + "/state").fit(*TRAIN)
model.calibrate(*VAL).save(sys.argv[1] + "/model")
from adaptexit.training.processes import processes
with open(f"{sys.argv[1]}/rows-{processes().rank}.json", "w") as file:
    json.dump(rows_read, file)
"""


@pytest.mark.slow
def test_two_processes_see_what_one_sees(tmp_path):
    pytest.importorskip("accelerate")
    root = Path(__file__).parents[2]
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED)
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    runs = {}
    for n in (1, 2):
        folder = tmp_path / str(n)
        folder.mkdir()
        command = [sys.executable] if n == 1 else [*launch, "--num_processes", "2"]
        subprocess.run([*command, str(script), str(folder)], cwd=root, env=environment, check=True, timeout=300)
        runs[n] = adaptexit.load(folder / "model", backbone=branched_trained())
    rows = [json.loads((tmp_path / name).read_text()) for name in ("1/rows-0.json", "2/rows-0.json", "2/rows-1.json")]
    for whole, first, second in zip(*rows, strict=True):
        assert sorted(whole) == sorted([*first, *second])
        assert not set(first) & set(second)
    np.testing.assert_allclose(runs[1].history_["loss"], runs[2].history_["loss"], rtol=1e-4)
    np.testing.assert_allclose(runs[1].history_["accuracy"], runs[2].history_["accuracy"], atol=0.01)
    for one, other in zip(runs[1].heads_[:-1], runs[2].heads_[:-1], strict=True):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_no_warning_where_nothing_was_lost():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FullModelWarning)
        story = joint().fit(*TRAIN).calibrate(*VAL).history_["full_model"]
    assert story["accuracy"] > story["original_accuracy"] - 0.005
