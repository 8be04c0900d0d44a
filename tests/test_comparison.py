import itertools
import re
from typing import ClassVar

import numpy as np
import pytest
from sklearn.base import clone

from adaptexit import CPMCalibrator, EMRouter, ExitOutputs, ThresholdCalibrator
from adaptexit.comparison import compare
from adaptexit.core.baselines import fixed_exits, oracle, patience, random_routing
from adaptexit.core.frontier import evaluate

SIMPLE = ["exit 0 alone", "exit 1 alone", "full model", "random exit", "patience 1", "patience 2"]
USUAL = ["BranchyNet (entropy)", "largest probability"]


def drawn(seed, n=120, n_exits=3, n_classes=4, **others):
    """Exits that are surer and more often right the deeper they are."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_classes, size=n)
    logits = rng.normal(size=(n_exits, n, n_classes))
    logits[:, np.arange(n), labels] += np.linspace(0.8, 3.0, n_exits)[:, None] * rng.random(n) * 1.5
    costs = {"stage_costs": [1.0] * n_exits, "exit_costs": [0.125] * n_exits}
    return ExitOutputs.from_logits(logits, labels, **(costs | others))


CALIBRATION, TEST = drawn(0), drawn(1)


def recorded(budget=None):
    return ThresholdCalibrator(n_points=6, budget=budget)


def methods():
    return {"shared": ThresholdCalibrator(search="shared", n_points=6), "tight": recorded(budget=0.5)}


@pytest.fixture(scope="module")
def usual():
    return compare(CALIBRATION, test=TEST, exit_names=["tiny", "mid", "big"])


@pytest.fixture(scope="module")
def own():
    return compare(CALIBRATION, methods(), test=TEST)


def figures(point):
    return [point.accuracy, point.cost, *point.exit_rates]


def described(points):
    return {name: [(p.name, p.params, *figures(p)) for p in rule] for name, rule in points.items()}


# -- what is compared -------------------------------------------------------------------------------------------------


def test_simple_rules_are_reported_on_the_test_outputs(own):
    expected = {
        "exits alone": fixed_exits(TEST),
        "random exit": [random_routing(TEST)],
        "patience": patience(TEST),
        "oracle": [oracle(TEST)],
    }
    assert described(own.points) == described(expected)
    assert own.full_accuracy == TEST.full_accuracy
    assert own.n_samples == TEST.n_samples


def test_methods_are_fitted_on_the_calibration_outputs_and_evaluated_on_the_test_outputs(own):
    assert list(own.frontiers) == ["shared", "tight"]
    for name, calibrator in methods().items():
        calibrator.fit(CALIBRATION)
        frontier = own.frontiers[name]
        points = calibrator.frontier_.points
        assert [figures(p) for p in frontier.chosen_on.points] == [figures(p) for p in points]
        again = [evaluate(TEST, p.thresholds, p.cutoffs) for p in points]
        assert [figures(p) for p in frontier.points] == [figures(p) for p in again]
        assert points[own.in_use[name]] is calibrator.point_
        assert own.calibrators[name].frontier_ is frontier.chosen_on


def test_usually_entropy_and_the_largest_probability_are_compared(usual):
    for name, score in zip(USUAL, ("entropy", "max_proba"), strict=True):
        fitted = ThresholdCalibrator(score).fit(CALIBRATION)
        expected = fitted.pareto(TEST).points
        assert [figures(p) for p in usual.frontiers[name].points] == [figures(p) for p in expected]
    assert list(usual.frontiers) == USUAL


def test_without_logits_the_recorded_score_is_compared():
    outputs = drawn(0, n=40, n_exits=2, score="margin", keep_logits=False)
    comparison = compare(outputs)
    expected = ThresholdCalibrator("recorded").fit(outputs).frontier_
    assert list(comparison.frontiers) == ["recorded score"]
    assert [figures(p) for p in comparison.frontiers["recorded score"].points] == [figures(p) for p in expected.points]


def test_outputs_by_quality_have_no_patience():
    rng = np.random.default_rng(0)
    outputs = ExitOutputs(scores=rng.random((2, 30)), quality=rng.random((2, 30)), costs=[1, 2])
    comparison = compare(outputs)
    assert list(comparison.points) == ["exits alone", "random exit", "oracle"]
    assert list(comparison.at()) == ["exit 0 alone", "full model", "random exit", "recorded score", "oracle"]


def test_a_single_exit():
    comparison = compare(drawn(0, n=20, n_exits=1), {"mine": recorded()})
    assert {tuple(figures(p)) for p in comparison.at().values()} == {(comparison.full_accuracy, 1.0, 1.0)}


def test_no_method_at_all():
    comparison = compare(CALIBRATION, {})
    assert list(comparison.at()) == [*SIMPLE, "oracle"]
    assert comparison.frontiers == {}


# -- honesty ----------------------------------------------------------------------------------------------------------


class Watched(ThresholdCalibrator):
    """Writes down what it is shown."""

    calls: ClassVar = []

    def fit(self, outputs, y=None):
        self.calls.append(("fit", outputs))
        return super().fit(outputs)

    def rescored(self, outputs):
        self.calls.append(("rescored", outputs))
        return super().rescored(outputs)

    def pareto(self, outputs=None):
        self.calls.append(("pareto", outputs))
        return super().pareto(outputs)


def test_a_method_is_shown_the_test_outputs_once_after_it_was_fitted():
    Watched.calls.clear()
    watched = Watched(n_points=4)
    comparison = compare(CALIBRATION, {"watched": watched}, test=TEST)
    comparison.at(0.6)
    comparison.to_frame(0.7)
    names = {id(CALIBRATION): "calibration", id(TEST): "test"}
    assert [(what, names[id(outputs)]) for what, outputs in Watched.calls] == [
        ("fit", "calibration"), ("rescored", "calibration"), ("pareto", "test"), ("rescored", "test")
    ]  # fmt: skip
    assert not hasattr(watched, "frontier_")


def test_a_budget_is_served_by_what_the_calibration_data_say(own):
    served = set()
    for choice in ({}, *({"budget": budget} for budget in (0.45, 0.6, 0.8, 1.0)), {"max_drop": 0.02}):
        for name, calibrator in methods().items():
            expected = calibrator.fit(CALIBRATION).policy(**choice).point
            point = own.at(**choice)[name]
            assert point.thresholds.tolist() == expected.thresholds.tolist()
            assert figures(point) == figures(evaluate(TEST, expected.thresholds, expected.cutoffs))
            served.add((name, tuple(point.thresholds)))
    assert len(served) > 4


def test_labels_of_the_test_outputs_choose_nothing():
    worse = ExitOutputs.from_logits(
        TEST.logits, np.roll(TEST.labels, 1), stage_costs=TEST.stage_costs, exit_costs=TEST.exit_costs
    )
    one, other = (compare(CALIBRATION, methods(), test=test) for test in (TEST, worse))
    for budget, name in itertools.product((None, 0.5, 0.8), methods()):
        first, second = one.at(budget)[name], other.at(budget)[name]
        assert first.thresholds.tolist() == second.thresholds.tolist()
        assert first.exit_rates.tolist() == second.exit_rates.tolist()
        assert first.accuracy > second.accuracy


def test_methods_that_are_fitted_already_are_not_fitted_again():
    fitted = recorded().fit(drawn(2))
    comparison = compare(CALIBRATION, {"fitted": fitted, "not": clone(fitted)}, test=TEST)
    assert comparison.frontiers["fitted"].chosen_on is fitted.frontier_
    thresholds = [[p.thresholds.tolist() for p in f.chosen_on.points] for f in comparison.frontiers.values()]
    assert thresholds[0] != thresholds[1]
    here = compare(CALIBRATION, {"fitted": fitted})
    assert figures(here.at()["fitted"]) == figures(
        evaluate(CALIBRATION, fitted.point_.thresholds, fitted.point_.cutoffs)
    )


def test_without_test_outputs_figures_are_those_of_the_calibration_data():
    comparison = compare(CALIBRATION, {"mine": recorded()})
    fitted = recorded().fit(CALIBRATION)
    assert figures(comparison.at()["mine"]) == figures(fitted.point_)
    assert comparison.full_accuracy == CALIBRATION.full_accuracy
    assert not comparison.held_out
    assert "the calibration data themselves" in str(comparison)


# -- the table --------------------------------------------------------------------------------------------------------


def test_rows_of_the_table(own):
    frame = own.to_frame()
    assert frame.index.name == "method"
    assert frame.index.tolist() == [*SIMPLE, "shared", "tight", "oracle"]
    assert frame.columns.tolist() == ["accuracy", "cost", "exit_rate_0", "exit_rate_1", "exit_rate_2"]
    rows = [*fixed_exits(TEST), random_routing(TEST), *patience(TEST)]
    rows += [own.frontiers[name].points[own.in_use[name]] for name in methods()]
    assert frame.to_numpy().tolist() == [figures(p) for p in [*rows, oracle(TEST)]]


def test_the_table_at_a_budget(own):
    frame = own.to_frame(0.7)
    for name in methods():
        assert frame.loc[name].tolist() == figures(own.frontiers[name].at(budget=0.7))
        assert frame.loc[name, "cost"] != own.to_frame().loc[name, "cost"]
    assert frame.loc[[*SIMPLE, "oracle"]].equals(own.to_frame().loc[[*SIMPLE, "oracle"]])


def test_the_table_for_an_allowed_drop(own):
    frame = own.to_frame(max_drop=0.05)
    for name in methods():
        assert frame.loc[name].tolist() == figures(own.frontiers[name].at(max_drop=0.05))
    assert frame.loc["shared", "cost"] < own.to_frame(max_drop=0.0).loc["shared", "cost"]
    for ask in (own.at, own.to_frame):
        with pytest.raises(ValueError, match=r"at most one of budget and max_drop; got budget=0.7, max_drop=0.05"):
            ask(0.7, 0.05)


def test_a_budget_below_the_cheapest_point_leaves_a_row_empty():
    candidates = {"dear": CPMCalibrator(0.0, margins=[0.0]), "mine": recorded()}
    comparison = compare(CALIBRATION, candidates, test=TEST)
    dear, mine = (frontier.chosen_on.cost.min() for frontier in comparison.frontiers.values())
    assert dear > mine + 0.1
    assert all(point is not None for point in comparison.at(dear).values())
    rows = comparison.at(dear - 1e-6)
    assert [name for name, point in rows.items() if point is None] == ["dear"]
    frame = comparison.to_frame(dear - 1e-6)
    assert frame.loc["dear"].isna().all()
    assert frame.drop(index="dear").notna().all(axis=None)
    assert comparison.at(mine - 1e-6)["mine"] is None


def test_exits_may_be_named(usual):
    assert usual.to_frame().columns.tolist() == ["accuracy", "cost", "exit_rate_tiny", "exit_rate_mid", "exit_rate_big"]
    assert list(usual.at())[:4] == ["tiny alone", "mid alone", "big", "random exit"]
    assert str(usual).splitlines()[0].split() == ["accuracy", "cost", "tiny", "mid", "big"]


def test_it_prints_the_table(own):
    first, *rows, last = str(own).splitlines()
    assert re.split(r"  +", first.strip()) == ["accuracy", "cost", "exit 0", "exit 1", "full model"]
    cells = [re.split(r"  +", row) for row in rows]
    assert [row[0] for row in cells] == list(own.at())
    printed = np.array([row[1:] for row in cells], dtype=float)
    np.testing.assert_allclose(printed, own.to_frame().to_numpy(), atol=5.1e-5)
    assert len({len(row) for row in [first, *rows]}) == 1
    assert last.endswith("120 samples, held out.")
    assert repr(own) == (
        f"Comparison(2 methods, 7 points of simple rules, 120 samples, full model {TEST.full_accuracy:.4f})"
    )


def test_from_an_estimator(cascade):
    comparison = compare(cascade.outputs_, {"in use": cascade.calibrator_}, exit_names=cascade.exit_names)
    point = cascade.calibrator_.point_
    assert comparison.to_frame().loc["in use", ["accuracy", "cost"]].tolist() == [point.accuracy, point.cost]
    assert list(comparison.at())[:2] == ["saver alone", "base"]


def test_without_pandas(own, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match="to_frame needs pandas: pip install pandas"):
        own.to_frame()
    assert str(own)


def test_routers_learn_from_the_training_outputs():
    rng = np.random.default_rng(0)

    def outputs(n):
        labels = rng.integers(0, 3, n)
        return ExitOutputs.from_logits(rng.normal(size=(3, n, 3)) + 2 * np.eye(3)[labels], labels, costs=[1, 2, 3])

    tune, learn, test = outputs(80), outputs(120), outputs(60)
    learner = EMRouter(prior="global", epochs=2, n_points=5)
    comparison = compare(tune, {"router": learner}, test=test, training=learn)
    expected = learner.fit(tune, training=learn).pareto(test)
    assert comparison.frontiers["router"].accuracy.tolist() == expected.accuracy.tolist()
    assert comparison.frontiers["router"].cost.tolist() == expected.cost.tolist()
    without = compare(tune, {"router": EMRouter(prior="global", epochs=2, n_points=5)}, test=test)
    assert without.frontiers["router"].cost.tolist() != expected.cost.tolist()
