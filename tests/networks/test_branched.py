from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader

from adaptexit import FrozenRecipe, MultiExitClassifier, ThresholdCalibrator
from adaptexit.core.scores import softmax
from adaptexit.data.classes import hold_out
from adaptexit.heads import Answer, Head, MLPHead
from tests.nets import (
    EXITS,
    AddingHead,
    Fixed,
    assert_same_branches,
    branched,
    branched_model,
    branched_trained,
    digits,
    flat_head,
    naive_branches,
)

TRAIN, VAL, TEST = digits()
pytestmark = pytest.mark.filterwarnings("ignore::adaptexit.LabelWarning")
STAGE_MACS = [1 * 8 * 9 * 64, 8 * 16 * 9 * 16, 16 * 32 * 9 * 16, 128 * 10]
HEAD_MACS = [16 * 8 * 10, 16 * 16 * 10, 16 * 32 * 10]


@pytest.fixture(scope="module")
def model():
    """Tests only ask it questions."""
    return branched_model()


def heads_of(fitted):
    return list(fitted.heads_)[:-1]


# -- heads ------------------------------------------------------------------------------------------------------------


def assert_equals_naive(fitted, net, exits, X, cutoffs=None):
    cutoffs = fitted.calibrator_.point_.cutoffs if cutoffs is None else cutoffs
    labels, exits, scores, _ = naive_branches(net, exits, heads_of(fitted), torch.from_numpy(X), cutoffs)
    trace = fitted.trace(X)
    assert trace.labels.tolist() == labels.tolist()
    assert trace.exits.tolist() == exits.tolist()
    np.testing.assert_allclose(trace.scores, scores, rtol=1e-3, atol=1e-6)
    return exits


@pytest.mark.parametrize("head", ["mlp", "conv", "prototype", "refined_prototype"])
def test_heads_that_have_a_name(head):
    fitted = branched(head=head).fit(*TRAIN)
    medians = np.median(fitted.outputs_.scores[:-1], axis=1)
    fitted.set_params(calibrator=Fixed([*medians, -np.inf])).calibrate(*VAL)
    assert all(losses[-1] < losses[0] for losses in fitted.history_["loss"])
    exits = assert_equals_naive(fitted, branched_trained(), EXITS, TEST[0][:80])
    assert len(set(exits.tolist())) > 2
    assert [len(losses) for losses in fitted.history_["confidence_loss"]] == [6 * ("prototype" in head)] * 3
    assert (fitted.outputs_.exit_costs[:-1] > 0).all()


def test_a_head_class_and_one_with_arguments():
    fitted = branched(head=MLPHead).fit(*TRAIN)
    assert_same_branches(fitted, branched(head="mlp").fit(*TRAIN))
    narrow = branched(head=partial(MLPHead, hidden=4)).fit(*TRAIN)
    assert narrow.outputs_.exit_costs.tolist() == [8 * 4 + 40, 16 * 4 + 40, 32 * 4 + 40, 0]


def test_every_exit_has_a_head_of_its_own_for_its_feature():
    features = []

    def factory(spec, n_classes):
        features.append((spec.shape, spec.layout, n_classes))
        return flat_head(spec, n_classes)

    fitted = branched(head=factory).fit(*TRAIN)
    assert features == [((8, 8, 8), "NCHW", 10), ((16, 4, 4), "NCHW", 10), ((32, 4, 4), "NCHW", 10)]
    assert len({id(head) for head in heads_of(fitted)}) == 3


@pytest.mark.parametrize(
    "thresholds",
    [
        [0.8, 0.9, 0.9, -np.inf],
        [np.inf, 0.9, 0.9, -np.inf],
        [np.inf, np.inf, 0.95, -np.inf],
        [0.8, np.inf, 0.9, -np.inf],
    ],
)
def test_chained_heads_read_what_earlier_ones_left(thresholds):
    fitted = branched(head=AddingHead, calibrator=Fixed(thresholds), batch_size=32).fit(*TRAIN).calibrate(*VAL)
    assert fitted.outputs_.chained
    exits = assert_equals_naive(fitted, branched_trained(), EXITS, TEST[0][:150])
    assert set(exits.tolist()) == {k for k in range(4) if thresholds[k] < np.inf}
    trace = fitted.trace(TEST[0][:150])
    deepest = max(k for k in range(3) if thresholds[k] < np.inf)
    for k in set(exits.tolist()):
        heads = HEAD_MACS[: min(k, deepest) + 1]
        assert set(trace.costs[trace.exits == k].tolist()) == {sum(STAGE_MACS[: k + 1]) + sum(heads)}


