"""Resolution adaptive networks (RANet).

Yang, Han, Chen, Song, Dai and Huang, "Resolution Adaptive Networks for Efficient Inference", CVPR 2020. Widths and
order of layers are those of its authors' program.

An image becomes smaller step by step; the smallest version goes through the first sub-network, whose exits answer. A
later sub-network takes a larger version and, block by block, what the one before it saw. Shapes, CIFAR: images (N, 3,
32, 32), versions of 8, 16, 32 and 32 pixels; every classifier reads 8 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn
from torch.nn import functional as F

from adaptexit.backbones.msdnet import classifier
from adaptexit.backbones.multi_exit import MapClassifier, MultiExitBackbone
from adaptexit.backbones.multi_scale import Pyramid, bottleneck


class RANet(MultiExitBackbone):
    """Sub-networks of rising resolution, each of dense blocks; a classifier after each block that fuses nothing.

    Parameters
    ----------
    resolutions : sequence of S int
        1 for the smallest version of the image; each step up is twice its height.
    factors : sequence of S int
        Of channels and growth in every sub-network.
    bottlenecks : sequence of S int
        Of a 3x3 convolution's channels, the most that the 1x1 convolution before it has.
    channels, growth : int
        Of a sub-network with factor 1: channels that it takes, and those that a layer adds.
    n_blocks, more_blocks : int
        Blocks of the first sub-network, and by how many each has more than the one before it.
    depth : int
        Layers of each block.
    compression : float
        Share of new channels that comes from the sub-network before.
    reduction : float
        Of the channels after some blocks.
    n_classes, in_channels, image_size : int
    """

    def __init__(
        self,
        resolutions: Sequence[int],
        factors: Sequence[int],
        bottlenecks: Sequence[int],
        *,
        channels: int = 16,
        growth: int = 6,
        n_blocks: int = 2,
        more_blocks: int = 2,
        depth: int = 4,
        compression: float = 0.25,
        reduction: float = 0.5,
        n_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        lengths = [n_blocks + more_blocks * i for i in range(len(factors))]
        widths = [channels * factor for factor in factors]
        stages: list[nn.Module] = []
        heads: list[MapClassifier] = []
        lower: list[Block] = []
        for i, (length, width) in enumerate(zip(lengths, widths, strict=True)):
            # Down to the resolution of the exits where the sub-networks before this one end, the nearest first.
            halving = lengths[:i][-(resolutions[i] - 1) :] if resolutions[i] > 1 else []
            reducing = [math.floor(part * length / resolutions[i]) for part in range(1, resolutions[i])]
            blocks: list[Block] = []
            for n in range(1, length + 1):
                blocks.append(
                    Block(
                        blocks[-1].out_channels if blocks else width, growth * factors[i], depth, bottlenecks[i],
                        lower=lower[n - 1] if n <= len(lower) else None, compression=compression,
                        halves=n in halving, reduction=reduction if n in reducing else 1.0,
                    )
                )  # fmt: skip
            first = len(lower) + 1
            versions = Versions(in_channels, resolutions, widths) if i == 0 else None
            remembers = i + 1 < len(lengths)
            stages.append(SubNetwork(blocks[:first], versions=versions, starts=True, remembers=remembers))
            stages += [SubNetwork([block], remembers=remembers) for block in blocks[first:]]
            heads += [classifier(block.out_channels, n_classes) for block in blocks[first - 1 :]]
            lower = blocks
        super().__init__(stages, heads, (in_channels, image_size, image_size))


class Versions(Pyramid):
    """An image in every sub-network's resolution, each made of the next larger one, smallest first."""

    def __init__(self, in_channels: int, resolutions: Sequence[int], widths: Sequence[int]) -> None:
        from_large = list(zip(resolutions, widths, strict=True))[::-1]
        modules = [ConvNormAct(in_channels, from_large[0][1], 3)]
        for (larger, before), (resolution, width) in pairwise(from_large):
            modules.append(ConvNormAct(before, width, 3, stride=1 if resolution == larger else 2))
        super().__init__(modules)

    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(x)[::-1]


