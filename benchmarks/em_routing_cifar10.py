"""EM routing beside every simple rule it must beat, on a frozen ResNet-56, CIFAR-10 (JPEG).

    OMP_NUM_THREADS=1 python -m benchmarks.em_routing_cifar10 --data DIR --weights DIR [--seeds 3] [--images 20000]

The heads, data and methods of ``examples/em_routing_cifar10.py``. Cost weights of EM routing and budgets of EENet's
schedule are chosen on ``val``; everything is reported on ``test``, at costs that are matched by interpolation along
every method's test curve, and at budgets held on ``val``. The time of a sweep over cost weights is compared with that
of its router trainings alone."""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from adaptexit import CPMCalibrator, EENetScheduler, EMRouter, ExitOutputs, MultiExitClassifier, ThresholdCalibrator
from adaptexit.calibrators import em_routers
from adaptexit.comparison import Comparison, compare
from adaptexit.core.frontier import ParetoFrontier
from benchmarks.cifar import arguments
from benchmarks.common import interleaved, middle, print_table, ratios, spread, write_result
from examples.calexnet_cifar10 import accuracy_at
from examples.cifar import learning, pretrained

EXITS = ["layer1.8", "layer2.8", "layer3.4"]
PRIORS = ("amortized", "global", "per_sample")
COSTS = (0.6, 0.7, 0.8, 0.9)
COST_WEIGHTS = (0.1, 0.3, 1.0, 3.0, 10.0)
SWEEP = tuple(float(weight) for weight in np.geomspace(0.03, 30.0, 20))


def main() -> None:
    """Run every method for every seed, report, write."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    args = parser.parse_args()
    train, val, test = learning(args.data, args.images)
    net = pretrained(56, args.weights)

    runs: list[dict[str, Any]] = []
    timings: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as features:
        for seed in range(args.seeds):
            start = time.perf_counter()
            model = MultiExitClassifier(
                net, EXITS, recipe="frozen", calibrator=EMRouter(), random_state=seed, batch_size=64,
                calibration_size=0.02, cache_dir=features,
            ).fit(*train).calibrate(*val)  # fmt: skip
            outputs, training, answers = model.outputs_, model.training_outputs_, model.record(*test)
            runs.append(measured(outputs, training, answers, seed))
            print(f"seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
            if seed == 0:
                timings = {prior: sweep_timing(outputs, training, answers, prior, args.rounds) for prior in PRIORS}
    write_result(
        "em_routing_cifar10",
        {
            "exits": EXITS, "train_images": len(train[1]), "seeds": args.seeds, "costs": COSTS, "runs": runs,
            "sweep": {"cost_weights": SWEEP, "timings": timings},
        },
    )  # fmt: skip
    report(runs, timings)


def measured(outputs: ExitOutputs, training: ExitOutputs, answers: ExitOutputs, seed: int) -> dict[str, Any]:
    """Test figures of every method on one model."""
    methods = {
        "BranchyNet (entropy)": ThresholdCalibrator("entropy"),
        "largest probability": ThresholdCalibrator(),
        "class precision margins": CPMCalibrator(),
        "EENet's schedule": EENetScheduler(random_state=seed),
    }
    methods |= {f"EENet's schedule for {cost}": EENetScheduler(cost, random_state=seed) for cost in COSTS}
    for prior in PRIORS:
        for weight in COST_WEIGHTS:
            methods[f"EM, {prior}, {weight:g}"] = EMRouter(weight, prior, random_state=seed)
    for prior in ("amortized", "per_sample"):
        methods[f"EM, {prior}, 1, unweighted"] = EMRouter(1.0, prior, weighted=False, random_state=seed)
        methods[f"EM, {prior}, 1, on logits"] = EMRouter(1.0, prior, inputs="logits", random_state=seed)
    comparison = compare(outputs, methods, test=answers, training=training)
    rows = {name: row(frontier) for name, frontier in comparison.frontiers.items()}
    schedule = comparison.calibrators["EENet's schedule"]
    thresholds = ThresholdCalibrator("recorded").fit(schedule.rescored(outputs))
    rows["EENet's scores, searched thresholds"] = row(thresholds.pareto(schedule.rescored(answers)))
    for prior in ("amortized", "per_sample"):
        few = EMRouter(1.0, prior, random_state=seed).fit(outputs)
        rows[f"EM, {prior}, 1, learned on val"] = row(few.pareto(answers))
    best: dict[str, Any] = {}
    for prior in PRIORS:
        best[f"EM routing, {prior}"] = best_of(comparison, [f"EM, {prior}, {weight:g}" for weight in COST_WEIGHTS])
        sweep = comparison.calibrators[f"EM, {prior}, 1"].pareto(answers, refit=True, cost_weights=SWEEP)
        rows[f"EM, {prior}, swept at threshold 0.5"] = row(sweep) | {
            "cost_weights": [p.params["cost_weight"] for p in sweep.points],
            "curve": [(p.cost, p.accuracy, p.exit_rates) for p in sweep.points],
        }
    best["EENet's schedule, one a budget"] = learned_for_budget(comparison)
    return {
        "points": {p.name: (p.accuracy, p.cost, p.exit_rates) for rule in comparison.points.values() for p in rule},
        "full_accuracy": comparison.full_accuracy,
        "mixed": {rule: mixed(comparison.points[rule]) for rule in ("exits alone", "patience")},
        "rows": rows | best,
        "em_steps": {prior: steps(comparison.calibrators[f"EM, {prior}, 1"]) for prior in PRIORS},
        "quarters": in_quarters(outputs, training, answers, seed),
    }


def steps(router: Any) -> int:
    """Steps that EM took."""
    return len(router.posterior_.history) - 1


def in_quarters(outputs: ExitOutputs, training: ExitOutputs, answers: ExitOutputs, seed: int) -> dict[str, Any]:
    """The paper's costs: a quarter of the full model an exit, routers free."""
    outputs, training, answers = (
        ExitOutputs(
            predictions=o.predictions, scores=o.scores, labels=o.labels, n_classes=o.n_classes, logits=o.logits,
            features=o.features, costs=[0.25, 0.5, 0.75, 1.0], cost_unit="given",
        )
        for o in (outputs, training, answers)
    )  # fmt: skip
    methods: dict[str, Any] = {"largest probability": ThresholdCalibrator()}
    methods["BranchyNet (entropy)"] = ThresholdCalibrator("entropy")
    methods |= {f"EM routing, {prior}, 1": EMRouter(1.0, prior, random_state=seed) for prior in PRIORS}
    comparison = compare(outputs, methods, test=answers, training=training)
    rows = {name: row(frontier) for name, frontier in comparison.frontiers.items()}
    for prior in PRIORS:
        sweep = comparison.calibrators[f"EM routing, {prior}, 1"].pareto(answers, refit=True, cost_weights=SWEEP)
        rows[f"EM routing, {prior}, swept at threshold 0.5"] = row(sweep)
    return {
        "points": {p.name: (p.accuracy, p.cost, p.exit_rates) for rule in comparison.points.values() for p in rule},
        "rows": rows,
    }


