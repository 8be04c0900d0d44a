"""Which head is chosen, what that may cost, and that nothing but its arguments decides."""

import json

import numpy as np
import pytest
import torch

from adaptexit.core.costs import Costs
from adaptexit.heads import NAMED, GridHead, LinearHead, WideHead
from adaptexit.heads.by_name import FOR_MAPS, FOR_VECTORS, heads_to_try
from adaptexit.heads.layout import FeatureSpec
from adaptexit.networks.build import new_network
from adaptexit.networks.models import TorchModel
from adaptexit.training import AutoRecipe, head_choice
from adaptexit.training.cached_answers import columns_of, record_features
from adaptexit.training.head_choice import (
    FIRST_SHARE,
    HEDGE,
    LAST_SHARE,
    TEACHER_SHARE,
    Allowance,
    Rival,
    chosen,
    in_front,
    modest,
    rival_networks,
    tournament,
)
from tests.nets import branched_trained, digits

EXITS = ["one", "two"]
X = torch.from_numpy(np.concatenate([images for images, _ in digits()[:2]]))
Y = np.concatenate([labels for _, labels in digits()[:2]])


def network():
    return new_network(TorchModel(branched_trained(), None, "backbone"), EXITS, "mlp", None, X[:8], 10, 0)


def race(recipe, seed=0, rows=None, n_train=1200, spoil=None, targets=Y):
    """The choice among a recipe's heads on features of digits."""
    base = network()
    networks = rival_networks(base, recipe.candidates([head.spec for head in base.early]), 10, seed)
    rivals = {name: Rival.of(rival, X[:8], "macs") for name, rival in networks.items()}
    cache = record_features(
        base, X.split(100), False, half=False, memory_limit=1 << 30, folder=None, rivals=list(networks.values())
    )
    columns, _ = columns_of([base, *networks.values()])
    caches = {name: cache.part(own) for name, own in zip(rivals, columns[1:], strict=True)}
    if spoil is not None:
        spoil(cache)
    rows = np.arange(n_train) if rows is None else rows
    return rivals, chosen(rivals, recipe, caches, rows, targets[rows], seed)


# -- how far each is trained -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(40))
def test_choosing_and_training_take_three_times_the_pass_and_a_training_at_most(case):
    rng = np.random.default_rng(case)
    names = [str(i) for i in range(rng.integers(2, 9))]
    work = dict(zip(names, rng.lognormal(0, 3, size=len(names)).tolist(), strict=True))
    a_pass, spent, weights = float(rng.lognormal(0, 3)), [], set()

    def tried(tried_names, weight, share):
        spent.extend(share * work[name] for name in tried_names)
        weights.add(weight)
        scores = {name: float(rng.uniform(0.5, 0.55)) for name in tried_names}
        return dict(sorted(scores.items(), key=lambda item: -item[1]))

    winner, weight = tournament(work, a_pass, (0.5, 1.0, 0.0), tried)
    assert winner in work
    assert weight in weights == {0.5, 1.0, 0.0}
    assert a_pass + sum(spent) + work[winner] <= 3 * (a_pass + max(work.values())) * (1 + 1e-9)


def test_a_large_head_that_comes_forward_late_wins_and_learns_as_the_best_small_one_does():
    scores = {"small": {0.25: 0.6, 0.5: 0.61, 1.0: 0.62}, "large": {0.25: 0.4, 1.0: 0.7}}
    trials = []

    def tried(names, weight, share):
        trials.append((tuple(names), weight, share))
        right = {name: scores[name][share] + 0.01 * (weight == 0.0) for name in names}
        return dict(sorted(right.items(), key=lambda item: -item[1]))

    assert tournament({"small": 1.0, "large": 10.0}, 1.0, (0.5, 1.0, 0.0), tried) == ("large", 0.0)
    assert trials == [
        (("small", "large"), 0.5, FIRST_SHARE),
        *((("small",), weight, TEACHER_SHARE) for weight in (0.5, 1.0, 0.0)),
        (("small", "large"), 0.0, LAST_SHARE),
    ]


@pytest.mark.parametrize(("mixture", "expected"), [(0.6 + 0.9 * HEDGE, 1.0), (0.6 + 1.1 * HEDGE, 0.5)])
def test_both_teachers_are_taken_where_they_are_clearly_better_than_one(mixture, expected):
    scores = {0.5: mixture, 1.0: 0.6, 0.0: 0.59}
    assert tournament({"a": 1.0}, 1.0, (0.5, 1.0, 0.0), lambda names, weight, _: {"a": scores[weight]})[1] == expected


def test_where_little_work_is_left_the_first_trials_decide():
    work = dict.fromkeys("abcdefgh", 1.0)  # half of twice one training is an eighth for each, the other half for two

    def tried(names, weight, share):
        assert share == pytest.approx(1 / 8 if len(names) == 8 else 1 / 2)
        return {name: 0.5 - 0.001 * "hgfedcba".index(name) for name in sorted(names, reverse=True)}

    assert tournament(work, 0.0, (1.0,), tried) == ("h", 1.0)
    assert tournament(work, 0.0, (1.0,), lambda names, *_: dict.fromkeys(names, 0.5)) == ("a", 1.0)


