import itertools
import re
from typing import ClassVar

import matplotlib
import numpy as np
import pytest
from sklearn.base import clone

from adaptexit import CascadeSaver, CPMCalibrator, EMRouter, ExitOutputs, ThresholdCalibrator
from adaptexit.comparison import compare
from adaptexit.core.baselines import fixed_exits, oracle, patience, random_routing
from adaptexit.core.frontier import evaluate
from adaptexit.displays.comparison import BarsDisplay, ComparisonDisplay

matplotlib.use("Agg")
from matplotlib import pyplot

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


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


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
        stored = calibrator.frontier_.points
        assert [figures(p) for p in frontier.chosen_on.points] == [figures(p) for p in stored]
        again = [evaluate(TEST, p.thresholds, p.cutoffs) for p in stored]
        assert [figures(p) for p in frontier.points] == [figures(p) for p in again]
        assert stored[own.in_use[name]] is calibrator.point_
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
    display = ComparisonDisplay.from_comparison(comparison).plot()
    assert labels_of(display) == ["mine", "random exit", "oracle", "full model"]


def test_no_method_at_all():
    comparison = compare(CALIBRATION, {})
    assert list(comparison.at()) == [*SIMPLE, "oracle"]
    assert comparison.frontiers == {}


# -- honesty ----------------------------------------------------------------------------------------------------------


class Watched(ThresholdCalibrator):
    """Writes down what it is shown."""

    seen: ClassVar = []

    def fit(self, outputs, y=None):
        self.seen.append(("fit", outputs))
        return super().fit(outputs)

    def rescored(self, outputs):
        self.seen.append(("rescored", outputs))
        return super().rescored(outputs)

    def pareto(self, outputs=None):
        self.seen.append(("pareto", outputs))
        return super().pareto(outputs)


def test_a_method_is_shown_the_test_outputs_once_after_it_was_fitted():
    Watched.seen.clear()
    given = Watched(n_points=4)
    comparison = compare(CALIBRATION, {"watched": given}, test=TEST)
    comparison.at(0.6)
    comparison.to_frame(0.7)
    told = [(what, "calibration" if o is CALIBRATION else "test" if o is TEST else o) for what, o in Watched.seen]
    assert told == [
        ("fit", "calibration"), ("rescored", "calibration"), ("pareto", "test"), ("rescored", "test")
    ]  # fmt: skip
    assert not hasattr(given, "frontier_")


def test_a_budget_is_served_by_what_the_calibration_data_say(own):
    served = set()
    for budget in (None, 0.45, 0.6, 0.8, 1.0):
        for name, calibrator in methods().items():
            expected = calibrator.fit(CALIBRATION).operating_point(budget)
            point = own.at(budget)[name]
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


def test_a_budget_below_the_cheapest_point_leaves_a_row_empty():
    given = {"dear": CPMCalibrator(0.0, margins=[0.0]), "mine": recorded()}
    comparison = compare(CALIBRATION, given, test=TEST)
    dear, mine = (frontier.chosen_on.cost.min() for frontier in comparison.frontiers.values())
    assert dear > mine + 0.1
    assert all(point is not None for point in comparison.at(dear).values())
    found = comparison.at(dear - 1e-6)
    assert [name for name, point in found.items() if point is None] == ["dear"]
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


# -- errors -----------------------------------------------------------------------------------------------------------


def test_outputs_that_are_none():
    with pytest.raises(TypeError, match="outputs must be ExitOutputs; got list"):
        compare([], {})
    with pytest.raises(TypeError, match="test must be ExitOutputs, or None to report on outputs; got tuple"):
        compare(CALIBRATION, {}, test=())


