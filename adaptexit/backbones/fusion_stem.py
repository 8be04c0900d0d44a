"""The fusion-stem network: dense blocks on several scales behind an efficient stem, finer maps fused into coarser ones.

Addad, Lechervy and Jurie, "Multi-Exit Resource-Efficient Neural Architecture for Image Classification with Optimized
Fusion Block", ICCV workshops 2023. The paper prints no widths and there is no public program: widths, and what it
leaves open, are ours and named where they are decided.

Shapes, CIFAR: images (N, 3, 32, 32); maps of 16, 8 and 4 pixels; every classifier reads 4 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from timm.layers import ConvNormAct, SeparableConvNormAct
from torch import Tensor, nn

from adaptexit.backbones.multi_exit import MapClassifier, MultiExitBackbone
from adaptexit.backbones.multi_scale import MultiScaleLayer, PerScale, bottleneck

Convolution = Callable[..., nn.Module]
"""``(block, scale, in_channels, channels, stride) -> module``, all counted from 0; the scale is that of the output."""


class FusionStem(MultiExitBackbone):
    """A stem, then as many blocks as scales, each of which drops the finest scale, and an exit every so many layers.

    Parameters
    ----------
    stem_channels : (int, int)
        Inside the stem and behind it.
    growth : int
        Channels that a layer adds to the finest scale.
    factors : sequence of S int
        Times ``growth`` that a layer adds to every scale.
    bottlenecks : sequence of S int
        Times the channels of a 3x3 convolution that the 1x1 convolution before it has at most, by the scale it reads.
    depth : int
        Layers of each block.
    exit_every : int
        Layers from exit to exit.
    reduction : float
        Of the channels between blocks.
    stem : {"efficient", "plain"}
        "plain" is one 3x3 convolution of stride 2 in its place.
    fusion : bool
        Whether coarser maps read what a layer adds to the finer ones, or those as they came, as in MSDNet (whose first
        layer makes coarser maps of finer ones, too).
    n_classes, in_channels, image_size : int
    """

    def __init__(
        self,
        stem_channels: tuple[int, int],
        growth: int,
        factors: Sequence[int],
        bottlenecks: Sequence[int],
        depth: int,
        exit_every: int,
        *,
        reduction: float = 0.5,
        stem: Literal["efficient", "plain"] = "efficient",
        fusion: bool = True,
        n_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        def convolution(block: int, scale: int, before: int, channels: int, stride: int) -> nn.Module:
            return bottleneck(before, channels, bottlenecks[scale - (stride > 1)], stride)

        inner, behind = stem_channels
        first = (
            Stem(in_channels, inner, behind) if stem == "efficient" else ConvNormAct(in_channels, behind, 3, stride=2)
        )
        stages, widths = dense_fusion(
            first, behind, growth, factors, depth, exit_every, convolution,
            lambda before, channels: ConvNormAct(before, channels, 1),
            reduction=reduction, fusion=fusion, whole=True,
        )  # fmt: skip
        heads = [classifier(width, n_classes) for width in widths]
        super().__init__(stages, heads, (in_channels, image_size, image_size))


class Stem(nn.Module):
    """Four convolutions to half the height and width, the third's output added to the first's.

    3x3; 3x3 depthwise separable; 1x1; 3x3 depthwise separable of stride 2. That the second is twice as wide as the
    first, so that the third compresses, is ours.

    Parameters
    ----------
    in_channels, inner, channels : int
        Of the image, after the first and third convolution, and after the fourth.
    stride : int
        Of the first convolution: 2 for large images.
    act_layer : type of nn.Module
    """

    def __init__(
        self, in_channels: int, inner: int, channels: int, stride: int = 1, act_layer: type[nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(in_channels, inner, 3, stride, act_layer=act_layer)
        self.conv2 = SeparableConvNormAct(inner, 2 * inner, 3, act_layer=act_layer)
        self.conv3 = ConvNormAct(2 * inner, inner, 1, act_layer=act_layer)
        self.conv4 = SeparableConvNormAct(inner, channels, 3, 2, act_layer=act_layer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.conv4(x + self.conv3(self.conv2(x)))


class Finest(nn.Module):
    """A module on images whose output is the finest of S maps; there are no others yet."""

    def __init__(self, module: nn.Module, n_scales: int) -> None:
        super().__init__()
        self.module, self.n_scales = module, n_scales

    def forward(self, x: Tensor) -> list[Tensor | None]:
        return [self.module(x), *[None] * (self.n_scales - 1)]


class LastOfDense(nn.Module):
    """A module on the last channels of a dense map: those that its last layer has added."""

    def __init__(self, module: nn.Module, channels: int) -> None:
        super().__init__()
        self.module, self.channels = module, channels

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x[:, -self.channels :])


def dense_fusion(
    stem: nn.Module,
    stem_channels: int,
    growth: int,
    factors: Sequence[int],
    depth: int,
    exit_every: int,
    convolution: Convolution,
    transition: Callable[[int, int], nn.Module],
    *,
    reduction: float,
    fusion: bool,
    whole: bool,
) -> tuple[list[nn.Module], list[int]]:
    """The stages, and the channels of what each classifier reads: the last so many of the coarsest map.

    Layer l of a block adds to scale s what ``convolution`` makes (with stride 2) of all maps of scale s - 1 up to layer
    l, and (with stride 1) of all of scale s up to layer l - 1: CHASE, eq. 1. Of the new channels half are either's, all
    where there is but one; in the first layer the coarser scales have no map of their own; both are ours.

    An exit is wherever the layers passed, counted over all blocks of depth L, are a multiple of ``exit_every``: n
    layers lie in block 1 + floor(n / L) after its layer n mod L, of which 0 is behind the transition into it. (The
    positions that CHASE prints do not fit its own blocks.)

    Parameters
    ----------
    transition : callable (in_channels, channels) -> nn.Module
    whole : bool
        Whether transitions and classifiers read all that a block knows at their scale, or what its last layer added
        (CHASE, eq. 3 and 5).
    """
    n_scales = len(factors)
    stages: list[nn.Module] = []
    read_channels: list[int] = []
    modules: list[nn.Module] = [Finest(stem, n_scales)]
    widths = [stem_channels, *[0] * (n_scales - 1)]
    for block in range(n_scales):
        for n in range(1, depth + 1):
            ends = n == depth and block + 1 < n_scales
            fused = fusion or not widths[-1]  # coarser maps have nothing else to begin with
            # What is added to a scale that is dropped now has no readers but the coarser maps that it is fused into.
            finest = block if fused or not ends else block + 1
            new = [growth * factor if s >= finest else 0 for s, factor in enumerate(factors)]
            own, down = {}, {}
            for s in range(finest, n_scales):
                finer = 0 if s == block else widths[s - 1] + (new[s - 1] if fused else 0)
                share = new[s] // 2 if finer and widths[s] else new[s]
                if finer:
                    down[s] = convolution(block, s, finer, share, 2)
                if widths[s]:
                    own[s] = convolution(block, s, widths[s], new[s] - share if finer else share, 1)
            modules.append(MultiScaleLayer(own, down, fused=fused))
            widths = [width + more for width, more in zip(widths, new, strict=True)]
            reads = widths[-1] if whole else new[-1]
            if ends:
                before = widths if whole else new
                after = [int(reduction * width) if s > block else 0 for s, width in enumerate(before)]
                steps = {s: transition(before[s], after[s]) for s in range(block + 1, n_scales)}
                modules.append(PerScale(steps if whole else {s: LastOfDense(t, new[s]) for s, t in steps.items()}))
                widths, reads = after, after[-1]
            if (block * depth + n) % exit_every == 0 or block * depth + n == n_scales * depth:
                stages.append(nn.Sequential(*modules))
                read_channels.append(reads)
                modules = []
    return stages, read_channels


def classifier(
    in_channels: int, n_classes: int, channels: int = 128, act_layer: type[nn.Module] = nn.ReLU
) -> MapClassifier:
    """A 3x3 convolution of stride 2, a 1x1 one, average pooling and a linear layer, on the last channels."""
    convolutions = nn.Sequential(
        ConvNormAct(in_channels, channels, 3, stride=2, act_layer=act_layer),
        ConvNormAct(channels, channels, 1, act_layer=act_layer),
    )
    return MapClassifier(convolutions, channels, n_classes, in_channels)


def fusion_stem_cifar(n_classes: int = 10, in_channels: int = 3, **settings: Any) -> FusionStem:
    """Six exits: 10 to 64 M MACs, 4.3 M parameters; ``settings`` are FusionStem's, as ``stem="plain"``."""
    shape = {"n_classes": n_classes, "in_channels": in_channels}
    return FusionStem((24, 48), 13, (1, 2, 4), (1, 2, 4), 6, 3, **(shape | settings))
