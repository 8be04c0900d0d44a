"""What displays are given is checked before anything is drawn."""

import matplotlib
import numpy as np
import pytest
import torch

from adaptexit import (
    AnytimeDisplay,
    BarsDisplay,
    ComparisonDisplay,
    ExemplarDisplay,
    ExitFlowDisplay,
    JobRatioDisplay,
    ParetoDisplay,
    ReliabilityDisplay,
    SweepDisplay,
)

matplotlib.use("Agg")
from matplotlib import pyplot

STRIP, EMPTY = np.zeros((2, 4, 5)), np.zeros((0, 4, 5))
GOOD = {
    ParetoDisplay: {
        "cost": [0.2, 0.5], "accuracy": [0.7, 0.9], "fixed_cost": [0.2, 1.0], "fixed_accuracy": [0.7, 0.9],
        "accuracy_se": [0.01, 0.0], "chosen": (0.5, 0.9), "chosen_by": "budget 0.50", "exit_names": ["one", "full"],
        "name": "curve",
    },
    JobRatioDisplay: {
        "exit_ratio": [0.5, 1.0], "saver_accuracy": [0.9, 0.8], "base_accuracy": [0.9, 0.9], "job_ratio": 0.5,
        "saver_name": "small", "base_name": "large",
    },
    SweepDisplay: {
        "values": [0.1, 1.0], "accuracy": [0.8, 0.7], "cost": [0.9, 0.4], "exit_rates": [[0.1, 0.9], [0.6, 0.4]],
        "knob": "margin", "exit_names": ["one", "full"],
    },
    ComparisonDisplay: {
        "curves": {"a": ([0.2, 1.0], [0.7, 0.9])}, "rules": {"b": ([0.4], [0.6])}, "full": (1.0, 0.9),
        "full_name": "full",
    },
    AnytimeDisplay: {
        "anytime": {"a": ([2e6, 5e6], [0.7, 0.9])}, "budgeted": {"a": ([2e6], [0.8])}, "unit": "MACs",
        "static": {"b": (4e6, 0.8)},
    },
    BarsDisplay: {"names": ["a", "b"], "accuracy": [0.9, np.nan], "cost": [0.4, np.nan], "chosen_by": "budget 0.40"},
    ExitFlowDisplay: {
        "counts": [[5, 3], [2, 3]], "exit_names": ["one", "full"], "class_names": ["cat", "dog"], "chosen": (0.5, 0.9),
        "chosen_by": "budget 0.50",
    },
    ReliabilityDisplay: {
        "ece": [0.1, np.nan], "n": [4, 0], "edges": [[0.0, 0.5, 1.0], [np.nan] * 3],
        "accuracy": [[0.5, np.nan], [np.nan] * 2], "confidence": [[0.4, np.nan], [np.nan] * 2],
        "count": [[4, 0], [0, 0]], "exit_names": ["one", "full"], "chosen": (0.5, 0.9), "chosen_by": "budget 0.50",
    },
    ExemplarDisplay: {
        "images": [(STRIP, EMPTY)], "scores": [([0.5, 0.6], [])], "labels": [(["a", "b"], [])],
        "exit_names": ["one", "full"], "chosen": (0.5, 0.9), "chosen_by": "budget 0.50",
    },
}  # fmt: skip
"""Arguments that every display takes."""

NUMBERS = {
    "text": "abc",
    "texts": ["a", "b"],
    "number": 3.0,
    "ragged": [[1.0], [1.0, 2.0]],
    "empty": [],
    "too long": np.zeros(7),
    "too deep": np.zeros((2, 2, 2, 2, 2)),
    "infinite": np.full((2, 2), np.inf),
    "complex": np.zeros(2, complex),
    "masked": np.ma.masked_array([0.1, 0.2], [True, False]),
    "gradients": torch.zeros(2, requires_grad=True),
    "dict": {"a": 1},
    "object": object(),
}
WORDS = {"number": 3, "list": ["a"], "bytes": b"a", "dict": {}}
SEQUENCES = {
    "number": 3,
    "dict": {"a": 1, "b": 2},
    "too few": ["a"],
    "bytes": b"ab",
    "array without axes": np.array("a"),
}
PAIRS = {"number": 3, "text": "ab", "one": (1.0,), "three": (1, 2, 3), "infinite": (np.inf, 1.0), "texts": ("a", "b")}
DICTS = {"list": [1], "number": 3, "of numbers": {"a": 3}, "of one": {"a": ([1.0],)}, "lengths": {"a": ([1.0], [1, 2])},
         "keys": {3: ([1.0], [1.0])}, "infinite": {"a": ([np.inf], [1.0])}}  # fmt: skip

