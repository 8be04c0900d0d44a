from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adaptexit.backbones.ranet import Block, SubNetwork, Versions, resized
from tests.backbones.small_networks import images, made, seeded, small, small_ranet


@pytest.fixture(scope="module")
def net():
    """Sub-networks of 1, 2, 3 and 4 blocks of two layers; images become 4, 8, 16 and 16 pixels."""
    return small("ranet")


def through(net, x, until):
    """What goes on from stage ``until`` (inclusive)."""
    with torch.no_grad():
        for stage in net.stages[: until + 1]:
            x = stage(x)
    return x


def pictures(n=4):
    return torch.from_numpy(images()[0][:n])


# -- versions of the image ---------------------------------------------------------------------------------------------


def test_versions_are_made_of_the_next_larger_one_smallest_first():
    versions = seeded(lambda: Versions(3, (1, 2, 3, 3), (8, 6, 4, 2))).eval()
    with torch.no_grad():
        maps = versions(torch.randn(2, 3, 32, 32))
        assert [tuple(x.shape[1:]) for x in maps] == [(8, 8, 8), (6, 16, 16), (4, 32, 32), (2, 32, 32)]
        for larger, smaller, module in zip(maps[::-1], maps[-2::-1], versions.scales[1:], strict=False):
            assert torch.equal(module(larger), smaller)
    assert versions.scales[0].conv.in_channels == 3


# -- sub-networks ------------------------------------------------------------------------------------------------------


def test_a_stage_starts_each_sub_network_with_the_blocks_that_fuse(net):
    assert [len(stage.blocks) for stage in net.stages] == [1, 2, 3, 4]
    assert [[block.fusion is not None for block in stage.blocks] for stage in net.stages] == [
        [False], [True, False], [True, True, False], [True, True, True, False],
    ]  # fmt: skip
    deeper = made(small_ranet, n_blocks=2, more_blocks=2)
    assert [len(stage.blocks) for stage in deeper.stages] == [1, 1, 3, 1, 5, 1, 7, 1]
    assert [stage.starts for stage in deeper.stages] == [True, False] * 4
    assert [stage.versions is not None for stage in deeper.stages] == [True] + [False] * 7


def test_what_goes_on(net):
    """Versions still to come, what this sub-network saw unless it is the last, and the map that is read."""
    carried = pictures()
    for k, stage in enumerate(net.stages):
        with torch.no_grad():
            carried = stage(carried)
        versions, history, x = carried
        assert [v.shape[2] for v in versions] == [8, 16, 16][k:]
        assert x.shape[1:] == (net.exit_info[k]["num_chs"], 4, 4)
        assert [len(seen) for seen in history] == [3] * len(stage.blocks) * (k < 3)
    assert versions == history == []


def test_an_exit_in_the_middle_of_a_sub_network_keeps_what_was_seen():
    deeper = seeded(small_ranet, n_blocks=2, more_blocks=2).eval()
    first, second = through(deeper, pictures(), 0), through(deeper, pictures(), 1)
    assert [len(first[1]), len(second[1])] == [1, 2]
    assert torch.equal(first[1][0][0], second[1][0][0])
    assert len(through(deeper, pictures(), 3)[1]) == 4
    assert through(deeper, pictures(), 7)[1] == []


@pytest.mark.parametrize("settings", [{}, {"n_blocks": 2, "more_blocks": 2, "depth": 3}])
def test_every_sub_network_ends_at_the_smallest_resolution(settings):
    deeper = made(small_ranet, **settings)
    assert {info["resolution"] for info in deeper.exit_info} == {(4, 4)}
    by_network, row = [], []
    for stage in deeper.stages:
        row = [] if stage.starts else row
        row += [block.halves for block in stage.blocks]
        by_network += [row] if stage.starts else []
    assert [sum(halves) for halves in by_network] == [0, 1, 2, 2]
    lengths = [len(halves) for halves in by_network]
    for halves, places in zip(by_network[1:], [lengths[:1], lengths[:2], lengths[1:3]], strict=True):
        assert [n for n, halved in enumerate(halves, start=1) if halved] == places


# -- fusion ------------------------------------------------------------------------------------------------------------


