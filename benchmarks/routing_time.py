"""Wall-clock time of every routing rule on a frozen ResNet-56 with three exits: what deciding costs.

    python -m benchmarks.routing_time --data DIR --weights DIR [--images 3000] [--rounds 9]

Heads learn on ``train``, rules on ``val``; ``test`` is answered in batches of 1, 32 and 256, every rule at the point
that serves a budget of 0.8. Times are medians of interleaved rounds, relative to the plain network on the same batches
in the same round, beside the relative cost in multiply-accumulates on the same images."""

from __future__ import annotations

from typing import Any

import torch

from adaptexit import (
    CPMCalibrator,
    EENetScheduler,
    EMRouter,
    MultiExitClassifier,
    PatienceCalibrator,
    TemperatureCalibrator,
    ThresholdCalibrator,
)
from benchmarks.cifar import arguments
from benchmarks.common import interleaved, middle, print_table, ratios, restart_with_steady_allocator, write_result
from examples.cifar import learning, pretrained

EXITS = ["layer1.8", "layer2.8", "layer3.4"]
BUDGET = 0.8
IMAGES = {1: 200, 32: 1600, 256: 2560}
"""Test images by batch size."""


def main() -> None:
    """Calibrate every rule, time, report, write."""
    parser = arguments(__doc__, seeds=None, n_images=3000)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, val, test = learning(args.data, args.images)
    net = pretrained(56, args.weights)
    rules: dict[str, Any] = {
        "largest probability": ThresholdCalibrator(),
        "entropy": ThresholdCalibrator("entropy"),
        "temperatures": TemperatureCalibrator(),
        "class precision margins": CPMCalibrator(),
        "patience": PatienceCalibrator(),
        "EENet's schedule": EENetScheduler(BUDGET),
        "EM routing, per_sample": EMRouter(1.0, "per_sample"),
    }
    models = {}
    for name, rule in rules.items():
        model = MultiExitClassifier(net, EXITS, recipe="frozen", calibrator=rule, batch_size=64).fit(*train)
        models[name] = model.calibrate(*val)
    results: dict[str, Any] = {}
    for size, count in IMAGES.items():
        x = test[0][:count]

        def plain(x: Any = x, size: int = size) -> None:
            with torch.inference_mode():
                for part in x.split(size):
                    net(part).argmax(dim=1)

        functions = {"plain network": plain, "again": plain}
        for name, model in models.items():
            model.set_params(batch_size=size)
            functions[name] = lambda x=x, model=model: model.predict(x, budget=BUDGET)
        timings = interleaved(functions, args.rounds)
        rows = {}
        for name, model in models.items():
            point = model.pareto(x, test[1][:count]).at(budget=BUDGET)
            rows[name] = {
                "cost": point.cost,
                "accuracy": point.accuracy,
                "time": ratios(timings, name, "plain network"),
            }
        results[str(size)] = {
            "images": count, "rules": rows, "control": ratios(timings, "again", "plain network"),
            "seconds": timings["plain network"],
        }  # fmt: skip
    write_result("routing_time", {"exits": EXITS, "budget": BUDGET, "batches": results})
    for size, batch in results.items():
        rows = [[name, f"{row['cost']:.3f}", middle(row["time"], ".3f")] for name, row in batch["rules"].items()]
        print_table(
            f"Batches of {size}; the plain network against itself {batch['control']['median']:.3f}",
            ["rule", "relative cost (MACs)", "relative time"], rows,
        )  # fmt: skip


if __name__ == "__main__":
    restart_with_steady_allocator(1)
    main()
