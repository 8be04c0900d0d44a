"""What benchmarks on CIFAR-10 take, images of several splits at once, and plain networks as those with exits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.cifar import images


def arguments(doc: str, seeds: int | None = 3, n_images: int = 20_000) -> argparse.ArgumentParser:
    """What every benchmark that learns heads on a frozen ResNet-56 takes, and its defaults; None for a single run."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train, val and test")
    parser.add_argument("--weights", type=Path, required=True, help="folder with resnet56.safetensors")
    if seeds is not None:
        parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--images", type=int, default=n_images, help="of train, to learn on")
    return parser


def tensors(data: Path, splits: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Normalised images (N, 3, 32, 32) and labels (N,) of the splits one after the other, each shuffled once."""
    x, y = zip(*(images(data, split) for split in splits), strict=True)
    return torch.cat(x), torch.cat(y)


class OneExit(nn.Module):
    """A plain network as one built with a single exit, so that it learns in the same loop."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.stages, self.heads = nn.ModuleList([net]), nn.ModuleList([nn.Identity()])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.stages[0](x)]
