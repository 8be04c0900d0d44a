"""What a feature's axes mean, and its channel vectors in one form for every layout.

Backbones hand on maps with the channels first (NCHW) or last (NHWC), tokens (NLC; NCL inside token mixers) or vectors
(NC), and often nothing in the tensor says which. :mod:`adaptexit.heads.layout_inference` finds it out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

AXES = {"NC": 1, "NLC": 2, "NCL": 2, "NCHW": 3, "NHWC": 3}
"""Every layout with its number of axes, the samples' left out."""


@dataclass(frozen=True)
class FeatureSpec:
    """Shape and layout of the feature at a cut.

    Equal after ``FeatureSpec(**json.loads(json.dumps(dataclasses.asdict(spec))))``.

    Parameters
    ----------
    shape : tuple of int
        Without the axis of the samples: (C, H, W), (H, W, C), (L, C), (C, L) or (C,), as the layout says.
    layout : {"NCHW", "NHWC", "NLC", "NCL", "NC"}
    prefix_tokens : int
        Class and register tokens in front of the patches (NLC only). They are left out of positions and means, unless
        there is nothing else.
    grid : tuple of int, optional
        Rows and columns of the positions. Maps have their own; tokens without one cannot be made a map.
    in_order : bool
        Whether the positions lie row by row on the grid. Where they do not, they cannot be made a map.
    """

    shape: tuple[int, ...]
    layout: str
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None
    in_order: bool = True

    def __post_init__(self) -> None:
        shape = tuple(int(size) for size in self.shape)
        object.__setattr__(self, "shape", shape)
        check_layout(self.layout, shape)
        length = shape[0] if self.layout == "NLC" else 0
        if not 0 <= self.prefix_tokens <= length:
            raise ValueError(
                f"prefix_tokens must be from 0 to the number of tokens, {length} for shape {shape} in layout "
                f"{self.layout}; got {self.prefix_tokens}."
            )
        if self.layout == "NCHW":
            object.__setattr__(self, "grid", shape[1:])
        elif self.layout == "NHWC":
            object.__setattr__(self, "grid", shape[:2])
        elif self.n_positions == 1:
            object.__setattr__(self, "grid", (1, 1))
        elif self.grid is not None:
            grid = tuple(int(size) for size in self.grid)
            object.__setattr__(self, "grid", grid)
            if len(grid) != 2 or math.prod(grid) != self.n_positions:
                raise ValueError(
                    f"grid must be two sizes with product {self.n_positions}, the positions of shape {shape} in layout "
                    f"{self.layout} after {self.n_skipped} prefix tokens; got {grid}."
                )

        # Read now: torch.compile traces through a cached property only once it has been.
        _ = self.channels, self.n_positions, self.n_skipped, self.batch_axes

    # Computed once, as heads read them for every batch; no fields, so that a spec is written and compared without them.

    @cached_property
    def channels(self) -> int:
        """Length of the vector at a position."""
        return self.shape[channel_axis(self.layout)]

    @cached_property
    def n_skipped(self) -> int:
        """Tokens in front that are no positions: the prefix where patches follow it, none otherwise."""
        return self.prefix_tokens if self.layout == "NLC" and self.prefix_tokens < self.shape[0] else 0

    @cached_property
    def n_positions(self) -> int:
        """Positions that hold a vector: pixels of the map, or patch tokens; 1 for a vector."""
        return math.prod(self.shape) // self.channels - self.n_skipped

    @cached_property
    def batch_axes(self) -> tuple[int, int, tuple[int, ...]]:
        """Of a batch of features: the number of axes, the channels' axis, and those of the positions."""
        channels = channel_axis(self.layout) % len(self.shape) + 1
        return len(self.shape) + 1, channels, tuple(axis for axis in range(1, len(self.shape) + 1) if axis != channels)


