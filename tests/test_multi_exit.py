import copy
import io
import random
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache, partial

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader

from adaptexit import CalibrationWarning, ExitOutputs, FrozenRecipe, MultiExitClassifier, ThresholdCalibrator
from adaptexit.core.scores import max_proba, softmax
from adaptexit.heads import Head, HeadOutput, MLPHead
from adaptexit.labels import hold_out
from adaptexit.staging.cost import measure_latency
from tests.nets import (
    EXITS,
    QUICK,
    AddingHead,
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
    native_net,
)

TRAIN, VAL, TEST = digits()
pytestmark = pytest.mark.filterwarnings("ignore::adaptexit.LabelWarning")
BUDGETS = [None, 0.07, 0.2, 0.5, 1.0]
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
    return fitted._network.heads


def watched(net, names=(*EXITS, "out")):
    """Sizes of the batches that every named part of the net is run on."""
    sizes = {name: [] for name in names}
    for name in names:
        net.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: sizes[name].append(len(output))
        )
    return sizes


def recording_heads():
    """A factory of heads, and those that it made."""
    made = []

    def factory(spec, n_classes):
        made.append(Recording(flat_head(spec, n_classes)))
        return made[-1]

    return factory, made


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
def test_answers_equal_a_hand_written_loop(model, budget):
    X = TEST[0][:150]
    point = model.calibrator_.operating_point(budget)
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


@pytest.mark.parametrize("budget", [None, 0.07, 0.3])
def test_an_answer_does_not_depend_on_the_batch(model, budget):
    X = TEST[0][:120]
    whole = model.trace(X, budget=budget)
    order = np.random.default_rng(0).permutation(len(X))
    shuffled = model.trace(X[order], budget=budget)
    alone = [model.trace(X[i : i + 1], budget=budget) for i in range(len(X))]
    assert shuffled.labels.tolist() == whole.labels[order].tolist()
    assert shuffled.exits.tolist() == whole.exits[order].tolist()
    assert [int(trace.labels[0]) for trace in alone] == whole.labels.tolist()
    assert [int(trace.exits[0]) for trace in alone] == whole.exits.tolist()


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
@pytest.mark.parametrize("memory_limit", [0, 20_000, 1 << 30])
def test_batch_size_and_memory_limit_do_not_change_answers(model, batch_size, memory_limit):
    X = TEST[0][:150]
    other = copy.copy(model).set_params(batch_size=batch_size, memory_limit=memory_limit)
    assert other.trace(X).labels.tolist() == model.trace(X).labels.tolist()
    assert other.trace(X).exits.tolist() == model.trace(X).exits.tolist()


# -- who is computed --------------------------------------------------------------------------------------------------


