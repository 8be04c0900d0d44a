import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptexit.staging.executor import ExitAnswer, StagedModel, execute, record
from adaptexit.staging.live import Along, Carried, Count, Live, Nest, Static, layout_of
from tests.properties.strategies import sizes
from tests.test_live import Pair, grown, same

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
    chosen = data.draw(st.one_of(indices_for(len(samples)), slices_for(len(samples))))
    taken = live_of(kind, samples).taken(chosen)
    assert_equal(taken, live_of(kind, np.array(samples, dtype=np.intp)[chosen].tolist()))


@given(st.data(), value_kinds, sample_lists)
def test_taking_twice_is_taking_once(data, kind, samples):
    live = live_of(kind, samples)
    first = data.draw(st.one_of(indices_for(len(samples)), slices_for(len(samples))))
    left = np.arange(len(samples))[first]
    second = data.draw(st.one_of(indices_for(len(left)), slices_for(len(left))))
    assert_equal(live.taken(first).taken(second), live.taken(left[second]))


@given(st.data(), value_kinds, sample_lists)
def test_joining_what_was_taken_is_taking_all_of_it(data, kind, samples):
    live = live_of(kind, samples)
    choices = [data.draw(indices_for(len(samples))) for _ in range(data.draw(sizes(1, 3)))]
    first, *others = (live.taken(chosen) for chosen in choices)
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
def networks(draw):
    """Whole numbers for every stage and exit, and which of the exits say how sure they are or leave something behind.

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
    }


def staged(network):
    """The network for the executor; beside the numbers go a second tensor, a count and a constant."""

    def stage(k):
        def run(carried):
            if k == 0:
                n, state = len(carried), torch.zeros(len(carried), dtype=torch.float64)
                values = carried, carried[:, :2].reshape(-1, 1), 2 * n, torch.tensor(float(network["terms"][0]))
            else:
                n, state, values = carried.live.n, carried.state, carried.live.values
            now, pairs, count, constant = values
            now = now * network["factors"][k] + network["terms"][k] + pairs.reshape(count // 2, 2).sum(1)[:, None]
            layouts = Along(0, 1), Along(0, 2), Count(2), Static()
            return Carried(Live((now + constant, pairs, count, constant), layouts, n), torch.ones(n, 50), state)

        return run if network["works"][k] else None

    def exit_(k):
        def run(carried):
            now = carried.live.values[0]
            logits = now[:, k : k + N_CLASSES] + carried.state[:, None] * torch.arange(N_CLASSES)
            scores = now[:, 0] - carried.state if network["own_scores"][k] else None
            if not network["leaves_state"][k]:
                return logits if scores is None else ExitAnswer(logits, scores)
            return ExitAnswer(logits, scores, Carried(carried.live, None, 2 * carried.state + now[:, 1]))

        return run

    n = network["n_exits"]
    return StagedModel([stage(k) for k in range(n)], [exit_(k) for k in range(n)], total, network["chained"])


def total(logits):
    return logits.sum(dim=1)


def accepts(network, k, prediction, score):
    """Whether an answer is accepted: no order in it, but the same for the same answer."""
    return (3 * score + prediction + network["salts"][k]) % network["moduli"][k] == 0


def alone(network, x, on, stays=False):
    """(exit, prediction, score, logits) of every exit that one sample asks, by arithmetic on whole numbers."""
    last = network["n_exits"] - 1
    deepest = max((k for k in range(last) if on[k]), default=-1)
    now, state, asked = x.astype(int), 0, []
    for k in range(last + 1):
        if network["works"][k]:
            now = now * network["factors"][k] + network["terms"][k] + int(x[:2].sum()) + network["terms"][0]
        answers = k == last or on[k]
        if answers:
            logits = now[k : k + N_CLASSES] + state * np.arange(N_CLASSES)
            score = now[0] - state if network["own_scores"][k] else logits.sum()
            asked.append((k, int(logits.argmax()), int(score), logits.tolist()))
            if not stays and accepts(network, k, asked[-1][1], asked[-1][2]):
                break
        if network["leaves_state"][k] and (answers or (network["chained"] and k < deepest)):
            state = 2 * state + now[1]
    return asked


@st.composite
def inputs_for(draw, network):
    """Samples of whole numbers, and two ways to cut them into batches."""
    n = draw(sizes(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.integers(-3, 4, size=(n, network["n_exits"] + N_CLASSES)).astype(float)
    return x, np.split(x, sorted(draw(st.sets(st.integers(1, n - 1), max_size=5)) if n > 1 else []))


@given(
    data=st.data(),
    network=networks(),
    batch_size=st.integers(1, 9),
    memory_limit=st.sampled_from([0, 200, 1000, 1 << 30]),
    merge=st.booleans(),
    keep_logits=st.booleans(),
)
def test_answers_are_those_of_one_sample_at_a_time(data, network, batch_size, memory_limit, merge, keep_logits):
    x, batches = data.draw(inputs_for(network))
    on = np.array(data.draw(st.lists(st.booleans(), min_size=network["n_exits"], max_size=network["n_exits"])))
    asked = []

    def accept(k, batch):
        asked.append(k)
        return accepts(network, k, batch.predictions, batch.scores)

    answers = execute(
        staged(network), map(torch.from_numpy, batches), accept, on,
        batch_size=batch_size, memory_limit=memory_limit, merge=merge, keep_logits=keep_logits,
    )  # fmt: skip
    exits, predictions, scores, logits = zip(*(alone(network, row, on)[-1] for row in x), strict=True)
    assert answers.exits.tolist() == list(exits)
    assert answers.predictions.tolist() == list(predictions)
    assert answers.scores.tolist() == list(scores)
    assert answers.logits is None if not keep_logits else answers.logits.tolist() == list(logits)
    assert set(asked) <= set(np.flatnonzero(on[:-1]))


@given(st.data(), networks())
def test_recorded_answers_are_those_of_one_sample_at_a_time(data, network):
    x, batches = data.draw(inputs_for(network))
    predictions, scores, logits, _ = record(staged(network), map(torch.from_numpy, batches), keep_logits=True)
    on = np.ones(network["n_exits"], dtype=bool)
    for i, row in enumerate(x):
        for k, *expected in alone(network, row, on, stays=True):
            assert [predictions[k, i], scores[k, i], logits[k, i].tolist()] == expected
