import sys
from functools import partial

import matplotlib
import numpy as np
import pytest

from adaptexit import CascadeSaver, JobRatioDisplay, ParetoDisplay
from tests.nets import digits, large_trained, middle_trained, small_trained

matplotlib.use("Agg")
from matplotlib import pyplot

TRAIN, VAL, TEST = digits()


@pytest.fixture(scope="module")
def cascade():
    return CascadeSaver(large_trained(), small_trained()).fit(*VAL)


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def labels_of(display):
    return [text.get_text() for text in display.ax_.get_legend().get_texts()]


def markers_of(display):
    """Positions of the single points, by label."""
    return {dots.get_label(): tuple(dots.get_offsets()[0]) for dots in display.ax_.collections}


# -- the curve --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "budget"), [((), None), ((), 0.3), (TEST, None), (TEST, 0.3)], ids=["", "budget", "data", "both"]
)
def test_the_curve_of_an_estimator(cascade, data, budget):
    frontier, calibrated = cascade.pareto(*data), cascade.pareto()
    display = ParetoDisplay.from_estimator(cascade, *data, budget=budget, name="digits").plot()
    assert np.array_equal(display.line_.get_xdata(), frontier.cost)
    assert np.array_equal(display.line_.get_ydata(), frontier.accuracy)
    index = calibrated.points.index(cascade.calibrator_.operating_point(budget))
    chosen = (frontier.cost[index], frontier.accuracy[index])
    assert display.chosen == chosen
    assert markers_of(display) == {
        "saver": pytest.approx((frontier.fixed_cost[0], frontier.fixed_accuracy[0])),
        "base": pytest.approx((1.0, frontier.full_accuracy)),
        "in use": pytest.approx(chosen),
    }
    assert labels_of(display) == ["digits", "saver", "base", "in use"]
    assert display.figure_ is display.ax_.figure
    assert "relative cost" in display.ax_.get_xlabel()
    assert display.ax_.get_ylabel() == "accuracy"


def test_the_curve_of_a_frontier(cascade):
    frontier = cascade.pareto(*TEST)
    plain = ParetoDisplay.from_frontier(frontier).plot()
    assert labels_of(plain) == ["operating points", "exit 0 alone", "full model"]
    assert "in use" not in markers_of(plain)
    marked = ParetoDisplay.from_frontier(frontier, budget=0.2, exit_names=["tiny", "big"], name="curve").plot()
    point = frontier.at(budget=0.2)
    assert markers_of(marked)["in use"] == pytest.approx((point.cost, point.accuracy))
    assert labels_of(marked) == ["curve", "tiny", "big", "in use"]


def test_the_chosen_budget_is_marked_by_a_line(cascade):
    display = ParetoDisplay.from_frontier(cascade.pareto(), budget=0.2).plot()
    (line,) = [line for line in display.ax_.lines if line.get_linestyle() == ":"]
    assert line.get_xdata() == [cascade.pareto().at(budget=0.2).cost] * 2


def test_a_budget_that_cannot_be_met(cascade):
    with pytest.raises(ValueError, match="budget must be at least"):
        ParetoDisplay.from_estimator(cascade, budget=0.001)


def test_several_savers():
    fitted = CascadeSaver(large_trained(), [small_trained(), middle_trained()]).fit(*VAL)
    display = ParetoDisplay.from_estimator(fitted).plot()
    assert labels_of(display) == ["operating points", "saver[0]", "saver[1]", "base", "in use"]


def test_frontiers_plot_themselves(cascade):
    _, ax = pyplot.subplots()
    display = cascade.pareto().plot(ax, name="short", linewidth=3.0)
    assert isinstance(display, ParetoDisplay)
    assert display.ax_ is ax
    assert display.line_.get_linewidth() == 3.0
    assert labels_of(display)[0] == "short"


def test_styles_and_names_are_the_callers(cascade):
    display = ParetoDisplay.from_frontier(cascade.pareto(), name="given")
    assert labels_of(display.plot(marker="x", color="red"))[0] == "given"
    assert display.line_.get_marker() == "x"
    assert display.line_.get_color() == "red"
    assert labels_of(display.plot(name="now"))[0] == "now"
    assert display.name == "given"


# -- the job ratio ----------------------------------------------------------------------------------------------------


