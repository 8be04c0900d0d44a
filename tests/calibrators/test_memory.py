"""Calibration on outputs larger than one would like to hold works on some rows at a time, and gives the same."""

import tracemalloc

import numpy as np
import pytest

from adaptexit.calibrators.eenet import EENetScheduler
from adaptexit.calibrators.em import EMRouter
from adaptexit.calibrators.em_routers import _summed_squares
from adaptexit.calibrators.temperature import TemperatureCalibrator
from adaptexit.calibrators.threshold import ThresholdCalibrator
from adaptexit.core.outputs import ExitOutputs

K, N, C = 3, 2000, 200
LOGITS_BYTES = K * N * C * 4

CALIBRATORS = {
    "entropy": lambda: ThresholdCalibrator("entropy", "geometric", n_points=3),
    "margin": lambda: ThresholdCalibrator("margin", "geometric", n_points=3),
    "temperature": lambda: TemperatureCalibrator("geometric", n_points=3),
    "EM": lambda: EMRouter(inputs="logits", prior="per_sample", epochs=1, search="geometric", n_points=3),
    "EENet": lambda: EENetScheduler(epochs=1, n_points=3),
}


@pytest.fixture(scope="module")
def mapped(tmp_path_factory):
    """Outputs whose logits stay on disk."""
    folder = tmp_path_factory.mktemp("outputs")
    rng = np.random.default_rng(0)
    labels = rng.integers(C, size=N)
    logits = rng.standard_normal((K, N, C), dtype=np.float32)
    logits[:, np.arange(N), labels] += np.array([3, 4, 5])[:, None] + 2 * rng.standard_normal((K, N))
    costs = {"stage_costs": np.full(K, 1e6), "exit_costs": np.zeros(K)}
    ExitOutputs.from_logits(logits, labels, cost_unit="MACs", **costs).save(folder)
    return ExitOutputs.load(folder, mmap=True)


def in_blocks_of(monkeypatch, n_rows):
    """Blocks of so few rows, everywhere."""
    for module in ("core.scores", "calibrators.small_modules", "calibrators.eenet_scorers"):
        monkeypatch.setattr(f"adaptexit.{module}.CELLS", n_rows * C)


def peak_bytes(work):
    """Of what NumPy allocates meanwhile (torch's tensors are made of it where they are made of arrays)."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", CALIBRATORS)
def test_calibrating_copies_a_small_part_of_the_logits(name, mapped, monkeypatch):
    in_blocks_of(monkeypatch, 100)
    calibrator = CALIBRATORS[name]()
    calibrator.fit(mapped.take(np.arange(50)))  # imports
    assert peak_bytes(lambda: calibrator.fit(mapped)) < 0.35 * LOGITS_BYTES


def test_outputs_are_made_from_mapped_logits_without_a_copy(mapped, monkeypatch):
    in_blocks_of(monkeypatch, 100)
    costs = {"stage_costs": np.ones(K), "exit_costs": np.zeros(K)}
    peak = peak_bytes(lambda: ExitOutputs.from_logits(mapped.logits, mapped.labels, **costs))
    assert peak < 0.35 * LOGITS_BYTES


@pytest.mark.parametrize("name", CALIBRATORS)
def test_blocks_change_nothing(name, mapped, monkeypatch):
    whole = CALIBRATORS[name]().fit(mapped)
    before = whole.rescored(mapped).scores
    in_blocks_of(monkeypatch, 64)
    parts = CALIBRATORS[name]().fit(mapped)
    assert parts.rescored(mapped).scores == pytest.approx(before, abs=1e-12)
    assert [p.thresholds.tolist() for p in parts.frontier_.points] == [
        p.thresholds.tolist() for p in whole.frontier_.points
    ]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_spreads_of_what_routers_read_are_numpys(dtype, monkeypatch):
    in_blocks_of(monkeypatch, 7)
    array = np.random.default_rng(0).normal(3.0, 2.0, size=(100, C)).astype(dtype)
    spread = np.sqrt(_summed_squares(array, array.mean(axis=0, dtype=np.float64)) / len(array))
    assert spread.tolist() == array.std(axis=0, dtype=np.float64).tolist()
