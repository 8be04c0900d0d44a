"""Cascades of pretrained CIFAR ResNets on CIFAR-10 (JPEG): cost and accuracy at the point tuned for no drop.

ResNet-20 -> 56, ResNet-8 -> 56 and ResNet-8 -> 20 -> 56, thresholds tuned on ``val``, reported on ``test``:

- relative cost and test accuracy minus the base's at allowed drops of 1, 0.5, 0.1 and 0 points, with a 95% interval
  from a paired bootstrap over the test images (thresholds held);
- the same at no drop over random re-splits of all images into halves to tune and to test on, which shows how much of
  it is luck: mean and spread;
- what the third model adds: the cost of 8 -> 20 -> 56 minus that of 20 -> 56, on the same re-splits;
- TinySaver's "max performance": the most accurate thresholds at any cost, found on ``val`` and reported on ``test``,
  found on ``test`` itself (as the paper does, whose figures are a choice among thresholds on the data reported), and on
  the re-splits.

The networks answer once; everything else is arithmetic on what they answered::

    OMP_NUM_THREADS=1 python -m benchmarks.cascade_cifar10 --data DIR --weights DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from adaptexit import CascadeSaver, ExitOutputs, ThresholdCalibrator
from adaptexit.core.search import search_thresholds
from benchmarks.common import describe_machine, mean_and_sd, print_table, write_result
from examples.cifar import images, pretrained

CASCADES = {"20 -> 56": (20,), "8 -> 56": (8,), "8 -> 20 -> 56": (8, 20)}
DROPS = (0.01, 0.005, 0.001, 0.0)
DROP_NAMES = [f"{100 * drop:g}" for drop in DROPS]


def paired_interval(difference: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the mean of paired differences."""
    interval = bootstrap(
        (difference,), np.mean, n_resamples=5000, method="percentile", rng=seed, batch=100
    ).confidence_interval
    return float(interval.low), float(interval.high)


def at_drops(calibration: ExitOutputs, test: ExitOutputs) -> dict[str, Any]:
    """Tuned on one, reported on the other, for every allowed drop."""
    calibrator = ThresholdCalibrator().fit(calibration)
    figures = {}
    for drop in DROPS:
        point = calibrator.frontier_.at(max_drop=drop)
        exits = calibrator.exit_index(test, point)
        gain = test.graded[exits, np.arange(test.n_samples)].astype(float) - test.graded[-1]
        paths = test.path_costs(point.on) / test.full_cost
        low, high = paired_interval(gain)
        figures[f"{100 * drop:g}"] = {
            "cost_calibrated": point.cost,
            "cost_test": float(paths[exits].mean()),
            "accuracy_minus_base_points": 100 * float(gain.mean()),
            "interval_points": [100 * low, 100 * high],
            "exit_rates_test": np.bincount(exits, minlength=test.n_exits) / test.n_samples,
        }
    return figures | {"search": calibrator.search_report_.search, "full_accuracy_test": test.full_accuracy}


def most_accurate(calibration: ExitOutputs, reported: ExitOutputs) -> tuple[float, float]:
    """TinySaver's "max performance": relative cost and accuracy minus the base's (points) on other data.

    The thresholds are the cheapest of those with the most right answers on the calibration data, of all that there are.
    """
    everything = calibration.path_costs(np.ones(calibration.n_exits, dtype=bool))[-1] / calibration.full_cost
    frontier, _ = search_thresholds(calibration, "exact", budgets=[float(everything)])
    point = frontier.on(reported).points[int(np.argmax(frontier.accuracy))]
    return point.cost, 100 * (point.accuracy - float(np.mean(reported.graded[-1])))


