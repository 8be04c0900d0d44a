"""Weights of samples, where the mix of a calibration set is not that of what is to come."""

import numpy as np
import pytest

from adaptexit import (
    CPMCalibrator,
    EENetScheduler,
    EMRouter,
    ExitOutputs,
    ParetoFrontier,
    PatienceCalibrator,
    TemperatureCalibrator,
    ThresholdCalibrator,
    compare,
    verdict,
)
from adaptexit.core.search import search_thresholds
from adaptexit.core.search.problem import Problem
from adaptexit.core.search.spending import described, spend
from adaptexit.core.temperature import fit_temperature

COSTS = [0.2, 0.5, 1.0]


def network(n=400, seed=0, *, hard=0.5, n_exits=3, **others):
    """Exits by logits of four classes; of the share ``hard`` of samples early exits know little."""
    rng = np.random.default_rng(seed)
    labels, is_hard = rng.integers(4, size=n), rng.random(n) < hard
    skill = np.where(is_hard, np.array([[0.3], [1.0], [2.5]]), np.array([[2.5], [2.8], [3.0]]))[-n_exits:]
    logits = rng.normal(size=(n_exits, n, 4))
    logits[:, np.arange(n), labels] += skill
    outputs = ExitOutputs.from_logits(logits, labels, costs=COSTS[-n_exits:], **others)
    return outputs, is_hard


def mixed(outputs, is_hard, hard):
    """The same outputs, weighted to another share of hard samples."""
    share = is_hard.mean()
    weights = np.where(is_hard, hard / share, (1 - hard) / (1 - share))
    fields = {"stage_costs": outputs.stage_costs, "exit_costs": outputs.exit_costs, "sample_weight": weights}
    return ExitOutputs.from_logits(outputs.logits, outputs.labels, **fields)


# -- the value ---------------------------------------------------------------------------------------------------------


def small(**others):
    fields = {"scores": np.arange(8.0).reshape(2, 4), "quality": np.eye(2, 4), "costs": [1, 2]}
    return ExitOutputs(**fields | others)


def test_weights_are_kept_with_a_mean_of_1():
    outputs = small(sample_weight=[0, 1, 2, 5])
    assert outputs.sample_weight.tolist() == [0, 0.5, 1.0, 2.5]
    assert outputs.accuracies.tolist() == [0.0, 0.125]
    assert outputs.full_accuracy == 0.125
    assert outputs.effective_size == pytest.approx(64 / 30)
    assert small(sample_weight=[1e308, 1e308, 0, 0]).sample_weight.tolist() == [2, 2, 0, 0]
    assert "sample_weight" in repr(outputs)


@pytest.mark.parametrize("weights", [None, [3, 3, 3, 3]])
def test_equal_weights_are_none(weights):
    outputs = small(sample_weight=weights)
    assert outputs.sample_weight is None
    assert outputs.effective_size == 4


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([1, 2], r"sample_weight must have shape \(4,\), one weight a sample; got shape \(2,\)"),
        (np.ones((4, 1)), r"got shape \(4, 1\)"),
        ([1, 2, np.nan, 1], "finite, not negative and not all zero; sample 2 has nan"),
        ([1, -1, 1, 1], "sample 1 has -1.0"),
        ([0, 0, 0, 0], "all are zero"),
        (["a", "b", "c", "d"], "sample_weight must be real numbers"),
    ],
)
def test_what_are_no_weights(weights, says):
    with pytest.raises(ValueError, match=says):
        small(sample_weight=weights)


def test_weights_travel(tmp_path):
    outputs, is_hard = network(40)
    own = mixed(outputs, is_hard, 0.1)
    own.save(tmp_path / "outputs")
    others = [ExitOutputs.load(tmp_path / "outputs", mmap=mmap) for mmap in (False, True)]
    others += [own.with_scores(own.scores * 2), own.with_costs(own.stage_costs, [1, 1, 1]), own.drop_exit(0)]
    for other in others:
        assert other.sample_weight.tolist() == own.sample_weight.tolist()
    some = own.take(np.arange(10))
    assert some.sample_weight == pytest.approx(own.sample_weight[:10] / own.sample_weight[:10].mean())
    assert own.take(np.flatnonzero(is_hard)).sample_weight is None
    with pytest.raises(ValueError, match="samples must have a weight above 0 among them"):
        small(sample_weight=[0, 1, 2, 5]).take([0, 0])


