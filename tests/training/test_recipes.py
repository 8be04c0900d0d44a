"""The published recipes, on features of scikit-learn's digits: two cuts, and a full model that is right nine times in
ten."""

import json
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.base import clone
from sklearn.datasets import load_digits
from torch.nn import functional as F

from adaptexit import BoostNetRecipe, CalexNetRecipe, CPMCalibrator, ExitOutputs, FrozenRecipe, PTEERecipe, ZTWRecipe
from adaptexit.core.answer import Answer
from adaptexit.core.margins import margin_thresholds
from adaptexit.heads import (
    BoostedHead,
    Head,
    MLPHead,
    PrototypeHead,
    RefinedPrototypeHead,
    ScalarConfidenceHead,
    ZTWHead,
    make_head,
)
from adaptexit.heads.layout import FeatureSpec
from adaptexit.training import RECIPES, FeatureCache, head_trainer, recipe_of
from adaptexit.training.head_trainer import HeadBatch, distillation_loss
from adaptexit.training.recipes import RecipeName, ztw
from adaptexit.training.recipes.calexnet import LEAST_WEIGHT

SPECS = [FeatureSpec((32,), "NC"), FeatureSpec((64,), "NC")]
QUICK = {"epochs": 3, "batch_size": 64}
LESSON = np.arange(0, 1200, 4)
JOINT = partial(PTEERecipe, loss="cumulative")
ALL = [CalexNetRecipe, CalexNetRecipe.reference, PTEERecipe, ZTWRecipe, BoostNetRecipe]


def teacher(y, seed=0):
    """Logits that answer otherwise than the label one time in ten."""
    rng = np.random.default_rng(seed)
    answered = np.where(rng.random(len(y)) < 0.1, (y + 1) % 10, y)
    return (4 * np.eye(10)[answered] + rng.normal(size=(len(y), 10))).astype(np.float32)


def digit_cache():
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32)
    return FeatureCache([X[:, 32:], X], teacher(y)), y


CACHE, Y = digit_cache()
ANSWERED = CACHE.logits.argmax(1)


def heads_for(recipe, head="auto", seed=0):
    """New heads as the estimator makes them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = [make_head(recipe.head_for(head), spec, 10) for spec in SPECS]
    for k, head in enumerate(heads):
        head.place(k)
    return heads


def cache_for(heads):
    """The cache in the form that the heads' ``reduce`` gives."""
    pairs = zip(heads, CACHE.features, strict=True)
    with torch.no_grad():
        return FeatureCache([head.reduce(torch.from_numpy(x)).numpy() for head, x in pairs], CACHE.logits)


def taught(recipe, rows=LESSON, head="auto", **options):
    heads = heads_for(recipe, head)
    return heads, recipe.train(heads, cache_for(heads), rows, Y[rows], **options)


def answers(heads, rows):
    """Of every head, those before it read by the chained ones."""
    cache, state, outputs = cache_for(heads), None, []
    with torch.no_grad():
        for k, head in enumerate(heads):
            output = head.answer(cache.rows(k, rows), state)
            state = output.state
            outputs.append(output)
    return outputs


def sure(output):
    """Predictions and the sigmoid of the predicted class's entry."""
    predicted = output.logits.argmax(1)
    return predicted.numpy(), output.confidence_logits.sigmoid()[torch.arange(len(predicted)), predicted].numpy()


@pytest.fixture
def phases(monkeypatch):
    """What every phase of training was told: n_samples, sample_weight, parameters, the first rows' losses."""
    calls = []
    original = head_trainer.minimise

    def spy(loss, modules, n_samples, **options):
        calls.append({"n": n_samples, "modules": list(modules), "loss": loss} | options)
        return original(loss, modules, n_samples, **options)

    monkeypatch.setattr(head_trainer, "minimise", spy)
    return calls


@pytest.fixture
def untrained(monkeypatch):
    """The same, of phases that are asked for and do not happen."""
    calls = []

    def spy(loss, modules, n_samples, **options):
        calls.append(options)
        return [loss(torch.arange(2)).tolist()] * options["epochs"]

    monkeypatch.setattr(head_trainer, "minimise", spy)
    monkeypatch.setattr(ztw, "minimise", spy)
    return calls


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ALL)
def test_heads_learn_what_the_full_model_answers(make):
    recipe = make().set_params(epochs=12, batch_size=64, lr=6e-3)
    heads, history = taught(recipe)
    fresh = np.arange(1, 1200, 2)
    right = [np.mean(out.logits.argmax(1).numpy() == Y[fresh]) for out in answers(heads, fresh)]
    assert right[0] > 0.6
    assert right[1] > 0.85
    assert json.loads(json.dumps(history)) == history
    assert all(losses[-1] < losses[0] for losses in history["loss"])
    assert not any(part.training for head in heads for part in head.modules())


