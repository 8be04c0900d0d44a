import copy
from contextlib import suppress
from functools import cache

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader

from adaptexit import CalibrationWarning, ExitOutputs, FrozenRecipe, MultiExitClassifier
from adaptexit.core.scores import max_proba, softmax
from adaptexit.data.classes import hold_out
from tests.contract.cases import SOURCES, stages_of
from tests.nets import (
    EXITS,
    QUICK,
    Fixed,
    Recording,
    assert_same_branches,
    branched,
    branched_model,
    branched_trained,
    digits,
    flat_head,
    loader_of,
    naive_branches,
)

TRAIN, VAL, TEST = digits()
pytestmark = pytest.mark.filterwarnings("ignore::adaptexit.LabelWarning")
STAGE_MACS = [1 * 8 * 9 * 64, 8 * 16 * 9 * 16, 16 * 32 * 9 * 16, 128 * 10]
HEAD_MACS = [16 * 8 * 10, 16 * 16 * 10, 16 * 32 * 10]
self_calibrated = pytest.mark.filterwarnings("ignore::adaptexit.CalibrationWarning")


@pytest.fixture(scope="module")
def model():
    """Tests only ask it questions."""
    return branched_model()


@cache
def fitted_once():
    return branched().fit(*TRAIN)


@pytest.fixture
def uncalibrated():
    """A copy of ``branched().fit(*TRAIN)``, which tests may calibrate."""
    return copy.deepcopy(fitted_once())


def heads_of(fitted):
    return list(fitted.heads_)[:-1]


def watched(net, names=(*EXITS, "out")):
    """Sizes of the batches that every named part of the net is run on."""
    sizes = {name: [] for name in names}
    for name in names:
        net.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: sizes[name].append(len(output))
        )
    return sizes


def recording_heads():
    """A factory of heads, and those that came out of it."""
    heads = []

    def factory(spec, n_classes):
        heads.append(Recording(flat_head(spec, n_classes)))
        return heads[-1]

    return factory, heads


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 0.07, 0.2, 0.5, 1.0])
def test_answers_equal_a_hand_written_loop(model, budget):
    X = TEST[0][:150]
    point = model.operating_point(budget)
    labels, exits, scores, logits = naive_branches(
        branched_trained(), EXITS, heads_of(model), torch.from_numpy(X), point.cutoffs
    )
    trace = model.trace(X, budget=budget)
    assert model.predict(X, budget=budget).tolist() == trace.labels.tolist() == labels.tolist()
    assert trace.exits.tolist() == exits.tolist()
    np.testing.assert_allclose(trace.scores, scores, rtol=1e-4)
    np.testing.assert_allclose(model.predict_proba(X, budget=budget), softmax(logits), atol=1e-5)


def test_early_exits_answer_well_and_for_many(model):
    trace = model.trace(TEST[0])
    assert np.bincount(trace.exits, minlength=4).min() > 5
    assert np.bincount(trace.exits, minlength=4)[:-1].sum() > 0.7 * len(TEST[1])
    assert np.mean(trace.labels == TEST[1]) > 0.93
    assert trace.relative_costs.mean() < 0.7


# -- who is computed --------------------------------------------------------------------------------------------------


