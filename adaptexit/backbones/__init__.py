"""Network architectures, as factories. They import torch; nothing here downloads weights."""

from collections.abc import Callable

from adaptexit.backbones.chase import CHASE, chase_cifar, chase_imagenet
from adaptexit.backbones.fusion_stem import FusionStem, fusion_stem_cifar
from adaptexit.backbones.msdnet import MSDNet, msdnet_cifar_anytime, msdnet_cifar_budgeted, msdnet_imagenet
from adaptexit.backbones.multi_exit import MultiExitBackbone
from adaptexit.backbones.ranet import RANet, ranet_cifar
from adaptexit.backbones.resnet_cifar import ResNetCifar, resnet8_cifar, resnet20_cifar, resnet56_cifar

__all__ = [
    "CHASE",
    "NAMED",
    "FusionStem",
    "MSDNet",
    "MultiExitBackbone",
    "RANet",
    "ResNetCifar",
    "chase_cifar",
    "chase_imagenet",
    "fusion_stem_cifar",
    "msdnet_cifar_anytime",
    "msdnet_cifar_budgeted",
    "msdnet_imagenet",
    "ranet_cifar",
    "resnet8_cifar",
    "resnet20_cifar",
    "resnet56_cifar",
]

NAMED: dict[str, Callable[..., MultiExitBackbone]] = {
    factory.__name__: factory
    for factory in (
        chase_cifar, chase_imagenet, fusion_stem_cifar, msdnet_cifar_anytime, msdnet_cifar_budgeted, msdnet_imagenet,
        ranet_cifar,
    )
}  # fmt: skip
"""Networks with exits by the names that estimators take for them: factories ``(n_classes, in_channels) -> module``."""
