from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.routing import accepts, exit_index
from adaptexit.core.scores import max_proba
from adaptexit.staging.executor import StagedModel, execute, record
from tests.nets import N_CLASSES, Columns, Recording, naive_cascade


def largest(logits):
    return logits.amax(dim=1)


def column_model(n_exits, confidence=largest):
    exits = [Recording(Columns(k)) for k in range(n_exits)]
    return StagedModel([None] * n_exits, exits, confidence)


def above(cutoffs):
    return lambda k, batch: accepts(batch, cutoffs[k])


def switched(cutoffs):
    on = np.asarray(cutoffs) < np.inf
    on[-1] = True
    return on


def run(model, batches, cutoffs, **options):
    return execute(model, batches, above(cutoffs), switched(cutoffs), **({"batch_size": 8} | options))


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
    predictions, exits = naive_cascade(model.exits, x, cutoffs, largest)
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
    answers = run(StagedModel([None] * 3, models, confidence), batched(x, [16]), cutoffs, batch_size=16)
    predictions, exits = naive_cascade(models, x, cutoffs, confidence)
    assert set(exits) == {0, 1, 2}
    assert answers.predictions.tolist() == predictions
    assert answers.exits.tolist() == exits


def test_per_class_cutoffs_are_asked_for_each_class():
    x = samples(30, 2)
    cutoffs = [np.array([np.inf, 0.5, -np.inf]), np.full(3, -np.inf)]
    answers = execute(column_model(2), [x], above(cutoffs), np.array([True, True]), batch_size=8)
    first = x[:, :3].argmax(dim=1).numpy()
    leaves = (first == 2) | ((first == 1) & (x[:, :3].amax(dim=1).numpy() > 0.5))
    assert answers.exits.tolist() == np.where(leaves, 0, 1).tolist()


# -- how samples are batched ------------------------------------------------------------------------------------------


