import copy
import sys
from functools import partial
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError

from adaptexit import CascadeSaver, JobRatioDisplay, ParetoDisplay, SweepDisplay, ThresholdCalibrator
from adaptexit.core.frontier import ParetoFrontier, evaluate, reference
from adaptexit.core.metrics import exemplars, exit_calibration, flow, survivor_shift
from adaptexit.core.outputs import ExitOutputs
from adaptexit.displays import ExemplarDisplay, ExitFlowDisplay, ReliabilityDisplay
from tests.nets import digits, large_trained, loader_of, middle_trained, small_trained

matplotlib.use("Agg")
from matplotlib import pyplot

TRAIN, VAL, TEST = digits()


@pytest.fixture(scope="module")
def cascade():
    return CascadeSaver(large_trained(), small_trained()).fit(*VAL)


@pytest.fixture(scope="module")
def by_margin():
    """Another score is thresholded than the one that was recorded."""
    calibrator = ThresholdCalibrator(score="margin")
    return CascadeSaver(large_trained(), small_trained(), calibrator=calibrator).fit(*VAL)


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
        for left, right, band in zip(column[:-1], column[1:], bands, strict=True):
            outline = band.get_paths()[0].vertices
            begin, end = left.get_x() + left.get_width(), right.get_x()
            assert (outline[:, 0].min(), outline[:, 0].max()) == pytest.approx((begin, end))
            for x, bar in ((begin, left), (end, right)):
                touching = outline[np.isclose(outline[:, 0], x), 1]
                assert (touching.min(), touching.max()) == pytest.approx((bar.get_y(), bar.get_y() + bar.get_height()))
            assert band.get_facecolor()[0, :3] == pytest.approx(left.get_facecolor()[:3])


def test_survivors_are_counted_above_their_columns():
    display = ExitFlowDisplay(counts=1000 * np.array(COUNTS), exit_names=["tiny", "mid", "big"]).plot()
    texts = {text.get_text(): text.xy for text in display.ax_.texts}
    assert texts == {"20,000": (0, 20000), "8,000\n40%": (1, 8000), "3,000\n15%": (2, 3000)}
    assert [tick.get_text() for tick in display.ax_.get_xticklabels()] == ["everybody", "after tiny", "after mid"]
    unnamed = ExitFlowDisplay(counts=COUNTS).plot(name="title")
    assert [tick.get_text() for tick in unnamed.ax_.get_xticklabels()] == ["everybody", "after exit 0", "after exit 1"]
    assert unnamed.ax_.get_title() == "title"


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
    own, asked = (ExitFlowDisplay.from_estimator(fitted, budget=budget) for budget in (None, 0.3))
    free = ExitFlowDisplay.from_estimator(fitted, budget=1.0)
    assert own.counts.tolist() == asked.counts.tolist() != free.counts.tolist()


def test_classes_may_be_called_otherwise(cascade):
    display = ExitFlowDisplay.from_estimator(cascade, class_names=[f"digit {c}" for c in range(10)]).plot()
    assert sorted(labels_of(display)) == [f"digit {c}" for c in range(10)]


# -- reliability ------------------------------------------------------------------------------------------------------


def three_exits():
    """Outputs of three exits on five samples and a point at which nobody leaves the second."""
    outputs = ExitOutputs(
        scores=np.array([[0.55, 0.9, 0.95, 0.1, 0.2], [0.5] * 5, [0.3, 0.3, 0.3, 0.25, 0.75]]),
        predictions=np.zeros((3, 5), dtype=int), labels=np.array([1, 0, 0, 0, 1]), n_classes=2, costs=[1, 2, 3],
    )  # fmt: skip
    thresholds = np.array([0.5, np.inf, -np.inf])
    return outputs, evaluate(outputs, thresholds, thresholds)


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
    (diagonal,) = [line for line in display.ax_[1].lines if line is not display.points_[1]]
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


def test_one_panel_may_be_given_its_axes_alone():
    outputs, _ = three_exits()
    nobody_early = evaluate(outputs, *2 * [np.array([np.inf, np.inf, -np.inf])])
    _, ax = pyplot.subplots()
    assert reliability_of(outputs, nobody_early).plot(ax).ax_.tolist() == [ax]