@pytest.mark.parametrize(("shape", "came"), [({"n_exits": 2}, "2 and 4"), ({"n_classes": 5}, "3 and 5")])
def test_test_outputs_of_other_exits_or_classes(shape, came):
    with pytest.raises(ValueError, match=f"test must have the exits and classes of outputs, 3 and 4; got {came}. Rec"):
        compare(CALIBRATION, {}, test=drawn(1, **shape))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([recorded()], TypeError, r"methods must be a dict of names to calibrators, as .*; got list"),
        ({1: recorded()}, TypeError, r"methods must be a dict of names.*; got the key 1"),
        ({"mine": ThresholdCalibrator}, TypeError, r"methods\['mine'\] is the class ThresholdCalibrator: call it"),
        (
            {"mine": CascadeSaver(None, None)},
            TypeError,
            r"methods\['mine'\] is CascadeSaver. Of a fitted",
        ),
        ({"oracle": recorded()}, ValueError, r"called as a simple rule, which 'oracle' is; choose another name"),
        ({"exit 0 alone": recorded()}, ValueError, r"called as a simple rule, which 'exit 0 alone' is"),
    ],
)
def test_methods_that_are_none(given, error, message):
    with pytest.raises(error, match=message):
        compare(CALIBRATION, given)


def test_logits_that_are_missing():
    without = drawn(0, keep_logits=False)
    needing = ThresholdCalibrator("entropy", n_points=4)
    message = r"{} must have logits for methods\['mine'\]; they have none. Record them \(keep_logits=True\)"
    with pytest.raises(ValueError, match=message.format("outputs")):
        compare(without, {"mine": needing}, test=TEST)
    with pytest.raises(ValueError, match=message.format("test")):
        compare(CALIBRATION, {"mine": needing}, test=without)
    fitted = clone(needing).fit(CALIBRATION)
    with pytest.raises(ValueError, match=message.format("outputs")):
        compare(without, {"mine": fitted})
    assert "mine" in compare(without, {"mine": fitted}, test=TEST).frontiers


@pytest.mark.parametrize(
    ("made", "came"),
    [
        (lambda: recorded().fit(drawn(0, n_exits=2)), "2 exits"),
        (lambda: CPMCalibrator(margins=[0.1]).fit(drawn(0, n_classes=3)), "3 exits and 3 classes"),
    ],
)
def test_methods_that_were_fitted_on_other_exits(made, came):
    with pytest.raises(
        ValueError, match=rf"on the 3 exits and 4 classes of outputs, .*; methods\['mine'\] was on {came}. Give clone"
    ):
        compare(CALIBRATION, {"mine": made()})


@pytest.mark.parametrize("names", ["abc", ["a", "b"], ["a", "b", "a"], list("abcd")])
def test_names_that_are_not_one_an_exit(names):
    with pytest.raises(ValueError, match=re.escape(f"exit_names must be 3 distinct names, one an exit; got {names!r}")):
        compare(CALIBRATION, {}, exit_names=names)


@pytest.mark.parametrize("budget", ["cheap", np.nan])
def test_a_budget_that_is_no_number(own, budget):
    for ask in (own.at, own.to_frame, lambda b: BarsDisplay.from_comparison(own, b)):
        with pytest.raises(ValueError, match="budget must be a finite relative cost"):
            ask(budget)


def test_without_pandas(own, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match="to_frame needs pandas: pip install pandas"):
        own.to_frame()
    assert str(own)


# -- pictures ---------------------------------------------------------------------------------------------------------


def labels_of(display):
    return [text.get_text() for text in display.ax_.get_legend().get_texts()]


def test_every_method_is_a_curve_and_every_rule_a_marker(own):
    display = ComparisonDisplay.from_comparison(own).plot()
    assert list(display.lines_) == ["shared", "tight"]
    for name, line in display.lines_.items():
        assert line.get_xdata().tolist() == own.frontiers[name].cost.tolist()
        assert line.get_ydata().tolist() == own.frontiers[name].accuracy.tolist()
    shown = {name: dots.get_offsets().tolist() for name, dots in display.markers_.items()}
    alone = fixed_exits(TEST)
    assert shown == {
        "exits alone": [[p.cost, p.accuracy] for p in alone[:-1]],
        "random exit": [[random_routing(TEST).cost, random_routing(TEST).accuracy]],
        "patience": [[p.cost, p.accuracy] for p in patience(TEST)],
        "oracle": [[oracle(TEST).cost, oracle(TEST).accuracy]],
        "full model": [[1.0, TEST.full_accuracy]],
    }
    assert labels_of(display) == ["shared", "tight", "exits alone", "random exit", "patience", "oracle", "full model"]
    (level,) = [line for line in display.ax_.lines if line not in display.lines_.values()]
    assert set(level.get_ydata()) == {TEST.full_accuracy}
    assert display.ax_.get_xlabel() == "mean relative cost (full model = 1)"
    assert display.ax_.get_ylabel() == "accuracy"
    assert len({dots.get_paths()[0].vertices.tobytes() for dots in display.markers_.values()}) == 5


