import dataclasses
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from adaptexit.core.answer import Answer
from adaptexit.core.costs import Costs
from adaptexit.core.frontier import evaluate
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.policy import Decision, ThresholdPolicy
from adaptexit.core.routing import exit_index
from adaptexit.core.scores import max_proba
from adaptexit.staging.carried import Along, Carried, Live
from adaptexit.staging.executor import execute, record
from tests.nets import N_CLASSES, Columns, FunctionNetwork, Recording, RulePolicy, leaving_above, naive_cascade


def largest(logits):
    return logits.amax(dim=1)


def column_model(n_exits, confidence=largest):
    exits = [Recording(Columns(k)) for k in range(n_exits)]
    return FunctionNetwork([None] * n_exits, exits, confidence)


def run(model, batches, cutoffs, **options):
    return execute(model, batches, leaving_above(cutoffs), **({"batch_size": 8} | options))


def columns_of(answers, name):
    """One entry of what K exits say of everybody, exits first."""
    return np.stack([getattr(answer, name) for answer in answers])


def samples(n, n_exits, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, n_exits * N_CLASSES)))


def batched(x, sizes):
    """x cut into batches of the sizes given, in turn, the last as long as what is left."""
    start, batches = 0, []
    while start < len(x):
        batches.append(x[start : start + sizes[len(batches) % len(sizes)]])
        start += len(batches[-1])
    return batches


# -- the same answers as one sample at a time -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_exits", [1, 2, 3, 4])
@pytest.mark.parametrize("sizes", [[1], [3], [8], [5, 1, 7]])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("memory_limit", [0, 100, 1 << 30])
def test_answers_equal_one_sample_at_a_time(seed, n_exits, sizes, merge, memory_limit):
    x = samples(45, n_exits, seed)
    model = column_model(n_exits)
    cutoffs = [*np.random.default_rng(seed).normal(0.8, 0.4, n_exits - 1), -np.inf]
    answers = run(
        model, batched(x, sizes), cutoffs, batch_size=max(sizes), merge=merge, memory_limit=memory_limit,
        keep_logits=True,
    )  # fmt: skip
    predictions, exits = naive_cascade(model.heads, x, cutoffs, largest)
    assert n_exits == 1 or len(set(exits)) > 1
    assert answers.predictions.tolist() == predictions
    assert answers.exits.tolist() == exits
    logits = x.numpy().reshape(45, n_exits, N_CLASSES)[np.arange(45), exits]
    assert np.array_equal(answers.logits, logits)
    assert np.array_equal(answers.scores, logits.max(axis=1))


def test_a_trained_cascade_answers_as_one_sample_at_a_time():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double().eval() for _ in range(3)]
    x = torch.randn(101, 6, dtype=torch.float64)
    confidence = lambda logits: max_proba(logits, torch)  # noqa: E731
    with torch.no_grad():
        cutoffs = [float(confidence(model(x)).median()) + 1e-9 for model in models[:-1]] + [-np.inf]
    answers = run(FunctionNetwork([None] * 3, models, confidence), batched(x, [16]), cutoffs, batch_size=16)
    predictions, exits = naive_cascade(models, x, cutoffs, confidence)
    assert set(exits) == {0, 1, 2}
    assert answers.predictions.tolist() == predictions
    assert answers.exits.tolist() == exits


def test_per_class_cutoffs_are_asked_for_each_class():
    x = samples(30, 2)
    cutoffs = [np.array([np.inf, 0.5, -np.inf]), np.full(3, -np.inf)]
    answers = run(column_model(2), [x], cutoffs)
    first = x[:, :3].argmax(dim=1).numpy()
    leaves = (first == 2) | ((first == 1) & (x[:, :3].amax(dim=1).numpy() > 0.5))
    assert answers.exits.tolist() == np.where(leaves, 0, 1).tolist()


# -- batches of several shapes -----------------------------------------------------------------------------------------


def of_two_widths(n_exits, sizes):
    """Batches of samples, every other one wider by two numbers that no exit reads."""
    wide = torch.zeros(500, 2, dtype=torch.float64)
    parts = batched(samples(203, n_exits), sizes)
    return [torch.cat([x, wide[: len(x)]], dim=1) if i % 2 else x for i, x in enumerate(parts)]


@pytest.mark.parametrize("sizes", [[1], [8], [5, 1, 7], [20]])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("memory_limit", [0, 2000, 1 << 30])
def test_samples_of_another_shape_are_answered_as_one_at_a_time(sizes, merge, memory_limit):
    batches, model, cutoffs = of_two_widths(3, sizes), column_model(3), [0.9, 1.0, -np.inf]
    answers = run(model, batches, cutoffs, merge=merge, memory_limit=memory_limit, keep_logits=True)
    singles = [run(column_model(3), [x[i : i + 1]], cutoffs, keep_logits=True) for x in batches for i in range(len(x))]
    assert answers.predictions.tolist() == [int(single.predictions[0]) for single in singles]
    assert answers.exits.tolist() == [int(single.exits[0]) for single in singles]
    assert len(set(answers.exits.tolist())) == 3
    assert np.array_equal(answers.logits, np.concatenate([single.logits for single in singles]))