def margins_of(outputs):
    """Largest probability less the next one, at the first exit."""
    weights = np.exp(outputs.logits[0].astype(float))
    falling = np.sort(weights / weights.sum(axis=1, keepdims=True), axis=1)[:, ::-1]
    return falling[:, 0] - falling[:, 1]


@pytest.mark.parametrize("fitted", ["cascade", "by_margin"])
@pytest.mark.parametrize(("data", "budget"), [((), None), (TEST, 0.3)], ids=["", "both"])
def test_the_reliability_of_an_estimator(fitted, data, budget, request):
    fitted = request.getfixturevalue(fitted)
    display = ReliabilityDisplay.from_estimator(fitted, *data, budget=budget, n_bins=4)
    outputs = fitted.calibrator_.rescored(fitted.record(*data) if data else fitted.outputs_)
    calibration = exit_calibration(outputs, fitted.calibrator_.operating_point(budget), 4)
    for name in ("ece", "n", "edges", "accuracy", "confidence", "count"):
        assert np.array_equal(getattr(display, name), getattr(calibration, name), equal_nan=True)
    exits = fitted.trace((data or VAL)[0], budget=budget).exits
    scores = margins_of(outputs) if fitted.calibrator_.score == "margin" else outputs.scores[0]
    sums = np.nansum(display.confidence * display.count, axis=1)
    assert sums[0] / display.n[0] == pytest.approx(scores[exits == 0].mean())
    assert [ax.get_title().partition("\n")[0] for ax in display.plot().ax_] == ["saver", "base"]


# -- examples ---------------------------------------------------------------------------------------------------------


def samples_of(found):
    return [(near.samples, deep.samples) for near, deep in found.strips]


def shown(display):
    """Pixels, by exit and strip."""
    return [[[np.array(picture.get_array()) for picture in strip] for strip in pair] for pair in display.thumbnails_]


def texts_of(display):
    return [text.get_text() for text in display.ax_.texts]


def test_strips_show_the_exemplars_of_an_estimator(cascade):
    display = ExemplarDisplay.from_estimator(cascade, *TEST, n=4, budget=0.3).plot()
    outputs = cascade.record(*TEST)
    ((near, deep),) = samples_of(exemplars(outputs, cascade.calibrator_.operating_point(0.3), 4))
    assert len(near) == 4
    assert set(near.tolist()) != set(deep.tolist())
    X, y = TEST
    for strip, samples in zip(shown(display)[0], (near, deep), strict=True):
        assert np.array(strip) == pytest.approx(X[samples, 0])
    captions = [f"{outputs.scores[0, i]:.3f}\n{y[i]}" for i in (*near, *deep)]
    assert [text for text in texts_of(display) if text[0] in "01"] == captions
    assert [text for text in texts_of(display) if text[0] == "s"] == ["saver\njust above", "saver\nfar above"]


def test_strips_use_the_score_that_is_thresholded(by_margin):
    display = ExemplarDisplay.from_estimator(by_margin, *TEST)
    left = by_margin.trace(TEST[0])
    scores = margins_of(by_margin.record(*TEST))[(left.exits == 0) & (left.labels == TEST[1])]
    assert display.scores[0][1] == pytest.approx(np.sort(scores)[::-1][:6])


def test_thumbnails_are_beside_each_other_and_strips_below_each_other(cascade):
    display = ExemplarDisplay.from_estimator(cascade, *TEST, n=3).plot()
    boxes = [[picture.get_extent() for picture in strip] for strip in display.thumbnails_[0]]
    for strip in boxes:
        for left, right in pairwise(strip):
            assert left[1] < right[0]
        for x0, x1, bottom, top in strip:
            assert x1 - x0 == pytest.approx(bottom - top)
    near, deep = (strip[0] for strip in boxes)
    assert near[2] < deep[3]
    assert display.ax_.get_xlim()[1] > boxes[0][-1][1]
    assert display.ax_.get_ylim()[0] > deep[2]


def exemplars_of(outputs, point, images, **names):
    return ExemplarDisplay.from_exemplars(exemplars(outputs, point), images, **names)


def strips_of(images):
    """A display of two samples, the surer one second."""
    outputs = ExitOutputs(
        scores=np.array([[0.7, 0.9], [0.5, 0.5]]), predictions=np.zeros((2, 2), dtype=int),
        labels=np.zeros(2, dtype=int), n_classes=1, costs=[1, 2],
    )  # fmt: skip
    always = np.full(2, -np.inf)
    return exemplars_of(outputs, evaluate(outputs, always, always), images)


