"""What calibration on few samples is worth on others: budgets spent, accuracy kept, and allowed drops that hold.

Thresholds are found on n samples drawn at random and reported on the rest, over many draws, for two and three
pretrained cascades of ResNets and a ResNet-56 with exits on CIFAR-10 (JPEG; the outputs are recorded once), and for two
simulated networks of five exits with MSDNet's costs (their exits differ; they are alike). Four ways:

- **rule**: the best simple one: a quantile of the saver's confidence with two exits, MSDNet's geometric rule with more,
  for every budget the setting that costs most within it;
- **before**: the search that was the default, which keeps the points that look undominated and takes the most accurate
  within a budget, the cheapest without a visible drop;
- **now**: the default, ``search_thresholds(outputs)`` and ``frontier.at``.

Run it with one thread::

    OMP_NUM_THREADS=1 python -m benchmarks.small_calibration --data DIR --weights DIR [--outputs DIR] [--draws 60]

``--outputs`` keeps what the networks answered (a folder; made if absent), so that another run need not record it. The
first run learns ResNet-56's exits: ten minutes."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adaptexit import CascadeSaver, ExitOutputs, MultiExitClassifier
from adaptexit.core.frontier import OperatingPoint, ParetoFrontier, evaluate
from adaptexit.core.search import Problem, SearchName, search_thresholds
from adaptexit.core.search.methods import geometric_path
from benchmarks.cifar import arguments, tensors
from benchmarks.common import print_table, require_one_thread, write_result
from benchmarks.msdnet import ALIKE, MSDNET, simulate
from examples.cifar import images, pretrained

SIZES = (100, 200, 500, 1000, 3000, 5000)
BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
DROPS = (0.0, 0.005, 0.01)
EXITS = ["layer1.4", "layer1.8", "layer2.4", "layer2.8"]
SIMULATED = {"simulated, exits differ": MSDNET, "simulated, exits alike": ALIKE}
POOL, MOST_FRESH = 60_000, 30_000

Draw = tuple[ExitOutputs, ExitOutputs]


# -- outputs -----------------------------------------------------------------------------------------------------------


def recorded(args: argparse.Namespace) -> dict[str, ExitOutputs]:
    """Outputs of the pretrained networks on ``val`` and ``test``, and of the simulated ones."""
    folder: Path | None = args.outputs
    names = {"20 → 56": "cascade_20_56", "8 → 20 → 56": "cascade_8_20_56", "ResNet-56, 4 exits": "exits"}
    if folder is None or not all((folder / name).is_dir() for name in names.values()):
        made = dict(zip(names, _record(args), strict=True))
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for title, outputs in made.items():
                outputs.save(folder / names[title])
    else:
        made = {title: ExitOutputs.load(folder / name) for title, name in names.items()}
    slim = {title: dataclasses.replace(o, logits=None, features=None) for title, o in made.items()}
    return slim | {title: simulate(profile, POOL, seed=0) for title, profile in SIMULATED.items()}


def _record(args: argparse.Namespace) -> Iterator[ExitOutputs]:
    x, y = tensors(args.data, ("val", "test"))
    nets = {depth: pretrained(depth, args.weights) for depth in (8, 20, 56)}
    for savers in ([20], [8, 20]):
        cascade = CascadeSaver(nets[56], [nets[depth] for depth in savers], batch_size=64)
        outputs = cascade.fit(x, y).outputs_
        assert outputs is not None
        yield outputs
    train, labels = images(args.data, "train")
    model = MultiExitClassifier(nets[56], EXITS, recipe="frozen", calibration_size=0.02, random_state=0, batch_size=64)
    model.fit(train[: args.images], labels[: args.images]).calibrate(x, y)
    yield model.outputs_


def draws(outputs: ExitOutputs, n_samples: int, n_draws: int) -> Iterator[Draw]:
    """Random splits into a calibration set of ``n_samples`` and fresh samples."""
    for seed in range(n_draws):
        order = np.random.default_rng(seed).permutation(outputs.n_samples)
        yield outputs.take(order[:n_samples]), outputs.take(order[n_samples : n_samples + MOST_FRESH])


# -- ways --------------------------------------------------------------------------------------------------------------


class Chosen:
    """The points that one way takes for budgets (B) and drops (D)."""

    def __init__(self, budgets: Sequence[OperatingPoint], drops: Sequence[OperatingPoint]) -> None:
        self.points = [*budgets, *drops]


def rule(calibration: ExitOutputs, budgets: Sequence[float]) -> Chosen:
    """All samples sorted by one number; it knows nothing of right and wrong, so allowed drops are none of its."""
    problem = Problem.from_outputs(calibration)
    if problem.n_early == 1:
        policies: NDArray[np.int64] = np.append(0, problem.ends[0])[:, None]
    else:
        policies = geometric_path(problem, (20 * np.geomspace(0.02, 200, 900)).tolist())
    cost = problem.costs(policies) / problem.n_samples
    best = [int(np.argmax(np.where(cost <= b + 1e-9, cost, -np.inf))) for b in budgets]
    return Chosen(
        [evaluate(calibration, *setting) for setting in zip(*problem.thresholds(policies[best]), strict=True)], []
    )


def before(calibration: ExitOutputs, budgets: Sequence[float]) -> Chosen:
    """Undominated points; the most accurate within a budget, the cheapest without a visible drop."""
    k, n = calibration.n_exits, calibration.n_samples
    search: SearchName = "coord"
    if k == 2 or (k == 3 and 3000 <= n <= 5000):
        search = "exact"
    elif n < 200 * k:
        search = "geometric"
    frontier, _ = search_thresholds(calibration, search, n_points=100, drops=DROPS)
    accuracy, cost = frontier.accuracy, frontier.cost

    def at_drop(drop: float) -> int:
        kept = accuracy >= frontier.full_accuracy - drop - 1e-9
        return int(np.argmin(np.where(kept, cost, np.inf)))

    within = [int(np.argmax(np.where(cost <= b + 1e-9, accuracy, -np.inf))) for b in budgets]
    return Chosen([frontier.points[i] for i in within], [frontier.points[at_drop(d)] for d in DROPS])


def now(calibration: ExitOutputs, budgets: Sequence[float]) -> Chosen:
    """The default."""
    frontier: ParetoFrontier = search_thresholds(calibration)[0]
    return Chosen([frontier.at(budget=b) for b in budgets], [frontier.at(max_drop=d) for d in DROPS])


WAYS: dict[str, Callable[[ExitOutputs, Sequence[float]], Chosen]] = {"rule": rule, "before": before, "now": now}


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(outputs: ExitOutputs, n_samples: int, n_draws: int) -> dict[str, Any]:
    """Means and standard deviations over draws, for every way: loss of accuracy in points and cost, at each target."""
    cheapest = float(outputs.alone_costs()[0] / outputs.full_cost)
    budgets = [b for b in BUDGETS if b >= cheapest + 0.03]
    runs: dict[str, list[list[tuple[float, float]]]] = {way: [] for way in WAYS}
    for calibration, fresh in draws(outputs, n_samples, n_draws):
        for way, choose in WAYS.items():
            points = (evaluate(fresh, p.thresholds, p.cutoffs) for p in choose(calibration, budgets).points)
            runs[way].append([(100 * (fresh.full_accuracy - p.accuracy), p.cost) for p in points])
    figures: dict[str, Any] = {"budgets": budgets}
    for way, values in runs.items():
        loss, cost = np.moveaxis(np.array(values), 2, 0)
        b = len(budgets)
        figures[way] = {
            "loss": loss[:, :b].mean(axis=0), "overspent": cost[:, :b].mean(axis=0) - budgets,
            "drop_loss": loss[:, b:].mean(axis=0), "drop_loss_sd": loss[:, b:].std(axis=0),
            "drop_cost": cost[:, b:].mean(axis=0),
        }  # fmt: skip
    pairs = np.array(runs["now"])[:, :b, 0] - np.array(runs["rule"])[:, :, 0]
    figures["se_of_difference"] = pairs.std(axis=0) / np.sqrt(n_draws)
    return figures


def report(title: str, by_size: dict[int, dict[str, Any]]) -> None:
    """Tables of one network."""
    budgets = next(iter(by_size.values()))["budgets"]
    rows = []
    for n, figures in by_size.items():
        for way in WAYS:
            found = figures[way]
            cells = (f"{-a:+.2f} ({c:+.3f})" for a, c in zip(found["loss"], found["overspent"], strict=True))
            rows.append((n, way, *cells))
    print_table(
        f"{title}: fresh accuracy less the full model's, in points (mean cost less the budget)",
        ("n", "way", *map(str, budgets)),
        rows,
    )
    rows = []
    for n, figures in by_size.items():
        for way in ("before", "now"):
            found = figures[way]
            cells = (
                f"{loss - 100 * d:+.2f} ± {sd:.2f} at {cost:.3f}"
                for d, loss, sd, cost in zip(
                    DROPS, found["drop_loss"], found["drop_loss_sd"], found["drop_cost"], strict=True
                )
            )
            rows.append((n, way, *cells))
    print_table(
        f"{title}: loss beyond the allowed drop, in points, and cost", ("n", "way", *(f"drop {d}" for d in DROPS)), rows
    )


def worst(results: dict[str, dict[int, dict[str, Any]]]) -> dict[str, float]:
    """The figures that the default is held to, at n from 200 (drops: from 500): each the worst of all."""
    sizes = [figures for by_size in results.values() for n, figures in by_size.items() if n >= 200]
    later = [figures for by_size in results.values() for n, figures in by_size.items() if n >= 500]
    beyond = [np.max(f["now"]["drop_loss"] - 100 * np.array(DROPS)) for f in later]
    return {
        "behind the rule, points": float(max(np.max(f["now"]["loss"] - f["rule"]["loss"]) for f in sizes)),
        "unspent": float(max(np.max(-f["now"]["overspent"]) for f in sizes)),
        "spent beyond the budget, more than the rule": float(
            max(np.max(f["now"]["overspent"] - np.maximum(f["rule"]["overspent"], 0)) for f in sizes)
        ),
        "loss beyond the allowed drop, points": float(max(beyond)),
    }


def main() -> None:
    """Record, measure, print and write."""
    parser = arguments(__doc__, seeds=None)
    parser.add_argument("--outputs", type=Path, help="folder that keeps the recorded outputs")
    parser.add_argument("--draws", type=int, default=60)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    args = parser.parse_args()
    require_one_thread(parser)
    torch.set_num_threads(1)
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for title, outputs in recorded(args).items():
        results[title] = {n: measure(outputs, n, args.draws) for n in args.sizes if n < outputs.n_samples}
        report(title, results[title])
    print_table("The worst of all", ("figure", "value"), list(worst(results).items()))
    if args.sizes == list(SIZES):
        write_result(
            "small_calibration", {"draws": args.draws, "drops": DROPS, "networks": results, "worst": worst(results)}
        )


if __name__ == "__main__":
    main()