def test_survivors_of_one_shape_are_merged_into_full_batches():
    model, batches = column_model(2), of_two_widths(2, [8])
    answers = run(model, batches, [0.9, -np.inf])
    shape = np.repeat(np.arange(len(batches)) % 2, [len(x) for x in batches])
    reached = [int(np.sum((answers.exits == 1) & (shape == i))) for i in range(2)]
    assert min(reached) > 8
    assert all(n % 8 for n in reached)
    full = sum(n // 8 for n in reached)
    assert sorted(model.heads[1].sizes, reverse=True) == [8] * full + sorted([n % 8 for n in reached], reverse=True)


def test_waiting_samples_of_all_shapes_count_as_memory():
    held = []
    model, batches = column_model(2), of_two_widths(2, [4])
    memory_limit = 10 * (2 * N_CLASSES + 2) * 8

    def source():
        for x in batches:
            held.append(sum(map(len, batches[: len(held)])) - sum(model.heads[1].sizes))
            yield x

    run(model, source(), [np.inf, -np.inf], batch_size=50, memory_limit=memory_limit)
    assert max(held) <= 10 + 2 * 4
    assert sum(model.heads[1].sizes) == 203


# -- how samples are batched ------------------------------------------------------------------------------------------


def test_survivors_are_merged_into_full_batches():
    x = samples(203, 3)
    model = column_model(3)
    answers = run(model, batched(x, [8]), [0.9, 1.0, -np.inf])
    for k in (1, 2):
        reached = int(np.sum(answers.exits >= k))
        assert reached % 8
        assert model.heads[k].sizes == [8] * (reached // 8) + [reached % 8]


def test_unmerged_survivors_go_on_batch_by_batch():
    x = samples(203, 3)
    model = column_model(3)
    answers = run(model, batched(x, [8]), [0.9, 1.0, -np.inf], merge=False)
    for k in (1, 2):
        by_batch = [int(np.sum(part >= k)) for part in np.split(answers.exits, range(8, 203, 8))]
        assert model.heads[k].sizes == [size for size in by_batch if size]


def test_larger_batches_than_full_ones_are_split():
    model = column_model(2)
    run(model, [samples(25, 2)], [np.finfo(float).max, -np.inf], batch_size=10)
    assert model.heads[1].sizes == [10, 10, 5]


@pytest.mark.parametrize("merge", [True, False])
def test_a_single_batch_goes_straight_through(merge):
    model = column_model(3)
    answers = run(model, [samples(8, 3)], [0.9, 1.0, -np.inf], merge=merge)
    reached = [int(np.sum(answers.exits >= k)) for k in range(3)]
    assert 8 > reached[1] > reached[2] > 0
    assert [exit_.sizes for exit_ in model.heads] == [[size] for size in reached]


class OneBatch(list):
    """A source that says beforehand that it holds a single batch."""

    n_batches = 1


@pytest.mark.parametrize("cutoffs", [[0.9, 1.0, -np.inf], [np.inf, 1.0, -np.inf], [-np.inf] * 3, [9.0, 9.0, -np.inf]])
@pytest.mark.parametrize("keep_logits", [True, False])
def test_a_source_of_one_batch_is_answered_as_any_other(cutoffs, keep_logits):
    x = samples(23, 3)
    model, other = column_model(3), column_model(3)
    one = run(model, OneBatch([x]), cutoffs, keep_logits=keep_logits)
    many = run(other, batched(x, [5]), cutoffs, keep_logits=keep_logits)
    for name in ("predictions", "scores", "exits", "logits"):
        assert np.array_equal(getattr(one, name), getattr(many, name))
    reached = [int(np.sum(one.exits >= k)) * (cutoffs[k] < np.inf) for k in range(3)]
    assert [head.sizes for head in model.heads] == [[size] * (size > 0) for size in reached]


def test_a_source_of_one_batch_that_holds_none():
    with pytest.raises(ValueError, match="X holds no samples"):
        run(column_model(2), OneBatch(), [0.5, -np.inf])


def waiting_over_time(x, cutoffs, **options):
    """(exit called, samples waiting for each exit just before) of every call, from what each exit was asked."""
    model = column_model(len(cutoffs))
    events, waiting = [], [0] * (len(cutoffs) + 1)
    above = leaving_above(cutoffs)

    def watched(k, batch, memory):
        leave = above.decide(k, batch).leave
        waiting[k + 1] += int(np.sum(~leave))
        return leave

    def called(k):
        def before(module, inputs):
            events.append((k, list(waiting[1:-1])))
            if k:
                waiting[k] -= len(inputs[0])

        return before

    for k, exit_ in enumerate(model.heads):
        exit_.register_forward_pre_hook(called(k))
    execute(model, x, RulePolicy(watched, above.runs), **options)
    return events


@pytest.mark.parametrize("memory_limit", [0, 10, 17, 40, 10_000])
def test_waiting_samples_stay_within_the_memory_limit(memory_limit):
    x = samples(203, 3)
    row = x.element_size() * x.shape[1]
    limits = {"batch_size": 8, "memory_limit": memory_limit * row}
    events = waiting_over_time(batched(x, [8]), [0.9, 1.0, -np.inf], **limits)
    totals = [sum(waiting) for _, waiting in events]
    before_new_batches = [total for (k, _), total in zip(events, totals, strict=True) if k == 0]
    assert max(before_new_batches) <= memory_limit
    assert max(totals) <= memory_limit + 8
    assert memory_limit == 0 or max(before_new_batches) > 0


def test_a_tight_memory_limit_makes_partial_batches():
    x = samples(203, 2)
    sizes = {}
    for limit in (0, 1 << 30):
        model = column_model(2)
        run(model, batched(x, [8]), [0.9, -np.inf], memory_limit=limit)
        sizes[limit] = model.heads[1].sizes
    assert sum(sizes[0]) == sum(sizes[1 << 30])
    assert len(sizes[0]) > len(sizes[1 << 30])


@pytest.mark.parametrize("size", [8, 60])
def test_deep_exits_go_first(size):
    events = waiting_over_time(batched(samples(203, 3), [size]), [0.9, 1.0, -np.inf], batch_size=8)
    last_new = max(i for i, (k, _) in enumerate(events) if k == 0)
    streaming = events[:last_new]
    assert {k for k, _ in streaming} == {0, 1, 2}
    assert all(waiting[1] < 8 for k, waiting in streaming if k < 2)
    assert all(waiting[0] < 8 for k, waiting in streaming if k < 1)


def test_those_who_waited_longest_go_first():
    batches = []
    model = column_model(2)
    model.heads[1].register_forward_pre_hook(lambda module, inputs: batches.append(inputs[0]))
    x = samples(100, 2)
    answers = run(model, batched(x, [13]), [0.9, -np.inf], batch_size=8)
    assert torch.equal(torch.cat(batches), x[answers.exits == 1])


# -- who is run -------------------------------------------------------------------------------------------------------


def test_exits_that_are_off_are_never_called():
    model = column_model(4)
    answers = run(model, batched(samples(40, 4), [8]), [np.inf, 0.9, np.inf, -np.inf])
    assert model.heads[0].sizes == model.heads[2].sizes == []
    assert set(answers.exits.tolist()) == {1, 3}


def test_with_all_early_exits_off_the_full_model_answers():
    model = column_model(3)
    x = samples(20, 3)
    answers = run(model, batched(x, [8]), [np.inf, np.inf, -np.inf])
    assert model.heads[2].sizes == [8, 8, 4]
    assert answers.exits.tolist() == [2] * 20
    assert answers.predictions.tolist() == x[:, 6:].argmax(dim=1).tolist()


def test_when_everybody_leaves_nothing_deeper_is_called():
    model = column_model(3)
    answers = run(model, batched(samples(20, 3), [8]), [-np.inf, -np.inf, -np.inf])
    assert model.heads[0].sizes == [8, 8, 4]
    assert model.heads[1].sizes == model.heads[2].sizes == []
    assert answers.exits.tolist() == [0] * 20


def test_when_nobody_leaves_survivors_are_not_copied():
    pointers = []
    model = column_model(2)
    model.heads[1].register_forward_pre_hook(lambda module, inputs: pointers.append(inputs[0].data_ptr()))
    batches = batched(samples(16, 2), [8])
    answers = run(model, batches, [np.finfo(float).max, -np.inf])
    assert answers.exits.tolist() == [1] * 16
    assert pointers == [batch.data_ptr() for batch in batches]


# -- stages -----------------------------------------------------------------------------------------------------------


def doubled(carried):
    """Keeps a history beside the running value, in nested rows."""
    return {"now": carried["now"] * 2, "before": (*carried["before"], carried["now"])}


def staged_model(calls):
    """Stages that carry dicts and tuples, the second of which passes on what it gets; logits from the running value."""

    def start(x):
        calls.append(("start", len(x)))
        return {"now": x, "before": ()}

    def middle(carried):
        calls.append(("middle", len(carried["now"])))
        return doubled(carried)

    def end(carried):
        calls.append(("end", len(carried["now"])))
        return doubled(carried)

    def answer(carried):
        return carried["now"][:, :3] + sum((part[:, 3:] for part in carried["before"]), torch.zeros(1))

    return FunctionNetwork([start, None, middle, end], [answer] * 4, largest)


@pytest.mark.parametrize("cutoffs", [[3.0, 2.0, 5.0, -np.inf], [np.inf, 2.0, np.inf, -np.inf]])
@pytest.mark.parametrize("merge", [True, False])
def test_nested_rows_are_carried_between_stages(cutoffs, merge):
    calls = []
    model = staged_model(calls)
    x = torch.from_numpy(np.random.default_rng(1).integers(-4, 5, size=(60, 6)).astype(float))
    answers = run(model, batched(x, [7]), cutoffs, batch_size=7, merge=merge)
    for i in range(60):
        alone = run(staged_model([]), [x[i : i + 1]], cutoffs)
        row = x[i].numpy()
        now = row * np.array([1, 1, 2, 4])[alone.exits[0]]
        history = row[3:] * np.array([0, 0, 1, 3])[alone.exits[0]]
        assert answers.exits[i] == alone.exits[0]
        assert answers.predictions[i] == alone.predictions[0]
        assert answers.scores[i] == alone.scores[0] == (now[:3] + history).max()
    assert len(set(answers.exits.tolist())) == sum(np.isfinite(cutoffs)) + 1
    reached_end = int(np.sum(answers.exits == 3))
    assert sum(n for name, n in calls if name == "end") == reached_end


def test_stages_of_exits_that_are_off_are_run_for_those_who_go_on():
    calls = []
    run(staged_model(calls), [torch.ones(4, 6)], [np.inf, np.inf, np.inf, -np.inf])
    assert calls == [("start", 4), ("middle", 4), ("end", 4)]


def test_numpy_rows():
    x = samples(30, 2).numpy()
    model = FunctionNetwork(
        [lambda rows: rows + 1.0, lambda rows: rows * 2.0],
        [lambda rows: torch.from_numpy(rows[:, :3]), lambda rows: torch.from_numpy(rows[:, 3:])],
        largest,
    )
    answers = run(model, batched(x, [4]), [2.0, -np.inf])
    leaves = x[:, :3].max(axis=1) + 1 > 2.0
    assert 0 < leaves.sum() < 30
    assert answers.exits.tolist() == np.where(leaves, 0, 1).tolist()
    assert answers.predictions.tolist() == np.where(leaves, x[:, :3].argmax(1), x[:, 3:].argmax(1)).tolist()


def test_survivors_keep_channels_last():
    formats = []

    def deep(x):
        formats.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
        return x.mean(dim=(2, 3))

    images = torch.rand(20, 3, 4, 4).to(memory_format=torch.channels_last)
    model = FunctionNetwork([None, None], [lambda x: x.mean(dim=(2, 3)), deep], largest)
    answers = run(model, batched(images, [5]), [0.6, -np.inf], batch_size=3)
    assert 0 < np.sum(answers.exits == 0) < 20
    assert len(formats) > 1
    assert all(formats)


def test_nothing_is_recorded_for_gradients():
    grad = []

    def exit_(x):
        grad.append(torch.is_inference_mode_enabled())
        return layer(x)

    layer = nn.Linear(6, 3)
    model = FunctionNetwork([None, None], [exit_, exit_], largest)
    run(model, [torch.ones(4, 6)], [np.finfo(float).max, -np.inf])
    record(model, [torch.ones(4, 6)])
    assert grad == [True] * 4


# -- recording --------------------------------------------------------------------------------------------------------


def test_record_keeps_every_exits_answers():
    x = samples(30, 3)
    answers = record(column_model(3), batched(x, [7]), logits=True)
    expected = x.numpy().reshape(30, 3, N_CLASSES).transpose(1, 0, 2)
    assert np.array_equal(columns_of(answers, "logits"), expected)
    assert np.array_equal(columns_of(answers, "predictions"), expected.argmax(axis=2))
    assert np.array_equal(columns_of(answers, "scores"), expected.max(axis=2))
    assert {answer.logits for answer in record(column_model(3), batched(x, [7]))} == {None}


def test_record_runs_stages_once_in_order():
    calls = []
    x = torch.arange(12.0).reshape(2, 6)
    answers = record(staged_model(calls), [x])
    assert calls == [("start", 2), ("middle", 2), ("end", 2)]
    assert columns_of(answers, "scores").tolist() == [[2.0, 8.0], [2.0, 8.0], [9.0, 27.0], [23.0, 65.0]]


def test_record_keeps_the_features_of_exits_that_have_some():
    x = samples(20, 2)

    class Showing(FunctionNetwork):
        def exit(self, k, carried, features=False):
            vector = carried[:, :2].half() if features and k == 0 else None
            return Answer(self.heads[k](carried), features=vector), carried

    network = Showing([None, None], [Columns(0), Columns(1)], largest)
    first, last = record(network, batched(x, [7]), features=True)
    assert first.features.dtype == np.float32
    assert np.array_equal(first.features, x[:, :2].half().float().numpy())
    assert last.features is None
    assert record(network, [x])[0].features is None


# -- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_widened(dtype):
    x = samples(10, 2).to(dtype)
    answers = run(column_model(2), [x], [0.5, -np.inf], keep_logits=True)
    assert answers.logits.dtype == answers.scores.dtype == np.float32
    assert np.array_equal(answers.logits, x.float().numpy().reshape(10, 2, 3)[np.arange(10), answers.exits])


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [lambda model: run(model, [], [0.5, -np.inf]), lambda model: record(model, [])])
def test_no_samples(call):
    with pytest.raises(ValueError, match="X holds no samples"):
        call(column_model(2))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_not_finite_names_the_exit(bad):
    x = samples(10, 2)
    x[3, 3:] = bad
    with pytest.raises(ValueError, match="exit 1 gave a score that is NaN or infinite"):
        run(column_model(2), [x], [np.finfo(float).max, -np.inf])
    with pytest.raises(ValueError, match="exit 1 gave a score that is NaN or infinite"):
        record(column_model(2), [x])


@pytest.mark.parametrize("confidence", [lambda logits: logits, lambda logits: logits.amax()])
def test_confidence_of_the_wrong_shape(confidence):
    with pytest.raises(ValueError, match=r"confidence must turn an output of B samples.*expected shape \(10,\)"):
        run(column_model(2, confidence), [samples(10, 2)], [0.5, -np.inf])


def test_logits_of_the_wrong_shape():
    model = FunctionNetwork([None, None], [lambda x: x.reshape(-1, 3, 2), Columns(0)], largest)
    with pytest.raises(ValueError, match=r"exit 0 must answer with logits of shape \(B, C\); got shape \(10, 3, 2\)"):
        run(model, [samples(10, 2)], [0.5, -np.inf])


@pytest.mark.parametrize("limit", [-1, 0.5, "1 GB", None])
def test_memory_limits_that_are_none(limit):
    with pytest.raises(ValueError, match="memory_limit must be a whole number, at least 0"):
        run(column_model(2), [samples(10, 2)], [0.5, -np.inf], memory_limit=limit)


# -- the law ----------------------------------------------------------------------------------------------------------


@st.composite
def cascades(draw):
    """Logits on a grid, cutoffs that may equal them, and any batching."""
    n_exits, n = draw(st.integers(1, 4)), draw(st.integers(1, 25))
    grid = st.integers(-3, 3)
    x = draw(arrays(np.int64, (n, n_exits * N_CLASSES), elements=grid)) / 2
    levels = st.sampled_from([-np.inf, np.inf, *(np.arange(-3, 4) / 2)])
    per_class = draw(st.booleans())
    shape = (n_exits, N_CLASSES) if per_class else (n_exits,)
    cutoffs = draw(arrays(np.float64, shape, elements=levels))
    cutoffs[-1] = -np.inf
    return x, cutoffs, draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))