def test_weights_of_a_log():
    log = {"a_score": [0.1, 0.9], "a_correct": [0, 1], "b_correct": [1, 1], "w": [1, 3]}
    outputs = ExitOutputs.from_frame(log, cost=[1, 2], sample_weight="w")
    assert outputs.sample_weight.tolist() == [0.5, 1.5]
    assert outputs.accuracies.tolist() == [0.75, 1.0]
    with pytest.raises(ValueError, match="sample_weight must name columns of frame; it has no column 'v'"):
        ExitOutputs.from_frame(log, cost=[1, 2], sample_weight="v")
    with pytest.raises(ValueError, match="column 'w' must hold weights, finite and at least 0; row 1"):
        ExitOutputs.from_frame(log | {"w": [1, -3]}, cost=[1, 2], sample_weight="w")
    with pytest.raises(TypeError, match="sample_weight must name a column of frame; got list"):
        ExitOutputs.from_frame(log, cost=[1, 2], sample_weight=[1, 3])


# -- searching and choosing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["auto", "exact", "coord", "shared", "geometric"])
@pytest.mark.parametrize("n_exits", [2, 3])
def test_points_say_what_the_mix_to_come_gives(search, n_exits):
    outputs, is_hard = network(2000, hard=0.8, n_exits=n_exits)
    fresh, _ = network(20_000, 1, hard=0.2, n_exits=n_exits)
    points = []
    for calibration in (mixed(outputs, is_hard, 0.2), outputs):
        calibrator = ThresholdCalibrator(search=search, budget=0.7, n_points=20).fit(calibration)
        on_fresh = calibrator.frontier_.on(fresh).points[calibrator.frontier_.index(calibrator.point_)]
        points.append((calibrator.point_, on_fresh))
    (weighted, then), (plain, otherwise) = points
    assert weighted.cost == pytest.approx(then.cost, abs=0.02)
    assert weighted.accuracy == pytest.approx(then.accuracy, abs=0.03)
    assert plain.accuracy < otherwise.accuracy - 0.05
    if search == "auto":  # the others store no point that looks no better than a cheaper one
        assert then.cost == pytest.approx(0.7, abs=0.02)
        assert otherwise.cost < 0.65


def test_one_exit_is_searched_as_over_repeated_samples():
    outputs, _ = network(150, n_exits=2)
    weights = np.random.default_rng(3).integers(1, 4, size=150)
    own = ExitOutputs.from_logits(outputs.logits, outputs.labels, costs=COSTS[1:], sample_weight=weights)
    repeated = outputs.take(np.repeat(np.arange(150), weights))
    budgets = np.linspace(0.55, 1, 10)
    problems = [Problem.from_outputs(o) for o in (own, repeated)]
    costs = [p.costs(spend(o, p, budgets)) / p.n_samples for o, p in zip((own, repeated), problems, strict=True)]
    assert (costs[0] <= budgets + 1e-9).all()
    # The last sample is looked for in a dozen halvings, which may stop short of it: it counts 0.005 at most.
    assert costs[0] == pytest.approx(costs[1], abs=0.0051)


def test_few_samples_of_large_weight_are_few():
    outputs, is_hard = network(1000, hard=0.02)
    own = mixed(outputs, is_hard, 0.5)
    assert own.effective_size < 120
    frontier, report = search_thresholds(own)
    assert f"1000 samples that by weight are worth {own.effective_size:.0f}: " in report.reason
    counted = described(3, round(own.effective_size)).split(": ")[1]
    assert report.reason.endswith(counted)
    assert frontier.effective_size == own.effective_size
    again = ParetoFrontier.from_arrays(*frontier.to_arrays())
    assert again.effective_size == own.effective_size
    alike = ParetoFrontier(
        frontier.points, frontier.full_accuracy, frontier.fixed_accuracy, frontier.fixed_cost, frontier.n_samples
    )
    assert frontier.at(max_drop=0.02).cost >= alike.at(max_drop=0.02).cost
    described_size, arrays = frontier.to_arrays()
    with pytest.raises(ValueError, match="effective_size must be above 0 and at most n_samples; got 2000"):
        ParetoFrontier.from_arrays(described_size | {"effective_size": 2000}, arrays)


