"""What would give wrong answers without an error, and is looked for before any answer is given."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.backends import cudnn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import adaptexit
from adaptexit import FrozenRecipe, MultiExitClassifier
from adaptexit.core.outputs import ExitOutputs
from adaptexit.exceptions import SplitError
from adaptexit.heads import Answer, Head
from adaptexit.staging import split
from adaptexit.staging.contexts import exact_arithmetic
from tests.nets import (
    QUICK,
    assert_same_branches,
    branched,
    branched_trained,
    digits,
    flat_head,
    loader_of,
)

TRAIN, VAL, TEST = digits()


# -- samples that depend on each other ---------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Divides by the largest value of the batch, as quantised models with scales of their own do."""

    def __init__(self, before):
        super().__init__()
        self.a, self.b, self.before = nn.Linear(6, 6), nn.Linear(6, 4), before

    def forward(self, x):
        x = self.a(x / x.abs().amax() if self.before else x)
        return self.b(x if self.before else x / x.abs().amax())


@pytest.mark.parametrize("before", [False, True], ids=["behind the cut", "before the cut"])
@pytest.mark.parametrize("seed", range(12))
def test_scales_of_the_whole_batch_are_always_found(before, seed):
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Scaled(before).eval()
    with pytest.raises(SplitError, match="samples depend on each other"):
        split(model, ["a"], x)


# -- networks that are not what they seem ------------------------------------------------------------------------------


