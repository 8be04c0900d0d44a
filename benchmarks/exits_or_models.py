"""Exits attached to ResNet-56 against independent models of equal cost, CIFAR-10 (JPEG): TinySaver's Fig. 2.

    python -m benchmarks.exits_or_models [--out examples/pictures/exits_or_models.png]

Nothing is run: the accuracies on ``test`` are those that ``retrofit_cifar10``, ``calexnet_cifar10``,
``em_routing_cifar10`` (the one exit behind ``layer3``) and ``cascade_cifar10`` wrote to ``benchmarks/results``, costs
the MACs that they counted, heads included. Beside each exit stands the best independent model that costs no more."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import pyplot

from benchmarks.common import RESULTS, print_table, spread

KINDS = {
    "perceptron on means": ("retrofit_cifar10", "heads", "mlp"),
    "prototypes": ("retrofit_cifar10", "heads", "prototype"),
    "refined prototypes": ("retrofit_cifar10", "heads", "refined_prototype"),
    "refined prototypes, CalexNet": ("calexnet_cifar10", "runs", "CalexNet"),
    "block on 4x4, CalexNet": ("calexnet_cifar10", "runs", "CalexNet, residual heads"),
    "block on 4x4, ZTW": ("calexnet_cifar10", "runs", "ZTW"),
    "block on the whole map, ZTW (briefly trained)": ("calexnet_cifar10", "runs", "ZTW, whole map; 900 of 64"),
}
"""What answers at the exits: the results that have it, and where."""

MARKERS = "vs^DoP*"


@dataclass(frozen=True)
class Exit:
    """One exit of one kind, measured by several seeds of its head; accuracies in percent."""

    kind: str
    cut: str
    macs: float
    accuracies: np.ndarray


def main() -> None:
    """Read, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="examples/pictures/exits_or_models.png", help="where the picture goes")
    args = parser.parse_args()
    models = independent_models()
    exits = list(attached_exits(full_macs=max(macs for macs, _ in models.values())))
    report(models, exits)
    draw(models, exits, args.out)


def results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def independent_models() -> dict[str, tuple[float, float]]:
    """MACs and test accuracy (%) of the networks that stand alone."""
    figures = results("cascade_cifar10")["at_drops"]["8 -> 20 -> 56"]
    names = ("ResNet-8", "ResNet-20", "ResNet-56")
    pairs = zip(figures["macs"], figures["fixed_accuracy_test"], strict=True)
    return {name: (macs, 100 * accuracy) for name, (macs, accuracy) in zip(names, pairs, strict=True)}


def attached_exits(full_macs: float) -> Iterator[Exit]:
    """Those of every kind that was measured."""
    for kind, (name, group, row) in KINDS.items():
        measurements = results(name)
        runs = measurements[group].get(row, [])
        for k, cut in enumerate(measurements["exits"] if runs else []):
            accuracies = np.array([100 * run["exit_accuracy"][k] for run in runs])
            yield Exit(kind, cut, runs[0]["exit_cost"][k] * full_macs, accuracies)
        if name == "retrofit_cifar10" and row == "mlp":
            yield late_exit(kind, full_macs)


def late_exit(kind: str, full_macs: float) -> Exit:
    """The last exit of the comparison with EM routing, whose heads are perceptrons too."""
    measurements = results("em_routing_cifar10")
    alone = [run["points"]["exit 2 alone"] for run in measurements["runs"]]
    accuracies = np.array([100 * accuracy for accuracy, *_ in alone])
    return Exit(kind, measurements["exits"][2], alone[0][1] * full_macs, accuracies)


def best_within(models: dict[str, tuple[float, float]], macs: float) -> tuple[str, float]:
    """Name and accuracy of the best model that costs no more."""
    accuracy, name = max((accuracy, name) for name, (cost, accuracy) in models.items() if cost <= macs)
    return name, accuracy


def report(models: dict[str, tuple[float, float]], exits: list[Exit]) -> None:
    """Both tables, and how the comparison ends."""
    rows: list[list[Any]] = [
        [name, f"{macs / 1e6:.1f}", f"{accuracy:.1f}"] for name, (macs, accuracy) in models.items()
    ]
    print_table("Independent models", ["model", "M MACs", "test accuracy (%)"], rows)
    rows, differences = [], []
    for at in exits:
        name, accuracy = best_within(models, at.macs)
        differences.append(float(at.accuracies.mean()) - accuracy)
        rows.append(
            [at.kind, f"`{at.cut}`", f"{at.macs / 1e6:.1f}", spread(at.accuracies, 1), name, f"{differences[-1]:+.1f}"]
        )
    header = ["head", "at", "M MACs", "test accuracy (%)", "best model within that cost", "exit - model (points)"]
    print_table("Exits attached to ResNet-56", header, rows)
    better = sum(difference > 0 for difference in differences)
    print(f"\n{better} of {len(exits)} exits are better than the best model within their cost.")


def draw(models: dict[str, tuple[float, float]], exits: list[Exit], out: str) -> None:
    """Accuracy against MACs, as the paper's Fig. 2."""
    figure, ax = pyplot.subplots(figsize=(9, 4.4), layout="constrained")
    macs, accuracies = np.array(sorted(models.values())).T
    ax.plot(macs / 1e6, accuracies, "k-o", linewidth=2, label="independent models")
    for name, (cost, accuracy) in models.items():
        ax.annotate(name, (cost / 1e6, accuracy), xytext=(0, 7), textcoords="offset points", ha="center")
    for marker, kind in zip(MARKERS, KINDS, strict=True):
        of_kind = [at for at in exits if at.kind == kind]
        if of_kind:
            means = [at.accuracies.mean() for at in of_kind]
            ax.plot([at.macs / 1e6 for at in of_kind], means, marker + ":", linewidth=1, label=kind)
    ax.set(
        xscale="log", xlim=(10, 150), xlabel="M MACs an image, heads included",
        ylim=(30, 95), ylabel="test accuracy (%)",
        title="Exits on a frozen ResNet-56, CIFAR-10 (JPEG)",
    )  # fmt: skip
    ticks = [12, 25, 40, 60, 85, 125]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    figure.legend(fontsize=8, loc="outside right center")
    figure.savefig(out, dpi=110)
    print(f"picture: {out}")


if __name__ == "__main__":
    main()
