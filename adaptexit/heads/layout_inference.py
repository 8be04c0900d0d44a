"""Which layout a feature has: read off the model and the geometry of its inputs.

:func:`feature_spec` takes a layout only where it fits the geometry of the input and nothing else does; what remains
open is an error, never a guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adaptexit.heads.layout import AXES, FeatureSpec, channel_axis, check_layout, square_grid

_VIDEO = (
    ": where these are frames (C, T, H, W), one behind the pooling over time, or let a module that flattens T and H "
    "into one axis follow the stage"
)
_PREFIX_TOKEN = re.compile(r"(class|cls|dist|distillation|reg|register)_?(token|embed(ding)?)s?_?\d*")
_TOLD_PREFIX = re.compile(r"NLC\+(\d+)")
_MOST_PREFIX = 8
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
_QUANTISED_CHANNELS_FIRST = ("Conv2d", "ConvReLU2d", "ConvAdd2d", "ConvAddReLU2d", "BatchNorm2d", "BNReLU2d")


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
        Skips the inference: "NCHW", "NHWC", "NLC", "NCL" or "NC"; "NLC+1" tells of one class token in front that the
        model does not name, and so on.

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
            f"the samples; got shape {tuple(feature.shape)}. Choose another cut{_VIDEO if len(shape) == 4 else ''}."
        )
    place = _Place(module, cut)
    size = (int(input_shape[1]), int(input_shape[2])) if len(input_shape) == 3 else None
    if layout is not None:
        return _as_told(layout, shape, size, place, cut)
    if len(shape) == 1:
        return FeatureSpec(shape, "NC")
    if len(shape) == 3 and place.maker_is_channels_first():
        return FeatureSpec(shape, "NCHW")
    specs = {}
    for name in _candidates(shape):
        spec = _read_as(name, shape, size, place) if size else None
        if spec is not None:
            specs[name] = spec
    widths = place.widths(shape)
    by_width = [name for name in _candidates(shape) if shape[channel_axis(name)] in widths]
    if by_width:
        specs = {name: spec for name, spec in specs.items() if name in by_width}
    # Without a width NCL is no proof: where tokens miss their grid, the width may be a square by chance.
    if len(specs) == 1 and (by_width or "NCL" not in specs):
        return next(iter(specs.values()))
    for hint in place.hints(shape, specs):
        if hint in specs:
            return specs[hint]
    possible = " or ".join(_candidates(shape))
    fits = " as well as ".join(specs) if specs else f"no grid as {possible}"
    raise ValueError(
        f"the layout of cut {cut!r} cannot be inferred: shape {shape} (without samples) from inputs of shape "
        f"{tuple(input_shape)} fits {fits}, and the model says nothing that decides. Pass layout={possible}, or choose "
        "another cut."
    )


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
        maker = self.here
        while type(maker) is nn.Sequential and len(maker):
            maker = maker[-1]
        if isinstance(maker, _CHANNELS_FIRST):
            return True
        kind = type(maker)  # torch's quantised convolutions are no Conv2d
        return kind.__module__.startswith("torch.ao.nn.") and kind.__name__ in _QUANTISED_CHANNELS_FIRST

    def widths(self, shape: tuple[int, ...]) -> set[int]:
        """Widths told for this place that one of the axes has: its own, else its stage's, else any of the model's.

        Only its own count for maps: a stage's inner maps are often wider or narrower, its tokens seldom are.
        """
        infos = self._infos()
        sources = [{width for where, width in infos if where == "here"}]
        if len(shape) == 2:
            sources.append({width for where, width in infos if where == "around"})
            sources.append({width for _, width in infos} | set(self._attributes(_WIDTHS)))
        return next((widths & set(shape) for widths in sources if widths & set(shape)), set())

    def hints(self, shape: tuple[int, ...], specs: dict[str, FeatureSpec]) -> Iterator[str]:
        """Layouts spoken for, the surest first."""
        yield from self._formats([self.here])
        if len(shape) == 3:
            yield from self._formats([owner for owner, _ in self.owners])
            if any(where == "here" for where, _ in self._infos()):
                yield "NCHW"
            if self._is_convolutional():
                yield "NCHW"
            return
        if "NLC" in specs and specs["NLC"].prefix_tokens:
            yield "NLC"
        norms = {m.normalized_shape for m in self._modules() if isinstance(m, nn.LayerNorm)}
        # A norm over each axis, as in a mixer's block, decides nothing.
        if ((shape[1],) in norms) != ((shape[0],) in norms):
            yield "NLC" if (shape[1],) in norms else "NCL"
        yield from self._formats([owner for owner, _ in self.owners])

    def prefixes(self, width: int) -> list[int]:
        """Numbers of prefix tokens that the model may put before tokens of this width, the likeliest first, and 0."""
        counts = [n for n in self._attributes(("num_prefix_tokens",)) if n > 0]
        # One token is (1, 1, C), (1, C) or (C,), several are (1, L, C) or (L, C).
        tokens = [
            (math.prod(weight.shape[:-1]), weight.shape[-1])
            for name, weight in self.module.named_parameters()
            if _PREFIX_TOKEN.fullmatch(name.rpartition(".")[2]) and 1 <= weight.ndim <= 3
        ]
        together = sum(count for count, size in tokens if size == width)
        # All that are named like prefixes stand together most often; else one of them is something else.
        return list(dict.fromkeys([*counts, *([together] if together else []), *(count for count, _ in tokens), 0]))

    def _modules(self) -> list[nn.Module]:
        return [] if self.here is None else list(self.here.modules())

    def _is_convolutional(self) -> bool:
        """Whether all weights are those of 2-D convolutions and batch norms."""
        with_weights = [m for m in self._modules() if next(m.parameters(recurse=False), None) is not None]
        return any(isinstance(m, nn.Conv2d) for m in with_weights) and all(
            isinstance(m, nn.Conv2d | nn.BatchNorm2d) for m in with_weights
        )

    def _attributes(self, names: tuple[str, ...]) -> list[int]:
        values = (getattr(owner, name, None) for owner, _ in self.owners for name in names)
        return [value for value in values if isinstance(value, int)]

    def _infos(self) -> list[tuple[str, int]]:
        """Widths in ``feature_info``, each with where it holds as seen from the cut: here, around it or elsewhere."""
        widths = []
        for owner, name in self.owners:
            info = getattr(owner, "feature_info", None)
            info = getattr(info, "info", info)
            for entry in info if isinstance(info, list | tuple) else []:
                module = entry.get("module") if isinstance(entry, dict) else None
                if module and isinstance(entry.get("num_chs"), int):
                    around = name.startswith(f"{module}.")
                    where = "here" if module == name else "around" if around else "elsewhere"
                    widths.append((where, entry["num_chs"]))
        return widths

    @staticmethod
    def _formats(modules: list[nn.Module | None]) -> Iterator[str]:
        for module in modules:
            layout = getattr(module, "output_fmt", None)
            layout = getattr(layout, "value", layout)  # timm's Format is an enumeration
            if isinstance(layout, str) and layout in AXES:
                yield layout


def _candidates(shape: tuple[int, ...]) -> list[str]:
    return [name for name, axes in AXES.items() if axes == len(shape)]


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
    prefixes = place.prefixes(shape[1])
    if prefixes[0] == shape[0]:  # nothing but class and register tokens
        return FeatureSpec(shape, layout, shape[0])
    specs = []
    for prefix in prefixes:
        if prefix < shape[0] and (grid := _token_grid(shape[0] - prefix, size)):
            specs.append(FeatureSpec(shape, layout, prefix, grid))
    return min(specs, key=lambda spec: _distortion(spec.grid, size), default=None)


def _as_told(layout: str, shape: tuple[int, ...], size: tuple[int, int] | None, place: _Place, cut: str) -> FeatureSpec:
    """The shape in a layout that was given, on a grid where the geometry has one."""
    if match := _TOLD_PREFIX.fullmatch(str(layout)):
        check_layout("NLC", shape)
        prefix = int(match[1])
        grid = _token_grid(shape[0] - prefix, size) if prefix < shape[0] else None
        return FeatureSpec(shape, "NLC", prefix, grid)
    check_layout(layout, shape)
    if spec := _read_as(layout, shape, size, place):
        return spec
    prefix = place.prefixes(shape[1])[0] if layout == "NLC" else 0
    if layout == "NLC" and not prefix and size and (extra := _likely_prefix(shape[0], size)):
        raise ValueError(
            f"layout NLC leaves open what the tokens of cut {cut!r} are: {shape[0]} of them lie on no grid, but "
            f"{shape[0] - extra} would, and the model names no class token. Pass layout='NLC+{extra}' where the first "
            f"{extra} of them {'is' if extra == 1 else 'are'} no patch, 'NLC+0' where all are."
        )
    return FeatureSpec(shape, layout, min(prefix, shape[0]))


def _likely_prefix(n: int, size: tuple[int, int]) -> int:
    """The fewest tokens without which n of them have a grid with exactly the proportions of the input; 0 if none."""
    for prefix in range(1, min(_MOST_PREFIX, n - 1) + 1):
        grid = _token_grid(n - prefix, size)
        if grid and math.prod(grid) > 1 and not _distortion(grid, size):
            return prefix
    return 0


def _fits(grid: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether one stride gives both sides, each rounded up or down."""
    # A side of s from a whole w has a stride whose inverse lies between (s - 1) / w and (s + 1) / w; the two must meet.
    low = max((side - 1) / whole for side, whole in zip(grid, size, strict=True))
    high = min((side + 1) / whole for side, whole in zip(grid, size, strict=True))
    return low < high and all(side <= whole + 1 for side, whole in zip(grid, size, strict=True))


def _distortion(grid: tuple[int, int] | None, size: tuple[int, int] | None) -> float:
    """How far the strides along the two axes are apart, as a ratio's logarithm."""
    (rows, columns), (height, width) = grid or (1, 1), size or (1, 1)
    return abs(math.log((rows * width) / (columns * height)))


def _token_grid(n: int, size: tuple[int, int] | None) -> tuple[int, int] | None:
    """The grid of n tokens with the proportions of the input, those of a square where it is unknown."""
    if size is None:
        return square_grid(n)
    grids = [(rows, n // rows) for rows in range(1, n + 1) if n % rows == 0]
    return min((g for g in grids if _fits(g, size)), key=lambda g: _distortion(g, size), default=None)


def _describe(value: Any) -> str:
    if isinstance(value, list | tuple):
        parts = [f"tensor {tuple(v.shape)}" if isinstance(v, torch.Tensor) else type(v).__name__ for v in value]
        return f"a {type(value).__name__} of {len(value)} ({', '.join(parts[:4])}{', ...' if len(parts) > 4 else ''})"
    if isinstance(value, dict):
        return f"a {type(value).__name__} with keys {list(value)[:4]}"
    return f"a {type(value).__name__}"
