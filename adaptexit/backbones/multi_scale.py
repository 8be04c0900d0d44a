"""Layers on maps of several scales, finest first, that only grow: every layer adds channels to all of them.

MSDNet, the fusion-stem network and CHASE are made of these (Huang et al., "Multi-Scale Dense Networks for Resource
Efficient Image Classification", ICLR 2018, section 4). What goes through them is a list of S maps (N, C_s, H / 2^s,
W / 2^s), None for scales that there are not yet or no longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn

Maps = Sequence[Tensor | None]


def bottleneck(
    in_channels: int, channels: int, factor: int, stride: int = 1, act_layer: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """A 1x1 convolution to at most ``factor * channels``, then a 3x3 one to ``channels``."""
    inner = min(in_channels, factor * channels)
    return nn.Sequential(
        ConvNormAct(in_channels, inner, 1, act_layer=act_layer),
        ConvNormAct(inner, channels, 3, stride, act_layer=act_layer),
    )


class MultiScaleLayer(nn.Module):
    """New channels for every scale, from its own map and the next finer one; scales without any are dropped.

    Parameters
    ----------
    own, down : dict of scale to nn.Module
        What makes new channels of a scale (counted from 0) from its own map, and from the map one scale finer, which it
        halves. They stand behind the old ones, those of ``down`` first.
    fused : bool
        Whether ``down`` sees what this layer adds to the finer map (fusion), or the map as it came (MSDNet).
    """

    def __init__(self, own: Mapping[int, nn.Module], down: Mapping[int, nn.Module], *, fused: bool) -> None:
        super().__init__()
        self.own = nn.ModuleDict({str(scale): module for scale, module in own.items()})
        self.down = nn.ModuleDict({str(scale): module for scale, module in down.items()})
        self.fused = fused

    def forward(self, maps: Maps) -> list[Tensor | None]:
        grown: list[Tensor | None] = []
        for scale, x in enumerate(maps):
            name = str(scale)
            parts = []
            if name in self.down:
                # Where the finer scale is dropped in this layer, there is only what came.
                finer = grown[-1] if self.fused and grown[-1] is not None else maps[scale - 1]
                parts.append(self.down[name](finer))
            if name in self.own:
                parts.append(self.own[name](x))
            old = [] if x is None else [x]
            grown.append(torch.cat(old + parts, dim=1) if parts else None)
        return grown


class PerScale(nn.Module):
    """A module for each scale, on that scale's map; scales without any are dropped."""

    def __init__(self, modules: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.scales = nn.ModuleDict({str(scale): module for scale, module in modules.items()})

    def forward(self, maps: Maps) -> list[Tensor | None]:
        return [self.scales[str(scale)](x) if str(scale) in self.scales else None for scale, x in enumerate(maps)]


class Pyramid(nn.Module):
    """An image (N, C, H, W) to maps of all scales: what each module makes of the map before it."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for module in self.scales:
            x = module(x)
            maps.append(x)
        return maps


def steep_stem(in_channels: int, channels: int) -> nn.Sequential:
    """The stem of residual networks for large images: a quarter of the height and width."""
    convolution = ConvNormAct(in_channels, channels, 7, stride=2, bias=True)
    return nn.Sequential(convolution, nn.MaxPool2d(3, stride=2, padding=1))
