"""CalexNet beside the methods that it is compared with, on a frozen ResNet: accuracy lost for computation saved.

    python examples/calexnet_cifar10.py --data DIR --weights DIR [--images 20000] [--seeds 3] [--out PNG]
    python examples/calexnet_cifar10.py --digits

``--data`` holds ``train``, ``val`` and ``test``, each with ``<class>/*.jpg`` of CIFAR-10; ``--weights`` holds
``resnet56.safetensors``. Heads at four exits learn on ``train`` (cached features: the backbone runs over it once for
each kind of head), thresholds are found on ``val``, and everything is reported on ``test``. ``--digits`` does the same
with scikit-learn's digits and a ResNet-20 that is trained first: a minute or two, and no download.

Every method leaves by class precision margins, as CalexNet (2026) compares them (its Tables 4 and A3, Fig. 2), and once
more by one threshold an exit, searched for every budget."""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from adaptexit import (
    BoostNetRecipe,
    CalexNetRecipe,
    CPMCalibrator,
    ExitFlowDisplay,
    MultiExitClassifier,
    ParetoFrontier,
    PTEERecipe,
    ThresholdCalibrator,
    ZTWRecipe,
)
from adaptexit.backbones import resnet20_cifar

try:
    from examples.cifar import Data, learning, pretrained
except ImportError:  # run as a script, from anywhere
    from cifar import Data, learning, pretrained

METHODS: dict[str, Callable[[], Any]] = {
    "CalexNet": CalexNetRecipe,
    "CalexNet, reference": CalexNetRecipe.reference,
    "PTEEnet": PTEERecipe,
    "ZTW": ZTWRecipe,
    "BoostNet": lambda: BoostNetRecipe(rescale="learnable"),
}
"""Those of the paper's Table 4; the reference has neither alignment nor distillation."""

ABLATION: dict[str, Callable[[], Any]] = {
    "CalexNet, alignment only": lambda: CalexNetRecipe(distillation=False),
    "CalexNet, distillation only": lambda: CalexNetRecipe(alignment=None, cascade_aware=False),
}
"""What the paper's Table A3 has besides."""

SHOWN = 0.2
"""Margin at which the picture shows who leaves where."""

NOISE = 0.8
"""On the digits, whose values lie between -1 and 1: the largest standard deviation."""

RULES = ("margins", "searched")
LINES = ("o-", "v--", "s-.", "^:", "D-")
Curves = dict[str, ParetoFrontier]


def main() -> None:
    """Train all methods, calibrate, report."""
    parser = arguments(__doc__, "calexnet.png")
    parser.add_argument("--seeds", type=int, default=3, help="of the heads")
    args = parser.parse_args()
    net, (train, val, test) = network_and_data(parser, args)
    if args.digits:
        exits = ["layer1.0", "layer1.2", "layer2.0", "layer2.2"]
        settings = {"epochs": 20, "batch_size": 64, "distillation_batch_size": 64}
        classes, reductions = None, (0.6, 0.7, 0.75, 0.8)
    else:
        exits, settings = ["layer1.4", "layer1.8", "layer2.4", "layer2.8"], {}
        classes, reductions = ImageFolder(args.data / "test").classes, (0.3, 0.4, 0.5, 0.6)

    methods = METHODS | ABLATION
    frontiers: dict[str, list[Curves]] = {name: [] for name in methods}
    with tempfile.TemporaryDirectory() as features:
        for seed, name in tqdm([(seed, name) for seed in range(args.seeds) for name in methods]):
            recipe = methods[name]()
            recipe.set_params(**{key: settings[key] for key in settings.keys() & recipe.get_params().keys()})
            model = trained(net, exits, recipe, train, val, seed, features)
            frontiers[name].append(tested(model, test))
            if (seed, name) == (0, "CalexNet"):
                (point,) = [p for p in model.pareto().points if p.params.get("margin") == SHOWN]
                picture = ExitFlowDisplay.from_outputs(
                    model.record(*test), point, chosen_by=f"margin {SHOWN}",
                    exit_names=model.exit_names, class_names=classes,
                )  # fmt: skip
    full = frontiers["CalexNet"][0]["margins"].full_accuracy
    print(f"the backbone alone: {full:.4f} on {len(test[1])} test images, one is {100 / len(test[1]):.2f} points")
    report(frontiers, reductions)
    draw({name: frontiers[name] for name in METHODS}, full, picture, args.out)


def trained(
    net: nn.Module, exits: list[str], recipe: Any, train: Data, val: Data, seed: int, features: str
) -> MultiExitClassifier:
    """One method's heads and margins."""
    model = MultiExitClassifier(
        net, exits, recipe=recipe, calibrator=CPMCalibrator.published_with(recipe), random_state=seed, batch_size=64,
        calibration_size=0.02, cache_dir=features,
    )  # fmt: skip
    return model.fit(*train).calibrate(*val)


def tested(model: MultiExitClassifier, test: Data) -> Curves:
    """Test curves of the same heads with margins, and with searched thresholds."""
    answers = model.record(*test)
    thresholds = ThresholdCalibrator().fit(model.outputs_)
    return {"margins": model.calibrator_.pareto(answers), "searched": thresholds.pareto(answers)}


