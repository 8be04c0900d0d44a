"""What calibrators take beside the recorded outputs, where these are larger than one would like to hold.

Maps simulated logits of K exits on N samples of C classes from disk, calibrates on them, and calibrates thresholds for
scores alone of many samples. Reports seconds and the peak of the process's own memory (Linux' ``RssAnon``: mapped pages
are left out, as the system takes them back when it needs them) above what was there before::

    OMP_NUM_THREADS=1 python -m benchmarks.calibration_memory [--samples 50000] [--score-samples 1300000]
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from adaptexit.calibrators.eenet import EENetScheduler
from adaptexit.calibrators.em import EMRouter
from adaptexit.calibrators.temperature import TemperatureCalibrator
from adaptexit.calibrators.threshold import ThresholdCalibrator
from adaptexit.core.outputs import ExitOutputs
from benchmarks.common import describe_machine, print_table, write_result


def own_memory_gb() -> float:
    """Memory of this process that is no file."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) / 1e6


def peak_above(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that work takes, and the peak of memory in GB above what was taken before."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier work left free would hide what this work takes
    before, peaks, done = own_memory_gb(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peaks.append(own_memory_gb() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    since = time.perf_counter()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return time.perf_counter() - since, max(peaks)


def simulate(path: Path, exits: int, samples: int, classes: int) -> ExitOutputs:
    """Mapped logits; deeper exits are surer and better."""
    logits = open_memmap(path, mode="w+", dtype=np.float32, shape=(exits, samples, classes))
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=samples)
    for k in range(exits):
        for start in range(0, samples, 5000):
            rows = slice(start, start + 5000)
            logits[k, rows] = rng.standard_normal(logits[k, rows].shape, dtype=np.float32)
            strength = 3.0 + k + 2.0 * rng.standard_normal(len(labels[rows]), dtype=np.float32)
            logits[k, np.arange(samples)[rows], labels[rows]] += strength
    logits.flush()
    return ExitOutputs.from_logits(
        np.load(path, mmap_mode="r"),
        labels,
        stage_costs=np.full(exits, 1e9),
        exit_costs=np.zeros(exits),
        cost_unit="MACs",
    )


def scores_alone(exits: int, samples: int) -> ExitOutputs:
    """Confidences and correctness; deeper exits are surer and better."""
    rng = np.random.default_rng(0)
    ease = rng.standard_normal(samples, dtype=np.float32)
    scores, quality = np.empty((exits, samples), dtype=np.float32), np.empty((exits, samples), dtype=bool)
    for k in range(exits):
        scores[k] = 1 / (1 + np.exp(-(ease + 0.1 * k + 0.7 * rng.standard_normal(samples, dtype=np.float32))))
        quality[k] = rng.random(samples, dtype=np.float32) < scores[k]
    return ExitOutputs(scores=scores, quality=quality, stage_costs=np.ones(exits), exit_costs=np.zeros(exits))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exits", type=int, default=3)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--score-exits", type=int, default=10)
    parser.add_argument("--score-samples", type=int, default=1_300_000)
    args = parser.parse_args()
    print(describe_machine())
    warm_up = scores_alone(2, 100)
    ThresholdCalibrator().fit(warm_up)
    rows: list[list[object]] = []

    def measure(name: str, work: Callable[[], object]) -> None:
        rows.append([name, *peak_above(work)])
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "logits.npy"
        outputs = simulate(path, args.exits, args.samples, args.classes)
        few = outputs.take(np.arange(500))
        calibrators = {
            "outputs from logits": None,
            "thresholds on the entropy": ThresholdCalibrator("entropy"),
            "EM routers on logits": EMRouter(inputs="logits", prior="per_sample", epochs=2),
            "EENet": EENetScheduler(epochs=2),
            "temperature": TemperatureCalibrator(),
        }
        for name, calibrator in calibrators.items():
            if calibrator is None:
                costs = {"stage_costs": np.ones(args.exits), "exit_costs": np.zeros(args.exits)}
                measure(name, lambda c=costs: ExitOutputs.from_logits(outputs.logits, outputs.labels, **c))
            else:
                calibrator.fit(few)  # what is imported on the way is no memory of the data's
                measure(name, lambda fit=calibrator.fit: fit(outputs))
    logits_gb = args.exits * args.samples * args.classes * 4 / 1e9
    many = scores_alone(args.score_exits, args.score_samples)
    measure(
        f"thresholds, {args.score_exits} exits, {args.score_samples} samples", lambda: ThresholdCalibrator().fit(many)
    )
    print_table(
        f"{args.exits} exits, {args.samples} samples, {args.classes} classes: {logits_gb:.2f} GB of mapped logits",
        ["calibration", "seconds", "GB above"],
        rows,
    )
    payload = {**vars(args), "logits_gb": logits_gb, "rows": rows}
    print(f"\nwritten: {write_result('calibration_memory', payload)}")


if __name__ == "__main__":
    main()
