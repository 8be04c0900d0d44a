"""Early exits on a frozen ResNet-56: what each kind of head is worth, on CIFAR-10 (JPEG).

    python -m benchmarks.retrofit_cifar10 --data DIR --weights DIR [--seeds 3] [--images N]

Heads at ``layer1.4``, ``layer1.8``, ``layer2.4`` and ``layer2.8`` learn on ``train`` (labels, 20 epochs, the backbone
untouched), thresholds are searched on ``val`` and everything is reported on ``test``, for several seeds of the heads.
Costs are MACs, heads included, relative to the plain ResNet-56. Loss of accuracy is against it too."""

from __future__ import annotations

import tempfile
import time
import warnings
from typing import Any

import numpy as np

from adaptexit import MultiExitClassifier
from benchmarks.cifar import arguments
from benchmarks.common import print_table, spread, write_result
from examples.cifar import learning, pretrained

EXITS = ["layer1.4", "layer1.8", "layer2.4", "layer2.8"]
HEADS = ("mlp", "prototype", "refined_prototype", "conv")
BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.9)


def main() -> None:
    """Train, calibrate and test every kind of head."""
    parser = arguments(__doc__)
    parser.add_argument("--heads", nargs="+", default=HEADS[:3], choices=HEADS, help="conv takes an hour on a CPU")
    args = parser.parse_args()
    train, val, test = learning(args.data, args.images)
    net = pretrained(56, args.weights)

    results: dict[str, Any] = {}
    for head in args.heads:
        runs = []
        with tempfile.TemporaryDirectory() as features:  # the backbone runs once for all seeds
            for seed in range(args.seeds):
                start = time.perf_counter()
                model = MultiExitClassifier(
                    net, EXITS, recipe="frozen", head=head, calibration_size=0.02, random_state=seed, batch_size=64,
                    cache_dir=features,
                )  # fmt: skip
                model.fit(*train).calibrate(*val)
                seconds = time.perf_counter() - start
                frontier = model.pareto(*test)
                points = {b: frontier.at(budget=b) for b in BUDGETS if b >= model.pareto().points[0].cost}
                runs.append(
                    {
                        "seconds": seconds,
                        "exit_accuracy": frontier.fixed_accuracy,
                        "exit_cost": frontier.fixed_cost,
                        "full_accuracy": frontier.full_accuracy,
                        "head_macs": model.outputs_.exit_costs[:-1],
                        "cost": {b: p.cost for b, p in points.items()},
                        "loss": {b: frontier.full_accuracy - p.accuracy for b, p in points.items()},
                    }
                )
        results[head] = runs
        print(f"{head}: {np.mean([run['seconds'] for run in runs]):.0f} s a fit with its calibration", flush=True)
    report(results)
    write_result(
        "retrofit_cifar10", {"exits": EXITS, "train_images": len(train[1]), "seeds": args.seeds, "heads": results}
    )


def report(results: dict[str, Any]) -> None:
    """Both tables, means over seeds with the standard deviation in brackets."""
    rows = [
        [head, *(spread(100 * np.array([run["exit_accuracy"][k] for run in runs])) for k in range(len(EXITS))),
         " ".join(f"{macs / 1e6:.2f}" for macs in runs[0]["head_macs"])]
        for head, runs in results.items()
    ]  # fmt: skip
    title = "Test accuracy when everybody leaves there (%), and what the heads themselves cost"
    print_table(title, ["head", *EXITS, "M MACs"], rows)
    rows = [
        [head, *(spread(100 * np.array([run["loss"].get(b, np.nan) for run in runs])) for b in BUDGETS)]
        for head, runs in results.items()
    ]
    print_table("Loss of test accuracy (points) at a budget held on val", ["head", *map(str, BUDGETS)], rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
