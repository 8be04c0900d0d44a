"""The pretrained CIFAR ResNets and an image folder of CIFAR-10, as the examples and the benchmarks use them."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from adaptexit.backbones import resnet8_cifar, resnet20_cifar, resnet56_cifar

FACTORIES = {8: resnet8_cifar, 20: resnet20_cifar, 56: resnet56_cifar}

TO_TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
NORMALISE = v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

Data = tuple[Tensor, Tensor]


def pretrained(depth: int, weights: Path) -> nn.Module:
    """A CIFAR ResNet in evaluation mode with the weights of ``weights/resnet<depth>.safetensors``."""
    net = FACTORIES[depth]()
    net.load_state_dict(load_file(weights / f"resnet{depth}.safetensors"))
    return net.eval()


def images(data: Path, split: str, n_images: int | None = None) -> Data:
    """Normalised images (N, 3, 32, 32) and labels (N,) of ``data/split/<class>/*.jpg``, shuffled once; all or so many.

    Image folders come class by class; shuffled, every batch has its share of hard images.
    """
    folder = ImageFolder(data / split, v2.Compose([TO_TENSOR, NORMALISE]))
    order = torch.randperm(len(folder), generator=torch.Generator().manual_seed(0))[:n_images]
    x, y = zip(*DataLoader(Subset(folder, order.tolist()), batch_size=500), strict=True)
    return torch.cat(x), torch.cat(y)


def learning(data: Path, n_images: int) -> list[Data]:
    """Images and labels of ``train``, so many of them, of ``val`` and of ``test``."""
    return [images(data, "train", n_images), images(data, "val"), images(data, "test")]