@given(
    sample=cascades(),
    batch_size=st.integers(1, 9),
    memory_limit=st.sampled_from([0, 50, 300, 1 << 30]),
    merge=st.booleans(),
    only_needed=st.booleans(),
)
def test_online_exits_equal_offline_exits(sample, batch_size, memory_limit, merge, only_needed):
    x, cutoffs, sizes = sample
    n_exits = len(cutoffs)
    model = column_model(n_exits)
    everything = record(model, batched(torch.from_numpy(x), sizes))
    costs = Costs(np.ones(n_exits), np.zeros(n_exits))
    outputs = ExitOutputs.from_answers(everything, np.zeros(len(x), dtype=int), N_CLASSES, costs)
    offline = exit_index(outputs, cutoffs)
    policy = ThresholdPolicy.of(evaluate(outputs, cutoffs, cutoffs), costs)
    if not only_needed:
        policy = dataclasses.replace(policy, runs=np.ones(n_exits, dtype=bool))
    answers = execute(
        model, batched(torch.from_numpy(x), sizes[::-1]), policy,
        batch_size=batch_size, memory_limit=memory_limit, merge=merge,
    )  # fmt: skip
    assert answers.exits.tolist() == offline.tolist()
    assert answers.predictions.tolist() == outputs.predictions[offline, np.arange(len(x))].tolist()
    assert answers.scores.tolist() == outputs.scores[offline, np.arange(len(x))].tolist()