def test_stages_behind_an_exit_are_run_for_survivors_only_in_full_batches():
    net = branched_trained()
    sizes = watched(net)
    factory, heads = recording_heads()
    calibrator = Fixed([0.9, 0.9, np.inf, -np.inf])
    fitted = branched(net, head=factory, batch_size=50, calibrator=calibrator).fit(*TRAIN).calibrate(*VAL)
    for batch_sizes in [*sizes.values(), *(head.sizes for head in heads)]:
        batch_sizes.clear()
    trace = fitted.trace(TEST[0])
    reach = [int((trace.exits >= k).sum()) for k in range(4)]
    assert reach[0] == len(TEST[0]) > reach[1] > reach[2] == reach[3] > 0
    assert [sum(sizes[name]) for name in sizes] == reach
    assert [sum(head.sizes) for head in heads] == [*reach[:2], 0]
    assert sizes["two"] == [50] * (reach[1] // 50) + [reach[1] % 50] * (reach[1] % 50 > 0)


def test_exits_that_are_off_are_not_run_nor_paid():
    factory, heads = recording_heads()
    net = branched_trained()
    fitted = branched(net, head=factory, calibrator=Fixed([np.inf, 0.9, np.inf, -np.inf])).fit(*TRAIN).calibrate(*VAL)
    sizes = watched(net)
    for head in heads:
        head.sizes.clear()
    trace = fitted.trace(TEST[0])
    assert set(trace.exits.tolist()) == {1, 3}
    assert heads[0].sizes == heads[2].sizes == []
    assert sum(heads[1].sizes) == len(TEST[0])
    assert sum(sizes["three"]) == sum(sizes["out"]) == (trace.exits == 3).sum()
    early = sum(STAGE_MACS[:2]) + HEAD_MACS[1]
    assert set(trace.costs.tolist()) == {early, early + sum(STAGE_MACS[2:])}


def test_with_all_exits_off_the_plain_model_remains():
    factory, heads = recording_heads()
    fitted = branched(head=factory, calibrator=Fixed([np.inf, np.inf, np.inf, -np.inf])).fit(*TRAIN).calibrate(*VAL)
    for head in heads:
        head.sizes.clear()
    with torch.inference_mode():
        logits = branched_trained()(torch.from_numpy(TEST[0])).numpy()
    np.testing.assert_allclose(fitted.predict_proba(TEST[0]), softmax(logits), atol=1e-6)
    assert fitted.trace(TEST[0]).relative_costs.tolist() == [1.0] * len(TEST[0])
    assert [head.sizes for head in heads] == [[], [], []]


# -- anytime ----------------------------------------------------------------------------------------------------------


def test_anytime_runs_one_exit_and_nothing_behind_it():
    factory, heads = recording_heads()
    net = branched_trained()
    fitted = branched(net, head=factory).fit(*TRAIN).calibrate(*VAL)
    sizes = watched(net)
    for head in heads:
        head.sizes.clear()
    fitted.predict_anytime(TEST[0], 0.6)
    assert [sum(head.sizes) for head in heads] == [0, len(TEST[0]), 0]
    assert [sum(batch_sizes) for batch_sizes in sizes.values()] == [len(TEST[0]), len(TEST[0]), 0, 0]


# -- curves and records -----------------------------------------------------------------------------------------------


def test_record_holds_what_every_exit_answers(model):
    outputs = model.record(*TEST)
    features = {}
    net = branched_trained()
    for name in EXITS:
        net.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: features.update({name: out}))
    with torch.inference_mode():
        last = net(torch.from_numpy(TEST[0]))
        logits = [head(features[name]).logits for name, head in zip(EXITS, heads_of(model), strict=True)]
    logits = torch.stack([*logits, last]).numpy()
    assert isinstance(outputs, ExitOutputs)
    assert outputs.predictions.tolist() == logits.argmax(axis=2).tolist()
    np.testing.assert_allclose(outputs.scores, max_proba(logits), rtol=1e-4)
    assert outputs.labels.tolist() == TEST[1].tolist()
    assert outputs.exit_costs.tolist() == model.outputs_.exit_costs.tolist()
    assert outputs.logits is None


def test_names_and_attributes(model):
    assert model.exit_names == ["one", "two", "three", "full model"]
    assert model.exits_ == EXITS
    assert model.classes_.tolist() == list(range(10))
    assert model.cost_unit_ == "MACs"
    assert model.self_calibrated_ is False
    assert [len(losses) for losses in model.history_["loss"]] == [QUICK.epochs] * 3
    assert all(losses[-1] < 0.5 * losses[0] for losses in model.history_["loss"])


# -- costs ------------------------------------------------------------------------------------------------------------


def test_macs_of_stages_are_those_of_the_model_and_heads_have_their_own(model):
    assert model.outputs_.stage_costs.tolist() == STAGE_MACS
    assert model.outputs_.exit_costs.tolist() == [*HEAD_MACS, 0]
    assert model.outputs_.full_cost == sum(STAGE_MACS)
    assert not model.outputs_.chained


def test_costs_of_a_sample_are_the_stages_and_heads_passed(model):
    trace = model.trace(TEST[0], budget=0.5)
    on = model.operating_point(0.5).on
    for k in set(trace.exits.tolist()):
        paid = sum(STAGE_MACS[: k + 1]) + sum(
            macs for macs, exit_on in zip(HEAD_MACS[: k + 1], on, strict=False) if exit_on
        )
        assert set(trace.costs[trace.exits == k].tolist()) == {paid}
    assert trace.full_cost == sum(STAGE_MACS)


