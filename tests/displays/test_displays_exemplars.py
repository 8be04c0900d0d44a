from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import torch

from adaptexit.core.frontier import evaluate
from adaptexit.core.metrics import exemplars
from adaptexit.core.outputs import ExitOutputs
from adaptexit.displays import ExemplarDisplay
from tests.displays.pictures import cascade_by_margin, margins_of, three_exits
from tests.nets import digits, loader_of

matplotlib.use("Agg")
from matplotlib import pyplot

TEST = digits()[2]


@pytest.fixture(scope="module")
def by_margin():
    return cascade_by_margin()


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def samples_of(examples):
    return [(near.samples, deep.samples) for near, deep in examples.strips]


def pixels_of(display):
    """Pixels, by exit and strip."""
    return [[[np.array(picture.get_array()) for picture in strip] for strip in pair] for pair in display.thumbnails_]


def texts_of(display):
    return [text.get_text() for text in display.ax_.texts]


def test_strips_show_the_exemplars_of_an_estimator(cascade):
    display = ExemplarDisplay.from_estimator(cascade, *TEST, n=4, budget=0.3).plot()
    outputs = cascade.record(*TEST)
    ((near, deep),) = samples_of(exemplars(outputs, cascade.operating_point(0.3), 4))
    assert len(near) == 4
    assert set(near.tolist()) != set(deep.tolist())
    X, y = TEST
    for strip, samples in zip(pixels_of(display)[0], (near, deep), strict=True):
        assert np.array(strip) == pytest.approx(X[samples, 0])
    captions = [f"{outputs.scores[0, i]:.3f}\n{y[i]}" for i in (*near, *deep)]
    assert [text for text in texts_of(display) if text[0] in "01"] == captions
    assert [text for text in texts_of(display) if text[0] == "s"] == ["saver\njust above", "saver\nfar above"]


def test_strips_use_the_score_that_is_thresholded(by_margin):
    display = ExemplarDisplay.from_estimator(by_margin, *TEST)
    trace = by_margin.trace(TEST[0])
    scores = margins_of(by_margin.record(*TEST))[(trace.exits == 0) & (trace.labels == TEST[1])]
    assert display.scores[0][1] == pytest.approx(np.sort(scores)[::-1][:6])


def test_thumbnails_are_beside_each_other_and_strips_below_each_other(cascade):
    display = ExemplarDisplay.from_estimator(cascade, *TEST, n=3).plot()
    boxes = [[picture.get_extent() for picture in strip] for strip in display.thumbnails_[0]]
    for strip in boxes:
        for here, beside in pairwise(strip):
            assert here[1] < beside[0]
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
    near, deep = pixels_of(display)[0]
    assert display.images[0][0].shape == expected.shape
    assert np.array(near) == pytest.approx(expected)
    assert np.array(deep) == pytest.approx(expected[::-1])


def test_values_outside_zero_to_one_are_stretched_image_by_image():
    images = np.array([[[-1.0, 3.0], [1.0, 0.0]], [[0.25, 0.5], [0.5, 1.0]]])
    near, _ = pixels_of(strips_of(images).plot())[0]
    assert near[0].tolist() == [[0.0, 1.0], [0.5, 0.25]]
    assert near[1].tolist() == images[1].tolist()
    assert images[0, 0, 0] == -1.0
    below, _ = pixels_of(strips_of(np.array(2 * [[[-1.0, 0.0], [1.0, 0.5]]])).plot())[0]
    assert below[0].tolist() == [[0.0, 0.5], [1.0, 0.75]]
    flat, _ = pixels_of(strips_of(np.full((2, 2, 2), 7.0)).plot())[0]
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
    ((near, _),) = samples_of(exemplars(cascade.record(*TEST), cascade.operating_point()))
    for display in (direct, streamed):
        assert np.array_equal(display.images[0][0], others[near])


def test_inputs_that_are_no_images(cascade):
    for X, what in ((loader_of(*TEST), "DataLoader"), (TEST[0].reshape(-1, 64), r"shape \(597, 64\)"), (TEST, "tuple")):
        with pytest.raises(ValueError, match=rf"images must be an array or tensor.*got {what}.*images=\.\.\."):
            ExemplarDisplay.from_estimator(cascade, X, TEST[1])
    with pytest.raises(ValueError, match="one a sample, 597 in all; got 5"):
        ExemplarDisplay.from_estimator(cascade, *TEST, images=np.zeros((5, 2, 2)))


def test_pictures_of_a_shuffled_loader_would_be_the_wrong_ones(cascade):
    with pytest.raises(ValueError, match="shuffl"):
        ExemplarDisplay.from_estimator(cascade, loader_of(*TEST, shuffle=True), images=TEST[0])