def test_answers_come_in_the_order_of_the_samples():
    x = torch.arange(50.0).repeat_interleave(6).reshape(50, 6)
    answers = run(column_model(2), batched(x, [7]), [20.5, -np.inf], batch_size=4)
    assert all(a < b for a, b in pairwise(answers.scores.tolist()))


# -- what exits and policies say beside logits -------------------------------------------------------------------------


class ScoreReader:
    """Reads outputs that are a pair of tensors, answers and scores, and knows of no classes."""

    def __call__(self, k, output, *, logits):
        answers, scores = output["answers"], output["scores"]
        return Answer(predictions=answers.numpy(), scores=scores.numpy())


def test_answers_are_what_the_reader_makes_of_an_exits_output():
    x = samples(40, 2).reshape(40, 2, 3)
    exits = [lambda x, k=k: {"answers": x[:, k, :2], "scores": x[:, k, 2]} for k in range(2)]
    network = FunctionNetwork([None, None], exits, reader=ScoreReader())
    policy = RulePolicy(lambda k, batch, memory: batch.scores > 0.2, [True, True])
    answers = execute(network, batched(x, [7]), policy, batch_size=5)
    assert set(answers.exits.tolist()) == {0, 1}
    assert answers.exits.tolist() == (x[:, 0, 2] <= 0.2).long().tolist()
    expected = x[torch.arange(40), answers.exits]
    assert answers.predictions.tolist() == expected[:, :2].tolist()
    assert answers.scores.tolist() == expected[:, 2].tolist()
    assert answers.logits is None
    for k, answer in enumerate(record(network, batched(x, [9]))):
        assert answer.predictions.tolist() == x[:, k, :2].tolist()


