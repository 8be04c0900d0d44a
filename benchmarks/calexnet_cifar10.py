"""CalexNet and what it is compared with on a frozen ResNet-56, CIFAR-10 (JPEG): margins against searched thresholds.

    OMP_NUM_THREADS=1 python -m benchmarks.calexnet_cifar10 --data DIR --weights DIR [--seeds 3] [--images 20000]

The methods, data and curves of ``examples/calexnet_cifar10.py``, and besides: heads of one kind under two recipes, the
hard filter, BoostNet with fixed factors; calibration error at the exits under margins and under temperature scaling;
how the classes shift from exit to exit; where BoostNet's learnable factors end. Everything is reported on ``test``."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from adaptexit import (
    BoostNetRecipe,
    CalexNetRecipe,
    CalibrationWarning,
    CPMCalibrator,
    MultiExitClassifier,
    TemperatureCalibrator,
    ThresholdCalibrator,
)
from adaptexit.core.frontier import ParetoFrontier
from adaptexit.core.metrics import exit_calibration, survivor_shift
from benchmarks.cifar import arguments
from benchmarks.common import print_table, spread, write_result
from examples.calexnet_cifar10 import ABLATION, METHODS, accuracy_lost
from examples.cifar import Data, learning, pretrained

EXITS = ["layer1.4", "layer1.8", "layer2.4", "layer2.8"]
REDUCTIONS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
MARGINS = (0.05, 0.2, 0.4)

MORE: dict[str, Callable[[], Any]] = {
    "CalexNet, hard filter": lambda: CalexNetRecipe("hard"),
    "BoostNet, fixed factors": BoostNetRecipe,
}
RESIDUAL = {"CalexNet": "CalexNet, residual heads", "CalexNet, reference": "reference, residual heads"}
"""Recipes that are also run with the kind of head that ZTW has."""


def main() -> None:
    """Run every method for every seed, report, write."""
    args = arguments(__doc__).parse_args()
    train, val, test = learning(args.data, args.images)
    net = pretrained(56, args.weights)

    recipes = {name: (make, "auto") for name, make in (METHODS | ABLATION | MORE).items()}
    recipes |= {RESIDUAL[name]: (METHODS[name], "residual") for name in RESIDUAL}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in recipes}
    with tempfile.TemporaryDirectory() as features:
        for seed in range(args.seeds):
            for name, (make, head) in recipes.items():
                recipe = make()
                start = time.perf_counter()
                model = MultiExitClassifier(
                    net, EXITS, recipe=recipe, head=head, calibrator=CPMCalibrator.published_with(recipe),
                    random_state=seed, batch_size=64, calibration_size=0.02, cache_dir=features,
                ).fit(*train)  # fmt: skip
                seconds = time.perf_counter() - start
                runs[name].append(measured(model.calibrate(*val), test) | {"fit_seconds": seconds})
                if name == "CalexNet":
                    runs[name][-1]["exits"] = at_the_exits(model, val, test)
                print(f"seed {seed}, {name}: {seconds:.0f} s", flush=True)
    write_result(
        "calexnet_cifar10",
        {"exits": EXITS, "train_images": len(train[1]), "seeds": args.seeds, "reductions": REDUCTIONS, "runs": runs},
    )
    report(runs)


def measured(model: MultiExitClassifier, test: Data) -> dict[str, Any]:
    """Test figures of one trained model, with margins and with searched thresholds."""
    answers = model.record(*test)
    margins = model.calibrator_.pareto(answers)
    thresholds = ThresholdCalibrator().fit(model.outputs_).pareto(answers)
    return {
        "full_accuracy": margins.full_accuracy,
        "exit_accuracy": margins.fixed_accuracy,
        "exit_cost": margins.fixed_cost,
        "sweep": [
            {"margin": p.params["margin"], "cost": p.cost, "accuracy": p.accuracy, "exit_rates": p.exit_rates}
            for p in margins.points
            if p.params
        ],
        "loss_margins": accuracy_lost(margins, REDUCTIONS),
        "loss_searched": accuracy_lost(thresholds, REDUCTIONS),
        "loss_at_budget": budget_losses(thresholds),
        "history": {key: model.history_[key] for key in ("effective_samples", "rescale") if key in model.history_},
    }


def budget_losses(frontier: ParetoFrontier) -> list[float]:
    """Points of accuracy lost at the point that serves the budget 1 - reduction, which on test costs a little else."""
    losses = []
    for reduction in REDUCTIONS:
        try:
            point = frontier.at(budget=1 - reduction)
        except ValueError:
            losses.append(float("nan"))
        else:
            losses.append(100 * (frontier.full_accuracy - point.accuracy))
    return losses


def at_the_exits(model: MultiExitClassifier, val: Data, test: Data) -> dict[str, Any]:
    """Calibration error under margins and, at the same cost, under temperature scaling; the shift of classes."""
    sweep = {p.params["margin"]: p for p in model.calibrator_.frontier_.points if p.params}
    answers = model.record(*test)
    figures: dict[str, Any] = {"margins": [], "temperature": []}
    for margin in MARGINS:
        errors = exit_calibration(answers, sweep[margin])
        figures["margins"].append({"margin": margin, "ece": errors.ece, "n": errors.n})
    shift = survivor_shift(answers, sweep[0.2])
    figures["shift"] = {"n": shift.n, "kl": shift.kl, "gini": shift.gini, "top3": shift.top3}
    model.set_params(calibrator=TemperatureCalibrator()).calibrate(*val)
    answers = model.calibrator_.rescored(model.record(*test))
    for margin in MARGINS:
        point = model.operating_point(max(sweep[margin].cost, model.pareto().cost.min()))
        errors = exit_calibration(answers, point)
        figures["temperature"].append({"margin": margin, "ece": errors.ece, "n": errors.n})
    figures["temperatures"] = model.calibrator_.temperatures_
    return figures


def report(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Every table."""
    rows = [[name, *(spread(100 * column) for column in stacked(of, "exit_accuracy").T)] for name, of in runs.items()]
    print_table("Test accuracy when everybody leaves there (%)", ["method", *EXITS, "full model"], rows)
    for key, title in (("loss_margins", "class precision margins"), ("loss_searched", "searched thresholds")):
        rows = [[name, *(spread(column) for column in stacked(of, key).T)] for name, of in runs.items()]
        header = ["method", *(f"FR {reduction}" for reduction in REDUCTIONS)]
        print_table(f"Loss of test accuracy (points) at matched FLOPs reduction: {title}", header, rows)
    exits = [run["exits"] for run in runs["CalexNet"]]
    rows = []
    for i, margin in enumerate(MARGINS):
        for rule in ("margins", "temperature"):
            errors = np.stack([run[rule][i]["ece"] for run in exits])
            counts = np.stack([run[rule][i]["n"] for run in exits])
            cells = [f"{n:.0f} / {spread(e, 3)}" for n, e in zip(counts.mean(0), errors.T, strict=True)]
            rows.append([margin, rule, *cells])
    names = [*EXITS, "full model"]
    print_table("CalexNet: samples that leave / their calibration error", ["margin", "rule", *names], rows)
    rows = [
        [
            name,
            *(spread(np.array([run["shift"][key][k] for run in exits]), 3) for key in ("n", "kl", "gini", "top3")),
        ]
        for k, name in enumerate(names)
    ]
    print_table("CalexNet at margin 0.2: who reaches each exit", ["exit", "n", "KL", "Gini", "top 3"], rows)
    for name in ("BoostNet", "CalexNet", "CalexNet, alignment only", "CalexNet, hard filter"):
        for key in runs[name][0]["history"]:
            values = np.stack([run["history"][key] for run in runs[name]])
            print(f"\n{name}, {key}: " + ", ".join(spread(column) for column in values.T))


def stacked(runs: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.stack([run[key] for run in runs])


if __name__ == "__main__":
    warnings.simplefilter("ignore", CalibrationWarning)
    main()
