"""Heads that read a map, pooled or whole, through a residual block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from adaptexit.core.answer import Answer
from adaptexit.heads.base import check_size
from adaptexit.heads.layout import FeatureSpec
from adaptexit.heads.pooled_map import PooledMapHead


class BlockHead(PooledMapHead):
    """Base of the heads that read a map, pooled to a few positions or whole, through a residual block.

    Parameters
    ----------
    spec, n_classes, size : as for :class:`adaptexit.heads.pooled_map.PooledMapHead`
        A whole map (``size=None``) takes 9 C^2 MACs twice for each of its positions.
    width : int, optional
        Channels of the block, which a 1x1 convolution leads past it where they are not the feature's; these when left
        out.
    """

    def __init__(self, spec: FeatureSpec, n_classes: int, size: int | None = 4, width: int | None = None) -> None:
        super().__init__(spec, n_classes, size)
        self.width = spec.channels if width is None else width
        check_size("width", self.width)
        self.block = BasicBlock(spec.channels, self.width, downsample=_widening(spec.channels, self.width))

    def read(self, reduced: Tensor) -> Tensor:
        """What the block makes of what ``reduce`` returned, (B, width)."""
        return self.block(reduced).mean(dim=(2, 3))


def _widening(channels: int, width: int) -> nn.Module | None:
    """What makes the map as wide as the block's answer, which is added to it."""
    if channels == width:
        return None
    return nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))


class ResidualHead(BlockHead):
    """A map, pooled or whole, a residual block (He et al. 2016) and linear outputs for class and confidence.

    Unlike the prototype heads it sees where in the image something is. Parameters as for :class:`BlockHead`.
    """

    def __init__(self, spec: FeatureSpec, n_classes: int, size: int | None = 4) -> None:
        super().__init__(spec, n_classes, size)
        self.classification = nn.Linear(spec.channels, n_classes)
        self.confidence = nn.Linear(spec.channels, n_classes)

    def answer(self, reduced: Tensor, state: Any = None) -> Answer:
        """Logits of class and confidence from what ``reduce`` returned."""
        vectors = self.read(reduced)
        return Answer(self.classification(vectors), self.confidence(vectors))

    def confidence_parameters(self) -> list[nn.Parameter]:
        """Those of the confidence output; the block is shared."""
        return list(self.confidence.parameters())


class WideHead(BlockHead):
    """A map, pooled or whole, a residual block wider than it, and one linear output: the answer alone, no confidence.

    Few channels of an early layer say more when many filters read them (ours); on a few pixels width costs little.
    Parameters as for :class:`BlockHead`.
    """

    def __init__(self, spec: FeatureSpec, n_classes: int, size: int | None = 4, width: int = 64) -> None:
        super().__init__(spec, n_classes, size, width)
        self.linear = nn.Linear(self.width, n_classes)

    def answer(self, reduced: Tensor, state: Any = None) -> Answer:
        """Logits from what ``reduce`` returned."""
        return Answer(self.linear(self.read(reduced)))
