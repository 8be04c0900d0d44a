"""How fast the threshold search is, and what its operating points are worth on data it has not seen.

Measured in one run, on one thread, on a simulated network (``benchmarks/msdnet.py``), so that fresh data never run out:

- **speed**: a frontier of 40 operating points from 50,000 samples, 5 exits and 100 classes, by coordinate search,
  against the 39 points of MSDNet's published rule, as the per-sample loop over torch tensors in which it is published
  and vectorised. All start from confidences and predictions; the softmax before them is the same for all. The loop is
  timed at 3 of its 39 points and multiplied (``--all-points`` runs all 39 once as well). "Evaluation" is one more
  pass over as many samples, as for a test set. Further the exact search for one early
  exit on 1,000,000 samples, 10 exits, and exits that cost something.
- **fresh accuracy**: both frontiers choose by calibration data and are compared on other samples of the same network,
  on an even grid of budgets and, curve against curve, at the costs of the 39 points; mean and spread over seeds.
- **small samples**: optimism (accuracy on calibration data minus accuracy on fresh data), accuracy at equal budgets,
  and what the zero-drop point loses on fresh data, for the searches and for bagging.

Timings: median and quartiles over interleaved repeats, a warm-up round thrown away; processor seconds beside them,
for machines that do other work. Run it with one thread::

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/threshold_search.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adaptexit.core.frontier import ParetoFrontier, evaluate
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.search import SEARCHES, Problem, _bagged, _best_points, _kept_drops, search_thresholds, targets_for
from adaptexit.core.search.methods import geometric_path
from benchmarks.common import (
    interleaved,
    mean_and_sd,
    print_table,
    require_one_thread,
    timed,
    write_result,
)
from benchmarks.msdnet import (
    MSDNET,
    MSDNET_POINTS,
    TEN_EXITS,
    TWO_EXITS,
    MSDNetLoop,
    describe_outputs,
    geometric_frontier,
    simulate,
)

N_POINTS = 40
EXIT_COST = 0.02  # of the full model, where exits cost something
TIMED_POINTS = (10, 20, 30)


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    samples: int = 50_000
    samples_exact: int = 1_000_000
    samples_fresh: int = 200_000
    repeats: int = 5
    seeds: int = 5
    budgets: int = 25
    small: tuple[int, ...] = (500, 2000, 5000)
    small_seeds: int = 10


QUICK = Sizes(
    samples=10_000, samples_exact=20_000, samples_fresh=5000, repeats=2, seeds=2, budgets=7, small=(500,), small_seeds=2
)


# -- speed -------------------------------------------------------------------------------------------------------------


def measure_speed(sizes: Sizes, all_points: bool) -> dict[str, Any]:
    """Seconds of every search, ratios to MSDNet's loop, and whether both geometric rules agree."""
    msdnet = simulate(MSDNET, sizes.samples, seed=0)
    two = simulate(TWO_EXITS, sizes.samples_exact, seed=0)
    ten = simulate(TEN_EXITS, sizes.samples, seed=0)
    loop = MSDNetLoop(msdnet)

    def search(outputs: ExitOutputs, method: str, exit_share: float = 0.0) -> Callable[[], Any]:
        exit_costs = np.append(np.full(outputs.n_exits - 1, exit_share * outputs.full_cost), 0.0)
        costly = outputs.with_costs(outputs.stage_costs, exit_costs)
        return lambda: search_thresholds(costly, method, n_points=N_POINTS)

    functions: dict[str, Callable[[], Any]] = {
        "coord": search(msdnet, "coord"),
        "geometric": search(msdnet, "geometric"),
        "msdnet_sort": loop.sort,
        **{f"msdnet_point_{p}": partial(loop.point, p) for p in TIMED_POINTS},
        "msdnet_evaluation": partial(loop.evaluate, loop.thresholds(20)),
        "coord_evaluation": partial(search_thresholds(msdnet, "coord", n_points=N_POINTS)[0].on, msdnet),
        "exact_2_exits": search(two, "exact"),
        "exact_2_exits_costly": search(two, "exact", EXIT_COST),
        "coord_costly": search(msdnet, "coord", EXIT_COST),
        "coord_10_exits": search(ten, "coord"),
        "coord_10_exits_costly": search(ten, "coord", EXIT_COST),
    }
    timings = interleaved(functions, sizes.repeats)

    whole = {"seconds": _whole_frontier(timings, "median"), "cpu_seconds": _whole_frontier(timings, "cpu_median")}
    points = {p: loop.point(p) for p in TIMED_POINTS}
    if all_points:
        loop_seconds = timed(lambda: points.update({p: loop.point(p) for p in MSDNET_POINTS}))
        for totals, total in zip(whole.values(), loop_seconds, strict=True):
            totals["msdnet_loop_all_points_run"] = total
    for kind, totals in list(whole.items()):
        whole[f"ratio_to_coord_{kind}"] = {
            name: total / totals["coord_and_evaluation" if name.endswith("evaluation") else "coord"]
            for name, total in totals.items()
        }
    problem = Problem.from_outputs(msdnet)
    ours = {p: evaluate(msdnet, *problem.thresholds(geometric_path(problem)[p - 1])) for p in points}
    differences = {
        "accuracy": max(abs(ours[p].accuracy - points[p][0]) for p in points),
        "cost": max(abs(ours[p].cost - points[p][1]) for p in points),
        "points": list(points),
    }
    return {
        "network": describe_outputs(msdnet),
        "timings": timings,
        "whole_frontier": whole,
        "largest_difference_of_geometric_rules": differences,
    }


