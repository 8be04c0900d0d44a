"""Tokens that do not lie row by row are noticed by which of them change when a patch of the image does."""

import math

import pytest
import torch
from timm.models.hiera import Hiera
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from adaptexit.heads.by_name import make_head
from adaptexit.networks.build import feature_specs
from adaptexit.staging.splitting import split


def images(side=64, n=6):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def built(kind, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(num_classes=3, **options).eval()


def small_hiera():
    return built(Hiera, img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 1, 1, 1))


def small_vit(**options):
    return built(VisionTransformer, img_size=64, patch_size=8, embed_dim=24, depth=3, num_heads=2, **options)


class Reordered(nn.Module):
    """Tokens of patches in an order of its own, mixed by one attention."""

    def __init__(self, order, num_classes):
        super().__init__()
        self.register_buffer("order", order)
        self.patches = nn.Conv2d(3, 24, 8, 8)
        self.mix = nn.TransformerEncoderLayer(24, 2, 32, batch_first=True)
        self.norm = nn.LayerNorm(24)
        self.out = nn.Linear(24, num_classes)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)[:, self.order]
        return self.out(self.norm(self.mix(tokens)).mean(1))


def test_unrolled_tokens_are_noticed_and_refused_by_spatial_heads():
    specs = feature_specs(split(small_hiera(), ["blocks.0", "blocks.1"], images()))
    assert [(spec.layout, spec.grid, spec.in_order) for spec in specs] == [
        ("NLC", (16, 16), False),
        ("NLC", (8, 8), False),
    ]
    make_head("mlp", specs[0], 3)
    with pytest.raises(ValueError, match="tokens must lie row by row to be made a map"):
        make_head("conv", specs[0], 3)


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 4}])
def test_tokens_of_vision_transformers_are_in_order(options):
    specs = feature_specs(split(small_vit(**options), ["blocks.0", "blocks.1"], images()))
    assert [(spec.layout, spec.grid, spec.in_order) for spec in specs] == [("NLC", (8, 8), True)] * 2
    make_head("conv", specs[0], 3)


@pytest.mark.parametrize(
    ("order", "in_order"),
    [
        (torch.arange(64), True),
        (torch.arange(64).reshape(8, 8).T.reshape(-1), False),
        (torch.arange(64).flip(0), False),
        (torch.arange(64).reshape(4, 2, 4, 2).permute(1, 3, 0, 2).reshape(-1), False),
    ],
    ids=["row by row", "column by column", "backwards", "unrolled"],
)
def test_any_other_order_is_noticed(order, in_order):
    model = built(Reordered, order=order)
    (spec,) = feature_specs(split(model, ["mix"], images()), "NLC")
    assert (spec.grid, spec.in_order) == ((8, 8), in_order)


def test_vectors_maps_and_tokens_without_a_grid_have_no_order():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    assert all(spec.in_order for spec in feature_specs(split(model, ["0", "2"], images())))
    (spec,) = feature_specs(split(built(Reordered, order=torch.arange(62)), ["mix"], images()), "NLC+0")
    assert (math.prod(spec.shape), spec.grid, spec.in_order) == (62 * 24, None, True)
