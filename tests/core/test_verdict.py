import numpy as np
import pytest
from scipy.stats import binom

from adaptexit import ExitOutputs, ParetoFrontier, ThresholdCalibrator, verdict
from adaptexit.core.frontier import evaluate


def pair(n, seed=0, *, gap=0.35, cost=0.3, informed=True, drift=0.04):
    """Two models that are as good on easy samples; on harder ones the large one is better by ``gap`` and more.

    With ``informed`` false the small model's score says nothing, so that any early answer costs accuracy.
    """
    rng = np.random.default_rng(seed)
    hardness = rng.random(n) ** 2
    easy = 1 - 0.1 * hardness - (0 if informed else drift)
    p_small = np.where(hardness < 0.4, easy, 0.96 - (0.35 + gap) * (hardness - 0.4))
    p_large = np.where(hardness < 0.4, 1 - 0.1 * hardness, 0.96 - 0.35 * (hardness - 0.4))
    luck = rng.random(n)
    large, small = luck < p_large, np.where(rng.random(n) < 0.7, luck, rng.random(n)) < p_small
    score = 0.15 * rng.normal(size=n) - hardness if informed else rng.random(n)
    return graded(score, small, large, [cost, 1.0])


def graded(score, small, large, cost, **others):
    scores = np.stack([score, np.zeros(len(score))])
    fields = {"stage_costs": [0, 0], "exit_costs": cost} | others
    return ExitOutputs(scores=scores, quality=np.stack([small, large]), **fields)


def test_a_cascade_that_pays():
    found = verdict(pair(3000), max_drop=0.005)
    assert found.pays is True
    assert found.saving_interval[0] < found.saving < found.saving_interval[1]
    assert found.accuracy_interval[0] < found.accuracy_difference < found.accuracy_interval[1]
    low, high = (round(100 * end) for end in found.saving_interval)
    assert str(found).startswith(f"The cascade pays: {100 * found.saving:.0f}% cheaper ({low} to {high}%) at ")
    assert str(found).endswith("measured on 3,000 samples (95% intervals).")
    assert found.n_samples == 3000


def test_it_is_about_the_setting_that_is_used():
    outputs = pair(1000, 3)
    found, calibrator = verdict(outputs, max_drop=0.01), ThresholdCalibrator(max_drop=0.01).fit(outputs)
    assert found.point.thresholds.tolist() == calibrator.thresholds_.tolist()
    assert found.saving == pytest.approx(1 - calibrator.point_.cost)
    small, large = outputs.graded
    assert found.n_disagreements == (small != large).sum()


def test_a_small_model_that_costs_nearly_as_much_does_not_pay():
    found = verdict(pair(3000, cost=0.99))
    assert found.pays is False
    assert found.saving == 0
    assert str(found).startswith(
        "Do not cascade: no setting saves anything without losing accuracy, measured on 3,000 "
    )


def test_what_a_drop_would_save_is_told():
    outputs = pair(3000, informed=False)
    found = verdict(outputs, slack=0.06)
    assert found.pays is False
    might = 1 - ThresholdCalibrator(max_drop=0.06).fit(outputs).point_.cost
    assert str(found).endswith(f"measured on 3,000 samples. With max_drop=0.06 it might save {100 * might:.0f}%.")
    assert "might" not in str(verdict(outputs, slack=0.005))


def test_a_loss_beyond_what_is_allowed_is_no_bargain(monkeypatch):
    outputs = pair(3000, informed=False)
    everybody = evaluate(outputs, *2 * [np.array([-1.0, -np.inf])])
    monkeypatch.setattr(
        "adaptexit.core.verdict.search_thresholds",
        lambda outputs, **settings: (ParetoFrontier.of([everybody], outputs), None),
    )
    found = verdict(outputs)
    assert found.pays is False
    assert found.accuracy_interval[1] < -0.01
    assert str(found).startswith(
        "Do not cascade: it loses more than is allowed, 70% cheaper (70 to 70%) at an accuracy "
    )


def test_few_samples_do_not_tell_and_it_says_how_many_would():
    found = verdict(pair(100))
    assert found.pays is None
    assert str(found).startswith("Cannot tell whether the cascade pays: ")
    assert f"differ in being right on {found.n_disagreements:,} of them" in str(found)
    assert "samples would tell." in str(found) or "Calibrate on more." in str(found)


def test_no_disagreement_seen_is_not_taken_for_none_to_come():
    rng = np.random.default_rng(0)
    for n, pays in ((100, None), (3000, True)):
        right = rng.random(n) < 0.9
        found = verdict(graded(rng.random(n), right, right, [0.2, 1.0]))
        assert found.n_disagreements == 0
        assert found.accuracy_difference == 0
        assert found.accuracy_interval[0] < -1 / n
        assert found.pays is pays