def _whole_frontier(timings: dict[str, dict[str, float]], kind: str) -> dict[str, float]:
    """Seconds for all points of every search; MSDNet's loop is the median of the points timed, multiplied."""
    seconds = {name: timing[kind] for name, timing in timings.items()}
    per_point = float(np.median([seconds[f"msdnet_point_{p}"] for p in TIMED_POINTS]))
    loop = seconds["msdnet_sort"] + len(MSDNET_POINTS) * per_point
    return {
        "coord": seconds["coord"],
        "coord_and_evaluation": seconds["coord"] + seconds["coord_evaluation"],
        "geometric_vectorised": seconds["geometric"],
        "msdnet_loop": loop,
        "msdnet_loop_and_evaluation": loop + len(MSDNET_POINTS) * seconds["msdnet_evaluation"],
    }


def print_speed(speed: dict[str, Any], sizes: Sizes) -> None:
    """Tables of seconds and of ratios."""
    print_table(
        f"Speed: N={sizes.samples:,} (exact: N={sizes.samples_exact:,}), median of {sizes.repeats}",
        ("what", "milliseconds", "quartiles", "processor milliseconds"),
        [
            (name, f"{1000 * t['median']:.1f}", f"{1000 * t['q1']:.1f} to {1000 * t['q3']:.1f}",
             f"{1000 * t['cpu_median']:.1f}")
            for name, t in speed["timings"].items()
        ],
    )  # fmt: skip
    whole = speed["whole_frontier"]
    print_table(
        f"Whole frontier, 5 free exits (msdnet_loop: 39 times the median of points {TIMED_POINTS})",
        ("search", "seconds", "times coord", "processor seconds", "times coord"),
        [(name, *(kind[name] for kind in (
            whole["seconds"], whole["ratio_to_coord_seconds"],
            whole["cpu_seconds"], whole["ratio_to_coord_cpu_seconds"],
        ))) for name in whole["seconds"]],
    )  # fmt: skip
    agree = speed["largest_difference_of_geometric_rules"]
    print(f"\nBoth geometric rules differ by at most {agree['accuracy']:.1e} in accuracy, {agree['cost']:.1e} in cost.")


# -- accuracy on fresh data --------------------------------------------------------------------------------------------


def measure_fresh_accuracy(sizes: Sizes) -> dict[str, Any]:
    """Accuracy of coord minus that of the geometric rule, in points, on an even grid and at the 39 points' costs."""
    on_grid, at_costs = [], []
    for seed in range(sizes.seeds):
        calibration, fresh = (
            simulate(MSDNET, n, seed=7000 * part + seed) for part, n in ((1, sizes.samples), (2, sizes.samples_fresh))
        )
        geometric = geometric_frontier(calibration)
        coord, _ = search_thresholds(calibration, "coord", n_points=N_POINTS)
        # Both must have a point to choose: the grid starts at the cheapest of the 39.
        budgets = np.linspace(max(geometric.cost[0], coord.cost[0]), 1.0, sizes.budgets)
        on_grid.append(_differences(coord, geometric, fresh, budgets))

        at_costs.append(_curve_differences(coord, geometric, calibration, fresh))
    return {"even_budgets": _over_seeds(on_grid), "costs_of_the_39_points": _over_seeds(at_costs)}


