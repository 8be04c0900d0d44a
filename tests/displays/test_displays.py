import ast
import copy
import sys
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from sklearn.exceptions import NotFittedError

import adaptexit.displays
from adaptexit import CascadeSaver, JobRatioDisplay, ParetoDisplay, SweepDisplay
from adaptexit.core.frontier import ParetoFrontier, evaluate
from adaptexit.core.metrics import exemplars, exit_calibration, flow, survivor_shift
from adaptexit.core.outputs import ExitOutputs
from adaptexit.displays import ExemplarDisplay, ExitFlowDisplay, ReliabilityDisplay
from adaptexit.displays.shared import ONE_ERROR, choice
from tests.displays.pictures import cascade_by_margin, labels_of
from tests.nets import digits, large_trained, middle_trained, small_trained

matplotlib.use("Agg")
from matplotlib import pyplot

TRAIN, VAL, TEST = digits()


@pytest.fixture(scope="module")
def by_margin():
    return cascade_by_margin()


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def markers_of(display):
    """Positions of the single points, by label."""
    points = [dots for dots in display.ax_.collections if dots is not getattr(display, "band_", None)]
    return {dots.get_label(): tuple(dots.get_offsets()[0]) for dots in points}


# -- the curve --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "budget"), [((), None), ((), 0.3), (TEST, None), (TEST, 0.3)], ids=["", "budget", "data", "both"]
)
def test_the_curve_of_an_estimator(cascade, data, budget):
    frontier, calibrated = cascade.pareto(*data), cascade.pareto()
    display = ParetoDisplay.from_estimator(cascade, *data, budget=budget, name="digits").plot()
    assert np.array_equal(display.line_.get_xdata(), frontier.cost)
    assert np.array_equal(display.line_.get_ydata(), frontier.accuracy)
    index = calibrated.index(cascade.operating_point(budget))
    cost, accuracy = frontier.cost[index], frontier.accuracy[index]
    assert display.chosen == (cost, accuracy)
    says = f"{'budget 0.30' if budget else 'in use'}: accuracy {accuracy:.3f} at cost {cost:.2f}"
    assert markers_of(display) == {
        "saver alone": pytest.approx((frontier.fixed_cost[0], frontier.fixed_accuracy[0])),
        "base": pytest.approx((1.0, frontier.full_accuracy)),
        says: pytest.approx((cost, accuracy)),
    }
    assert labels_of(display) == ["digits", ONE_ERROR, "saver alone", "base", says]
    assert display.figure_ is display.ax_.figure
    assert "relative cost" in display.ax_.get_xlabel()
    assert display.ax_.get_ylabel() == "accuracy"


def test_the_curve_of_a_frontier(cascade):
    frontier = cascade.pareto(*TEST)
    plain = ParetoDisplay.from_frontier(frontier).plot()
    assert labels_of(plain) == ["operating points", ONE_ERROR, "exit 0 alone", "full model"]
    display = ParetoDisplay.from_frontier(frontier, budget=0.2, exit_names=["tiny", "big"], name="curve").plot()
    point = frontier.at(budget=0.2)
    *others, says = labels_of(display)
    assert others == ["curve", ONE_ERROR, "tiny alone", "big"]
    assert says == f"budget 0.20: accuracy {point.accuracy:.3f} at cost {point.cost:.2f}"
    assert markers_of(display)[says] == pytest.approx((point.cost, point.accuracy))


def test_the_point_for_an_allowed_drop(cascade):
    frontier, point = cascade.pareto(*TEST), cascade.pareto(*TEST).at(max_drop=0.02)
    for display in (
        ParetoDisplay.from_frontier(frontier, max_drop=0.02),
        ParetoDisplay.from_estimator(cascade, *TEST, max_drop=0.02),
    ):
        assert display.chosen == (point.cost, point.accuracy)
        assert labels_of(display.plot())[-1].startswith("max_drop 0.02: accuracy")
    with pytest.raises(ValueError, match="exactly one of budget and max_drop"):
        ParetoDisplay.from_frontier(frontier, budget=0.3, max_drop=0.02)
    with pytest.raises(ValueError, match="at most one of budget, max_drop"):
        ParetoDisplay.from_estimator(cascade, budget=0.3, max_drop=0.02)


