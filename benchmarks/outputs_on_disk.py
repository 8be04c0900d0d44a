"""Whether recorded outputs of a large pool fit: 44 models on 1,300,000 samples, as in TinySaver's appendix 6.1.

Writes such outputs (simulated confidences and correctness) to a folder, maps them into memory and finds from them the
job ratio of every model as a saver of the largest. Reports the size on disk, seconds, and the peak of the process's
resident memory, once before and once after, mapped pages included::

    OMP_NUM_THREADS=1 python -m benchmarks.outputs_on_disk [--models 44] [--samples 1300000]
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.saver import job_ratio
from benchmarks.common import describe_machine, print_table, write_result


def peak_gb() -> float:
    """Peak resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def simulate(folder: Path, models: int, samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences (float32) and correctness (bool) on disk, model by model; deeper models are surer and better."""
    confidence = open_memmap(folder / "confidence.npy", mode="w+", dtype=np.float32, shape=(models, samples))
    correct = open_memmap(folder / "correct.npy", mode="w+", dtype=bool, shape=(models, samples))
    rng = np.random.default_rng(seed)
    difficulty = rng.standard_normal(samples, dtype=np.float32)
    for k in range(models):
        strength = 0.3 + 1.2 * k / models - difficulty + 0.7 * rng.standard_normal(samples, dtype=np.float32)
        chance = 1 / (1 + np.exp(-2 * strength))
        confidence[k] = chance
        correct[k] = rng.random(samples, dtype=np.float32) < chance
    return confidence, correct


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=44)
    parser.add_argument("--samples", type=int, default=1_300_000)
    args = parser.parse_args()
    print(describe_machine())
    start_gb = peak_gb()
    rows: list[list[object]] = [["before", 0.0, start_gb]]

    def step(name: str, since: float) -> None:
        rows.append([name, time.perf_counter() - since, peak_gb()])

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        confidence, correct = simulate(folder, args.models, args.samples)
        since = time.perf_counter()
        costs = np.linspace(0.05, 1.0, args.models)
        outputs = ExitOutputs(scores=confidence, quality=correct, stage_costs=np.zeros(args.models), exit_costs=costs)
        step("validated", since)
        since = time.perf_counter()
        outputs.save(folder / "outputs")
        step("saved", since)
        size_mb = sum(f.stat().st_size for f in (folder / "outputs").iterdir()) / 1e6
        since = time.perf_counter()
        outputs = ExitOutputs.load(folder / "outputs", mmap=True)
        step("mapped", since)
        since = time.perf_counter()
        base = outputs.graded[-1]
        ratios = [job_ratio(outputs.scores[k], outputs.graded[k], base) for k in range(args.models - 1)]
        step(f"job ratio of {len(ratios)} savers for the largest model", since)
    print_table(
        f"{args.models} models on {args.samples} samples: {size_mb:.0f} MB on disk",
        ["step", "seconds", "peak resident GB so far"],
        rows,
    )
    payload = {"models": args.models, "samples": args.samples, "size_mb": size_mb, "savers": len(ratios), "steps": rows}
    print(f"\nwritten: {write_result('outputs_on_disk', payload)}")


if __name__ == "__main__":
    main()
