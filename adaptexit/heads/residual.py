"""Heads that read a pooled map through a residual block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from adaptexit.core.answer import Answer
from adaptexit.heads.base import Head, check_size
from adaptexit.heads.layout import FeatureSpec, as_map, map_size


class BlockHead(Head):
    """Base of the heads that read a map, pooled to a few positions, through a residual block.

    Parameters
    ----------
    spec : FeatureSpec
        Tokens need a grid.
    n_classes : int
    size : int
        Maps are pooled to at most this many rows and columns first.
    """

    def __init__(self, spec: FeatureSpec, n_classes: int, size: int = 4) -> None:
        super().__init__(spec, n_classes)
        check_size("size", size)
        rows, columns = map_size(spec)
        self.size = (min(rows, size), min(columns, size))
        self.block = BasicBlock(spec.channels, spec.channels)

    def reduce(self, feature: Tensor) -> Tensor:
        """The feature as a map, pooled: (B, C, rows, columns)."""
        return F.adaptive_avg_pool2d(as_map(feature, self.spec), self.size).contiguous()

    def read(self, reduced: Tensor) -> Tensor:
        """What the block makes of a pooled map, (B, C)."""
        return self.block(reduced).mean(dim=(2, 3))


class ResidualHead(BlockHead):
    """A pooled map, a residual block (He et al. 2016) and linear outputs for class and confidence.

    Unlike the prototype heads it sees where in the image something is. Parameters as for :class:`BlockHead`.
    """

    def __init__(self, spec: FeatureSpec, n_classes: int, size: int = 4) -> None:
        super().__init__(spec, n_classes, size)
        self.classification = nn.Linear(spec.channels, n_classes)
        self.confidence = nn.Linear(spec.channels, n_classes)

    def answer(self, reduced: Tensor, state: Any = None) -> Answer:
        """Logits of class and confidence from a pooled map."""
        vectors = self.read(reduced)
        return Answer(self.classification(vectors), self.confidence(vectors))

    def confidence_parameters(self) -> list[nn.Parameter]:
        """Those of the confidence output; the block is shared."""
        return list(self.confidence.parameters())
