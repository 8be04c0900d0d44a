"""Rows that are the same for all samples of the example: masks of later batches must go with their samples."""

import numpy as np
import pytest
import torch
from torch import nn

from adaptexit.exceptions import SplitError
from adaptexit.staging.carried import Along, Live
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


# -- inputs of another size than the example's -------------------------------------------------------------------------


class Windows(nn.Module):
    """Windows of 4x4 pixels as rows, as many a sample as there is room for."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Linear(64, 8), nn.Linear(8, 5)

    def forward(self, x):
        n, _, height, width = x.shape
        windows = n * (height // 4) * (width // 4)
        rows = self.a(x).unflatten(2, (-1, 4)).unflatten(4, (-1, 4)).permute(0, 2, 4, 1, 3, 5).reshape(windows, -1)
        rows = self.b(rows.tanh()).tanh()
        return self.c(rows.reshape(n, windows // n, 8).mean(1))


def images(n, *size):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(sum(size)))


@pytest.mark.parametrize("example", [(4, 4), (8, 8), (16, 16)])
def test_rows_a_sample_may_be_others_for_inputs_of_another_size(example):
    model = built(Windows)
    parts = split(model, ["b"], images(6, *example))
    assert any(isinstance(layout, Along) for layout in parts.live[0])
    for size in [(4, 4), (8, 8), (8, 12), (16, 8)]:
        x, staying = images(7, *size), np.array([5, 1, 2])
        with torch.inference_mode():
            carried = parts.run(0, x.clone())
            first, last = carried.taken(staying[:1]), carried.taken(staying[1:])
            answers = parts.run(1, first.joined([last])).feature
        assert_close(answers, plain(model, x)[staying])


def test_samples_with_different_numbers_of_rows_are_of_different_kinds():
    parts = split(built(Windows), ["b"], images(6, 8, 8))
    small, large = parts.run(0, images(2, 8, 8)), parts.run(0, images(2, 8, 12))
    assert small.kind == parts.run(0, images(3, 8, 8)).kind != large.kind
    with pytest.raises(ValueError, match="merged only where their inputs have the same size"):
        small.joined([large])


def test_rows_that_are_no_whole_number_a_sample_are_refused():
    live = Live((torch.ones(7, 2),), (Along(0, 2),), 3)
    with pytest.raises(SplitError, match=r"7 rows for 3 samples, where the example's had 2 each: .*Give inputs like"):
        live.taken(np.array([0]))
