"""Exits by default against every fixed choice of a head and a recipe, on networks of six kinds.

    OMP_NUM_THREADS=1 python -m benchmarks.default_exits --data DIR --weights DIR --networks-dir DIR [--seeds 1]
        [--only ResNet-56 ...] [--choices default ztw ...]

ResNet-56 is pretrained; a small ViT, a ConvNeXt and a MobileNet are trained here on 20,000 images of CIFAR-10 (JPEG) in
some minutes each and kept in ``--networks-dir``, and their heads learn from half of these; ResNet-20 and a perceptron
are trained on scikit-learn's digits. All stay frozen. Heads learn on ``train``, thresholds are searched on ``val``,
everything is reported on ``test``: points of accuracy lost against the full model at equal relative cost, heads counted
in, interpolated along each test curve. What was measured before is kept in the result file, so that a run may be made
in parts."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.neural_network import MLPClassifier

from adaptexit import AutoRecipe, CalibrationWarning, MultiExitClassifier
from benchmarks.cifar import arguments
from benchmarks.common import RESULTS, print_table, require_one_thread, spread, write_result
from benchmarks.small_networks import EXITS, digits, resnet_for_digits, trained_on
from examples.cifar import Data, learning, pretrained

BUDGETS = (0.8, 0.7, 0.6, 0.5, 0.4)
N_SMALL = 10_000
"""Images that the heads of networks trained here learn from."""

RESNET_EXITS = ["layer1.4", "layer1.8", "layer2.4", "layer2.8"]

CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "frozen, mlp": {"recipe": "frozen"},
    "frozen, residual": {"recipe": "frozen", "head": "residual"},
    "calexnet": {"recipe": "calexnet"},
    "ztw": {"recipe": "ztw"},
    **{f"distilled, {head}": {"head": head} for head in ("linear", "mlp", "grid", "grid-64", "wide-32", "wide-64")},
    **{
        f"labels, {head}": {"head": head, "recipe": AutoRecipe(distillation=0.0)}
        for head in ("linear", "mlp", "grid", "grid-64", "wide-32", "wide-64")
    },
    "distilled, mlp-64": {"head": "mlp-64"},
}
"""The estimator's ``recipe`` and ``head``; "distilled" and "labels" are the default's recipe with both fixed."""

FOR_VECTORS = (
    "default", "frozen, mlp", "calexnet", "ztw", "distilled, linear", "distilled, mlp", "distilled, mlp-64",
    "labels, linear", "labels, mlp",
)  # fmt: skip

Splits = tuple[Data, Data, Data]


@dataclass
class Subject:
    """A trained network, where it gets exits, and data to learn, to calibrate and to test on."""

    network: Any
    exits: list[str]
    splits: Splits
    choices: tuple[str, ...] = tuple(name for name in CHOICES if name != "distilled, mlp-64")


def subjects(args: argparse.Namespace) -> dict[str, Callable[[int], Subject]]:
    """Networks by name, each made for a seed when it is its turn; images are read once."""
    read: dict[str, Any] = {}

    def cifar() -> Splits:
        if "splits" not in read:
            read["splits"] = tuple(learning(args.data, args.images))
        return read["splits"]

    def resnet56(seed: int) -> Subject:
        return Subject(pretrained(56, args.weights), RESNET_EXITS, cifar())

    def small(name: str) -> Callable[[int], Subject]:
        factory, exits, epochs = EXITS[name]

        def make(seed: int) -> Subject:
            train, val, test = cifar()
            net = trained_on(factory, train, epochs, args.networks_dir / f"{name}.safetensors")
            few = tuple(part[:N_SMALL].clone() for part in train)
            return Subject(net, exits, (few, val, test))

        return make

    def digits_resnet(seed: int) -> Subject:
        splits = tuple(digits(seed))
        file = args.networks_dir / f"digits_resnet20_{seed}.safetensors"
        net = trained_on(resnet_for_digits, splits[0], 30, file, augment=False)
        return Subject(net, ["layer1.0", "layer1", "layer2.0", "layer2"], splits)

    def digits_mlp(seed: int) -> Subject:
        splits = tuple((x.flatten(1).numpy(), y.numpy()) for x, y in digits(seed))
        mlp = MLPClassifier((64, 64, 64, 64), random_state=seed, max_iter=100).fit(*splits[0])
        return Subject(mlp, ["hidden.0", "hidden.1", "hidden.2"], splits, FOR_VECTORS)

    return {
        "ResNet-56": resnet56,
        **{name: small(name) for name in EXITS},
        "digits, ResNet-20": digits_resnet,
        "digits, MLP": digits_mlp,
    }


def measured(subject: Subject, choice: str, seed: int, cache: str) -> dict[str, Any]:
    """Figures of one fit on test, and what it took: seconds by the clock and of the processor."""
    train, val, test = subject.splits
    start, start_cpu = time.perf_counter(), time.process_time()
    model = MultiExitClassifier(
        subject.network, subject.exits, **CHOICES[choice],
        calibration_size=0.02, random_state=seed, batch_size=64, cache_dir=cache, preprocess=None,
    ).fit(*train)  # fmt: skip
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    curve = model.calibrate(*val).pareto(*test)
    return {
        "loss": 100 * (curve.full_accuracy - curve.accuracy_at(reduction=[1 - budget for budget in BUDGETS])),
        "full_accuracy": curve.full_accuracy,
        "exit_accuracy": curve.fixed_accuracy,
        "exit_cost": curve.fixed_cost,
        "fit_seconds": seconds,
        "fit_cpu_seconds": cpu,
        "choice": model.history_.get("choice"),
    }


def runs(args: argparse.Namespace, done: dict[str, Any]) -> Iterator[None]:
    """Fill ``done`` (network, choice, seed) with what is not in it yet, one fit after the other."""
    for name, make in subjects(args).items():
        if args.only and name not in args.only:
            continue
        for seed in range(args.seeds):
            subject = None
            with tempfile.TemporaryDirectory() as cache:
                for choice in CHOICES:
                    if (args.choices and choice not in args.choices) or str(seed) in done.get(name, {}).get(choice, {}):
                        continue
                    subject = subject or make(seed)
                    if choice not in subject.choices:
                        continue
                    figures = measured(subject, choice, seed, cache)
                    done.setdefault(name, {}).setdefault(choice, {})[str(seed)] = figures
                    losses = " ".join(f"{loss:.2f}" for loss in figures["loss"])
                    print(f"{name}, {choice}, seed {seed}: {losses} ({figures['fit_seconds']:.0f} s)", flush=True)
                    yield


def main() -> None:
    """Measure what is missing, write after every fit, report."""
    parser = arguments(__doc__, seeds=1)
    parser.add_argument("--networks-dir", type=Path, required=True, help="where networks trained here are kept")
    parser.add_argument("--only", nargs="+", help="networks by name; all unless given")
    parser.add_argument("--choices", nargs="+", choices=CHOICES)
    args = parser.parse_args()
    require_one_thread(parser)
    file = RESULTS / "default_exits.json"
    done: dict[str, Any] = json.loads(file.read_text())["runs"] if file.exists() else {}
    for _ in runs(args, done):
        write_result("default_exits", {"train_images": args.images, "budgets": BUDGETS, "runs": done})
    report(done)


def report(done: dict[str, Any]) -> None:
    """A table for every network, and how far the default is behind the best fixed choice."""
    for name, by_choice in done.items():
        losses = {c: np.array([run["loss"] for run in seeds.values()], dtype=float) for c, seeds in by_choice.items()}
        rows = [
            [choice, *(spread(column) for column in of.T), f"{np.mean([r['fit_cpu_seconds'] for r in seeds]):.0f}"]
            for (choice, of), seeds in zip(losses.items(), (list(s.values()) for s in by_choice.values()), strict=True)
        ]
        if "default" in losses and len(losses) > 1:
            fixed = np.stack([of.mean(axis=0) for choice, of in losses.items() if choice != "default"])
            behind = losses["default"].mean(axis=0) - np.nanmin(fixed, axis=0)
            rows.append(["default behind the best", *(f"{gap:.2f}" for gap in behind), ""])
        full = np.mean([run["full_accuracy"] for run in next(iter(by_choice.values())).values()])
        header = ["choice", *(f"cost {budget}" for budget in BUDGETS), "CPU s a fit"]
        print_table(f"{name} ({100 * full:.1f}% in full): points lost on test", header, rows)
        winners = [run["choice"]["head"] for run in by_choice.get("default", {}).values() if run["choice"]]
        print(f"\nThe default took {', '.join(winners)}.")


if __name__ == "__main__":
    warnings.simplefilter("ignore", CalibrationWarning)
    main()