def test_chained_heads_live_on_the_held_out_part_and_at_any_time():
    fitted = branched(head=AddingHead).fit(*TRAIN)
    _, held_out = hold_out(TRAIN[1], 0.25, 0)
    live = fitted.record(TRAIN[0][held_out], TRAIN[1][held_out])
    assert live.chained
    assert live.predictions.tolist() == fitted.outputs_.predictions.tolist()
    np.testing.assert_allclose(live.scores, fitted.outputs_.scores, rtol=1e-4)
    limit = (sum(STAGE_MACS[:2]) + sum(HEAD_MACS[:2])) / sum(STAGE_MACS)
    second = fitted.record(*TEST).predictions[1]
    assert fitted.predict_anytime(TEST[0], limit).tolist() == second.tolist()
    assert fitted.predict_anytime(TEST[0], limit * 0.99).tolist() != second.tolist()


class FirstHead(AddingHead):
    """Leaves a state and reads none."""

    chained = False


@pytest.mark.parametrize("kinds", [[FirstHead, AddingHead, AddingHead], [AddingHead, FirstHead, AddingHead]])
def test_chained_heads_read_in_use_what_they_read_in_training(kinds):
    queue = iter(kinds)
    received = []

    def factory(spec, n_classes):
        head = next(queue)(spec, n_classes)
        answer = head.answer

        def noted(reduced, state=None):
            received.append((torch.is_grad_enabled(), head.chained, state is None))
            return answer(reduced, state)

        head.answer = noted
        return head

    fitted = branched(head=factory, calibrator=Fixed([np.inf, np.inf, 0.5, -np.inf])).fit(*TRAIN)
    received_in = {learning: {(c, empty) for g, c, empty in received if g is learning} for learning in (True, False)}
    assert received_in[True] == received_in[False]
    assert_equals_naive(fitted.calibrate(*VAL), branched_trained(), EXITS, TEST[0][:60])


class OwnSurety(Head):
    """Fully sure of what it says, whatever its logits."""

    def __init__(self, spec, n_classes):
        super().__init__(spec, n_classes)
        self.linear = nn.Linear(spec.channels, n_classes)

    def answer(self, reduced, state=None):
        logits = self.linear(reduced.mean(dim=(2, 3)))
        return Answer(logits, torch.full_like(logits, 2.0))


@pytest.mark.parametrize(
    ("confidence", "expected"),
    [
        ("auto", lambda logits: np.full(len(logits), 1 / (1 + np.exp(-2.0)))),
        ("max_proba", lambda logits: softmax(logits).max(axis=1)),
        ("entropy", lambda logits: (softmax(logits) * np.log(softmax(logits))).sum(axis=1)),
        ("margin", lambda logits: np.sort(softmax(logits))[:, -1] - np.sort(softmax(logits))[:, -2]),
        (lambda logits: logits[:, 3] - 1, lambda logits: logits[:, 3] - 1),
    ],
)
def test_confidences(confidence, expected):
    fitted = branched(head=OwnSurety, confidence=confidence, calibrator=ThresholdCalibrator("max_proba")).fit(*TRAIN)
    outputs = fitted.outputs_
    for k in range(3):
        np.testing.assert_allclose(outputs.scores[k], expected(outputs.logits[k]), rtol=1e-4, atol=1e-6)
    last = (lambda logits: softmax(logits).max(axis=1)) if confidence == "auto" else expected
    np.testing.assert_allclose(outputs.scores[3], last(outputs.logits[3]), rtol=1e-4, atol=1e-6)


# -- tokens and maps with the channels last ---------------------------------------------------------------------------


def tiny_vit(seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2} | options
        net = timm.create_model("vit_tiny_patch16_224", num_classes=3, **options).eval()
        nn.init.normal_(net.head.weight)
    return net


def tiny_swin():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1, 1), "num_heads": (1, 2, 2)}
        net = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **options).eval()
        nn.init.normal_(net.head.fc.weight)
    return net


IMAGES = np.random.default_rng(0).random((60, 3, 32, 32), dtype=np.float32)
COLOURS = IMAGES[:, :, :16].mean(axis=(2, 3)).argmax(axis=1)


