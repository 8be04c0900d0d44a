"""What a cascade's machinery costs, and what merging survivors gains, with pretrained ResNet-20 -> ResNet-56.

Measured in one run, on the images of ``val`` and ``test`` held in memory, float32:

- **overhead**: ``CascadeSaver.predict`` on batches of 256 against a two-model loop written by hand, at the same
  threshold, with the same answers (checked sample for sample);
- **speed-up** over the base alone, against the one that the exit rate and the two models' own times imply;
- **merging**: 6,000 images in batches of 32 of which a fifth survives the first exit, survivors merged into full
  batches and sent on at once, against the ideal (all images through the small model and a fifth of them through the
  large one, both in full batches).

Wall-clock seconds; median and quartiles over interleaved rounds, the first thrown away; ratios are medians of the
ratios within a round. A second, identical timing of the hand-written loop shows the noise::

    OMP_NUM_THREADS=2 python -m benchmarks.cascade_inference --data DIR --weights DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptexit import CascadeSaver
from adaptexit.core.answer import Answer
from adaptexit.core.routing import accepts
from adaptexit.core.scores import max_proba
from adaptexit.networks.models import build_model
from adaptexit.networks.row import Row
from adaptexit.staging.executor import execute
from benchmarks.cifar import tensors
from benchmarks.common import describe_machine, interleaved, print_table, quartiles, ratio, write_result
from benchmarks.staging import FunctionPolicy
from examples.cifar import pretrained


@torch.inference_mode()
def by_hand(small: nn.Module, large: nn.Module, images: Tensor, cutoff: float, batch_size: int) -> np.ndarray:
    """The loop anybody would write."""
    answers = []
    for x in images.split(batch_size):
        logits = small(x)
        answer = logits.argmax(1)
        hard = logits.softmax(1).amax(1) <= cutoff
        if hard.any():
            answer[hard] = large(x[hard]).argmax(1)
        answers.append(answer)
    return torch.cat(answers).numpy()


@torch.inference_mode()
def alone(net: nn.Module, images: Tensor, batch_size: int) -> None:
    """One model on everything."""
    for x in images.split(batch_size):
        net(x).argmax(1)


def overhead(small: nn.Module, large: nn.Module, images: Tensor, labels: Tensor, repeats: int) -> dict[str, Any]:
    """Cascade against the hand-written loop and the base alone, at batch 256, at the point of no calibrated drop."""
    cascade = CascadeSaver(large, small, batch_size=256).fit(images[:3000], labels[:3000])
    cutoff = float(cascade.calibrator_.point_.cutoffs[0])
    x = images[3000:6000]
    batches = x.split(256)
    same = bool((np.concatenate([cascade.predict(b) for b in batches]) == by_hand(small, large, x, cutoff, 256)).all())
    exit_rate = float((cascade.trace(x).exits == 0).mean())
    timings = interleaved(
        {
            "by hand": lambda: by_hand(small, large, x, cutoff, 256),
            "by hand again": lambda: by_hand(small, large, x, cutoff, 256),
            "cascade, batch by batch": lambda: [cascade.predict(b) for b in batches],
            "cascade, all at once": lambda: cascade.predict(x),
            "base alone": lambda: alone(large, x, 256),
            "saver alone": lambda: alone(small, x, 256),
        },
        repeats,
    )
    ideal = [
        base / (saver + (1 - exit_rate) * base)
        for base, saver in zip(timings["base alone"]["seconds"], timings["saver alone"]["seconds"], strict=True)
    ]
    ideal_speedup = float(np.median(ideal))
    figures = {
        "same_answers": same,
        "exit_rate": exit_rate,
        "cascade / by hand": ratio(timings, "cascade, batch by batch", "by hand"),
        "cascade all at once / by hand": ratio(timings, "cascade, all at once", "by hand"),
        "by hand again / by hand (noise)": ratio(timings, "by hand again", "by hand"),
        "speed-up implied": ideal_speedup,
        "speed-up, batch by batch": ratio(timings, "base alone", "cascade, batch by batch"),
        "speed-up, all at once": ratio(timings, "base alone", "cascade, all at once"),
    }
    for how in ("batch by batch", "all at once"):
        figures[f"share of the implied speed-up, {how}"] = figures[f"speed-up, {how}"] / ideal_speedup
    print_table(
        f"Batch 256, {len(x)} images, {100 * exit_rate:.1f}% leave at the saver, same answers: {same}",
        ["what", "seconds (median)", "quartiles"],
        [[name, t["median"], quartiles(t)] for name, t in timings.items()],
    )
    print_table("Ratios", ["figure", "value"], [[k, v] for k, v in figures.items() if isinstance(v, float)])
    return {"timings": timings, "figures": figures, "n_images": len(x)}


def merging(small: nn.Module, large: nn.Module, images: Tensor, repeats: int) -> dict[str, Any]:
    """Merged and unmerged survivors at batch 32, a fifth of the images surviving."""
    row = Row([build_model(small, None, "saver"), build_model(large, None, "base")])
    with torch.inference_mode():
        scores = torch.cat([max_proba(small(x), torch) for x in images.split(256)]).numpy()
    cutoff = float(np.quantile(scores.astype(np.float64), 0.2))

    def sure(k: int, batch: Answer) -> np.ndarray:
        return accepts(batch.predictions, batch.scores, cutoff)

    policy = FunctionPolicy(sure, np.array([True, True]))

    def run(merge: bool) -> np.ndarray:
        return execute(row, images.split(32), policy, batch_size=32, merge=merge).predictions

    survivors = images[torch.from_numpy(scores.astype(np.float64) <= cutoff)]
    agreement = float((run(True) == run(False)).mean())
    timings = interleaved(
        {
            "merged": lambda: run(True),
            "unmerged": lambda: run(False),
            "ideal": lambda: (alone(small, images, 32), alone(large, survivors, 32)),
            "base alone": lambda: alone(large, images, 32),
        },
        repeats,
    )
    figures = {
        "unmerged / merged": ratio(timings, "unmerged", "merged"),
        "merged / ideal": ratio(timings, "merged", "ideal"),
        "unmerged / ideal": ratio(timings, "unmerged", "ideal"),
        "speed-up merged": ratio(timings, "base alone", "merged"),
        "speed-up unmerged": ratio(timings, "base alone", "unmerged"),
        "same answers merged and unmerged": agreement,
    }
    print_table(
        f"Batch 32, {len(images)} images, {len(survivors)} survive",
        ["what", "seconds (median)", "quartiles"],
        [[name, t["median"], quartiles(t)] for name, t in timings.items()],
    )
    print_table("Ratios", ["figure", "value"], list(figures.items()))
    return {"timings": timings, "figures": figures, "n_images": len(images), "n_survivors": len(survivors)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with val and test")
    parser.add_argument("--weights", type=Path, required=True, help="folder with resnet20 and resnet56.safetensors")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    print(describe_machine())
    small, large = pretrained(20, args.weights), pretrained(56, args.weights)
    images, labels = tensors(args.data, ("val", "test"))
    payload = {
        "overhead": overhead(small, large, images, labels, args.repeats),
        "merging": merging(small, large, images, args.repeats),
    }
    print(f"\nwritten: {write_result('cascade_inference', payload)}")


if __name__ == "__main__":
    main()
