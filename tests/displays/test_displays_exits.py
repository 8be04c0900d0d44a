import matplotlib
import numpy as np
import pytest

from adaptexit import CascadeSaver
from adaptexit.core.frontier import evaluate
from adaptexit.core.metrics import exit_calibration
from adaptexit.core.outputs import ExitOutputs
from adaptexit.displays import ExemplarDisplay, ExitFlowDisplay, ReliabilityDisplay
from tests.displays.pictures import cascade_by_margin, labels_of, margins_of, three_exits
from tests.nets import digits, large_trained, small_trained

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


# -- who is left ------------------------------------------------------------------------------------------------------

COUNTS = [[4, 10, 6, 0], [3, 2, 3, 0], [1, 2, 0, 0]]


def heights_of(display):
    """Of each part of each column, (K, classes in order)."""
    return np.array([[bar.get_height() for bar in column] for column in display.columns_]).T


def test_columns_are_stacked_from_the_class_that_leaves_most_to_the_one_that_leaves_least():
    display = ExitFlowDisplay(counts=COUNTS, class_names="abcd").plot()
    assert display.order_.tolist() == [1, 2, 0]
    assert heights_of(display).tolist() == [[10, 6, 4], [2, 3, 3], [2, 0, 1]]
    floors = [[bar.get_y() for bar in column] for column in display.columns_]
    assert floors == [[10, 6, 1], [4, 3, 1], [0, 0, 0]]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in display.columns_[0]]
    assert centres == pytest.approx([0, 1, 2])
    assert labels_of(display) == ["b", "c", "a"]


def test_where_the_first_exit_tells_nothing_the_next_one_orders():
    display = ExitFlowDisplay(counts=[[4, 4, 4], [4, 4, 4], [3, 1, 3]]).plot()
    assert display.order_.tolist() == [1, 0, 2]
    assert labels_of(display) == ["1", "0", "2"]


def test_bands_join_the_parts_of_their_class():
    display = ExitFlowDisplay(counts=COUNTS).plot()
    assert len(display.bands_) == 3
    for column, bands in zip(display.columns_, display.bands_, strict=True):
        assert len(bands) == 2
        for part, beside, band in zip(column[:-1], column[1:], bands, strict=True):
            outline = band.get_paths()[0].vertices
            begin, end = part.get_x() + part.get_width(), beside.get_x()
            assert (outline[:, 0].min(), outline[:, 0].max()) == pytest.approx((begin, end))
            for x, bar in ((begin, part), (end, beside)):
                touching = outline[np.isclose(outline[:, 0], x), 1]
                assert (touching.min(), touching.max()) == pytest.approx((bar.get_y(), bar.get_y() + bar.get_height()))
            assert band.get_facecolor()[0, :3] == pytest.approx(part.get_facecolor()[:3])


def test_survivors_are_counted_above_their_columns():
    display = ExitFlowDisplay(counts=1000 * np.array(COUNTS), exit_names=["tiny", "mid", "big"]).plot()
    texts = {text.get_text(): text.xy for text in display.ax_.texts}
    assert texts == {"20,000": (0, 20000), "8,000\n40%": (1, 8000), "3,000\n15%": (2, 3000)}
    assert [tick.get_text() for tick in display.ax_.get_xticklabels()] == ["everybody", "after tiny", "after mid"]
    assert all(tick.get_rotation() == 0 for tick in display.ax_.get_xticklabels())
    unnamed = ExitFlowDisplay(counts=COUNTS).plot(name="title")
    assert [tick.get_text() for tick in unnamed.ax_.get_xticklabels()] == ["everybody", "after exit 0", "after exit 1"]
    assert unnamed.ax_.get_title() == "title"


def test_long_names_are_written_aslant():
    display = ExitFlowDisplay(counts=9 * [[4, 3]], exit_names=[f"features.block{k}" for k in range(9)]).plot()
    display.figure_.canvas.draw()
    ticks = display.ax_.get_xticklabels()
    assert {tick.get_rotation() for tick in ticks} == {30}
    corners = [tick.get_window_extent().get_points() for tick in ticks]
    assert all((box >= 0).all() for box in corners)


def test_the_title_says_the_operating_point():
    display = ExitFlowDisplay(counts=COUNTS, chosen=(0.394, 0.8965), chosen_by="budget 0.40")
    assert display.plot().ax_.get_title() == "budget 0.40: accuracy 0.896 at cost 0.39"
    assert display.plot(name="test").ax_.get_title() == "test\nbudget 0.40: accuracy 0.896 at cost 0.39"
    assert ExitFlowDisplay(counts=COUNTS).plot().ax_.get_title() == ""


