"""MSDNet, RANet, the fusion-stem network and CHASE beside plain ResNets, trained alike from scratch on CIFAR-10.

    OMP_NUM_THREADS=1 python -m benchmarks.multi_exit_cifar10 --data DIR --work DIR [--models NAME ...] [--epochs 8]
        [--seeds 1] [--device cpu] [--precision bf16] [--picture PNG]

``--data`` is a folder with ``train``, ``val`` and ``test``, each with ``<class>/*.jpg`` or ``.png``, or one in which
torchvision's CIFAR10 lies (5,000 of its training images are then ``val``). Every model learns by one recipe, joint
training with one cycle of the rate, from all images of ``train`` for as many epochs; thresholds come from ``val``,
figures from ``test``. One more row is MSDNet by its own published schedule: batches of 64, the rate divided by ten
after half and three quarters. Costs are MACs, where whoever passes a classifier pays for it.

Every run keeps its state in ``--work`` after each epoch, so that one that was killed goes on where it was, and its
figures in a file of its own below ``benchmarks/results/multi_exit_cifar10``; what is there is not run again. The tables
and the picture are of all runs of so many epochs that are over."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import CIFAR10, ImageFolder

from adaptexit import AnytimeDisplay, JointRecipe, MultiExitClassifier, evaluate_settings
from adaptexit.backbones import (
    ResNetCifar,
    chase_cifar,
    fusion_stem_cifar,
    msdnet_cifar_anytime,
    ranet_cifar,
)
from benchmarks.cifar import OneExit
from benchmarks.common import RESULTS, print_table, spread, write_result

FOLDER = "multi_exit_cifar10"
N_VAL = 5000
"""Of torchvision's training images, as MSDNet holds out."""

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
MILLIONS = (10, 20, 30, 40, 50, 60, 75)
"""Of MACs: where the budgeted table looks."""

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Model:
    """A network and what its training has of its own."""

    factory: Callable[[], nn.Module]
    settings: dict[str, Any] = field(default_factory=dict)


def plain(n_blocks: int) -> Callable[[], nn.Module]:
    """A ResNet of 6 ``n_blocks`` + 2 layers with its only exit at its end."""
    return lambda: OneExit(ResNetCifar(n_blocks))


MODELS = {
    "MSDNet": Model(msdnet_cifar_anytime),
    "RANet": Model(ranet_cifar),
    "fusion-stem": Model(fusion_stem_cifar),
    "CHASE": Model(chase_cifar),
    **{f"ResNet-{6 * n + 2}": Model(plain(n)) for n in (1, 2, 3, 5, 7)},
    "MSDNet, own schedule": Model(
        msdnet_cifar_anytime, {"batch_size": 64, "scheduler": "multistep", "weight_decay": 1e-4, "warmup_epochs": 0.0}
    ),
}

PUBLISHED = {"MSDNet": (0.936, 75.5e6), "RANet": (0.938, 94.3e6), "fusion-stem": (0.941, 64.1e6)}
"""Test accuracy and MACs of the last exit after 300 epochs, as the fusion-stem paper prints them (section 3); CHASE's
paper prints 95% at a mean of 27 M along its budgeted curve. MACs of RANet and the fusion-stem network follow from the
ratios there."""


class Scaled:
    """Images (B, 3, H, W) of uint8 as networks take them; what the images' device is stays."""

    def __call__(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (MEAN, STD))
        return (x.float() / 255 - mean) / std


