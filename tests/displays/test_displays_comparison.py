from itertools import pairwise

import matplotlib
import numpy as np
import pytest

from adaptexit import ThresholdCalibrator
from adaptexit.comparison import compare
from adaptexit.core.baselines import fixed_exits, oracle, patience, random_routing
from adaptexit.displays import BarsDisplay, ComparisonDisplay
from tests.displays.pictures import labels_of
from tests.test_comparison import CALIBRATION, TEST, drawn, methods

matplotlib.use("Agg")
from matplotlib import pyplot


@pytest.fixture(scope="module")
def own():
    return compare(CALIBRATION, methods(), test=TEST)


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def test_every_method_is_a_curve_and_every_rule_a_marker(own):
    display = ComparisonDisplay.from_comparison(own).plot()
    assert list(display.lines_) == ["shared", "tight"]
    for name, line in display.lines_.items():
        assert line.get_xdata().tolist() == own.frontiers[name].cost.tolist()
        assert line.get_ydata().tolist() == own.frontiers[name].accuracy.tolist()
    places = {name: dots.get_offsets().tolist() for name, dots in display.markers_.items()}
    alone = fixed_exits(TEST)
    assert places == {
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


def test_the_full_model_is_called_as_its_exit():
    usual = compare(CALIBRATION, test=TEST, exit_names=["tiny", "mid", "big"])
    assert labels_of(ComparisonDisplay.from_comparison(usual).plot())[-1] == "big"


def test_a_single_exit_is_drawn():
    comparison = compare(drawn(0, n=20, n_exits=1), {"mine": ThresholdCalibrator(n_points=6)})
    display = ComparisonDisplay.from_comparison(comparison).plot()
    display.figure_.canvas.draw()
    assert labels_of(display) == ["mine", "random exit", "oracle", "full model"]


def test_many_curves_differ_without_colour():
    curve = ([0.1, 1.0], [0.5, 0.9])
    display = ComparisonDisplay(
        curves={f"method {i}": curve for i in range(20)}, rules={f"rule {i}": curve for i in range(9)}, full=(1.0, 0.9)
    ).plot()
    styles = [(line.get_marker(), str(line.get_linestyle()), line._dash_pattern) for line in display.lines_.values()]
    assert len(set(map(str, styles))) == 20
    assert all(before[0] != after[0] for before, after in pairwise(styles))
    assert all(before[2] != after[2] for before, after in pairwise(styles))
    assert len({dots.get_paths()[0].vertices.tobytes() for dots in display.markers_.values()}) == 10


def test_every_row_of_the_table_is_a_pair_of_bars(own):
    for choice, words in (
        ({}, "each method's own operating point"),
        ({"budget": 0.7}, "budget 0.70"),
        ({"max_drop": 0.05}, "max_drop 0.05"),
    ):
        frame = own.to_frame(**choice)
        display = BarsDisplay.from_comparison(own, **choice).plot()
        assert display.ax_.get_legend().get_title().get_text() == words
        assert display.accuracy_bars_[0].get_hatch() != display.cost_bars_[0].get_hatch()
        assert [tick.get_text() for tick in display.ax_.get_yticklabels()] == frame.index.tolist()
        places = display.ax_.get_yticks()
        for bars, name, side in ((display.accuracy_bars_, "accuracy", -1), (display.cost_bars_, "cost", 1)):
            assert [bar.get_width() for bar in bars] == frame[name].tolist()
            middles = [bar.get_y() + bar.get_height() / 2 for bar in bars]
            assert all(0 < side * (m - p) < 0.3 for m, p in zip(middles, places, strict=True))
        assert display.ax_.yaxis_inverted()
        texts = [text.get_text() for text in display.ax_.texts]
        assert texts == [f"{v:.3f}" for name in ("accuracy", "cost") for v in frame[name]]
        assert labels_of(display) == ["accuracy", "mean relative cost"]


def test_a_method_with_nothing_within_the_budget_says_so(own):
    display = BarsDisplay.from_comparison(own, 0.01).plot()
    rows = list(own.at())
    heights = {text.get_text(): text.get_position()[1] for text in display.ax_.texts if "none" in text.get_text()}
    assert heights == {"none within the budget": rows.index("tight")}
    for name in methods():
        assert np.isnan(display.accuracy[rows.index(name)])
        assert display.accuracy_bars_[rows.index(name)].get_width() == 0
    texts = [text.get_text() for text in display.ax_.texts]
    assert texts.count("") == 2 * len(methods())
    assert texts.count("none within the budget") == len(methods())


def test_pictures_go_on_given_axes_in_the_callers_style(own):
    figure, (first, second) = pyplot.subplots(1, 2)
    curves = ComparisonDisplay.from_comparison(own).plot(first, linewidth=3.0)
    bars = BarsDisplay.from_comparison(own).plot(second, alpha=0.5)
    assert (curves.ax_, bars.ax_) == (first, second)
    assert curves.figure_ is bars.figure_ is figure
    assert {line.get_linewidth() for line in curves.lines_.values()} == {3.0}
    assert {bar.get_alpha() for bar in (*bars.accuracy_bars_, *bars.cost_bars_)} == {0.5}
    assert len(pyplot.get_fignums()) == 1


def test_displays_are_made_by_keyword():
    with pytest.raises(TypeError, match="positional"):
        ComparisonDisplay({}, {}, (1.0, 1.0))
    with pytest.raises(TypeError, match="positional"):
        BarsDisplay([], [], [])
