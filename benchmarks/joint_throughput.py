"""What joint training costs beside a plain training step of the same network without exits.

    OMP_NUM_THREADS=1 python -m benchmarks.joint_throughput [--repeats 15]

One step each, in turns: a plain loop's (forward, cross-entropy, backward, SGD), joint training's with four exits and no
teacher, the same with the original as the teacher, and what the additions need by themselves: heads and their losses
forward and backward on features that are there already, and the teacher's forward. What is left is the library's own.
Random weights and images: nothing here depends on them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptexit.backbones import resnet56_cifar
from adaptexit.networks.build import new_network
from adaptexit.networks.models import TorchModel, copied
from adaptexit.training.all_exits import all_exits
from adaptexit.training.joint import JointData, JointTraining
from adaptexit.training.joint_loss import exit_weights
from adaptexit.training.processes import Alone
from adaptexit.training.recipes.joint import JointRecipe, usual_head
from adaptexit.training.samples import Samples
from benchmarks.common import (
    interleaved,
    print_table,
    quartiles,
    require_one_thread,
    restart_with_steady_allocator,
    summarised,
    write_result,
)

NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str], int, int]] = {
    "ResNet-56, 32 pixels": (resnet56_cifar, ["layer1.4", "layer1.8", "layer2.4", "layer2.8"], 32, 128),
    "MobileNetV3-small, 224 pixels": (
        lambda: timm.create_model("mobilenetv3_small_100", num_classes=10),
        ["blocks.0", "blocks.1", "blocks.2", "blocks.3"],
        224,
        16,
    ),
}
"""How a network is made, where its exits are, the side of its images, and how many make a batch."""


def steps(make: Callable[[], nn.Module], exits: list[str], side: int, batch: int) -> dict[str, Callable[[], Any]]:
    """All that is timed, by name."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, side, side), torch.randint(0, 10, (batch,))
    given = TorchModel(make().eval(), None, "backbone")
    plain_net = copied(given).module.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(plain_net.parameters(), 1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4)
    images = x.contiguous(memory_format=torch.channels_last)

    def plain() -> None:
        F.cross_entropy(plain_net(images), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    def joint(teacher: TorchModel | None) -> Callable[[], Any]:
        settings = JointRecipe(epochs=10**6, lr=1e-3, channels_last=True).settled(native=False, labelled=True)
        if teacher is None:
            settings |= {"teacher": None, "distillation": 0.0}
        network = new_network(copied(given), exits, usual_head, None, x, 10, 0)
        data = JointData(Samples(x, y, batch), np.arange(batch), y.numpy(), 10)
        training = JointTraining(
            all_exits(network), network.model, teacher, data, settings, exit_weights("equal", np.ones(5)), 0, Alone()
        )
        training.exits.train().to(memory_format=torch.channels_last)
        return lambda: training._step(training.exits, x, torch.arange(batch), batch, 0)

    network = new_network(copied(given), exits, usual_head, None, x, 10, 0)
    features: list[Tensor] = []
    with torch.no_grad():
        network.split.visit(x, lambda k, feature: features.append(feature.clone()))
    features = [f.contiguous(memory_format=torch.channels_last).requires_grad_() for f in features]
    heads = [head.to(memory_format=torch.channels_last).train() for head in network.early]
    head_optimizer = torch.optim.SGD([p for head in heads for p in head.parameters()], 1e-3, momentum=0.9)

    def heads_alone() -> None:
        losses = [F.cross_entropy(head(f).logits, y) for head, f in zip(heads, features, strict=True)]
        sum(losses, torch.zeros(())).backward()
        head_optimizer.step()
        head_optimizer.zero_grad()
        for feature in features:
            feature.grad = None

    teacher = copied(given)
    teacher.module.to(memory_format=torch.channels_last).eval()

    def teacher_alone() -> None:
        with torch.no_grad():
            teacher.module(images)

    return {
        "plain": plain,
        "joint": joint(None),
        "joint, taught": joint(teacher),
        "heads": heads_alone,
        "teacher": teacher_alone,
    }


def main() -> None:
    """Time, print and write."""
    restart_with_steady_allocator(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    require_one_thread(parser)
    results, rows = {}, []
    for name, setting in NETWORKS.items():
        timings = interleaved(steps(*setting), args.repeats)
        seconds = {key: np.array(timing["seconds"]) for key, timing in timings.items()}
        plain = seconds["plain"]
        shares = {
            "joint / plain": seconds["joint"] / plain,
            "heads / plain": seconds["heads"] / plain,
            "left / plain": (seconds["joint"] - plain - seconds["heads"]) / plain,
            "taught / plain": seconds["joint, taught"] / plain,
            "teacher / plain": seconds["teacher"] / plain,
            "left / plain, taught": (seconds["joint, taught"] - plain - seconds["heads"] - seconds["teacher"]) / plain,
        }
        summaries = {key: summarised(values) for key, values in shares.items()}
        results[name] = {"batch": setting[3], "timings": timings, "shares": summaries}
        rows += [[name, key, f"{s['median']:.3f}", quartiles(s)] for key, s in summaries.items()]
    print_table("Seconds a step against a plain loop's", ["network", "what", "median", "quartiles"], rows)
    write_result("joint_throughput", {"repeats": args.repeats, "networks": results})


if __name__ == "__main__":
    main()
