"""Cascades of pretrained CIFAR ResNets on an image folder of CIFAR-10.

    python examples/cascade_cifar10.py --data DIR --weights DIR [--savers 8 20] [--out cascade_cifar10.png]

``--data`` holds ``val/<class>/*.jpg`` and ``test/<class>/*.jpg``; ``--weights`` holds ``resnet8.safetensors``,
``resnet20.safetensors`` and ``resnet56.safetensors`` (keys as in ``adaptexit.backbones.ResNetCifar``). Thresholds are
tuned on ``val`` and reported on ``test``; no network is trained."""

import argparse
from pathlib import Path

import torch
from matplotlib import pyplot
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from adaptexit import CascadeSaver, JobRatioDisplay, ParetoDisplay
from adaptexit.backbones import resnet8_cifar, resnet20_cifar, resnet56_cifar

FACTORIES = {8: resnet8_cifar, 20: resnet20_cifar, 56: resnet56_cifar}
NORMALISE = v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def pretrained(depth: int, weights: Path) -> nn.Module:
    """A CIFAR ResNet with the weights of ``weights/resnet<depth>.safetensors``."""
    net = FACTORIES[depth]()
    net.load_state_dict(load_file(weights / f"resnet{depth}.safetensors"))
    return net.eval()


def images(data: Path, split: str, batch_size: int = 256) -> DataLoader:
    """Batches of images in [0, 1] and labels, in the order of the folder."""
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    return DataLoader(ImageFolder(data / split, to_tensor), batch_size=batch_size)


def main() -> None:
    """Cascade, calibrate on val, report on test."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with val and test")
    parser.add_argument("--weights", type=Path, required=True, help="folder with resnet*.safetensors")
    parser.add_argument("--savers", type=int, nargs="+", default=[20], choices=[8, 20], help="depths, small to large")
    parser.add_argument("--out", default="cascade_cifar10.png", help="where the picture goes")
    args = parser.parse_args()

    savers = [pretrained(depth, args.weights) for depth in args.savers]
    cascade = CascadeSaver(
        pretrained(56, args.weights), savers, base_preprocess=NORMALISE, saver_preprocess=NORMALISE, verbose=1
    )
    cascade.fit(images(args.data, "val"))
    names = [f"ResNet-{depth}" for depth in (*args.savers, 56)]
    for name, macs in zip(names, cascade.outputs_.exit_costs, strict=True):
        print(f"{name}: {macs / 1e6:.1f} M MACs")
    for name, report in zip(names, cascade.saver_reports_, strict=False):
        print(
            f"{name} could take {100 * report.job_ratio:.1f}% of the images without loss; ΔC {report.delta_cost:+.3f}"
        )

    calibrated, tested = cascade.pareto(), cascade.pareto(images(args.data, "test"))
    print(f"\nResNet-56 on test: {tested.full_accuracy:.4f}; {tested.n_samples} images, one is 0.03 points")
    print("allowed drop | relative cost (val) | relative cost (test) | test accuracy - ResNet-56's (points)")
    for drop in (0.01, 0.005, 0.001, 0.0):
        tuned, point = calibrated.at(max_drop=drop), tested.at(max_drop=drop)
        change = 100 * (point.accuracy - tested.full_accuracy)
        print(f"{100 * drop:10.1f}%  | {tuned.cost:19.3f} | {point.cost:20.3f} | {change:+.2f}")

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2))
    ParetoDisplay.from_frontier(tested, exit_names=names, budget=0.4, name="cascade (test)").plot(axes[0])
    axes[0].set_title("CIFAR-10: accuracy against cost, budget 0.4")
    last = len(savers) - 1
    JobRatioDisplay.from_curve(cascade.job_curve(last), saver_name=names[last], base_name="ResNet-56").plot(axes[1])
    axes[1].set_title("CIFAR-10: who leaves (val)")
    figure.tight_layout()
    figure.savefig(args.out, dpi=120)
    print(f"\npicture: {args.out}")


if __name__ == "__main__":
    main()
