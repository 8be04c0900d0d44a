import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adaptexit.core.answer import Answer
from adaptexit.core.costs import Costs
from adaptexit.core.policy import Decision
from adaptexit.networks.base import Network
from adaptexit.staging.carried import Along, Carried, Count, Live, Nest, Static, layout_of
from adaptexit.staging.executor import execute, record
from tests.properties.strategies import sizes
from tests.staging.test_carried import Pair, grown, same

# -- values of samples -------------------------------------------------------------------------------------------------

KINDS = {
    "list": list,
    "tuple": tuple,
    "dict": lambda entries: {f"key {i}": entry for i, entry in enumerate(entries)},
    "pair": lambda entries: Pair(*[*entries, None, 0.5][:2]),
}


@st.composite
def tensor_kinds(draw):
    """What a tensor of samples looks like: its other axes, that of the samples, rows a sample, dtype."""
    other = tuple(draw(st.lists(sizes(0, 3), max_size=3)))
    dtype = draw(st.sampled_from([torch.int64, torch.float32]))
    return "along", other, draw(sizes(0, len(other))), draw(sizes(1, 3)), dtype


static_kinds = st.sampled_from([0, 4, 0.5, "text", None, True, torch.float16, torch.arange(3.0), torch.tensor(2)])
leaf_kinds = st.one_of(
    tensor_kinds(), st.tuples(st.just("count"), sizes(1, 4)), st.tuples(st.just("static"), static_kinds)
)
value_kinds = st.recursive(
    leaf_kinds,
    lambda kinds: st.tuples(st.just("nest"), st.sampled_from(sorted(KINDS)), st.lists(kinds, max_size=3)),
    max_leaves=6,
)


def value_of(kind, samples):
    """The value of that kind that some samples have."""
    name, *about = kind
    if name == "along":
        return grown(samples, *about)
    if name == "count":
        return about[0] * len(samples)
    if name == "static":
        return about[0]
    return KINDS[about[0]]([value_of(part, samples) for part in about[1]])


def layout_by_construction(kind):
    name, *about = kind
    if name == "along":
        return Along(about[1], about[2])
    if name == "count":
        return Count(about[0])
    if name == "static":
        return Static()
    parts = tuple(layout_by_construction(part) for part in about[1])
    return Nest((*parts, Static(), Static())[:2] if about[0] == "pair" else parts)


def live_of(kind, samples):
    return Live((value_of(kind, samples),), (layout_by_construction(kind),), len(samples))


def assert_equal(one, other):
    assert same(one.values, other.values)
    assert one.layouts == other.layouts
    assert one.n == other.n


sample_lists = st.lists(st.integers(0, 99), max_size=6)


@st.composite
def indices_for(draw, n):
    """Any of n samples, in any order, some twice."""
    return np.array(draw(st.lists(st.integers(0, n - 1), max_size=8)) if n else [], dtype=np.intp)


@st.composite
def slices_for(draw, n):
    """A run of n samples, perhaps empty, perhaps with an open end."""
    start, stop = sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    return slice(draw(st.sampled_from([start, None])), draw(st.sampled_from([stop, None])))


@given(value_kinds)
def test_the_layout_is_read_off_two_runs(kind):
    assert layout_of(value_of(kind, [3, 8]), value_of(kind, [1, 9, 5])) == layout_by_construction(kind)


@given(st.data(), value_kinds, sample_lists)
def test_what_is_taken_is_what_those_samples_alone_have(data, kind, samples):
    indices = data.draw(st.one_of(indices_for(len(samples)), slices_for(len(samples))))
    some = live_of(kind, samples).taken(indices)
    assert_equal(some, live_of(kind, np.array(samples, dtype=np.intp)[indices].tolist()))


@given(st.data(), value_kinds, sample_lists)
def test_taking_twice_is_taking_once(data, kind, samples):
    live = live_of(kind, samples)
    first = data.draw(st.one_of(indices_for(len(samples)), slices_for(len(samples))))
    survivors = np.arange(len(samples))[first]
    second = data.draw(st.one_of(indices_for(len(survivors)), slices_for(len(survivors))))
    assert_equal(live.taken(first).taken(second), live.taken(survivors[second]))


