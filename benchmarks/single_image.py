"""One image a call: what ``predict`` costs beyond the plain model when three exits are on and nobody leaves.

ResNet-18, ViT-tiny and MobileNetV3-large (timm, 224 pixels) and the CIFAR ResNet-56, random weights and noise, exits
where ``exits="auto"`` puts them. Nobody leaves, so that every figure is pure cost. With each library's own heads, and
with the same heads (the mean over the positions and one linear layer) in both:

- **predict**: ``model.at(policy=...).predict(x)``, everything from the checks of the input to the label;
- **exits alone**: the same stages and heads one after another, nothing read from their outputs: what no way of asking
  can go below;
- **hooks**: the same exits by forward hooks, as earlyon 0.3.0 attaches them (left out where it is not installed).

Medians and quartiles over interleaved rounds; differences are taken within a round, and a second timing of the plain
model shows the noise. About five minutes::

    pip install earlyon==0.3.0 && python -m benchmarks.single_image --threads 1
"""

from __future__ import annotations

import argparse
import copy
import os
import warnings
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptexit import FrozenRecipe, MultiExitClassifier
from adaptexit.core.frontier import evaluate
from adaptexit.heads import Head
from adaptexit.heads.layout import pooled
from adaptexit.networks.base import Network
from adaptexit.predictor import Predictor
from benchmarks.common import (
    describe_machine,
    interleaved,
    print_table,
    restart_with_steady_allocator,
    summarised,
    write_result,
)
from benchmarks.staging import CUTS, LinearHead, new_model, noise_images

try:
    from earlyon.core.types import EarlyExitConfig, ExitPoint
    from earlyon.core.wrappers import EarlyExitWrapper
    from earlyon.models.custom import custom_ee
except ImportError:
    custom_ee = None

N_IMAGES = 64


def nobody_leaves(module: nn.Module, cuts: tuple[str, ...], images: Tensor, head: Any) -> tuple[Predictor, list[Head]]:
    """Three exits that are on and let nobody leave, and their heads."""
    labels = np.arange(len(images)) % 10
    model = MultiExitClassifier(
        module, list(cuts), head=head, recipe=FrozenRecipe(epochs=1), preprocess=None, batch_size=8
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(images, labels).calibrate(images, labels)
    cutoffs = np.array([2.0] * len(cuts) + [-np.inf])  # above every probability
    point = evaluate(model.outputs_, cutoffs, cutoffs)
    return model.at(policy=model.calibrator_.policy(point=point)), [copy.deepcopy(h) for h in list(model.heads_)[:-1]]


class LogitsOf(nn.Module):
    """One of our heads as a module from a feature to logits."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.linear, self.spec = head.linear, head.spec

    def forward(self, feature: Tensor) -> Tensor:
        return self.linear(pooled(feature, self.spec))


def hooked(module: nn.Module, cuts: tuple[str, ...], images: Tensor, heads: list[Head] | None) -> nn.Module | None:
    """The same exits by hooks: with heads of that library, or with copies of ours."""
    if custom_ee is None:
        return None
    backbone, shape = copy.deepcopy(module), (1, *images.shape[1:])
    n_classes = backbone(images[:1]).shape[1]
    if heads is None:
        wrapper = custom_ee(backbone, list(cuts), n_classes, input_shape=shape)
    else:
        points = [
            ExitPoint(f"exit{k}", cut, head.spec.channels)
            for k, (cut, head) in enumerate(zip(cuts, heads, strict=True))
        ]
        config = EarlyExitConfig(
            backbone="custom", num_classes=n_classes, exit_points=points, confidence_thresholds=[1.0] * len(cuts),
            loss_weights=[1.0] * (len(cuts) + 1),
        )  # fmt: skip
        modules = {point.name: LogitsOf(head) for point, head in zip(points, heads, strict=True)}
        wrapper = EarlyExitWrapper(backbone, modules, lambda logits: logits, config, input_shape=shape)
    wrapper.config.confidence_thresholds = [2.0] * len(cuts)  # nobody leaves here either
    return wrapper.eval()


def measured(name: str, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of one call, and what they are beyond the plain model's."""
    module, images = new_model(name), noise_images(name, N_IMAGES)
    image = images[:1]

    def plain() -> None:
        with torch.inference_mode():
            module(image)

    def exits_alone(network: Network) -> None:
        with torch.inference_mode():
            carried = image
            for k in range(network.n_exits):
                carried = network.exit(k, network.advance(carried, k - 1, k))[1]

    results = []
    for kind, head in (("own heads", "auto"), ("same linear heads", LinearHead)):
        predictor, heads = nobody_leaves(module, CUTS[name], images, head)
        calls = {
            "plain": plain,
            "plain again (noise)": plain,
            "exits alone": partial(exits_alone, predictor.network),
            "predict": partial(predictor.predict, image),
        }
        wrapper = hooked(module, CUTS[name], images, None if kind == "own heads" else heads)
        if wrapper is not None:
            calls["hooks"] = partial(wrapper, image)
        timings = interleaved(calls, rounds, warmup=10)
        base = np.array(timings["plain"]["seconds"])
        beyond = {
            what: summarised(1e3 * (np.array(timing["seconds"]) - base))
            for what, timing in timings.items()
            if what != "plain"
        }
        results.append(
            {"model": name, "heads": kind, "plain_ms": 1e3 * timings["plain"]["median"], "beyond plain, ms": beyond}
        )
    return results


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--models", nargs="+", choices=CUTS, default=list(CUTS))
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    restart_with_steady_allocator(args.threads)
    torch.set_num_threads(args.threads)
    print(describe_machine())
    results = [row for name in args.models for row in measured(name, args.rounds)]
    print_table(
        "One image a call, three exits on, nobody leaves",
        ["model", "heads", "plain, ms", "what", "ms beyond plain (median)", "quartiles"],
        [
            [
                row["model"],
                row["heads"],
                f"{row['plain_ms']:.2f}",
                what,
                f"{s['median']:.2f}",
                f"{s['q1']:.2f} to {s['q3']:.2f}",
            ]
            for row in results
            for what, s in row["beyond plain, ms"].items()
        ],
    )
    print(
        f"\nwritten: {write_result('single_image', {'threads': args.threads, 'rounds': args.rounds, 'rows': results})}"
    )


if __name__ == "__main__":
    main()
