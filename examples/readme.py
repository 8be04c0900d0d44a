"""The README's two snippets on pretrained ResNets and CIFAR-10 (JPEG): what they print, and the seconds they save.

    OMP_NUM_THREADS=1 python examples/readme.py --data DIR --weights DIR [--images 20000]

``--data`` holds ``train``, ``val`` and ``test``, each with ``<class>/*.jpg``; ``--weights`` holds
``resnet20.safetensors`` and ``resnet56.safetensors``. Everything is calibrated on ``val`` and reported on ``test``;
only the exits' heads are trained, which takes minutes."""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from adaptexit import CascadeSaver, MultiExitClassifier, Predictor

try:
    from examples.cifar import learning, pretrained
except ImportError:  # run as a script, from anywhere
    from cifar import learning, pretrained

ROUNDS = 5
"""Of timing, after one that is thrown away."""


def main() -> None:
    """A cascade of two networks, then exits on the larger one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train, val and test")
    parser.add_argument("--weights", type=Path, required=True, help="folder with resnet20 and resnet56.safetensors")
    parser.add_argument("--images", type=int, default=20_000, help="of train, for the exits")
    args = parser.parse_args()
    resnet20, resnet56 = pretrained(20, args.weights), pretrained(56, args.weights)
    train, val, test = learning(args.data, args.images)
    print(f"CIFAR-10 (JPEG): {len(val[1]):,} images to calibrate on, {len(test[1]):,} to test on")
    print(f"threads: {torch.get_num_threads()}")

    print("\n-- a cascade")
    cascade = CascadeSaver(base=resnet56, saver=resnet20).fit(val)
    print(cascade)
    curve = cascade.pareto(test)
    for point in (curve.at(budget=0.4), curve.at(max_drop=0.005)):
        print(f"test accuracy {point.accuracy:.4f} at relative cost {point.cost:.3f}")
    print_seconds(cascade.at(max_drop=0.005), resnet56, test[0])

    print(f"\n-- exits, fitted on {len(train[1]):,} images of train")
    start = time.perf_counter()
    model = MultiExitClassifier(resnet56, exits=["layer2.3", "layer2", "layer3.4"])
    model.fit(train).calibrate(val)
    minutes = (time.perf_counter() - start) / 60
    print(model)
    curve = model.pareto(test)
    for point in (curve.at(budget=0.7), curve.at(max_drop=0.005)):
        print(f"test accuracy {point.accuracy:.4f} at relative cost {point.cost:.3f}")
    print_seconds(model.at(max_drop=0.005), resnet56, test[0])
    print(f"fitted and calibrated in {minutes:.1f} minutes")


def print_seconds(predictor: Predictor, net: nn.Module, images: Tensor) -> None:
    """Median seconds of answering all images, taking turns with the plain network in batches of the same size."""

    @torch.inference_mode()
    def plain() -> None:
        for batch in images.split(128):
            net(batch).argmax(dim=1)

    seconds: dict[str, list[float]] = {"early": [], "plain": []}
    for turn in range(1 + ROUNDS):
        for name, answer in (("early", lambda: predictor.predict(images)), ("plain", plain)):
            start = time.perf_counter()
            answer()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    early, whole = np.median(seconds["early"]), np.median(seconds["plain"])
    ratio = np.median(np.divide(seconds["plain"], seconds["early"]))
    print(f"{len(images):,} images at max_drop=0.005: {early:.2f} s, plain {whole:.2f} s, {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