def test_the_full_model_is_called_as_its_exit(usual):
    assert labels_of(ComparisonDisplay.from_comparison(usual).plot())[-1] == "big"


def test_every_row_of_the_table_is_a_pair_of_bars(own):
    for budget in (None, 0.7):
        frame = own.to_frame(budget)
        display = BarsDisplay.from_comparison(own, budget).plot()
        assert [tick.get_text() for tick in display.ax_.get_yticklabels()] == frame.index.tolist()
        places = display.ax_.get_yticks()
        for bars, name, side in ((display.accuracy_bars_, "accuracy", -1), (display.cost_bars_, "cost", 1)):
            assert [bar.get_width() for bar in bars] == frame[name].tolist()
            middles = [bar.get_y() + bar.get_height() / 2 for bar in bars]
            assert all(0 < side * (m - p) < 0.3 for m, p in zip(middles, places, strict=True))
        assert display.ax_.yaxis_inverted()
        written = [text.get_text() for text in display.ax_.texts]
        assert written == [f"{v:.3f}" for name in ("accuracy", "cost") for v in frame[name]]
        assert labels_of(display) == ["accuracy", "mean relative cost"]


def test_a_method_with_nothing_within_the_budget_says_so(own):
    display = BarsDisplay.from_comparison(own, 0.01).plot()
    rows = list(own.at())
    said = {text.get_text(): text.get_position()[1] for text in display.ax_.texts if "none" in text.get_text()}
    assert said == {"none within the budget": rows.index("tight")}
    for name in methods():
        assert np.isnan(display.accuracy[rows.index(name)])
        assert display.accuracy_bars_[rows.index(name)].get_width() == 0
    written = [text.get_text() for text in display.ax_.texts]
    assert written.count("") == 2 * len(methods())
    assert written.count("none within the budget") == len(methods())


def test_pictures_go_on_given_axes_in_the_callers_style(own):
    _, (left, right) = pyplot.subplots(1, 2)
    curves = ComparisonDisplay.from_comparison(own).plot(left, linewidth=3.0)
    bars = BarsDisplay.from_comparison(own).plot(right, alpha=0.5)
    assert (curves.ax_, bars.ax_) == (left, right)
    assert curves.figure_ is bars.figure_ is left.figure
    assert {line.get_linewidth() for line in curves.lines_.values()} == {3.0}
    assert {bar.get_alpha() for bar in (*bars.accuracy_bars_, *bars.cost_bars_)} == {0.5}
    assert len(pyplot.get_fignums()) == 1


def test_displays_are_made_by_keyword():
    with pytest.raises(TypeError, match="positional"):
        ComparisonDisplay({}, {}, (1.0, 1.0))
    with pytest.raises(TypeError, match="positional"):
        BarsDisplay([], [], [])


def test_routers_learn_from_the_training_outputs():
    rng = np.random.default_rng(0)

    def outputs(n):
        labels = rng.integers(0, 3, n)
        return ExitOutputs.from_logits(rng.normal(size=(3, n, 3)) + 2 * np.eye(3)[labels], labels, costs=[1, 2, 3])

    tune, learn, test = outputs(80), outputs(120), outputs(60)
    router = EMRouter(prior="global", epochs=2, n_points=5)
    found = compare(tune, {"router": router}, test=test, training=learn)
    expected = router.fit(tune, training=learn).pareto(test)
    assert found.frontiers["router"].accuracy.tolist() == expected.accuracy.tolist()
    assert found.frontiers["router"].cost.tolist() == expected.cost.tolist()
    without = compare(tune, {"router": EMRouter(prior="global", epochs=2, n_points=5)}, test=test)
    assert without.frontiers["router"].cost.tolist() != expected.cost.tolist()
