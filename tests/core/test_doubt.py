import warnings

import numpy as np
import pytest

from adaptexit import CalibrationWarning, ThresholdCalibrator
from adaptexit.core.outputs import ExitOutputs


def pair(n_samples, n_wrong, n_rescued=0):
    """A saver that is wrong on some of its least sure samples and right on others where the full model is wrong."""
    right = np.ones((2, n_samples), dtype=int)
    right[0, n_samples - n_wrong :] = 0
    right[1, :n_rescued] = 0
    scores = np.stack([np.linspace(1, 0, n_samples), np.ones(n_samples)])
    labels = np.arange(n_samples) % 5
    return ExitOutputs(
        predictions=(labels + 1 - right) % 5, scores=scores, labels=labels, n_classes=5,
        stage_costs=[0, 0], exit_costs=[1, 10],
    )  # fmt: skip


def warnings_of(outputs, **parameters):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibrator = ThresholdCalibrator(**parameters).fit(outputs)
    return calibrator.point_, [str(w.message) for w in caught if w.category is CalibrationWarning]


def test_a_point_known_by_few_disagreements_comes_with_its_error():
    point, messages = warnings_of(pair(400, 100, 9), max_drop=0.01)
    assert point.on[0]
    assert len(messages) == 1
    assert messages[0].startswith("max_drop=0.01 was chosen for by ")
    number = round((point.drop_se * 400) ** 2) - 1
    assert f"by {number} samples of 400 on which" in messages[0]
    assert f"± {100 * point.drop_se:.2g} points of accuracy here (standard error). Calibrate on more" in messages[0]


def test_the_plain_model_that_is_chosen_for_want_of_samples_says_what_seems_to_be_cheaper():
    point, messages = warnings_of(pair(100, 20))
    assert point.on.tolist() == [False, True]
    assert messages[0].startswith("max_drop=0 is kept by the plain full model only, which saves nothing")
    assert "of cheaper points 100 samples do not tell" in messages[0]
    assert "loses 0 ± 1 points" in messages[0]


def test_many_disagreements_are_no_matter_for_a_warning():
    point, messages = warnings_of(pair(4000, 400, 400), max_drop=0.0)
    assert point.on[0]
    assert messages == []


def test_a_loss_that_is_known_well_is_no_matter_for_a_warning():
    point, messages = warnings_of(pair(5000, 10), max_drop=0.0)
    assert point.on[0]
    assert point.drop_se < 0.05 / 100
    assert messages == []


def test_a_saver_that_is_never_right_is_no_matter_for_a_warning():
    point, messages = warnings_of(pair(300, 300))
    assert point.cost == 1.0
    assert messages == []


@pytest.mark.parametrize("budget", [0.3, 0.8])
def test_a_budget_is_no_matter_for_a_warning(budget):
    assert warnings_of(pair(100, 20), budget=budget)[1] == []