# -- calibrators and verdicts ------------------------------------------------------------------------------------------


def test_a_temperature_is_that_of_repeated_samples():
    outputs, _ = network(200)
    weights = np.random.default_rng(0).integers(4, size=200)
    own = fit_temperature(outputs.logits[0], outputs.labels, weights.astype(float))
    samples = np.repeat(np.arange(200), weights)
    assert own == pytest.approx(fit_temperature(outputs.logits[0][samples], outputs.labels[samples]), rel=1e-4)
    assert own != pytest.approx(fit_temperature(outputs.logits[0], outputs.labels), rel=1e-3)


@pytest.mark.parametrize("calibrator", [TemperatureCalibrator(budget=0.7), PatienceCalibrator(), CPMCalibrator(0.1)])
def test_calibrators_report_by_weight(calibrator):
    own = mixed(*network(500), 0.1)
    calibrator.fit(own)
    at_exits = own.graded[calibrator.exit_index(own), np.arange(500)]
    assert calibrator.point_.accuracy == pytest.approx(np.average(at_exits, weights=own.sample_weight))
    assert calibrator.frontier_.full_accuracy == own.full_accuracy


@pytest.mark.parametrize("calibrator", [EMRouter(inputs="logits"), EENetScheduler()])
def test_calibrators_that_train_refuse_weights(calibrator):
    own = mixed(*network(100), 0.1)
    says = f"{type(calibrator).__name__} does not read sample_weight.*ThresholdCalibrator.*draw a sample by weight"
    with pytest.raises(ValueError, match=says):
        calibrator.fit(own)


def test_em_refuses_weights_of_training_samples():
    outputs, is_hard = network(100)
    with pytest.raises(ValueError, match="EMRouter does not read sample_weight"):
        EMRouter(inputs="logits").fit(outputs, training=mixed(outputs, is_hard, 0.1))


@pytest.mark.parametrize("bound", ["wilson", "fixed_sequence"])
def test_bounds_refuse_weights(bound):
    with pytest.raises(ValueError, match=f"bound must be 'none' for outputs with sample_weight; got '{bound}'"):
        CPMCalibrator(bound=bound).fit(mixed(*network(100), 0.1))


def test_a_comparison_is_by_weight():
    own = mixed(*network(300), 0.1)
    compared = compare(own, {"thresholds": ThresholdCalibrator(budget=0.7)})
    assert compared.full_accuracy == own.full_accuracy
    assert compared.points["oracle"][0].accuracy == pytest.approx(
        np.average(own.graded.any(axis=0), weights=own.sample_weight)
    )


def test_a_verdict_is_on_the_mix_to_come():
    outputs, is_hard = network(1500, hard=0.5, n_exits=2)
    own = mixed(outputs, is_hard, 0.02)
    easy, plain = (verdict(o, max_drop=0.01) for o in (own, outputs))
    assert easy.saving > plain.saving + 0.05
    assert "measured on 1,500 samples by weight" in str(easy)
    assert "by weight" not in str(plain)
    rare = verdict(mixed(outputs, np.arange(1500) < 75, 0.5), max_drop=0.01)
    assert np.ptp(rare.accuracy_interval) > 1.5 * np.ptp(plain.accuracy_interval)


def test_a_verdict_leaves_out_what_does_not_count():
    outputs, is_hard = network(600, n_exits=2)
    own = mixed(outputs, is_hard, 0.0)
    found, alone = verdict(own, max_drop=0.01), verdict(outputs.take(~is_hard), max_drop=0.01)
    assert found.n_samples == np.count_nonzero(~is_hard)
    assert found.saving == alone.saving
    assert found.accuracy_interval == alone.accuracy_interval
