"""How fast class precision margins are found, and how often their thresholds keep what they promise on fresh data.

Measured in one run, on one thread, on a simulated network (``simulate``), so that fresh data never run out:

- **speed**: thresholds of all classes for 11 margins, by one sort an exit (``margin_thresholds``) and by the loops in
  which the rule is usually written: for every margin, exit and class, candidate thresholds from the smallest on, until
  one is precise enough, each judged by NumPy masks over all samples. They are timed on a few classes and multiplied.
  Masks over the samples of the one cell only are a cheaper way to write the same, timed whole. Both stop at the first
  success. All give the same thresholds, which is checked. For one early exit, and for four with and without survivors.
- **fresh data**: share of the cells (one early exit, 20 classes, margin .05) whose precision on fresh data is not above
  the target that was set, by bound and calibration samples; mean and spread over seeds.

Timings: median and quartiles over interleaved repeats, a warm-up round thrown away. Run it with one thread::

    OMP_NUM_THREADS=1 python -m benchmarks.class_margins
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from adaptexit.core.margins import Rule, class_precision, margin_thresholds
from adaptexit.core.outputs import ExitOutputs
from benchmarks.common import (
    interleaved,
    mean_and_sd,
    middle,
    print_table,
    ratios,
    require_one_thread,
    summarised,
    write_result,
)

MARGINS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)
FEW_CLASSES = 4  # timed where the loops mask all samples

FRESH_CLASSES, FRESH_MARGIN = 20, 0.05
RULES = {
    "none": Rule(),
    "none, min_support 30": Rule(min_support=30),
    "wilson": Rule(bound="wilson"),
    "fixed_sequence": Rule(bound="fixed_sequence"),
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    compared: tuple[tuple[int, int], ...] = ((10_000, 20), (50_000, 100))  # samples, classes
    ours_only: tuple[int, int] = (1_000_000, 1000)
    cascade: tuple[int, int] = (50_000, 100)
    repeats: int = 5
    calibration: tuple[int, ...] = (2000, 10_000)
    fresh: int = 400_000
    seeds: int = 40


QUICK = Sizes(
    compared=((2000, 10),), ours_only=(20_000, 100), cascade=(2000, 10), repeats=2, calibration=(2000,), fresh=50_000,
    seeds=3,
)  # fmt: skip


# -- a network ---------------------------------------------------------------------------------------------------------

TWO_EXITS = (0.8, 1.6)
FIVE_EXITS = (0.5, 0.8, 1.1, 1.3, 1.6)
"""Strength of every exit: at 1.6 about 82% of the answers are right, at 0.8 some 67%."""

EASE_SD, CLASS_SD, NOISE_SD = 1.2, 0.5, 1.2


def simulate(strengths: tuple[float, ...], n_samples: int, n_classes: int, seed: int) -> ExitOutputs:
    """Outputs of a network on random samples, without their logits.

    The evidence of an exit is its strength plus the ease of the sample and of its class, the same at all exits, plus
    noise of its own. Positive evidence: the answer is right; otherwise it is any other class. The score is an
    overconfident look at how far the evidence lies from 0, with noise.
    """
    ease_of_class = CLASS_SD * np.random.default_rng(0).standard_normal(n_classes)
    rng = np.random.default_rng([1, seed])
    labels = rng.integers(n_classes, size=n_samples)
    ease = ease_of_class[labels] + EASE_SD * rng.standard_normal(n_samples)
    predictions = np.empty((len(strengths), n_samples), dtype=np.int16)
    scores = np.empty((len(strengths), n_samples), dtype=np.float32)
    for k, strength in enumerate(strengths):
        evidence = strength + ease + NOISE_SD * rng.standard_normal(n_samples)
        others = (labels + rng.integers(1, n_classes, size=n_samples)) % n_classes
        predictions[k] = np.where(evidence > 0, labels, others)
        scores[k] = expit(1.5 * np.abs(evidence) + 0.7 * rng.standard_normal(n_samples))
    return ExitOutputs(
        predictions=predictions, scores=scores, labels=labels, n_classes=n_classes,
        costs=np.arange(1, len(strengths) + 1),
    )  # fmt: skip


# -- the loops ---------------------------------------------------------------------------------------------------------


def looped(
    outputs: ExitOutputs, cascade_aware: bool, cell: Callable[..., float], known: NDArray[np.float64], n_classes: int
) -> NDArray[np.float64]:
    """Thresholds (M, K, C), one margin, exit and class at a time; those beyond ``n_classes`` are taken as known."""
    precision = class_precision(outputs.predictions[-1], outputs.labels, outputs.n_classes)
    thresholds = known.copy()
    for m, margin in enumerate(MARGINS):
        alive = np.ones(outputs.n_samples, dtype=bool)
        for k in range(outputs.n_exits - 1):
            predictions, scores = outputs.predictions[k], outputs.scores[k]
            for c in range(n_classes):
                here = (predictions == c) & alive
                thresholds[m, k, c] = cell(scores, predictions, outputs.labels, here, c, (1 - margin) * precision[c])
            if cascade_aware:
                alive &= ~(scores > thresholds[m, k][predictions])
    return thresholds


def in_the_cell(scores: Any, predictions: Any, labels: Any, here: Any, c: int, target: float) -> float:
    """The smallest threshold that is precise enough; masks over the samples of the cell."""
    own, right = scores[here], labels[here] == c
    for t in [-np.inf, *np.unique(own)]:
        leaving = own > t
        n = np.count_nonzero(leaving)
        if n and np.count_nonzero(right & leaving) / n > target:
            return float(t)
    return np.inf


def over_all(scores: Any, predictions: Any, labels: Any, here: Any, c: int, target: float) -> float:
    """The same with masks over all samples."""
    for t in [-np.inf, *np.unique(scores[here])]:
        leaving = here & (scores > t)
        n = leaving.sum()
        if n and (leaving & (labels == c)).sum() / n > target:
            return float(t)
    return np.inf


# -- speed -------------------------------------------------------------------------------------------------------------


def measure_speed(sizes: Sizes) -> list[dict[str, Any]]:
    """Seconds and ratios for every size and number of exits."""
    rows = []
    for n_samples, n_classes in sizes.compared:
        rows.append(_compared(simulate(TWO_EXITS, n_samples, n_classes, seed=0), False, sizes))
    five = simulate(FIVE_EXITS, *sizes.cascade, seed=0)
    rows += [_compared(five, cascade_aware, sizes) for cascade_aware in (False, True)]
    large = simulate(TWO_EXITS, *sizes.ours_only, seed=0)
    timings = interleaved({"sorted": partial(margin_thresholds, large, MARGINS, cascade_aware=False)}, sizes.repeats)
    return [*rows, _described(large, False) | {"timings": timings}]


def _described(outputs: ExitOutputs, cascade_aware: bool) -> dict[str, Any]:
    return {
        "n_samples": outputs.n_samples, "n_classes": outputs.n_classes, "n_exits": outputs.n_exits,
        "cascade_aware": cascade_aware, "accuracies": outputs.accuracies.tolist(),
    }  # fmt: skip


def _compared(outputs: ExitOutputs, cascade_aware: bool, sizes: Sizes) -> dict[str, Any]:
    n_classes = outputs.n_classes or 0
    ours = partial(margin_thresholds, outputs, MARGINS, cascade_aware=cascade_aware)
    thresholds, _ = ours()
    functions = {
        "sorted": ours,
        "loops_in_cells": partial(looped, outputs, cascade_aware, in_the_cell, thresholds, n_classes),
        "loops_part": partial(looped, outputs, cascade_aware, over_all, thresholds, FEW_CLASSES),
    }
    if not all(np.array_equal(function(), thresholds) for name, function in functions.items() if name != "sorted"):
        raise AssertionError("the loops and the sort give different thresholds")
    timings = interleaved(functions, sizes.repeats)
    seconds = np.multiply(timings["loops_part"]["seconds"], n_classes / FEW_CLASSES)
    timings["loops"] = summarised(seconds) | {"seconds": seconds.tolist()}
    return _described(outputs, cascade_aware) | {
        "timings": timings,
        "ratio": ratios(timings, "loops", "sorted"),
        "ratio_in_cells": ratios(timings, "loops_in_cells", "sorted"),
        "share_finite": float(np.isfinite(thresholds[:, :-1]).mean()),
        "share_never": float(np.isposinf(thresholds[:, :-1]).mean()),
    }


def print_speed(rows: list[dict[str, Any]], sizes: Sizes) -> None:
    """Table of times and ratios."""
    print_table(
        f"Thresholds of {len(MARGINS)} margins: median of {sizes.repeats} rounds (quartiles)",
        ("N", "classes", "early exits", "counted on", "one sort, ms", f"loops, s ({FEW_CLASSES} classes, multiplied)",
         "loops / sort", "loops in cells, s", "loops in cells / sort"),
        [
            (f"{row['n_samples']:,}", row["n_classes"], row["n_exits"] - 1,
             "survivors" if row["cascade_aware"] else "all",
             middle(row["timings"]["sorted"], unit=1000),
             *([middle(row["timings"]["loops"]), middle(row["ratio"]),
                middle(row["timings"]["loops_in_cells"]), middle(row["ratio_in_cells"])]
               if "ratio" in row else [""] * 4))
            for row in rows
        ],
    )  # fmt: skip


# -- fresh data --------------------------------------------------------------------------------------------------------


def measure_fresh(sizes: Sizes) -> list[dict[str, Any]]:
    """For each number of calibration samples and rule: share of the cells that miss, and what leaves early."""
    fresh = simulate(TWO_EXITS, sizes.fresh, FRESH_CLASSES, seed=10_000)
    rows = []
    for n_samples in sizes.calibration:
        runs = [_misses(simulate(TWO_EXITS, n_samples, FRESH_CLASSES, seed), fresh) for seed in range(sizes.seeds)]
        for name in RULES:
            figures = {figure: mean_and_sd([run[name][figure] for run in runs]) for figure in runs[0][name]}
            rows.append({"n_samples": n_samples, "rule": name, **figures})
    return rows


def _misses(calibration: ExitOutputs, fresh: ExitOutputs) -> dict[str, dict[str, float]]:
    """Figures of every rule on one calibration set."""
    set_for = (1 - FRESH_MARGIN) * class_precision(calibration.predictions[-1], calibration.labels, FRESH_CLASSES)
    true = (1 - FRESH_MARGIN) * class_precision(fresh.predictions[-1], fresh.labels, FRESH_CLASSES)
    figures = {}
    for name, rule in RULES.items():
        cutoffs = margin_thresholds(calibration, [FRESH_MARGIN], cascade_aware=False, rule=rule)[1][0, 0]
        leaving = fresh.scores[0] > cutoffs[fresh.predictions[0]]
        precision = class_precision(fresh.predictions[0][leaving], fresh.labels[leaving], FRESH_CLASSES)
        is_open = np.isfinite(precision)
        figures[name] = {
            "missed": float(np.mean(is_open & (precision <= set_for))),
            "missed_of_true_target": float(np.mean(is_open & (precision <= true))),
            "missed_of_open": float(np.mean(precision[is_open] <= set_for[is_open])) if is_open.any() else 0.0,
            "open": float(is_open.mean()),
            "leaving": float(leaving.mean()),
        }
    return figures


def print_fresh(rows: list[dict[str, Any]], sizes: Sizes) -> None:
    """Table of shares in percent."""

    def percent(row: dict[str, Any], figure: str) -> str:
        return f"{100 * row[figure]['mean']:.1f} ± {100 * row[figure]['sd']:.1f}"

    figures = ("missed", "missed_of_open", "missed_of_true_target", "open", "leaving")
    print_table(
        f"Cells that miss their target on {sizes.fresh:,} fresh samples, %: {FRESH_CLASSES} classes, margin "
        f"{FRESH_MARGIN}, delta 0.1, one early exit, {sizes.seeds} seeds (mean ± sd)",
        ("N", "bound", "of all cells", "of the open cells", "of all, target from the true precision", "cells open",
         "samples that leave"),
        [(f"{row['n_samples']:,}", row["rule"], *(percent(row, figure) for figure in figures)) for row in rows],
    )  # fmt: skip


# -- run ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Speed of class precision margins, and what they keep on fresh data.")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script; writes no result")
    args = parser.parse_args()
    require_one_thread(parser)
    sizes = QUICK if args.quick else Sizes()

    speed = measure_speed(sizes)
    print_speed(speed, sizes)
    fresh = measure_fresh(sizes)
    print_fresh(fresh, sizes)
    if not args.quick:
        payload = {
            "sizes": vars(sizes),
            "margins": MARGINS,
            "few_classes": FEW_CLASSES,
            "fresh_classes": FRESH_CLASSES,
            "fresh_margin": FRESH_MARGIN,
            "rules": {name: vars(rule) for name, rule in RULES.items()},
            "speed": speed,
            "fresh": fresh,
        }
        print(f"\nWritten: {write_result('class_margins', payload).name}")


if __name__ == "__main__":
    main()
