"""CHASE: dense fusion on several scales with channel attention, and self-attention where the map is smallest.

Addad, Lechervy and Jurie, "CHASE: Channel-Wise and Spatial Attention for Early Exiting in Image Classification". It
takes stem and fusion over from the fusion-stem network. The paper prints no widths and there is no public program:
widths, and what it leaves open, are ours and named where they are decided.

Shapes, CIFAR: images (N, 3, 32, 32); maps of 16, 8 and 4 pixels; every classifier reads 4 pixels. ImageNet: images (N,
3, 224, 224); maps of 56, 28, 14 and 7 pixels; every classifier reads 7 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from timm.layers import Attention, ConvNormAct, Mlp, SEModule
from timm.models.twins import PosConv
from torch import Tensor, nn

from adaptexit.backbones.fusion_stem import Stem, classifier, dense_fusion
from adaptexit.backbones.multi_exit import MultiExitBackbone
from adaptexit.backbones.multi_scale import bottleneck


class CHASE(MultiExitBackbone):
    """A stem, then as many blocks as scales, each of which drops the finest scale, and an exit every so many layers.

    Transitions and classifiers read what the last layer has added, as equations 3 and 5 print.

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
    channel_attention : {"all", "fine"} or None
        Before which convolutions: all, as equation 4 prints, those that read a map of another than the coarsest scale,
        or none (Fig. 5).
    attention_blocks : int
        In how many blocks, counted from the last, self-attention takes the place of the convolution on the coarsest
        map: 1, or 0 or 2 (Fig. 5).
    head_channels : int
        Of each attention head, or more where they do not divide its layer's channels.
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
        channel_attention: Literal["all", "fine"] | None = "all",
        attention_blocks: int = 1,
        head_channels: int = 32,
        classifier_channels: int = 128,
        n_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        coarsest = len(factors) - 1

        def convolution(block: int, scale: int, before: int, channels: int, stride: int) -> nn.Module:
            if stride == 1 and scale == coarsest and block > coarsest - attention_blocks:
                return GlobalAttention(before, channels, head_channels)
            reads = scale - (stride > 1)
            layer = bottleneck(before, channels, bottlenecks[reads], stride, nn.GELU)
            if channel_attention is None or (channel_attention == "fine" and reads == coarsest):
                return layer
            return nn.Sequential(SEModule(before, rd_channels=before // 2, act_layer=nn.GELU), layer)

        inner, behind = stem_channels
        stem = Stem(in_channels, inner, behind, stride=1 if image_size <= 64 else 2, act_layer=nn.GELU)
        stages, widths = dense_fusion(
            stem, behind, growth, factors, depth, exit_every, convolution,
            lambda before, channels: ConvNormAct(before, channels, 1, act_layer=nn.GELU),
            reduction=reduction, fusion=True, whole=False,
        )  # fmt: skip
        heads = [classifier(width, n_classes, classifier_channels, nn.GELU) for width in widths]
        super().__init__(stages, heads, (in_channels, image_size, image_size))


class GlobalAttention(nn.Module):
    """Self-attention over the pixels of a map (N, C, H, W), to (N, ``channels``, H, W): the Global Attention Layer.

    A 1x1 convolution to its width, then positions from a depthwise 3x3 convolution (Chu et al., "Conditional Positional
    Encodings for Vision Transformers", ICLR 2023), attention and a perceptron, the latter two behind a layer norm and
    added to what they read. The order is ours.
    """

    def __init__(self, in_channels: int, channels: int, head_channels: int = 32, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.project = ConvNormAct(in_channels, channels, 1, act_layer=nn.GELU)
        self.position = PosConv(channels, channels)
        self.norm1 = nn.LayerNorm(channels)
        n_heads = next(n for n in range(max(1, channels // head_channels), 0, -1) if channels % n == 0)
        self.attention = Attention(channels, n_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, int(mlp_ratio * channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        size = x.shape[2:]
        x = self.position(x.flatten(2).transpose(1, 2), size)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x.transpose(1, 2).unflatten(2, size).contiguous()


def chase_cifar(n_classes: int = 10, in_channels: int = 3, **settings: Any) -> CHASE:
    """Six exits: 13 to 63 M MACs, 3.7 M parameters; ``settings`` are CHASE's, as ``channel_attention=None``."""
    shape = {"n_classes": n_classes, "in_channels": in_channels}
    return CHASE((20, 48), 18, (1, 2, 4), (1, 2, 4), 6, 3, **(shape | settings))


def chase_imagenet(n_classes: int = 1000, in_channels: int = 3, **settings: Any) -> CHASE:
    """Eight exits on 224 pixels: 0.3, ..., 2.2 and 2.5 G MACs, 59 M parameters; ``settings`` are CHASE's.

    In two blocks attention adds 1% to the cost, where the paper's network grows by more than 15%: its widths differ.
    """
    shape = {"n_classes": n_classes, "in_channels": in_channels, "image_size": 224, "classifier_channels": 320}
    return CHASE((32, 64), 24, (1, 2, 4, 20), (1, 2, 2, 1), 4, 2, **(shape | settings))
