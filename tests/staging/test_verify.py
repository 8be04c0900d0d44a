"""What is found out about a split before it is handed out: statics that are written into, rows in an order unseen."""

import numpy as np
import pytest
import torch
from torch import nn

from adaptexit.staging.carried import Along, Nest, Static
from adaptexit.staging.splitting import from_stages, split
from tests.staging.test_splitting import Chain, assert_close, built, plain, vectors

# -- static values that are written into -------------------------------------------------------------------------------


class Positions(Chain):
    """Values that are the same for any samples, made before the cuts and written into behind them."""

    def __init__(self, nested, written=True):
        super().__init__()
        self.nested, self.written = nested, written
        self.register_buffer("places", torch.linspace(0.5, 2, 6))

    def forward(self, x):
        places = self.places * 2
        positions = {"all": [places], "n": 2} if self.nested else places
        h = self.b(self.a(x))
        positions = positions["all"][0] if self.nested else positions
        if self.written:
            positions.mul_(3)
        return self.c(h + positions)


def divided(parts, x, blocks):
    """Answers of blocks that were divided after every cut, one block after the other."""
    with torch.inference_mode():
        waiting = [parts.run(0, x.clone())]
        for k in range(1, parts.n_stages):
            waiting = [parts.run(k, whole.taken(block)) for whole in waiting for block in blocks(whole.n_rows)]
        return torch.cat([carried.feature for carried in waiting])


def one_by_one(n):
    return [slice(i, i + 1) for i in range(n)]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("cuts", [["a"], ["a", "b"]])
def test_blocks_of_a_divided_batch_do_not_share_what_a_stage_writes_into(nested, cuts):
    model = built(Positions, nested)
    parts = split(model, cuts, vectors())
    assert_close(divided(parts, vectors(), one_by_one), plain(model, vectors()))


def test_blocks_of_given_stages_do_not_share_what_a_stage_writes_into():
    class Before(nn.Module):
        def forward(self, x):
            return x, torch.ones(6)

    class Behind(nn.Module):
        def forward(self, carried):
            x, scale = carried
            return x * scale.mul_(2)

    parts = from_stages([Before().eval(), Behind().eval()], vectors())
    assert parts.live == [(Nest((Along(0, 1), Static(written=True))),)]
    assert_close(divided(parts, vectors(), one_by_one), 2 * vectors())


def test_static_values_that_nobody_writes_into_are_shared():
    parts = split(built(Positions, False, written=False), ["a", "b"], vectors())
    carried = parts.run(0, vectors())
    places = [i for i, layout in enumerate(carried.live.layouts) if layout == Static()]
    assert len(places) == 1
    assert carried.taken(np.array([0])).live.values[places[0]] is carried.live.values[places[0]]


def test_static_values_that_a_stage_writes_into_are_marked_up_to_it():
    class Early(Positions):
        def forward(self, x):
            places = self.places * 2
            h = self.a(x)
            places.add_(1)
            h = self.b(h + places)
            return self.c(h * places)

    parts = split(built(Early, False), ["a", "b"], vectors())
    statics = [[layout for layout in row if isinstance(layout, Static)] for row in parts.live]
    assert statics == [[Static(written=True)], [Static()]]
