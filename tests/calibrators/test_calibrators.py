"""What holds for every calibrator and its policies."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import adaptexit
from adaptexit import calibrators
from adaptexit.calibrators import (
    CPMCalibrator,
    EENetScheduler,
    EMRouter,
    PatienceCalibrator,
    TemperatureCalibrator,
    ThresholdCalibrator,
)
from adaptexit.core.answer import Answer
from adaptexit.core.frontier import evaluate
from adaptexit.core.outputs import ExitOutputs

QUICK = {"epochs": 4, "n_points": 6, "hidden": 4}
EVERY = {
    "recorded scores": lambda: ThresholdCalibrator(n_points=6),
    "entropy": lambda: ThresholdCalibrator("entropy", n_points=6),
    "CPM": CPMCalibrator,
    "CPM on margins": lambda: CPMCalibrator(score="margin"),
    "temperature": lambda: TemperatureCalibrator(n_points=6),
    "patience": PatienceCalibrator,
    "EM on features": lambda: EMRouter(prior="global", **QUICK),
    "EM on logits": lambda: EMRouter(prior="global", inputs="logits", **QUICK),
    "EENet": lambda: EENetScheduler(**QUICK),
}
REMEMBERING = {"patience", "EENet"}
every = pytest.mark.parametrize("name", EVERY)


def recorded(seed=0, n=240):
    """Four exits, the deeper the surer, with features that tell hard samples."""
    rng = np.random.default_rng(seed)
    labels, hard = rng.integers(0, 3, n), rng.random(n) < 0.5
    strength = np.where(hard, np.array([[0.0], [0.5], [2.0], [4.0]]), np.array([[2.0], [3.0], [4.0], [4.0]]))
    logits = rng.normal(size=(4, n, 3)) + strength[:, :, None] * np.eye(3)[labels]
    hints = (hard[:, None] + 0.3 * rng.normal(size=(n, 4))).astype(np.float32)
    return ExitOutputs.from_logits(
        logits.astype(np.float32), labels, features=[hints, hints[:, :2], hints, hints[:, :0]], cost_unit="MACs",
        stage_costs=[200.0, 300.0, 300.0, 200.0], exit_costs=[10.0, 20.0, 30.0, 40.0],
    )  # fmt: skip


OUTPUTS, OTHERS = recorded(), recorded(seed=1)


def answer_of(policy, outputs, k, samples):
    """What exit k says of some samples: predictions, scores and what the policy asks for beside them."""
    has_vectors = policy.needs_features and outputs.features[k].shape[1] > 0
    return Answer(
        predictions=outputs.predictions[k][samples],
        scores=outputs.scores[k][samples],
        logits=outputs.logits[k][samples] if policy.needs_logits else None,
        features=outputs.features[k][samples] if has_vectors else None,
    )


def decisions(policy, outputs, batches):
    """Exits, and the scores by which they were taken, of samples that go from exit to exit in batches."""
    exits, scores = np.full(outputs.n_samples, -1), np.full(outputs.n_samples, np.nan)
    for alive in batches:
        memory = None
        for k in np.flatnonzero(policy.runs):
            if len(alive):
                leave, values, memory = policy.decide(int(k), answer_of(policy, outputs, k, alive), memory)
                exits[alive[leave]], scores[alive[leave]] = k, values[leave]
                alive, memory = alive[~leave], None if memory is None else memory[~leave]
    return exits.tolist(), scores.tolist()


def batches_of(outputs, seed=3):
    return np.split(np.random.default_rng(seed).permutation(outputs.n_samples), [1, 30, 31, 200])


# -- policies ----------------------------------------------------------------------------------------------------------


@every
def test_every_point_is_decided_online_as_offline_and_costs_what_it_says(name):
    calibrator = EVERY[name]().fit(OUTPUTS)
    thresholded = calibrator.rescored(OUTPUTS)
    points = calibrator.frontier_.points
    for point in points[:: max(1, len(points) // 15)]:
        policy = calibrator.policy(point=point)
        exits, scores = decisions(policy, OUTPUTS, batches_of(OUTPUTS))
        assert exits == calibrator.exit_index(OUTPUTS, point).tolist()
        assert policy.path_costs[exits].mean() / policy.full_cost == pytest.approx(point.cost)
        early = np.flatnonzero(np.array(exits) < 3)
        expected = thresholded.scores[np.array(exits)[early], early]
        np.testing.assert_allclose(np.array(scores)[early], expected, rtol=1e-6)


@every
def test_exits_before_the_deepest_one_on_are_run_and_paid_only_where_scores_read_them(name):
    calibrator = EVERY[name]().fit(OUTPUTS)
    thresholded = calibrator.rescored(OUTPUTS)
    cutoff = float(np.median(thresholded.scores[2])) - 0.5 * (name == "patience")
    thresholds = np.array([np.inf, np.inf, cutoff, -np.inf])
    if calibrator.thresholds_.ndim == 2:
        thresholds = np.repeat(thresholds[:, None], 3, axis=1)
    point = evaluate(thresholded, thresholds, thresholds)
    policy = calibrator.policy(point=point)
    assert policy.runs.tolist() == [name in REMEMBERING, name in REMEMBERING, True, True]
    exits, _ = decisions(policy, OUTPUTS, batches_of(OUTPUTS))
    assert exits == calibrator.exit_index(OUTPUTS, point).tolist()
    assert set(exits) == {2, 3}
    own = OUTPUTS.exit_costs + calibrator.extra_costs_
    np.testing.assert_allclose(policy.path_costs, np.cumsum(OUTPUTS.stage_costs + own * policy.runs))


@every
def test_with_all_early_exits_off_the_plain_full_model_is_run(name):
    calibrator = EVERY[name]().fit(OUTPUTS)
    off = np.array([np.inf, np.inf, np.inf, -np.inf])
    off = off if calibrator.thresholds_.ndim == 1 else np.repeat(off[:, None], 3, axis=1)
    policy = calibrator.policy(point=evaluate(calibrator.rescored(OUTPUTS), off, off))
    assert policy.runs.tolist() == [False, False, False, True]
    assert policy.path_costs[-1] == policy.full_cost == OUTPUTS.full_cost
    assert decisions(policy, OUTPUTS, batches_of(OUTPUTS))[0] == [3] * OUTPUTS.n_samples


@every
def test_a_policy_stays_as_it_was_when_its_calibrator_is_fitted_again(name):
    calibrator = EVERY[name]().fit(OUTPUTS)
    policies = [calibrator.policy(), calibrator.policy(budget=0.7), calibrator.policy(max_drop=0.1)]
    before = [decisions(policy, OTHERS, batches_of(OTHERS)) for policy in policies]
    needs = [(policy.needs_logits, policy.needs_features) for policy in policies]
    calibrator.fit(recorded(seed=2))
    if "score" in calibrator.get_params():
        calibrator.set_params(score=lambda logits: logits[:, 0]).fit(OTHERS)
    assert [decisions(policy, OTHERS, batches_of(OTHERS)) for policy in policies] == before
    assert [(policy.needs_logits, policy.needs_features) for policy in policies] == needs
    if name != "patience":  # which learns nothing but what each patience gives
        assert decisions(calibrator.policy(), OTHERS, batches_of(OTHERS)) != before[0]


@every
def test_a_policy_survives_pickling(name):
    policy = EVERY[name]().fit(OUTPUTS).policy(budget=0.8)
    again = pickle.loads(pickle.dumps(policy))
    assert decisions(again, OTHERS, batches_of(OTHERS)) == decisions(policy, OTHERS, batches_of(OTHERS))


@every
def test_what_was_saved_gives_the_same_policies(name):
    calibrator = EVERY[name]().fit(OUTPUTS)
    state, arrays = calibrator.get_state()
    again = clone(calibrator)
    again.set_state(json.loads(json.dumps(state)), arrays, OUTPUTS)
    for choice in ({}, {"budget": 0.7}, {"max_drop": 0.05}):
        policies = [one.policy(**choice) for one in (calibrator, again)]
        assert len({(policy.needs_logits, policy.needs_features, policy.full_cost) for policy in policies}) == 1
        first, second = (decisions(policy, OTHERS, batches_of(OTHERS)) for policy in policies)
        assert first == second
        assert policies[0].path_costs.tolist() == policies[1].path_costs.tolist()


@every
def test_a_policy_is_of_one_point(name):
    calibrator = EVERY[name]()
    with pytest.raises(NotFittedError):
        calibrator.policy()
    calibrator.fit(OUTPUTS)
    assert calibrator.policy().point is calibrator.point_
    assert calibrator.policy(budget=0.9).point is calibrator.frontier_.at(budget=0.9)
    assert calibrator.policy(max_drop=0.02).point is calibrator.frontier_.at(max_drop=0.02)
    with pytest.raises(ValueError, match=r"at most one of budget, max_drop and point; got budget=0.5, max_drop=0.1"):
        calibrator.policy(budget=0.5, max_drop=0.1)
    with pytest.raises(ValueError, match=r"budget must be at least .* relative cost of the cheapest operating point"):
        calibrator.policy(budget=1e-3)


# -- what importing brings ---------------------------------------------------------------------------------------------

IMPORT_ALL = """
import sys
from adaptexit.calibrators import *
from adaptexit.calibrators import {names}
import adaptexit.core
print("torch" in sys.modules)
"""
FIT_WITHOUT_TORCH = """
import sys
import numpy as np
from adaptexit.calibrators import CPMCalibrator, PatienceCalibrator, TemperatureCalibrator, ThresholdCalibrator
from adaptexit.core.answer import Answer
from adaptexit.core.outputs import ExitOutputs
rng = np.random.default_rng(0)
logits, labels = rng.normal(size=(3, 60, 3)), rng.integers(0, 3, 60)
outputs = ExitOutputs.from_logits(logits, labels, costs=[1, 2, 3])
batch = Answer(predictions=outputs.predictions[0], scores=outputs.scores[0], logits=logits[0])
for calibrator in (ThresholdCalibrator(), CPMCalibrator(), TemperatureCalibrator(), PatienceCalibrator()):
    assert calibrator.fit(outputs).policy().decide(0, batch).leave.shape == (60,)
print("torch" in sys.modules)
"""


@pytest.mark.parametrize("code", [IMPORT_ALL, FIT_WITHOUT_TORCH], ids=["import", "fit"])
def test_torch_is_imported_only_by_what_learns_with_it(code):
    names = ", ".join(name for name, thing in vars(calibrators).items() if isinstance(thing, type))
    run = subprocess.run(
        [sys.executable, "-c", code.format(names=names)],
        cwd=Path(adaptexit.__file__).parents[1], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.strip() == "False"