@pytest.mark.parametrize("n_classes", [10, 11, 25])
def test_the_legend_of_many_classes_lists_the_first_and_the_last(n_classes):
    full = np.full(n_classes, 100)
    display = ExitFlowDisplay(counts=[full, full - np.arange(n_classes)]).plot()
    order = [str(c) for c in range(n_classes)[::-1]]
    assert labels_of(display) == (order if n_classes == 10 else [*order[:5], "…", *order[-5:]])
    handles = display.ax_.get_legend().legend_handles
    for handle, i in ((handles[0], 0), (handles[-1], -1)):
        assert handle.get_facecolor() == display.columns_[i][0].get_facecolor()
    assert len({column[0].get_facecolor() for column in display.columns_}) == n_classes


def test_one_exit_is_one_column():
    display = ExitFlowDisplay(counts=[[2, 3]]).plot()
    assert heights_of(display).tolist() == [[2, 3]]
    assert display.bands_ == [[], []]


def test_ribbons_take_the_callers_style():
    display = ExitFlowDisplay(counts=COUNTS).plot(alpha=0.125)
    assert {band.get_alpha() for bands in display.bands_ for band in bands} == {0.125}


@pytest.mark.parametrize(
    ("data", "budget"), [((), None), ((), 0.3), (TEST, None), (TEST, 0.3)], ids=["", "budget", "data", "both"]
)
@pytest.mark.parametrize("fitted", ["cascade", "by_margin"])
def test_the_flow_of_an_estimator(fitted, data, budget, request):
    fitted = request.getfixturevalue(fitted)
    display = ExitFlowDisplay.from_estimator(fitted, *data, budget=budget)
    X, y = data or VAL
    deep = fitted.trace(X, budget=budget).exits == 1
    assert 0 < deep.sum() < len(y)
    assert display.counts.tolist() == [
        np.bincount(y, minlength=10).tolist(),
        np.bincount(y[deep], minlength=10).tolist(),
    ]
    display.plot()
    assert sorted(labels_of(display)) == [str(c) for c in range(10)]
    assert [tick.get_text() for tick in display.ax_.get_xticklabels()] == ["everybody", "after saver"]


def test_the_estimators_own_budget_counts():
    fitted = CascadeSaver(large_trained(), small_trained(), budget=0.3).fit(*VAL)
    own, same = (ExitFlowDisplay.from_estimator(fitted, budget=budget) for budget in (None, 0.3))
    free = ExitFlowDisplay.from_estimator(fitted, budget=1.0)
    assert own.counts.tolist() == same.counts.tolist() != free.counts.tolist()
    assert (own.chosen_by, free.chosen_by) == ("budget 0.30", "budget 1.00")


def test_classes_may_be_called_otherwise(cascade):
    display = ExitFlowDisplay.from_estimator(cascade, class_names=[f"digit {c}" for c in range(10)]).plot()
    assert sorted(labels_of(display)) == [f"digit {c}" for c in range(10)]


# -- reliability ------------------------------------------------------------------------------------------------------


def reliability_of(outputs, point, n_bins=10, **names):
    return ReliabilityDisplay.from_calibration(exit_calibration(outputs, point, n_bins), **names)


def test_one_panel_for_each_exit_that_somebody_leaves_at():
    display = reliability_of(*three_exits(), 5, exit_names=["tiny", "mid", "big"]).plot()
    assert display.exits_ == [0, 2]
    assert display.ax_.shape == (2,)
    assert len(display.figure_.axes) == 4
    assert [ax.get_title() for ax in display.ax_] == [
        f"tiny\nn = 3, ECE = {(0.55 + 0.15) / 3:.3f}", f"big\nn = 2, ECE = {(0.75 + 0.75) / 2:.3f}"
    ]  # fmt: skip
    unnamed = reliability_of(*three_exits()).plot()
    assert [ax.get_title().partition("\n")[0] for ax in unnamed.ax_] == ["exit 0", "full model"]


def test_panels_show_accuracy_and_numbers_of_samples_of_the_bins():
    display = reliability_of(*three_exits(), 4).plot()
    x, y = display.points_[0].get_data()
    assert (x.tolist(), y.tolist()) == (pytest.approx([0.55, 0.925]), [0.0, 1.0])
    bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in display.bars_[0]]
    assert bars == [pytest.approx((0.5, 0.125, 1)), pytest.approx((0.875, 0.125, 2))]
    assert [text.get_text() for text in display.count_ax_[0].texts] == [f"{bar[2]:.0f}" for bar in bars]
    x, y = display.points_[1].get_data()
    assert (x.tolist(), y.tolist()) == (pytest.approx([0.25, 0.75]), [1.0, 0.0])