def test_exits_of_one_model_are_no_cascade():
    outputs = pair(3000)
    shared = outputs.with_costs([0.3, 0.7], [0.0, 0.0])
    assert str(verdict(shared)).startswith("Leaving early pays: ")
    assert "Do not let samples leave early: " in str(verdict(pair(3000).with_costs([0.1, 0.1], [0.9, 0.05])))


def test_more_exits_and_other_qualities():
    outputs = pair(600)
    middle = outputs.graded[1] & (np.random.default_rng(1).random(600) < 0.99)
    scores = np.stack([outputs.scores[0], outputs.scores[0] + 0.1, outputs.scores[1]])
    quality = np.stack([outputs.graded[0], middle, outputs.graded[1]])
    three = ExitOutputs(scores=scores, quality=quality, stage_costs=[0, 0, 0], exit_costs=[0.2, 0.5, 1.0])
    assert verdict(three).point.cutoffs.shape == (3,)
    boxes = graded(outputs.scores[0], 40.0 * outputs.graded[0], 40.0 * outputs.graded[1], [0.3, 1.0])
    found, same = verdict(boxes, slack=0.4), verdict(outputs)
    assert "mean quality" in str(found)
    assert "points" not in str(found)
    assert found.accuracy_interval == pytest.approx([40 * end for end in same.accuracy_interval])
    assert found.saving == same.saving


def test_the_folds_are_drawn_by_random_state():
    outputs = pair(400, 1)
    one, again, other = (verdict(outputs, random_state=seed) for seed in (0, 0, 1))
    assert one.accuracy_interval == again.accuracy_interval
    assert one.accuracy_interval != other.accuracy_interval
    assert one.saving == other.saving


def test_wider_intervals_at_more_confidence():
    narrow, wide = (verdict(pair(500), max_drop=0.01, confidence=c) for c in (0.8, 0.99))
    for name in ("saving_interval", "accuracy_interval"):
        assert np.ptp(getattr(wide, name)) > np.ptp(getattr(narrow, name))
    assert "80% intervals" in str(narrow)


BAD = {
    "no outputs": ({"outputs": 3}, TypeError, "outputs must be ExitOutputs; got int"),
    "one exit": (
        {"outputs": ExitOutputs(scores=[[1.0, 2.0]], quality=[[1, 0]], costs=[1.0])},
        ValueError,
        "outputs must have an early exit beside the full model",
    ),
    "few samples": ({"outputs": pair(9)}, ValueError, "at least 2 samples a fold, 10 in all; got 9"),
    "a drop": ({"max_drop": -1}, ValueError, "max_drop must be a share of accuracy, at least 0"),
    "a slack": ({"slack": 0}, ValueError, "slack must be a share of accuracy, above 0"),
    "a confidence": (
        {"confidence": 95},
        ValueError,
        r"confidence must be a share, above 0 and below 1 \(0.95\); got 95",
    ),
    "folds": ({"n_folds": 1}, ValueError, "n_folds must be a whole number, at least 2"),
    "a seed": ({"random_state": -1}, ValueError, "random_state must be a whole number, at least 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    changes, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        verdict(**{"outputs": pair(50)} | changes)


REPEATS = 200
LEAST = int(binom.ppf(0.001, REPEATS, 0.95))
"""Covered at least so often with probability 0.999 where each repeat is with 0.95."""

SETTINGS = {
    "pays": ({}, 0.0),
    "costs accuracy": ({"gap": 0.1, "informed": False}, 0.01),
    "a drop is used": ({"gap": 0.6}, 0.01),
    "saves nothing": ({"cost": 0.99}, 0.0),
}


RUNS = [pytest.param(case, 800, marks=pytest.mark.slow) for case in SETTINGS]
RUNS += [pytest.param(case, 150, marks=pytest.mark.slow) for case in ("pays", "a drop is used", "saves nothing")]


@pytest.mark.parametrize(("case", "n"), [("costs accuracy", 150), *RUNS])
def test_intervals_cover_what_the_setting_gives_on_fresh_data(case, n):
    made, max_drop = SETTINGS[case]
    fresh = pair(100_000, 10_000, **made)
    saving, accuracy, wrong = 0, 0, 0
    for seed in range(REPEATS):
        found = verdict(pair(n, seed, **made), max_drop=max_drop)
        true = evaluate(fresh, found.point.thresholds, found.point.cutoffs)
        saving += covered(found.saving_interval, 1 - true.cost)
        accuracy += covered(found.accuracy_interval, true.accuracy - fresh.full_accuracy)
        wrong += found.pays is True and (true.accuracy < fresh.full_accuracy - max_drop - 0.01 or true.cost >= 1)
    assert saving >= LEAST
    assert accuracy >= LEAST
    assert wrong <= REPEATS - LEAST


def covered(interval, value):
    return interval[0] - 1e-9 <= value <= interval[1] + 1e-9