def test_fusion_reads_what_the_layer_of_the_other_block_read(net):
    """With every layer's input kept, what fusion reads are those to the bit."""
    inputs, hooks = {}, []

    def keep(module):
        hooks.append(module.register_forward_pre_hook(lambda part, x: inputs.__setitem__(part, x[0])))

    blocks = [list(stage.blocks) for stage in net.stages]
    for block in (block for row in blocks for block in row):
        for layer in block.layers:
            keep(layer)
        if block.fusion is not None:
            for part in (*block.fusion.layers, block.fusion.last):
                keep(part)
    outputs = {}
    for block in (block for row in blocks for block in row):
        hooks.append(block.register_forward_hook(lambda part, x, out: outputs.__setitem__(part, out)))
    through(net, pictures(), 3)
    for hook in hooks:
        hook.remove()
    n_seen = 0
    for lower, upper in pairwise(blocks):
        for n, block in enumerate(upper):
            if block.fusion is None:
                continue
            for reads, layer in zip(block.fusion.layers, lower[n].layers, strict=True):
                assert torch.equal(inputs[reads], inputs[layer])
                n_seen += 1
            assert torch.equal(inputs[block.fusion.last], outputs[lower[n]][1][-1])
    assert n_seen == 2 * (1 + 2 + 3)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_later_exits_change_with_what_an_earlier_sub_network_saw(net, k):
    versions, history, x = through(net, pictures(), k)
    for n, seen in enumerate(history):
        for place in range(len(seen)):
            other = [list(row) for row in history]
            other[n][place] = seen[place] + 0.5
            with torch.no_grad():
                one = net.heads[k + 1](net.stages[k + 1]([versions, history, x]))
                two = net.heads[k + 1](net.stages[k + 1]([versions, other, x]))
            assert not torch.allclose(one, two)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_the_next_sub_network_starts_from_its_version_and_not_from_the_last_map(net, k):
    versions, history, x = through(net, pictures(), k)
    with torch.no_grad():
        one = net.stages[k + 1]([versions, history, x])[-1]
        same = net.stages[k + 1]([versions, history, x + 1])[-1]
        other = net.stages[k + 1]([[versions[0] + 1, *versions[1:]], history, x])[-1]
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


# -- blocks ------------------------------------------------------------------------------------------------------------


def block_of(lower=None, halves=False, reduction=1.0):
    return seeded(
        lambda: Block(6, 4, 3, 2, lower=lower, compression=0.25, halves=halves, reduction=reduction), 1
    ).eval()


def naive(block, x, lower_inputs=None, lower_last=None):
    """A block layer by layer from lists: x, then for each layer what came from below and what is new."""
    features = [x]
    for n, layer in enumerate(block.layers):
        new = layer(torch.cat(features, dim=1))
        if block.halves and n == len(block.layers) - 1:
            features = [F.interpolate(f, size=new.shape[2:], mode="bilinear", align_corners=True) for f in features]
        if lower_inputs is not None:
            below = block.fusion.layers[n](lower_inputs[n])
            features.append(F.interpolate(below, size=new.shape[2:], mode="bilinear", align_corners=True))
        features.append(new)
    if lower_inputs is not None:
        below = block.fusion.last(lower_last)
        features.append(F.interpolate(below, size=features[0].shape[2:], mode="bilinear", align_corners=True))
    return block.transition(torch.cat(features, dim=1))


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("reduction", [1.0, 0.5])
def test_a_block_without_fusion(halves, reduction):
    block, x = block_of(halves=halves, reduction=reduction), torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        out, seen = block(x, None)
        torch.testing.assert_close(out, naive(block, x))
    assert out.shape == (2, block.out_channels, 8 >> halves, 8 >> halves)
    assert block.out_channels == 18 * reduction
    assert block.widths == [6, 10, 14, 18]
    assert [tuple(y.shape[1:3]) for y in seen] == [(6, 8), (10, 8), (14, 8), (18, 8 >> halves)]
    assert torch.equal(seen[0], x)
    assert isinstance(block.transition, nn.Identity) == (reduction == 1.0)


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("lower_halves", [True, False])
def test_a_block_with_fusion(halves, lower_halves):
    lower = block_of(halves=lower_halves)
    block, small_x, x = block_of(lower, halves), torch.randn(2, 6, 4, 4), torch.randn(2, 6, 8, 8)
    inputs = []
    for layer in lower.layers:
        layer.register_forward_pre_hook(lambda part, args: inputs.append(args[0]))
    with torch.no_grad():
        _, seen = lower(small_x, None)
        out, _ = block(x, seen)
        torch.testing.assert_close(out, naive(block, x, inputs, seen[-1]))
    assert block.out_channels == out.shape[1] == 18 + 18 // 4
    assert [layer[1].conv.out_channels for layer in block.layers] == [3] * 3
    assert [layer[1].conv.out_channels for layer in block.fusion.layers] == [1] * 3


def test_resized_leaves_a_map_of_that_size_alone():
    x = torch.randn(1, 2, 4, 4)
    assert resized(x, torch.empty(3, 1, 4, 4)) is x
    assert resized(x, torch.empty(3, 1, 8, 6)).shape == (1, 2, 8, 6)
    torch.testing.assert_close(resized(x, torch.empty(1, 1, 7, 7))[:, :, ::2, ::2], x)


def test_a_sub_network_that_does_not_remember_carries_nothing_on():
    blocks = [block_of(), Block(18, 4, 3, 2, lower=None, compression=0.25, halves=False, reduction=1.0).eval()]
    x = torch.randn(2, 6, 4, 4)
    with torch.no_grad():
        for remembers in (True, False):
            versions, history, out = SubNetwork(blocks, starts=True, remembers=remembers)([[x], [], None])
            assert (versions, len(history)) == ([], 2 * remembers)
            assert torch.equal(out, blocks[1](blocks[0](x, None)[0], None)[0])