ODD = {
    **dict.fromkeys(("cost", "accuracy", "fixed_cost", "fixed_accuracy", "exit_ratio", "saver_accuracy"), NUMBERS),
    **dict.fromkeys(("base_accuracy", "values", "exit_rates", "counts", "ece", "n", "edges"), NUMBERS),
    **dict.fromkeys(("confidence", "count", "images", "scores"), NUMBERS),
    "accuracy_se": NUMBERS | {"negative": [0.01, -0.01]},
    **dict.fromkeys(("chosen_by", "name", "unit"), WORDS),
    **dict.fromkeys(("saver_name", "base_name", "full_name", "knob"), WORDS | {"nothing": None}),
    **dict.fromkeys(("exit_names", "class_names", "names", "labels"), SEQUENCES),
    "chosen": PAIRS,
    "full": PAIRS | {"nothing": None},
    "curves": DICTS,
    "rules": DICTS,
    "anytime": DICTS,
    "budgeted": DICTS,
    "static": DICTS | {"arrays": {"a": ([1.0], [1.0])}},
    "job_ratio": {"text": "a", "infinite": np.inf, "list": [1.0], "nothing": None},
}

CALLS = [(display, name, kind) for display, good in GOOD.items() for name in good for kind in ODD[name]]


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


@pytest.mark.parametrize("display", GOOD, ids=lambda display: display.__name__)
def test_what_the_refusals_change_is_good(display):
    assert display(**GOOD[display]).plot() is not None


@pytest.mark.parametrize(("display", "name", "kind"), CALLS, ids=lambda part: getattr(part, "__name__", part))
def test_odd_arguments_are_refused_by_name(display, name, kind):
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        display(**GOOD[display] | {name: ODD[name][kind]})


MISFITS = {
    "nobody": (ExitFlowDisplay, {"counts": [[0, 0], [0, 0]]}, "counts must begin with everybody"),
    "risen": (ExitFlowDisplay, {"counts": [[1, 2], [3, 4]]}, "counts must not rise from exit to exit"),
    "negative": (ExitFlowDisplay, {"counts": [[1, 2], [-3, 0]]}, "counts must be whole numbers, 0 or above"),
    "fractions": (ExitFlowDisplay, {"counts": [[1.0, 2.0]]}, "counts must be whole numbers.*got dtype float64"),
    "nobody leaves": (
        ReliabilityDisplay, {"n": [0, 0], "count": [[0, 0], [0, 0]]}, "n must be above 0 at one exit at least",
    ),
    "other sums": (ReliabilityDisplay, {"n": [3, 0]}, r"n must be the sums of count, \[4, 0\]; got \[3, 0\]"),
    "no edges": (ReliabilityDisplay, {"edges": np.full((2, 3), np.nan)}, "edges, accuracy and confidence must be"),
    "no accuracy": (ReliabilityDisplay, {"accuracy": np.full((2, 2), np.nan)}, "accuracy and confidence must be"),
    "scores of others": (ExemplarDisplay, {"scores": [([0.5], [])]}, "scores must be one a thumbnail"),
    "labels of others": (ExemplarDisplay, {"labels": [(["a"], [])]}, "labels must be one a thumbnail"),
    "three strips": (ExemplarDisplay, {"images": [(STRIP, STRIP, EMPTY)]}, r"images must be pairs \(near, deep\)"),
    "no models": (AnytimeDisplay, {"anytime": {}, "budgeted": {}}, "anytime or budgeted must hold one model at least"),
    "no rows": (BarsDisplay, {"names": [], "accuracy": [], "cost": []}, "names must be one a row; got none"),
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
def test_arguments_that_do_not_fit_together(misfit):
    display, changes, message = MISFITS[misfit]
    with pytest.raises((ValueError, TypeError), match=message):
        display(**GOOD[display] | changes)


@pytest.mark.parametrize("display", GOOD, ids=lambda display: display.__name__)
def test_axes_and_styles_are_refused_by_name_and_leave_no_figure(display):
    picture = display(**GOOD[display])
    for ax in (3, "ax", pyplot, [3], np.array(["a", "b"])):
        with pytest.raises(TypeError, match="ax must be matplotlib Axes, or None for a new figure; got"):
            picture.plot(ax)
    for style in ({"nonsense": 3}, {"alpha": "thick"}):
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(style))} must be styles that matplotlib"):
            picture.plot(**style)
    assert pyplot.get_fignums() == []
    assert picture.plot() is picture


