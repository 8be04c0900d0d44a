import matplotlib
import numpy as np
import pytest

from adaptexit import AnytimeDisplay, evaluate_settings
from tests.test_evaluation import FEW, PAIR, recorded

matplotlib.use("Agg")
from matplotlib import pyplot

STATIC = {"ResNet": (3e6, 0.6), "DenseNet": (4e6, 0.7)}
CURVES = {"a": ([2.0, 5.0], [0.7, 0.9])}


@pytest.fixture(scope="module")
def two():
    return evaluate_settings({"one": PAIR, "other": (recorded(2, 4), recorded(3, 4))}, calibrator=FEW, n_budgets=7)


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def names_in(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_both_settings_of_every_model_in_millions(two):
    display = AnytimeDisplay.from_evaluation(two).plot()
    for setting in ("anytime", "budgeted"):
        assert list(display.lines_[setting]) == ["one", "other"]
        for name, line in display.lines_[setting].items():
            curve = getattr(two, setting)[name]
            assert line.get_xdata() == pytest.approx(curve.cost / 1e6)
            assert line.get_ydata().tolist() == curve.accuracy.tolist()
    left, right = display.ax_
    assert set(display.lines_["anytime"].values()) == set(left.lines)
    assert set(display.lines_["budgeted"].values()) == set(right.lines)
    assert (left.get_title(), right.get_title()) == ("anytime prediction", "budgeted batch classification")
    assert (left.get_xlabel(), right.get_xlabel()) == ("M MACs of a sample", "mean M MACs of a sample")
    assert left.get_ylabel() == "accuracy"
    assert left.get_legend() is None
    assert names_in(right.get_legend()) == ["one", "other"]
    assert display.figure_ is left.figure is right.figure


def test_a_model_has_one_colour_in_both_panels_and_every_exit_a_marker(two):
    display = AnytimeDisplay.from_evaluation(two).plot()
    colours = {}
    for name in ("one", "other"):
        left, right = (display.lines_[setting][name] for setting in ("anytime", "budgeted"))
        assert left.get_color() == right.get_color()
        assert left.get_marker() == right.get_marker() != "None"
        assert left.get_markevery() is None
        colours[left.get_color()] = left.get_marker()
    assert len(colours) == len(set(colours.values())) == 2


def test_static_models_are_points_in_both_panels(two):
    display = two.plot(static=STATIC)
    for setting in ("anytime", "budgeted"):
        places = {name: dots.get_offsets().tolist() for name, dots in display.points_[setting].items()}
        assert places == {"ResNet": [[3.0, 0.6]], "DenseNet": [[4.0, 0.7]]}
    assert names_in(display.ax_[1].get_legend()) == ["one", "other", *STATIC]


def test_a_model_may_be_in_one_setting_alone():
    display = AnytimeDisplay(anytime=CURVES, budgeted={"b": ([1.0], [0.5])}).plot()
    assert list(display.lines_["anytime"]) == ["a"]
    assert list(display.lines_["budgeted"]) == ["b"]
    assert display.lines_["anytime"]["a"].get_color() != display.lines_["budgeted"]["b"].get_color()
    assert names_in(display.ax_[1].get_legend()) == ["a", "b"]


@pytest.mark.parametrize(
    ("unit", "factor", "label"),
    [("MACs", 1e9, "G MACs"), ("seconds", 1e-3, "ms"), ("given", 1.0, "cost as given"), (None, 1.0, "cost")],
)
def test_costs_are_in_a_unit_that_reads_well(unit, factor, label):
    cost = np.array([0.5, 2.0]) * factor
    display = AnytimeDisplay(anytime={"a": (cost, [0.7, 0.9])}, budgeted={}, unit=unit).plot()
    assert display.lines_["anytime"]["a"].get_xdata() == pytest.approx([0.5, 2.0])
    assert display.ax_[0].get_xlabel() == f"{label} of a sample"


def test_it_goes_on_given_axes_in_the_callers_style(two):
    figure, panels = pyplot.subplots(1, 2)
    display = two.plot(panels, linewidth=3.0)
    assert display.ax_.tolist() == panels.tolist()
    assert display.figure_ is figure
    assert {line.get_linewidth() for lines in display.lines_.values() for line in lines.values()} == {3.0}
    assert len(pyplot.get_fignums()) == 1


@pytest.mark.parametrize("n", [1, 3])
def test_axes_that_are_not_two(two, n):
    panels = pyplot.subplots(1, n)[1]
    with pytest.raises(ValueError, match=f"ax must hold two axes, for the two settings; got {n}"):
        two.plot(panels)
