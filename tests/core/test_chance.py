import warnings

import numpy as np
import pytest
from scipy.stats import binom

from adaptexit import ExitOutputs, LabelWarning, ThresholdCalibrator, verdict
from adaptexit.core.chance import MANY_LABELS, chance_level, warn_of_chance


def outputs_of(labels, *predictions, **others):
    rng = np.random.default_rng(0)
    fields = {"labels": labels, "n_classes": int(np.max(labels)) + 1} | others
    n_exits = len(predictions)
    scores = rng.random((n_exits, len(labels)))
    return ExitOutputs(predictions=np.stack(predictions), scores=scores, costs=np.arange(1, n_exits + 1), **fields)


def right(labels, share, seed=0):
    """Answers that are right on a share of the samples, and elsewhere the next class."""
    lucky = np.random.default_rng(seed).permutation(len(labels)) < share * len(labels)
    return np.where(lucky, labels, (labels + 1) % (labels.max() + 1))


LABELS = np.arange(300) % 10


def test_the_level_is_that_of_the_same_answers_in_any_order():
    rng = np.random.default_rng(0)
    labels, predictions = rng.choice(3, 400, p=[0.7, 0.2, 0.1]), rng.choice(3, 400, p=[0.5, 0.3, 0.2])
    accuracies = [np.mean(rng.permutation(predictions) == labels) for _ in range(4000)]
    level, error = chance_level(predictions, labels, 3)
    assert level == pytest.approx(np.mean(accuracies), abs=4 * error / np.sqrt(4000))
    assert error == pytest.approx(np.std(accuracies), rel=0.05)


@pytest.mark.parametrize("fit", [ThresholdCalibrator().fit, verdict])
def test_a_full_model_that_guesses_is_remarked_on_once(fit):
    with pytest.warns(
        LabelWarning, match=r"better than guessing on the 300 .*: the full model is right on 9\.7% .*guessing: 10\.0%"
    ) as warned:
        fit(outputs_of(LABELS, right(LABELS, 0.8), right(LABELS, 29 / 300)))
    assert [warning.filename for warning in warned] == [__file__]


def test_an_early_exit_of_other_classes_is_remarked_on_by_its_number():
    with pytest.warns(
        LabelWarning,
        match=r": exit 1 is right on 0\.0% of them .*10\.0%; about 100% with its classes in another order\)\. Are",
    ) as warned:
        warn_of_chance(outputs_of(LABELS, right(LABELS, 0.5), (LABELS + 3) % 10, right(LABELS, 0.9)))
    assert len(warned) == 1


def test_what_is_merely_weak_is_not():
    guesses = np.random.default_rng(0).integers(10, size=300)
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        for weak in (right(LABELS, 0.25), guesses, np.full(300, 4)):
            warn_of_chance(outputs_of(LABELS, weak, right(LABELS, 0.9)))
        few = LABELS[: MANY_LABELS - 1]
        warn_of_chance(outputs_of(few, (few + 1) % 10, (few + 1) % 10))
        warn_of_chance(outputs_of(LABELS, right(LABELS, 0.0), quality=np.ones((1, 300))))
    assert remarks == []
    warn_of_chance(outputs_of(np.zeros(300, dtype=int), np.zeros(300, dtype=int)))


@pytest.mark.filterwarnings("error")
def test_a_model_of_a_rare_class_may_be_right_less_often_than_the_commonest_label():
    labels = (np.arange(1000) < 20).astype(int)
    answers = labels.copy()
    answers[:4], answers[20:40] = 0, 1  # finds 16 of 20, with 20 false alarms
    outputs = outputs_of(labels, answers)
    assert outputs.full_accuracy < 0.98
    warn_of_chance(outputs)
    with pytest.raises(LabelWarning):
        warn_of_chance(outputs_of(labels, np.zeros_like(labels)))


def test_guesses_are_found_out_and_a_model_that_knows_a_little_is_not():
    found = {"guesses": 0, "knows": 0}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        guesses = rng.integers(10, size=300)
        knows = np.where(rng.random(300) < 0.2, LABELS, guesses)
        for name, answers in (("guesses", guesses), ("knows", knows)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                warn_of_chance(outputs_of(LABELS, answers))
            found[name] += len(caught)
    assert found["guesses"] >= binom.ppf(0.001, 200, 0.977)  # two standard errors
    assert found["knows"] == 0