def test_panels_join_points_to_the_diagonal():
    display = reliability_of(*three_exits(), 5).plot()
    (stems,) = display.ax_[1].collections
    assert [segment.tolist() for segment in stems.get_segments()] == [
        [[0.25, 0.25], [0.25, 1]],
        [[0.75, 0.75], [0.75, 0]],
    ]
    diagonal = next(line for line in display.ax_[1].lines if line is not display.points_[1])
    assert (diagonal.get_xy1(), diagonal.get_slope()) == ((1.0, 1.0), 1.0)


def test_panels_go_on_given_axes():
    _, grid = pyplot.subplots(1, 3)
    display = reliability_of(*three_exits())
    assert display.plot(grid, marker="x").ax_.tolist() == grid[:2].tolist()
    assert display.points_[0].get_marker() == "x"
    assert not grid[2].lines
    assert display.figure_ is grid[0].figure
    assert len(pyplot.get_fignums()) == 1
    for too_few in (grid[0], grid[:1]):
        with pytest.raises(ValueError, match="ax must hold 2 axes, one for each exit that somebody leaves at; got 1"):
            display.plot(too_few)


def test_panels_have_one_legend():
    display = reliability_of(*three_exits(), chosen=(0.5, 0.75), chosen_by="budget 0.60")
    entries = ["accuracy in the bin", "difference", "score = accuracy", "samples in the bin"]
    own = display.plot()
    assert own.figure_.legends == [own.legend_]
    assert [ax.get_legend() for ax in own.figure_.axes] == 4 * [None]
    assert [text.get_text() for text in own.legend_.get_texts()] == entries
    assert own.figure_.get_suptitle() == "budget 0.60: accuracy 0.750 at cost 0.50"
    _, grid = pyplot.subplots(1, 3)
    on_given = display.plot(grid)
    assert [ax.get_legend() for ax in grid] == [None, on_given.legend_, None]
    assert on_given.figure_.legends == []
    assert [text.get_text() for text in on_given.legend_.get_texts()] == entries
    assert on_given.legend_.get_title().get_text() == "budget 0.60:\naccuracy 0.750 at cost 0.50"


def test_many_panels_take_several_rows():
    outputs = ExitOutputs(
        scores=np.eye(6), predictions=np.zeros((6, 6), dtype=int), labels=np.zeros(6, dtype=int), n_classes=1,
        costs=range(1, 7),
    )  # fmt: skip
    thresholds = np.array([*[0.5] * 5, -np.inf])
    display = reliability_of(outputs, evaluate(outputs, thresholds, thresholds)).plot()
    assert display.ax_.shape == (6,)
    assert len(display.figure_.axes) == 12
    tops = [ax.get_subplotspec().rowspan.start for ax in display.ax_]
    assert tops == [0, 0, 0, 0, 1, 1]
    assert [ax.get_ylabel() for ax in display.ax_] == ["accuracy", "", "", "", "accuracy", ""]


def test_one_panel_may_be_given_its_axes_alone():
    outputs, _ = three_exits()
    nobody_early = evaluate(outputs, *2 * [np.array([np.inf, np.inf, -np.inf])])
    _, ax = pyplot.subplots()
    assert reliability_of(outputs, nobody_early).plot(ax).ax_.tolist() == [ax]


@pytest.mark.parametrize("fitted", ["cascade", "by_margin"])
@pytest.mark.parametrize(("data", "budget"), [((), None), (TEST, 0.3)], ids=["", "both"])
def test_the_reliability_of_an_estimator(fitted, data, budget, request):
    fitted = request.getfixturevalue(fitted)
    display = ReliabilityDisplay.from_estimator(fitted, *data, budget=budget, n_bins=4)
    outputs = fitted.calibrator_.rescored(fitted.record(*data) if data else fitted.outputs_)
    calibration = exit_calibration(outputs, fitted.operating_point(budget), 4)
    for name in ("ece", "n", "edges", "accuracy", "confidence", "count"):
        assert np.array_equal(getattr(display, name), getattr(calibration, name), equal_nan=True)
    exits = fitted.trace((data or VAL)[0], budget=budget).exits
    scores = margins_of(outputs) if fitted.calibrator_.score == "margin" else outputs.scores[0]
    sums = np.nansum(display.confidence * display.count, axis=1)
    assert sums[0] / display.n[0] == pytest.approx(scores[exits == 0].mean())
    assert [ax.get_title().partition("\n")[0] for ax in display.plot().ax_] == ["saver", "base"]


# -- from outputs -----------------------------------------------------------------------------------------------------

EXITS = {
    "flow": (ExitFlowDisplay, ["counts"], ()),
    "reliability": (ReliabilityDisplay, ["ece", "n", "edges", "accuracy", "confidence", "count"], ()),
    "exemplars": (ExemplarDisplay, ["images", "scores", "labels"], (TEST[0],)),
}


