"""What a feature's axes mean: the layout of a module's output, and its channel vectors in one form for every layout.

Backbones hand on maps with the channels first (NCHW) or last (NHWC), tokens (NLC; NCL inside token mixers) or vectors
(NC), and often nothing in the tensor says which. :func:`feature_spec` takes a layout only where it fits the geometry of
the input and nothing else does; what remains open is an error, never a guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

AXES = {"NC": 1, "NLC": 2, "NCL": 2, "NCHW": 3, "NHWC": 3}
"""Every layout with its number of axes, the samples' left out."""

_PREFIX_TOKEN = re.compile(r"(class|cls|dist|distillation|reg|register)_?(token|embed(ding)?)s?_?\d*")
_WIDTHS = ("embed_dim", "hidden_dim", "num_features")
_CHANNELS_FIRST = (
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.BatchNorm2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)


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
    """

    shape: tuple[int, ...]
    layout: str
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None

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

    @property
    def channels(self) -> int:
        """Length of the vector at a position."""
        return _channels(self.layout, self.shape)

    @property
    def n_skipped(self) -> int:
        """Tokens in front that are no positions: the prefix where patches follow it, none otherwise."""
        return self.prefix_tokens if self.layout == "NLC" and self.prefix_tokens < self.shape[0] else 0

    @property
    def n_positions(self) -> int:
        """Positions that hold a vector: pixels of the map, or patch tokens; 1 for a vector."""
        return math.prod(self.shape) // self.channels - self.n_skipped


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


def feature_spec(
    module: nn.Module, cut: str, feature: Any, input_shape: tuple[int, ...], layout: str | None = None
) -> FeatureSpec:
    """Layout of what the module at a cut returns.

    In this order: the layout given; the kind of module (a 2-D convolution, batch norm or pooling gives NCHW); the
    geometry: a map's two sides, or the sides of a grid of tokens, must come from the input's height and width by about
    the same stride, and a width that ``feature_info``, or the model's ``embed_dim`` or ``hidden_dim``, tells for this
    place must not lie on another axis. Where that leaves two layouts, or NCL without such a width, the hints decide
    that fit it: ``output_fmt`` of the module or the model, timm's NCHW for a module listed in ``feature_info``, weights
    in 2-D convolutions alone, a class token, the width of layer norms.

    Parameters
    ----------
    module : nn.Module
        The whole model.
    cut : str
        Name of the module in it whose output the feature is.
    feature : Tensor, shape (B, ...)
        Its output on a batch; only the shape is read.
    input_shape : tuple of int
        Shape of one input, (channels, height, width) for images.
    layout : str, optional
        Skips the inference: "NCHW", "NHWC", "NLC", "NCL" or "NC".

    Returns
    -------
    FeatureSpec

    Raises
    ------
    ValueError
        When the feature is not one tensor, or its layout cannot be told and is not given.
    """
    if not isinstance(feature, Tensor):
        raise ValueError(
            f"cut {cut!r} must return one tensor (B, ...); got {_describe(feature)}. Choose a cut whose output is one "
            "tensor, for example a module inside it or the one that joins its outputs."
        )
    shape = tuple(feature.shape[1:])
    if not 1 <= len(shape) <= 3 or min(shape) < 1:
        raise ValueError(
            f"cut {cut!r} must return a vector, tokens or a map for every sample, 1 to 3 axes of at least 1 besides "
            f"the samples; got shape {tuple(feature.shape)}. Choose another cut."
        )
    place = _Place(module, cut)
    size = (int(input_shape[1]), int(input_shape[2])) if len(input_shape) == 3 else None
    if layout is not None:
        check_layout(layout, shape)
        return _read_as(layout, shape, size, place) or _plainly(layout, shape, place)
    if len(shape) == 1:
        return FeatureSpec(shape, "NC")
    if len(shape) == 3 and place.maker_is_channels_first():
        return FeatureSpec(shape, "NCHW")
    fitting = {}
    for name in _candidates(shape):
        spec = _read_as(name, shape, size, place) if size else None
        if spec is not None:
            fitting[name] = spec
    widths = place.widths(shape)
    if told := [name for name in _candidates(shape) if _channels(name, shape) in widths]:
        fitting = {name: spec for name, spec in fitting.items() if name in told}
    if len(fitting) == 1 and (told or "NCL" not in fitting):  # tokens that miss their grid may have a square width
        return next(iter(fitting.values()))
    for hint in place.hints(shape, fitting):
        if hint in fitting:
            return fitting[hint]
    possible = " or ".join(_candidates(shape))
    fits = " as well as ".join(fitting) if fitting else f"no grid as {possible}"
    raise ValueError(
        f"the layout of cut {cut!r} cannot be inferred: shape {shape} (without samples) from inputs of shape "
        f"{tuple(input_shape)} fits {fits}, and the model says nothing that decides. Pass layout={possible}, or choose "
        "another cut."
    )


def pooled(feature: Tensor, spec: FeatureSpec) -> Tensor:
    """Mean over the positions: feature (B, *spec.shape) -> (B, C)."""
    _check(feature, spec)
    if spec.layout == "NC":
        return feature
    if spec.layout == "NLC":
        return feature[:, spec.n_skipped :].mean(dim=1)
    return feature.mean(dim=(1, 2) if spec.layout == "NHWC" else tuple(range(2, feature.ndim)))


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
    rows, columns = map_size(spec)
    if spec.layout == "NCHW":
        _check(feature, spec)
        return feature
    if spec.layout == "NHWC":
        _check(feature, spec)
        return feature.permute(0, 3, 1, 2)
    vectors = positions(feature, spec)
    if vectors.shape[2] != rows * columns:
        raise ValueError(
            f"feature must have {rows * columns} positions, a grid of {rows}x{columns}; got {vectors.shape[2]} (shape "
            f"{tuple(feature.shape)}). Make the head from features of this size."
        )
    return vectors.unflatten(2, (rows, columns))


def map_size(spec: FeatureSpec) -> tuple[int, int]:
    """Rows and columns of :func:`as_map`."""
    grid = spec.grid or _token_grid(spec.n_positions, None)
    if grid is None:
        raise ValueError(
            f"tokens must lie on a grid to be made a map; {spec.n_positions} of them (shape {spec.shape}, layout "
            f"{spec.layout}, {spec.n_skipped} prefix tokens left out) are no square, and the input's proportions give "
            "no grid. Use a head that pools, or pass grid= to FeatureSpec."
        )
    return grid


class _Place:
    """What a model tells about the feature at one of its cuts."""

    def __init__(self, module: nn.Module, cut: str) -> None:
        self.module = module
        modules = dict(module.named_modules())
        self.here = modules.get(cut)
        parts = cut.split(".") if cut else []
        # the models around the cut, the innermost first (a model may be wrapped in others), and the cut's name in each
        self.owners = [
            (modules[".".join(parts[:depth])], ".".join(parts[depth:]))
            for depth in reversed(range(len(parts)))
            if ".".join(parts[:depth]) in modules
        ]

    def maker_is_channels_first(self) -> bool:
        """Whether the module, or the last one of a Sequential, can return nothing but NCHW."""
        made_by = self.here
        while type(made_by) is nn.Sequential and len(made_by):
            made_by = made_by[-1]
        return isinstance(made_by, _CHANNELS_FIRST)

    def widths(self, shape: tuple[int, ...]) -> set[int]:
        """Widths told for this place that one of the axes has: its own, else its stage's, else any of the model's.

        Only its own count for maps: a stage's inner maps are often wider or narrower, its tokens seldom are.
        """
        infos = self._infos()
        told = [{width for where, width in infos if where == "here"}]
        if len(shape) == 2:
            told.append({width for where, width in infos if where == "around"})
            told.append({width for _, width in infos} | set(self._attributes(_WIDTHS)))
        return next((widths & set(shape) for widths in told if widths & set(shape)), set())

    def hints(self, shape: tuple[int, ...], fitting: dict[str, FeatureSpec]) -> Iterator[str]:
        """Layouts spoken for, the surest first."""
        yield from self._formats([self.here])
        if len(shape) == 3:
            yield from self._formats([owner for owner, _ in self.owners])
            if any(where == "here" for where, _ in self._infos()):
                yield "NCHW"
            if self._is_convolutional():
                yield "NCHW"
            return
        if "NLC" in fitting and fitting["NLC"].prefix_tokens:
            yield "NLC"
        norms = {m.normalized_shape for m in self._modules() if isinstance(m, nn.LayerNorm)}
        if ((shape[1],) in norms) != ((shape[0],) in norms):
            yield "NLC" if (shape[1],) in norms else "NCL"
        yield from self._formats([owner for owner, _ in self.owners])

    def prefixes(self, width: int) -> list[int]:
        """Numbers of prefix tokens that the model may put before tokens of this width, the likeliest first, and 0."""
        told = [n for n in self._attributes(("num_prefix_tokens",)) if n > 0]
        tokens = [
            tuple(weight.shape)
            for name, weight in self.module.named_parameters()
            if _PREFIX_TOKEN.fullmatch(name.rpartition(".")[2]) and weight.ndim == 3
        ]
        together = sum(shape[1] for shape in tokens if shape[2] == width)
        return list(dict.fromkeys([*told, *([together] if together else []), *(shape[1] for shape in tokens), 0]))

    def _modules(self) -> list[nn.Module]:
        return [] if self.here is None else list(self.here.modules())

    def _is_convolutional(self) -> bool:
        """Whether all weights are those of 2-D convolutions and batch norms."""
        weighted = [m for m in self._modules() if next(m.parameters(recurse=False), None) is not None]
        return any(isinstance(m, nn.Conv2d) for m in weighted) and all(
            isinstance(m, nn.Conv2d | nn.BatchNorm2d) for m in weighted
        )

    def _attributes(self, names: tuple[str, ...]) -> list[int]:
        found = (getattr(owner, name, None) for owner, _ in self.owners for name in names)
        return [value for value in found if isinstance(value, int)]

    def _infos(self) -> list[tuple[str, int]]:
        """Widths in ``feature_info``, each with where it holds as seen from the cut: here, around it or elsewhere."""
        found = []
        for owner, name in self.owners:
            info = getattr(owner, "feature_info", None)
            info = getattr(info, "info", info)
            for entry in info if isinstance(info, list | tuple) else []:
                module = entry.get("module") if isinstance(entry, dict) else None
                if module and isinstance(entry.get("num_chs"), int):
                    around = name.startswith(f"{module}.")
                    where = "here" if module == name else "around" if around else "elsewhere"
                    found.append((where, entry["num_chs"]))
        return found

    @staticmethod
    def _formats(modules: list[nn.Module | None]) -> Iterator[str]:
        for module in modules:
            said = getattr(module, "output_fmt", None)
            said = getattr(said, "value", said)
            if isinstance(said, str) and said in AXES:
                yield said


def _candidates(shape: tuple[int, ...]) -> list[str]:
    return [name for name, axes in AXES.items() if axes == len(shape)]


def _channels(layout: str, shape: tuple[int, ...]) -> int:
    return shape[-1] if layout in ("NHWC", "NLC") else shape[0]


def _read_as(layout: str, shape: tuple[int, ...], size: tuple[int, int] | None, place: _Place) -> FeatureSpec | None:
    """The shape in a layout, None where that does not fit the geometry of the input."""
    if layout in ("NCHW", "NHWC"):
        spec = FeatureSpec(shape, layout)
        assert spec.grid is not None
        return spec if size and _fits(spec.grid, size) else None
    if layout == "NCL":
        grid = _token_grid(shape[1], size)
        return None if grid is None else FeatureSpec(shape, layout, grid=grid)
    if layout == "NC":
        return FeatureSpec(shape, layout)
    found = []
    prefixes = place.prefixes(shape[1])
    if prefixes[0] == shape[0]:
        return FeatureSpec(shape, layout, shape[0])
    for prefix in prefixes:
        if prefix < shape[0] and (grid := _token_grid(shape[0] - prefix, size)):
            found.append(FeatureSpec(shape, layout, prefix, grid))
    return min(found, key=lambda spec: _distortion(spec.grid, size), default=None)


def _plainly(layout: str, shape: tuple[int, ...], place: _Place) -> FeatureSpec:
    """The shape in a layout that was given although the geometry does not fit."""
    return FeatureSpec(shape, layout, min(place.prefixes(shape[1])[0], shape[0]) if layout == "NLC" else 0)


def _fits(grid: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether one stride gives both sides, each rounded up or down."""
    low = max((side - 1) / whole for side, whole in zip(grid, size, strict=True))
    high = min((side + 1) / whole for side, whole in zip(grid, size, strict=True))
    return low < high and all(side <= whole + 1 for side, whole in zip(grid, size, strict=True))


