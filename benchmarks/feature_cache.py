"""What recording features once saves: heads trained from the cache, or with the frozen backbone run anew each epoch.

Three heads of one kind on the CIFAR ResNet-56, at the cuts that ``exits="auto"`` takes, trained by the plain recipe for
20 epochs on images of CIFAR-10's training set in memory; prototype heads then train their confidence for another 20.
Without a cache the backbone runs, frozen and without gradients, on every minibatch of every epoch: same loop, same
minibatches, same heads, and the features are reduced alike. Measured in turns, float32, on the processor:

- the pass over the images that fills the cache, in memory and in files (``memory_limit=0``);
- all 20 epochs from the cache, in memory and in files. The files were just written and lie in the system's page cache:
  what a cold disk costs is not seen here;
- 2 epochs with the backbone run anew, from which those of all 20 are **extrapolated in proportion**; ``--full`` runs
  all 20 once as well, to check that.

Beside the times, the bytes of the features against those of the raw feature maps, and in half precision. The losses
with and without the cache are compared: they may differ by rounding, as the backbone sees other batches.

Medians and quartiles over rounds, the first thrown away. About 15 minutes on two cores, 10 more with ``--full``::

    python -m benchmarks.feature_cache --data DIR --weights DIR --threads 2
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptexit.networks.branched import BranchedNetwork
from adaptexit.networks.build import feature_specs, new_heads
from adaptexit.networks.models import TorchModel
from adaptexit.staging.splitting import split
from adaptexit.training import FeatureCache, FrozenRecipe, collect
from benchmarks.cifar import tensors
from benchmarks.common import (
    STEADY_ALLOCATOR,
    describe_machine,
    interleaved,
    middle,
    print_table,
    restart_with_steady_allocator,
    summarised,
    timed,
    write_result,
)
from examples.cifar import pretrained

CUTS = ("layer1", "layer2.3", "layer2")
KINDS = ("mlp", "prototype", "refined_prototype")

EPOCHS = 20
EPOCHS_ANEW = 2

TOLERANCE = 0.01
"""Of the losses with and without the cache, relative."""


class BackboneAnew:
    """Stands where the training loop expects a cache, and runs the backbone for every minibatch."""

    def __init__(self, network: BranchedNetwork, images: Tensor, logits: NDArray[Any]) -> None:
        self.network, self.images = network, images
        self.features: list[Tensor | None] = [None] * len(network.early)
        self.logits = logits  # only its shape is read
        self.n_samples = len(images)

    def rows(self, k: int, indices: NDArray[Any]) -> Tensor:
        """Reduced features of a minibatch at exit k; those of all exits come from the run at the first."""
        if k == 0:
            self._run(self.images[torch.from_numpy(indices)])
        feature = self.features[k]
        assert feature is not None
        return feature

    def _run(self, x: Tensor) -> None:
        def keep(k: int, feature: Tensor) -> None:
            self.features[k] = self.network.early[k].reduce(feature)

        with torch.no_grad():
            self.network.look(x, keep)


class Subject:
    """Heads of one kind on the backbone."""

    def __init__(self, kind: str, model: TorchModel, images: Tensor, labels: NDArray[Any], batch_size: int) -> None:
        self.kind, self.model, self.images, self.labels, self.batch_size = kind, model, images, labels, batch_size
        self.parts = split(model.module, CUTS, images[:6])
        self.specs = feature_specs(self.parts)
        self.network = self.fresh()

    def fresh(self) -> BranchedNetwork:
        """With new heads, the same every time."""
        return BranchedNetwork(self.model, self.parts, new_heads(self.kind, self.specs, self.model, 10, 0))

    def fill(self, memory_limit: int, half: bool = False) -> FeatureCache:
        """One pass over the images."""
        reducers = [head.reduce for head in self.network.early]
        batches = self.images.split(self.batch_size)
        return collect(batches, self.network.look, reducers, half=half, memory_limit=memory_limit)

    def train(self, cache: Any, epochs: int) -> dict[str, list[list[float]]]:
        """New heads, and their losses: by head, then by epoch."""
        recipe = FrozenRecipe(epochs=epochs, batch_size=self.batch_size)
        return recipe.train(self.fresh().early, cache, np.arange(len(self.images)), self.labels)


def measure(subject: Subject, repeats: int, full: bool) -> dict[str, Any]:
    """Times, sizes and losses of one kind of head."""
    in_memory, in_files, in_half = subject.fill(1 << 40), subject.fill(0), subject.fill(1 << 40, half=True)
    anew = BackboneAnew(subject.network, subject.images, in_memory.logits)
    difference = largest_difference(subject.train(in_memory, EPOCHS_ANEW), subject.train(anew, EPOCHS_ANEW))
    if difference > TOLERANCE:
        raise RuntimeError(f"losses with and without the cache differ by {difference:.2g}.")
    timings = interleaved(
        {
            "fill, memory": lambda: subject.fill(1 << 40).close(),
            "fill, files": lambda: subject.fill(0).close(),
            "20 epochs, memory": lambda: subject.train(in_memory, EPOCHS),
            "20 epochs, files": lambda: subject.train(in_files, EPOCHS),
            "2 epochs, backbone anew": lambda: subject.train(anew, EPOCHS_ANEW),
        },
        repeats,
    )
    seconds = {what: np.array(t["seconds"]) for what, t in timings.items()}
    anew_s = seconds["2 epochs, backbone anew"] * (EPOCHS / EPOCHS_ANEW)
    memory_s = seconds["fill, memory"] + seconds["20 epochs, memory"]
    files_s = seconds["fill, files"] + seconds["20 epochs, files"]
    losses, half_losses = subject.train(in_memory, EPOCHS), subject.train(in_half, EPOCHS)
    return {
        "head": subject.kind,
        "timings": timings,
        "20 epochs, backbone anew (extrapolated)": summarised(anew_s),
        "20 epochs, backbone anew (run once)": timed(lambda: subject.train(anew, EPOCHS))[0] if full else None,
        "filled and trained, memory": summarised(memory_s),
        "filled and trained, files": summarised(files_s),
        "speed-up, memory": summarised(anew_s / memory_s),
        "speed-up, files": summarised(anew_s / files_s),
        "largest difference of losses, cached and anew": difference,
        "last losses": [loss[-1] for loss in losses["loss"]],
        "largest difference of losses, half and single precision": largest_difference(losses, half_losses),
        "bytes an image": {
            "features": feature_bytes(in_memory),
            "features in half precision": feature_bytes(in_half),
            "raw maps": sum(4 * math.prod(spec.shape) for spec in subject.specs),
            "logits, kept beside them": in_memory.logits.nbytes / in_memory.n_samples,
        },
    }


def feature_bytes(cache: FeatureCache) -> float:
    """Bytes an image, of all three cuts."""
    return sum(feature.nbytes for feature in cache.features) / cache.n_samples


def largest_difference(one: dict[str, list[list[float]]], other: dict[str, list[list[float]]]) -> float:
    """Of any head's loss in any epoch, relative."""
    pairs = [
        (np.array(mine), np.array(theirs))
        for name in one
        for mine, theirs in zip(one[name], other[name], strict=True)
        if mine
    ]
    return max(float(np.max(np.abs(mine - theirs) / mine)) for mine, theirs in pairs)