def test_a_stage_that_comes_twice_runs_twice():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shared = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())
        stages = [nn.Conv2d(1, 4, 3, padding=1), shared, shared, nn.Sequential(nn.Flatten(), nn.Linear(256, 10))]
    whole = nn.Sequential(*stages).eval()
    fitted = MultiExitClassifier([stage.eval() for stage in stages], head=flat_head, recipe=QUICK)
    fitted.fit(TRAIN[0]).calibrate(VAL[0])
    assert fitted.exits_ == ["0", "1", "2"]
    with torch.inference_mode():
        expected = whole(torch.from_numpy(TEST[0])).softmax(1).numpy()
    np.testing.assert_allclose(fitted.predict_proba(TEST[0], budget=1.0), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("exits", [1, ["0"]])
def test_a_network_given_as_its_stages_has_its_exits(exits):
    stages = [nn.Flatten().eval(), nn.Linear(64, 10).eval()]
    message = f"exits must be 'auto' for a network given as its stages; got {exits!r}."
    with pytest.raises(ValueError, match=re.escape(message)):
        MultiExitClassifier(stages, exits=exits, recipe=QUICK).fit(*TRAIN)


class Reluctant(nn.Module):
    """A head whose first layer writes into what it is given."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(10))

    def forward(self, x):
        return self.net(x)


def test_a_head_that_writes_into_its_feature_spoils_nothing():
    net = branched_trained()
    cut = "one.1"  # in front of the ReLU, so that there is something to overwrite

    def head(spec, n_classes):
        module = Reluctant()
        module(torch.zeros(2, *spec.shape))
        return module

    fitted = branched(net, exits=[cut], head=head).fit(*TRAIN).calibrate(*VAL)
    harmless_here = branched(net, exits=["one"], head=head).fit(*TRAIN)  # behind the ReLU, where nothing is below 0
    assert harmless_here._network.heads_that_overwrite == [True]
    with torch.inference_mode():
        expected = net(torch.from_numpy(TEST[0])).argmax(1).numpy()
    assert (fitted.record(*TEST).predictions[-1] == expected).all()
    assert fitted._network.heads_that_overwrite == [True]
    assert branched(net).fit(*TRAIN)._network.heads_that_overwrite == [False] * 3


def test_one_logit_is_too_few():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 1)).eval()
    with pytest.raises(ValueError, match=r"backbone must answer with at least 2 logits, one a class; got 1"):
        MultiExitClassifier(net, ["1"], recipe=QUICK).fit(TRAIN[0])


# -- data --------------------------------------------------------------------------------------------------------------


def test_a_sampler_that_shuffles_is_refused():
    data = TensorDataset(torch.from_numpy(TEST[0]), torch.from_numpy(TEST[1]))
    model = branched().fit(*TRAIN).calibrate(*VAL)
    shuffling, in_order = (DistributedSampler(data, 1, 0, shuffle=shuffle) for shuffle in (True, False))
    with pytest.raises(ValueError, match="X must keep its order"):
        model.predict(DataLoader(data, batch_size=50, sampler=shuffling))
    assert (model.predict(DataLoader(data, batch_size=50, sampler=in_order)) == model.predict(TEST[0])).all()


def test_without_labels_agreement_can_be_measured_on_other_data():
    fitted = branched().fit(TRAIN[0]).calibrate(VAL[0])
    assert not fitted.labelled_
    frontier = fitted.pareto(TEST[0])
    outputs = fitted.record(TEST[0])
    assert isinstance(outputs, ExitOutputs)
    assert (outputs.labels == outputs.predictions[-1]).all()
    assert frontier.full_accuracy == 1.0
    assert 0.3 < frontier.fixed_accuracy[0] < 1.0
    fitted.calibrate(*VAL)
    assert fitted.labelled_
    with pytest.raises(ValueError, match="requires y to be passed"):
        fitted.pareto(TEST[0])


def test_nothing_of_the_training_data_is_written(tmp_path):
    fitted = branched().fit(*TRAIN).calibrate(*VAL)
    fitted.save(tmp_path)
    example = load_file(tmp_path / "model.safetensors")["example"].numpy()
    values = TRAIN[0][:6]
    assert np.array_equal(np.sort(example, axis=None), np.sort(values, axis=None))
    assert not any(np.array_equal(row, other) for row in example for other in TRAIN[0])
    assert abs(np.corrcoef(example.reshape(-1), values.reshape(-1))[0, 1]) < 0.2


def test_what_belongs_to_a_machine_may_be_given_to_load(tmp_path):
    fitted = MultiExitClassifier(
        branched_trained, ["one"], head=flat_head, recipe=QUICK, device="cpu", cache_dir=str(tmp_path / "cache")
    ).fit(*TRAIN)
    fitted.save(tmp_path / "model")
    again = {"backbone": branched_trained, "head": flat_head}
    loaded = adaptexit.load(tmp_path / "model", **again, cache_dir=None, device=None)
    assert (loaded.cache_dir, loaded.device) == (None, None)
    assert adaptexit.load(tmp_path / "model", **again).device == "cpu"
    with pytest.raises(ValueError, match="exits cannot be given to load"):
        adaptexit.load(tmp_path / "model", **again, exits=["two"])


# -- features that were kept for another model, or other data ---------------------------------------------------------


@pytest.fixture(scope="module")
def self_calibrated():
    """Tests only compare with it."""
    return branched().fit(*TRAIN)


class Counted:
    """A trained net that counts the samples which reach its end."""

    def __init__(self):
        self.net, self.count = branched_trained(), 0
        self.net.out.register_forward_hook(lambda module, inputs, output: self.add(len(output)))

    def add(self, n):
        self.count += n

    def runs(self, folder, data=TRAIN, **params):
        """Fit, and say whether the backbone ran over the data, and what was fitted."""
        self.count = 0
        fitted = branched(self.net, cache_dir=folder, **params).fit(*data)
        assert self.count < 220 or 600 <= self.count < 780  # besides, the first batch to make sure, and the split's
        return self.count >= 600, fitted


def test_a_second_fit_does_not_run_the_backbone(tmp_path, self_calibrated):
    counted = Counted()
    ran, first = counted.runs(tmp_path)
    assert ran
    again, second = counted.runs(tmp_path)
    assert not again
    assert_same_branches(first, second)
    assert_same_branches(first, self_calibrated)
    ran, by_loader = Counted().runs(tmp_path, (loader_of(*TRAIN, batch_size=128),))
    assert not ran
    assert_same_branches(first, by_loader)


CHANGES = {
    "data": {"data": VAL},
    "exits": {"exits": ["one", "two"]},
    "head": {"head": "mlp"},
    "half": {"cache_half": True},
    "preprocess": {"preprocess": torch.square},
}


@pytest.mark.parametrize("change", CHANGES)
def test_anything_that_changes_features_runs_the_backbone(tmp_path, change):
    counted = Counted()
    counted.runs(tmp_path)
    ran, fitted = counted.runs(tmp_path, **CHANGES[change])
    assert ran
    params = {key: value for key, value in CHANGES[change].items() if key != "data"}
    assert_same_branches(fitted, branched(**params).fit(*CHANGES[change].get("data", TRAIN)))
    assert not counted.runs(tmp_path, **CHANGES[change])[0]


def test_other_weights_run_the_backbone(tmp_path):
    Counted().runs(tmp_path)
    counted = Counted()
    counted.net.three[1].running_mean += 0.01
    assert counted.runs(tmp_path)[0]


@pytest.mark.filterwarnings("ignore::adaptexit.LabelWarning")
def test_other_labels_and_recipes_do_not(tmp_path):
    counted = Counted()
    counted.runs(tmp_path)
    ran, fitted = counted.runs(tmp_path, (TRAIN[0], TRAIN[1][::-1].copy()))
    assert not ran
    assert fitted.outputs_.full_accuracy < 0.3
    assert not counted.runs(tmp_path, recipe=FrozenRecipe(epochs=1), random_state=3, calibration_size=0.4)[0]


class Keeping(Head):
    """Reads some of the channels."""

    def __init__(self, spec, n_classes, n):
        super().__init__(spec, n_classes)
        self.n, self.linear = n, nn.Linear(n, n_classes)

    def reduce(self, feature):
        return feature[:, : self.n].mean(dim=(2, 3))

    def answer(self, reduced, state=None):
        return Answer(self.linear(reduced))


def test_a_head_that_keeps_more_of_a_feature_is_not_given_less(tmp_path):
    branched(cache_dir=tmp_path, head=partial(Keeping, n=3)).fit(*TRAIN)
    fitted = branched(cache_dir=tmp_path, head=partial(Keeping, n=5)).fit(*TRAIN)
    assert_same_branches(fitted, branched(head=partial(Keeping, n=5)).fit(*TRAIN))


def test_features_recorded_under_autocast_do_not_serve_without(tmp_path, self_calibrated):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        branched(cache_dir=tmp_path).fit(*TRAIN)
    assert_same_branches(branched(cache_dir=tmp_path).fit(*TRAIN), self_calibrated)


# -- defaults ----------------------------------------------------------------------------------------------------------


def test_small_data_get_more_epochs():
    few, many = (branched(exits=["one"], recipe="frozen").fit(TRAIN[0][:n], TRAIN[1][:n]) for n in (120, 600))
    assert len(few.history_["loss"][0]) == 500  # one minibatch of the 90 held in
    assert len(many.history_["loss"][0]) == 250  # two of the 450
    assert len(branched(recipe=FrozenRecipe(epochs=2)).fit(*TRAIN).history_["loss"][0]) == 2
    assert few.outputs_.accuracies[0] > 0.5


# -- what is not ours --------------------------------------------------------------------------------------------------


def test_a_traced_forward_leaves_nothing_on_its_module():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.last = nn.Linear(6, 6), nn.Linear(6, 4), None

        def forward(self, x):
            self.last = x
            return self.b(self.a(x))

    model = Keeping().eval()
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    split(model, ["a"], x)
    assert model.last is None or isinstance(model.last, torch.Tensor)
    with pytest.raises(SplitError):
        split(model, ["b"], x)
    assert model.last is None or isinstance(model.last, torch.Tensor)


def precisions():
    return [backend.fp32_precision for backend in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)]


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
@pytest.mark.parametrize("chosen", [None, "tf32", "ieee"])
def test_the_precision_of_products_is_given_back(chosen):
    before = precisions()
    matmul = torch.backends.cuda.matmul
    try:
        if chosen is not None:
            matmul.fp32_precision = chosen
        mine = precisions()
        with exact_arithmetic:
            assert precisions() == ["ieee"] * 3
        assert precisions() == mine
    finally:
        matmul.fp32_precision = before[0]
