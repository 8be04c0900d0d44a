import math
from types import SimpleNamespace

import numpy as np
import pytest

from adaptexit.core.frontier import evaluate
from adaptexit.core.metrics import exemplars, exit_calibration, flow, survivor_shift
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.routing import cutoffs_above
from tests import reference

INF = math.inf


def recorded(scores, predictions=None, labels=None, n_classes=None, quality=None):
    n_exits = len(scores)
    return ExitOutputs(
        scores=np.array(scores, dtype=float), predictions=None if predictions is None else np.array(predictions),
        labels=None if labels is None else np.array(labels), n_classes=n_classes,
        quality=None if quality is None else np.array(quality, dtype=float), costs=np.arange(1.0, n_exits + 1),
    )  # fmt: skip


def samples_of(examples):
    return [(near.samples, deep.samples) for near, deep in examples.strips]


def at(outputs, thresholds):
    """The operating point whose cutoffs are its thresholds."""
    array = np.array(thresholds, dtype=float)
    return evaluate(outputs, array, array)


def random_outputs(seed=0, n=300, n_exits=3, n_classes=4):
    rng = np.random.default_rng(seed)
    labels = rng.choice(n_classes, size=n, p=[0.4, 0.3, 0.2, 0.1])
    right = rng.random((n_exits, n)) < 0.7
    predictions = np.where(right, labels, rng.integers(n_classes, size=(n_exits, n)))
    scores = np.round(128 * rng.random((n_exits, n)) ** (0.2 + 0.2 * labels)) / 128  # no bin's edge is rounded to them
    return recorded(scores, predictions, labels, n_classes)


PER_EXIT = [0.75, 0.5, -INF]
PER_CLASS = [[0.75, INF, 0.875, -INF], [0.625, 0.75, INF, 0.5], [-INF] * 4]


# -- calibration ------------------------------------------------------------------------------------------------------


def naive_calibration(outputs, thresholds, n_bins):
    """Sample by sample: n, ECE and what is in each bin, of every exit."""
    rows = []
    exits = reference.route(outputs, thresholds)
    for k, limit in enumerate(thresholds):
        finite = [x for x in np.atleast_1d(limit) if x != INF]
        low = max(min(finite), 0.0) if finite else math.nan
        bins = [[] for _ in range(n_bins)]
        for i, exit_of_sample in enumerate(exits):
            if exit_of_sample == k:
                score = float(outputs.scores[k][i])
                b = 0
                while b < n_bins - 1 and score > low + (b + 1) * (1 - low) / n_bins:
                    b += 1
                bins[b].append((score, reference.quality_of(outputs, k, i)))
        n = sum(map(len, bins))
        ece = 0.0 if n else math.nan
        for entries in filter(None, bins):
            gap = abs(sum(q for _, q in entries) / len(entries) - sum(s for s, _ in entries) / len(entries))
            ece += len(entries) / n * gap
        rows.append((n, ece, bins))
    return rows


@pytest.mark.parametrize("thresholds", [PER_EXIT, PER_CLASS], ids=["by exit", "by class"])
@pytest.mark.parametrize("n_bins", [1, 8, 10])
def test_calibration_equals_counting_sample_by_sample(thresholds, n_bins):
    outputs = random_outputs()
    calibration = exit_calibration(outputs, at(outputs, thresholds), n_bins)
    expected = naive_calibration(outputs, thresholds, n_bins)
    assert calibration.n.tolist() == [n for n, _, _ in expected]
    assert all(n > 20 for n in calibration.n)
    assert calibration.ece == pytest.approx([ece for _, ece, _ in expected])
    for k, (_, _, bins) in enumerate(expected):
        assert calibration.count[k].tolist() == [len(entries) for entries in bins]
        means = [np.mean(entries, axis=0) if entries else (math.nan, math.nan) for entries in bins]
        assert calibration.confidence[k] == pytest.approx([score for score, _ in means], nan_ok=True)
        assert calibration.accuracy[k] == pytest.approx([quality for _, quality in means], nan_ok=True)


def test_bins_lie_between_the_smallest_threshold_and_one():
    outputs = random_outputs()
    assert exit_calibration(outputs, at(outputs, PER_EXIT), 4).edges == pytest.approx(
        np.array([[0.75, 0.8125, 0.875, 0.9375, 1.0], [0.5, 0.625, 0.75, 0.875, 1.0], [0.0, 0.25, 0.5, 0.75, 1.0]])
    )
    edges = exit_calibration(outputs, at(outputs, PER_CLASS), 2).edges
    assert edges == pytest.approx(np.array([[0.0, 0.5, 1.0], [0.5, 0.75, 1.0], [0.0, 0.5, 1.0]]))


