import json
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

from adaptexit.training import FeatureCache, FrozenRecipe, collect, minimise, recipe_of
from adaptexit.training.head_trainer import Lesson


@dataclass
class Output:
    logits: torch.Tensor
    confidence_logits: torch.Tensor | None = None
    state: Any = None


class SmallHead(nn.Module):
    """A linear head, with batch norm, dropout, a confidence output or an earlier head's logits where wanted."""

    def __init__(self, width, *, norm=False, dropout=0.0, confidence=False, chained=False, seed=0, n_classes=10):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
            self.drop = nn.Dropout(dropout)
            self.classes = nn.Linear(width, n_classes)
            self.earlier = nn.Linear(n_classes, n_classes) if chained else None
            self.sure = nn.Linear(width, n_classes) if confidence else None
        self.chained = chained
        self.states = []

    def reduce(self, feature):
        return feature

    def answer(self, reduced, state=None):
        self.states.append(state)
        normed = self.drop(self.norm(reduced))
        logits = self.classes(normed)
        if self.earlier is not None and state is not None:
            logits = logits + self.earlier(state["logits"][0])
        return Output(logits, None if self.sure is None else self.sure(normed), {"logits": (logits,), "n": 1})

    def confidence_parameters(self):
        return [] if self.sure is None else list(self.sure.parameters())


def digits():
    """Images as (N, 64) in [0, 1], whole, and their lower halves: a deep and a shallow feature; labels."""
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32)
    return X, X[:, 32:], y


def digit_cache(dtype=None):
    deep, shallow, y = digits()
    logits = np.zeros((len(y), 10), dtype=np.float32)
    dtypes = None if dtype is None else [dtype, dtype]
    return FeatureCache([shallow, deep], logits, dtypes), y


def trained(heads, recipe=None, n=300, **options):
    cache, y = digit_cache()
    rows = np.arange(n)
    history = (recipe or FrozenRecipe(epochs=3, batch_size=64)).train(heads, cache, rows, y[:n], **options)
    return history


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def accuracy(head, feature, y):
    with torch.no_grad():
        return float((head.answer(torch.from_numpy(feature)).logits.argmax(1).numpy() == y).mean())


# -- the frozen recipe -------------------------------------------------------------------------------------------------


def test_heads_learn_the_digits():
    cache, y = digit_cache()
    rows = np.random.default_rng(0).permutation(len(y))
    train, fresh = rows[:1200], rows[1200:]
    heads = [SmallHead(32, norm=True), SmallHead(64, norm=True, dropout=0.2)]
    history = FrozenRecipe(epochs=12, lr=1e-2, batch_size=64).train(heads, cache, train, y[train])
    assert accuracy(heads[0], cache.features[0][fresh], y[fresh]) > 0.8
    assert accuracy(heads[1], cache.features[1][fresh], y[fresh]) > 0.93
    assert history["confidence_loss"] == [[], []]
    assert [len(losses) for losses in history["loss"]] == [12, 12]
    assert all(losses[-1] < 0.5 * losses[0] for losses in history["loss"])
    assert json.loads(json.dumps(history)) == history


def test_only_the_given_rows_are_learned_from():
    cache, y = digit_cache()
    with_nan = FeatureCache([feature.copy() for feature in cache.features], cache.logits)
    rows = np.random.default_rng(1).permutation(len(y))[:200]
    for feature in with_nan.features:
        feature[np.setdiff1d(np.arange(len(y)), rows)] = np.nan
    weights = []
    for data in (cache, with_nan):
        heads = [SmallHead(32), SmallHead(64)]
        FrozenRecipe(epochs=2).train(heads, data, rows, y[rows])
        weights.append(state(nn.ModuleList(heads)))
    assert equal(*weights)