def test_the_estimators_own_budget_is_said():
    fitted = CascadeSaver(large_trained(), small_trained(), budget=0.25).fit(*VAL)
    assert ParetoDisplay.from_estimator(fitted).chosen_by == "budget 0.25"
    assert ParetoDisplay.from_estimator(fitted, max_drop=0.02).chosen_by == "max_drop 0.02"


@pytest.mark.parametrize(
    ("budget", "max_drop", "words"),
    [
        (0.4, None, "budget 0.40"),
        (0.125, None, "budget 0.125"),
        (1 / 3, None, "budget 0.3333"),
        (1, None, "budget 1.00"),
        (np.float32(0.5), None, "budget 0.50"),
        (None, 0.0, "max_drop 0.00"),
        (None, 0.005, "max_drop 0.005"),
        (None, None, None),
    ],
)
def test_what_chose_a_point_in_words(budget, max_drop, words):
    assert choice(budget, max_drop) == words


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
    assert labels_of(display)[:-1] == ["operating points", ONE_ERROR, "saver[0] alone", "saver[1] alone", "base"]


def shape_of(dots):
    return dots.get_paths()[0].vertices.tobytes()


def test_exits_have_a_marker_each():
    display = ParetoDisplay(
        cost=[0.1, 1.0], accuracy=[0.5, 0.9], fixed_cost=np.linspace(0.1, 1.0, 12), fixed_accuracy=np.full(12, 0.5)
    ).plot()
    assert len({shape_of(dots) for dots in display.ax_.collections}) == 12


def test_curves_on_the_same_axes_differ_without_colour(cascade):
    _, ax = pyplot.subplots()
    lines = [cascade.pareto(*data).plot(ax, name=name).line_ for name, data in (("one", ()), ("two", TEST))]
    assert lines[0].get_marker() != lines[1].get_marker()
    assert lines[0].get_linestyle() != lines[1].get_linestyle()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["one", ONE_ERROR, "exit 0 alone", "full model", "two"]


def edges_of(band, cost):
    """Of a shaded band of P points: the lower edge as it runs to the right, and the upper one, (P, 2) each."""
    (path,) = band.get_paths()
    vertices, n = path.vertices, len(cost)
    return vertices[1 : n + 1], vertices[n + 2 : 2 * n + 2][::-1]


@pytest.mark.parametrize("data", [(), TEST], ids=["calibrated", "on other data"])
def test_one_standard_error_is_shaded_around_the_curve_in_its_colour(cascade, data):
    frontier = cascade.pareto(*data)
    display = ParetoDisplay.from_frontier(frontier).plot(color="red")
    errors = np.array([point.accuracy_se for point in frontier.points])
    assert errors.max() > 0.005
    assert display.accuracy_se.tolist() == errors.tolist()
    lower, upper = edges_of(display.band_, frontier.cost)
    np.testing.assert_allclose(lower, np.column_stack([frontier.cost, frontier.accuracy - errors]))
    np.testing.assert_allclose(upper, np.column_stack([frontier.cost, frontier.accuracy + errors]))
    *colour, alpha = display.band_.get_facecolor()[0]
    assert colour == [1.0, 0.0, 0.0]
    assert 0 < alpha < 0.3
    assert display.band_.get_zorder() < display.line_.get_zorder()


def test_bands_of_several_curves_are_each_in_their_curves_colour_and_explained_once(cascade):
    _, ax = pyplot.subplots()
    displays = [cascade.pareto(*data).plot(ax, name=name) for name, data in (("one", ()), ("two", TEST))]
    colours = [display.band_.get_facecolor()[0, :3].tolist() for display in displays]
    assert colours == [list(matplotlib.colors.to_rgb(display.line_.get_color())) for display in displays]
    assert colours[0] != colours[1]
    assert labels_of(displays[1]).count(ONE_ERROR) == 1