def test_what_an_exit_leaves_goes_on_in_place_of_what_it_was_given():
    batches = []
    x = samples(40, 2)
    exits = [lambda rows: (rows[:, :3], rows * 2), lambda rows: batches.append(rows) or rows[:, 3:]]
    model = FunctionNetwork([None, None], exits, largest)
    answers = run(model, batched(x, [7]), [0.9, -np.inf])
    stayed = answers.exits == 1
    assert 0 < stayed.sum() < 40
    assert torch.equal(torch.cat(batches), x[stayed] * 2)
    assert answers.scores[stayed].tolist() == (x[stayed, 3:] * 2).amax(1).tolist()


@pytest.mark.parametrize("merge", [True, False])
def test_the_scores_that_a_policy_compared_are_those_of_the_answers(merge):
    x = samples(40, 2)

    def negated(k, batch, memory):
        return Decision(-batch.scores > -0.9, -batch.scores)

    answers = execute(column_model(2), batched(x, [7]), RulePolicy(negated, [True, True]), batch_size=8, merge=merge)
    assert set(answers.exits.tolist()) == {0, 1}
    assert answers.scores.tolist() == (-x.reshape(40, 2, 3).amax(2)[torch.arange(40), answers.exits]).tolist()
    assert (answers.scores[answers.exits == 0] > -0.9).all()


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("needs_logits", [True, False])
@pytest.mark.parametrize("needs_features", [True, False])
@pytest.mark.parametrize("keep_logits", [True, False])
def test_a_policy_is_given_what_it_needs(merge, needs_logits, needs_features, keep_logits):
    class Showing(FunctionNetwork):
        def exit(self, k, carried, features=False):
            vector = carried.flip(1)[:, :4] if features else None
            return Answer(self.heads[k](carried), features=vector), carried

    x = samples(40, 2)

    def rule(k, batch, memory):
        assert (batch.logits is not None) == (needs_logits or keep_logits)
        assert batch.logits is None or batch.logits.max(axis=1).tolist() == batch.scores.tolist()
        assert batch.features is None if not needs_features else batch.features.shape == (len(batch.scores), 4)
        return batch.scores > 0.9

    policy = RulePolicy(rule, [True, True], needs_logits=needs_logits, needs_features=needs_features)
    network = Showing([None, None], [Columns(0), Columns(1)], largest)
    for batches in (batched(x, [7]), OneBatch([x])):
        answers = execute(network, batches, policy, batch_size=8, merge=merge, keep_logits=keep_logits)
        assert set(answers.exits.tolist()) == {0, 1}
        assert answers.features is None
        assert (answers.logits is not None) == keep_logits
        if keep_logits:
            assert answers.logits.tolist() == x.reshape(40, 2, 3)[torch.arange(40), answers.exits].tolist()