def test_bins_are_closed_on_the_right():
    scores = [0.25, 0.5, 0.5 + 2**-40, 0.75, 1.0]
    outputs = recorded([scores], [[0] * 5], [0, 0, 1, 1, 0], 2)
    calibration = exit_calibration(outputs, at(outputs, [-INF]), 4)
    assert calibration.count.tolist() == [[1, 1, 2, 1]]
    assert calibration.accuracy.tolist() == [[1.0, 1.0, 0.0, 1.0]]
    assert calibration.ece[0] == pytest.approx((0.75 + 0.5 + 2 * 0.625 + 0.0) / 5)


def test_a_score_of_zero_is_in_the_first_bin():
    outputs = recorded([[0.0, 0.9]], [[0, 0]], [0, 0], 1)
    assert exit_calibration(outputs, at(outputs, [-INF]), 2).count.tolist() == [[1, 1]]


def test_a_class_of_threshold_minus_infinity_brings_scores_below_the_others():
    outputs = recorded([[0.1, 0.95], [0.5, 0.5]], [[0, 1], [0, 1]], [0, 1], 2)
    calibration = exit_calibration(outputs, at(outputs, [[-INF, 0.9], [-INF, -INF]]), 10)
    assert calibration.count[0].tolist() == [1, *8 * [0], 1]


def test_where_nobody_leaves_there_is_no_error():
    outputs = random_outputs()
    calibration = exit_calibration(outputs, at(outputs, [INF, 1.0, -INF]), 5)
    assert calibration.n.tolist() == [0, 0, 300]
    assert np.isnan(calibration.ece).tolist() == [True, True, False]
    assert np.isnan(calibration.accuracy[:2]).all()
    assert np.isnan(calibration.confidence[:2]).all()
    assert not calibration.count[:2].any()
    assert np.isnan(calibration.edges).all(axis=1).tolist() == [True, False, False]


def test_the_cutoffs_decide_who_leaves_and_the_thresholds_where_bins_begin():
    outputs = recorded([[0.6, 0.7, 0.9], [0.5] * 3], 2 * [[0] * 3], [0] * 3, 1)
    thresholds = np.array([0.6, -INF])
    cutoffs = np.array([cutoffs_above(thresholds[0], np.array([0.6, 0.7, 0.9])), -INF])
    assert cutoffs[0] == pytest.approx(0.65)
    stricter = evaluate(outputs, thresholds, np.array([0.8, -INF]))
    for point, n in ((evaluate(outputs, thresholds, cutoffs), 2), (stricter, 1)):
        calibration = exit_calibration(outputs, point)
        assert calibration.edges[0, 0] == 0.6
        assert calibration.n.tolist() == [n, 3 - n]


def test_accuracy_averages_quality():
    outputs = recorded([[0.5, 0.5, 0.9]], quality=[[0.25, 0.5, 1.0]])
    calibration = exit_calibration(outputs, at(outputs, [-INF]), 2)
    assert calibration.accuracy.tolist() == [[0.375, 1.0]]
    assert calibration.ece[0] == pytest.approx((2 * 0.125 + 0.1) / 3)


@pytest.mark.parametrize("bad", [-0.1, 1.1])
def test_scores_that_are_no_probabilities(bad):
    outputs = recorded([[0.5, 0.5], [bad, 0.5]], 2 * [[0, 0]], [0, 0], 1)
    with pytest.raises(ValueError, match=r"must be probabilities in \[0, 1\].*exit 1 has scores.*max_proba"):
        exit_calibration(outputs, at(outputs, [INF, -INF]))
    everybody_before = exit_calibration(outputs, at(outputs, [-INF, -INF]))
    assert everybody_before.n.tolist() == [2, 0]


def test_a_probability_may_be_rounded_past_one():
    outputs = recorded([[1.0 + 1e-7]], [[0]], [0], 1)
    assert exit_calibration(outputs, at(outputs, [-INF])).count[0, -1] == 1


MEASURES = [exit_calibration, survivor_shift, flow, exemplars]