def test_nothing_is_shaded_where_it_is_not_wanted_or_no_error_is_known(cascade):
    curve = {"cost": [0.1, 1.0], "accuracy": [0.5, 0.9], "fixed_cost": [0.1, 1.0], "fixed_accuracy": [0.5, 0.9]}
    for display in (
        ParetoDisplay.from_frontier(cascade.pareto()).plot(errors=False),
        ParetoDisplay(**curve).plot(),
        ParetoDisplay(**curve, accuracy_se=[0.0, 0.0]).plot(),
    ):
        assert display.band_ is None
        assert ONE_ERROR not in labels_of(display)
        assert len(display.ax_.collections) == 2
    assert ParetoDisplay(**curve, accuracy_se=[0.0, 0.01]).plot().band_ is not None


@pytest.mark.parametrize("style", [{}, {"color": "red"}])
def test_whether_errors_are_shaded_is_true_or_false(cascade, style):
    with pytest.raises(TypeError, match=r"errors must be True or False; got 0\.05"):
        cascade.pareto().plot(errors=0.05, **style)


def test_frontiers_plot_themselves(cascade):
    _, ax = pyplot.subplots()
    display = cascade.pareto().plot(ax, name="short", linewidth=3.0)
    assert isinstance(display, ParetoDisplay)
    assert display.ax_ is ax
    assert display.line_.get_linewidth() == 3.0
    assert labels_of(display)[0] == "short"


def test_styles_and_names_are_the_callers(cascade):
    display = ParetoDisplay.from_frontier(cascade.pareto(), name="mine")
    assert labels_of(display.plot(marker="x", color="red"))[0] == "mine"
    assert display.line_.get_marker() == "x"
    assert display.line_.get_color() == "red"
    assert labels_of(display.plot(name="now"))[0] == "now"
    assert display.name == "mine"


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
    crossing = int(np.flatnonzero(x == display.job_ratio)[0])
    where = pytest.approx((display.job_ratio, y[crossing]))
    assert markers_of(display) == {f"job ratio {display.job_ratio:.3f}": where}
    assert labels_of(display)[:2] == ["saver", "base"]
    assert display.saver_line_.get_marker() != display.base_line_.get_marker()
    assert display.saver_line_.get_linestyle() != display.base_line_.get_linestyle()


def test_the_job_ratio_on_other_data(cascade):
    outputs = cascade.record(*TEST)
    display = JobRatioDisplay.from_estimator(cascade, *TEST)
    again = JobRatioDisplay.from_curve(cascade.job_curve(0, *TEST), saver_name="tiny", base_name="big")
    assert display.saver_accuracy[-1] == pytest.approx(outputs.accuracies[0])
    assert display.base_accuracy[-1] == pytest.approx(outputs.full_accuracy)
    assert np.array_equal(again.saver_accuracy, display.saver_accuracy)
    assert labels_of(again.plot())[:2] == ["tiny", "big"]


def test_the_job_ratio_of_outputs(by_margin):
    outputs = by_margin.calibrator_.rescored(by_margin.record(*TEST))
    display = JobRatioDisplay.from_outputs(outputs, exit_names=by_margin.exit_names)
    same = JobRatioDisplay.from_estimator(by_margin, *TEST)
    for name in ("exit_ratio", "saver_accuracy", "base_accuracy", "job_ratio", "saver_name", "base_name"):
        assert np.array_equal(getattr(display, name), getattr(same, name))
    assert labels_of(JobRatioDisplay.from_outputs(outputs).plot())[:2] == ["exit 0", "full model"]
    for saver in (1, -1, "saver"):
        with pytest.raises(ValueError, match=rf"saver must be one of 0 \.\.\. 0; got {saver!r}"):
            JobRatioDisplay.from_outputs(outputs, saver)
    with pytest.raises(TypeError, match="outputs must be ExitOutputs"):
        JobRatioDisplay.from_outputs(by_margin)


