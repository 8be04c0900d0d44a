"""Network architectures, as factories. They import torch; nothing here downloads weights."""

from adaptexit.backbones.resnet_cifar import ResNetCifar, resnet8_cifar, resnet20_cifar, resnet56_cifar

__all__ = ["ResNetCifar", "resnet8_cifar", "resnet20_cifar", "resnet56_cifar"]