def test_stages_behind_an_exit_are_run_for_survivors_only_in_full_batches():
    net = branched_trained()
    sizes = watched(net)
    factory, made = recording_heads()
    calibrator = Fixed([0.9, 0.9, np.inf, -np.inf])
    fitted = branched(net, head=factory, batch_size=50, calibrator=calibrator).fit(*TRAIN).calibrate(*VAL)
    for seen in [*sizes.values(), *(head.sizes for head in made)]:
        seen.clear()
    trace = fitted.trace(TEST[0])
    reach = [int((trace.exits >= k).sum()) for k in range(4)]
    assert reach[0] == len(TEST[0]) > reach[1] > reach[2] == reach[3] > 0
    assert [sum(sizes[name]) for name in sizes] == reach
    assert [sum(head.sizes) for head in made] == [*reach[:2], 0]
    assert sizes["two"] == [50] * (reach[1] // 50) + [reach[1] % 50] * (reach[1] % 50 > 0)


def test_exits_that_are_off_are_not_run_nor_paid():
    factory, made = recording_heads()
    net = branched_trained()
    fitted = branched(net, head=factory, calibrator=Fixed([np.inf, 0.9, np.inf, -np.inf])).fit(*TRAIN).calibrate(*VAL)
    sizes = watched(net)
    for head in made:
        head.sizes.clear()
    trace = fitted.trace(TEST[0])
    assert set(trace.exits.tolist()) == {1, 3}
    assert made[0].sizes == made[2].sizes == []
    assert sum(made[1].sizes) == len(TEST[0])
    assert sum(sizes["three"]) == sum(sizes["out"]) == (trace.exits == 3).sum()
    early = sum(STAGE_MACS[:2]) + HEAD_MACS[1]
    assert set(trace.costs.tolist()) == {early, early + sum(STAGE_MACS[2:])}


def test_with_all_exits_off_the_plain_model_remains():
    factory, made = recording_heads()
    fitted = branched(head=factory, calibrator=Fixed([np.inf, np.inf, np.inf, -np.inf])).fit(*TRAIN).calibrate(*VAL)
    for head in made:
        head.sizes.clear()
    with torch.inference_mode():
        logits = branched_trained()(torch.from_numpy(TEST[0])).numpy()
    np.testing.assert_allclose(fitted.predict_proba(TEST[0]), softmax(logits), atol=1e-6)
    assert fitted.trace(TEST[0]).relative_costs.tolist() == [1.0] * len(TEST[0])
    assert [head.sizes for head in made] == [[], [], []]


def test_at_the_cheapest_budget_only_the_first_block_is_run(model):
    model = copy.deepcopy(model)
    sizes = watched(model.backbone)
    model.predict(TEST[0], budget=model.pareto().cost[0])
    assert sum(sizes["one"]) == len(TEST[0])
    assert sizes["two"] == sizes["three"] == sizes["out"] == []


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.07, 0.1, 0.3, 0.7, 1.0, 3.0])
def test_a_budget_is_kept_on_the_calibration_data(model, budget):
    trace = model.trace(VAL[0], budget=budget)
    point = model.pareto().at(budget=budget)
    assert trace.relative_costs.mean() <= budget + 1e-9
    assert trace.relative_costs.mean() == pytest.approx(point.cost, abs=1e-12)
    assert model.score(*VAL, budget=budget) == pytest.approx(point.accuracy, abs=1e-12)
    assert not any(p.cost <= budget and p.accuracy > point.accuracy for p in model.pareto().points)


def test_without_a_budget_calibrated_accuracy_does_not_drop(model):
    assert model.score(*VAL) >= np.mean(model.predict_anytime(VAL[0], 1.0) == VAL[1])
    assert model.trace(VAL[0]).relative_costs.mean() < 1


def test_the_calls_budget_goes_before_the_constructors_and_that_before_the_calibrators(model):
    bounded = branched(budget=0.1, calibrator=ThresholdCalibrator(budget=0.7)).fit(*TRAIN).calibrate(*VAL)
    assert bounded.predict(TEST[0]).tolist() == bounded.predict(TEST[0], budget=0.1).tolist()
    assert bounded.predict(TEST[0]).tolist() != bounded.predict(TEST[0], budget=0.7).tolist()
    assert bounded.predict(TEST[0], budget=0.1).tolist() == model.predict(TEST[0], budget=0.1).tolist()
    at_calibrators = bounded.predict(TEST[0], budget=0.7)
    assert bounded.set_params(budget=None).predict(TEST[0]).tolist() == at_calibrators.tolist()


@pytest.mark.parametrize("call", ["predict", "predict_proba", "trace"])
def test_a_budget_below_the_cheapest_point(model, call):
    cheapest = (STAGE_MACS[0] + HEAD_MACS[0]) / sum(STAGE_MACS)
    with pytest.raises(ValueError, match=f"budget must be at least {cheapest:.4g}.*got 0.001"):
        getattr(model, call)(TEST[0], budget=0.001)


# -- anytime ----------------------------------------------------------------------------------------------------------


def test_anytime_takes_the_deepest_exit_within_the_limit(model):
    full = sum(STAGE_MACS)
    alone = [(sum(STAGE_MACS[: k + 1]) + HEAD_MACS[k]) / full for k in range(3)]
    assert alone[2] > 1  # the last head costs more than what is left of the model
    answers = model.record(*TEST).predictions
    limits = [(alone[0], 0), (alone[1] * 0.99, 0), (alone[1], 1), (0.999, 1), (1.0, 3), (50.0, 3)]
    for limit, k in limits:
        assert model.predict_anytime(TEST[0], limit).tolist() == answers[k].tolist()
    assert answers[0].tolist() != answers[1].tolist() != answers[3].tolist()