@given(st.data(), value_kinds, sample_lists)
def test_joining_what_was_taken_is_taking_all_of_it(data, kind, samples):
    live = live_of(kind, samples)
    choices = [data.draw(indices_for(len(samples))) for _ in range(data.draw(sizes(1, 3)))]
    first, *others = (live.taken(indices) for indices in choices)
    assert_equal(first.joined(others), live.taken(np.concatenate(choices)))


@given(value_kinds, sample_lists)
def test_taking_everybody_changes_nothing(kind, samples):
    live = live_of(kind, samples)
    assert_equal(live.taken(slice(None)), live)
    assert_equal(live.taken(np.arange(len(samples))), live)


@given(value_kinds, sample_lists)
def test_memory_grows_by_the_same_for_every_sample(kind, samples):
    assert live_of(kind, samples).nbytes == len(samples) * live_of(kind, [0]).nbytes


# -- staged networks ---------------------------------------------------------------------------------------------------

N_CLASSES = 3


@st.composite
def descriptions(draw):
    """Whole numbers for every stage and exit, which exits say how sure they are or leave state, and what is asked.

    A stage multiplies and adds; an exit answers with columns of what is carried, to which it adds what exits before it
    left behind.
    """
    n = draw(sizes(1, 4))

    def some(values):
        return draw(st.lists(values, min_size=n, max_size=n))

    return {
        "n_exits": n,
        "chained": draw(st.booleans()),
        "works": [True, *some(st.booleans())[1:]],
        "factors": some(st.sampled_from([-1, 1, 2])),
        "terms": some(st.integers(-2, 2)),
        "own_scores": some(st.booleans()),
        "leaves_state": some(st.booleans()),
        "moduli": some(st.sampled_from([1, 2, 3, 5, 1000])),
        "salts": some(st.integers(0, 4)),
        "reads_logits": draw(st.booleans()),
        "reads_features": draw(st.booleans()),
        "remembers": draw(st.booleans()),
    }


