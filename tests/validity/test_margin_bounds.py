"""How often a threshold leaves a cell less precise than its target, where true precision is known."""

import numpy as np
import pytest

from adaptexit.core.margins import Rule, margin_thresholds
from adaptexit.core.outputs import ExitOutputs

pytestmark = pytest.mark.slow

CELLS, PER_CELL = 2000, 300
TARGET = 0.9

TRUTHS = {
    "rising": (lambda u: 0.6 + 0.4 * u, lambda t: 0.8 + 0.2 * t),
    "rising early": (lambda u: 1.0 - 0.5 * np.minimum(1 - u, 0.5), lambda t: _capped(1 - t)),
    "at the target": (lambda u: np.full_like(u, TARGET), lambda t: np.full_like(t, TARGET)),
    "far above": (lambda u: np.full_like(u, 0.99), lambda t: np.full_like(t, 0.99)),
}
"""Chance of a right answer at a score uniform in [0, 1], and the precision of all who score above t."""


def _capped(length):
    """Mean of 1 - min(u, 0.5) / 2 over u in [0, length]."""
    half = np.minimum(length, 0.5)
    return 1 - (half**2 / 2 + 0.5 * (length - half)) / 2 / length


def simulated(chance, seed):
    """One exit with one class a cell, and a full model that is always right."""
    rng = np.random.default_rng(seed)
    answers, sure = rng.integers(CELLS, size=CELLS * PER_CELL), rng.random(CELLS * PER_CELL)
    right = rng.random(len(sure)) < chance(sure)
    labels = np.where(right, answers, (answers + 1) % CELLS)
    return ExitOutputs(
        predictions=np.stack([answers, labels]), scores=np.stack([sure, sure]), labels=labels, n_classes=CELLS,
        costs=[1, 2],
    )  # fmt: skip


def missed_and_open(truth, rule):
    """Shares of the cells that anybody leaves in, and of those that are no more precise than the target."""
    chance, precision = TRUTHS[truth]
    outputs = simulated(chance, seed=0)
    thresholds, _ = margin_thresholds(outputs, [1 - TARGET], cascade_aware=False, rule=rule)
    t = thresholds[0, 0]
    missed = precision(np.clip(t[t < np.inf], 0, 1)) <= TARGET
    return missed.sum() / CELLS, len(missed) / CELLS


@pytest.mark.parametrize("delta", [0.02, 0.1])
@pytest.mark.parametrize("truth", ["rising", "rising early", "at the target"])
def test_the_fixed_sequence_misses_its_target_in_a_share_delta_of_the_cells_at_most(truth, delta):
    missed, _ = missed_and_open(truth, Rule(1, "fixed_sequence", delta))
    assert missed <= delta + 4 * np.sqrt(delta * (1 - delta) / CELLS)  # 4 standard deviations of a binomial share


def test_a_precision_at_the_target_passes_now_and_then():
    missed, opened = missed_and_open("at the target", Rule(1, "fixed_sequence", 0.1))
    assert missed == opened > 0.02


@pytest.mark.parametrize("truth", ["rising", "far above"])
def test_the_fixed_sequence_lets_samples_leave_where_the_first_samples_are_precise(truth):
    _, opened = missed_and_open(truth, Rule(1, "fixed_sequence", 0.1))
    assert opened > 0.5


@pytest.mark.parametrize("support", [1, 30])
def test_the_precision_observed_misses_its_target_far_more_often(support):
    missed, _ = missed_and_open("rising", Rule(support, "none"))
    assert missed > 0.4