def test_shares_are_whole_where_work_is_small():
    assert Allowance(10.0).share([1.0, 2.0, 10.0], FIRST_SHARE) == FIRST_SHARE
    allowance = Allowance(12.0)
    assert allowance.share([10.0] * 6, FIRST_SHARE) == pytest.approx(0.2)
    assert allowance.spare == pytest.approx(0.0)
    assert allowance.share([1.0], LAST_SHARE) == pytest.approx(0.0)
    assert Allowance(0.0).share([0.0, 0.0], TEACHER_SHARE) == 0.0


def test_the_best_are_tried_again_and_all_that_take_much_longer():
    scores = {"a": 0.80, "b": 0.795, "c": 0.79, "d": 0.785, "e": 0.6}
    cheap = dict.fromkeys(scores, 1.0)
    assert in_front(scores, cheap) == ["a", "b"]
    assert in_front(scores, cheap | {"c": 1.9, "d": 2.0, "e": 9.0}) == ["a", "b", "d", "e"]
    assert in_front({"a": 0.8, "b": 0.7}, cheap | {"b": 2.0}) == ["a", "b"]
    assert in_front({"a": 0.8, "b": 0.7}, cheap) == ["a"]


# -- who takes part ----------------------------------------------------------------------------------------------------


def test_heads_are_those_for_the_kind_of_feature():
    maps = [FeatureSpec((6, 4, 5), "NCHW"), FeatureSpec((17, 6), "NLC", 1, (4, 4))]
    assert heads_to_try(maps) is FOR_MAPS
    for specs in ([FeatureSpec((6,), "NC")], [*maps, FeatureSpec((7, 6), "NLC")]):
        assert heads_to_try(specs) is FOR_VECTORS
    assert set(FOR_MAPS) | set(FOR_VECTORS) <= set(NAMED)


def test_heads_that_cannot_read_a_feature_are_left_out():
    def picky(spec, n_classes):
        if spec.channels != 8:
            raise ValueError("channels must be 8")
        return LinearHead(spec, n_classes)

    assert list(rival_networks(network(), {"picky": picky, "linear": LinearHead}, 10, 0)) == ["linear"]
    with pytest.raises(ValueError, match="heads must hold one that can read the features; got picky: channels must be"):
        rival_networks(network(), {"picky": picky}, 10, 0)


def test_heads_for_which_too_much_would_be_kept_are_left_out():
    """8 channels of 8x8 and 16 of 4x4 for convolutions, 24 means for the others."""
    factories = {"conv": NAMED["conv"], "linear": LinearHead}
    assert list(rival_networks(network(), factories, 10, 0, 2**20)) == ["conv", "linear"]
    assert list(rival_networks(network(), factories, 10, 0, 2**22)) == ["linear"]
    assert list(rival_networks(network(), {"conv": NAMED["conv"]}, 10, 0, 2**40)) == ["conv"]


def test_rivals_of_one_reduction_share_what_is_recorded():
    rivals = rival_networks(network(), {"grid": GridHead, "wide": WideHead, "linear": LinearHead}, 10, 0)
    columns, sources = columns_of(list(rivals.values()))
    assert columns == [[0, 1], [0, 1], [2, 3]]
    assert [k for k, _ in sources] == [0, 1, 0, 1]


def test_without_a_comparison_the_best_is_taken_that_costs_little():
    def rival(price):
        return Rival(None, Costs(np.array([50.0, 50.0]), np.array([price, 0.0])), 0.0, 0.0)

    prices = {"tiny": 0.1, "fair": 2.9, "dear": 50.0}
    assert modest({name: rival(price) for name, price in prices.items()}) == "fair"
    assert modest({"dear": rival(50.0), "less": rival(20.0)}) == "less"


# -- the choice --------------------------------------------------------------------------------------------------------


def useless(spec, n_classes):
    """Sees one channel at one place."""

    class Blind(LinearHead):
        def answer(self, reduced, state=None):
            return super().answer(torch.zeros_like(reduced))

    return Blind(spec, n_classes)


def test_the_better_head_wins_and_the_report_says_what_was_compared():
    recipe = AutoRecipe([useless, "grid"], epochs=6, batch_size=64)
    _, (winner, _, report) = race(recipe)
    assert winner == report["head"] == "grid"
    assert json.loads(json.dumps(report)) == report
    assert report["n_validation"] == 240
    scores = {name: entry["trials"][0]["score"] for name, entry in report["candidates"].items()}
    assert scores["grid"] > scores["heads[0]"] + 0.1
    assert all(len(entry["head_costs"]) == 2 for entry in report["candidates"].values())


