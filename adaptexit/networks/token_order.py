"""Do tokens lie row by row on their grid? Some models (Hiera) unroll them so that pooling becomes a maximum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptexit.heads.layout import FeatureSpec, positions
from adaptexit.networks.branched import sole_tensor
from adaptexit.staging.splitting import Split

N_PROBES = 12
"""Patches of an image that are exchanged, each in an image of its own."""

_FELT = 0.5
"""A token is where its patch is if it changes at least so much, relative to the token that changes most."""


def with_orders(parts: Split, specs: Sequence[FeatureSpec]) -> list[FeatureSpec]:
    """The specs, those marked whose tokens do not lie row by row: other tokens change when a patch does.

    Parameters
    ----------
    parts : Split
        In evaluation mode.
    specs : sequence of K - 1 FeatureSpec
        Of its features.
    """
    grids = [spec.grid for spec in specs if _can_be_mixed_up(spec) and spec.grid is not None]
    if not grids or parts.example.ndim != 4:
        return list(specs)
    rows, columns = (max(sides) for sides in zip(*grids, strict=True))
    cells = np.random.default_rng(0).permutation(rows * columns)[:N_PROBES]
    places = np.stack([cells // columns, cells % columns], axis=1) / (rows, columns)
    features: list[Tensor] = []

    def keep(k: int, feature: Any) -> None:
        features.append(sole_tensor(feature).clone())

    parts.visit(_with_patches_exchanged(parts.example, places, (rows, columns)), keep)
    return [
        replace(spec, in_order=_in_place(positions(feature, spec), spec.grid, places) >= len(places) / 2)
        if _can_be_mixed_up(spec) and spec.grid is not None
        else spec
        for spec, feature in zip(specs, features, strict=True)
    ]


def _can_be_mixed_up(spec: FeatureSpec) -> bool:
    return spec.layout in ("NLC", "NCL") and spec.n_positions > 1


def _with_patches_exchanged(example: Tensor, places: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """The first image as it is, then once for every place (a share of height and width) with another's patch there."""
    images = example[:1].repeat(1 + len(places), 1, 1, 1)
    height, width = images.shape[2:]
    for image, (y, x) in zip(images[1:], places, strict=True):
        top, left = round(y * height), round(x * width)
        patch = (slice(None), slice(top, top + max(1, height // grid[0])), slice(left, left + max(1, width // grid[1])))
        image[patch] = example[1][patch]
    return images


def _in_place(vectors: Tensor, grid: tuple[int, int], places: np.ndarray) -> int:
    """For how many places the token there changes: vectors (1 + P, C, L), the first without a change."""
    usual = vectors[:1].float()
    changes = (vectors[1:].float() - usual).norm(dim=1) / usual.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    cells = np.floor(places * grid + 1e-6).astype(np.int64)
    own = changes[torch.arange(len(cells)), torch.from_numpy(cells[:, 0] * grid[1] + cells[:, 1])]
    return int((own >= _FELT * changes.amax(dim=1)).sum())
