import math

import numpy as np
import pytest

from adaptexit.core.baselines import fixed_exits, oracle, oracle_exits, patience, patience_exits, random_routing
from adaptexit.core.outputs import ExitOutputs
from tests import reference

KINDS = [(n_exits, kind, chained) for n_exits in (1, 2, 3, 5) for kind in ("classes", "quality") for chained in (0, 1)]


def drawn(n_exits, kind="classes", chained=False, n=60):
    """Small whole numbers all through, so that qualities and costs tie and deeper exits may be the cheaper ones."""
    rng = np.random.default_rng([n_exits, kind == "quality", chained])
    stage_costs = rng.integers(1, 4, size=n_exits)
    if kind == "quality":
        answers = {"quality": rng.integers(4, size=(n_exits, n)) / 4}
    else:
        labels = rng.integers(3, size=n)
        answers = {"predictions": rng.integers(3, size=(n_exits, n)), "labels": labels, "n_classes": 3}
    return ExitOutputs(
        scores=rng.random((n_exits, n)), stage_costs=stage_costs, exit_costs=rng.integers(5, size=n_exits),
        chained=bool(chained), **answers,
    )  # fmt: skip


def by_hand(predictions, labels, stage_costs, exit_costs, **others):
    predictions = np.array(predictions)
    return ExitOutputs(
        predictions=predictions, scores=np.zeros(predictions.shape), labels=np.array(labels), n_classes=3,
        stage_costs=stage_costs, exit_costs=exit_costs, **others,
    )  # fmt: skip


def alone(outputs, k):
    """What exit k costs a sample when it answers for everybody."""
    early = range(k + 1) if outputs.chained else [k]
    return reference.spent(outputs, [] if k == outputs.n_exits - 1 else early, k)


def mean_of(outputs, exits, spent):
    """Accuracy, mean relative cost and exit rates, sample by sample."""
    n = outputs.n_samples
    accuracy = math.fsum(reference.quality_of(outputs, k, i) for i, k in enumerate(exits)) / n
    cost = math.fsum(spent(k) for k in exits) / n / reference.full_cost(outputs)
    return accuracy, cost, [list(exits).count(k) / n for k in range(outputs.n_exits)]


def check(point, expected):
    accuracy, cost, rates = expected
    assert (point.accuracy, point.cost) == pytest.approx((accuracy, cost), abs=1e-12)
    assert point.exit_rates.tolist() == pytest.approx(rates, abs=1e-12)


def naive_oracle(outputs):
    exits = []
    for i in range(outputs.n_samples):
        key = [(-reference.quality_of(outputs, k, i), alone(outputs, k), k) for k in range(outputs.n_exits)]
        exits.append(min(key)[2])
    return exits


def naive_patience(outputs, count):
    exits = []
    for i in range(outputs.n_samples):
        answers = [int(outputs.predictions[k][i]) for k in range(outputs.n_exits)]
        agreeing = [k for k in range(count, len(answers)) if len(set(answers[k - count : k + 1])) == 1]
        exits.append(min([*agreeing, len(answers) - 1]))
    return exits


# -- against loops ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_exits", "kind", "chained"), KINDS)
def test_exits_alone_equal_walking_every_sample(n_exits, kind, chained):
    outputs = drawn(n_exits, kind, chained)
    points = fixed_exits(outputs)
    assert [point.params for point in points] == [{"exit": k} for k in range(n_exits)]
    for k, point in enumerate(points):
        check(point, mean_of(outputs, [k] * outputs.n_samples, lambda k: alone(outputs, k)))


@pytest.mark.parametrize(("n_exits", "kind", "chained"), KINDS)
def test_random_routing_is_the_mean_over_all_draws(n_exits, kind, chained):
    outputs = drawn(n_exits, kind, chained)
    each = [mean_of(outputs, [k] * outputs.n_samples, lambda k: alone(outputs, k)) for k in range(n_exits)]
    accuracies, costs, rates = zip(*each, strict=True)
    check(random_routing(outputs), (np.mean(accuracies), np.mean(costs), np.mean(rates, axis=0)))