def test_a_seed_determines_weights_bit_by_bit():
    def learned(random_state):
        heads = [SmallHead(32, norm=True, dropout=0.5), SmallHead(64, dropout=0.5, confidence=True)]
        history = trained(heads, random_state=random_state)
        return state(nn.ModuleList(heads)), history

    (first, history), (again, same), (other, _) = learned(3), learned(3), learned(4)
    assert equal(first, again)
    assert history == same
    assert not equal(first, other)
    assert equal(learned(np.random.RandomState(5))[0], learned(np.random.RandomState(5))[0])


def test_global_random_states_are_left_alone_and_do_not_matter():
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        head = SmallHead(64, dropout=0.5)
        trained([SmallHead(32), head])
        assert torch.equal(torch.get_rng_state(), before)
        assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002
        states.append(state(head))
    assert equal(*states)


def test_heads_learn_together_as_they_would_alone():
    cache, y = digit_cache()
    together = [SmallHead(32, norm=True, seed=1), SmallHead(64, seed=2)]
    both = trained(together)
    for k, seed in enumerate((1, 2)):
        alone = SmallHead((32, 64)[k], norm=k == 0, seed=seed)
        one = FeatureCache([cache.features[k]], cache.logits)
        history = FrozenRecipe(epochs=3, batch_size=64).train([alone], one, np.arange(300), y[:300])
        assert equal(state(alone), state(together[k]))
        assert history["loss"][0] == pytest.approx(both["loss"][k], rel=1e-5)


def test_a_chained_head_reads_the_earlier_state_without_a_gradient():
    first, chained = SmallHead(32, seed=1), SmallHead(64, chained=True, seed=2)
    trained([first, chained])
    alone = SmallHead(32, seed=1)
    trained([alone, SmallHead(64, seed=2)])
    assert equal(state(first), state(alone))
    assert all(earlier is None for earlier in first.states)
    assert all(earlier["n"] == 1 and not earlier["logits"][0].requires_grad for earlier in chained.states)
    assert len(chained.states) == 3 * 5
    assert not equal(state(chained.earlier), state(SmallHead(64, chained=True, seed=2).earlier))


def test_a_chained_head_that_comes_first_gets_no_state():
    first = SmallHead(32, chained=True)
    trained([first, SmallHead(64)])
    assert all(earlier is None for earlier in first.states)


@pytest.mark.parametrize(
    ("chained", "asked", "run"),
    [
        ((False, False, False), [2], [0, 0, 1]),
        ((False, False, False), [0, 2], [1, 0, 1]),
        ((False, True, False), [1], [1, 1, 0]),
        ((False, True, True), [2], [1, 1, 1]),
        ((False, True, True), [0], [1, 0, 0]),
        ((True, True, True), [], [0, 0, 0]),
    ],
)
def test_heads_are_run_only_for_those_that_answer_or_are_read_by_them(chained, asked, run):
    cache, y = digit_cache()
    three = FeatureCache([*cache.features, cache.features[1]], cache.logits)
    heads = [SmallHead(w, chained=c, seed=k) for k, (w, c) in enumerate(zip((32, 64, 64), chained, strict=True))]
    answers = Lesson(heads, three, np.arange(20), torch.from_numpy(y[:20]), {}).answers(torch.arange(8), asked)
    assert [len(head.states) for head in heads] == run
    assert [answer.exit for answer in answers] == asked


def test_confidence_is_learned_without_touching_anything_else():
    options = {"norm": True, "dropout": 0.3, "seed": 1}
    sure, plain = SmallHead(64, confidence=True, **options), SmallHead(64, **options)
    before = state(sure.sure)
    history = trained([SmallHead(32), sure])
    trained([SmallHead(32), plain])
    others = {name: tensor for name, tensor in state(sure).items() if not name.startswith("sure.")}
    assert set(others) == set(state(plain))
    assert equal(others, state(plain))
    assert not equal(before, state(sure.sure))
    assert history["confidence_loss"][0] == []
    assert history["confidence_loss"][1][-1] < history["confidence_loss"][1][0]


