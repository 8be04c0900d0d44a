"""Heads that read a map, mostly pooled to a few positions, and so see roughly where in the image something is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from adaptexit.core.answer import Answer
from adaptexit.heads.base import Head, check_size
from adaptexit.heads.layout import FeatureSpec, as_map, map_size


class PooledMapHead(Head):
    """Base of the heads that read a map, pooled or whole; those of one size share what is recorded for them.

    Parameters
    ----------
    spec : FeatureSpec
        Tokens need a grid.
    n_classes : int
    size : int or None
        Maps are pooled to at most this many rows and columns first; None leaves them whole.
    """

    def __init__(self, spec: FeatureSpec, n_classes: int, size: int | None = 4) -> None:
        super().__init__(spec, n_classes)
        if size is not None:
            check_size("size", size)
        rows, columns = map_size(spec)
        self.size = (rows, columns) if size is None else (min(rows, size), min(columns, size))

    @property
    def reduction_key(self) -> str:
        """What ``reduce`` does, whatever else the head was made with."""
        reduce = PooledMapHead.reduce
        if type(self).reduce is not reduce:
            return super().reduction_key
        return f"{reduce.__module__}.{reduce.__qualname__} {self.spec} {self.size}"

    def reduce(self, feature: Tensor) -> Tensor:
        """The feature as a map, pooled or whole: (B, C, rows, columns)."""
        whole = as_map(feature, self.spec)
        return (whole if whole.shape[2:] == self.size else F.adaptive_avg_pool2d(whole, self.size)).contiguous()


class GridHead(PooledMapHead):
    """A map pooled to a few positions, layer norm over all of it, and a linear layer or a perceptron.

    A linear layer sees as much of the places as convolutions do, for a hundredth of what they cost (ours).

    Parameters
    ----------
    spec, n_classes, size : as for :class:`PooledMapHead`
    hidden : int, optional
        Width of a hidden layer; none when left out.
    """

    def __init__(self, spec: FeatureSpec, n_classes: int, size: int | None = 4, hidden: int | None = None) -> None:
        super().__init__(spec, n_classes, size)
        width = spec.channels * self.size[0] * self.size[1]
        layers: list[nn.Module] = [nn.LayerNorm(width)]
        if hidden is not None:
            check_size("hidden", hidden)
            layers += [nn.Linear(width, hidden), nn.GELU()]
        self.net = nn.Sequential(*layers, nn.Linear(hidden or width, n_classes))

    def answer(self, reduced: Tensor, state: Any = None) -> Answer:
        """Logits from a pooled map."""
        return Answer(self.net(reduced.flatten(1)))