def row(frontier: ParetoFrontier) -> dict[str, Any]:
    """Accuracy at matched test costs, and what budgets held on the calibration data give.

    NaN below the cheapest point, and for a curve that was made on the test data alone.
    """
    calibration = frontier.chosen_on
    at = [None if calibration is None or calibration.cost.min() > cost else frontier.at(budget=cost) for cost in COSTS]
    return {
        "matched": accuracy_at(frontier, 1 - np.array(COSTS)),
        "held": [(np.nan, np.nan) if point is None else (point.accuracy, point.cost) for point in at],
    }


def best_of(comparison: Comparison, names: Sequence[str]) -> dict[str, Any]:
    """Of several settings of a method, for every cost the one whose calibrated curve is highest there."""
    accuracies = np.stack([accuracy_at(comparison.frontiers[name].chosen_on, 1 - np.array(COSTS)) for name in names])
    best = np.argmax(np.where(np.isfinite(accuracies), accuracies, -np.inf), axis=0)
    rows = [row(comparison.frontiers[name]) for name in names]
    return {
        "matched": [rows[i]["matched"][j] for j, i in enumerate(best)],
        "held": [rows[i]["held"][j] for j, i in enumerate(best)],
        "chosen": [names[i] for i in best],
    }


def learned_for_budget(comparison: Comparison) -> dict[str, Any]:
    """Of the schedules the one that was learned for the cost."""
    rows = [row(comparison.frontiers[f"EENet's schedule for {cost}"]) for cost in COSTS]
    return {key: [each[key][j] for j, each in enumerate(rows)] for key in ("matched", "held")}


