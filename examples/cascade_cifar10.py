"""Cascades of pretrained CIFAR ResNets on an image folder of CIFAR-10.

    python examples/cascade_cifar10.py --data DIR --weights DIR [--savers 8 20] [--out cascade_cifar10.png]

``--data`` holds ``val/<class>/*.jpg`` and ``test/<class>/*.jpg``; ``--weights`` holds ``resnet8.safetensors``,
``resnet20.safetensors`` and ``resnet56.safetensors`` (keys as in ``adaptexit.backbones.ResNetCifar``). Thresholds are
tuned on ``val`` and reported on ``test``; no network is trained."""

import argparse
from pathlib import Path

from matplotlib import pyplot
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from adaptexit import CascadeSaver, JobRatioDisplay, ParetoDisplay

try:
    from examples.cifar import NORMALISE, TO_TENSOR, pretrained
except ImportError:  # run as a script, from anywhere
    from cifar import NORMALISE, TO_TENSOR, pretrained


def batches(data: Path, split: str) -> DataLoader:
    """Batches of images in [0, 1] and labels, in the order of the folder."""
    return DataLoader(ImageFolder(data / split, TO_TENSOR), batch_size=256)


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
    cascade.fit(batches(args.data, "val"))
    names = [f"ResNet-{depth}" for depth in (*args.savers, 56)]
    for name, macs in zip(names, cascade.outputs_.exit_costs, strict=True):
        print(f"{name}: {macs / 1e6:.1f} M MACs")
    for name, report in zip(names, cascade.saver_reports_, strict=False):
        print(
            f"{name} could take {100 * report.job_ratio:.1f}% of the images without loss; ΔC {report.delta_cost:+.3f}"
        )

    on_val, on_test = cascade.pareto(), cascade.pareto(batches(args.data, "test"))
    print(f"\nResNet-56 on test: {on_test.full_accuracy:.4f}; {on_test.n_samples} images, one is 0.03 points")
    print("allowed drop | relative cost (val) | relative cost (test) | test accuracy - ResNet-56's (points)")
    for drop in (0.01, 0.005, 0.001, 0.0):
        chosen_point, point = on_val.at(max_drop=drop), on_test.at(max_drop=drop)
        change = 100 * (point.accuracy - on_test.full_accuracy)
        print(f"{100 * drop:10.1f}%  | {chosen_point.cost:19.3f} | {point.cost:20.3f} | {change:+.2f}")

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2))
    ParetoDisplay.from_frontier(on_test, exit_names=names, budget=0.4, name="cascade (test)").plot(axes[0])
    axes[0].set_title("CIFAR-10: accuracy against cost")
    last = len(savers) - 1
    JobRatioDisplay.from_curve(cascade.job_curve(last), saver_name=names[last], base_name="ResNet-56").plot(axes[1])
    axes[1].set_title("CIFAR-10: who leaves (val)")
    figure.tight_layout()
    figure.savefig(args.out, dpi=120)
    print(f"\npicture: {args.out}")


if __name__ == "__main__":
    main()
