import numpy as np
import pytest

from adaptexit import ExitOutputs
from adaptexit.core.frontier_score import BUDGETS, frontier_score


def exits(n=2000, seed=0, *, first=0.6, head=0.0, stage=0.2):
    """One early exit that is right on a share of the samples and knows it, before a model that is always right."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=n)
    right = rng.random(n) < first
    early = np.where(right, labels, (labels + 1) % 4)
    scores = np.stack([np.where(right, 0.7, 0.3) + 0.2 * rng.random(n), np.ones(n)])
    return ExitOutputs(
        predictions=np.stack([early, labels]), scores=scores, labels=labels, n_classes=4,
        stage_costs=[stage, 1 - stage], exit_costs=[head, 0.0],
    )  # fmt: skip


def test_where_an_exit_that_knows_what_it_knows_answers_first_the_score_is_known():
    """A budget b lets a share (1 - b) / 0.8 leave at least; who has to leave beyond the right 60% is wrong."""
    leaving = (1 - np.array(BUDGETS)) / 0.8
    expected = np.mean(1 - np.maximum(leaving - 0.6, 0))
    assert frontier_score(exits()) == pytest.approx(expected, abs=0.02)


def test_better_answers_score_more_and_dearer_heads_less():
    scores = [frontier_score(exits(first=first, head=head)) for first, head in ((0.4, 0), (0.6, 0), (0.6, 0.1))]
    assert scores[1] > scores[0] + 0.05
    assert scores[2] < scores[1] - 0.01


def test_below_the_cheapest_policy_the_rest_is_guessed():
    outputs = exits(first=1.0, head=0.5)  # everybody may leave at 0.7
    answered = np.minimum(np.array(BUDGETS) / 0.7, 1)
    assert frontier_score(outputs) == pytest.approx(np.mean(answered + (1 - answered) / 4))


def test_thresholds_are_judged_on_other_samples():
    """Where scores say nothing, what looks best on one half is no better than the mean on the other."""
    rng = np.random.default_rng(1)
    n, labels = 40, np.zeros(40, dtype=int)
    scores = []
    for seed in range(40):
        predictions = rng.integers(2, size=(2, n))
        outputs = ExitOutputs(
            predictions=predictions, scores=rng.random((2, n)), labels=labels, n_classes=2,
            stage_costs=[0.2, 0.8], exit_costs=[0.0, 0.0],
        )  # fmt: skip
        scores.append(frontier_score(outputs, seed))
    assert np.mean(scores) == pytest.approx(0.5, abs=0.035)


def test_equal_arguments_give_equal_scores():
    outputs = exits()
    assert frontier_score(outputs, 3) == frontier_score(outputs, 3)