@pytest.mark.parametrize("make", [*ALL, JOINT])
def test_labels_are_not_looked_at_unless_asked(make):
    recipe = make().set_params(**QUICK)
    heads = heads_for(recipe)
    others = heads_for(recipe)
    cache = cache_for(heads)
    recipe.train(heads, cache, LESSON, Y[LESSON])
    recipe.train(others, cache, LESSON, np.zeros_like(LESSON))
    for one, other in zip(heads, others, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        )


@pytest.mark.parametrize("make", [partial(CalexNetRecipe, distillation=False), PTEERecipe, ZTWRecipe, BoostNetRecipe])
def test_labels_are_learned_where_asked(make):
    recipe = make().set_params(epochs=12, batch_size=64, lr=6e-3, learn_from="labels")
    heads = heads_for(recipe)
    recipe.train(heads, cache_for(heads), LESSON, (Y[LESSON] + 5) % 10)
    out = answers(heads, LESSON)[-1]
    assert np.mean(out.logits.argmax(1).numpy() == (Y[LESSON] + 5) % 10) > 0.8


@pytest.mark.parametrize("make", [*ALL, JOINT])
def test_a_seed_determines_weights_bit_by_bit_and_leaves_the_global_one_alone(make):
    recipe = make().set_params(**QUICK)
    before = torch.get_rng_state()
    runs = [taught(recipe, random_state=seed) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    weights = [torch.cat([p.detach().flatten() for head in heads for p in head.parameters()]) for heads, _ in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert runs[0][1] == runs[1][1]


@pytest.mark.parametrize(
    ("make", "usual"), [(CalexNetRecipe, 100), (PTEERecipe, 200), (JOINT, 200), (ZTWRecipe, 200), (BoostNetRecipe, 200)]
)
def test_epochs_left_open_are_the_papers_or_make_500_minibatches(make, usual, untrained):
    few = np.arange(40)
    for batch_size, epochs in ((4, usual), (20, max(usual, 250))):
        untrained.clear()
        recipe = make().set_params(batch_size=batch_size)
        if make is CalexNetRecipe:
            recipe.set_params(distillation_batch_size=batch_size)
        taught(recipe, few)
        assert {phase["epochs"] for phase in untrained} == {epochs}
        assert {phase["batch_size"] for phase in untrained} == {batch_size}


@pytest.mark.parametrize("make", [*ALL, JOINT])
def test_settings_reach_the_loop_and_survive_a_clone(make, phases):
    recipe = clone(make().set_params(epochs=2, lr=0.02, weight_decay=0.1, batch_size=50))
    if isinstance(recipe, CalexNetRecipe):
        recipe.set_params(distillation_batch_size=50)
    taught(recipe)
    settings = {(phase["epochs"], phase["lr"], phase["weight_decay"], phase["batch_size"]) for phase in phases}
    assert settings == {(2, 0.02, 0.1, 50)}


def test_recipes_have_names_and_the_heads_of_their_papers():
    heads = {name: type(heads_for(recipe_of(name))[0]) for name in RECIPES}
    assert heads == {
        "auto": MLPHead, "frozen": MLPHead, "calexnet": RefinedPrototypeHead,
        "calexnet_reference": RefinedPrototypeHead, "ptee": PrototypeHead, "ztw": ZTWHead, "boostnet": BoostedHead,
        "joint": MLPHead,
    }  # fmt: skip
    reference = recipe_of("calexnet_reference")
    assert (reference.alignment, reference.distillation, reference.cascade_aware) == (None, False, False)


def test_every_recipe_has_a_name_that_types_know():
    assert set(get_args(RecipeName)) == {"auto", "trained", *RECIPES}


def test_calibrators_of_the_papers():
    published = CPMCalibrator.published_with
    assert published(CalexNetRecipe()).get_params() == CPMCalibrator().get_params()
    for recipe in (CalexNetRecipe.reference(), PTEERecipe(), ZTWRecipe(), BoostNetRecipe()):
        assert published(recipe, 0.3).get_params() == CPMCalibrator(0.3, cascade_aware=False).get_params()
    assert published(ZTWRecipe(), bound="wilson").bound == "wilson"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (CalexNetRecipe("firm"), r"alignment must be one of \['soft', 'hard'\] or None; got 'firm'"),
        (CalexNetRecipe(temperature=0), "temperature must be a finite number above 0; got 0"),
        (CalexNetRecipe(distillation_batch_size=1), "distillation_batch_size must be a whole number, at least 2"),
        (CalexNetRecipe(filter_margin=-1), "filter_margin must be a share of precision, at least 0; got -1"),
        (CalexNetRecipe(filter_size=1.0), "filter_size must lie between 0 and 1; got 1.0"),
        (CalexNetRecipe(learn_from="teacher"), "learn_from must be 'backbone' or 'labels'; got 'teacher'"),
        (CalexNetRecipe(distillation="off"), "distillation must be True or False; got 'off'"),
        (PTEERecipe(clamp=0.5), "clamp must lie between 0 and 0.5; got 0.5"),
        (PTEERecipe(epochs=0), "epochs must be a whole number, at least 1 or 'auto'; got 0"),
        (PTEERecipe(lr=-1.0), "lr must be a finite number above 0; got -1.0"),
        (PTEERecipe(loss="joint"), r"loss must be one of \['separate', 'cumulative'\]; got 'joint'"),
        (PTEERecipe(cost_weight=-0.1), "cost_weight must be a finite number, at least 0; got -0.1"),
        (PTEERecipe(costs=[0.2, 0.5]), r"costs must be None for loss='separate', which has none; got \[0.2, 0.5\]"),
        (JOINT(confidence_epochs=3), "confidence_epochs must be None for loss='cumulative'.*got 3. Give epochs"),
        (
            JOINT(costs=[0.2, np.inf]),
            r"costs must be finite relative costs, at least 0, one for each early exit.*inf\]",
        ),
        (JOINT(costs=[-0.2, 0.5]), "costs must be finite relative costs, at least 0, one for each early exit"),
        (JOINT(costs=0.5), "costs must be finite relative costs, at least 0, one for each early exit.*got 0.5"),
        (ZTWRecipe(size=0), "size must be a whole number, at least 1 or None; got 0"),
        (ZTWRecipe(ensemble_epochs=True), "ensemble_epochs must be a whole number, at least 1; got True"),
        (BoostNetRecipe(rescale="free"), r"rescale must be one of \['fixed', 'learnable'\] or None; got 'free'"),
        (BoostNetRecipe(weight="half"), "weight must be a finite number, at least 0; got 'half'"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_training(recipe, message):
    with pytest.raises(ValueError, match=message):
        recipe.check()
    with pytest.raises(ValueError, match=message):
        recipe.train([], CACHE, LESSON, Y[LESSON])


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (ZTWRecipe(), "ZTWHeads for ZTW"),
        (BoostNetRecipe(), "BoostedHeads"),
        (JOINT(), "ScalarConfidenceHeads for loss='cumulative'"),
    ],
)
def test_heads_that_the_recipe_cannot_train_are_refused(recipe, name):
    plain = [MLPHead(spec, 10) for spec in SPECS]
    with pytest.raises(ValueError, match=f"heads must be {name}.*MLPHead"):
        recipe.train(plain, CACHE, LESSON, Y[LESSON])


def test_confidence_counts_as_no_nearer_to_0_and_1_than_the_clamp():
    entry = torch.tensor([[40.0, 0.0], [-40.0, 0.0], [0.5, 0.0]], requires_grad=True)
    output = Answer(torch.tensor([[1.0, 0.0]] * 3), entry)
    answer = HeadBatch(0, output, torch.tensor([1, 0, 0]), torch.zeros(3, 2))
    loss = head_trainer.confidence_loss(answer, clamp=1e-3)
    assert float(loss.detach()) == pytest.approx((2 * np.log(1000) + np.log1p(np.exp(-0.5))) / 3, rel=1e-5)
    loss.backward()
    assert entry.grad[:, 0].tolist()[:2] == [0.0, 0.0]
    assert entry.grad[2, 0] != 0
    unclamped = head_trainer.confidence_loss(answer, clamp=0.0)
    assert float(unclamped.detach()) == pytest.approx((80 + np.log1p(np.exp(-0.5))) / 3)


def test_heads_that_do_not_know_their_place_are_refused():
    strangers = [ZTWHead(spec, 10) for spec in SPECS]
    with pytest.raises(
        ValueError, match=r"one ensemble weight for every head up to them; got \[1, 1\]. Call head.place"
    ):
        ZTWRecipe(**QUICK).train(strangers, cache_for(strangers), LESSON, Y[LESSON])


def test_boosted_heads_of_another_weight_are_refused():
    heads = heads_for(BoostNetRecipe(0.3))
    with pytest.raises(ValueError, match=r"count earlier answers as the recipe does, weight=0.5; got \[0.3\]"):
        BoostNetRecipe(**QUICK).train(heads, cache_for(heads), LESSON, Y[LESSON])


def test_a_boosted_head_knows_its_place():
    class Placed(MLPHead):
        def place(self, k):
            self.where = k

    assert [head.inner.where for head in heads_for(BoostNetRecipe(), Placed)] == [0, 1]


# -- CalexNet ----------------------------------------------------------------------------------------------------------


def test_survivors_are_weighted_by_what_earlier_heads_leave(phases):
    heads, history = taught(CalexNetRecipe(**QUICK))
    assert len(phases) == 4
    assert phases[0]["sample_weight"] is phases[1]["sample_weight"] is None
    _, confidence = sure(answers(heads, LESSON)[0])
    expected = np.maximum(1 - confidence.astype(np.float64), LEAST_WEIGHT)
    for phase in phases[2:]:
        np.testing.assert_allclose(phase["sample_weight"], expected, rtol=1e-5)
    effective = expected.sum() ** 2 / np.square(expected).sum()
    assert history["effective_samples"] == pytest.approx([len(LESSON), effective], rel=1e-4)


def test_weights_multiply_from_head_to_head(phases):
    """Three exits: the third's weights are the product of both (1 - R)."""
    specs = [SPECS[0], SPECS[1], SPECS[1]]
    heads = [RefinedPrototypeHead(spec, 10) for spec in specs]
    features = [CACHE.features[0], CACHE.features[1], CACHE.features[1]]
    with torch.no_grad():
        reductions = [h.reduce(torch.from_numpy(x)).numpy() for h, x in zip(heads, features, strict=True)]
    cache = FeatureCache(reductions, CACHE.logits)
    CalexNetRecipe(**QUICK).train(heads, cache, LESSON, Y[LESSON])
    with torch.no_grad():
        confidences = [sure(heads[k].answer(cache.rows(k, LESSON)))[1].astype(np.float64) for k in range(2)]
    np.testing.assert_allclose(phases[4]["sample_weight"], np.prod(1 - np.array(confidences), axis=0), rtol=1e-4)


def test_without_alignment_every_head_learns_from_all_alike(phases):
    _, history = taught(CalexNetRecipe(alignment=None, **QUICK))
    assert [phase["sample_weight"] for phase in phases] == [None] * 4
    assert history["effective_samples"] == [len(LESSON)] * 2


def test_heads_learn_one_after_the_other_classes_first(phases):
    recipe = CalexNetRecipe(**QUICK)
    heads, history = taught(recipe)
    assert [phase["modules"] for phase in phases] == [[heads[0]], [heads[0]], [heads[1]], [heads[1]]]
    for phase, head in zip(phases, np.repeat(heads, 2), strict=True):
        sure_ones = {id(p) for p in head.confidence_parameters()}
        learns_confidence = {id(p) in sure_ones for p in phase["parameters"]}
        assert learns_confidence == {phase["description"] == "training confidence"}
    assert [len(losses) for losses in history["loss"] + history["confidence_loss"]] == [3] * 4


def test_distillation_is_equation_13():
    rng = np.random.default_rng(0)
    logits, teacher = rng.normal(size=(2, 5, 4)) * 3
    answer = HeadBatch(0, Answer(torch.from_numpy(logits)), torch.zeros(5), torch.from_numpy(teacher))
    for temperature in (1.0, 4.0):
        p, q = softmax(teacher / temperature, axis=1), softmax(logits / temperature, axis=1)
        expected = temperature**2 * np.mean(np.sum(p * np.log(p / q), axis=1))
        assert float(distillation_loss(answer, temperature)) == pytest.approx(expected)


def test_distillation_teaches_probabilities_and_its_absence_the_class(phases):
    for distillation, batch_size in ((True, 32), (False, 64)):
        phases.clear()
        recipe = CalexNetRecipe(distillation=distillation, distillation_batch_size=32, **QUICK)
        heads, _ = taught(recipe)
        assert [phase["batch_size"] for phase in phases] == [batch_size, 64] * 2
        rows = torch.arange(20)
        with torch.no_grad():
            loss = float(phases[0]["loss"](rows))
        (output, _) = answers(heads, LESSON[:20])
        if distillation:
            soft = F.softmax(torch.from_numpy(CACHE.logits[LESSON[:20]]) / 4, dim=1)
            expected = 16 * F.kl_div(F.log_softmax(output.logits / 4, dim=1), soft, reduction="batchmean")
        else:
            expected = F.cross_entropy(output.logits, torch.from_numpy(ANSWERED[LESSON[:20]]))
        assert loss == pytest.approx(float(expected), rel=1e-4)


def test_confidence_learns_whether_the_answer_is_the_full_models(phases):
    heads, _ = taught(CalexNetRecipe(**QUICK))
    (output, _) = answers(heads, LESSON[:50])
    predicted, confidence = sure(output)
    right = predicted == ANSWERED[LESSON[:50]]
    expected = -np.mean(np.log(np.where(right, confidence, 1 - confidence)))
    with torch.no_grad():
        assert float(phases[1]["loss"](torch.arange(50))) == pytest.approx(expected, rel=1e-4)
    assert phases[1]["training"] is False


def test_the_hard_filter_leaves_out_who_would_have_left(phases):
    recipe = CalexNetRecipe("hard", filter_margin=0.3, filter_size=0.25, **QUICK)
    heads, history = taught(recipe)
    n_learned = int(history["effective_samples"][0])
    assert n_learned == pytest.approx(0.75 * len(LESSON), abs=10)
    first, second = ([np.sort(rows) for rows in row_sets(phases, heads, k)] for k in range(2))
    assert len(first[0]) == n_learned
    tuning = np.setdiff1d(LESSON, first[0])
    predictions, scores = sure(answers(heads, tuning)[0])
    outputs = ExitOutputs(
        predictions=np.stack([predictions, ANSWERED[tuning]]), scores=np.stack([scores, scores]),
        labels=ANSWERED[tuning], n_classes=10, costs=[1, 2],
    )  # fmt: skip
    _, cutoffs = margin_thresholds(outputs, [0.3], cascade_aware=True)
    predictions, scores = sure(answers(heads, first[0])[0])
    stays = scores <= cutoffs[0, 0][predictions]
    assert 0 < stays.sum() < n_learned
    assert second[0].tolist() == first[0][stays].tolist()
    assert history["effective_samples"][1] == stays.sum()


def row_sets(phases, heads, k):
    """The samples that head k learned from in each of its phases."""
    row_sets = []
    original = FeatureCache.rows

    def rows(self, k, indices):
        row_sets.append(np.asarray(indices))
        return original(self, k, indices)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(FeatureCache, "rows", rows)
        for phase in phases:
            if phase["modules"] == [heads[k]]:
                phase["loss"](torch.arange(phase["n"]))
    return row_sets


def test_a_filter_that_leaves_nobody_is_reported_and_not_followed():
    recipe = CalexNetRecipe("hard", filter_margin=1e9, **QUICK)
    with pytest.warns(UserWarning, match="samples leave by exit 0, so the next head learns from the same") as warned:
        _, history = taught(recipe, np.arange(0, 1200, 2))
    assert warned[0].filename == __file__
    assert history["effective_samples"][0] == history["effective_samples"][1]


def test_a_filter_needs_samples_to_find_its_thresholds_on():
    lone = np.unique(ANSWERED, return_index=True)[1]
    with pytest.raises(ValueError, match=r"filter_size=0.2, and 10 of them cannot be parted.*alignment='soft'"):
        taught(CalexNetRecipe("hard", **QUICK), lone)


def test_heads_without_a_confidence_output_are_weighted_by_their_largest_probability(phases):
    heads, history = taught(CalexNetRecipe(**QUICK), head="mlp")
    confidence = answers(heads, LESSON)[0].logits.softmax(1).amax(1).numpy()
    np.testing.assert_allclose(phases[1]["sample_weight"], 1 - confidence.astype(np.float64), rtol=1e-4)
    assert history["confidence_loss"] == [[], []]


# -- PTEEnet -----------------------------------------------------------------------------------------------------------


def test_ptee_sums_what_every_head_would_minimise_alone(phases):
    taught(PTEERecipe(**QUICK))
    assert [len(phase["modules"]) for phase in phases] == [2, 2]
    plain = FrozenRecipe(weight_decay=0.0, **QUICK)
    heads, others = heads_for(PTEERecipe()), heads_for(PTEERecipe())
    PTEERecipe(**QUICK).train(heads, cache_for(heads), LESSON, Y[LESSON])
    plain.train(others, cache_for(heads), LESSON, ANSWERED[LESSON])
    for one, other in zip(heads, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def cumulative_by_hand(heads, rows, target, costs, weight, clamp=1e-7):
    """P_k = s_k p_k + (1 - s_k) P_(k+1), C_k likewise, sample by sample in probabilities; the loss of each exit."""
    outputs = answers(heads, rows)
    probabilities = [softmax(output.logits.double().numpy(), axis=1) for output in outputs]
    confidences = [1 / (1 + np.exp(-output.confidence_logits.double().numpy().mean(axis=1))) for output in outputs]
    expected = []
    for first in range(len(heads)):
        losses = []
        for i, row in enumerate(rows):
            mixture, cost = softmax(CACHE.logits[row].astype(float)), 1.0
            for k in range(len(heads) - 1, first - 1, -1):
                sure = np.clip(confidences[k][i], clamp, 1 - clamp)
                mixture = sure * probabilities[k][i] + (1 - sure) * mixture
                cost = sure * costs[k] + (1 - sure) * cost
            losses.append(-np.log(mixture[target[row]]) + weight * cost)
        expected.append(np.mean(losses))
    return expected


@pytest.mark.parametrize("learn_from", ["backbone", "labels"])
@pytest.mark.parametrize(("costs", "as_meant"), [(None, [1 / 3, 2 / 3]), ([0.2, 0.7], [0.2, 0.7])])
def test_the_cumulative_loss_by_its_recursion(costs, as_meant, learn_from, phases):
    heads, _ = taught(JOINT(costs=costs, cost_weight=0.6, learn_from=learn_from, **QUICK), head="refined_prototype")
    (phase,) = phases
    with torch.no_grad():
        losses = phase["loss"](torch.arange(40))
    target = Y if learn_from == "labels" else ANSWERED
    expected = cumulative_by_hand(heads, LESSON[:40], target, as_meant, 0.6)
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_cumulative_loss_reaches_every_parameter_of_every_head_in_one_phase(phases):
    heads, history = taught(JOINT(**QUICK), head="refined_prototype")
    (phase,) = phases
    assert {id(p) for p in phase["parameters"]} == {id(p) for head in heads for p in head.parameters()}
    assert history["confidence_loss"] == [[], []]
    for parameter in phase["parameters"]:
        parameter.requires_grad_(True)
    gradients = torch.autograd.grad(phase["loss"](torch.arange(60)).sum(), phase["parameters"])
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_an_earlier_exit_of_the_cumulative_loss_sends_gradients_to_later_heads(phases):
    heads, _ = taught(JOINT(**QUICK))
    weights = list(heads[1].parameters())
    for parameter in weights:
        parameter.requires_grad_(True)
    first, second = phases[0]["loss"](torch.arange(60))
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(first, weights, retain_graph=True))
    ours = torch.autograd.grad(second, list(heads[0].parameters()), allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in ours)


def test_confidence_in_the_cumulative_loss_is_clamped(phases):
    heads, _ = taught(JOINT(clamp=0.2, **QUICK))
    with torch.no_grad():
        heads[0].inner.confidence.bias += 40.0
        losses = phases[0]["loss"](torch.arange(40))
    expected = cumulative_by_hand(heads, LESSON[:40], ANSWERED, [1 / 3, 2 / 3], 0.9, clamp=0.2)
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_dearer_the_rest_the_surer_the_exits():
    confidences = []
    for weight in (0.0, 5.0):
        heads, _ = taught(JOINT(cost_weight=weight, epochs=12, batch_size=64, lr=6e-3))
        confidences.append([sure(out)[1].mean() for out in answers(heads, LESSON)])
    assert all(low < 0.5 < 0.9 < high for low, high in zip(*confidences, strict=True))


def test_heads_learn_by_the_cumulative_loss_where_going_on_is_dear():
    heads, _ = taught(JOINT(cost_weight=5.0, epochs=12, batch_size=64, lr=6e-3))
    fresh = np.arange(1, 1200, 2)
    right = [np.mean(out.logits.argmax(1).numpy() == Y[fresh]) for out in answers(heads, fresh)]
    assert right[0] > 0.6
    assert right[1] > 0.75


def test_costs_are_one_for_each_early_exit():
    recipe = JOINT(costs=[0.2, 0.4, 0.6], **QUICK)
    with pytest.raises(ValueError, match="costs must be one for each of the 2 early exits; got 3"):
        taught(recipe)


def test_the_cumulative_loss_gives_any_head_one_confidence():
    heads = heads_for(JOINT(), "refined_prototype")
    assert {type(head) for head in heads} == {ScalarConfidenceHead}
    assert {type(head.inner) for head in heads} == {RefinedPrototypeHead}
    assert {type(head) for head in heads_for(PTEERecipe(), "refined_prototype")} == {RefinedPrototypeHead}


# -- BoostNet ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.5, 0.2])
def test_boosted_heads_add_up(weight):
    heads, _ = taught(BoostNetRecipe(weight, **QUICK), head="refined_prototype")
    first, second = answers(heads, LESSON[:9])
    cache = cache_for(heads)
    with torch.no_grad():
        alone = [head.inner.answer(cache.rows(k, LESSON[:9])) for k, head in enumerate(heads)]
    torch.testing.assert_close(first.logits, alone[0].logits)
    torch.testing.assert_close(second.logits, alone[1].logits + weight * alone[0].logits)
    torch.testing.assert_close(second.confidence_logits, alone[1].confidence_logits)


def test_a_boosted_head_answers_a_feature_as_its_reduction():
    head = BoostedHead(FeatureSpec((6, 4, 5), "NCHW"), 3, "refined_prototype").eval()
    x, before = torch.randn(7, 6, 4, 5, generator=torch.Generator().manual_seed(0)), torch.ones(7, 3)
    torch.testing.assert_close(head(x, before).logits, head.answer(head.reduce(x), before).logits)
    assert head.reduction_key == head.inner.reduction_key != MLPHead(head.spec, 3).reduction_key


def test_a_chained_head_cannot_be_boosted():
    with pytest.raises(ValueError, match="head must answer by itself to be boosted; got BoostedHead, a chained one"):
        BoostedHead(SPECS[0], 3, head=BoostedHead)


def test_the_loss_of_a_boosted_head_sends_nothing_back_to_the_one_before():
    """The first head learns the same whether or not a second one is there, but for the order of draws."""
    pair = heads_for(BoostNetRecipe())
    lone = heads_for(BoostNetRecipe())[:1]
    cache = cache_for(pair)
    BoostNetRecipe(rescale=None, **QUICK).train(pair, cache, LESSON, Y[LESSON])
    only = FeatureCache(cache.features[:1], cache.logits)
    BoostNetRecipe(rescale=None, **QUICK).train(lone, only, LESSON, Y[LESSON])
    for one, other in zip(
        pair[0].inner.classification.parameters(), lone[0].inner.classification.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rescale", "ended"), [("fixed", [0.5, 1.0]), (None, [1.0, 1.0])])
def test_factors_scale_the_gradient_and_not_the_loss(rescale, ended, phases):
    heads, history = taught(BoostNetRecipe(rescale=rescale, **QUICK))
    assert history["rescale"] == ended
    rows = torch.arange(30)
    losses = phases[0]["loss"](rows)
    outputs = answers(heads, LESSON[:30])
    expected = [float(F.cross_entropy(out.logits, torch.from_numpy(ANSWERED[LESSON[:30]]))) for out in outputs]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    for k, factor in enumerate(ended):
        weight = heads[k].inner.classification.bias
        (product,) = torch.autograd.grad(phases[0]["loss"](rows)[k], weight)
        cache = cache_for(heads)
        before = None if k == 0 else outputs[0].state
        plain = F.cross_entropy(heads[k].answer(cache.rows(k, LESSON[:30]), before).logits,
                                torch.from_numpy(ANSWERED[LESSON[:30]]))  # fmt: skip
        (raw,) = torch.autograd.grad(plain, weight)
        torch.testing.assert_close(product, factor * raw, rtol=1e-4, atol=1e-6)


def test_learnable_factors_are_driven_down(phases):
    _, history = taught(BoostNetRecipe(rescale="learnable", epochs=5, batch_size=64))
    _, longer = taught(BoostNetRecipe(rescale="learnable", epochs=25, batch_size=64))
    assert all(0 < b < a < 1 for a, b in zip(history["rescale"], longer["rescale"], strict=True))


def test_boosted_heads_may_have_no_parameters():
    class Constant(Head):
        def answer(self, reduced, state=None):
            return Answer(reduced.new_zeros(len(reduced), self.n_classes))

    _, history = taught(BoostNetRecipe(rescale="learnable", **QUICK), head=Constant)
    assert len(history["rescale"]) == 2


# -- ZTW ---------------------------------------------------------------------------------------------------------------


def test_the_ensemble_is_a_weighted_geometric_mean():
    heads, _ = taught(ZTWRecipe(**QUICK))
    outputs = answers(heads, LESSON[:9])
    own = torch.stack([out.state[0] for out in outputs], dim=1)
    for k, (head, out) in enumerate(zip(heads, outputs, strict=True)):
        weights = head.ensemble_weight.detach().exp()
        assert weights.shape == (k + 1,)
        together = own[:, : k + 1].log_softmax(2)
        expected = (together * weights[None, :, None]).mean(1) + head.ensemble_bias.detach()
        torch.testing.assert_close(out.logits, expected)
        torch.testing.assert_close(out.state[1], together)


def test_a_head_reads_the_logits_before_it():
    _, head = heads_for(ZTWRecipe())
    reduction = torch.randn(4, 64, 1, 1, generator=torch.Generator().manual_seed(0))
    head.eval()

    def own(before):
        return head.answer(reduction, (before, before.log_softmax(1)[:, None])).state[0]

    before = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(own(before), own(before.flip(1)))
    torch.testing.assert_close(own(before), own(7 * before + 3), rtol=1e-3, atol=1e-4)  # layer norm takes out both
    assert torch.equal(head.answer(reduction).state[0], own(torch.zeros(4, 10)))


def test_ensembles_learn_while_the_heads_stand_still(monkeypatch):
    facts = {}
    original = ztw.minimise

    def spy(loss, modules, *args, **options):
        ensemble = {id(p) for head in modules for p in head.ensemble_parameters}
        before = [p.detach().clone() for head in modules for p in head.parameters() if id(p) not in ensemble]
        start = loss(torch.arange(len(LESSON))).detach()
        history = original(loss, modules, *args, **options)
        after = [p for head in modules for p in head.parameters() if id(p) not in ensemble]
        facts["same"] = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        facts["better"] = (loss(torch.arange(len(LESSON))).detach() < start).tolist()
        return history

    monkeypatch.setattr(ztw, "minimise", spy)
    heads, history = taught(ZTWRecipe(epochs=10, batch_size=64, ensemble_epochs=30))
    assert facts == {"same": True, "better": [True, True]}
    assert [len(losses) for losses in history["ensemble_loss"]] == [30, 30]
    assert history["confidence_loss"] == [[], []]
    assert all(bool(head.ensemble_weight.detach().any()) for head in heads)


def test_answers_of_all_heads_go_to_a_file_where_they_are_many(monkeypatch):
    heads, _ = taught(ZTWRecipe(**QUICK))
    monkeypatch.setattr(ztw, "MEMORY_LIMIT", 1000)
    others, _ = taught(ZTWRecipe(**QUICK))
    for one, other in zip(heads, others, strict=True):
        assert torch.equal(one.ensemble_weight, other.ensemble_weight)


def test_heads_first_learn_their_own_answer(phases):
    heads, _ = taught(ZTWRecipe(**QUICK))
    (phase,) = phases
    ensemble = {id(p) for head in heads for p in head.ensemble_parameters}
    assert not ensemble & {id(p) for p in phase["parameters"]}
    with torch.no_grad():
        losses = phase["loss"](torch.arange(40))
    target = torch.from_numpy(ANSWERED[LESSON[:40]])
    expected = [float(F.cross_entropy(out.state[0], target)) for out in answers(heads, LESSON[:40])]
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)


def test_maps_are_pooled_to_the_size_asked_for():
    spec = FeatureSpec((6, 9, 3), "NCHW")
    head = ZTWHead(spec, 5, size=4).eval()
    x = torch.randn(2, 6, 9, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head.reduce(x), F.adaptive_avg_pool2d(x, (4, 3)))
    torch.testing.assert_close(head(x).logits, head.answer(head.reduce(x)).logits)
    with pytest.raises(ValueError, match="size must be an integer of at least 1; got 0"):
        ZTWHead(spec, 5, size=0)


def test_maps_are_left_whole_where_no_size_is_asked_for():
    spec = FeatureSpec((9, 3, 6), "NHWC")
    (head,) = {make_head(ZTWRecipe(size=None).head_for("auto"), spec, 5).eval()}
    x = torch.randn(2, 9, 3, 6, generator=torch.Generator().manual_seed(0))
    reduced = head.reduce(x)
    assert torch.equal(reduced, x.permute(0, 3, 1, 2))
    assert reduced.is_contiguous()
    torch.testing.assert_close(head(x).logits, head.answer(reduced).logits)
    pooled = ZTWHead(spec, 5).eval()
    pooled.load_state_dict(head.state_dict())
    assert not torch.allclose(pooled(x).logits, head(x).logits)
    assert head.reduction_key != pooled.reduction_key