def test_anytime_runs_one_exit_and_nothing_behind_it():
    factory, made = recording_heads()
    net = branched_trained()
    fitted = branched(net, head=factory).fit(*TRAIN).calibrate(*VAL)
    sizes = watched(net)
    for head in made:
        head.sizes.clear()
    fitted.predict_anytime(TEST[0], 0.6)
    assert [sum(head.sizes) for head in made] == [0, len(TEST[0]), 0]
    assert [sum(seen) for seen in sizes.values()] == [len(TEST[0]), len(TEST[0]), 0, 0]


def test_a_limit_below_the_cheapest_exit(model):
    cheapest = (STAGE_MACS[0] + HEAD_MACS[0]) / sum(STAGE_MACS)
    with pytest.raises(ValueError, match=f"limit must be at least {cheapest:.4g}.*cheapest exit; got 0.01"):
        model.predict_anytime(TEST[0], 0.01)


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


@pytest.mark.parametrize("data", [TEST, loader_of(*TEST), loader_of(*TEST, shuffle=True), (TEST, None)])
def test_the_frontier_on_other_data_is_what_predict_gives_there(model, data):
    frontier = model.pareto(data) if isinstance(data, DataLoader) else model.pareto(*data)
    assert len(frontier.points) == len(model.pareto().points)
    for budget in (0.07, 0.2, 0.6, 1.0):
        point = frontier.at(budget=budget)
        assert point.accuracy == pytest.approx(model.score(*TEST, budget=budget))
        assert point.cost == pytest.approx(model.trace(TEST[0], budget=budget).relative_costs.mean())


def test_the_frontier_on_the_calibration_data(model):
    frontier = model.pareto()
    assert frontier is model.calibrator_.frontier_
    assert (np.diff(frontier.cost) > 0).all()
    assert frontier.full_accuracy == np.mean(branched_trained()(torch.from_numpy(VAL[0])).argmax(1).numpy() == VAL[1])
    assert frontier.n_samples == len(VAL[1])
    assert model.pareto().points[model.point_index(0.3)] is frontier.at(budget=0.3)


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
    on = model.calibrator_.operating_point(0.5).on
    for k in set(trace.exits.tolist()):
        paid = sum(STAGE_MACS[: k + 1]) + sum(
            macs for macs, exit_on in zip(HEAD_MACS[: k + 1], on, strict=False) if exit_on
        )
        assert set(trace.costs[trace.exits == k].tolist()) == {paid}
    assert trace.full_cost == sum(STAGE_MACS)


def test_given_costs_are_cumulative_and_heads_are_free():
    fitted = branched(cost=[1, 3, 9, 10]).fit(*TRAIN).calibrate(*VAL)
    assert fitted.outputs_.stage_costs.tolist() == [1, 2, 6, 1]
    assert fitted.outputs_.exit_costs.tolist() == [0, 0, 0, 0]
    assert fitted.cost_unit_ == "given"
    trace = fitted.trace(TEST[0])
    assert trace.costs.tolist() == np.array([1.0, 3.0, 9.0, 10.0])[trace.exits].tolist()
    assert fitted.predict_anytime(TEST[0], 0.9).tolist() == fitted.record(*TEST).predictions[2].tolist()


def test_measured_costs():
    fitted = branched(exits=["two"], cost="latency").fit(*TRAIN)
    assert fitted.cost_unit_ == "seconds"
    assert fitted.outputs_.stage_costs.shape == (2,)
    assert (fitted.outputs_.stage_costs > 1e-8).all()
    assert fitted.outputs_.full_cost < 0.1
    assert 0 < fitted.outputs_.exit_costs[0] < 0.1
    assert fitted.outputs_.exit_costs[1] == 0


# -- labels -----------------------------------------------------------------------------------------------------------

