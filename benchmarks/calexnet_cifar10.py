"""CalexNet and what it is compared with on a frozen ResNet-56, CIFAR-10 (JPEG): margins against searched thresholds.

    OMP_NUM_THREADS=1 python -m benchmarks.calexnet_cifar10 --data DIR --weights DIR [--groups steps joint] [--seeds 3]

The methods, data and curves of ``examples/calexnet_cifar10.py``, in groups of rows (``benchmarks/calexnet_rows.py``):
"published", every method with its paper's settings, and besides heads of one kind under two recipes, the hard filter,
BoostNet with fixed factors, calibration error at the exits, how the classes shift; "steps", the same methods with equal
numbers of steps of equal batches; "joint", PTEEnet's joint loss; "blocks", ZTW's block on the whole map and on 4x4;
"factors", where BoostNet's learnable factors end after so many steps. Everything is reported on ``test``.

Each run is written when it is done, beside those that ``benchmarks/results/calexnet_cifar10.json`` has: what is there
is not run again (``--anew`` forgets the groups named)."""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from adaptexit import (
    CalibrationWarning,
    CPMCalibrator,
    MultiExitClassifier,
    TemperatureCalibrator,
    ThresholdCalibrator,
)
from adaptexit.core.frontier import OperatingPoint, ParetoFrontier
from adaptexit.core.metrics import exit_calibration, survivor_shift
from benchmarks.calexnet_rows import GROUPS, Row
from benchmarks.cifar import arguments
from benchmarks.common import (
    RESULTS,
    describe_machine,
    print_table,
    restart_with_steady_allocator,
    spread,
    write_result,
)
from examples.calexnet_cifar10 import accuracy_lost
from examples.cifar import Data, learning, pretrained

NAME = "calexnet_cifar10"
EXITS = ["layer1.4", "layer1.8", "layer2.4", "layer2.8"]
REDUCTIONS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
MARGINS = (0.05, 0.2, 0.4)

RESNET56_MACS = 125_485_696
WHOLE_MAP_EXTRA = np.array(
    [2 * 9 * c * c * (side * side - 4 * 4) for c, side in ((16, 32), (16, 32), (32, 16), (32, 16))]
)
"""MACs that a block of two 3x3 convolutions costs more on the whole map than on 4x4, by exit."""

Runs = dict[str, list[dict[str, Any]]]


def main() -> None:
    """Run what is missing of the groups asked for, for every seed; write; report."""
    parser = arguments(__doc__)
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--rows", nargs="+", default=[""], help="only rows whose names have one of these in them")
    parser.add_argument("--anew", action="store_true", help="run again what the results have of these groups")
    parser.add_argument("--features", type=Path, help="folder that keeps cached features between runs")
    args = parser.parse_args()
    named = {name: row for group in args.groups for name, row in GROUPS[group].items()}
    rows = {name: row for part in args.rows for name, row in named.items() if part in name}
    data = learning(args.data, args.images)
    runs = stored_runs()
    if args.anew:
        runs = {name: measurements for name, measurements in runs.items() if name not in rows}
    net = pretrained(56, args.weights)
    with nullcontext(args.features) if args.features else tempfile.TemporaryDirectory() as features:
        for seed, name in [(seed, name) for seed in range(args.seeds) for name in rows]:
            if len(runs.setdefault(name, [])) <= seed:
                runs[name].append(measured_row(name, rows[name], net, data, seed, features))
                print(f"seed {seed}, {name}: {runs[name][-1]['fit_seconds']:.0f} s", flush=True)
                write_result(
                    NAME, {"exits": EXITS, "train_images": args.images, "reductions": REDUCTIONS, "runs": runs}
                )
    report(runs)


def stored_runs() -> Runs:
    """By row, a run a seed, each with the processor and the day it was measured on."""
    path = RESULTS / f"{NAME}.json"
    if not path.is_file():
        return {}
    results = json.loads(path.read_text())
    for run in (run for measurements in results["runs"].values() for run in measurements):
        run.setdefault("measured_on", measured_on(results["machine"]))
    return results["runs"]


def measured_on(machine: dict[str, Any]) -> str:
    return f"{machine['cpu']}, {machine['date']}"


def measured_row(name: str, row: Row, net: Any, data: list[Data], seed: int, features: Any) -> dict[str, Any]:
    """Train one row's heads from a seed and measure them."""
    train, val, test = data
    recipe = row.make()
    start = time.perf_counter()
    model = MultiExitClassifier(
        net, EXITS, recipe=recipe, head=row.head, calibrator=CPMCalibrator.published_with(recipe),
        random_state=seed, batch_size=64, calibration_size=0.02, cache_dir=features, **row.options,
    ).fit(*train)  # fmt: skip
    run: dict[str, Any] = {
        "fit_seconds": time.perf_counter() - start,
        "head_macs": model.outputs_.exit_costs[:-1],
        "history": {key: model.history_[key] for key in ("effective_samples", "rescale") if key in model.history_},
        "measured_on": measured_on(describe_machine()),
    }
    if not row.trained_only:
        run |= measured(model.calibrate(*val), test)
    if name == "CalexNet":
        run["exits"] = at_the_exits(model, val, test)
    return run


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


