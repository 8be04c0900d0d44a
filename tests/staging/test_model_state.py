"""Splitting a model runs it, and leaves nothing of that in it."""

import copy
import pickle
from collections import OrderedDict, defaultdict, deque
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaptexit.staging.cuts import auto_cuts, list_cuts
from adaptexit.staging.model_state import state_restored
from adaptexit.staging.splitting import from_stages, split
from tests.staging.test_splitting import Chain, assert_staged_equals_plain, built, plain, vectors


class Remembering(Chain):
    """Keeps a weight computed once, where ``put`` puts it and ``get`` finds it."""

    def __init__(self, cache, put, get):
        super().__init__()
        self.cache, self.put, self.get = cache, put, get

    def forward(self, x):
        x = self.a(x)
        if self.get(self) is None:
            self.put(self, self.b.weight * 2)
        return F.linear(x, self.get(self)).tanh()


class OfClass(Remembering):
    cache_of_class = {}  # noqa: RUF012


def nothing():
    return None


def last_of(values):
    return values[-1] if values else None


REMEMBERING = {
    "attribute": (None, lambda m, w: setattr(m, "cache", w), lambda m: m.cache),
    "dict": ({}, lambda m, w: m.cache.update(w=w), lambda m: m.cache.get("w")),
    "OrderedDict": (OrderedDict(w=None), lambda m, w: m.cache.update(w=w), lambda m: m.cache["w"]),
    "defaultdict": (defaultdict(nothing), lambda m, w: m.cache.update(w=w), lambda m: m.cache["w"]),
    "list": ([], lambda m, w: m.cache.append(w), lambda m: last_of(m.cache)),
    "deque": (deque(), lambda m, w: m.cache.append(w), lambda m: last_of(m.cache)),
    "nested": ({"in": ([{}],)}, lambda m, w: m.cache["in"][0][0].update(w=w), lambda m: m.cache["in"][0][0].get("w")),
    "object": (SimpleNamespace(w=None), lambda m, w: setattr(m.cache, "w", w), lambda m: m.cache.w),
    "in object": (SimpleNamespace(w={}), lambda m, w: m.cache.w.update(w=w), lambda m: m.cache.w.get("w")),
    "of a leaf": (None, lambda m, w: setattr(m.b, "own", {"w": w}), lambda m: getattr(m.b, "own", {}).get("w")),
}


@pytest.mark.parametrize("where", REMEMBERING)
def test_no_value_of_the_trace_stays_in_the_model(where):
    model = built(Remembering, *REMEMBERING[where])
    parts = split(model, ["a"], vectors())
    assert model.get(model) is None
    again = split(model, ["a"], vectors())
    for each in (parts, again):
        assert_staged_equals_plain(each, model, vectors())
    assert type(model.get(model)) is torch.Tensor  # of the model's own run
    model.put, model.get = None, None  # functions without a name, which cannot be pickled
    pickle.dumps(model)
    copy.deepcopy(model)


def test_no_value_of_the_trace_stays_in_its_class():
    def put(model, weight):
        OfClass.cache_of_class["w"] = weight

    model = built(OfClass, None, put, lambda model: OfClass.cache_of_class.get("w"))
    parts = split(model, ["a"], vectors())
    assert OfClass.cache_of_class == {}
    assert_staged_equals_plain(parts, model, vectors())
    OfClass.cache_of_class.clear()


class Counting(nn.Module):
    """Counts its calls and averages what it sees, in evaluation mode too; none of it is in its answers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("average", torch.zeros(6), persistent=False)
        self.register_buffer("last", torch.zeros(1, 6))
        self.plain = torch.zeros(6)
        self.calls, self.seen = 0, []

    def forward(self, x):
        self.calls += 1
        self.seen.append(x.shape)
        self.steps += 1
        self.average.lerp_(x.detach().mean(0), 0.1)
        self.plain.add_(1)
        self.last = x.detach()[:1].clone()
        return self.layer(x)


class OfCounting(Chain):
    def __init__(self):
        super().__init__()
        self.a, self.b = Counting(), Counting()
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x):
        self.steps += 1
        return self.c(self.b(self.a(x)).tanh()).tanh()


def state_of(model):
    """Buffers and counters, by part: values, and which tensor it is."""
    return {
        name: {
            key: (id(value), value.tolist() if isinstance(value, torch.Tensor) else copy.copy(value))
            for key, value in {**vars(part), **part._buffers}.items()
            if key != "training"
        }
        for name, part in model.named_modules()
    }


@pytest.mark.parametrize(
    "run",
    [
        lambda model: split(model, ["a", "b"], vectors()),
        lambda model: split(model, ["a.layer", "b.layer"], vectors()),
        lambda model: from_stages([model.a, model.b, model.c], vectors()),
        lambda model: list_cuts(model, vectors(), every=True),
        lambda model: auto_cuts(model, vectors()),
    ],
    ids=["split", "split inside", "from stages", "list_cuts", "auto_cuts"],
)
@pytest.mark.parametrize("ran", [False, True])
def test_buffers_and_counters_stay_as_they_were(run, ran):
    model = built(OfCounting)
    if ran:
        plain(model, vectors(seed=4))
    before = state_of(model)
    run(model)
    assert state_of(model) == before


def test_buffers_stay_as_they_were_when_a_pickled_split_is_made_anew():
    twin = pickle.loads(pickle.dumps(split(built(OfCounting), ["a", "b"], vectors())))
    before = state_of(twin.module)
    twin.function(0)
    assert state_of(twin.module) == before


def test_buffers_count_on_when_the_stages_run():
    model = built(OfCounting)
    parts = split(model, ["a"], vectors())
    parts(vectors())
    assert (int(model.a.steps), model.b.calls) == (1, 1)


def test_what_did_not_change_is_not_touched():
    model = built(OfCounting)
    model.frozen = torch.ones(2)
    versions = [tensor._version for tensor in (model.c.weight, model.steps, model.frozen)]
    with state_restored(model):
        pass
    assert [tensor._version for tensor in (model.c.weight, model.steps, model.frozen)] == versions


def test_modes_belong_to_their_users():
    model = built(Chain)
    with state_restored(model):
        model.train()
    assert model.training


def test_state_is_put_back_after_a_failure():
    model = built(OfCounting)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="must match the size"), state_restored(model):
        model(torch.zeros(2, 5))
    assert state_of(model) == before


def test_attributes_that_went_come_back():
    model = built(Chain)
    model.register_buffer("one", torch.ones(1))
    with state_restored(model):
        del model.one, model.a
        model.two = 2
    assert list(model.state_dict()) == ["one", *(f"{part}.{name}" for part in "bca" for name in ("weight", "bias"))]
    assert not hasattr(model, "two")
