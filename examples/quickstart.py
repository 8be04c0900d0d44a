"""A cascade in three lines, on the digits inside scikit-learn: no download, under a minute on two cores.

    python examples/quickstart.py [--out quickstart.png]

Trains a small and a larger network, cascades them, prints what the cascade costs when accuracy may fall by at most 1,
0.5, 0.1 and 0 points (the columns of TinySaver's Table 1), and saves the accuracy-cost curve as a picture."""

import argparse
import time

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

from adaptexit import CascadeSaver, JobRatioDisplay, ParetoDisplay
from adaptexit.core.saver import required_cost


def small_net() -> nn.Module:
    """Two strided convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def large_net() -> nn.Module:
    """Four convolutions and two linear layers."""

    def block(in_channels: int, channels: int) -> list[nn.Module]:
        return [nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32), *block(32, 32), nn.MaxPool2d(2), *block(32, 64), *block(64, 64), nn.MaxPool2d(2), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def train(net: nn.Module, X: np.ndarray, y: np.ndarray, epochs: int) -> nn.Module:
    """Plain training with AdamW and a one-cycle schedule."""
    X, y = torch.from_numpy(X), torch.from_numpy(y)
    steps = epochs * -(-len(X) // 64)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(X)).split(64):
            loss = F.cross_entropy(net(X[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def main() -> None:
    """Train, cascade, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="quickstart.png", help="where the picture goes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    start = time.perf_counter()

    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    X_train, X_rest, y_train, y_rest = train_test_split(X, y, train_size=700, stratify=y, random_state=args.seed)
    X_val, X_test, y_val, y_test = train_test_split(
        X_rest, y_rest, test_size=0.5, stratify=y_rest, random_state=args.seed
    )
    small = train(small_net(), X_train, y_train, epochs=20)
    large = train(large_net(), X_train, y_train, epochs=25)

    # The three lines: a cascade, calibrated on data that neither network has seen, and its answers at a budget.
    cascade = CascadeSaver(large, small).fit(X_val, y_val)
    labels = cascade.predict(X_test, budget=0.3)
    frontier = cascade.pareto(X_test, y_test)

    small_macs, large_macs = cascade.outputs_.exit_costs
    print(f"small network {small_macs:,.0f} MACs, large network {large_macs:,.0f} MACs a sample")
    print(f"test accuracy: small {frontier.fixed_accuracy[0]:.4f}, large {frontier.full_accuracy:.4f}")
    print(f"at a budget of 0.3 the cascade's is {np.mean(labels == y_test):.4f}\n")
    print(
        f"{len(y_val)} samples to calibrate on, {len(y_test)} to test on (one sample is {100 / len(y_test):.2f} points)"
    )
    print("allowed drop | relative cost (calibrated) | relative cost (test) | test accuracy - large network's (points)")
    drops = (0.01, 0.005, 0.001, 0.0)
    outputs = cascade.outputs_
    costs = required_cost(outputs.scores[0], outputs.graded[0], outputs.graded[1], small_macs, large_macs, drops)
    for drop, cost in zip(drops, costs, strict=True):
        point = frontier.at(max_drop=drop)
        change = 100 * (point.accuracy - frontier.full_accuracy)
        print(f"{100 * drop:10.1f}%  | {cost:26.3f} | {point.cost:20.3f} | {change:+.2f}")

    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2))
    ParetoDisplay.from_estimator(cascade, X_test, y_test, budget=0.3, name="cascade (test)").plot(axes[0])
    axes[0].set_title("digits: accuracy against cost")
    JobRatioDisplay.from_estimator(cascade).plot(axes[1])
    axes[1].set_title("digits: who leaves at the saver (calibration data)")
    figure.tight_layout()
    figure.savefig(args.out, dpi=120)
    print(f"\npicture: {args.out}; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
