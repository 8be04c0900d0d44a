"""Networks of several architectures that a CPU trains in minutes, on 32-pixel images and on digits."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from adaptexit.backbones import resnet20_cifar
from examples.cifar import Data

BATCH = 128


def vit() -> nn.Module:
    """Six blocks of width 64 on 4x4 patches."""
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=64, depth=6, num_heads=2, num_classes=10)


def convnext() -> nn.Module:
    """ConvNeXt on 2x2 patches, ten blocks of width 48 to 160."""
    return ConvNeXt(depths=(2, 2, 4, 2), dims=(48, 72, 112, 160), patch_size=2, num_classes=10)


def mobilenet() -> nn.Module:
    """MobileNetV3 (small, three quarters of its width), its first stride taken out: 32 pixels become 2."""
    net = timm.create_model("mobilenetv3_small_075", num_classes=10)
    net.conv_stem.stride = (1, 1)
    return net


def resnet_for_digits() -> nn.Module:
    """ResNet-20 for 8x8 images of one channel."""
    return resnet20_cifar(in_channels=1)


EXITS: dict[str, tuple[Callable[[], nn.Module], list[str], int]] = {
    "ConvNeXt": (convnext, ["stages.0.blocks.0", "stages.0", "stages.1", "stages.2.blocks.1"], 15),
    "MobileNet": (mobilenet, ["blocks.0", "blocks.1", "blocks.2", "blocks.3"], 15),
    "ViT": (vit, ["blocks.0", "blocks.1", "blocks.2", "blocks.3"], 12),
}
"""Networks for 32-pixel images by name: their factory, where they get exits, and epochs that they are trained for."""


def trained_on(
    factory: Callable[[], nn.Module], data: Data, epochs: int, file: Path, *, augment: bool = True
) -> nn.Module:
    """A network trained by AdamW with one cycle of the learning rate; from ``file`` where an earlier run left it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = factory()
        if not file.exists():
            start = time.perf_counter()
            _train(net, *data, epochs, augment)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in net.state_dict().items()}, file)
            print(f"{file.stem}: trained in {time.perf_counter() - start:.0f} s", flush=True)
    net.load_state_dict(load_file(file))
    return net.eval().to(memory_format=torch.contiguous_format)


def _train(net: nn.Module, x: Tensor, y: Tensor, epochs: int, augment: bool) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    steps = epochs * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    net.train().to(memory_format=torch.channels_last)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            images = (_moved(x[rows]) if augment else x[rows]).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(net(images), y[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _moved(x: Tensor) -> Tensor:
    """A batch (B, C, H, W) mirrored and shifted by up to 4 pixels, alike for all of it."""
    if torch.rand(()) < 0.5:
        x = x.flip(3)
    top, left = torch.randint(9, (2,)).tolist()
    return F.pad(x, (4, 4, 4, 4))[:, :, top : top + x.shape[2], left : left + x.shape[3]]


def digits(seed: int) -> list[Data]:
    """scikit-learn's digits (N, 1, 8, 8) in [0, 1] and labels: 800 to train on, 400 to calibrate, 597 to test."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = torch.from_numpy((images[order] / 16).astype(np.float32).reshape(-1, 1, 8, 8))
    y = torch.from_numpy(labels[order])
    return [(x[part], y[part]) for part in (slice(800), slice(800, 1200), slice(1200, None))]