class Arithmetic(Network):
    """A network of whole numbers; beside them it carries a second tensor, a count and a constant."""

    def __init__(self, about):
        self.about = about
        self.stages = nn.ModuleList(nn.Identity() for _ in range(about["n_exits"]))
        self.heads = nn.ModuleList(nn.Identity() for _ in range(about["n_exits"]))
        self.chained = about["chained"]

    modules = ()

    def get_state(self):
        raise NotImplementedError

    def prepare(self, x):
        values = x, x[:, :2].reshape(-1, 1), 2 * len(x), torch.tensor(float(self.about["terms"][0]))
        layouts = Along(0, 1), Along(0, 2), Count(2), Static()
        return Carried(Live(values, layouts, len(x)), None, torch.zeros(len(x), dtype=torch.float64))

    def stage(self, k, carried):
        if not self.about["works"][k]:
            return carried
        live = carried.live
        now, pairs, count, constant = live.values
        now = now * self.about["factors"][k] + self.about["terms"][k]
        now = now + pairs.reshape(count // 2, 2).sum(1)[:, None] + constant
        return Carried(Live((now, pairs, count, constant), live.layouts, live.n), torch.ones(live.n, 50), carried.state)

    def exit(self, k, carried, features=False):
        now, state = carried.live.values[0], carried.state
        answer = Answer(
            logits=now[:, k : k + N_CLASSES] + state[:, None] * torch.arange(N_CLASSES),
            scores=now[:, 0] - state if self.about["own_scores"][k] else None,
            features=now[:, 1:3] if features else None,
        )
        if self.about["leaves_state"][k]:
            state = 2 * state + now[:, 1]
        return answer, Carried(carried.live, None, state)

    def reader(self, k, output, *, logits):
        scores = output.logits.sum(dim=1) if output.scores is None else output.scores
        return Answer(
            logits=output.logits.numpy() if logits else None,
            predictions=output.logits.argmax(dim=1).numpy(),
            scores=scores.numpy(),
            features=None if output.features is None else output.features.numpy(),
        )


def verdict(about, k, score, prediction, logits=None, features=None, memory=None):
    """The number that decides, and whether it lets a sample leave: no order in it, but the same for the same answer."""
    number = 3 * score + prediction + about["salts"][k]
    for extra in (logits, features):
        number = number if extra is None else number + extra.sum(axis=-1)
    number = number if memory is None else number + memory
    return number, number % about["moduli"][k] == 0


class Rule:
    """A policy that decides on all that it is given, and notes the exits that it is asked about."""

    full_cost = 1.0

    def __init__(self, about, on):
        costs = Costs(np.ones(len(on)), np.ones(len(on)), about["chained"])
        self.about, self.on = about, on
        self.runs, self.path_costs = costs.runs(on), costs.paths(on)
        self.needs_logits, self.needs_features = about["reads_logits"], about["reads_features"]
        self.exits_asked = set()

    def decide(self, k, batch, memory=None):
        self.exits_asked.add(k)
        assert (batch.features is not None) == self.needs_features
        number, leave = verdict(
            self.about, k, batch.scores, batch.predictions, batch.logits if self.needs_logits else None,
            batch.features, None if memory is None else memory[:, 0],
        )  # fmt: skip
        memory = number[:, None] if self.about["remembers"] else None
        return Decision(leave & self.on[k], number, memory)


def alone(about, x, on, stays=False):
    """(exit, prediction, recorded score, decided score, logits) at every exit that one sample is asked at, by hand."""
    last = about["n_exits"] - 1
    deepest = max((k for k in range(last) if on[k]), default=-1)
    now, state, memory, stops = x.astype(int), 0, None, []
    for k in range(last + 1):
        if about["works"][k]:
            now = now * about["factors"][k] + about["terms"][k] + int(x[:2].sum()) + about["terms"][0]
        if not (k == last or on[k] or (about["chained"] and k < deepest)):
            continue
        logits = now[k : k + N_CLASSES] + state * np.arange(N_CLASSES)
        score = now[0] - state if about["own_scores"][k] else logits.sum()
        number, leaves = verdict(
            about, k, score, int(logits.argmax()), logits if about["reads_logits"] else None,
            now[1:3] if about["reads_features"] else None, memory,
        )  # fmt: skip
        stops.append((k, int(logits.argmax()), int(score), int(number), logits.tolist()))
        if not stays and on[k] and leaves:
            break
        memory = number if about["remembers"] else None
        if about["leaves_state"][k]:
            state = 2 * state + now[1]
    return stops


@st.composite
def inputs_for(draw, about):
    """Samples of whole numbers, and two ways to cut them into batches."""
    n = draw(sizes(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.integers(-3, 4, size=(n, about["n_exits"] + N_CLASSES)).astype(float)
    return x, np.split(x, sorted(draw(st.sets(st.integers(1, n - 1), max_size=5)) if n > 1 else []))


@given(
    data=st.data(),
    about=descriptions(),
    batch_size=st.integers(1, 9),
    memory_limit=st.sampled_from([0, 200, 1000, 1 << 30]),
    merge=st.booleans(),
    keep_logits=st.booleans(),
)
def test_answers_are_those_of_one_sample_at_a_time(data, about, batch_size, memory_limit, merge, keep_logits):
    x, batches = data.draw(inputs_for(about))
    on = np.array(data.draw(st.lists(st.booleans(), min_size=about["n_exits"], max_size=about["n_exits"])))
    rule = Rule(about, on)
    answers = execute(
        Arithmetic(about), map(torch.from_numpy, batches), rule,
        batch_size=batch_size, memory_limit=memory_limit, merge=merge, keep_logits=keep_logits,
    )  # fmt: skip
    exits, predictions, _, scores, logits = zip(*(alone(about, row, on)[-1] for row in x), strict=True)
    assert answers.exits.tolist() == list(exits)
    assert answers.predictions.tolist() == list(predictions)
    assert answers.scores.tolist() == list(scores)
    assert answers.logits is None if not keep_logits else answers.logits.tolist() == list(logits)
    assert rule.exits_asked <= set(np.flatnonzero(rule.runs))


@given(st.data(), descriptions())
def test_recorded_answers_are_those_of_one_sample_at_a_time(data, about):
    x, batches = data.draw(inputs_for(about))
    answers = record(Arithmetic(about), map(torch.from_numpy, batches), logits=True)
    on = np.ones(about["n_exits"], dtype=bool)
    for i, row in enumerate(x):
        for k, prediction, score, _, logits in alone(about, row, on, stays=True):
            assert [answers[k].predictions[i], answers[k].scores[i]] == [prediction, score]
            assert answers[k].logits[i].tolist() == logits