def show(results: list[dict[str, Any]], n_images: int) -> None:
    """Print all tables."""
    print_table(
        f"Three heads on ResNet-56, {n_images} images, {EPOCHS} epochs: seconds (quartiles)",
        ["head", "fill", "epochs, cached", "both", "both, in files", "backbone anew (extrapolated)", "run once"],
        [
            [
                figures["head"],
                middle(figures["timings"]["fill, memory"]),
                middle(figures["timings"]["20 epochs, memory"]),
                middle(figures["filled and trained, memory"]),
                middle(figures["filled and trained, files"]),
                middle(figures["20 epochs, backbone anew (extrapolated)"]),
                figures["20 epochs, backbone anew (run once)"] or "",
            ]
            for figures in results
        ],
    )
    print_table(
        "Speed-up over the backbone run anew, the filling pass included; largest relative differences of losses",
        ["head", "speed-up", "in files", "fill, files", "20 epochs, files", "losses, cached - anew", "half - single"],
        [
            [
                figures["head"],
                middle(figures["speed-up, memory"]),
                middle(figures["speed-up, files"]),
                middle(figures["timings"]["fill, files"]),
                middle(figures["timings"]["20 epochs, files"]),
                f"{figures['largest difference of losses, cached and anew']:.1g}",
                f"{figures['largest difference of losses, half and single precision']:.1g}",
            ]
            for figures in results
        ],
    )
    print_table(
        "Bytes an image",
        ["head", "features", "in half precision", "raw maps", "raw maps / features"],
        [
            [
                figures["head"],
                size["features"],
                size["features in half precision"],
                size["raw maps"],
                size["raw maps"] / size["features"],
            ]
            for figures in results
            for size in [figures["bytes an image"]]
        ],
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train")
    parser.add_argument("--weights", type=Path, required=True, help="folder with resnet56.safetensors")
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=256, help="of the pass over the images and of minibatches")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="run all 20 epochs without the cache as well, once")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="only try it out: few images, nothing is written")
    args = parser.parse_args()
    restart_with_steady_allocator(args.threads)
    torch.set_num_threads(args.threads)
    print(describe_machine())
    n, repeats = (256, 1) if args.quick else (args.samples, args.repeats)
    images, labels = (part[:n] for part in tensors(args.data, ("train",)))
    model = TorchModel(pretrained(56, args.weights), None, "resnet56")
    results = []
    for kind in KINDS:
        results.append(measure(Subject(kind, model, images, labels.numpy(), args.batch_size), repeats, args.full))
        print(f"{kind}: done", flush=True)
    show(results, n)
    if args.quick:
        return
    payload = {
        "threads": args.threads,
        "allocator": STEADY_ALLOCATOR,
        "cuts": CUTS,
        "n_images": n,
        "batch_size": args.batch_size,
        "epochs": EPOCHS,
        "epochs_anew": EPOCHS_ANEW,
        "heads": results,
    }
    print(f"\nwritten: {write_result('feature_cache', payload)}")


if __name__ == "__main__":
    main()
