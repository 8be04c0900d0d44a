"""Rows that are the same for all samples of the example: masks of later batches must go with their samples."""

import numpy as np
import pytest
import torch
from torch import nn

from adaptexit.exceptions import SplitError
from adaptexit.staging.carried import Along
from adaptexit.staging.splitting import split
from tests.staging.test_splitting import assert_close, built, plain

N_HEADS, LENGTH, WIDTH = 4, 7, 16


def sequences(n=8, padded=False):
    """Sequences (n, LENGTH, 6); ``padded`` ones end earlier and earlier, in zeros."""
    x = torch.randn(n, LENGTH, 6, generator=torch.Generator().manual_seed(0))
    for i in range(n if padded else 0):
        x[i, LENGTH - i % LENGTH :] = 0
    return x


class Attention(nn.Module):
    """Attention that does not look at padding, by a key mask with a row for every head, made before the cut "a"."""

    def __init__(self, side_by_side, mask_of=lambda padding: padding):
        super().__init__()
        self.side_by_side, self.mask_of = side_by_side, mask_of
        self.a, self.b = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.c = nn.Linear(WIDTH, 5)

    def forward(self, x):
        keys = self.mask_of(x.abs().amax(2) == 0)[:, None]
        mask = keys.repeat_interleave(N_HEADS, 0) if self.side_by_side else keys.repeat(N_HEADS, 1, 1)
        h = self.b(self.a(x).relu())
        width = WIDTH // N_HEADS
        if self.side_by_side:
            heads = h.unflatten(2, (N_HEADS, width)).transpose(1, 2).flatten(0, 1)
        else:
            heads = torch.cat(h.split(width, 2), 0)
        scores = heads @ heads.transpose(1, 2)
        scores = scores.masked_fill(mask, -1e9) if mask.dtype == torch.bool else scores + mask
        mixed = scores.softmax(2) @ heads
        if self.side_by_side:
            mixed = mixed.unflatten(0, (-1, N_HEADS)).transpose(1, 2).flatten(2)
        else:
            mixed = torch.cat(mixed.split(x.shape[0], 0), 2)
        return self.c((h + mixed).mean(1))


def as_bias(padding):
    return torch.where(padding, -1e9, 0.0)


def as_levels(padding):
    return padding.long() * -30


MASKS = pytest.mark.parametrize("mask_of", [lambda padding: padding, as_bias, as_levels], ids=["bool", "float", "int"])


@MASKS
def test_masks_repeated_head_by_head_are_refused_although_the_example_has_no_padding(mask_of):
    words = (
        r"after the cut 'a' has 4 rows a sample, the same .*other samples change: the rows .*do not lie side by side"
    )
    with pytest.raises(SplitError, match=words):
        split(built(Attention, False, mask_of), ["a"], sequences())


@MASKS
def test_masks_repeated_sample_by_sample_go_with_their_samples(mask_of):
    model = built(Attention, True, mask_of)
    parts = split(model, ["a"], sequences())
    assert Along(0, N_HEADS) in parts.live[0]
    x, staying = sequences(padded=True), np.array([6, 1, 4])
    with torch.inference_mode():
        answers = parts.run(1, parts.run(0, x).taken(staying)).feature
    expected = plain(model, x)
    assert (expected[:, None] - expected).abs().amax(2).add(torch.eye(8)).amin() > 1e-3
    assert_close(answers, expected[staying])


@pytest.mark.parametrize("side_by_side", [True, False])
def test_some_padding_in_the_example_shows_no_order_either(side_by_side):
    x = sequences()
    x[:2, 3:] = 0  # two alike, four alike
    if side_by_side:
        split(built(Attention, side_by_side), ["a"], x)
    else:
        with pytest.raises(SplitError):
            split(built(Attention, side_by_side), ["a"], x)


def test_half_precision_hides_no_order():
    split(built(Attention, True).bfloat16(), ["a"], sequences().bfloat16())
    with pytest.raises(SplitError, match="do not lie side by side"):
        split(built(Attention, False).bfloat16(), ["a"], sequences().bfloat16())


def test_rows_along_another_axis():
    class Turned(Attention):
        def forward(self, x):
            flags = (x.abs().amax(2) == 0).any(1)
            flags = flags.repeat_interleave(2) if self.side_by_side else flags.repeat(2)
            columns = flags.float()[None] + 1  # (1, 2B)
            h = self.a(x).mean(1)
            both = columns.unflatten(1, (-1, 2) if self.side_by_side else (2, -1))[0]
            return self.c(h * both.sum(1 if self.side_by_side else 0)[:, None])

    parts = split(built(Turned, True), ["a"], sequences())
    assert Along(1, 2) in parts.live[0] or Along(0, 2) in parts.live[0]
    with pytest.raises(SplitError, match="do not lie side by side"):
        split(built(Turned, False), ["a"], sequences())


def test_rows_of_which_only_the_shape_is_read_may_lie_in_any_order():
    class Shaped(Attention):
        def forward(self, x):
            repeated = torch.zeros_like(x).repeat(N_HEADS, 1, 1)
            h = self.a(x)
            return self.c(h.mean(1)) * repeated.shape[2]

    parts = split(built(Shaped, False), ["a"], sequences())
    answers = parts.run(1, parts.run(0, sequences()).taken(np.array([3, 1]))).feature
    assert_close(answers.detach(), plain(built(Shaped, False), sequences())[[3, 1]])


def test_rows_that_decide_are_refused_with_the_decision():
    class Deciding(Attention):
        def forward(self, x):
            mask = (x.abs().amax(2) == 0).repeat_interleave(N_HEADS, 0)
            h = self.a(x).mean(1)
            if mask.any():
                h = h + mask.sum()
            return self.c(h)

    with pytest.raises(SplitError, match=r"With such values the model does not run: the model's forward decides on a"):
        split(built(Deciding, True), ["a"], sequences())
