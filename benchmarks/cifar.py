"""The pretrained CIFAR ResNets and an image folder of CIFAR-10, as the benchmarks use them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from adaptexit.backbones import resnet8_cifar, resnet20_cifar, resnet56_cifar

FACTORIES = {8: resnet8_cifar, 20: resnet20_cifar, 56: resnet56_cifar}

TRANSFORM = v2.Compose(
    [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    ]
)


def pretrained(depth: int, weights: Path) -> nn.Module:
    """A CIFAR ResNet in evaluation mode with the weights of ``weights/resnet<depth>.safetensors``."""
    net = FACTORIES[depth]()
    net.load_state_dict(load_file(weights / f"resnet{depth}.safetensors"))
    return net.eval()


def arguments(doc: str, seeds: int | None = 3, images: int = 20_000) -> argparse.ArgumentParser:
    """What every benchmark that learns heads on a frozen ResNet-56 takes, and its defaults; None for a single run."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train, val and test")
    parser.add_argument("--weights", type=Path, required=True, help="folder with resnet56.safetensors")
    if seeds is not None:
        parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--images", type=int, default=images, help="of train, to learn on")
    return parser


def learning(data: Path, images: int) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of ``train``, so many of them, of ``val`` and of ``test``."""
    x, y = tensors(data, ["train"])
    return [(x[:images].clone(), y[:images].clone()), tensors(data, ["val"]), tensors(data, ["test"])]


def tensors(data: Path, splits: Sequence[str], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normalised images (N, 3, 32, 32) and labels (N,) of the splits one after the other, each shuffled once.

    Image folders come class by class; shuffled, every batch has its share of hard images.
    """
    images, labels = [], []
    for split in splits:
        x, y = zip(*DataLoader(ImageFolder(data / split, TRANSFORM), batch_size=500), strict=True)
        order = torch.randperm(sum(map(len, y)), generator=torch.Generator().manual_seed(seed))
        images.append(torch.cat(x)[order])
        labels.append(torch.cat(y)[order])
    return torch.cat(images), torch.cat(labels)
