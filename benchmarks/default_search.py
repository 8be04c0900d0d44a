"""How long the default search takes: in multiples of sorting the scores, on one early exit, and on very many samples.

    OMP_NUM_THREADS=1 python -m benchmarks.default_search

A frontier of 40 and of 100 points from 50,000 samples of simulated networks with 5 free exits
(``benchmarks/msdnet.py``: exits that differ, exits that are alike), in multiples of ``np.argsort`` of every exit's
scores in the same round; one early exit on 1,000,000 samples; and, once, 10 exits on 1,300,000 samples with the
memory that it takes beyond the outputs. Medians and quartiles over interleaved rounds, a warm-up round thrown
away."""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.search import search_thresholds
from benchmarks.common import interleaved, middle, print_table, ratios, require_one_thread, timed, write_result
from benchmarks.msdnet import ALIKE, MSDNET, TWO_EXITS, simulate

SAMPLES, MANY, REPEATS = 50_000, 1_000_000, 5
VERY_MANY, TEN = 1_300_000, 10


def measure_default() -> dict[str, Any]:
    """Seconds of the default search and of sorting, and their ratios within a round."""
    networks = {
        "exits differ": simulate(MSDNET, SAMPLES, seed=0),
        "exits alike": simulate(ALIKE, SAMPLES, 0),
    }
    functions: dict[str, Callable[[], Any]] = {}
    for name, outputs in networks.items():
        functions[f"{name}, sort"] = partial(_sort, outputs)
        for n_points in (40, 100):
            functions[f"{name}, {n_points} points"] = partial(search_thresholds, outputs, n_points=n_points)
    two = simulate(TWO_EXITS, MANY, seed=0)
    functions["two exits, 100 points"] = partial(search_thresholds, two, n_points=100)
    timings = interleaved(functions, REPEATS)
    over_sort = {
        name: ratios(timings, name, f"{name.split(',')[0]}, sort") for name in functions if name.startswith("exits")
    }
    return {"timings": timings, "over_sort": over_sort}


def _sort(outputs: ExitOutputs) -> None:
    for scores in outputs.scores:
        np.argsort(scores)


def print_default(default: dict[str, Any]) -> None:
    """One row a search."""
    rows = [
        (name, middle(t, unit=1000), middle(default["over_sort"][name]) if name in default["over_sort"] else "")
        for name, t in default["timings"].items()
    ]
    title = f"The default search: N={SAMPLES:,} (two exits: {MANY:,})"
    print_table(title, ("what", "milliseconds (quartiles)", "times the sort (quartiles)"), rows)


def measure_very_many() -> dict[str, float]:
    """Seconds and gigabytes beyond the outputs, for 10 exits on 1,300,000 samples, run once."""
    rng = np.random.default_rng(0)
    ease = rng.random(VERY_MANY, dtype=np.float32)
    scores = np.stack([ease + 0.2 * rng.standard_normal(VERY_MANY, dtype=np.float32) for _ in range(TEN)])
    skill = 0.5 + 0.04 * np.arange(TEN)[:, None]
    wrong = np.stack([rng.random(VERY_MANY, dtype=np.float32) >= s + 0.5 * (ease - 0.5) for s in skill[:, 0]])
    outputs = ExitOutputs(
        predictions=wrong.astype(np.int8), labels=np.zeros(VERY_MANY, dtype=np.int8), n_classes=2, scores=scores,
        stage_costs=np.ones(TEN), exit_costs=np.zeros(TEN),
    )  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, _ = timed(partial(search_thresholds, outputs))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "gigabytes": (peak - before) / 2**20}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    require_one_thread(parser)
    parser.parse_args()
    very_many = measure_very_many()  # first, as the peak of memory never falls
    default = measure_default()
    print_default(default)
    row = (f"{very_many['seconds']:.0f}", f"{very_many['gigabytes']:.2f}")
    print_table("10 exits, 1,300,000 samples, once", ("seconds", "GB beyond the outputs"), [row])
    write_result("default_search", {"default": default, "very_many": very_many})


if __name__ == "__main__":
    main()
