"""The CIFAR residual networks of He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2.

timm and torchvision hold only their ImageNet cousins. Shortcuts across a change of width have no weights (option A):
every second pixel, the new channels zero, half of them on either side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """conv-bn-relu-conv-bn plus the input, relu."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.new_channels:
            half = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.new_channels - half))
        return F.relu(out + x)


class ResNetCifar(nn.Module):
    """Three layers of ``n_blocks`` basic blocks with 16, 32 and 64 channels; input (N, 3, H, W), output (N, n_classes).

    Attributes
    ----------
    feature_info : list of dict
        Module, channels and reduction of each layer, in timm's form.
    """

    def __init__(self, n_blocks: int, n_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        widths = (16, 32, 64)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = self._layer(widths[0], widths[0], n_blocks, stride=1)
        self.layer2 = self._layer(widths[0], widths[1], n_blocks, stride=2)
        self.layer3 = self._layer(widths[1], widths[2], n_blocks, stride=2)
        self.linear = nn.Linear(widths[2], n_classes)
        self.feature_info = [
            {"module": f"layer{i + 1}", "num_chs": width, "reduction": 2**i} for i, width in enumerate(widths)
        ]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _layer(in_channels: int, channels: int, n_blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(n_blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.mean(x, dim=(2, 3)))


def resnet8_cifar(n_classes: int = 10, in_channels: int = 3) -> ResNetCifar:
    """ResNet-8: about 12 M MACs on a 32x32 image."""
    return ResNetCifar(1, n_classes, in_channels)


def resnet20_cifar(n_classes: int = 10, in_channels: int = 3) -> ResNetCifar:
    """ResNet-20: about 41 M MACs on a 32x32 image."""
    return ResNetCifar(3, n_classes, in_channels)


def resnet56_cifar(n_classes: int = 10, in_channels: int = 3) -> ResNetCifar:
    """ResNet-56: about 126 M MACs on a 32x32 image."""
    return ResNetCifar(9, n_classes, in_channels)