# -- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [source for source in SOURCES if source != "shuffled"])
def test_heads_learn_the_same_from_every_source(uncalibrated, source):
    assert_same_branches(branched(batch_size=50).fit(*SOURCES[source](*TRAIN)), branched(batch_size=50).fit(*TRAIN))


@self_calibrated
def test_in_a_loader_that_shuffles_labels_stay_with_their_samples():
    def shuffled(data):
        return loader_of(*data, shuffle=True, generator=torch.Generator().manual_seed(0))

    fitted = branched().fit(shuffled(TRAIN))
    assert fitted.outputs_.full_accuracy > 0.9
    assert fitted.outputs_.accuracies[1] > 0.9


UNLABELLED = {
    "array": lambda X: X,
    "loader": lambda X: DataLoader(torch.utils.data.TensorDataset(torch.from_numpy(X)), batch_size=128),
    "loader of x": lambda X: DataLoader(X, batch_size=128),
}


def plain_answers(X):
    with torch.inference_mode():
        return branched_trained()(torch.from_numpy(X)).argmax(dim=1).numpy()


@cache
def fitted_to_plain_answers():
    return branched().fit(TRAIN[0], plain_answers(TRAIN[0]))


@pytest.mark.parametrize("source", UNLABELLED)
def test_without_labels_heads_learn_the_backbones_answers(source):
    source_of = UNLABELLED[source]
    fitted = branched().fit(source_of(TRAIN[0]))
    reference = copy.deepcopy(fitted_to_plain_answers())
    assert plain_answers(VAL[0]).tolist() != VAL[1].tolist()
    assert_same_branches(fitted, reference)
    assert fitted.outputs_.full_accuracy == 1.0
    fitted.calibrate(source_of(VAL[0]))
    assert fitted.self_calibrated_ is False
    assert_same_branches(fitted, reference.calibrate(VAL[0], plain_answers(VAL[0])))
    assert fitted.pareto().full_accuracy == 1.0
    assert fitted.pareto().at(budget=0.1).accuracy < 1.0
    assert fitted.predict_anytime(TEST[0], 1.0).tolist() == plain_answers(TEST[0]).tolist()
    assert 0.9 < fitted.score(TEST[0], plain_answers(TEST[0]), budget=0.1) < 1.0


@pytest.mark.parametrize("positions", [False, True])
def test_heads_learn_from_labels_of_any_kind(uncalibrated, positions):
    names = np.array(list("jihgfedcba"))
    fitted = branched(classes=names).fit(TRAIN[0], TRAIN[1] if positions else names[TRAIN[1]])
    assert_same_branches(fitted, uncalibrated)
    assert fitted.classes_.tolist() == names.tolist()


# -- calibration on what was held out ---------------------------------------------------------------------------------

WARNING = {
    "predict": [TEST[0]],
    "predict_proba": [TEST[0]],
    "trace": [TEST[0]],
    "score": TEST,
    "pareto": [],
    "pareto on data": TEST,
    "operating_point": [],
}


@pytest.mark.parametrize("call", WARNING)
def test_using_thresholds_of_the_held_out_part_warns_where_it_is_done(uncalibrated, call):
    fitted = uncalibrated
    assert fitted.self_calibrated_ is True
    with pytest.warns(CalibrationWarning, match="call calibrate with data that it has not seen") as records:
        getattr(fitted, call.split()[0])(*WARNING[call])
    assert len(records) == 1
    assert records[0].filename == __file__
    fitted.calibrate(*VAL)
    assert fitted.self_calibrated_ is False
    getattr(fitted, call.split()[0])(*WARNING[call])


def test_what_needs_no_thresholds_does_not_warn(uncalibrated):
    fitted = uncalibrated
    fitted.record(*TEST)
    fitted.predict_anytime(TEST[0], 0.5)
    assert fitted.fit(*TRAIN).self_calibrated_ is True


@pytest.mark.parametrize("size", [0.25, 0.1])
@pytest.mark.parametrize("head", [flat_head, "prototype"])
def test_the_held_out_part_is_recorded_from_cached_features(size, head):
    fitted = branched(calibration_size=size, head=head).fit(*TRAIN)
    _, held_out = hold_out(TRAIN[1], size, 0)
    assert fitted.outputs_.n_samples == len(held_out) == round(size * len(TRAIN[1]))
    assert fitted.outputs_.labels.tolist() == TRAIN[1][held_out].tolist()
    live = fitted.record(TRAIN[0][held_out], TRAIN[1][held_out])
    assert live.predictions.tolist() == fitted.outputs_.predictions.tolist()
    np.testing.assert_allclose(live.scores, fitted.outputs_.scores, rtol=1e-4)