@pytest.mark.parametrize("measure", MEASURES)
def test_a_point_of_another_model(measure):
    outputs = random_outputs()
    for shape in ((2,), (3, 5), (4, 4)):
        foreign = SimpleNamespace(thresholds=np.full(shape, -INF), cutoffs=np.full(shape, -INF))
        with pytest.raises(ValueError, match=r"shape \(3,\) or \(3, 4\) to fit the outputs"):
            measure(outputs, foreign)


def test_thresholds_by_class_need_classes():
    outputs = recorded([[0.5], [0.5]], quality=[[1], [1]])
    by_class = SimpleNamespace(thresholds=np.zeros((2, 2)), cutoffs=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"shape \(2,\) to fit"):
        exit_calibration(outputs, by_class)


# -- survivors --------------------------------------------------------------------------------------------------------


def naive_shift(outputs, thresholds):
    exits = reference.route(outputs, thresholds)
    n_classes = outputs.n_classes

    def shares(k):
        labels = [int(label) for label, at_exit in zip(outputs.labels, exits, strict=True) if at_exit >= k]
        return len(labels), [labels.count(c) / len(labels) for c in range(n_classes)]

    _, full = shares(0)
    for k in range(outputs.n_exits):
        n, surviving = shares(k)
        kl = sum(p * math.log(p / q) if q else INF for p, q in zip(full, surviving, strict=True) if p)
        gini = sum(abs(a - b) for a in surviving for b in surviving) / (2 * n_classes)
        yield n, kl, gini, sum(sorted(surviving, reverse=True)[:3])


@pytest.mark.parametrize("thresholds", [PER_EXIT, PER_CLASS], ids=["by exit", "by class"])
def test_survivors_equal_counting_sample_by_sample(thresholds):
    outputs = random_outputs()
    shift = survivor_shift(outputs, at(outputs, thresholds))
    expected = list(naive_shift(outputs, thresholds))
    assert shift.n.tolist() == [row[0] for row in expected]
    for i, name in enumerate(("kl", "gini", "top3"), start=1):
        assert getattr(shift, name) == pytest.approx([row[i] for row in expected])
    assert shift.kl[0] == 0.0
    assert (shift.kl[1:] > 1e-3).all()


def test_a_class_without_survivors_is_infinitely_far():
    outputs = recorded([[0.9, 0.1, 0.1], [0.5] * 3], 2 * [[0, 1, 1]], [0, 1, 1], 3)
    shift = survivor_shift(outputs, at(outputs, [0.5, -INF]))
    assert shift.kl.tolist() == [0.0, INF]
    assert shift.gini[1] == pytest.approx(1 - 1 / 3)
    assert shift.top3.tolist() == [1.0, 1.0]


def test_classes_of_equal_size():
    outputs = recorded([[0.5] * 8], [[0] * 8], [0, 1, 2, 3] * 2, 4)
    shift = survivor_shift(outputs, at(outputs, [-INF]))
    assert shift.gini == pytest.approx([0.0], abs=1e-15)
    assert shift.top3.tolist() == [0.75]


def test_classes_that_never_occur_make_the_counts_uneven():
    outputs = recorded([[0.5] * 4], [[0] * 4], [0, 0, 1, 1], 4)
    assert survivor_shift(outputs, at(outputs, [-INF])).gini.tolist() == [0.5]


def test_nobody_left():
    outputs = random_outputs()
    point = at(outputs, [0.5, -INF, -INF])
    shift = survivor_shift(outputs, point)
    assert shift.n[0] == 300
    assert shift.n[1] > 0
    assert shift.n[2] == 0
    for values in (shift.kl, shift.gini, shift.top3):
        assert np.isnan(values).tolist() == [False, False, True]
    assert flow(outputs, point)[2].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("thresholds", [PER_EXIT, PER_CLASS], ids=["by exit", "by class"])
def test_flow_equals_counting_sample_by_sample(thresholds):
    outputs = random_outputs()
    exits = reference.route(outputs, thresholds)
    expected = [
        [sum(e >= k and label == c for e, label in zip(exits, outputs.labels, strict=True)) for c in range(4)]
        for k in range(3)
    ]
    counts = flow(outputs, at(outputs, thresholds))
    assert counts.tolist() == expected
    assert counts.dtype == np.int64
    assert counts[2].all()


@pytest.mark.parametrize("measure", [flow, survivor_shift])
def test_survivors_without_labels(measure):
    outputs = recorded([[0.5]], quality=[[1]])
    with pytest.raises(ValueError, match="need labels and n_classes"):
        measure(outputs, at(outputs, [-INF]))