@pytest.mark.parametrize("display", [ParetoDisplay, ExitFlowDisplay])
def test_names_of_pictures(display):
    with pytest.raises(TypeError, match="name must be a str; got 3"):
        display(**GOOD[display]).plot(name=3)


OTHERS = [None, 3, "a", [1], object(), ParetoDisplay]
SOURCES = {
    "frontier": (ParetoDisplay.from_frontier, "frontier must be a ParetoFrontier, as .* gives it; got"),
    "sweep": (SweepDisplay.from_frontier, "frontier must be a ParetoFrontier, as .* gives it; got"),
    "curve": (JobRatioDisplay.from_curve, "curve must be a JobCurve, as job_curve gives it; got"),
    "calibration": (ReliabilityDisplay.from_calibration, "calibration must be an ExitCalibration, as .* gives it; got"),
    "exemplars": (lambda given: ExemplarDisplay.from_exemplars(given, STRIP), "exemplars must be an Exemplars, as"),
    "comparison": (ComparisonDisplay.from_comparison, "comparison must be a Comparison, as compare gives it; got"),
    "evaluation": (AnytimeDisplay.from_evaluation, "evaluation must be an Evaluation, as evaluate_settings gives it;"),
    "bars": (BarsDisplay.from_comparison, "comparison must be a Comparison, as compare gives it; got"),
    "job": (JobRatioDisplay.from_estimator, "estimator must be a fitted estimator, as CascadeSaver"),
    "pareto": (ParetoDisplay.from_estimator, "estimator must be a fitted estimator, as CascadeSaver"),
    "flow": (ExitFlowDisplay.from_estimator, "estimator must be a fitted estimator, as CascadeSaver"),
    "reliability": (ReliabilityDisplay.from_estimator, "estimator must be a fitted estimator, as CascadeSaver"),
    "strips": (lambda given: ExemplarDisplay.from_estimator(given, STRIP), "estimator must be a fitted estimator, as"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_other_sources_are_refused_by_name(source):
    make, message = SOURCES[source]
    for given in OTHERS:
        with pytest.raises(TypeError, match=message):
            make(given)


@pytest.mark.parametrize("saver", [1, -1, 0.0, True, "0", None, np.array([0]), [0]])
def test_savers_that_there_are_not(cascade, saver):
    for call in (lambda: JobRatioDisplay.from_estimator(cascade, saver=saver), lambda: cascade.job_curve(saver)):
        with pytest.raises(ValueError, match=r"saver must be one of 0 \.\.\. 0; got"):
            call()


def test_knobs_that_are_no_names_or_numbers(cascade):
    frontier = cascade.pareto()
    with pytest.raises(TypeError, match="knob must be a str; got"):
        SweepDisplay.from_frontier(frontier, ["margin"])
    frontier.points[0].params["word"] = "a"
    try:
        with pytest.raises(TypeError, match="knob 'word' must be finite real numbers"):
            SweepDisplay.from_frontier(frontier, "word")
    finally:
        del frontier.points[0].params["word"]


def test_a_style_that_is_a_loader_is_refused_and_not_run_through():
    class Loader:
        def __iter__(self):
            raise AssertionError("was run through")

    curve = {"cost": [0.5, 1.0], "accuracy": [0.8, 0.9]}
    display = ParetoDisplay(**curve, fixed_cost=[0.5, 1.0], fixed_accuracy=[0.8, 0.9])
    with pytest.raises(
        TypeError, match="alpha must be a style that matplotlib takes, as a number or a name; got Loader"
    ):
        display.plot(alpha=Loader())