def test_the_job_ratio_is_that_of_the_score_that_is_thresholded(by_margin):
    display = JobRatioDisplay.from_estimator(by_margin)
    assert display.job_ratio == by_margin.saver_reports_[0].job_ratio
    assert not np.array_equal(display.saver_accuracy, JobRatioDisplay.from_outputs(by_margin.outputs_).saver_accuracy)


def test_the_job_ratio_of_one_of_several_savers():
    fitted = CascadeSaver(large_trained(), [small_trained(), middle_trained()]).fit(*VAL)
    display = JobRatioDisplay.from_estimator(fitted, saver=1).plot()
    assert display.saver_accuracy[-1] == pytest.approx(fitted.outputs_.accuracies[1])
    assert labels_of(display)[:2] == ["saver[1]", "base"]


def test_no_crossing_is_not_marked():
    display = JobRatioDisplay(exit_ratio=[0.5, 1.0], saver_accuracy=[0.0, 0.1], base_accuracy=[1.0, 1.0], job_ratio=0.0)
    assert markers_of(display.plot()) == {}


# -- sweeps -----------------------------------------------------------------------------------------------------------


def swept(values, knob="cost_weight", extra=()):
    rng = np.random.default_rng(0)
    outputs = ExitOutputs(
        predictions=rng.integers(0, 3, (3, 50)), scores=rng.random((3, 50)), labels=rng.integers(0, 3, 50),
        n_classes=3, costs=[1.0, 2.0, 3.0],
    )  # fmt: skip
    levels = np.linspace(0.9, 0.1, len(values))
    points = [
        evaluate(outputs, *[np.array([level, level, -np.inf])] * 2, {knob: value})
        for level, value in zip(levels, values, strict=True)
    ]
    off = np.array([np.inf, np.inf, -np.inf])
    return ParetoFrontier.of([*points, *(evaluate(outputs, off, off, params) for params in extra)], outputs)


def test_a_sweep_by_its_knob():
    frontier = swept([3.0, 0.1, 1.0], extra=[{}])
    display = SweepDisplay.from_frontier(frontier, exit_names=["a", "b", "big"]).plot()
    assert display.values.tolist() == [0.1, 1.0, 3.0]
    points = {point.params["cost_weight"]: point for point in frontier.points if point.params}
    assert display.accuracy_.get_ydata().tolist() == [points[value].accuracy for value in display.values]
    assert display.cost_.get_ydata().tolist() == [points[value].cost for value in display.values]
    assert display.accuracy_.get_marker() != display.cost_.get_marker()
    assert display.accuracy_.get_linestyle() != display.cost_.get_linestyle()
    assert [area.get_label() for area in display.areas_] == ["a", "b", "big"]
    top = [max(y for x, y in area.get_paths()[0].vertices if x == 1.0) for area in display.areas_]
    np.testing.assert_allclose(top, np.cumsum(points[1.0].exit_rates))
    assert display.ax_.get_xscale() == "log"
    assert display.ax_.get_xlabel() == "cost weight"


@pytest.mark.parametrize(
    ("values", "scale"),
    [([0.1, 0.2, 0.3], "linear"), ([0.0, 0.1, 5.0], "symlog"), ([0.1, 5.0], "log"), ([0.0], "linear")],
)
def test_the_axis_of_a_sweep(values, scale):
    display = SweepDisplay.from_frontier(swept(values, "margin"), "margin").plot(linewidth=5.0)
    assert display.ax_.get_xscale() == scale
    assert display.cost_.get_linewidth() == 5.0


def test_a_sweep_by_a_knob_that_no_point_has():
    with pytest.raises(ValueError, match=r"knob must be among the params of the frontier's points, \['margin'\]; got"):
        SweepDisplay.from_frontier(swept([1.0], "margin"))


