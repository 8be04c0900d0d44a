import pytest
import torch
from timm.layers import ConvNormAct, SeparableConvNormAct
from torch import nn

from adaptexit.backbones import FusionStem
from adaptexit.backbones.fusion_stem import Finest, LastOfDense, Stem, classifier, dense_fusion
from adaptexit.backbones.multi_scale import MultiScaleLayer, PerScale
from tests.backbones.small_networks import images, made, n_parameters, seeded, small, small_fusion_stem

GROWTH, FACTORS = 3, (1, 2, 4)


def dense(depth, exit_every, *, fusion=True, whole=True, factors=FACTORS):
    """Stages and what classifiers read, with convolutions that are only counted."""
    return dense_fusion(
        nn.Identity(), 5, GROWTH, factors, depth, exit_every,
        lambda block, scale, before, channels, stride: nn.Conv2d(before, channels, 3, stride, 1),
        lambda before, channels: nn.Conv2d(before, channels, 1),
        reduction=0.5, fusion=fusion, whole=whole,
    )  # fmt: skip


def positions(stages, depth):
    """Where each stage ends, (block, layer) from its modules: layer 0 is behind the transition into a block."""
    n, where = 0, []
    for stage in stages:
        n += sum(isinstance(module, MultiScaleLayer) for module in stage)
        block, layer = divmod(n - 1, depth)
        where.append((block + 2, 0) if isinstance(stage[-1], PerScale) else (block + 1, layer + 1))
    return where


def walked(n_scales, depth, exit_every, whole, growth=GROWTH * FACTORS[-1]):
    """The same, and the channels read there, by walking through all layers one by one."""
    where, read, n, width = [], [], 0, 0
    for block in range(1, n_scales + 1):
        for layer in range(1, depth + 1):
            n, width, place = n + 1, width + growth, (block, layer)
            channels = width if whole else growth
            if layer == depth and block < n_scales:
                width, place = channels // 2, (block + 1, 0)
                channels = width
            if n % exit_every == 0 or place == (n_scales, depth):
                where.append(place)
                read.append(channels)
    return where, read


