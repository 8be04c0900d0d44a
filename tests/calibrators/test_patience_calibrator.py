import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.exceptions import NotFittedError

import adaptexit
from adaptexit import PatienceCalibrator
from adaptexit.core.answer import Answer
from adaptexit.core.baselines import patience, patience_exits
from adaptexit.core.outputs import ExitOutputs
from tests.nets import branched, branched_trained, digits
from tests.properties.strategies import exit_outputs
from tests.properties.test_calibrator_laws import online_exits

TRAIN, VAL, TEST = digits()


@given(exit_outputs(graded=False), st.integers(1, 6))
def test_points_are_those_of_the_rule(outputs, in_use):
    model = PatienceCalibrator(in_use).fit(outputs)
    points = {p.params["patience"]: p for p in model.frontier_.points if p.params}
    assert set(points) == {*range(1, outputs.n_exits), in_use}
    assert model.point_ is points[in_use]
    assert model.exit_index(outputs).tolist() == patience_exits(outputs, in_use).tolist()
    for rule in patience(outputs):
        point = points[rule.params["patience"]]
        assert (point.accuracy, point.exit_rates.tolist()) == (rule.accuracy, rule.exit_rates.tolist())
        if point.on[:-1].any():
            assert point.cost == pytest.approx(rule.cost)
        else:
            assert point.cost == pytest.approx(1.0)  # nobody can leave early, so no exit need be run


@given(exit_outputs(graded=False, min_exits=2), st.integers(1, 4), st.integers(1, 5))
def test_leaving_online_is_routing_offline(outputs, in_use, size):
    model = PatienceCalibrator(in_use).fit(outputs)
    batches = np.split(np.arange(outputs.n_samples), range(size, outputs.n_samples, size))
    for point in model.frontier_.points:
        assert online_exits(model, outputs, batches, point).tolist() == model.exit_index(outputs, point).tolist()


def test_an_estimator_waits_for_agreement(tmp_path):
    model = (
        branched(exits=["one", "two"], head="mlp", batch_size=32, calibrator=PatienceCalibrator())
        .fit(*TRAIN)
        .calibrate(*VAL)
    )
    outputs = model.record(*TEST)
    exits = model.trace(TEST[0]).exits
    assert exits.tolist() == patience_exits(outputs, 1).tolist()
    assert 0 < np.mean(exits == 1) < 1
    costs = model.trace(TEST[0]).costs
    np.testing.assert_allclose(costs, np.cumsum(outputs.stage_costs + outputs.exit_costs)[exits])
    assert model.predict(TEST[0], budget=1.0).tolist() == model.classes_[outputs.predictions[-1]].tolist()
    model.save(tmp_path / "saved")
    loaded = adaptexit.load(tmp_path / "saved", backbone=branched_trained())
    assert loaded.trace(TEST[0]).exits.tolist() == exits.tolist()


def test_what_cannot_be():
    graded = ExitOutputs(
        predictions=None, labels=None, n_classes=None, quality=np.ones((2, 3)), scores=np.ones((2, 3)), costs=[1, 2]
    )
    with pytest.raises(ValueError, match="patience compares predictions, but the outputs have none"):
        PatienceCalibrator().fit(graded)
    with pytest.raises(ValueError, match="patience must be a whole number, at least 1; got 0"):
        PatienceCalibrator(0).fit(graded)
    with pytest.raises(NotFittedError):
        PatienceCalibrator().rescored(graded)
    three = ExitOutputs(
        predictions=np.zeros((3, 4), dtype=int), labels=np.zeros(4, dtype=int), n_classes=2, scores=np.ones((3, 4)),
        costs=[1, 2, 3],
    )  # fmt: skip
    batch = Answer(predictions=np.zeros(2, dtype=int), scores=np.zeros(2))
    with pytest.raises(ValueError, match="patience at exit 1 reads what was answered before it"):
        PatienceCalibrator().fit(three).scores(1, batch)
    assert PatienceCalibrator().fit(three).scores(2, batch)[0].tolist() == [0, 0]  # nobody was asked before