# -- examples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thresholds", [PER_EXIT, PER_CLASS], ids=["by exit", "by class"])
@pytest.mark.parametrize("n", [1, 6, 400])
def test_exemplars_equal_sorting_sample_by_sample(thresholds, n):
    outputs = random_outputs()
    exits = reference.route(outputs, thresholds)
    pairs = samples_of(exemplars(outputs, at(outputs, thresholds), n))
    assert len(pairs) == 2
    for k, (near, deep) in enumerate(pairs):
        right = [i for i, e in enumerate(exits) if e == k and reference.quality_of(outputs, k, i) == 1]

        def excess(i, k=k):
            return outputs.scores[k][i] - max(reference.threshold_of(outputs, thresholds, k, i), 0.0)

        assert len(near) == min(n, len(right))
        assert near.tolist() == sorted(right, key=excess)[:n]
        assert deep.tolist() == sorted(right, key=lambda i, k=k: -outputs.scores[k][i])[:n]


def test_exemplars_of_a_class_are_near_its_own_threshold():
    outputs = recorded([[0.95, 0.5, 0.55], [0.5] * 3], 2 * [[0, 1, 1]], [0, 1, 1], 2)
    ((near, deep),) = samples_of(exemplars(outputs, at(outputs, [[0.94, 0.2], [-INF, -INF]])))
    assert near.tolist() == [0, 1, 2]
    assert deep.tolist() == [0, 2, 1]
    ((near, _),) = samples_of(exemplars(outputs, at(outputs, [[-INF, 0.2], [-INF, -INF]])))
    assert near.tolist() == [1, 2, 0]


def test_exemplars_come_in_order_where_scores_are_equal():
    outputs = recorded([[0.5, 0.9, 0.5, 0.9], [0.5] * 4], 2 * [[0] * 4], [0] * 4, 1)
    ((near, deep),) = samples_of(exemplars(outputs, at(outputs, [-INF, -INF]), 3))
    assert near.tolist() == [0, 2, 1]
    assert deep.tolist() == [1, 3, 0]


def test_exemplars_of_quality_are_wholly_right():
    outputs = recorded([[0.5, 0.6, 0.7], [0.5] * 3], quality=[[1, 0.5, 1], [0, 0, 0]])
    ((near, deep),) = samples_of(exemplars(outputs, at(outputs, [0.4, -INF])))
    assert (near.tolist(), deep.tolist()) == ([0, 2], [2, 0])


def test_no_exemplars_where_nobody_leaves_and_none_without_early_exits():
    outputs = recorded([[0.5], [0.5]], 2 * [[0]], [0], 1)
    ((near, deep),) = samples_of(exemplars(outputs, at(outputs, [INF, -INF])))
    assert (near.shape, deep.shape) == ((0,), (0,))
    alone = recorded([[0.5]], [[0]], [0], 1)
    assert exemplars(alone, at(alone, [-INF])).strips == []


def test_strips_carry_scores_and_classes():
    outputs = ExitOutputs(
        scores=np.array([[0.7, 0.9], [0.5, 0.5]]), predictions=np.array([[1, 0], [1, 0]]), labels=np.array([1, 0]),
        n_classes=2, costs=[1, 2],
    )  # fmt: skip
    ((near, deep),) = exemplars(outputs, at(outputs, [-INF, -INF])).strips
    assert (near.scores.tolist(), near.labels.tolist()) == ([0.7, 0.9], [1, 0])
    assert (deep.scores.tolist(), deep.labels.tolist()) == ([0.9, 0.7], [0, 1])


# -- tables -----------------------------------------------------------------------------------------------------------


def test_tables_hold_what_the_arrays_do():
    pytest.importorskip("pandas")
    outputs = random_outputs()
    point = at(outputs, PER_EXIT)
    calibration, shift = exit_calibration(outputs, point, 4), survivor_shift(outputs, point)
    bins = calibration.to_frame()
    assert list(bins.columns) == ["exit", "low", "high", "accuracy", "confidence", "count"]
    assert bins["count"].to_numpy().reshape(3, 4).tolist() == calibration.count.tolist()
    assert (bins["high"] - bins["low"]).to_numpy() == pytest.approx(np.diff(calibration.edges, axis=1).ravel())
    assert shift.to_frame().to_numpy() == pytest.approx(np.column_stack([shift.n, shift.kl, shift.gini, shift.top3]))