SOURCES = {
    "tensors": lambda X, y: (torch.from_numpy(X), torch.from_numpy(y)),
    "pair": lambda X, y: ((X, y), None),
    "dataset": lambda X, y: (loader_of(X, y).dataset, None),
    "loader": lambda X, y: (loader_of(X, y, batch_size=128), None),
    "double": lambda X, y: (X.astype(np.float64), y),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_model(model, source):
    given = SOURCES[source]
    fitted = branched().fit(*given(*TRAIN)).calibrate(*given(*VAL))
    assert_same_branches(fitted, model)
    X, y = given(*TEST)
    assert fitted.score(X, y) == model.score(*TEST)
    assert fitted.predict(X[0] if isinstance(X, tuple) else X).tolist() == model.predict(TEST[0]).tolist()


@self_calibrated
def test_a_shuffling_loader_serves_to_fit_to_calibrate_and_to_score_but_not_to_predict():
    def shuffled(data):
        return loader_of(*data, shuffle=True, generator=torch.Generator().manual_seed(0))

    fitted = branched().fit(shuffled(TRAIN))
    assert fitted.outputs_.full_accuracy > 0.9  # labels stay with their samples
    assert fitted.outputs_.accuracies[1] > 0.9
    assert fitted.calibrate(shuffled(VAL)).outputs_.labels.tolist() != VAL[1].tolist()
    assert fitted.score(shuffled(TEST)) == fitted.score(*TEST)
    for call in (fitted.predict, fitted.predict_proba, fitted.trace, partial(fitted.predict_anytime, limit=1.0)):
        with pytest.raises(ValueError, match="X must keep its order"):
            call(shuffled(TEST))


UNLABELLED = {
    "array": lambda X: X,
    "dataset of one": lambda X: torch.utils.data.TensorDataset(torch.from_numpy(X)),
    "dataset of x": lambda X: list_dataset(X),
    "loader": lambda X: DataLoader(torch.utils.data.TensorDataset(torch.from_numpy(X)), batch_size=128),
}


def list_dataset(X):
    class Inputs(torch.utils.data.Dataset):
        def __len__(self):
            return len(X)

        def __getitem__(self, i):
            return X[i]

    return Inputs()


def plain_answers(X):
    with torch.inference_mode():
        return branched_trained()(torch.from_numpy(X)).argmax(dim=1).numpy()


@cache
def fitted_to_plain_answers():
    return branched().fit(TRAIN[0], plain_answers(TRAIN[0]))


@pytest.mark.parametrize("source", UNLABELLED)
def test_without_labels_heads_learn_the_backbones_answers(source):
    given = UNLABELLED[source]
    fitted = branched().fit(given(TRAIN[0]))
    told = copy.deepcopy(fitted_to_plain_answers())
    assert plain_answers(VAL[0]).tolist() != VAL[1].tolist()
    assert_same_branches(fitted, told)
    assert fitted.outputs_.full_accuracy == 1.0
    fitted.calibrate(given(VAL[0]))
    assert fitted.self_calibrated_ is False
    assert_same_branches(fitted, told.calibrate(VAL[0], plain_answers(VAL[0])))
    assert fitted.pareto().full_accuracy == 1.0
    assert fitted.pareto().at(budget=0.3).accuracy < 1.0
    assert fitted.predict_anytime(TEST[0], 1.0).tolist() == plain_answers(TEST[0]).tolist()
    assert 0.9 < fitted.score(TEST[0], plain_answers(TEST[0]), budget=0.3) < 1.0


@pytest.mark.parametrize("classes", [list("abcdefghij"), np.array(list("jihgfedcba")), list(range(5, 15))])
def test_labels_of_any_kind(model, classes):
    names = np.asarray(classes)
    fitted = branched(classes=classes).fit(TRAIN[0], names[TRAIN[1]]).calibrate(VAL[0], names[VAL[1]])
    assert_same_branches(fitted, model)
    assert fitted.classes_.tolist() == names.tolist()
    assert fitted.predict(TEST[0]).tolist() == names[model.predict(TEST[0])].tolist()
    assert fitted.trace(TEST[0]).labels.tolist() == names[model.predict(TEST[0])].tolist()
    assert fitted.predict_anytime(TEST[0], 1.0).tolist() == names[plain_answers(TEST[0])].tolist()
    assert fitted.score(TEST[0], names[TEST[1]]) == model.score(*TEST)


def test_validation_data_may_lack_a_class(uncalibrated):
    few = VAL[1] < 7
    fitted = uncalibrated.calibrate(VAL[0][few], VAL[1][few])
    assert fitted.classes_.tolist() == list(range(10))
    assert fitted.predict_proba(TEST[0]).shape == (len(TEST[0]), 10)


# -- calibration on what was held out ---------------------------------------------------------------------------------

WARNING = {
    "predict": [TEST[0]],
    "predict_proba": [TEST[0]],
    "trace": [TEST[0]],
    "score": TEST,
    "pareto": [],
    "pareto on data": TEST,
    "point_index": [],
}


@pytest.mark.parametrize("call", WARNING)
def test_using_thresholds_of_the_held_out_part_warns_where_it_is_done(uncalibrated, call):
    fitted = uncalibrated
    assert fitted.self_calibrated_ is True
    with pytest.warns(CalibrationWarning, match="call calibrate with data that it has not seen") as seen:
        getattr(fitted, call.split()[0])(*WARNING[call])
    assert len(seen) == 1
    assert seen[0].filename == __file__
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


def test_calibrate_leaves_the_heads_as_they_are(uncalibrated):
    fitted = uncalibrated
    before = [copy.deepcopy(head.state_dict()) for head in heads_of(fitted)]
    assert fitted.calibrate(*VAL) is fitted
    for head, state in zip(heads_of(fitted), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in head.state_dict().items())


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
    seen = []

    def factory(spec, n_classes):
        seen.append((spec.shape, spec.layout, n_classes))
        return flat_head(spec, n_classes)

    fitted = branched(head=factory).fit(*TRAIN)
    assert seen == [((8, 8, 8), "NCHW", 10), ((16, 4, 4), "NCHW", 10), ((32, 4, 4), "NCHW", 10)]
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
    made = iter(kinds)
    received = []

    def factory(spec, n_classes):
        head = next(made)(spec, n_classes)
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
        return HeadOutput(logits, torch.full_like(logits, 2.0))


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
    assert [made.spec.layout for made in heads_of(fitted)] == [layout] * 2
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


# -- backbones of every kind ------------------------------------------------------------------------------------------


def stages_of(net):
    return [net.one, net.two, net.three, nn.Sequential(net.pool, net.flat, net.drop, net.out)]


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_backbone_given_as_its_stages(model, kind):
    stages = kind(stages_of(branched_trained()))
    fitted = branched(stages, exits="auto").fit(*TRAIN).calibrate(*VAL)
    assert_same_branches(fitted, model)
    assert fitted.outputs_.stage_costs.tolist() == STAGE_MACS
    assert fitted.predict(TEST[0]).tolist() == model.predict(TEST[0]).tolist()
    assert len(fitted.exits_) == 3


def test_a_network_built_with_exits_is_only_calibrated(model):
    net = native_net()
    state = copy.deepcopy(net.state_dict())
    fitted = MultiExitClassifier(net).fit(*VAL)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert fitted.exits_ == ["exit 0", "exit 1"]
    assert fitted.exit_names == ["exit 0", "exit 1", "full model"]
    assert fitted.self_calibrated_ is False
    assert fitted.outputs_.n_samples == len(VAL[1])
    assert fitted.history_ == {}
    known = [0, 1, 3]
    outputs = fitted.record(*TEST)
    with torch.inference_mode():
        logits = torch.stack(net(torch.from_numpy(TEST[0]))).numpy()
    assert outputs.predictions.tolist() == logits.argmax(axis=2).tolist()
    assert outputs.predictions.tolist() == model.record(*TEST).predictions[known].tolist()
    assert fitted.outputs_.stage_costs.tolist() == STAGE_MACS[:3]
    assert fitted.outputs_.exit_costs.tolist() == [*HEAD_MACS[:2], STAGE_MACS[3]]


def test_answers_of_a_network_built_with_exits_equal_a_hand_written_loop():
    net = native_net()
    fitted = MultiExitClassifier(net).fit(*VAL)
    cutoffs = fitted.calibrator_.point_.cutoffs
    expected = []
    with torch.inference_mode():
        for i in range(150):
            logits = net(torch.from_numpy(TEST[0][i : i + 1]))
            k = next(k for k in range(3) if k == 2 or float(logits[k].softmax(dim=1).max()) > cutoffs[k])
            expected.append((int(logits[k].argmax()), k))
    trace = fitted.trace(TEST[0][:150])
    assert list(zip(trace.labels.tolist(), trace.exits.tolist(), strict=True)) == expected
    assert len(set(trace.exits.tolist())) == 3
    sizes = watched(net, ["stages.1", "stages.2", "heads.2"])
    exits = fitted.trace(TEST[0]).exits
    assert [sum(seen) for seen in sizes.values()] == [(exits >= 1).sum(), (exits >= 2).sum(), (exits == 2).sum()]


def test_a_network_built_with_exits_needs_no_labels():
    fitted = MultiExitClassifier(native_net(), calibrator=ThresholdCalibrator(search="geometric")).fit(VAL[0])
    assert fitted.pareto().full_accuracy == 1.0
    assert fitted.calibrate(*VAL).pareto().full_accuracy < 1.0


@pytest.mark.parametrize("factory", [branched_trained, lambda: branched_trained().train()])
def test_a_factory_is_called_once(model, factory):
    calls = []

    def counted():
        calls.append(1)
        return factory()

    fitted = branched(counted, device="cpu").fit(*TRAIN).calibrate(*VAL)
    fitted.predict(TEST[0])
    assert len(calls) == 1
    assert_same_branches(fitted, model)


def test_a_wrapped_module(model):
    fitted = branched(nn.DataParallel(branched_trained())).fit(*TRAIN).calibrate(*VAL)
    assert_same_branches(fitted, model)
    assert fitted.exits_ == EXITS


def test_a_wrapped_network_built_with_exits():
    fitted = MultiExitClassifier(nn.DataParallel(native_net())).fit(*VAL)
    assert_same_branches(fitted, MultiExitClassifier(native_net()).fit(*VAL))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_modules_of_other_precision(model, dtype):
    fitted = branched(branched_trained().to(dtype)).fit(*TRAIN).calibrate(*VAL)
    assert next(heads_of(fitted)[0].parameters()).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert fitted.score(*TEST) == pytest.approx(model.score(*TEST), abs=0.02)
    assert fitted.predict_proba(TEST[0]).sum(axis=1) == pytest.approx(np.ones(len(TEST[0])), abs=1e-5)
    if dtype == torch.float64:
        assert fitted.outputs_.scores.dtype == np.float64
        np.testing.assert_allclose(fitted.outputs_.scores[-1], model.outputs_.scores[-1], rtol=1e-5)


@pytest.fixture
def named(monkeypatch):
    """timm makes one tiny network under the name of another, with weights of its own where they are pretrained."""
    create, asked = timm.create_model, []

    def made(name, pretrained=False):
        asked.append((name, pretrained))
        torch.manual_seed(0 if pretrained else 1)
        overlay = {"input_size": (3, 32, 32), "mean": (0.2, 0.3, 0.4), "fixed_input_size": False}
        net = create(
            name, img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=3,
            pretrained_cfg_overlay=overlay,
        )  # fmt: skip
        nn.init.normal_(net.head.weight)
        return net

    monkeypatch.setattr(timm, "create_model", made)
    return "vit_tiny_patch16_224", asked, made


@self_calibrated
def test_a_timm_name(named):
    name, asked, made = named
    X = np.random.default_rng(1).random((40, 3, 40, 32), dtype=np.float32)
    params = {"recipe": FrozenRecipe(epochs=1), "calibrator": Fixed([np.inf, np.inf, -np.inf])}
    fitted = MultiExitClassifier(name, ["blocks.0", "blocks.1"], **params).fit(X, np.arange(40) % 3)
    assert asked == [(name, True)]
    net = made(name, pretrained=True).eval()
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


def snapshot(net):
    return {
        "weights": {key: value.clone() for key, value in net.state_dict().items()},
        "modes": [part.training for part in net.modules()],
        "grads": [(p.requires_grad, p.grad) for p in net.parameters()],
        "places": [p.data_ptr() for p in net.parameters()],
        "hooks": [
            (list(part._forward_hooks), list(part._forward_pre_hooks), list(part._backward_hooks))
            for part in net.modules()
        ],
        "attributes": [sorted(vars(part)) for part in net.modules()],
    }


def assert_as_before(net, before):
    now = snapshot(net)
    weights, known = now.pop("weights"), before["weights"]
    assert list(weights) == list(known)
    assert all(torch.equal(value, known[key]) for key, value in weights.items())
    assert now == {key: value for key, value in before.items() if key != "weights"}


@pytest.mark.parametrize("head", [flat_head, "conv"])
def test_the_backbone_is_shared_and_stays_as_it_was(model, head):
    net = branched_trained().train()
    net.two[1].eval()
    net.one[0].weight.requires_grad_(False)
    seen = []
    net.out.register_forward_hook(lambda module, inputs, output: seen.append(module.training))
    before = snapshot(net)
    fitted = branched(net, head=head).fit(*TRAIN)
    assert_as_before(net, before)
    assert seen
    fitted.calibrate(*VAL)
    seen.clear()
    fitted.predict(TEST[0])
    fitted.predict_proba(TEST[0])
    fitted.score(*TEST)
    fitted.pareto(*TEST)
    fitted.predict_anytime(TEST[0], 1.0)
    assert_as_before(net, before)
    assert fitted.backbone is net
    assert seen
    assert not any(seen)
    if head is flat_head:
        assert_same_branches(fitted, model)


@pytest.mark.parametrize("after", [0, 700])
def test_the_backbone_stays_as_it_was_after_a_failure(after):
    net = branched_trained().train()
    left = [10**9]

    def failing(module, inputs, output):
        left[0] -= len(output)
        if left[0] < 0:
            raise RuntimeError("out of calls")

    net.three.register_forward_hook(failing)
    before = snapshot(net)
    fitted = branched(net)
    if after:
        fitted.fit(*TRAIN)
    left[0] = 100
    with pytest.raises(RuntimeError, match="out of calls"):
        fitted.predict_anytime(TEST[0], 1.0) if after else fitted.fit(*TRAIN)
    assert_as_before(net, before)


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


def random_states():
    return torch.random.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002


DRAWING = {
    "array": lambda: branched().fit(*TRAIN),
    "loader": lambda: branched().fit(loader_of(*TRAIN)),
    "dataset": lambda: branched().fit(loader_of(*TRAIN).dataset),
    "shuffled": lambda: branched().fit(loader_of(*TRAIN, shuffle=True)),
    "named heads": lambda: branched(head="refined_prototype").fit(*TRAIN),
    "chosen exits": lambda: branched(exits=1).fit(*TRAIN),
    "native": lambda: MultiExitClassifier(native_net(), cost=[1, 2, 3]).fit(loader_of(*TRAIN)),
    "calibrate": lambda: branched().fit(*TRAIN).calibrate(loader_of(*VAL)),
    "bagged": lambda: branched(calibrator=ThresholdCalibrator(search="coord", n_points=20)).fit(*TRAIN),
    "answers": lambda: [call(loader_of(*TEST)) for call in (branched_model().predict, branched_model().score)],
    "records": lambda: branched_model().pareto(loader_of(*TEST).dataset),
}


@pytest.mark.parametrize("name", DRAWING)
def test_global_random_states_are_untouched(model, name):
    native_net()
    before = random_states()
    DRAWING[name]()
    assert random_states() == before


def test_global_random_states_are_untouched_by_a_timm_name(named):
    before = random_states()
    MultiExitClassifier(named[0], ["blocks.0"], preprocess=None, recipe=FrozenRecipe(epochs=1)).fit(IMAGES, COLOURS)
    assert random_states() == before


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_fit_where_gradients_are_off(model, mode):
    with mode():
        fitted = branched().fit(*TRAIN).calibrate(*VAL)
    assert_same_branches(fitted, model)


def test_autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fitted = branched().fit(*TRAIN).calibrate(*VAL)
        trace, labels = fitted.trace(TEST[0]), fitted.predict(TEST[0])
    assert np.mean(labels == TEST[1]) == pytest.approx(model.score(*TEST), abs=0.03)
    assert fitted.outputs_.scores.dtype == np.float32
    assert trace.labels.tolist() == labels.tolist()
    assert trace.scores.tolist() != fitted.trace(TEST[0]).scores.tolist()


# -- features are kept ------------------------------------------------------------------------------------------------


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


def test_a_second_fit_does_not_run_the_backbone(tmp_path, uncalibrated):
    counted = Counted()
    ran, first = counted.runs(tmp_path)
    assert ran
    again, second = counted.runs(tmp_path)
    assert not again
    assert_same_branches(first, second)
    assert_same_branches(first, uncalibrated)
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
        return HeadOutput(self.linear(reduced))


def test_a_head_that_keeps_more_of_a_feature_is_not_given_less(tmp_path):
    branched(cache_dir=tmp_path, head=partial(Keeping, n=3)).fit(*TRAIN)
    fitted = branched(cache_dir=tmp_path, head=partial(Keeping, n=5)).fit(*TRAIN)
    assert_same_branches(fitted, branched(head=partial(Keeping, n=5)).fit(*TRAIN))


def test_features_recorded_under_autocast_do_not_serve_without(tmp_path, uncalibrated):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        branched(cache_dir=tmp_path).fit(*TRAIN)
    assert_same_branches(branched(cache_dir=tmp_path).fit(*TRAIN), uncalibrated)


def test_features_that_outgrow_memory_go_to_disk(monkeypatch):
    files = []
    temporary = __import__("tempfile").TemporaryFile

    def counted(*args, **kwargs):
        files.append(1)
        return temporary(*args, **kwargs)

    monkeypatch.setattr("adaptexit.training.cache.tempfile.TemporaryFile", counted)
    in_memory = branched().fit(*TRAIN)
    assert files == []
    on_disk = branched(cache_memory=0).fit(*TRAIN)
    assert len(files) == 4
    assert_same_branches(in_memory, on_disk)
    for one, other in zip(heads_of(in_memory), heads_of(on_disk), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_features_in_half_precision(model, uncalibrated):
    fitted = branched(cache_half=True).fit(*TRAIN)
    assert fitted.outputs_.scores.tolist() != uncalibrated.outputs_.scores.tolist()
    assert fitted.calibrate(*VAL).score(*TEST) == pytest.approx(model.score(*TEST), abs=0.02)


# -- bars -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verbose", [0, 1])
def test_bars_are_shown_on_request(verbose):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        fitted = branched(head="prototype", verbose=verbose).fit(*TRAIN).calibrate(*VAL)
        fitted.predict(TEST[0])
        fitted.pareto(*TEST)
    assert out.getvalue() == ""
    shown = err.getvalue()
    assert (shown != "") == bool(verbose)
    if verbose:
        words = (
            "recording features",
            "training heads",
            "training confidence",
            "calibrating",
            "predicting",
            "recording",
        )
        assert [word for word in words if word not in shown] == []


def test_a_random_state_object_draws_anew_and_none_is_allowed():
    seeds = np.random.RandomState(0)
    one, other = (branched(random_state=seeds).fit(*TRAIN) for _ in range(2))
    assert not np.array_equal(one.outputs_.labels, other.outputs_.labels)
    again = branched(random_state=np.random.RandomState(0)).fit(*TRAIN)
    assert_same_branches(one, again)
    branched(random_state=None).fit(*TRAIN)


def test_latencies_by_batch_size(model, monkeypatch):
    monkeypatch.setattr("adaptexit.network.measure_latency", partial(measure_latency, min_seconds=0.02))
    measured = model.latencies(TEST[0], batch_sizes=(1, 4, 700))
    assert measured.stage_s.shape == measured.exit_s.shape == (4, 3)
    assert (measured.stage_s > 0).all()
    assert (measured.exit_s[:-1] > 0).all()
    assert (measured.exit_s[-1] == 0).all()
    assert measured.stage_s[:, 2].sum() > 5 * measured.stage_s[:, 0].sum()
    frame = measured.to_frame()
    assert list(frame.columns) == ["exit", "batch_size", "stage_s", "exit_s"]
    assert frame["exit"].tolist() == [name for name in model.exit_names for _ in range(3)]
    assert frame["stage_s"].tolist() == measured.stage_s.reshape(-1).tolist()
    with pytest.raises(ValueError, match=r"batch_sizes must be positive integers; got \(0, 1\)"):
        model.latencies(TEST[0], batch_sizes=(0, 1))