def test_the_job_ratio_of_an_estimator(cascade):
    display = JobRatioDisplay.from_estimator(cascade).plot()
    saver, base = cascade.outputs_.graded
    order = np.argsort(-cascade.outputs_.scores[0], kind="stable")
    ranks = np.arange(1, len(order) + 1)
    x, y = display.saver_line_.get_data()
    places = np.rint(x * len(order)).astype(int) - 1
    assert x[-1] == 1.0
    np.testing.assert_allclose(y, (np.cumsum(saver[order]) / ranks)[places])
    np.testing.assert_allclose(display.base_line_.get_ydata(), (np.cumsum(base[order]) / ranks)[places])
    assert display.job_ratio == cascade.saver_reports_[0].job_ratio
    (marked,) = markers_of(display).items()
    assert marked[0] == f"job ratio {display.job_ratio:.3f}"
    crossing = int(np.flatnonzero(x == display.job_ratio)[0])
    assert marked[1] == pytest.approx((display.job_ratio, y[crossing]))
    assert labels_of(display)[:2] == ["saver", "base"]


def test_the_job_ratio_on_other_data(cascade):
    outputs = cascade.record(*TEST)
    display = JobRatioDisplay.from_estimator(cascade, *TEST)
    again = JobRatioDisplay.from_curve(cascade.job_curve(0, *TEST), saver_name="tiny", base_name="big")
    assert display.saver_accuracy[-1] == pytest.approx(outputs.accuracies[0])
    assert display.base_accuracy[-1] == pytest.approx(outputs.full_accuracy)
    assert np.array_equal(again.saver_accuracy, display.saver_accuracy)
    assert labels_of(again.plot())[:2] == ["tiny", "big"]


def test_the_job_ratio_of_one_of_several_savers():
    fitted = CascadeSaver(large_trained(), [small_trained(), middle_trained()]).fit(*VAL)
    display = JobRatioDisplay.from_estimator(fitted, saver=1).plot()
    assert display.saver_accuracy[-1] == pytest.approx(fitted.outputs_.accuracies[1])
    assert labels_of(display)[:2] == ["saver[1]", "base"]


def test_no_crossing_is_not_marked():
    display = JobRatioDisplay(exit_ratio=[0.5, 1.0], saver_accuracy=[0.0, 0.1], base_accuracy=[1.0, 1.0], job_ratio=0.0)
    assert markers_of(display.plot()) == {}


# -- both -------------------------------------------------------------------------------------------------------------

MAKERS = {
    "pareto": lambda cascade: ParetoDisplay.from_estimator(cascade, budget=0.3),
    "job ratio": lambda cascade: JobRatioDisplay.from_estimator(cascade),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_plot_returns_itself_and_keeps_its_data(cascade, make):
    display = make(cascade)
    before = {name: np.copy(value) for name, value in vars(display).items() if isinstance(value, np.ndarray)}
    others = {name: value for name, value in vars(display).items() if name not in before}
    assert display.plot() is display
    assert display.plot() is display
    assert len(before) >= 3
    assert all(np.array_equal(getattr(display, name), value) for name, value in before.items())
    assert all(getattr(display, name) is value for name, value in others.items())


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_plot_goes_on_given_axes_or_on_a_new_figure(cascade, make):
    _, (left, right) = pyplot.subplots(1, 2)
    display = make(cascade).plot(right)
    assert display.ax_ is right
    assert display.figure_ is right.figure
    assert not left.lines
    new = make(cascade).plot()
    assert new.figure_ is not right.figure
    assert len(pyplot.get_fignums()) == 2


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_without_matplotlib(cascade, make, monkeypatch):
    display = make(cascade)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for plot in (display.plot, partial(display.plot, object()), cascade.pareto().plot):
        with pytest.raises(ImportError, match=r"pictures need matplotlib: pip install matplotlib"):
            plot()


def test_frames_without_pandas(cascade, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_frame needs pandas: pip install pandas"):
        cascade.pareto().to_frame()


def test_displays_are_made_by_keyword():
    with pytest.raises(TypeError, match="positional"):
        ParetoDisplay([1.0], [1.0], [1.0], [1.0])
    with pytest.raises(TypeError, match="positional"):
        JobRatioDisplay([1.0], [1.0], [1.0], 1.0)