# -- exits that read what earlier exits left ---------------------------------------------------------------------------


def chain(n_exits, calls, chained=True):
    """Exits that note on every sample that they were run and answer with the sum of a column and of those notes.

    ``calls`` collects who is run: ``("stage" or "exit", k, samples)``.
    """

    def stage(k):
        def run_stage(rows):
            x, notes = (rows, torch.zeros(len(rows), dtype=torch.float64)) if k == 0 else rows
            calls.append(("stage", k, len(x)))
            return x, notes

        return run_stage

    def exit_(k):
        def run_exit(rows):
            x, notes = rows
            calls.append(("exit", k, len(x)))
            return (x[:, k] + notes)[:, None], (x, notes + 10.0**k)

        return run_exit

    stages, exits = ([make(k) for k in range(n_exits)] for make in (stage, exit_))
    return FunctionNetwork(stages, exits, largest, chained=chained)


def nobody(k, batch, memory):
    return np.zeros(len(batch.scores), dtype=bool)


def decided_by(model, x, on, leave=nobody, **options):
    """The answers with some exits switched on, and the early exits at which the policy was asked who leaves."""
    exits_asked, on = [], np.array(on, dtype=bool)

    def rule(k, batch, memory):
        exits_asked.extend([k] * (k < len(on) - 1))
        return leave(k, batch, memory) & on[k]

    runs = Costs(np.ones(len(on)), np.ones(len(on)), model.chained).runs(on)
    return execute(model, x, RulePolicy(rule, runs), **({"batch_size": 8} | options)), exits_asked