def check_layout(layout: str, shape: tuple[int, ...]) -> None:
    """Raise a ValueError where a layout is unknown, or a feature of this shape (without samples) cannot have it."""
    if layout not in AXES:
        raise ValueError(f"layout must be one of {', '.join(AXES)}; got {layout!r}.")
    if len(shape) != AXES[layout] or min(shape) < 1:
        possible = [name for name, axes in AXES.items() if axes == len(shape)]
        raise ValueError(
            f"layout {layout} needs {AXES[layout]} axes of at least 1 besides the samples; got shape {shape}. "
            + (f"Possible for it: {', '.join(possible)}." if possible else "Choose a cut with 1 to 3 axes a sample.")
        )


def pooled(feature: Tensor, spec: FeatureSpec) -> Tensor:
    """Mean over the positions: feature (B, *spec.shape) -> (B, C)."""
    _check(feature, spec)
    if spec.layout == "NC":
        return feature
    if spec.n_skipped:
        feature = feature[:, spec.n_skipped :]
    return feature.mean(dim=spec.batch_axes[2])


def positions(feature: Tensor, spec: FeatureSpec) -> Tensor:
    """The channel vector at each position: feature (B, *spec.shape) -> (B, C, L), a view where strides allow it."""
    _check(feature, spec)
    if spec.layout == "NC":
        return feature[:, :, None]
    if spec.layout == "NLC":
        return feature[:, spec.n_skipped :].transpose(1, 2)
    if spec.layout == "NHWC":
        return feature.flatten(1, 2).transpose(1, 2)
    return feature.flatten(2)


def as_map(feature: Tensor, spec: FeatureSpec) -> Tensor:
    """The feature for 2-D convolutions: (B, *spec.shape) -> (B, C, H, W).

    Tokens are laid out row by row, in the order they have, on ``spec.grid`` (a square where the spec was made without
    one), prefix tokens left out; a vector is a 1x1 map.

    Raises
    ------
    ValueError
        When the tokens have no grid.
    """
    if spec.layout == "NCHW":
        _check(feature, spec)
        return feature
    if spec.layout == "NHWC":
        _check(feature, spec)
        return feature.permute(0, 3, 1, 2)
    rows, columns = map_size(spec)
    vectors = positions(feature, spec)
    if vectors.shape[2] != rows * columns:
        raise ValueError(
            f"feature must have {rows * columns} positions, a grid of {rows}x{columns}; got {vectors.shape[2]} (shape "
            f"{tuple(feature.shape)}). Make the head from features of this size."
        )
    return vectors.unflatten(2, (rows, columns))


def map_size(spec: FeatureSpec) -> tuple[int, int]:
    """Rows and columns of :func:`as_map`."""
    if not spec.in_order:
        raise ValueError(
            f"tokens must lie row by row to be made a map; the {spec.n_positions} of this feature (shape {spec.shape}, "
            f"layout {spec.layout}) are in another order: where a patch of the image changes, it is other tokens that "
            "change. Use a head that pools, cut elsewhere, or reorder the tokens in a head of your own, made with "
            "dataclasses.replace(spec, in_order=True)."
        )
    grid = spec.grid or square_grid(spec.n_positions)
    if grid is None:
        raise ValueError(
            f"tokens must lie on a grid to be made a map; {spec.n_positions} of them (shape {spec.shape}, layout "
            f"{spec.layout}, {spec.n_skipped} prefix tokens left out) are no square, and the input's proportions give "
            "no grid. Use a head that pools, or pass grid= to FeatureSpec."
        )
    return grid


def square_grid(n: int) -> tuple[int, int] | None:
    """Rows and columns of n tokens on a square, None where they make none."""
    side = math.isqrt(n)
    return (side, side) if side * side == n else None


def channel_axis(layout: str) -> int:
    """Which axis of a single feature holds the channels: the first or the last."""
    return -1 if layout in ("NHWC", "NLC") else 0


def _check(feature: Tensor, spec: FeatureSpec) -> None:
    n_axes, channels, _ = spec.batch_axes
    if feature.ndim != n_axes or feature.shape[channels] != spec.channels:
        raise ValueError(
            f"feature must have shape (B, {', '.join(map(str, spec.shape))}) in layout {spec.layout}; got "
            f"{tuple(feature.shape)}. Make the head from a FeatureSpec of this feature."
        )