def shifted(x: Tensor) -> Tensor:
    """A batch (B, 3, H, W), every image moved by up to 4 pixels and mirrored or not, by itself."""
    n, _, height, width = x.shape
    tops, lefts = torch.randint(9, (2, n, 1)).to(x.device)
    mirrored = (torch.rand(n, 1) < 0.5).to(x.device)
    rows = tops + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(n, -1)
    columns = lefts + torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(x, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    samples = torch.arange(n, device=x.device)[:, None, None]
    return padded[samples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def splits(data: Path) -> dict[str, Data]:
    """Images (N, 3, 32, 32) of uint8 and labels (N,) of train, val and test, each shuffled once."""
    if (data / "train").is_dir():
        return {name: _shuffled(ImageFolder(data / name)) for name in ("train", "val", "test")}
    x, y = _shuffled(CIFAR10(data, train=True))
    return {
        "train": (x[N_VAL:].clone(), y[N_VAL:].clone()),
        "val": (x[:N_VAL].clone(), y[:N_VAL].clone()),
        "test": _shuffled(CIFAR10(data, train=False)),
    }


def _shuffled(dataset: Any) -> Data:
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    x = torch.stack([torch.from_numpy(np.array(dataset[i][0])).permute(2, 0, 1) for i in order])
    return x, torch.tensor([dataset.targets[i] for i in order])


def trained(name: str, seed: int, data: dict[str, Data], args: argparse.Namespace) -> dict[str, Any]:
    """Train a model, or go on with it, and give its figures on test."""
    train, val, test = (data[split] for split in ("train", "val", "test"))
    settings = {
        "batch_size": args.batch_size, "lr": 0.1, "weight_decay": 5e-4, "scheduler": "onecycle",
        "augment": shifted, "augment_batches": True, "channels_last": True, "precision": args.precision,
    } | MODELS[name].settings  # fmt: skip
    recipe = JointRecipe(args.epochs, **settings, checkpoint_dir=args.work / "checkpoints")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = MODELS[name].factory().to(args.device)
    start = time.perf_counter()
    model = MultiExitClassifier(
        net, recipe=recipe, preprocess=Scaled(), random_state=seed, batch_size=250,
        calibration_size=100 / len(train[1]), verbose=args.verbose,
    ).fit(*train)  # fmt: skip
    seconds = time.perf_counter() - start
    model.calibrate(*val)
    shown = {key: value for key, value in settings.items() if key != "augment"}
    record = {"seconds_of_last_start": seconds, "settings": shown, "loss": model.history_["loss"]}
    if len(net.heads) == 1:
        return record | {"static": {"cost": model.outputs_.full_cost, "accuracy": model.score(*test)}}
    evaluation = evaluate_settings(model, *test)
    (anytime,), (budgeted,) = evaluation.anytime.values(), evaluation.budgeted.values()
    model.save(args.work / f"{slug(name)}_e{args.epochs}_s{seed}")
    return record | {
        "anytime": {"cost": anytime.cost, "accuracy": anytime.accuracy},
        "budgeted": {"budget": budgeted.budgets, "cost": budgeted.cost, "accuracy": budgeted.accuracy},
    }


def slug(name: str) -> str:
    """A name as part of a file's."""
    return name.lower().replace(", ", "_").replace(" ", "_").replace("-", "_")


def main() -> None:
    """Run what is missing, then report everything of so many epochs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the state of runs and the trained models")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], metavar="NAME")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--images", type=int, help="of train; all unless given")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32", help="of training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--picture", type=Path, help="where both settings are drawn")
    parser.add_argument("--verbose", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    data: dict[str, Data] = {}
    for seed in range(args.seeds):
        for name in args.models:
            file = f"{FOLDER}/{slug(name)}_e{args.epochs}_s{seed}"
            if (RESULTS / f"{file}.json").exists():
                continue
            if not data:
                data = splits(args.data)
                # Small enough to lie where the network is, so that no step waits for images.
                data = {split: (x.to(args.device), y) for split, (x, y) in data.items()}
                x, y = data["train"]
                data["train"] = x[: args.images], y[: args.images]
            run = {"model": name, "seed": seed, "epochs": args.epochs, "images": len(data["train"][1])}
            write_result(file, run | {"device": device_name(args.device)} | trained(name, seed, data, args))
            print(f"{name}, seed {seed}: done", flush=True)
    report(args.epochs, args.picture)


def device_name(device: str) -> str:
    """What a run was trained on."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


def report(epochs: int, picture: Path | None) -> None:
    """Both settings as tables, and as a picture."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((RESULTS / FOLDER).glob(f"*_e{epochs}_s*.json")):
        run = json.loads(path.read_text())
        runs.setdefault(run["model"], []).append(run)
    runs = {name: runs[name] for name in MODELS if name in runs}
    if not runs:
        return
    rows = []
    for name, records in runs.items():
        exits = [record.get("anytime") or record["static"] for record in records]
        costs, accuracies = np.atleast_1d(exits[0]["cost"]) / 1e6, np.atleast_2d([e["accuracy"] for e in exits]).T
        pairs = [
            f"{cost:.1f}: {spread(100 * row, 1)}"
            for cost, row in zip(costs, accuracies.reshape(len(costs), -1), strict=True)
        ]
        known = f"{100 * PUBLISHED[name][0]:.1f} at {PUBLISHED[name][1] / 1e6:.1f}" if name in PUBLISHED else ""
        rows.append([name, len(records), ", ".join(pairs), known])
    n_images = {record["images"] for records in runs.values() for record in records}
    title = f"Anytime: M MACs and test accuracy (%) of every exit, {epochs} epochs on {max(n_images):,} images"
    print_table(title, ["", "seeds", "exits", "published, last exit, 300 epochs"], rows)
    budgeted = {
        name: [record["budgeted"] for record in records] for name, records in runs.items() if "budgeted" in records[0]
    }
    rows = [
        [name, *(spread(100 * np.array([_within(curve, 1e6 * m) for curve in curves]), 1) for m in MILLIONS)]
        for name, curves in budgeted.items()
    ]
    title = "Budgeted batch: test accuracy (%) at a mean of at most so many M MACs on val"
    print_table(title, ["", *map(str, MILLIONS)], rows)
    if picture is not None:
        draw(runs, budgeted, epochs, picture)


def _within(curve: dict[str, Any], limit: float) -> float:
    """Accuracy of the dearest point that calibration found within a limit; NaN where all are dearer."""
    budgets = np.array(curve["budget"])
    within = np.flatnonzero(budgets <= limit)
    return float(curve["accuracy"][within[-1]]) if len(within) else np.nan


def draw(runs: dict[str, Any], budgeted: dict[str, Any], epochs: int, picture: Path) -> None:
    """Both settings; means over seeds."""

    def mean(curves: list[dict[str, Any]], key: str) -> Any:
        return np.mean([curve[key] for curve in curves], axis=0)

    anytime = {name: [record["anytime"] for record in records] for name, records in runs.items() if name in budgeted}
    display = AnytimeDisplay(
        anytime={name: (mean(curves, "cost"), mean(curves, "accuracy")) for name, curves in anytime.items()},
        budgeted={name: (mean(curves, "cost"), mean(curves, "accuracy")) for name, curves in budgeted.items()},
        static={
            name: (mean(points, "cost"), mean(points, "accuracy"))
            for name, records in runs.items()
            if (points := [record["static"] for record in records if "static" in record])
        },
        unit="MACs",
    ).plot()
    display.figure_.suptitle(f"CIFAR-10 (JPEG) after {epochs} epochs")
    display.figure_.savefig(picture, dpi=120)
    print(f"\npicture: {picture}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