@pytest.mark.parametrize(
    ("on", "run_exits", "notes"),
    [
        ([0, 0, 1, 0, 1], [0, 1, 2, 4], 111),
        ([1, 0, 0, 1, 1], [0, 1, 2, 3, 4], 1111),
        ([0, 1, 0, 0, 1], [0, 1, 4], 11),
        ([1, 0, 0, 0, 1], [0, 4], 1),
        ([0, 0, 0, 0, 1], [4], 0),
        ([1, 1, 1, 1, 0], [0, 1, 2, 3, 4], 1111),
    ],
)
def test_chained_exits_are_run_up_to_the_deepest_that_is_on(on, run_exits, notes):
    calls = []
    answers, exits_asked = decided_by(chain(5, calls), [torch.zeros(4, 5, dtype=torch.float64)], on)
    assert [k for what, k, _ in calls if what == "exit"] == run_exits
    assert [k for what, k, _ in calls if what == "stage"] == [0, 1, 2, 3, 4]
    assert exits_asked == run_exits[:-1]
    assert answers.exits.tolist() == [4] * 4
    assert answers.scores.tolist() == [notes] * 4


def test_chained_exits_on_the_way_are_run_for_those_who_are_left():
    calls = []
    x = torch.arange(20.0, dtype=torch.float64).repeat_interleave(5).reshape(20, 5)
    leave = lambda k, batch, memory: batch.scores < (5, np.inf, 10 + 11, 0, 0)[k]  # noqa: E731
    answers, _ = decided_by(chain(5, calls), [x], [1, 0, 1, 0, 1], leave, batch_size=50)
    assert calls == [
        ("stage", 0, 20), ("exit", 0, 20), ("stage", 1, 15), ("exit", 1, 15), ("stage", 2, 15), ("exit", 2, 15),
        ("stage", 3, 10), ("stage", 4, 10), ("exit", 4, 10),
    ]  # fmt: skip
    assert answers.exits.tolist() == [0] * 5 + [2] * 5 + [4] * 10
    assert answers.scores.tolist() == [*range(5), *range(16, 21), *range(121, 131)]


@pytest.mark.parametrize("on", [[0, 0, 1, 0, 1], [1, 0, 0, 0, 1], [0, 0, 0, 0, 1]])
def test_exits_that_are_off_are_not_run_where_none_reads_another(on):
    calls = []
    answers, exits_asked = decided_by(chain(5, calls, chained=False), [torch.zeros(4, 5, dtype=torch.float64)], on)
    assert [k for what, k, _ in calls if what == "exit"] == [k for k in range(5) if on[k]]
    assert exits_asked == [k for k in range(4) if on[k]]
    assert answers.scores.tolist() == [sum(10**k for k in range(4) if on[k])] * 4


@pytest.mark.parametrize("chained", [True, False])
def test_record_hands_on_what_exits_left(chained):
    calls = []
    x = torch.arange(6.0, dtype=torch.float64).repeat_interleave(4).reshape(6, 4)
    answers = record(chain(4, calls, chained), batched(x, [4]))
    assert columns_of(answers, "scores").tolist() == [[i + notes for i in range(6)] for notes in (0, 1, 11, 111)]
    order = [(what, k) for k in range(4) for what in ("stage", "exit")]
    assert [(what, k) for what, k, _ in calls] == order * 2
    assert [n for _, _, n in calls] == [4] * 8 + [2] * 8


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("memory_limit", [0, 1 << 30])
def test_what_was_left_stays_with_its_sample(merge, memory_limit):
    firsts = []

    def remember(rows):
        return rows[:, :3], {"x": rows, "first": rows[:, 0].clone()}

    def compare(carried):
        firsts.append(carried["first"])
        assert torch.equal(carried["first"], carried["x"][:, 0])
        return carried["x"][:, 3:6], carried | {"second": carried["x"][:, 1]}

    def last(carried):
        assert torch.equal(carried["first"], carried["x"][:, 0])
        assert torch.equal(carried["second"], carried["x"][:, 1])
        return carried["x"][:, 6:]

    x = samples(60, 3)
    model = FunctionNetwork([None] * 3, [remember, compare, last], largest, chained=True)
    answers = run(model, batched(x, [7]), [0.9, 1.0, -np.inf], merge=merge, memory_limit=memory_limit)
    assert set(answers.exits.tolist()) == {0, 1, 2}
    if merge and memory_limit:  # in the order of the samples
        assert torch.equal(torch.cat(firsts), x[answers.exits > 0, 0])
    assert sum(map(len, firsts)) == np.sum(answers.exits > 0)