def accuracy_at(frontier: ParetoFrontier, reductions: Any) -> np.ndarray:
    """Interpolated accuracy at FLOPs reductions; NaN where the sweep does not reach."""
    sweep = [point for point in frontier.points if point.params]  # all but the plain full model, unless it is alone
    return dataclasses.replace(frontier, points=sweep or frontier.points).accuracy_at(reduction=reductions)


def accuracy_lost(frontier: ParetoFrontier, reductions: Sequence[float]) -> np.ndarray:
    """Points of accuracy below the full model's at FLOPs reductions."""
    return 100 * (frontier.full_accuracy - accuracy_at(frontier, reductions))


def report(frontiers: dict[str, list[Curves]], reductions: Sequence[float]) -> None:
    """The table: mean and standard deviation over seeds."""
    header = [f"{rule} at {r}" for rule in RULES for r in reductions]
    print("Test accuracy lost (points) at matched FLOPs reduction, mean (standard deviation) over seeds")
    print(f"| {'method':27} | " + " | ".join(f"{name:>15}" for name in header) + " |")
    for name, runs in frontiers.items():
        losses = [np.stack([accuracy_lost(run[rule], reductions) for run in runs]) for rule in RULES]
        cells = [cell(column) for column in np.concatenate(losses, axis=1).T]
        print(f"| {name:27} | " + " | ".join(f"{text:>15}" for text in cells) + " |")


def cell(values: np.ndarray) -> str:
    """Mean and spread of what was measured by every seed."""
    if np.isnan(values).any():
        return "-"
    return f"{values.mean():.1f} ({values.std(ddof=1):.1f})" if len(values) > 1 else f"{values.mean():.1f}"


def draw(frontiers: dict[str, list[Curves]], full: float, leaving: ExitFlowDisplay, out: str) -> None:
    """Both kinds of thresholds side by side, mean curve and spread over seeds; and who leaves where."""
    figure = pyplot.figure(figsize=(16, 5), layout="constrained")
    curve_part, flow_part = figure.subfigures(1, 2, width_ratios=(2, 1.3))
    axes = curve_part.subplots(1, 2, sharex=True, sharey=True)
    grid = np.linspace(0, 0.9, 91)
    titles = ("class precision margins", "one threshold an exit, searched")
    for ax, rule, title in zip(axes, RULES, titles, strict=True):
        for i, (name, runs) in enumerate(frontiers.items()):
            curves = np.stack([accuracy_at(run[rule], grid) for run in runs])
            mean, spread = curves.mean(axis=0), curves.std(axis=0)
            (line,) = ax.plot(grid, mean, LINES[i], markersize=5, markevery=(2 * i, 10), label=name)
            ax.fill_between(grid, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0)
        ax.axhline(full, color="grey", linewidth=0.8, linestyle="--", label="full model")
        ax.set(title=title, xlabel="FLOPs reduction (1 - relative cost)")
    axes[0].set_ylabel("test accuracy")
    handles, labels = axes[0].get_legend_handles_labels()
    curve_part.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, handlelength=3.5)
    leaving.plot(flow_part.subplots(), name="CalexNet: who is left")
    figure.savefig(out, dpi=120)
    print(f"picture: {out}")


def arguments(doc: str, out: str) -> argparse.ArgumentParser:
    """What says where the network and the images come from, and where the picture goes."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with train, val and test")
    parser.add_argument("--weights", type=Path, help="folder with resnet56.safetensors")
    parser.add_argument("--digits", action="store_true", help="small, without any download")
    parser.add_argument("--images", type=int, default=20_000, help="of train, to learn on")
    parser.add_argument("--out", default=out, help="where the picture goes")
    return parser


def network_and_data(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[nn.Module, Sequence[Data]]:
    """A network in evaluation mode, and what to learn, calibrate and test on."""
    if args.digits:
        return digits_net().eval(), digits()
    if not (args.data and args.weights):
        parser.error("give --data and --weights, or --digits")
    return pretrained(56, args.weights), learning(args.data, args.images)


def digits() -> tuple[Data, Data, Data]:
    """800 images (3, 8, 8) to learn on, 500 to calibrate on, 497 to test; noise makes some of them hard."""
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    noisy = x / 8 - 1 + rng.uniform(0, NOISE, (len(x), 1)) * rng.normal(size=x.shape)
    pictures = torch.from_numpy(noisy.astype(np.float32)).reshape(-1, 1, 8, 8).repeat(1, 3, 1, 1)
    learn, rest = train_test_split(np.arange(len(y)), train_size=800, stratify=y, random_state=0)
    tune, hold = train_test_split(rest, train_size=500, stratify=y[rest], random_state=0)
    return tuple((pictures[rows], torch.from_numpy(y[rows])) for rows in (learn, tune, hold))


def digits_net(make: Callable[[], nn.Module] = resnet20_cifar, epochs: int = 6) -> nn.Module:
    """A ResNet-20, or another network, that knows the digits."""
    x, y = digits()[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make()
        rate = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(y)).split(64):
                rate.zero_grad()
                F.cross_entropy(net(x[rows]), y[rows]).backward()
                rate.step()
    return net


if __name__ == "__main__":
    main()