def test_confidence_tells_right_from_wrong():
    cache, y = digit_cache()
    heads = [SmallHead(32, confidence=True), SmallHead(64)]
    FrozenRecipe(epochs=5, lr=1e-2, confidence_epochs=40, batch_size=200).train(heads, cache, np.arange(1200), y[:1200])
    out = heads[0].answer(torch.from_numpy(cache.features[0][1200:]))
    predicted = out.logits.argmax(1)
    entry = out.confidence_logits.gather(1, predicted[:, None])[:, 0].detach().numpy()
    right = predicted.numpy() == y[1200:]
    assert 0.5 < right.mean() < 0.95
    assert roc_auc_score(right, entry) > 0.75


def test_confidence_epochs_and_loss_are_as_described():
    head = SmallHead(64, norm=True, dropout=0.5, confidence=True)
    recipe = FrozenRecipe(epochs=2, lr=1e-12, weight_decay=0.0, confidence_epochs=4)
    history = trained([SmallHead(32), head], recipe)
    assert len(history["loss"][1]) == 2
    assert len(history["confidence_loss"][1]) == 4
    deep, _, y = digits()
    with torch.no_grad():
        out = head.eval().answer(torch.from_numpy(deep[:300]))
    predicted = out.logits.argmax(1).numpy()
    p = 1 / (1 + np.exp(-out.confidence_logits.numpy()[np.arange(300), predicted].astype(float)))
    by_hand = -np.where(predicted == y[:300], np.log(p), np.log(1 - p)).mean()
    assert history["confidence_loss"][1][0] == pytest.approx(by_hand, rel=1e-4)


def test_confidence_of_a_chained_head_reads_the_head_before():
    first, chained = SmallHead(32), SmallHead(64, chained=True, confidence=True)
    history = trained([first, chained])
    assert history["confidence_loss"][0] == []
    assert len(chained.states) == 2 * 3 * 5
    assert all(earlier is not None for earlier in chained.states)


@pytest.mark.parametrize("n", [2, 3, 33, 65, 129])
def test_no_batch_breaks_batch_norm(n):
    heads = [SmallHead(32, norm=True), SmallHead(64, norm=True)]
    history = trained(heads, FrozenRecipe(epochs=2, batch_size=32), n=n)
    assert np.isfinite(history["loss"]).all()
    assert all(parameter.isfinite().all() for head in heads for parameter in head.parameters())


def test_features_of_another_type_are_cast_to_that_of_the_head():
    cache, y = digit_cache(torch.bfloat16)
    for dtype in (torch.float32, torch.float64):
        heads = [SmallHead(32).to(dtype), SmallHead(64).to(dtype)]
        FrozenRecipe(epochs=1).train(heads, cache, np.arange(50), y[:50])
        assert heads[0].classes.weight.dtype == dtype
        assert heads[0].classes.weight.isfinite().all()