def _curve_differences(
    coord: ParetoFrontier, geometric: ParetoFrontier, calibration: ExitOutputs, fresh: ExitOutputs
) -> dict[str, NDArray[np.float64]]:
    """Coord's curve minus the geometric rule's at the cost that each of its 39 points has on the same data (39,).

    Between two of coord's points the curve is straight: what choosing at random between them gives.
    """
    early = [i for i, point in enumerate(geometric.points) if point.on[:-1].any()]
    differences = {}
    for name, outputs in (("calibrated", calibration), ("fresh", fresh)):
        curve, rule = coord.on(outputs), geometric.on(outputs)
        order = np.argsort(curve.cost, kind="stable")
        at_cost = np.interp(rule.cost[early], curve.cost[order], curve.accuracy[order])
        differences[name] = 100 * (at_cost - rule.accuracy[early])
    return {"budget": geometric.cost[early], **differences, "cost": np.zeros(len(early))}


def _differences(
    coord: ParetoFrontier, geometric: ParetoFrontier, fresh: ExitOutputs, budgets: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Coord minus geometric at every budget (B,): accuracy in points where chosen and on fresh data, fresh cost."""
    here = _served(coord, budgets) - _served(geometric, budgets)
    elsewhere = _served(coord.on(fresh), budgets) - _served(geometric.on(fresh), budgets)
    return {"budget": budgets, "calibrated": 100 * here[0], "fresh": 100 * elsewhere[0], "cost": elsewhere[1]}


def _served(frontier: ParetoFrontier, budgets: NDArray[np.float64]) -> NDArray[np.float64]:
    """Accuracy and cost of the points chosen for each budget, shape (2, B)."""
    points = [frontier.at(budget=float(budget)) for budget in budgets]
    return np.array([[point.accuracy for point in points], [point.cost for point in points]])


def _over_seeds(runs: list[dict[str, NDArray[np.float64]]]) -> dict[str, Any]:
    differences = {name: np.stack([run[name] for run in runs]) for name in runs[0]}  # each (seeds, B)
    fresh, calibration = differences["fresh"], differences["calibrated"]
    return {
        "mean": mean_and_sd(fresh.mean(axis=1)),
        "worst": mean_and_sd(fresh.min(axis=1)),
        "worst_of_all": float(fresh.min()),
        "worst_of_means": float(fresh.mean(axis=0).min()),
        "mean_calibrated": mean_and_sd(calibration.mean(axis=1)),
        "worst_calibrated": float(calibration.min()),
        "mean_fresh_cost_difference": float(differences["cost"].mean()),
        "by_budget": {
            "budget": differences["budget"].mean(axis=0).tolist(),
            "calibrated": calibration.mean(axis=0).tolist(),
            "fresh": fresh.mean(axis=0).tolist(),
            "fresh_sd": fresh.std(axis=0, ddof=1).tolist(),
        },
    }


def print_fresh_accuracy(fresh: dict[str, Any], sizes: Sizes) -> None:
    """Tables of the differences: summary first, then budget by budget."""
    print_table(
        f"Fresh accuracy, coord minus geometric, in points: N={sizes.samples:,}, {sizes.seeds} seeds",
        ("budgets", "mean ± sd", "worst budget ± sd", "worst of the means", "worst of all", "calibrated: mean",
         "calibrated: worst"),
        [
            (name.replace("_", " "), f"{part['mean']['mean']:+.3f} ± {part['mean']['sd']:.3f}",
             f"{part['worst']['mean']:+.3f} ± {part['worst']['sd']:.3f}", f"{part['worst_of_means']:+.3f}",
             f"{part['worst_of_all']:+.3f}", f"{part['mean_calibrated']['mean']:+.3f}",
             f"{part['worst_calibrated']:+.3f}")
            for name, part in fresh.items()
        ],
    )  # fmt: skip
    for name, part in fresh.items():
        print_table(
            f"The same, budget by budget: {name.replace('_', ' ')}",
            ("budget", "calibrated", "fresh", "sd over seeds"),
            [
                (f"{budget:.3f}", f"{own:+.3f}", f"{mean:+.3f}", f"{sd:.3f}")
                for budget, own, mean, sd in zip(*part["by_budget"].values(), strict=True)
            ],
        )


# -- small samples -----------------------------------------------------------------------------------------------------


def measure_small_samples(sizes: Sizes) -> list[dict[str, Any]]:
    """Optimism and fresh accuracy of every way to search, per calibration size."""
    fresh = simulate(MSDNET, sizes.samples_fresh, seed=3000)
    budgets = np.linspace(0.2, 1.0, 17)
    rows = []
    for n_samples in sizes.small:
        runs = [_small_sample_run(n_samples, seed, fresh, budgets) for seed in range(sizes.small_seeds)]
        for way in runs[0]:
            figures = {name: mean_and_sd([run[way][name] for run in runs]) for name in runs[0][way]}
            rows.append({"n_samples": n_samples, "search": way, **figures})
    return rows


def _small_sample_run(
    n_samples: int, seed: int, fresh: ExitOutputs, budgets: NDArray[np.float64]
) -> dict[str, dict[str, float]]:
    calibration = simulate(MSDNET, n_samples, seed=4000 + seed)
    problem = Problem.from_outputs(calibration)
    targets = targets_for(problem, N_POINTS, drops=(), budgets=budgets)
    coord = SEARCHES["coord"]
    proposals = {
        "coord": coord(problem, targets),
        "coord, bagged": _kept_drops(problem, targets, _bagged(calibration, problem, coord, targets, seed)),
        "shared": SEARCHES["shared"](problem, targets),
    }
    frontiers = {
        way: ParetoFrontier.of(_best_points(calibration, problem, policies, targets), calibration)
        for way, policies in proposals.items()
    }
    frontiers["geometric"] = geometric_frontier(calibration)
    figures = {}
    for way, frontier in frontiers.items():
        elsewhere = frontier.on(fresh)
        before, after = _served(frontier, budgets), _served(elsewhere, budgets)
        zero_drop = elsewhere.at(max_drop=0.0)
        figures[way] = {
            "optimism": 100 * float(np.mean(before[0] - after[0])),
            "fresh_accuracy": 100 * float(np.mean(after[0])),
            "fresh_cost": float(np.mean(after[1])),
            "zero_drop_loss": 100 * (elsewhere.full_accuracy - zero_drop.accuracy),
            "zero_drop_cost": zero_drop.cost,
        }
    return figures


def print_small_samples(rows: Sequence[dict[str, Any]], sizes: Sizes) -> None:
    """One row a calibration size and search."""
    figures = ("optimism", "fresh_accuracy", "fresh_cost", "zero_drop_loss", "zero_drop_cost")
    print_table(
        f"Small samples, 5 exits, mean ± sd over {sizes.small_seeds} seeds (accuracies in points, costs relative)",
        ("N", "search", "optimism", "fresh accuracy at equal budgets", "its cost", "zero drop: loss", "its cost"),
        [
            (row["n_samples"], row["search"], *(f"{row[f]['mean']:.3f} ± {row[f]['sd']:.3f}" for f in figures))
            for row in rows
        ],
    )


# -- run ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Speed and fresh accuracy of the threshold search.")
    parser.add_argument("--all-points", action="store_true", help="run MSDNet's loop at all of its 39 points (minutes)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script; writes no result")
    args = parser.parse_args()
    require_one_thread(parser)
    torch.set_num_threads(1)
    sizes = QUICK if args.quick else Sizes()

    speed = measure_speed(sizes, args.all_points)
    print_speed(speed, sizes)
    fresh = measure_fresh_accuracy(sizes)
    print_fresh_accuracy(fresh, sizes)
    small = measure_small_samples(sizes)
    print_small_samples(small, sizes)
    if not args.quick:
        payload = {
            "sizes": vars(sizes),
            "n_points": N_POINTS,
            "exit_cost": EXIT_COST,
            "speed": speed,
            "fresh_accuracy": fresh,
            "small_samples": small,
        }
        print(f"\nWritten: {write_result('threshold_search', payload).name}")


if __name__ == "__main__":
    main()