# -- exits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("depth", "exit_every"), [(6, 3), (4, 2), (3, 1), (1, 1), (3, 3), (3, 2), (4, 3), (2, 5), (2, 100), (5, 4)]
)
def test_exits_are_where_a_walk_through_the_layers_comes_by(depth, exit_every, whole):
    stages, read = dense(depth, exit_every, whole=whole)
    where, channels = walked(3, depth, exit_every, whole)
    assert positions(stages, depth) == where
    assert read == channels
    for k, place in enumerate(where[:-1], start=1):
        n = k * exit_every
        assert place == (1 + n // depth, n % depth)
    assert where[-1] == (3, depth)


def test_the_positions_of_cifars_networks():
    stages, _ = dense(6, 3)
    assert positions(stages, 6) == [(1, 3), (2, 0), (2, 3), (3, 0), (3, 3), (3, 6)]


@pytest.mark.parametrize("whole", [True, False])
def test_classifiers_see_the_coarsest_map(whole):
    stages, read = dense(2, 3, whole=whole)
    carried = torch.randn(2, 5, 16, 16)
    for stage, channels, (block, _) in zip(stages, read, walked(3, 2, 3, whole)[0], strict=True):
        carried = stage(carried)
        assert carried[-1].shape[2:] == (4, 4)
        assert carried[-1].shape[1] >= channels
        assert [x is None for x in carried] == [s < block - 1 for s in range(3)]
        assert [x.shape[2] for x in carried if x is not None] == [16 >> s for s in range(block - 1, 3)]


def test_what_was_added_last_is_what_classifiers_and_transitions_read_where_not_all_is():
    stages, read = dense(2, 1, whole=False)
    carried, added = torch.randn(2, 5, 16, 16), {}

    def note(name):
        return lambda part, inputs, output: added.__setitem__(name, output)

    layers = [module for stage in stages for module in stage if isinstance(module, MultiScaleLayer)]
    for n, layer in enumerate(layers):
        for kind, parts in (("own", layer.own), ("down", layer.down)):
            for scale, part in parts.items():
                part.register_forward_hook(note((n, kind, int(scale))))
    transitions = {1: stages[1][-1], 3: stages[3][-1]}
    for n, (stage, channels) in enumerate(zip(stages, read, strict=True)):
        carried = stage(carried)
        new = {
            s: torch.cat([added[n, kind, s] for kind in ("down", "own") if (n, kind, s) in added], dim=1)
            for s in range(3)
            if any((n, kind, s) in added for kind in ("down", "own"))
        }
        if n not in transitions:
            assert torch.equal(carried[-1][:, -channels:], new[2])
            continue
        for s, transition in transitions[n].scales.items():
            assert torch.equal(carried[int(s)], transition.module(new[int(s)]))
            assert carried[int(s)].shape[1] == new[int(s)].shape[1] // 2


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("fusion", [True, False])
def test_every_layer_adds_the_growth_half_from_the_finer_map(fusion, whole):
    depth = 3
    stages, _ = dense(depth, 100, fusion=fusion, whole=whole)
    layers = [module for stage in stages for module in stage if isinstance(module, MultiScaleLayer)]
    assert [layer.fused for layer in layers] == [True] + [fusion] * 8  # coarser maps begin with finer ones
    widths = [5, 0, 0]
    for n, layer in enumerate(layers):
        block = n // depth
        # Unfused, nobody would read what is added to a map that is dropped next.
        finest = block + (not fusion and n % depth == depth - 1 and block < 2)
        new = [GROWTH * factor * (s >= finest) for s, factor in enumerate(FACTORS)]
        assert sorted({int(s) for s in (*layer.own, *layer.down)}) == list(range(finest, 3))
        for s in range(finest, 3):
            parts = {kind: getattr(layer, kind)[str(s)] for kind in ("own", "down") if str(s) in getattr(layer, kind)}
            assert set(parts) == ({"own"} if s == block else {"own", "down"} if widths[s] else {"down"})
            assert sum(part.out_channels for part in parts.values()) == new[s]
            if len(parts) == 2:
                assert parts["down"].out_channels == new[s] // 2
            if "own" in parts:
                assert parts["own"].in_channels == widths[s]
                assert parts["own"].stride == (1, 1)
            if "down" in parts:
                assert parts["down"].in_channels == widths[s - 1] + (fusion or n == 0) * new[s - 1]
                assert parts["down"].stride == (2, 2)
        widths = [width + more for width, more in zip(widths, new, strict=True)]
        if n % depth == depth - 1:
            before = widths if whole else new
            widths = [before[s] // 2 if s > block else 0 for s in range(3)]


def test_one_scale_is_a_plain_dense_network():
    stages, read = dense(4, 2, factors=(1,))
    assert positions(stages, 4) == [(1, 2), (1, 4)]
    assert read == [5 + 2 * GROWTH, 5 + 4 * GROWTH]


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("act_layer", [nn.ReLU, nn.GELU])
def test_the_stem_adds_the_third_convolution_to_the_first_and_halves(stride, act_layer):
    stem = seeded(lambda: Stem(3, 6, 10, stride, act_layer)).eval()
    x = torch.randn(2, 3, 16, 16)
    first = stem.conv1(x)
    middle = stem.conv3(stem.conv2(first))
    assert middle.shape == first.shape == (2, 6, 16 // stride, 16 // stride)
    expected = stem.conv4(first + middle)
    assert torch.equal(stem(x), expected)
    assert expected.shape == (2, 10, 8 // stride, 8 // stride)
    assert isinstance(stem.conv1.bn.act, act_layer)
    kinds = [type(part) for part in (stem.conv1, stem.conv2, stem.conv3, stem.conv4)]
    assert kinds == [ConvNormAct, SeparableConvNormAct, ConvNormAct, SeparableConvNormAct]
    kernels = [stem.conv1.conv, stem.conv2.conv_dw, stem.conv3.conv, stem.conv4.conv_dw]
    assert [part.kernel_size[0] for part in kernels] == [3, 3, 1, 3]
    assert [part.stride[0] for part in kernels] == [stride, 1, 1, 2]
    assert [part.groups for part in kernels] == [1, 6, 1, 6]
    assert stem.conv3.conv.in_channels == 12


def test_small_pieces():
    x = torch.randn(2, 5, 4, 4)
    assert Finest(nn.Identity(), 3)(x)[1:] == [None, None]
    assert Finest(nn.Identity(), 3)(x)[0] is x
    assert torch.equal(LastOfDense(nn.Identity(), 2)(x), x[:, 3:])


def test_the_classifier_is_a_strided_convolution_and_a_pointwise_one():
    head = classifier(7, 10, channels=12)
    first, second = head.convolutions
    assert (first.conv.in_channels, first.conv.out_channels, first.conv.kernel_size, first.conv.stride) == (
        7, 12, (3, 3), (2, 2),
    )  # fmt: skip
    assert (second.conv.in_channels, second.conv.out_channels, second.conv.kernel_size) == (12, 12, (1, 1))
    assert head.eval()([None, torch.randn(2, 9, 5, 5)]).shape == (2, 10)
    assert classifier(7, 10).linear.in_features == 128


# -- switches ----------------------------------------------------------------------------------------------------------


def test_a_plain_stem_is_one_strided_convolution_and_nothing_else_changes():
    usual, plain = made(small_fusion_stem), made(small_fusion_stem, stem="plain")
    stem = plain.stages[0][0].module
    assert isinstance(stem, ConvNormAct)
    assert (stem.conv.kernel_size, stem.conv.stride, stem.conv.out_channels) == ((3, 3), (2, 2), 8)
    assert isinstance(usual.stages[0][0].module, Stem)

    def others(net):
        return {name: p.shape for name, p in net.named_parameters() if not name.startswith("stages.0.0.")}

    assert others(usual) == others(plain)
    gain = {a["macs"] - b["macs"] for a, b in zip(usual.exit_info, plain.exit_info, strict=True)}
    assert len(gain) == 1
    assert gain.pop() > 0


def test_without_fusion_coarser_maps_cost_less_and_nothing_else_changes():
    usual, without = made(small_fusion_stem), made(small_fusion_stem, fusion=False)
    assert all(a["macs"] > b["macs"] for a, b in zip(usual.exit_info, without.exit_info, strict=True))
    for key in ("num_chs", "resolution"):
        assert [info[key] for info in usual.exit_info] == [info[key] for info in without.exit_info]
    shapes, others = ({name: p.shape for name, p in net.named_parameters()} for net in (usual, without))
    changed = {name for name, shape in others.items() if shape != shapes[name]}
    # Layers 2 and 4 end a block: the finest scale gets nothing new there, and is dropped a module earlier.
    assert {name.rsplit(".", 3)[0] for name in shapes.keys() - others.keys()} == {
        "stages.0.2.own.0",
        "stages.1.1.own.1",
    }
    assert changed
    assert all(".down." in name for name in changed)


@pytest.mark.parametrize("settings", [{"fusion": False}, {"stem": "plain"}])
def test_every_parameter_learns_with_a_switch_off(settings):
    net = seeded(small_fusion_stem, **settings).train()
    sum(logits.square().sum() for logits in net(torch.from_numpy(images()[0][:6]))).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_more_of_anything_costs_more():
    usual = n_parameters(made(small_fusion_stem))
    for settings in ({"depth": 3}, {"reduction": 0.75}, {"n_classes": 20}):
        assert n_parameters(made(small_fusion_stem, **settings)) > usual
    assert isinstance(small("fusion_stem"), FusionStem)