@pytest.mark.parametrize(("n_exits", "kind", "chained"), KINDS)
def test_the_oracle_equals_walking_every_sample(n_exits, kind, chained):
    outputs = drawn(n_exits, kind, chained)
    assert oracle_exits(outputs).tolist() == naive_oracle(outputs)
    check(oracle(outputs), mean_of(outputs, naive_oracle(outputs), lambda k: alone(outputs, k)))


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("n_exits", [1, 2, 3, 5])
def test_patience_equals_walking_every_sample(n_exits, chained):
    outputs = drawn(n_exits, chained=chained)
    points = patience(outputs)
    assert [point.params for point in points] == [{"patience": p} for p in range(1, n_exits)]
    every = range(n_exits - 1)
    for p, point in enumerate(points, start=1):
        exits = naive_patience(outputs, p)
        assert patience_exits(outputs, p).tolist() == exits
        check(point, mean_of(outputs, exits, lambda k: reference.spent(outputs, every, k)))


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_the_oracle_takes_the_cheapest_that_is_right_and_where_none_is_the_cheapest():
    outputs = by_hand([[0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 2, 0]], [0, 1, 2, 1], [1, 1, 2], [0, 0, 0])
    assert oracle_exits(outputs).tolist() == [0, 1, 2, 0]
    check(oracle(outputs), (0.75, (1 + 2 + 4 + 1) / 4 / 4, [0.5, 0.25, 0.25]))


def test_the_oracle_takes_a_deeper_exit_where_that_is_the_cheaper_one():
    outputs = by_hand([[0, 0], [0, 0], [0, 0]], [0, 1], [1, 1, 2], [3, 0.5, 0])
    assert oracle_exits(outputs).tolist() == [1, 1]
    assert oracle(outputs).cost == 2.5 / 4


def test_of_equally_cheap_exits_the_oracle_takes_the_first():
    outputs = by_hand([[0, 0], [0, 1], [0, 0]], [0, 1], [1, 1, 2], [1, 0, 0])
    assert oracle_exits(outputs).tolist() == [0, 1]


def test_the_oracle_pays_for_the_exits_that_a_chained_one_reads():
    wrong_first = [[[1], [0], [1]], [0], [1, 1, 2], [0.25, 0.5, 1]]
    assert oracle(by_hand(*wrong_first)).cost == 2.5 / 5
    assert oracle(by_hand(*wrong_first, chained=True)).cost == 2.75 / 5


def test_by_quality_the_oracle_takes_the_best():
    quality = np.array([[0.5, 0.2, 0.0], [0.5, 0.6, 0.0], [0.4, 0.9, 0.0]])
    outputs = ExitOutputs(scores=np.zeros((3, 3)), quality=quality, costs=[1, 2, 4])
    assert oracle_exits(outputs).tolist() == [0, 2, 0]
    check(oracle(outputs), (1.4 / 3, 6 / 12, [2 / 3, 0, 1 / 3]))


PATIENT = [
    # of five exits, one column a sample
    [0, 0, 0, 1, 2],
    [0, 1, 1, 1, 1],
    [0, 1, 0, 0, 1],
    [0, 1, 1, 0, 1],
    [2, 1, 0, 0, 1],
]


@pytest.mark.parametrize(
    ("count", "exits"),
    [(1, [1, 2, 4, 1, 2]), (2, [2, 3, 4, 4, 3]), (3, [3, 4, 4, 4, 4]), (4, [4] * 5), (9, [4] * 5)],
)
def test_patience_counts_exits_in_a_row_that_answer_the_same(count, exits):
    outputs = by_hand(PATIENT, [0] * 5, [1] * 5, [0] * 5)
    assert patience_exits(outputs, count).tolist() == exits


def test_patience_pays_for_every_exit_on_the_way():
    one = by_hand([[0], [0], [1]], [0], [1, 1, 2], [0.25, 0.5, 1])
    leaving, staying = patience(one)
    assert (leaving.accuracy, leaving.cost, leaving.exit_rates.tolist()) == (1.0, 2.75 / 5, [0, 1, 0])
    assert (staying.accuracy, staying.cost, staying.exit_rates.tolist()) == (0.0, 5.75 / 5, [0, 0, 1])


def test_points_are_named():
    outputs = drawn(3)
    points = [*fixed_exits(outputs), random_routing(outputs), *patience(outputs), oracle(outputs)]
    assert [point.name for point in points] == [
        "exit 0 alone", "exit 1 alone", "full model", "random exit", "patience 1", "patience 2", "oracle"
    ]  # fmt: skip


def test_a_single_exit_is_the_full_model_under_every_rule():
    outputs = drawn(1)
    for point in (*fixed_exits(outputs), random_routing(outputs), oracle(outputs)):
        check(point, (outputs.full_accuracy, 1.0, [1.0]))
    assert patience(outputs) == []
    assert patience_exits(outputs, 1).tolist() == [0] * outputs.n_samples


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2", None])
def test_a_patience_that_cannot_be(count):
    with pytest.raises(ValueError, match=f"patience must be a whole number, at least 1; got {count!r}"):
        patience_exits(drawn(3), count)


def test_patience_needs_predictions():
    with pytest.raises(ValueError, match="patience compares predictions, but the outputs have none"):
        patience(drawn(3, "quality"))