class SubNetwork(nn.Module):
    """A stage: some blocks of a sub-network.

    What goes on is a list: the versions of the image that later sub-networks take, the dense maps of this one's blocks
    (a list a block) where there is a later one to read them, and the map that the classifier reads.
    """

    def __init__(
        self, blocks: Sequence[Block], *, versions: Versions | None = None, starts: bool = False, remembers: bool
    ) -> None:
        super().__init__()
        self.versions = versions
        self.blocks = nn.ModuleList(blocks)
        self.starts, self.remembers = starts, remembers

    def forward(self, carried: Any) -> list[Any]:
        versions, history, x = carried if self.versions is None else (self.versions(carried), [], None)
        lower = []
        if self.starts:
            lower, history = history, []
            x, *versions = versions
        for n, block in enumerate(self.blocks):
            x, maps = block(x, lower[n] if n < len(lower) else None)
            if self.remembers:
                history = [*history, maps]
        return [versions, history, x]


class Fusion(nn.Module):
    """What a block takes from the same block of the sub-network before it.

    Parameters
    ----------
    widths : sequence of depth + 1 int
        Channels before, between and after the layers of that block.
    factor : int
        Of its bottlenecks.
    layer_channels, last_channels : int
        New channels for each layer here, and for the output.
    """

    def __init__(self, widths: Sequence[int], factor: int, layer_channels: int, last_channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(bottleneck(width, layer_channels, factor) for width in widths[:-1])
        self.last = ConvNormAct(widths[-1], last_channels, 1)


class Block(nn.Module):
    """Dense layers, with what the sub-network before saw where there is a fusion.

    Attributes
    ----------
    widths : list of depth + 1 int
        Channels before, between and after its layers.
    out_channels : int
    halves : bool
        Whether its last layer halves height and width.
    """

    def __init__(
        self,
        in_channels: int,
        growth: int,
        depth: int,
        factor: int,
        *,
        lower: Block | None,
        compression: float,
        halves: bool,
        reduction: float,
    ) -> None:
        super().__init__()
        self.widths = [in_channels + n * growth for n in range(depth + 1)]
        self.factor, self.halves = factor, halves
        out, from_lower = self.widths[-1], 0
        self.fusion = None
        if lower is not None:
            from_lower, last = math.floor(growth * compression), math.floor(out * compression)
            self.fusion = Fusion(lower.widths, lower.factor, from_lower, last)
            out += last
        self.layers = nn.ModuleList(
            bottleneck(width, growth - from_lower, factor, stride=2 if halves and n == depth - 1 else 1)
            for n, width in enumerate(self.widths[:-1])
        )
        self.out_channels = math.floor(reduction * out)
        self.transition = ConvNormAct(out, self.out_channels, 1) if reduction < 1 else nn.Identity()

    def forward(self, x: Tensor, lower: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """The block's output, and the dense maps before, between and after its layers."""
        maps = [x]
        for n, layer in enumerate(self.layers):
            new = layer(x)
            parts = [resized(x, new)]
            if self.fusion is not None and lower is not None:
                parts.append(resized(self.fusion.layers[n](lower[n]), new))
            x = torch.cat([*parts, new], dim=1)
            maps.append(x)
        if self.fusion is not None and lower is not None:
            x = torch.cat([x, resized(self.fusion.last(lower[-1]), x)], dim=1)
        return self.transition(x), maps


def resized(x: Tensor, like: Tensor) -> Tensor:
    """A map as large as another."""
    size = like.shape[2:]
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def ranet_cifar(n_classes: int = 10, in_channels: int = 3) -> RANet:
    """Eight exits, two a sub-network: 16 to 94 M MACs, 3.3 M parameters."""
    return RANet((1, 2, 3, 3), (4, 2, 1, 1), (4, 2, 1, 1), n_classes=n_classes, in_channels=in_channels)