def resplit(both: dict[str, ExitOutputs], n_splits: int) -> dict[str, Any]:
    """The point of no drop over random halves: cost and accuracy minus the base's on the other half."""
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in both}
    most: dict[str, list[tuple[float, float]]] = {name: [] for name in both}
    for seed in range(n_splits):
        order = np.random.default_rng(seed).permutation(next(iter(both.values())).n_samples)
        tune, report = np.array_split(order, 2)
        for name, outputs in both.items():
            calibrator = ThresholdCalibrator().fit(outputs.take(tune))
            point = calibrator.pareto(outputs.take(report)).at(max_drop=0.0)
            base = float(np.mean(outputs.graded[-1][report]))
            rows[name].append((point.cost, 100 * (point.accuracy - base)))
            most[name].append(most_accurate(outputs.take(tune), outputs.take(report)))
    figures: dict[str, Any] = {
        name: {"cost": mean_and_sd([c for c, _ in pairs]), "accuracy_points": mean_and_sd([a for _, a in pairs])}
        for name, pairs in (rows | {f"{name}, most accurate": pairs for name, pairs in most.items()}).items()
    }
    third = [a[0] - b[0] for a, b in zip(rows["8 -> 20 -> 56"], rows["20 -> 56"], strict=True)]
    change = [a[1] - b[1] for a, b in zip(rows["8 -> 20 -> 56"], rows["20 -> 56"], strict=True)]
    figures["third model"] = {"cost": mean_and_sd(third), "accuracy_points": mean_and_sd(change)}
    return figures


def together(first: ExitOutputs, second: ExitOutputs) -> ExitOutputs:
    """Both sets of samples in one."""
    return ExitOutputs(
        predictions=np.concatenate([first.predictions, second.predictions], axis=1),
        scores=np.concatenate([first.scores, second.scores], axis=1),
        labels=np.concatenate([first.labels, second.labels]),
        n_classes=first.n_classes,
        stage_costs=first.stage_costs,
        exit_costs=first.exit_costs,
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with val and test")
    parser.add_argument("--weights", type=Path, required=True, help="folder with resnet*.safetensors")
    parser.add_argument("--splits", type=int, default=50)
    args = parser.parse_args()
    print(describe_machine())
    nets = {depth: pretrained(depth, args.weights) for depth in (8, 20, 56)}
    val, test = images(args.data, "val"), images(args.data, "test")
    payload: dict[str, Any] = {"n_val": len(val[1]), "n_test": len(test[1]), "at_drops": {}}
    both = {}
    for name, savers in CASCADES.items():
        cascade = CascadeSaver(nets[56], [nets[depth] for depth in savers], batch_size=250).fit(*val)
        outputs = cascade.record(*test)
        both[name] = together(cascade.outputs_, outputs)
        figures = at_drops(cascade.outputs_, outputs)
        figures["savers"] = [vars(report) | {"pays": report.pays} for report in cascade.saver_reports_]
        figures["macs"] = cascade.outputs_.exit_costs
        figures["fixed_accuracy_test"] = outputs.accuracies
        figures["most_accurate"] = {
            "val to val": most_accurate(cascade.outputs_, cascade.outputs_),
            "val to test": most_accurate(cascade.outputs_, outputs),
            "test to test": most_accurate(outputs, outputs),
        }
        payload["at_drops"][name] = figures
        print_table(
            f"ResNet {name} on CIFAR-10 (JPEG), tuned on val ({len(val[1])}), reported on test ({len(test[1])}); "
            f"search: {figures['search']}; the base alone: {100 * figures['full_accuracy_test']:.2f}%",
            ["allowed drop (points)", "relative cost val", "relative cost test", "accuracy - base (points)", "95%"],
            [
                [d, f["cost_calibrated"], f["cost_test"], f"{f['accuracy_minus_base_points']:+.2f}",
                 "{:+.2f} to {:+.2f}".format(*f["interval_points"])]
                for d, f in figures.items() if d in DROP_NAMES
            ],
        )  # fmt: skip
    print_table(
        "Max performance: relative cost and accuracy - base (points), by where thresholds were chosen and reported",
        ["cascade", "val to val", "val to test", "test to test"],
        [
            [name, *("{:.3f} / {:+.2f}".format(*pair) for pair in figures["most_accurate"].values())]
            for name, figures in payload["at_drops"].items()
        ],
    )
    payload["resplits"] = resplit(both, args.splits)
    print_table(
        f"No allowed drop, and the most accurate; {args.splits} random halves to tune and to report on: mean (sd)",
        ["cascade", "relative cost", "accuracy - base (points)"],
        [
            [name, *("{mean:.3f} ({sd:.3f})".format(**f[key]) for key in ("cost", "accuracy_points"))]
            for name, f in payload["resplits"].items()
        ],
    )
    print(f"\nwritten: {write_result('cascade_cifar10', payload)}")


if __name__ == "__main__":
    main()