def mixed(points: Sequence[Any]) -> list[float]:
    """Best accuracy at the matched costs when samples are sent at random to one of two points, whichever two."""
    best = np.full(len(COSTS), np.nan)
    for low, high in product(points, points):
        for i, cost in enumerate(COSTS):
            if low.cost <= cost <= high.cost and low.cost < high.cost:
                share = (cost - low.cost) / (high.cost - low.cost)
                best[i] = np.fmax(best[i], (1 - share) * low.accuracy + share * high.accuracy)
    return best.tolist()


def sweep_timing(
    outputs: ExitOutputs, training: ExitOutputs, answers: ExitOutputs, prior: str, rounds: int
) -> dict[str, Any]:
    """Seconds of a sweep over 20 cost weights from cached outputs, and of its router trainings alone."""
    router = EMRouter(1.0, prior).fit(outputs, training=training)
    trainings: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    train: Callable[..., Any] = em_routers.train_routers

    def noting(untrained: Any, *args: Any, **settings: Any) -> Any:
        trainings.append(((copy.deepcopy(untrained), *args), settings))
        return train(untrained, *args, **settings)

    def sweep() -> None:
        router.pareto(answers, refit=True, cost_weights=SWEEP)

    em_routers.train_routers = noting
    try:
        sweep()
    finally:
        em_routers.train_routers = train

    def alone() -> None:
        for args, settings in trainings:
            train(*args, **settings)

    timings = interleaved({"sweep": sweep, "trainings": alone}, rounds, warmup=0)  # the recording was one
    return timings | {"n_trainings": len(trainings), "ratio": ratios(timings, "sweep", "trainings")}


def report(runs: list[dict[str, Any]], timings: dict[str, Any]) -> None:
    """Every table."""
    report_points(runs, "recorded costs")
    rows = [[f"{rule}, mixed at random", *at_costs([run["mixed"][rule] for run in runs])] for rule in runs[0]["mixed"]]
    rows += [[name, *at_costs([run["rows"][name]["matched"] for run in runs])] for name in runs[0]["rows"]]
    header = ["method", *(f"cost {cost}" for cost in COSTS)]
    print_table("Test accuracy (%) at matched mean relative cost", header, rows)
    rows = []
    for name in runs[0]["rows"]:
        points = 100 * np.array([run["rows"][name]["held"] for run in runs])  # (seeds, costs, 2)
        cells = [f"{spread(accuracy, 1)} at {spread(cost, 1)}" for accuracy, cost in points.transpose(1, 2, 0)]
        rows.append([name, *cells])
    print_table("Test accuracy (%) at test cost (%), for budgets held on val", header, rows)
    quarters = [run["quarters"] for run in runs]
    report_points(quarters, "a quarter an exit")
    rows = [[name, *at_costs([run["rows"][name]["matched"] for run in quarters])] for name in quarters[0]["rows"]]
    print_table("The same with the paper's costs, a quarter an exit", header, rows)
    for prior in PRIORS:
        picks = [run["rows"][f"EM routing, {prior}"]["chosen"] for run in runs]
        print(f"\n{prior}: chosen on val {picks}, steps of EM at weight 1 {[run['em_steps'][prior] for run in runs]}")
    rows = [
        [prior, timing["n_trainings"], timing["sweep"]["median"], timing["trainings"]["median"],
         middle(timing["ratio"], ".3f")]
        for prior, timing in timings.items()
    ]  # fmt: skip
    print_table("Sweep over 20 cost weights", ["prior", "trainings", "sweep, s", "trainings alone, s", "ratio"], rows)


def report_points(runs: Sequence[dict[str, Any]], title: str) -> None:
    """Accuracy and cost of the rules without a curve."""
    rows = [
        [name, *(spread(np.array([100 * run["points"][name][i] for run in runs]), 1) for i in (0, 1))]
        for name in runs[0]["points"]
    ]
    print_table(
        f"Test accuracy and relative cost (%) of the rules without a curve: {title}", ["rule", "accuracy", "cost"], rows
    )


def at_costs(accuracies: Sequence[Any]) -> list[str]:
    """Accuracies (%) at the matched costs, over seeds."""
    return [spread(column, 1) for column in 100 * np.array(accuracies).T]


if __name__ == "__main__":
    warnings.simplefilter("ignore", ConvergenceWarning)
    main()
