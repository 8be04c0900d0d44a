"""Multi-scale dense networks (MSDNet).

Huang, Chen, Li, Wu, van der Maaten and Weinberger, "Multi-Scale Dense Networks for Resource Efficient Image
Classification", ICLR 2018. Widths, order of layers and pruning of scales are those of its authors' PyTorch program,
which the figures quoted for MSDNet come from.

Shapes, CIFAR: images (N, 3, 32, 32); maps of 32, 16 and 8 pixels; classifiers read the coarsest. ImageNet: images
(N, 3, 224, 224); maps of 56, 28, 14 and 7 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from timm.layers import ConvNormAct
from torch import nn

from adaptexit.backbones.multi_exit import MapClassifier, MultiExitBackbone
from adaptexit.backbones.multi_scale import MultiScaleLayer, PerScale, Pyramid, bottleneck, steep_stem


class MSDNet(MultiExitBackbone):
    """Dense layers on several scales, of which the finest are dropped with depth; a classifier after every block.

    Parameters
    ----------
    layers : sequence of K int
        Layers of each block.
    channels, growth : int
        Of the finest scale: channels of the first map, and those that a layer adds.
    factors : sequence of S int
        Of channels and growth at every scale.
    bottlenecks : sequence of S int
        Of a 3x3 convolution's channels, the most that the 1x1 convolution before it has.
    reduction : float
        Of the channels where a scale is dropped.
    n_classes, in_channels, image_size : int
    stem : {"cifar", "imagenet"}
        "imagenet" takes images at a quarter of their size, and classifiers as wide as what they read.
    """

    def __init__(
        self,
        layers: Sequence[int],
        channels: int,
        growth: int,
        factors: Sequence[int],
        bottlenecks: Sequence[int],
        *,
        reduction: float = 0.5,
        n_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
        stem: Literal["cifar", "imagenet"] = "cifar",
    ) -> None:
        n_scales, n_layers = len(factors), sum(layers)
        widths = [channels * factor for factor in factors]
        first = ConvNormAct(in_channels, widths[0], 3) if stem == "cifar" else steep_stem(in_channels, widths[0])
        coarser = [ConvNormAct(widths[s - 1], widths[s], 3, stride=2) for s in range(1, n_scales)]
        # Layer n (from 1) has the scales that layer n - 1 had, less one where a further n_scales-th of all is passed.
        interval = math.ceil(n_layers / n_scales)
        stages: list[nn.Module] = []
        heads = []
        n, width = 0, channels
        for depth in layers:
            modules: list[nn.Module] = [] if stages else [Pyramid([first, *coarser])]
            for _ in range(depth):
                before, finest = max(0, n - 1) // interval, n // interval
                modules.append(_layer(width, growth, factors, bottlenecks, finest, drops=finest > before))
                n, width = n + 1, width + growth
                if finest > before and reduction < 1:
                    reduced = math.floor(reduction * width)
                    pairs = {s: (width * factors[s], reduced * factors[s]) for s in range(finest, n_scales)}
                    modules.append(PerScale({s: ConvNormAct(*pair, 1) for s, pair in pairs.items()}))
                    width = reduced
            stages.append(nn.Sequential(*modules))
            heads.append(classifier(width * factors[-1], n_classes, narrow=stem == "cifar"))
        super().__init__(stages, heads, (in_channels, image_size, image_size))


def _layer(
    width: int, growth: int, factors: Sequence[int], bottlenecks: Sequence[int], finest: int, drops: bool
) -> MultiScaleLayer:
    """A layer on the scales from ``finest`` on; where it drops one, that is read for the last time."""
    own, down = {}, {}
    for s in range(finest, len(factors)):
        new = growth * factors[s]
        if s > finest or drops:
            down[s] = bottleneck(width * factors[s - 1], new // 2, bottlenecks[s - 1], stride=2)
            new //= 2
        own[s] = bottleneck(width * factors[s], new, bottlenecks[s])
    return MultiScaleLayer(own, down, fused=False)


def classifier(in_channels: int, n_classes: int, narrow: bool = True) -> MapClassifier:
    """Two 3x3 convolutions of stride 2, average pooling and a linear layer, as MSDNet and RANet have it."""
    channels = 128 if narrow else in_channels
    convolutions = nn.Sequential(
        ConvNormAct(in_channels, channels, 3, stride=2), ConvNormAct(channels, channels, 3, stride=2)
    )
    return MapClassifier(convolutions, channels, n_classes)


def msdnet_cifar_anytime(n_classes: int = 10, in_channels: int = 3) -> MSDNet:
    """Seven exits: 15 to 75 M MACs, 3 M parameters."""
    return MSDNet([4, *[2] * 6], 16, 6, (1, 2, 4), (1, 2, 4), n_classes=n_classes, in_channels=in_channels)


def msdnet_cifar_budgeted(n_classes: int = 10, in_channels: int = 3) -> MSDNet:
    """Five exits, each further from the last: 7 to 58 M MACs, 2 M parameters."""
    return MSDNet([1, 2, 3, 4, 5], 16, 6, (1, 2, 4), (1, 2, 4), n_classes=n_classes, in_channels=in_channels)


def msdnet_imagenet(n_classes: int = 1000, in_channels: int = 3) -> MSDNet:
    """Five exits on 224 pixels: 0.3 to 1.4 G MACs, 24 M parameters."""
    return MSDNet(
        [4] * 5, 32, 16, (1, 2, 4, 4), (1, 2, 4, 4),
        n_classes=n_classes, in_channels=in_channels, image_size=224, stem="imagenet",
    )  # fmt: skip
