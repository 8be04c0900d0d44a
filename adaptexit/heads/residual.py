"""Heads that read a map, pooled or whole, through a residual block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from adaptexit.core.answer import Answer
from adaptexit.heads.base import Head, check_size
from adaptexit.heads.layout import FeatureSpec, as_map, map_size


class BlockHead(Head):
    """Base of the heads that read a map through a residual block, pooled to a few positions or whole.

    Parameters
    ----------
    spec : FeatureSpec
        Tokens need a grid.
    n_classes : int
    size : int or None
        Maps are pooled to at most this many rows and columns first; None leaves them whole, at 9 C^2 MACs twice for
        each of their positions.
    """

    def __init__(self, spec: FeatureSpec, n_classes: int, size: int | None = 4) -> None:
        super().__init__(spec, n_classes)
        rows, columns = map_size(spec)
        if size is not None:
            check_size("size", size)
        self.size = None if size is None else (min(rows, size), min(columns, size))
        self.block = BasicBlock(spec.channels, spec.channels)

    def reduce(self, feature: Tensor) -> Tensor:
        """The feature as a map, pooled or whole: (B, C, rows, columns)."""
        whole = as_map(feature, self.spec)
        return (whole if self.size is None else F.adaptive_avg_pool2d(whole, self.size)).contiguous()

    def read(self, reduced: Tensor) -> Tensor:
        """What the block makes of what ``reduce`` returned, (B, C)."""
        return self.block(reduced).mean(dim=(2, 3))


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