def _distortion(grid: tuple[int, int] | None, size: tuple[int, int] | None) -> float:
    """How far the strides along the two axes are apart, as a ratio's logarithm."""
    (rows, columns), (height, width) = grid or (1, 1), size or (1, 1)
    return abs(math.log((rows * width) / (columns * height)))


def _token_grid(n: int, size: tuple[int, int] | None) -> tuple[int, int] | None:
    """The grid of n tokens with the proportions of the input, those of a square where it is unknown."""
    grids = [(rows, n // rows) for rows in range(1, n + 1) if n % rows == 0]
    if size is None:
        return next((grid for grid in grids if grid[0] == grid[1]), None)
    return min((g for g in grids if _fits(g, size)), key=lambda g: _distortion(g, size), default=None)


def _check(feature: Tensor, spec: FeatureSpec) -> None:
    shape = tuple(feature.shape[1:])
    if len(shape) != len(spec.shape) or _channels(spec.layout, shape) != spec.channels:
        raise ValueError(
            f"feature must have shape (B, {', '.join(map(str, spec.shape))}) in layout {spec.layout}; got "
            f"{tuple(feature.shape)}. Make the head from a FeatureSpec of this feature."
        )


def _describe(value: Any) -> str:
    if isinstance(value, list | tuple):
        parts = [f"tensor {tuple(v.shape)}" if isinstance(v, torch.Tensor) else type(v).__name__ for v in value]
        return f"a {type(value).__name__} of {len(value)} ({', '.join(parts[:4])}{', ...' if len(parts) > 4 else ''})"
    if isinstance(value, dict):
        return f"a {type(value).__name__} with keys {list(value)[:4]}"
    return f"a {type(value).__name__}"