class ExactBackbone(nn.Module):
    """Whole numbers throughout: sums are exact, so a sample's feature does not depend on its batch."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        widths = (64, 20, 12, 10)
        self.weights = [torch.from_numpy(rng.integers(-2, 3, pair).astype(np.float32)) for pair in pairwise(widths)]

    def run(self, x, visit):
        for k, weight in enumerate(self.weights):
            x = x @ weight
            if k < 2:
                visit(k, x)
                x.relu_()
        return x


class Recomputed(FeatureCache):
    """Runs the backbone whenever rows are wanted."""

    def __init__(self, backbone, X, logits):
        super().__init__([np.empty(0)] * 2, logits)
        self.backbone, self.X = backbone, X

    def rows(self, k, indices):
        features = {}
        self.backbone.run(self.X[indices], lambda k, feature: features.setdefault(k, feature.clone()))
        return features[k]


def test_training_on_the_cache_is_training_on_the_backbone(tmp_path):
    X, y = load_digits(return_X_y=True)
    X = torch.from_numpy(X.astype(np.float32))
    backbone, reducers = ExactBackbone(), [lambda feature: feature] * 2
    caches = [
        collect(X.split(100), backbone.run, reducers),
        collect(X.split(33), backbone.run, reducers, memory_limit=0),
        collect(X.split(100), backbone.run, reducers, folder=tmp_path, key="exact"),
        collect(X.split(100), backbone.run, reducers, folder=tmp_path, key="exact"),
    ]
    rows = np.random.default_rng(0).permutation(len(y))[:500]
    runs = []
    for cache in [Recomputed(backbone, X, caches[0].logits), *caches]:
        heads = [SmallHead(20, norm=True, confidence=True), SmallHead(12, dropout=0.2, chained=True)]
        history = FrozenRecipe(epochs=3).train(heads, cache, rows, y[rows])
        runs.append((state(nn.ModuleList(heads)), history))
    for weights, history in runs[1:]:
        assert equal(runs[0][0], weights)
        assert history == runs[0][1]
    assert not equal(runs[0][0], state(nn.ModuleList([SmallHead(20, norm=True, confidence=True)])))


def test_evaluation_mode_afterwards_also_after_an_error():
    heads = [SmallHead(32, dropout=0.5), SmallHead(64, norm=True, confidence=True)]
    trained([head.train() for head in heads])
    assert not any(part.training for head in heads for part in head.modules())
    for head in heads:
        head.train()
    heads[1].sure.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trained(heads)
    assert not any(part.training for head in heads for part in head.modules())
    assert all(p.requires_grad and p.grad is None for head in heads for p in head.parameters())


def test_a_loss_that_diverges_names_the_epoch():
    cache, y = digit_cache()
    cache.features[1][7, 0] = np.inf
    with pytest.raises(FloatingPointError, match=r"heads: term 1 of the loss became (nan|inf) in epoch 1 of 3"):
        FrozenRecipe(epochs=3).train([SmallHead(32), SmallHead(64)], cache, np.arange(50), y[:50])
    with pytest.raises(FloatingPointError, match=r"epoch \d+ of 9 at lr=1e\+30\. Lower lr"):
        trained([SmallHead(32), SmallHead(64)], FrozenRecipe(epochs=9, lr=1e30))


def test_a_bar_only_when_asked_for(capfd):
    trained([SmallHead(32), SmallHead(64, confidence=True)])
    assert capfd.readouterr() == ("", "")
    trained([SmallHead(32), SmallHead(64, confidence=True)], verbose=1)
    out, err = capfd.readouterr()
    assert out == ""
    assert "training heads: 100%" in err
    assert "training confidence: 100%" in err


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number, at least 1 or 'auto'; got 0"),
        ({"epochs": 2.5}, r"epochs must be a whole number, at least 1 or 'auto'; got 2\.5"),
        ({"epochs": True}, "epochs must be a whole number, at least 1 or 'auto'; got True"),
        ({"confidence_epochs": 0}, "confidence_epochs must be a whole number, at least 1; got 0"),
        ({"batch_size": 1}, "batch_size must be a whole number, at least 2; got 1"),
        ({"lr": 0.0}, r"lr must be a finite number above 0; got 0\.0"),
        ({"lr": "fast"}, "lr must be a finite number above 0; got 'fast'"),
        ({"weight_decay": -1}, "weight_decay must be a finite number, 0 or above; got -1"),
    ],
)
def test_parameters_are_checked_when_training_starts(params, message):
    recipe = clone(FrozenRecipe(**params))
    heads = [SmallHead(32), SmallHead(64)]
    before = state(nn.ModuleList(heads))
    with pytest.raises(ValueError, match=message):
        trained(heads, recipe)
    assert equal(before, state(nn.ModuleList(heads)))


@pytest.mark.parametrize(
    ("rows", "targets", "message"),
    [
        ([], [], r"rows must be an integer array \(n,\) of at least one sample"),
        ([0.0], [0], "rows must be an integer array"),
        ([[0]], [[0]], "rows must be an integer array"),
        ([0, 1797], [0, 0], r"rows must lie in 0 \.\.\. 1796.* got values from 0 to 1797"),
        ([-1], [0], "got values from -1 to -1"),
        ([0, 1], [0], r"targets must be an integer array of shape \(2,\).* got int64 of shape \(1,\)"),
        ([0], [0.5], "targets must be an integer array .* got float64"),
        ([0], [10], r"targets must lie in 0 \.\.\. 9; got values from 10 to 10\. Map"),
        ([0], [-1], "got values from -1 to -1"),
    ],
)
def test_rows_and_targets_are_checked(rows, targets, message):
    with pytest.raises(ValueError, match=message):
        FrozenRecipe().train([SmallHead(32), SmallHead(64)], digit_cache()[0], rows, targets)


def test_heads_that_do_not_fit():
    with pytest.raises(ValueError, match="heads must be one for each of the 2 early exits; got 1"):
        trained([SmallHead(32)])
    with pytest.raises(
        ValueError, match=r"head 1 must answer with logits of shape .* \(64, 10\).* got shape \(64, 7\)"
    ):
        trained([SmallHead(32), SmallHead(64, n_classes=7)])
    silent = SmallHead(64, confidence=True)
    answer = silent.answer
    silent.answer = lambda reduced, state=None: Output(answer(reduced).logits)
    with pytest.raises(ValueError, match="must give confidence_logits"):
        trained([SmallHead(32), silent])


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_the_loop_is_adamw_on_a_cosine():
    deep, _, y = digits()
    X, y = torch.from_numpy(deep), torch.from_numpy(y)
    visits, head, by_hand = [], SmallHead(64), SmallHead(64)

    def loss(rows):
        visits.append(rows)
        return F.cross_entropy(head.classes(X[rows]), y[rows])

    settings = {"epochs": 4, "lr": 0.05, "weight_decay": 0.3, "batch_size": 30, "random_state": 7}
    history = minimise(loss, [head], 100, **settings)
    assert len(visits) == 4 * 4
    means = []
    optimizer = torch.optim.AdamW(by_hand.parameters(), 0.05, weight_decay=0.3)
    for step, rows in enumerate(visits):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + np.cos(np.pi * step / 16)) / 2
        optimizer.zero_grad()
        value = F.cross_entropy(by_hand.classes(X[rows]), y[rows])
        value.backward()
        optimizer.step()
        means.append(float(value.detach()) * len(rows) / 100)
    torch.testing.assert_close(state(head), state(by_hand), rtol=1e-4, atol=1e-6)
    assert np.concatenate(history) == pytest.approx(np.reshape(means, (4, 4)).sum(axis=1), rel=1e-5)


@given(n=st.integers(1, 50), batch_size=st.integers(2, 20), seed=st.integers(0, 1000))
def test_an_epoch_visits_every_row_once_and_none_alone(n, batch_size, seed):
    visits, module = [], nn.Linear(1, 1)

    def loss(rows):
        visits.append(rows.tolist())
        return module.bias.sum()

    minimise(loss, [module], n, epochs=2, lr=0.1, batch_size=batch_size, random_state=seed)
    halfway = len(visits) // 2
    first, second = [list(chain.from_iterable(epoch)) for epoch in (visits[:halfway], visits[halfway:])]
    assert sorted(first) == sorted(second) == list(range(n))
    assert n < 10 or first != second
    assert n == 1 or all(2 <= len(batch) <= batch_size + 1 for batch in visits)


def test_weights_are_the_odds_of_a_row():
    visits, module = [], nn.Linear(1, 1)

    def loss(rows):
        visits.extend(rows.tolist())
        return module.bias.sum()

    minimise(loss, [module], 4, epochs=1000, lr=0.1, sample_weight=[0.0, 1.0, 2.0, 5.0])
    share = np.bincount(visits, minlength=4) / 4000
    assert share[0] == 0
    assert share == pytest.approx([0, 1 / 8, 2 / 8, 5 / 8], abs=0.03)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 1.0], r"must have shape \(3,\), one a row; got shape \(2,\)"),
        ([0.0] * 3, "one above 0"),
        ([1, 1, -1], "not negative"),
        ([1, 1, np.nan], "finite"),
    ],
)
def test_weights_are_checked(weights, message):
    module = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=f"sample_weight .*{message}"):
        minimise(lambda rows: module.bias.sum(), [module], 3, epochs=1, lr=0.1, sample_weight=weights)


def test_only_the_given_parameters_learn():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    net[0].bias.requires_grad_(False)
    net[1].bias.requires_grad_(False)
    before, requires = state(net), [p.requires_grad for p in net.parameters()]
    x, during, outside = torch.randn(8, 3), [], nn.Parameter(torch.ones(()))

    def loss(rows):
        during.append([p.requires_grad for p in net.parameters()])
        return outside * net(x[rows]).pow(2).mean()

    minimise(loss, [net], 8, epochs=3, lr=0.1, weight_decay=0.1, parameters=[net[1].weight, net[1].bias])
    assert equal(before, state(net) | {name: before[name] for name in ("1.weight", "1.bias")})
    assert not torch.equal(before["1.weight"], net[1].weight)
    assert not torch.equal(before["1.bias"], net[1].bias)
    assert outside.grad is None
    assert during[0] == [False, False, True, True]
    assert [p.requires_grad for p in net.parameters()] == requires
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_modules_are_in_the_mode_asked_for(training):
    net, modes = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1)), []

    def loss(rows):
        modes.append({part.training for part in net.modules()})
        return net(torch.ones(1, 1)).sum()

    minimise(loss, [net.train(not training)], 4, epochs=1, lr=0.1, training=training)
    assert modes == [{training}]
    assert not any(part.training for part in net.modules())


def test_terms_are_summed_and_reported_apart():
    net = nn.Linear(2, 1, bias=False)
    net.weight.data.fill_(1.0)
    history = minimise(lambda rows: net.weight[0] * torch.tensor([1.0, 3.0]), [net], 4, epochs=2, lr=1e-9)
    assert history == [[pytest.approx(1.0), pytest.approx(3.0)]] * 2


def test_training_works_where_gradients_are_switched_off():
    net = nn.Linear(2, 1)
    before = state(net)
    with torch.no_grad():
        minimise(lambda rows: net(torch.ones(1, 2)).sum(), [net], 4, epochs=1, lr=0.1)
    assert not equal(before, state(net))


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="training needs parameters to train; got none"):
        minimise(lambda rows: torch.zeros(()), [nn.ReLU()], 3, epochs=1, lr=0.1)


# -- recipes by name ---------------------------------------------------------------------------------------------------


def test_recipes_by_name_and_as_they_are():
    assert recipe_of("frozen").get_params() == FrozenRecipe().get_params()
    assert recipe_of("frozen") is not recipe_of("frozen")
    mine = FrozenRecipe(epochs=3)
    assert recipe_of(mine) is mine

    class Own:
        def train(self, heads, cache, rows, targets, *, random_state=0, verbose=0):
            return {}

    own = Own()
    assert recipe_of(own) is own


def test_unknown_recipes():
    with pytest.raises(ValueError, match=r"one of 'auto', 'frozen', .* got 'frosen'\. Near it is 'frozen'"):
        recipe_of("frosen")
    with pytest.raises(ValueError, match=r"got 'xyz'\.$"):
        recipe_of("xyz")
    for other in (None, 3, FrozenRecipe, object()):
        with pytest.raises(
            TypeError, match=r"recipe must be a name \(.auto., .frozen., .*\) or a recipe such as FrozenRecipe\(\)"
        ):
            recipe_of(other)
