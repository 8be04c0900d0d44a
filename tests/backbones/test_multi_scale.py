import pytest
import torch
from timm.layers import ConvNormAct
from torch import nn

from adaptexit.backbones.multi_scale import MultiScaleLayer, PerScale, Pyramid, bottleneck, steep_stem

WIDTHS, NEW, SIZE = (3, 5, 7), (2, 4, 6), 16


class Halving(nn.Module):
    """Stands for a strided convolution: known new channels from all old ones, every second pixel."""

    def __init__(self, in_channels, channels, stride=2):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, in_channels))
        self.stride = stride

    def forward(self, x):
        return torch.einsum("oc,nchw->nohw", self.weight, x[:, :, :: self.stride, :: self.stride])


def maps(n=2, widths=WIDTHS):
    return [
        None if width is None else torch.randn(n, width, SIZE >> s, SIZE >> s, dtype=torch.float64)
        for s, width in enumerate(widths)
    ]


def layer_of(fused, first=0):
    """A layer on scales ``first`` to 2, half of the new channels from the finer map."""
    own = {first: Halving(WIDTHS[first], NEW[first], 1)}
    down = {}
    for s in range(first + 1, 3):
        down[s] = Halving(WIDTHS[s - 1] + (NEW[s - 1] if fused else 0), NEW[s] // 2)
        own[s] = Halving(WIDTHS[s], NEW[s] // 2, 1)
    return MultiScaleLayer(own, down, fused=fused).double()


def naive(layer, history, first=0):
    """Equation 1 of CHASE, as Table I writes it out: ``history[s]`` has the maps x_0 ... x_{l-1} of scale s.

    x_l of scale s is f of x_0, ..., x_l of scale s - 1, then h of x_0, ..., x_{l-1} of scale s. Without fusion (MSDNet)
    f stops at x_{l-1}.
    """
    added = {}
    for s in range(first, 3):
        h = layer.own[str(s)](torch.cat(history[s], dim=1))
        if s == first:
            added[s] = h
            continue
        finer = [*history[s - 1], added[s - 1]] if layer.fused else history[s - 1]
        added[s] = torch.cat([layer.down[str(s)](torch.cat(finer, dim=1)), h], dim=1)
    return added


# -- layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("first", [0, 1])
def test_a_layer_is_equation_1(fused, first):
    torch.manual_seed(0)
    layer, x = layer_of(fused, first), maps(widths=[None] * first + list(WIDTHS[first:]))
    grown, added = layer(x), naive(layer, [[old] for old in x], first)
    for s in range(3):
        if s < first:
            assert grown[s] is None
        else:
            assert torch.equal(grown[s][:, : WIDTHS[s]], x[s])
            torch.testing.assert_close(grown[s][:, WIDTHS[s] :], added[s])


@pytest.mark.parametrize("fused", [True, False])
def test_layers_in_a_row_read_everything_before_them_as_table_1_shows(fused):
    torch.manual_seed(0)
    history, widths, layers = [[x] for x in maps()], list(WIDTHS), []
    carried = [row[0] for row in history]
    for _ in range(4):
        own, down = {0: Halving(widths[0], NEW[0], 1)}, {}
        for s in (1, 2):
            down[s] = Halving(widths[s - 1] + (NEW[s - 1] if fused else 0), NEW[s] // 2)
            own[s] = Halving(widths[s], NEW[s] // 2, 1)
        layers.append(MultiScaleLayer(own, down, fused=fused).double())
        added = naive(layers[-1], history)
        for s, row in enumerate(history):
            row.append(added[s])
        widths = [width + new for width, new in zip(widths, NEW, strict=True)]
        carried = layers[-1](carried)
    for x, row in zip(carried, history, strict=True):
        assert len(row) == 5
        torch.testing.assert_close(x, torch.cat(row, dim=1))


@pytest.mark.parametrize("fused", [True, False])
def test_coarser_maps_see_what_the_layer_adds_to_finer_ones_only_where_it_is_fused(fused):
    torch.manual_seed(0)
    layer, x = layer_of(fused), maps()
    with torch.no_grad():
        before = layer(x)
        layer.own["0"].weight.mul_(2)  # changes the new finest map and nothing that came
        after = layer(x)
    changed = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert changed == [True, fused, fused]


@pytest.mark.parametrize("fused", [True, False])
def test_each_scale_reads_itself_and_the_finer_ones(fused):
    """What came of a finer map goes all the way down where it is fused, one scale where it is not."""
    torch.manual_seed(0)
    layer, x = layer_of(fused), maps()
    before = layer(x)
    for s in range(3):
        other = [y + 1 if t == s else y for t, y in enumerate(x)]
        new = [(a[:, w:] != b[:, w:]).any() for a, b, w in zip(before, layer(other), WIDTHS, strict=True)]
        assert [bool(n) for n in new] == [t >= s and (fused or t <= s + 1) for t in range(3)]


@pytest.mark.parametrize("fused", [True, False])
def test_a_scale_without_new_channels_is_dropped_and_read_for_the_last_time(fused):
    torch.manual_seed(0)
    down = {1: Halving(WIDTHS[0], 2), 2: Halving(WIDTHS[1] + (4 if fused else 0), 3)}
    own = {1: Halving(WIDTHS[1], 2, 1), 2: Halving(WIDTHS[2], 3, 1)}
    layer, x = MultiScaleLayer(own, down, fused=fused).double(), maps()
    grown = layer(x)
    assert grown[0] is None
    torch.testing.assert_close(grown[1][:, WIDTHS[1] :], torch.cat([down[1](x[0]), own[1](x[1])], dim=1))
    finer = grown[1] if fused else x[1]
    torch.testing.assert_close(grown[2][:, WIDTHS[2] :], torch.cat([down[2](finer), own[2](x[2])], dim=1))


def test_a_scale_begins_with_what_comes_from_the_finer_one():
    torch.manual_seed(0)
    layer = MultiScaleLayer({0: Halving(3, 2, 1)}, {1: Halving(5, 4)}, fused=True).double()
    x = maps(widths=[3, None, None])
    grown = layer(x)
    torch.testing.assert_close(grown[1], layer.down["1"](grown[0]))
    assert grown[2] is None


def test_what_came_is_left_alone():
    layer, x = layer_of(True), maps()
    before = [y.clone() for y in x]
    layer(x)
    assert all(torch.equal(y, old) for y, old in zip(x, before, strict=True))


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_per_scale_runs_each_module_on_its_map_and_drops_the_others():
    x = maps()
    out = PerScale({1: nn.Identity(), 2: nn.AvgPool2d(2)})([None, x[1], x[2]])
    assert out[0] is None
    assert out[1] is x[1]
    assert torch.equal(out[2], nn.AvgPool2d(2)(x[2]))
    assert PerScale({2: nn.Identity()})(x)[:2] == [None, None]


def test_a_pyramid_makes_every_map_of_the_one_before():
    x = torch.randn(1, 2, 8, 8)
    assert [y.shape[2] for y in Pyramid([nn.Identity(), nn.AvgPool2d(2), nn.AvgPool2d(2)])(x)] == [8, 4, 2]
    scales = Pyramid([nn.AvgPool2d(2), nn.AvgPool2d(2)])(x)
    torch.testing.assert_close(scales[1], nn.AvgPool2d(4)(x))


@pytest.mark.parametrize(("in_channels", "channels", "factor", "inner"), [(3, 4, 2, 3), (30, 4, 2, 8), (8, 2, 4, 8)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("act_layer", [nn.ReLU, nn.GELU])
def test_a_bottleneck_is_no_wider_than_it_may_be(in_channels, channels, factor, inner, stride, act_layer):
    narrow, wide = bottleneck(in_channels, channels, factor, stride, act_layer)
    assert [part.conv.kernel_size for part in (narrow, wide)] == [(1, 1), (3, 3)]
    assert [part.conv.stride for part in (narrow, wide)] == [(1, 1), (stride, stride)]
    assert (narrow.conv.in_channels, narrow.conv.out_channels) == (in_channels, inner)
    assert (wide.conv.in_channels, wide.conv.out_channels) == (inner, channels)
    for part in (narrow, wide):
        assert isinstance(part, ConvNormAct)
        assert isinstance(part.bn.act, act_layer)
        assert part.conv.bias is None
    assert nn.Sequential(narrow, wide)(torch.randn(2, in_channels, 9, 9)).shape[2] == (9 if stride == 1 else 5)


def test_the_stem_for_large_images_leaves_a_quarter():
    stem = steep_stem(3, 8)
    assert stem(torch.randn(1, 3, 64, 32)).shape == (1, 8, 16, 8)
    assert sum(parameter.numel() for parameter in stem[0].conv.parameters()) == 7 * 7 * 3 * 8 + 8
