"""Any timm model with early exits, on an image folder.

    python examples/retrofit.py --model NAME --data DIR [--checkpoint FILE] [--exits NAME ...] [--head NAME] [--out PNG]

``--data`` holds ``train/<class>/*.jpg`` and ``val/<class>/*.jpg``. Heads learn on ``train``, thresholds are tuned on
``val``; the table is of ``test/<class>/*.jpg`` where that is there too. Weights are timm's pretrained ones unless
``--checkpoint`` gives others, trained on the folder's classes. A model that knows other classes than the folder teaches
the heads its own answers, and accuracy then means agreement with it."""

import argparse
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from adaptexit import MultiExitClassifier, ParetoDisplay


def main() -> None:
    """Cut, train heads, calibrate, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a timm name")
    parser.add_argument("--data", type=Path, required=True, help="folder with train, val and maybe test")
    parser.add_argument("--checkpoint", help="weights instead of timm's pretrained ones")
    parser.add_argument("--num-classes", type=int, help="of the checkpoint, where not those of the folder")
    parser.add_argument("--exits", nargs="+", help="module names; three at even cost unless given")
    parser.add_argument("--head", default="auto", help="see adaptexit.heads.NAMED; the best unless given")
    parser.add_argument("--out", default="retrofit.png", help="where the picture goes")
    args = parser.parse_args()

    n_classes = len(ImageFolder(args.data / "train").classes)
    weights = {"num_classes": args.num_classes or n_classes, "checkpoint_path": args.checkpoint}
    backbone = timm.create_model(args.model, **weights if args.checkpoint else {"pretrained": True}).eval()
    size = list(resolve_model_data_config(backbone)["input_size"][1:])

    def batches(split: str) -> DataLoader:
        """Images in [0, 1] of the model's size; the estimator normalises them as the model was trained."""
        steps = [v2.Resize(min(size)), v2.CenterCrop(size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        folder = ImageFolder(args.data / split, v2.Compose(steps))
        collate = None if backbone.num_classes == n_classes else lambda batch: torch.stack([x for x, _ in batch])
        return DataLoader(folder, batch_size=64, collate_fn=collate)

    model = MultiExitClassifier(backbone, args.exits or "auto", head=args.head, verbose=1)
    model.fit(batches("train")).calibrate(batches("val"))

    split = "test" if (args.data / "test").is_dir() else "val"
    frontier = model.pareto(batches("test")) if split == "test" else model.pareto()
    costs, alone = frontier.fixed_cost, frontier.fixed_accuracy
    measure = "accuracy" if model.labelled_ else "agreement"
    for name, cost, accuracy in zip(model.exit_names, costs, alone, strict=True):
        print(f"{name}: {measure} {accuracy:.4f} ({split}) at {cost:.3f} of the full model's MACs, everybody there")
    print(f"budget | relative cost | {measure} | exit rates")
    for budget in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        if budget >= min(point.cost for point in model.pareto().points):
            point = frontier.at(budget=budget)
            rates = " ".join(f"{rate:.2f}" for rate in point.exit_rates)
            print(f"{budget:6.1f} | {point.cost:13.3f} | {point.accuracy:8.4f} | {rates}")
    display = ParetoDisplay.from_frontier(frontier, exit_names=model.exit_names, name=f"{args.model} ({split})")
    display.plot().ax_.set_ylabel(measure)
    display.figure_.savefig(args.out, dpi=120)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