def report(runs: Runs) -> None:
    """Every table of the rows that were measured."""
    for group, rows in GROUPS.items():
        of_group = {name: runs[name] for name in rows if runs.get(name)}
        tested = {name: measurements for name, measurements in of_group.items() if not rows[name].trained_only}
        if tested:
            report_losses(group, tested)
        report_histories(of_group)
    if runs.get("ZTW"):
        report_whole_map_price(runs["ZTW"])
    if runs.get("CalexNet"):
        report_exits([run["exits"] for run in runs["CalexNet"]])


def report_losses(group: str, runs: Runs) -> None:
    """Accuracy exit by exit, then what is lost for computation saved, by both kinds of thresholds."""
    rows = [
        [name, len(of), *(spread(100 * column) for column in stacked(of, "exit_accuracy").T)]
        for name, of in runs.items()
    ]
    title = f"Group {group}: test accuracy when everybody leaves there (%)"
    print_table(title, ["method", "seeds", *EXITS, "full model"], rows)
    rows = [
        [name, *(f"{share:.3f}" for share in of[0]["exit_cost"]), *megas(of[0].get("head_macs", []))]
        for name, of in runs.items()
    ]
    print_table("Relative cost of leaving there, and M MACs of each head", ["method", *EXITS, "full model"], rows)
    for key, title in (("loss_margins", "class precision margins"), ("loss_searched", "searched thresholds")):
        rows = [[name, *(spread(column) for column in stacked(of, key).T)] for name, of in runs.items()]
        header = ["method", *(f"FR {reduction}" for reduction in REDUCTIONS)]
        print_table(f"Loss of test accuracy (points) at matched FLOPs reduction: {title}", header, rows)


def report_whole_map_price(runs: list[dict[str, Any]]) -> None:
    """What ZTW's margins lose if its blocks, trained on 4x4, cost what they do on the whole map: nothing is run."""
    losses = []
    for run in runs:
        points = []
        for sweep_point in run["sweep"]:
            rates = np.array(sweep_point["exit_rates"])
            passed = 1.0 - np.cumsum(rates) + rates  # a sample that leaves at exit k has paid for heads 0 to k
            cost = sweep_point["cost"] + float(passed[:-1] @ WHOLE_MAP_EXTRA) / RESNET56_MACS
            none = np.full(len(rates), -np.inf)
            points.append(OperatingPoint(sweep_point["accuracy"], cost, rates, none, none))
        fixed = np.array(run["exit_accuracy"]), np.array(run["exit_cost"])
        frontier = ParetoFrontier(points, run["full_accuracy"], *fixed, n_samples=1)
        losses.append(100 * (run["full_accuracy"] - frontier.accuracy_at(reduction=REDUCTIONS)))
    extra = " ".join(f"{macs / 1e6:.2f}" for macs in WHOLE_MAP_EXTRA)
    print_table(
        f"ZTW at the price of blocks on the whole map, {extra} M MACs more a head: loss (points), margins",
        ["method", *(f"FR {reduction}" for reduction in REDUCTIONS)],
        [["ZTW", *(spread(column) for column in np.array(losses).T)]],
    )


def megas(macs: list[float]) -> list[str]:
    return [" ".join(f"{count / 1e6:.2f}" for count in macs)] if len(macs) else []


def report_histories(runs: Runs) -> None:
    """Effective samples and learnable factors, exit by exit."""
    for name, of in runs.items():
        for key in of[0]["history"]:
            values = np.stack([run["history"][key] for run in of])
            print(f"\n{name}, {key}: " + ", ".join(spread(column) for column in values.T) + f" ({len(of)} seeds)")


def report_exits(exits: list[dict[str, Any]]) -> None:
    """Calibration error at CalexNet's exits, and the shift of classes."""
    rows = []
    for i, margin in enumerate(MARGINS):
        for rule in ("margins", "temperature"):
            errors = np.array([run[rule][i]["ece"] for run in exits], dtype=float)
            counts = np.array([run[rule][i]["n"] for run in exits])
            cells = [f"{n:.0f} / {spread(e, 3)}" for n, e in zip(counts.mean(0), errors.T, strict=True)]
            rows.append([margin, rule, *cells])
    names = [*EXITS, "full model"]
    print_table("CalexNet: samples that leave / their calibration error", ["margin", "rule", *names], rows)
    shift = [
        [
            name,
            *(spread(np.array([run["shift"][key][k] for run in exits]), 3) for key in ("n", "kl", "gini", "top3")),
        ]
        for k, name in enumerate(names)
    ]
    print_table("CalexNet at margin 0.2: who reaches each exit", ["exit", "n", "KL", "Gini", "top 3"], shift)


def stacked(runs: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([run[key] for run in runs], dtype=float)


if __name__ == "__main__":
    restart_with_steady_allocator(1)
    warnings.simplefilter("ignore", CalibrationWarning)
    main()