def test_survivors_are_merged_into_full_batches():
    x = samples(203, 3)
    model = column_model(3)
    answers = run(model, batched(x, [8]), [0.9, 1.0, -np.inf])
    for k in (1, 2):
        reached = int(np.sum(answers.exits >= k))
        assert reached % 8
        assert model.exits[k].sizes == [8] * (reached // 8) + [reached % 8]


def test_unmerged_survivors_go_on_batch_by_batch():
    x = samples(203, 3)
    model = column_model(3)
    answers = run(model, batched(x, [8]), [0.9, 1.0, -np.inf], merge=False)
    for k in (1, 2):
        by_batch = [int(np.sum(part >= k)) for part in np.split(answers.exits, range(8, 203, 8))]
        assert model.exits[k].sizes == [size for size in by_batch if size]


def test_larger_batches_than_full_ones_are_split():
    model = column_model(2)
    run(model, [samples(25, 2)], [np.finfo(float).max, -np.inf], batch_size=10)
    assert model.exits[1].sizes == [10, 10, 5]


@pytest.mark.parametrize("merge", [True, False])
def test_a_single_batch_goes_straight_through(merge):
    model = column_model(3)
    answers = run(model, [samples(8, 3)], [0.9, 1.0, -np.inf], merge=merge)
    reached = [int(np.sum(answers.exits >= k)) for k in range(3)]
    assert 8 > reached[1] > reached[2] > 0
    assert [exit_.sizes for exit_ in model.exits] == [[size] for size in reached]


def waiting_over_time(x, cutoffs, **options):
    """(exit called, samples waiting for each exit just before) of every call, from what each exit was asked."""
    model = column_model(len(cutoffs))
    events, waiting = [], [0] * (len(cutoffs) + 1)
    accept = above(cutoffs)

    def watched(k, batch):
        leave = accept(k, batch)
        waiting[k + 1] += int(np.sum(~leave))
        return leave

    def called(k):
        def before(module, inputs):
            events.append((k, list(waiting[1:-1])))
            if k:
                waiting[k] -= len(inputs[0])

        return before

    for k, exit_ in enumerate(model.exits):
        exit_.register_forward_pre_hook(called(k))
    execute(model, x, watched, switched(cutoffs), **options)
    return events


@pytest.mark.parametrize("memory_limit", [0, 10, 17, 40, 10_000])
def test_waiting_samples_stay_within_the_memory_limit(memory_limit):
    x = samples(203, 3)
    row = x.element_size() * x.shape[1]
    limits = {"batch_size": 8, "memory_limit": memory_limit * row}
    events = waiting_over_time(batched(x, [8]), [0.9, 1.0, -np.inf], **limits)
    held = [sum(waiting) for _, waiting in events]
    before_new_batches = [total for (k, _), total in zip(events, held, strict=True) if k == 0]
    assert max(before_new_batches) <= memory_limit
    assert max(held) <= memory_limit + 8
    assert memory_limit == 0 or max(before_new_batches) > 0


def test_a_tight_memory_limit_makes_partial_batches():
    x = samples(203, 2)
    sizes = {}
    for limit in (0, 1 << 30):
        model = column_model(2)
        run(model, batched(x, [8]), [0.9, -np.inf], memory_limit=limit)
        sizes[limit] = model.exits[1].sizes
    assert sum(sizes[0]) == sum(sizes[1 << 30])
    assert len(sizes[0]) > len(sizes[1 << 30])


@pytest.mark.parametrize("given", [8, 60])
def test_deep_exits_go_first(given):
    events = waiting_over_time(batched(samples(203, 3), [given]), [0.9, 1.0, -np.inf], batch_size=8)
    last_new = max(i for i, (k, _) in enumerate(events) if k == 0)
    streaming = events[:last_new]
    assert {k for k, _ in streaming} == {0, 1, 2}
    assert all(waiting[1] < 8 for k, waiting in streaming if k < 2)
    assert all(waiting[0] < 8 for k, waiting in streaming if k < 1)


def test_those_who_waited_longest_go_first():
    seen = []
    model = column_model(2)
    model.exits[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = samples(100, 2)
    answers = run(model, batched(x, [13]), [0.9, -np.inf], batch_size=8)
    assert torch.equal(torch.cat(seen), x[answers.exits == 1])


# -- who is run -------------------------------------------------------------------------------------------------------


def test_exits_that_are_off_are_never_called():
    model = column_model(4)
    answers = run(model, batched(samples(40, 4), [8]), [np.inf, 0.9, np.inf, -np.inf])
    assert model.exits[0].sizes == model.exits[2].sizes == []
    assert set(answers.exits.tolist()) == {1, 3}


def test_with_all_early_exits_off_the_full_model_answers():
    model = column_model(3)
    x = samples(20, 3)
    answers = run(model, batched(x, [8]), [np.inf, np.inf, -np.inf])
    assert model.exits[2].sizes == [8, 8, 4]
    assert answers.exits.tolist() == [2] * 20
    assert answers.predictions.tolist() == x[:, 6:].argmax(dim=1).tolist()


def test_when_everybody_leaves_nothing_deeper_is_called():
    model = column_model(3)
    answers = run(model, batched(samples(20, 3), [8]), [-np.inf, -np.inf, -np.inf])
    assert model.exits[0].sizes == [8, 8, 4]
    assert model.exits[1].sizes == model.exits[2].sizes == []
    assert answers.exits.tolist() == [0] * 20


def test_when_nobody_leaves_survivors_are_not_copied():
    seen = []
    model = column_model(2)
    model.exits[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].data_ptr()))
    batches = batched(samples(16, 2), [8])
    answers = run(model, batches, [np.finfo(float).max, -np.inf])
    assert answers.exits.tolist() == [1] * 16
    assert seen == [batch.data_ptr() for batch in batches]


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

    return StagedModel([start, None, middle, end], [answer] * 4, largest)


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
    model = StagedModel(
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
    model = StagedModel([None, None], [lambda x: x.mean(dim=(2, 3)), deep], largest)
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
    model = StagedModel([None, None], [exit_, exit_], largest)
    run(model, [torch.ones(4, 6)], [np.finfo(float).max, -np.inf])
    record(model, [torch.ones(4, 6)])
    assert grad == [True] * 4


# -- recording --------------------------------------------------------------------------------------------------------


def test_record_keeps_every_exits_answers():
    x = samples(30, 3)
    predictions, scores, logits = record(column_model(3), batched(x, [7]), keep_logits=True)
    expected = x.numpy().reshape(30, 3, N_CLASSES).transpose(1, 0, 2)
    assert np.array_equal(logits, expected)
    assert np.array_equal(predictions, expected.argmax(axis=2))
    assert np.array_equal(scores, expected.max(axis=2))
    assert record(column_model(3), batched(x, [7]))[2] is None


def test_record_runs_stages_once_in_order():
    calls = []
    x = torch.arange(12.0).reshape(2, 6)
    _, scores, _ = record(staged_model(calls), [x])
    assert calls == [("start", 2), ("middle", 2), ("end", 2)]
    assert scores.tolist() == [[2.0, 8.0], [2.0, 8.0], [9.0, 27.0], [23.0, 65.0]]


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
    model = StagedModel([None, None], [lambda x: x.reshape(-1, 3, 2), Columns(0)], largest)
    with pytest.raises(ValueError, match=r"exit 0 must answer with logits of shape \(B, C\); got shape \(10, 3, 2\)"):
        run(model, [samples(10, 2)], [0.5, -np.inf])


def test_exits_of_different_widths_are_not_recorded():
    model = StagedModel([None, None], [lambda x: x[:, :2], lambda x: x[:, :3]], largest)
    with pytest.raises(ValueError, match=r"same number of classes; got \[2, 3\]"):
        record(model, [samples(10, 2)], keep_logits=True)


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
    drawn=cascades(),
    batch_size=st.integers(1, 9),
    memory_limit=st.sampled_from([0, 50, 300, 1 << 30]),
    merge=st.booleans(),
    only_needed=st.booleans(),
)
def test_online_exits_equal_offline_exits(drawn, batch_size, memory_limit, merge, only_needed):
    x, cutoffs, sizes = drawn
    n_exits = len(cutoffs)
    model = column_model(n_exits)
    predictions, scores, _ = record(model, batched(torch.from_numpy(x), sizes))
    labels = np.zeros(len(x), dtype=int)
    outputs = ExitOutputs(
        predictions=predictions, scores=scores, labels=labels, n_classes=N_CLASSES, costs=np.arange(1, n_exits + 1)
    )
    offline = exit_index(outputs, cutoffs)
    on = (cutoffs < np.inf).reshape(n_exits, -1).any(axis=1) if only_needed else np.ones(n_exits, dtype=bool)
    answers = execute(
        model, batched(torch.from_numpy(x), sizes[::-1]), above(cutoffs), on,
        batch_size=batch_size, memory_limit=memory_limit, merge=merge,
    )  # fmt: skip
    assert answers.exits.tolist() == offline.tolist()
    assert answers.predictions.tolist() == predictions[offline, np.arange(len(x))].tolist()
    assert answers.scores.tolist() == scores[offline, np.arange(len(x))].tolist()


def test_answers_come_in_the_order_of_the_samples():
    x = torch.arange(50.0).repeat_interleave(6).reshape(50, 6)
    answers = run(column_model(2), batched(x, [7]), [20.5, -np.inf], batch_size=4)
    assert all(a < b for a, b in pairwise(answers.scores.tolist()))