@pytest.mark.parametrize("head", ["mlp", "conv", "prototype"])
@pytest.mark.parametrize(
    ("factory", "exits", "layout"),
    [(tiny_vit, ["blocks.0", "blocks.1"], "NLC"), (tiny_swin, ["layers.0", "layers.1"], "NHWC")],
)
def test_tokens_and_channels_last(factory, exits, layout, head):
    params = {"exits": exits, "head": head, "preprocess": None, "recipe": FrozenRecipe(epochs=3)}
    fitted = MultiExitClassifier(factory(), **params, calibrator=Fixed([0.4, 0.45, -np.inf])).fit(IMAGES, COLOURS)
    assert [early.spec.layout for early in heads_of(fitted)] == [layout] * 2
    assert all(np.isfinite(losses).all() for losses in fitted.history_["loss"])
    _, held_out = hold_out(COLOURS, 0.25, 0)
    live = fitted.record(IMAGES[held_out], COLOURS[held_out])
    np.testing.assert_allclose(live.scores, fitted.outputs_.scores, rtol=1e-3)
    fitted.calibrate(IMAGES, COLOURS)
    assert_equals_naive(fitted, factory(), exits, IMAGES[:30])


class Tokens(nn.Module):
    """64 tokens of width 64 from a digit: nothing tells which axis is which."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(1, 64), nn.Linear(64, 10)

    def forward(self, x):
        return self.out(self.embed(x.flatten(2).transpose(1, 2)).mean(dim=1))


def test_a_layout_that_cannot_be_told_is_asked_for():
    with pytest.raises(ValueError, match=r"the layout of cut 'embed' cannot be inferred: .*NLC or NCL"):
        branched(Tokens(), exits=["embed"], head="mlp").fit(*TRAIN)


@pytest.mark.parametrize(("layout", "axis"), [("NLC", 1), ({"embed": "NLC"}, 1), ("NCL", 2), ({"embed": "NCL"}, 2)])
def test_a_layout_that_is_told(layout, axis):
    received = []

    class Seeing(MLPHead):
        def answer(self, reduced, state=None):
            received.append(reduced)
            return super().answer(reduced, state)

    with torch.random.fork_rng(devices=[]):
        net = Tokens().eval()
    fitted = branched(net, exits=["embed"], head=Seeing, layout=layout).fit(*TRAIN)
    received.clear()
    fitted.record(TEST[0][:9], TEST[1][:9])
    tokens = net.embed(torch.from_numpy(TEST[0][:9]).flatten(2).transpose(1, 2))
    np.testing.assert_allclose(torch.cat(received), tokens.mean(dim=axis).detach(), atol=1e-5)


# -- exits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("exits", "n"), [("auto", 3), (1, 1), (2, 2), (np.int64(2), 2)])
def test_exits_that_are_chosen(exits, n):
    fitted = MultiExitClassifier(tiny_vit(), exits, preprocess=None, recipe=FrozenRecipe(epochs=1))
    fitted.fit(IMAGES, COLOURS)
    assert len(fitted.exits_) == n
    assert set(fitted.exits_) <= {name for name, _ in tiny_vit().named_modules()}
    shares = np.cumsum(fitted.outputs_.stage_costs)[:-1] / fitted.outputs_.full_cost
    assert np.abs(shares - np.arange(1, n + 1) / (n + 1)).max() < 0.25


def test_exits_as_a_tuple_and_inside_blocks(model):
    fitted = branched(exits=("one.0", "two", "three.1")).fit(*TRAIN).calibrate(*VAL)
    assert fitted.exits_ == ["one.0", "two", "three.1"]
    assert_equals_naive(fitted, branched_trained(), fitted.exits_, TEST[0][:60])
    assert fitted.outputs_.full_cost == model.outputs_.full_cost


def test_one_exit(model):
    fitted = branched(exits=["two"]).fit(*TRAIN).calibrate(*VAL)
    assert fitted.outputs_.stage_costs.tolist() == [sum(STAGE_MACS[:2]), sum(STAGE_MACS[2:])]
    assert fitted.exit_names == ["two", "full model"]
    assert fitted.score(*TEST) > 0.9


# -- images of several sizes -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::adaptexit.InputWarning")
def test_a_loader_may_give_batches_of_several_sizes(model):
    x = torch.from_numpy(TEST[0][:120])
    batches = [
        torch.nn.functional.interpolate(x[i : i + 10], size=size)
        for i, size in zip(range(0, 120, 10), [(8, 8), (8, 12), (12, 8)] * 4, strict=True)
    ]
    fitted = branched(calibrator=Fixed([0.6, 0.7, 0.8, -np.inf])).fit(*TRAIN).calibrate(*VAL)
    traced = fitted.trace(DataLoader(batches, batch_size=None))
    singles = [fitted.trace(image[None]) for batch in batches for image in batch]
    assert traced.exits.tolist() == [int(single.exits[0]) for single in singles]
    assert traced.labels.tolist() == [int(single.labels[0]) for single in singles]
    assert len(set(traced.exits.tolist())) >= 3