def test_what_heads_cost_is_counted():
    """The same answers at the price of a third of the model lose."""

    def dear(spec, n_classes):
        head = GridHead(spec, n_classes)
        head.waste = torch.nn.Linear(160, 160)
        answer = head.answer

        def wasteful(reduced, state=None):
            head.waste(reduced.new_zeros(len(reduced), 160))
            return answer(reduced, state)

        head.answer = wasteful
        return head

    rivals, (winner, _, report) = race(AutoRecipe([dear, "grid"], epochs=6, batch_size=64))
    prices = [rivals[name].costs.exits[0] / rivals[name].costs.full for name in ("heads[0]", "grid")]
    assert prices[0] > prices[1] + 0.2
    assert len(report["candidates"]["heads[0]"]["trials"]) > 0
    assert winner == "grid"


def test_equal_arguments_give_equal_choices_and_another_seed_other_scores():
    recipe = AutoRecipe(["linear", "grid"], epochs=2)
    one, again, other = (race(recipe, seed)[1] for seed in (0, 0, 1))
    assert one[0] == again[0]
    assert one[2] == again[2]
    assert one[2] != other[2]


def test_trials_leave_the_heads_as_they_were():
    recipe = AutoRecipe(["linear", "grid"], epochs=2)
    rivals, _ = race(recipe)
    fresh = rival_networks(network(), recipe.candidates([]), 10, 0)
    for name, rival in rivals.items():
        for head, new in zip(rival.network.early, fresh[name].early, strict=True):
            for (key, value), right in zip(head.state_dict().items(), new.state_dict().values(), strict=True):
                assert torch.equal(value, right), (name, key)


@pytest.mark.parametrize(("moved", "weights"), [(0.0, {0.5, 1.0}), (0.6, {0.0})])
def test_labels_are_learned_from_where_the_full_model_is_weak(moved, weights):
    """A share of its answers is moved by one class."""

    def spoil(cache):
        rows = np.random.default_rng(0).random(len(cache.logits)) < moved
        cache.logits[rows] = np.roll(cache.logits[rows], 1, axis=1)

    recipe = AutoRecipe(["grid", "linear"], epochs=40)
    _, (_, taken, report) = race(recipe, spoil=spoil)
    assert taken.distillation == report["distillation"]
    assert taken.distillation in weights
    assert recipe.distillation == "auto"


@pytest.mark.parametrize("labelled", [False, True])
def test_without_labels_and_with_a_fixed_share_nothing_else_is_tried(labelled):
    recipe = AutoRecipe(["linear", "grid"], epochs=2, distillation=0.5 if labelled else "auto")
    with torch.no_grad():
        targets = Y if labelled else branched_trained()(X).argmax(1).numpy()
    _, (_, taken, report) = race(recipe, targets=targets)
    weights = {trial["distillation"] for entry in report["candidates"].values() for trial in entry["trials"]}
    assert weights == {taken.distillation} == {0.5 if labelled else 1.0}


def test_few_samples_are_not_compared():
    _, (winner, _, report) = race(AutoRecipe(["linear", "grid"], epochs=1), n_train=900)
    assert report["n_validation"] == 0
    assert all(entry["trials"] == [] for entry in report["candidates"].values())
    assert winner in ("linear", "grid")


def test_classes_of_one_sample_each_are_not_compared():
    rows = np.arange(1200)
    assert head_choice._parted(rows, 0) is None
    learning, judged = head_choice._parted(rows // 4, 0)
    assert sorted([*learning, *judged]) == rows.tolist()


# -- the recipe --------------------------------------------------------------------------------------------------------


def test_names_in_a_save_are_a_closed_set():
    assert AutoRecipe().named("wide-64") is NAMED["wide-64"]
    assert AutoRecipe([useless, "grid"]).named("heads[0]") is useless
    for recipe, name in ((AutoRecipe(), "wide-65"), (AutoRecipe(["grid"]), "linear"), (AutoRecipe(), "__class__")):
        with pytest.raises(ValueError, match=f"head must be one of those that were compared, .*; got '{name}'"):
            recipe.named(name)


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        ({"heads": "grid"}, ValueError, r"heads must be 'auto' or a list of heads to compare; got 'grid'"),
        ({"heads": []}, ValueError, r"heads must be 'auto' or a list"),
        ({"heads": ["wide-46"]}, ValueError, r"heads must be names among .*got 'wide-46'\. Near it: wide-64"),
        ({"heads": ["grid", "grid"]}, ValueError, r"heads must name each head once"),
        ({"heads": [torch.nn.Linear(2, 2)]}, TypeError, r"Every exit needs a head of its own: pass a function"),
        ({"heads": [3]}, TypeError, r"heads must be names or factories .* got 3"),
        ({"distillation": 1.5}, ValueError, r"distillation must lie between 0 and 1, or be 'auto'; got 1.5"),
        ({"distillation": "some"}, (TypeError, ValueError), r"distillation must be"),
        ({"temperature": 0}, ValueError, r"temperature must be"),
        ({"epochs": 0}, ValueError, r"epochs must be"),
    ],
)
def test_settings_that_cannot_be(settings, kind, says):
    with pytest.raises(kind, match=says):
        AutoRecipe(**settings).check()
