"""Heads for every network: a linear layer or a perceptron on means, and MSDNet's two convolutions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from adaptexit.core.answer import Answer
from adaptexit.heads.base import Head, check_size
from adaptexit.heads.layout import FeatureSpec, as_map, map_size, pooled


class PooledHead(Head):
    """Base of the heads that read means over the positions."""

    def reduce(self, feature: Tensor) -> Tensor:
        """Means over the positions, (B, C)."""
        return pooled(feature, self.spec)


class LinearHead(PooledHead):
    """Mean over the positions, layer norm and a linear layer: the cheapest head there is.

    Parameters
    ----------
    spec : FeatureSpec
    n_classes : int
    """

    def __init__(self, spec: FeatureSpec, n_classes: int) -> None:
        super().__init__(spec, n_classes)
        self.norm = nn.LayerNorm(spec.channels)
        self.linear = nn.Linear(spec.channels, n_classes)

    def answer(self, reduced: Tensor, state: Any = None) -> Answer:
        """Logits from means (B, C)."""
        return Answer(self.linear(self.norm(reduced)))


class MLPHead(PooledHead):
    """Mean over the positions, layer norm, and a perceptron with one hidden layer.

    Parameters
    ----------
    spec : FeatureSpec
    n_classes : int
    hidden : int, optional
        Width of the hidden layer; the number of channels within 64 and 256 when left out, a quarter of it (at least 16)
        where the feature is a vector, whose network has layers no larger than the head's would be.
    dropout : float
        Before the output layer.
    """

    def __init__(self, spec: FeatureSpec, n_classes: int, hidden: int | None = None, dropout: float = 0.0) -> None:
        super().__init__(spec, n_classes)
        if hidden is None:
            hidden = max(16, spec.channels // 4) if spec.layout == "NC" else min(256, max(64, spec.channels))
        check_size("hidden", hidden)
        self.net = nn.Sequential(
            nn.LayerNorm(spec.channels),
            nn.Linear(spec.channels, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, n_classes),
        )

    def answer(self, reduced: Tensor, state: Any = None) -> Answer:
        """Logits from means (B, C)."""
        norm, inner, activation, dropout, outer = self.net
        hidden = activation(inner(norm(reduced)))
        return Answer(outer(dropout(hidden) if self.training else hidden))  # a call less for one image at a time


class ConvHead(Head):
    """Two strided 3x3 convolutions with batch norm and ReLU, the mean of what is left, and a linear layer.

    The classifier of MSDNet on CIFAR (Huang et al., "Multi-Scale Dense Networks", ICLR 2018, section 4), whose 8x8 maps
    become 2x2 before its average pooling. Of larger maps the mean is taken too, so the linear layer stays one of
    ``channels`` inputs. A stride is left out where a side is 1 already, and a 1x1 map is convolved 1x1, as the rest of
    the kernel would meet padding alone.

    Parameters
    ----------
    spec : FeatureSpec
        Tokens need a grid.
    n_classes : int
    channels : int
        Width of both convolutions.
    """

    def __init__(self, spec: FeatureSpec, n_classes: int, channels: int = 128) -> None:
        super().__init__(spec, n_classes)
        check_size("channels", channels)
        rows, columns = map_size(spec)
        layers: list[nn.Module] = []
        width = spec.channels
        for _ in range(2):
            kernel = 1 if rows == columns == 1 else 3
            stride = 1 if min(rows, columns) == 1 else 2
            layers += [
                nn.Conv2d(width, channels, kernel, stride, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
            rows, columns, width = -(-rows // stride), -(-columns // stride), channels
        self.convolutions = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, n_classes)

    def reduce(self, feature: Tensor) -> Tensor:
        """The feature as a contiguous map, (B, C, H, W)."""
        return as_map(feature, self.spec).contiguous()

    def answer(self, reduced: Tensor, state: Any = None) -> Answer:
        """Logits from a map (B, C, H, W)."""
        return Answer(self.linear(self.convolutions(reduced).mean(dim=(2, 3))))