# -- features are not kept ---------------------------------------------------------------------------------------------

FEATURE_BYTES, LIVE_BYTES, STATE_BYTES = 1000 * 8, 6 * 8, 8


def with_features(features, answered):
    """Two exits that read features; ``features`` collects weak references to those of the first stage.

    ``answered(logits, carried)`` is the first exit's answer.
    """

    def start(x):
        feature = x.repeat(1, 1000)[:, :1000]
        features.append(weakref.ref(feature))
        return Carried(Live((x,), (Along(0, 1),), len(x)), feature)

    def early(carried):
        return answered(carried.feature[:, :3], carried)

    def deep(carried):
        return Carried(carried.live, carried.live.values[0] * 2, carried.state)

    return FunctionNetwork([start, deep], [early, lambda carried: carried.feature[:, 3:6]], largest)


def left_with_state(logits, carried):
    return logits, Carried(carried.live, None, carried.live.values[0][:, 0])


def as_given(logits, carried):
    return logits, carried.without_feature()


def watched(model, features, alive):
    """The same model; each of its stages notes how many of the features are still there when it is run."""

    def noting(stage):
        def run_stage(carried):
            alive.append(sum(feature() is not None for feature in features))
            return stage(carried)

        return run_stage

    return FunctionNetwork([noting(stage) for stage in model.stages], model.heads, largest)


@pytest.mark.parametrize("batch_size", [5, 15])
@pytest.mark.parametrize(
    ("answered", "cutoff"),
    [
        (left_with_state, 0.9),
        (left_with_state, np.finfo(float).max),
        (as_given, 0.9),
        (as_given, np.finfo(float).max),
    ],
    ids=["some leave", "nobody leaves", "some leave, logits alone", "nobody leaves, logits alone"],
)
def test_features_are_gone_once_their_exit_has_answered(answered, cutoff, batch_size):
    features, alive = [], []
    model = watched(with_features(features, answered), features, alive)
    answers = run(model, batched(samples(60, 2), [5]), [cutoff, -np.inf], batch_size=batch_size)
    deep = -(-int(np.sum(answers.exits == 1)) // batch_size)
    assert len(features) == 12
    assert len(alive) == 12 + deep
    assert alive == [0] * len(alive)
    assert (set(answers.exits.tolist()) == {0, 1}) == (cutoff == 0.9)


def test_features_do_not_count_as_memory_of_those_who_wait():
    x = samples(40, 2)
    sizes = {}
    for spare in (0, -1):
        counts = []
        first, deep = with_features([], left_with_state).stages
        counting = lambda carried, deep=deep, counts=counts: counts.append(carried.n_rows) or deep(carried)  # noqa: E731
        model = FunctionNetwork([first, counting], with_features([], left_with_state).heads, largest)
        limit = 15 * (LIVE_BYTES + STATE_BYTES) + spare
        run(model, batched(x, [5]), [np.finfo(float).max, -np.inf], batch_size=20, memory_limit=limit)
        sizes[spare] = counts
    assert sizes == {0: [20, 20], -1: [15, 15, 10]}
    assert 5 * FEATURE_BYTES > 15 * (LIVE_BYTES + STATE_BYTES)


# -- what policies remember --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("memory_limit", [0, 1 << 20])
def test_what_a_policy_remembers_goes_on_with_its_samples(merge, memory_limit):
    """A policy under which samples leave once all scores so far sum to 6; samples are told apart by their scores."""
    n_exits = 4
    scores = np.random.default_rng(0).integers(0, 5, (60, n_exits)).astype(np.float64)
    exits = [lambda x, k=k: x[:, k : k + 1] for k in range(n_exits)]
    model = FunctionNetwork([None] * n_exits, exits, largest)

    def rule(k, batch, memory):
        assert (memory is None) == (k == 0)
        totals = batch.scores[:, None] if memory is None else memory + batch.scores[:, None]
        return Decision(totals[:, 0] >= 6, batch.scores, totals)

    reached = np.cumsum(scores, axis=1)[:, :-1] >= 6
    expected = np.where(reached.any(axis=1), reached.argmax(axis=1), n_exits - 1)
    assert len(set(expected.tolist())) > 2
    policy = RulePolicy(rule, np.ones(n_exits))
    parts = [torch.from_numpy(part) for part in np.split(scores, [7, 20, 21, 50])]
    for batches in (parts, OneBatch([torch.from_numpy(scores)])):
        answers = execute(model, batches, policy, batch_size=8, merge=merge, memory_limit=memory_limit)
        assert answers.exits.tolist() == expected.tolist()
        assert answers.scores.tolist() == scores[np.arange(60), expected].tolist()
