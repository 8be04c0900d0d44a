"""Exits that learn together with a ResNet-56, beside frozen ones and cascades, on CIFAR-10 (JPEG).

    OMP_NUM_THREADS=1 python -m benchmarks.joint_cifar10 --data DIR --weights DIR --work DIR [--runs NAME ...]

Exits at ``layer1.4``, ``layer1.8``, ``layer2.4`` and ``layer2.8``; everything learns on ``train``, thresholds come from
``val``, figures from ``test``. Every run keeps its state in ``--work`` after each epoch, and its figures in the file of
results when it is over, so that a killed benchmark goes on where it was and finished runs are not repeated. ``--runs``
picks some; the tables are of all that are finished. On one core of a CPU the joint run of 10 epochs takes about two
hours."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms import v2

from adaptexit import CascadeSaver, MultiExitClassifier, ParetoFrontier
from adaptexit.heads import ConvHead
from adaptexit.training.recipes import AutoRecipe, JointRecipe
from adaptexit.training.recipes.joint import usual_head
from benchmarks.cifar import OneExit, arguments
from benchmarks.common import RESULTS, print_table, spread, write_result
from examples.cifar import Data, images, pretrained

EXITS = ["layer1.4", "layer1.8", "layer2.4", "layer2.8"]
BUDGETS = (0.8, 0.7, 0.6, 0.5, 0.4)

SHORT = {"epochs": 3, "images": 15_000}
"""Of the runs that compare single choices."""

CHOICES: dict[str, dict[str, Any]] = {
    "as by default": {},
    "teacher: own last exit": {"teacher": "last"},
    "no teacher": {"teacher": None},
    "weights rising": {"weights": "rising"},
    "weights scheduled": {"weights": "scheduled"},
    "gradients rescaled": {"rescale": True},
    "normalisation layers only": {"trainable": "norm"},
    "heads not first": {"head_recipe": None},
    "BoostNet": {"boost": 0.5, "rescale": True, "teacher": None},
    "convolutional heads": {"head": partial(ConvHead, channels=64)},
}


UNTRAINED = ("20 -> 56", "8 -> 20 -> 56")
"""Runs that only calibrate."""


DRAWN = {
    "frozen, default": "exits, the network frozen",
    "joint": "exits and network together",
    "20 -> 56": "cascade 20 → 56",
    "8 -> 20 -> 56": "cascade 8 → 20 → 56",
}


class Benchmark:
    """Data, networks and the folder where runs are kept."""

    def __init__(self, args: Any) -> None:
        self.args = args
        args.work.mkdir(parents=True, exist_ok=True)
        self.val, self.test = images(args.data, "val"), images(args.data, "test")
        self._train: Data | None = None

    def train(self, n_images: int) -> Data:
        """The first images of ``train``, which are shuffled."""
        if self._train is None:
            self._train = images(self.args.data, "train")
        x, y = self._train
        return x[:n_images].clone(), y[:n_images].clone()

    def network(self, depth: int) -> nn.Module:
        return pretrained(depth, self.args.weights)

    def recipe(self, epochs: int, **settings: Any) -> JointRecipe:
        """Joint training as this benchmark does it: flips and shifts, a few passes of the heads first."""
        augment = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(32, padding=4)])
        common = {"augment": augment, "channels_last": True, "head_recipe": AutoRecipe(epochs=min(5, epochs))}
        return JointRecipe(epochs, **(common | {"checkpoint_dir": self.args.work / "checkpoints"} | settings))

    def exits(self, recipe: Any, head: Any, seed: int, n_images: int) -> dict[str, Any]:
        """Figures of a ResNet-56 whose exits learned by a recipe."""
        model = MultiExitClassifier(
            self.network(56), EXITS, recipe=recipe, head=head, calibration_size=1000 / n_images, random_state=seed,
            batch_size=250, cache_half=True, verbose=self.args.verbose,
        ).fit(*self.train(n_images))  # fmt: skip
        model.calibrate(*self.val)
        history = {key: model.history_[key] for key in ("full_model", "accuracy") if key in model.history_}
        return figures(model.pareto(*self.test)) | history

    # -- runs ----------------------------------------------------------------------------------------------------------

    def joint(self, seed: int) -> dict[str, Any]:
        return self.exits(self.recipe(self.args.epochs), "auto", seed, self.args.images)

    def frozen_same_heads(self, seed: int) -> dict[str, Any]:
        """The same heads on the frozen network, as many passes."""
        recipe = AutoRecipe(epochs=self.args.epochs)
        return self.exits(recipe, usual_head, seed, self.args.images)

    def frozen_default(self, seed: int) -> dict[str, Any]:
        return self.exits("auto", "auto", seed, self.args.images)

    def choice(self, name: str, seed: int) -> dict[str, Any]:
        settings = dict(CHOICES[name])
        head = settings.pop("head", "auto")
        return self.exits(self.recipe(SHORT["epochs"], **settings), head, seed, SHORT["images"])

    def longer_20(self, seed: int) -> dict[str, Any]:
        """A ResNet-20 given the same extra epochs, by the same loop and teacher (itself); its weights are kept."""
        recipe = self.recipe(self.args.epochs, teacher="original", head_recipe="auto", lr=0.02, batch_size=128)
        recipe.set_params(warmup_epochs=1.0)
        model = MultiExitClassifier(
            OneExit(self.network(20)), recipe=recipe, random_state=seed, batch_size=250,
            calibration_size=1000 / self.args.images, verbose=self.args.verbose,
        ).fit(*self.train(self.args.images))  # fmt: skip
        net: Any = model.stages_[0]
        save_file(net.state_dict(), self.args.work / f"resnet20-longer-{seed}.safetensors")
        return {"accuracy": model.score(*self.test), "full_model": model.history_["full_model"]}

    def cascade(self, depths: tuple[int, ...], longer: bool, seed: int) -> dict[str, Any]:
        """A cascade of pretrained networks in front of the ResNet-56; the ResNet-20 may have learned longer."""
        savers = [self.network(depth) for depth in depths]
        if longer:
            weights = self.args.work / f"resnet20-longer-{seed}.safetensors"
            if not weights.exists():
                self.longer_20(seed)
            savers[depths.index(20)].load_state_dict(load_file(weights))
        model = CascadeSaver(self.network(56), savers, batch_size=250).fit(*self.val)
        return figures(model.pareto(*self.test))


def figures(frontier: ParetoFrontier) -> dict[str, Any]:
    """Test accuracy of every exit alone, of the full model, at budgets with what was spent, and along the curve."""
    points = {budget: frontier.at(budget=budget) for budget in BUDGETS}
    return {
        "exit_accuracy": frontier.fixed_accuracy,
        "exit_cost": frontier.fixed_cost,
        "full_accuracy": frontier.full_accuracy,
        "at_budget": {str(b): {"accuracy": p.accuracy, "cost": p.cost} for b, p in points.items()},
        "curve": {"cost": frontier.cost, "accuracy": frontier.accuracy},
    }


def runs_of(bench: Benchmark) -> dict[str, Callable[[int], dict[str, Any]]]:
    """All runs by name, from a seed to figures."""
    return {
        "joint": bench.joint,
        "frozen, default": bench.frozen_default,
        "frozen, the joint run's heads": bench.frozen_same_heads,
        "ResNet-20, longer": bench.longer_20,
        "20 -> 56": partial(bench.cascade, (20,), False),
        "8 -> 20 -> 56": partial(bench.cascade, (8, 20), False),
        "20 (longer) -> 56": partial(bench.cascade, (20,), True),
        "8 -> 20 (longer) -> 56": partial(bench.cascade, (8, 20), True),
        **{f"choice: {name}": partial(bench.choice, name) for name in CHOICES},
    }


def main() -> None:
    """Run what is not finished, then report what is."""
    parser = arguments(__doc__, seeds=1, n_images=50_000)
    parser.add_argument("--work", type=Path, required=True, help="folder for the state of runs")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--runs", nargs="*", help="names of runs, as in the tables; all unless given")
    parser.add_argument("--picture", type=Path, help="where curves of frozen and joint exits and of cascades are drawn")
    parser.add_argument("--verbose", type=int, default=0)
    args = parser.parse_args()
    bench = Benchmark(args)
    runs = runs_of(bench)
    if args.runs and (strangers := sorted(set(args.runs) - set(runs))):
        parser.error(f"--runs must be among {', '.join(runs)}; got {', '.join(strangers)}.")
    original = float(np.mean(answers_right(bench.network(56), bench.test)))
    records = earlier_records()
    for name in runs if args.runs is None else args.runs:
        for seed in range(args.seeds):
            record = {"name": name, "seed": seed} | passes_of(name, args.epochs, args.images)
            if not any(record.items() <= earlier.items() for earlier in records):
                record |= runs[name](seed)
                print(f"{name}, seed {seed}: {record.get('full_accuracy', record.get('accuracy')):.4f}", flush=True)
                # Read anew, as another run may have ended meanwhile.
                records = [*earlier_records(), record]
                write_result("joint_cifar10", {"exits": EXITS, "original_accuracy": original, "runs": records})
    records = [r for r in records if passes_of(r["name"], args.epochs, args.images).items() <= r.items()]
    report(records, original)
    if args.picture is not None:
        draw(records, original, args.picture)


def passes_of(name: str, epochs: int, n_images: int) -> dict[str, int]:
    """How often a run goes over how many images; 0 where nothing is trained."""
    if name.startswith("choice: "):
        return dict(SHORT)
    return {"epochs": epochs, "images": n_images} if name not in UNTRAINED else {"epochs": 0, "images": 0}


def earlier_records() -> list[dict[str, Any]]:
    """The figures of runs that are over: they are kept in the file of results, so that a benchmark is made in parts."""
    path = RESULTS / "joint_cifar10.json"
    return json.loads(path.read_text())["runs"] if path.exists() else []


def answers_right(net: nn.Module, data: Data) -> np.ndarray:
    """Whether a network is right on every image."""
    x, y = data
    with torch.inference_mode():
        answers = torch.cat([net(part).argmax(1) for part in x.split(250)])
    return (answers == y).numpy()


def report(records: list[dict[str, Any]], original: float) -> None:
    """Loss at every budget against the original ResNet-56, and what every exit is worth alone."""
    print(f"\nThe original ResNet-56: {100 * original:.2f}%")
    by_name: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_name.setdefault(record["name"], []).append(record)

    def losses(accuracies: list[float]) -> str:
        return spread(100 * (original - np.array(accuracies)))

    rows = [
        [
            name,
            f"{runs[0]['epochs']} x {runs[0]['images']:,}",
            *(losses([run["at_budget"][str(b)]["accuracy"] for run in runs]) for b in BUDGETS),
            losses([run["full_accuracy"] for run in runs]),
        ]
        for name, runs in by_name.items()
        if "at_budget" in runs[0]
    ]
    title = "Test accuracy below the original ResNet-56's (points) at a budget held on val"
    print_table(title, ["", "passes", *map(str, BUDGETS), "full model"], rows)
    rows = [
        [name, *(spread(100 * column) for column in np.array([run["exit_accuracy"] for run in runs]).T)]
        for name, runs in by_name.items() if len(runs[0].get("exit_accuracy", ())) == len(EXITS) + 1
    ]  # fmt: skip
    print_table("Test accuracy when everybody leaves there (%)", ["", *EXITS, "full model"], rows)


def draw(records: list[dict[str, Any]], original: float, picture: Path) -> None:
    """Curves of the first seed, on test; the original's accuracy as a line."""
    from matplotlib import pyplot

    _, ax = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    for record in records:
        if record["name"] in DRAWN and record["seed"] == 0:
            order = np.argsort(record["curve"]["cost"])
            points = (np.array(record["curve"][key])[order] for key in ("cost", "accuracy"))
            ax.plot(*points, ".-", label=DRAWN[record["name"]])
    ax.axhline(original, color="grey", linewidth=1, label="ResNet-56 as it was given")
    ax.set(xlabel="mean relative cost", ylabel="test accuracy", ylim=(original - 0.12, original + 0.015))
    ax.set_title("exits on a ResNet-56 and cascades, CIFAR-10 (JPEG)")
    ax.legend()
    ax.figure.savefig(picture, dpi=120)
    print(f"\npicture: {picture}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