COLOURED = np.random.default_rng(0).random((2, 4, 5, 3))
LAYOUTS = {
    "grey": (COLOURED[..., 0], COLOURED[..., 0]),
    "one channel first": (COLOURED[:, None, :, :, 0], COLOURED[..., 0]),
    "channels last": (COLOURED, COLOURED),
    "channels first": (COLOURED.transpose(0, 3, 1, 2), COLOURED),
    "tensor": (torch.from_numpy(COLOURED.transpose(0, 3, 1, 2).copy()).requires_grad_(), COLOURED),
    "bytes": ((COLOURED * 100).astype(np.uint8), (COLOURED * 100).astype(np.uint8) / 255),
    "whole numbers": (np.array([[[0, 1]], [[1, 0]]]), np.array([[[0, 1]], [[1, 0]]])),
}


@pytest.mark.parametrize(("images", "expected"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_images(images, expected):
    display = strips_of(images).plot()
    near, deep = shown(display)[0]
    assert display.images[0][0].shape == expected.shape
    assert np.array(near) == pytest.approx(expected)
    assert np.array(deep) == pytest.approx(expected[::-1])


def test_values_outside_zero_to_one_are_stretched_image_by_image():
    images = np.array([[[-1.0, 3.0], [1.0, 0.0]], [[0.25, 0.5], [0.5, 1.0]]])
    near, _ = shown(strips_of(images).plot())[0]
    assert near[0].tolist() == [[0.0, 1.0], [0.5, 0.25]]
    assert near[1].tolist() == images[1].tolist()
    assert images[0, 0, 0] == -1.0
    below, _ = shown(strips_of(np.array(2 * [[[-1.0, 0.0], [1.0, 0.5]]])).plot())[0]
    assert below[0].tolist() == [[0.0, 0.5], [1.0, 0.75]]
    flat, _ = shown(strips_of(np.full((2, 2, 2), 7.0)).plot())[0]
    assert flat[0].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_thumbnails_take_the_callers_style():
    display = strips_of(COLOURED[..., 0]).plot(cmap="magma")
    assert display.thumbnails_[0][0][0].get_cmap().name == "magma"
    assert strips_of(COLOURED[..., 0]).plot().thumbnails_[0][0][0].get_clim() == (0.0, 1.0)


def test_an_exit_without_examples_has_an_empty_strip():
    outputs, point = three_exits()
    display = exemplars_of(outputs, point, np.zeros((5, 2, 2)), class_names="ab").plot()
    assert [[len(strip) for strip in pair] for pair in display.thumbnails_] == [[2, 2], [0, 0]]
    texts = texts_of(display)
    assert texts.count("none") == 2
    assert {"exit 1\njust above", "exit 1\nfar above"} < set(texts)
    assert {"0.900\na", "0.950\na"} < set(texts)
    never = evaluate(outputs, *2 * [np.array([np.inf, np.inf, -np.inf])])
    assert texts_of(exemplars_of(outputs, never, np.zeros((5, 2, 2))).plot()).count("none") == 4


def test_outputs_without_labels_are_shown_without_classes():
    outputs = ExitOutputs(scores=np.array([[0.9], [0.5]]), quality=np.ones((2, 1)), costs=[1, 2])
    always = np.full(2, -np.inf)
    display = exemplars_of(outputs, evaluate(outputs, always, always), np.zeros((1, 2, 2)))
    assert display.labels == [([""], [""])]


def test_images_may_be_others_than_the_inputs(cascade):
    others = np.random.default_rng(0).random((len(TEST[1]), 6, 6))
    direct = ExemplarDisplay.from_estimator(cascade, *TEST, images=others)
    streamed = ExemplarDisplay.from_estimator(cascade, loader_of(*TEST), images=others)
    ((near, _),) = samples_of(exemplars(cascade.record(*TEST), cascade.calibrator_.operating_point()))
    for display in (direct, streamed):
        assert np.array_equal(display.images[0][0], others[near])


def test_inputs_that_are_no_images(cascade):
    for X, what in ((loader_of(*TEST), "DataLoader"), (TEST[0].reshape(-1, 64), r"shape \(597, 64\)"), (TEST, "tuple")):
        with pytest.raises(ValueError, match=rf"images must be an array or tensor.*got {what}.*images=\.\.\."):
            ExemplarDisplay.from_estimator(cascade, X, TEST[1])
    with pytest.raises(ValueError, match="one a sample, 597 in all; got 5"):
        ExemplarDisplay.from_estimator(cascade, *TEST, images=np.zeros((5, 2, 2)))


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
    given, before = dict(vars(display)), copy.deepcopy(vars(display))
    assert display.plot() is display
    assert display.plot() is display
    assert given
    assert all(getattr(display, name) is value for name, value in given.items())
    np.testing.assert_equal(given, before)


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
        ExitFlowDisplay(COUNTS)
    with pytest.raises(TypeError, match="positional"):
        ReliabilityDisplay(*6 * [[1.0]])
    with pytest.raises(TypeError, match="positional"):
        ExemplarDisplay([], [], [])


def test_pictures_of_a_shuffled_loader_would_be_the_wrong_ones(cascade):
    with pytest.raises(ValueError, match="shuffl"):
        ExemplarDisplay.from_estimator(cascade, loader_of(*TEST, shuffle=True), images=TEST[0])


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


def test_what_happens_at_the_exits_of_an_estimator(cascade):
    point, outputs = cascade.calibrator_.operating_point(0.3), cascade.record(*TEST)
    for found, expected in (
        (cascade.exit_calibration(*TEST, budget=0.3, n_bins=4), exit_calibration(outputs, point, 4)),
        (cascade.survivor_shift(*TEST, budget=0.3), survivor_shift(outputs, point)),
    ):
        for name, value in vars(expected).items():
            assert np.array_equal(getattr(found, name), value, equal_nan=True)
    assert np.array_equal(cascade.exit_flow(*TEST, budget=0.3), flow(outputs, point))
    ours, theirs = (samples_of(found) for found in (cascade.exemplars(*TEST, budget=0.3), exemplars(outputs, point)))
    assert [[strip.tolist() for strip in pair] for pair in ours] == [[s.tolist() for s in pair] for pair in theirs]


def test_before_fit():
    for ask in (CascadeSaver.exit_flow, CascadeSaver.exit_calibration, CascadeSaver.survivor_shift):
        with pytest.raises(NotFittedError):
            ask(CascadeSaver(None, None))


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
    return ParetoFrontier([*points, *(evaluate(outputs, *[np.array([np.inf, np.inf, -np.inf])] * 2, p) for p in extra)],
                          *reference(outputs))  # fmt: skip


def test_a_sweep_by_its_knob():
    frontier = swept([3.0, 0.1, 1.0], extra=[{}])
    display = SweepDisplay.from_frontier(frontier, exit_names=["a", "b", "big"]).plot()
    assert display.values.tolist() == [0.1, 1.0, 3.0]
    order = [1, 2, 0]
    assert display.accuracy_.get_ydata().tolist() == frontier.accuracy[order].tolist()
    assert display.cost_.get_ydata().tolist() == frontier.cost[order].tolist()
    assert [area.get_label() for area in display.areas_] == ["a", "b", "big"]
    top = [max(y for x, y in area.get_paths()[0].vertices if x == 1.0) for area in display.areas_]
    np.testing.assert_allclose(top, np.cumsum(frontier.points[2].exit_rates))
    assert display.ax_.get_xscale() == "log"
    assert display.ax_.get_xlabel() == "cost weight"
    pyplot.close("all")


@pytest.mark.parametrize(
    ("values", "scale"),
    [([0.1, 0.2, 0.3], "linear"), ([0.0, 0.1, 5.0], "symlog"), ([0.1, 5.0], "log"), ([0.0], "linear")],
)
def test_the_axis_of_a_sweep(values, scale):
    display = SweepDisplay.from_frontier(swept(values, "margin"), "margin").plot(linewidth=5.0)
    assert display.ax_.get_xscale() == scale
    assert display.cost_.get_linewidth() == 5.0
    pyplot.close("all")


def test_a_sweep_by_a_knob_that_no_point_has():
    with pytest.raises(ValueError, match=r"knob must be among the params of the frontier's points, \['margin'\]; got"):
        SweepDisplay.from_frontier(swept([1.0], "margin"))