def test_heads_do_not_learn_from_the_held_out_part(uncalibrated):
    _, held_out = hold_out(TRAIN[1], 0.25, 0)
    spoilt = TRAIN[0].copy()
    spoilt[held_out] = 0
    one, other = uncalibrated, branched().fit(spoilt, TRAIN[1])
    assert one.history_ == other.history_
    assert other.outputs_.full_accuracy < 0.3


# -- backbones of every kind ------------------------------------------------------------------------------------------


def test_a_backbone_given_as_its_stages(model):
    fitted = branched(tuple(stages_of(branched_trained())), exits="auto").fit(*TRAIN).calibrate(*VAL)
    assert_same_branches(fitted, model)
    assert fitted.outputs_.stage_costs.tolist() == STAGE_MACS
    assert fitted.predict(TEST[0]).tolist() == model.predict(TEST[0]).tolist()
    assert len(fitted.exits_) == 3


def test_a_wrapped_module(model):
    fitted = branched(nn.DataParallel(branched_trained())).fit(*TRAIN).calibrate(*VAL)
    assert_same_branches(fitted, model)
    assert fitted.exits_ == EXITS


@pytest.fixture
def named(monkeypatch):
    """timm makes one tiny network under the name of another, with weights of its own where they are pretrained."""
    create, requests = timm.create_model, []

    def made(name, pretrained=False):
        requests.append((name, pretrained))
        torch.manual_seed(0 if pretrained else 1)
        overlay = {"input_size": (3, 32, 32), "mean": (0.2, 0.3, 0.4), "fixed_input_size": False}
        net = create(
            name, img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=3,
            pretrained_cfg_overlay=overlay,
        )  # fmt: skip
        nn.init.normal_(net.head.weight)
        return net

    monkeypatch.setattr(timm, "create_model", made)
    return "vit_tiny_patch16_224", requests, made


@self_calibrated
def test_a_timm_name(named):
    name, requests, create_model = named
    X = np.random.default_rng(1).random((40, 3, 40, 32), dtype=np.float32)
    params = {"recipe": FrozenRecipe(epochs=1), "calibrator": Fixed([np.inf, np.inf, -np.inf])}
    fitted = MultiExitClassifier(name, ["blocks.0", "blocks.1"], **params).fit(X, np.arange(40) % 3)
    assert requests == [(name, True)]
    net = create_model(name, pretrained=True).eval()
    cropped = torch.from_numpy(X[:, :, 4:36])
    mean, std = torch.tensor([0.2, 0.3, 0.4])[:, None, None], torch.tensor(net.pretrained_cfg["std"])[:, None, None]
    with torch.inference_mode():
        expected = net((cropped - mean) / std).softmax(dim=1).numpy()
    np.testing.assert_allclose(fitted.predict_proba(X), expected, atol=1e-5)


def test_preprocessing_that_is_given(model):
    fitted = branched(preprocess=lambda x: (x - 10) / 3).fit(TRAIN[0] * 3 + 10, TRAIN[1])
    fitted.calibrate(VAL[0] * 3 + 10, VAL[1])
    assert fitted.score(TEST[0] * 3 + 10, TEST[1]) == pytest.approx(model.score(*TEST), abs=0.01)


# -- the backbone and the data are given back as they were ------------------------------------------------------------


@pytest.mark.parametrize("what", ["backbone", "preprocess"])
def test_the_users_data_are_not_written_to(what):
    x = TRAIN[0].copy()
    net = branched_trained()
    if what == "backbone":
        net.one = nn.Sequential(nn.Threshold(0.5, 1.0, inplace=True), *net.one)
    fitted = branched(net, preprocess=(lambda images: images.sub_(0.5)) if what == "preprocess" else None)
    with suppress(ValueError):
        fitted.fit(x, TRAIN[1]).calibrate(x, TRAIN[1]).predict(x)
    assert x.tobytes() == TRAIN[0].tobytes()


def test_a_random_state_object_draws_anew_and_none_is_allowed():
    seeds = np.random.RandomState(0)
    one, other = (branched(random_state=seeds).fit(*TRAIN) for _ in range(2))
    assert not np.array_equal(one.outputs_.labels, other.outputs_.labels)
    again = branched(random_state=np.random.RandomState(0)).fit(*TRAIN)
    assert_same_branches(one, again)
    branched(random_state=None).fit(*TRAIN)
