"""What the laws are tried on: hypothesis draws sizes and kinds, a drawn seed fills the arrays."""

import dataclasses

import numpy as np
from hypothesis import strategies as st

from adaptexit.core.frontier import OperatingPoint, ParetoFrontier
from adaptexit.core.outputs import ExitOutputs

FULL = 64
"""Every drawn model costs 64 units, so that relative costs and their sums are exact unless the unit is odd."""

CLOSEST = 2.0**-53
"""Distance of neighbouring float64 numbers just below 1."""

generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def sizes(low, high):
    """Counts from low to high, every one as likely: st.integers prefers the ends."""
    return st.sampled_from(range(low, high + 1))


@st.composite
def score_rows(draw, n_exits, n_samples, spacing=None):
    """Scores (K, N) on a grid: all equal, many ties, few ties; far apart or neighbouring floats."""
    grid = draw(generators).integers(draw(st.sampled_from([3, 8, 40, 1])), size=(n_exits, n_samples))
    step = draw(st.sampled_from([0.125, CLOSEST])) if spacing is None else spacing
    scores = 1.0 - step * grid
    return scores.astype(np.float32) if step > CLOSEST and draw(st.booleans()) else scores


@st.composite
def cost_pairs(draw, n_exits, free=None, unit=None):
    """Stage and exit costs (K,): exits free or not, the full model's own cost in its last stage or its head."""
    rng = draw(generators)
    stage, exits = rng.integers(10, size=n_exits).astype(float), np.zeros(n_exits)
    if not (draw(st.booleans()) if free is None else free):
        exits[:-1] = rng.integers(10, size=n_exits - 1)
    (stage if draw(st.booleans()) else exits)[-1] += FULL - stage.sum()
    unit = draw(st.sampled_from([1.0, 0.1, 3e9])) if unit is None else unit
    return stage * unit, exits * unit


@st.composite
def exit_outputs(
    draw, min_exits=1, max_exits=5, max_samples=10, *, free=None, chained=None, unit=None, graded=None, spacing=None
):
    """Recorded outputs of few samples, by classes or (``graded``) by quality."""
    n_exits, n_samples = draw(sizes(min_exits, max_exits)), draw(sizes(1, max_samples))
    stage_costs, exit_costs = draw(cost_pairs(n_exits, free, unit))
    rng = draw(generators)
    if draw(st.booleans()) if graded is None else graded:
        answers = {"quality": rng.integers(5, size=(n_exits, n_samples)) / 4}
    else:
        n_classes = draw(st.sampled_from([2, 3, 1]))
        answers = {
            "predictions": rng.integers(n_classes, size=(n_exits, n_samples)),
            "labels": rng.integers(n_classes, size=n_samples),
            "n_classes": n_classes,
        }
    return ExitOutputs(
        scores=draw(score_rows(n_exits, n_samples, spacing)),
        stage_costs=stage_costs,
        exit_costs=exit_costs,
        chained=draw(st.booleans()) if chained is None else chained,
        **answers,
    )


@st.composite
def thresholds_for(draw, outputs, per_class=False):
    """Thresholds (K,) or (K, C): never, always or an observed score; the last row is -inf."""
    rng = draw(generators)
    shape = (outputs.n_exits, outputs.n_classes) if per_class else (outputs.n_exits,)
    observed = np.stack([rng.choice(row, size=shape[1:]) for row in outputs.scores.astype(np.float64)])
    thresholds = np.choose(rng.choice(3, size=shape, p=[0.5, 0.35, 0.15]), [observed, np.inf, -np.inf])
    thresholds[-1] = -np.inf
    return thresholds


@st.composite
def policies_for(draw, problem):
    """One prefix length for every early exit, 0 (off) included."""
    rng = draw(generators)
    return np.array([rng.choice([0, 0, *ends]) for ends in problem.ends], dtype=np.int64)


@st.composite
def increasing_maps(draw):
    """A function that maps the values of an array to others in the same order."""
    rng = draw(generators)
    start, steps = rng.integers(-50, 50), rng.integers(1, 10, size=5) / 4.0

    def mapped(array):
        values, places = np.unique(array, return_inverse=True)
        return (start + np.cumsum(np.resize(steps, len(values))))[places].reshape(np.shape(array))

    return mapped


def permutations_of(n):
    """Orders of n samples."""
    return generators.map(lambda rng: rng.permutation(n))


@st.composite
def saver_pairs(draw, max_samples=20):
    """Confidence of a saver, and whether the saver and the base are right, all (N,)."""
    n = draw(sizes(1, max_samples))
    confidence = draw(score_rows(1, n))[0]
    saver, base = draw(generators).random((2, n)) < draw(st.sampled_from([0.5, 0.8]))
    return confidence, saver, base


@st.composite
def class_outputs(draw, min_exits=1, max_exits=4, max_samples=24, **options):
    """Recorded outputs by classes, every exit right about twice in three."""
    outputs = draw(exit_outputs(min_exits, max_exits, max_samples, graded=False, **options))
    rng = draw(generators)
    right = rng.random(outputs.predictions.shape) < rng.choice([0.4, 0.6, 0.8], size=(outputs.n_exits, 1))
    return dataclasses.replace(outputs, predictions=np.where(right, outputs.labels, outputs.predictions))


@st.composite
def large_outputs(draw, max_exits=3, max_samples=600):
    """Recorded outputs of some hundred samples in two classes, where surer samples are more often right."""
    n_exits, n_samples = draw(sizes(2, max_exits)), draw(sizes(100, max_samples))
    rng = draw(generators)
    labels, sure = rng.integers(2, size=n_samples), rng.random((n_exits, n_samples))
    worst, best = draw(st.sampled_from([(0.5, 1.0), (0.7, 1.0), (0.9, 1.0), (0.6, 0.8), (1.0, 1.0)]))
    right = rng.random(sure.shape) < worst + (best - worst) * sure
    levels = draw(st.sampled_from([12, 64, 2**20]))
    return ExitOutputs(
        predictions=np.where(right, labels, 1 - labels),
        scores=np.ceil(sure * levels) / levels,
        labels=labels,
        n_classes=2,
        costs=np.arange(1.0, n_exits + 1),
    )


def margins(max_size=4):
    """Rising margins of class precision, those with exact ties of precision and target among them."""
    round_ones = st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.2, 0.25, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5])
    return st.lists(round_ones | st.floats(0, 1), min_size=1, max_size=max_size, unique=True).map(sorted)


@st.composite
def batched(draw, n):
    """The indices of n samples in any order, cut into batches."""
    order = np.array(draw(st.permutations(range(n))), dtype=np.intp)
    cuts = draw(st.lists(st.integers(0, n), max_size=3))
    return np.split(order, sorted(cuts))


def at_its_word(frontier):
    """The same frontier without errors: its accuracies are compared as if they were exact."""
    points = [dataclasses.replace(point, accuracy_se=0.0, cost_se=0.0, drop_se=0.0) for point in frontier.points]
    return dataclasses.replace(frontier, points=points)


def frontier_through(reduction, accuracy, full):
    """A frontier of points at given cost reductions, in the order given."""
    rates, thresholds = np.array([1.0, 0.0]), np.array([np.inf, -np.inf])
    points = [OperatingPoint(a, 1 - r, rates, thresholds, thresholds) for r, a in zip(reduction, accuracy, strict=True)]
    return ParetoFrontier(points, full, np.array([0.5, full]), np.array([0.1, 1.0]), 100)