@pytest.mark.parametrize("fitted", ["cascade", "by_margin"])
@pytest.mark.parametrize("choice", [{"budget": 0.3}, {"max_drop": 0.02}, {}], ids=["budget", "max_drop", "neither"])
@pytest.mark.parametrize(("kind", "names", "images"), EXITS.values(), ids=EXITS)
def test_outputs_and_a_point_make_the_picture_of_an_estimator(fitted, choice, kind, names, images, request):
    fitted = request.getfixturevalue(fitted)
    calibrator = fitted.calibrator_
    point = calibrator.frontier_.at(**choice) if choice else calibrator.point_
    outputs = calibrator.rescored(fitted.record(*TEST))
    display = kind.from_outputs(outputs, point, *images, exit_names=fitted.exit_names)
    expected = kind.from_estimator(fitted, *TEST, **choice)
    for name in names:
        np.testing.assert_equal(getattr(display, name), getattr(expected, name))
    on_test = evaluate(outputs, point.thresholds, point.cutoffs)
    assert display.chosen == expected.chosen == (on_test.cost, on_test.accuracy)
    assert on_test.accuracy != point.accuracy
    assert display.exit_names == expected.exit_names == ["saver", "base"]
    assert display.chosen_by is None
    says = {"budget": "budget 0.30", "max_drop": "max_drop 0.02"}
    assert expected.chosen_by == says.get(next(iter(choice), None), "in use")


def titles_of(figure):
    return [figure.get_suptitle(), *(ax.get_title() for ax in figure.axes)]


@pytest.mark.parametrize(("kind", "names", "images"), EXITS.values(), ids=EXITS)
def test_pictures_say_what_chose_the_point(cascade, kind, names, images):
    on_test = evaluate(
        cascade.record(*TEST), cascade.operating_point(0.3).thresholds, cascade.operating_point(0.3).cutoffs
    )
    figures = f"accuracy {on_test.accuracy:.3f} at cost {on_test.cost:.2f}"
    display = kind.from_estimator(cascade, *TEST, budget=0.3).plot()
    assert f"budget 0.30: {figures}" in titles_of(display.figure_)
    outputs = cascade.record(*TEST)
    display = kind.from_outputs(outputs, cascade.operating_point(0.3), *images).plot()
    assert f"operating point: {figures}" in titles_of(display.figure_)
    display = kind.from_outputs(outputs, cascade.operating_point(0.3), *images, chosen_by="mine").plot()
    assert f"mine: {figures}" in titles_of(display.figure_)


@pytest.mark.parametrize(("kind", "names", "images"), EXITS.values(), ids=EXITS)
def test_what_are_no_outputs_and_no_point(cascade, kind, names, images):
    with pytest.raises(TypeError, match="outputs must be ExitOutputs, as record gives them; got CascadeSaver"):
        kind.from_outputs(cascade, cascade.operating_point(), *images)
    with pytest.raises(TypeError, match=r"point must be an OperatingPoint, as .*at\(budget=0.4\) gives it; got float"):
        kind.from_outputs(cascade.outputs_, 0.4, *images)
    _, point = three_exits()
    with pytest.raises(ValueError, match=r"the point's thresholds must have shape \(2,\) or \(2, 10\)"):
        kind.from_outputs(cascade.outputs_, point, *images)
    with pytest.raises(ValueError, match="at most one of budget, max_drop"):
        kind.from_estimator(cascade, *TEST, budget=0.3, max_drop=0.1)


def test_names_of_the_wrong_number(cascade):
    with pytest.raises(ValueError, match="class_names must be one a class, 10 at least; got 2"):
        ExitFlowDisplay.from_estimator(cascade, class_names=["a", "b"]).plot()
    with pytest.raises(ValueError, match=r"class_names must be one a class, \d+ at least; got 1"):
        ExemplarDisplay.from_estimator(cascade, *TEST, class_names=["a"])
    with pytest.raises(ValueError, match="exit_names must be one an exit, 3 in all; got 2"):
        ExitFlowDisplay(counts=COUNTS, exit_names=["a", "b"]).plot()


@pytest.mark.parametrize("number", [0, 1.5, True])
def test_numbers_of_bins_and_of_examples(cascade, number):
    with pytest.raises(ValueError, match=f"n_bins must be a whole number, at least 1; got {number}"):
        ReliabilityDisplay.from_estimator(cascade, n_bins=number)
    with pytest.raises(ValueError, match=f"n must be a whole number, at least 1; got {number}"):
        ExemplarDisplay.from_estimator(cascade, *TEST, n=number)