# -- all --------------------------------------------------------------------------------------------------------------

MAKERS = {
    "pareto": lambda cascade: ParetoDisplay.from_estimator(cascade, budget=0.3),
    "job ratio": lambda cascade: JobRatioDisplay.from_estimator(cascade),
    "flow": lambda cascade: ExitFlowDisplay.from_estimator(cascade),
    "exemplars": lambda cascade: ExemplarDisplay.from_estimator(cascade, *VAL),
}
PANELS = {"reliability": lambda cascade: ReliabilityDisplay.from_estimator(cascade)}
ALL = MAKERS | PANELS


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_plot_returns_itself_and_keeps_its_data(cascade, make):
    display = make(cascade)
    data, before = dict(vars(display)), copy.deepcopy(vars(display))
    assert display.plot() is display
    assert display.plot() is display
    assert data
    assert all(getattr(display, name) is value for name, value in data.items())
    np.testing.assert_equal(data, before)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_plot_goes_on_given_axes_or_on_a_new_figure(cascade, make):
    _, (empty, ax) = pyplot.subplots(1, 2)
    display = make(cascade).plot(ax)
    assert display.ax_ is ax
    assert display.figure_ is ax.figure
    assert not empty.lines
    new = make(cascade).plot()
    assert new.figure_ is not ax.figure
    assert len(pyplot.get_fignums()) == 2


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
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
    with pytest.raises(TypeError, match="positional"):
        ExitFlowDisplay([[1, 2], [1, 0]])
    with pytest.raises(TypeError, match="positional"):
        ReliabilityDisplay(*6 * [[1.0]])
    with pytest.raises(TypeError, match="positional"):
        ExemplarDisplay([], [], [])


@pytest.mark.parametrize("number", [0, 1.5, True])
def test_numbers_of_bins_and_of_examples(cascade, number):
    with pytest.raises(ValueError, match=f"n_bins must be a whole number, at least 1; got {number}"):
        ReliabilityDisplay.from_estimator(cascade, n_bins=number)
    with pytest.raises(ValueError, match=f"n must be a whole number, at least 1; got {number}"):
        ExemplarDisplay.from_estimator(cascade, *TEST, n=number)


def test_what_happens_at_the_exits_of_an_estimator(cascade):
    point, outputs = cascade.operating_point(0.3), cascade.record(*TEST)
    for figures, expected in (
        (cascade.exit_calibration(*TEST, budget=0.3, n_bins=4), exit_calibration(outputs, point, 4)),
        (cascade.survivor_shift(*TEST, budget=0.3), survivor_shift(outputs, point)),
    ):
        for name, value in vars(expected).items():
            assert np.array_equal(getattr(figures, name), value, equal_nan=True)
    assert np.array_equal(cascade.exit_flow(*TEST, budget=0.3), flow(outputs, point))
    ours, theirs = (
        [[strip.samples.tolist() for strip in pair] for pair in examples.strips]
        for examples in (cascade.exemplars(*TEST, budget=0.3), exemplars(outputs, point))
    )
    assert ours == theirs


def test_displays_import_nothing_else_of_the_package():
    for path in Path(adaptexit.displays.__file__).parent.glob("*.py"):
        for line in ast.parse(path.read_text()).body:
            if isinstance(line, (ast.Import, ast.ImportFrom)):
                names = [line.module] if isinstance(line, ast.ImportFrom) else [alias.name for alias in line.names]
                assert all(not name.startswith("adaptexit") or name.startswith("adaptexit.displays") for name in names)
                assert all(name.partition(".")[0] not in ("matplotlib", "pandas", "torch") for name in names)


def test_before_fit():
    for ask in (CascadeSaver.exit_flow, CascadeSaver.exit_calibration, CascadeSaver.survivor_shift):
        with pytest.raises(NotFittedError):
            ask(CascadeSaver(None, None))
