import pytest
import torch
from timm.layers import ConvNormAct
from torch import nn

from adaptexit.backbones import MSDNet, msdnet_cifar_anytime, msdnet_imagenet
from adaptexit.backbones.msdnet import classifier
from adaptexit.backbones.multi_scale import MultiScaleLayer, PerScale, Pyramid
from tests.backbones.small_networks import images, on_meta, seeded, small, small_msdnet

GROWTH, CHANNELS, FACTORS = 4, 8, (1, 2, 4)


def modules_of(net, kind):
    return [module for stage in net.stages for module in stage if isinstance(module, kind)]


def scales(module):
    return sorted({int(s) for s in (*module.own, *module.down)})


def walked(layers, n_scales, channels, growth, reduction=0.5):
    """(scales, whether one is dropped, width before) of every layer, and the width behind each block, one by one."""
    interval, plan, behind, width, n = -(-sum(layers) // n_scales), [], [], channels, 0
    finest = 0
    for depth in layers:
        for _ in range(depth):
            drops = n > 0 and n % interval == 0
            finest += drops
            plan.append((list(range(finest, n_scales)), drops, width))
            width += growth
            if drops:
                width = int(width * reduction)
            n += 1
        behind.append(width)
    return plan, behind


def test_the_plan_of_cifars_network():
    """Sixteen layers on three scales: the finest is dropped after layers 6 and 12."""
    net = on_meta(msdnet_cifar_anytime)
    layers = modules_of(net, MultiScaleLayer)
    assert [len(scales(layer)) for layer in layers] == [3] * 6 + [2] * 6 + [1] * 4
    assert [len(modules_of_stage) for modules_of_stage in net.stages] == [5, 2, 3, 2, 2, 3, 2]


@pytest.mark.parametrize(
    ("layers", "factors"), [([2, 1, 2], (1, 2, 4)), ([1] * 6, (1, 2)), ([4, 2, 2], (1, 2, 4, 4)), ([3, 3], (1,))]
)
def test_layers_are_those_of_a_walk(layers, factors):
    net = on_meta(
        MSDNet,
        layers=tuple(layers),
        channels=CHANNELS,
        growth=GROWTH,
        factors=factors,
        bottlenecks=factors,
        n_classes=3,
    )  # fmt: skip
    plan, behind = walked(layers, len(factors), CHANNELS, GROWTH)
    actual = modules_of(net, MultiScaleLayer)
    assert len(actual) == sum(layers)
    for layer, (with_new, drops, width) in zip(actual, plan, strict=True):
        assert not layer.fused
        assert scales(layer) == with_new == sorted(map(int, layer.own))
        assert sorted(map(int, layer.down)) == (with_new if drops else with_new[1:])
        for s in with_new:
            assert layer.own[str(s)][0].conv.in_channels == width * factors[s]
            new = layer.own[str(s)][1].conv.out_channels
            if str(s) in layer.down:
                finer = layer.down[str(s)]
                assert finer[0].conv.in_channels == width * factors[s - 1]
                assert finer[1].conv.stride == (2, 2)
                assert finer[1].conv.out_channels == new
                new *= 2
            assert new == GROWTH * factors[s]
    read = [head.convolutions[0].conv.in_channels for head in net.heads]
    assert read == [width * factors[-1] for width in behind]
    assert len(modules_of(net, PerScale)) == sum(drops for _, drops, _ in plan)


def test_where_a_scale_is_dropped_maps_are_halved_in_channels_and_otherwise_they_only_grow():
    net, carried = small("msdnet"), torch.from_numpy(images()[0][:3])
    with torch.no_grad():
        for stage in net.stages:
            for module in stage:
                before, carried = carried, module(carried)
                if isinstance(module, MultiScaleLayer):
                    for old, new in zip(before, carried, strict=True):
                        assert new is None or torch.equal(new[:, : old.shape[1]], old)
                elif isinstance(module, PerScale):
                    for old, new in zip(before, carried, strict=True):
                        assert (old is None) == (new is None)
                        assert old is None or new.shape[1] == old.shape[1] // 2


def test_without_reduction_nothing_stands_between_layers():
    assert modules_of(on_meta(small_msdnet), PerScale)
    assert not modules_of(on_meta(small_msdnet, reduction=1.0), PerScale)


def test_without_fusion_a_coarser_map_sees_a_change_one_layer_later():
    """In layer 1 the new finest map is made; the coarsest one hears of it in layer 3."""
    net = seeded(lambda: MSDNet([3, 6], 4, 2, FACTORS, FACTORS, n_classes=2, in_channels=1, image_size=16)).eval()
    pyramid, *layers = net.stages[0]
    x, moments = torch.from_numpy(images()[0][:2]), []
    with torch.no_grad():
        for changed in (False, True):
            if changed:
                layers[0].own["0"][1].bn.bias.add_(1.0)
            carried = pyramid(x)
            row = []
            for layer in layers:
                carried = layer(carried)
                row.append(carried)
            moments.append(row)
    heard = [[not torch.equal(*pair) for pair in zip(*maps, strict=True)] for maps in zip(*moments, strict=True)]
    assert heard == [[True, False, False], [True, True, False], [True, True, True]]


def test_stems():
    cifar, imagenet = on_meta(small_msdnet), on_meta(msdnet_imagenet)
    for net, first in ((cifar, ConvNormAct), (imagenet, nn.Sequential)):
        pyramid = net.stages[0][0]
        assert isinstance(pyramid, Pyramid)
        assert isinstance(pyramid.scales[0], first)
    with torch.no_grad():
        assert [x.shape[2] for x in cifar.stages[0][0](torch.empty(1, 1, 16, 16, device="meta"))] == [16, 8, 4]
        assert [x.shape[2] for x in imagenet.stages[0][0](torch.empty(1, 3, 224, 224, device="meta"))] == [
            56,
            28,
            14,
            7,
        ]


def test_classifiers_are_narrow_or_as_wide_as_what_they_read():
    for narrow, width in ((True, 128), (False, 20)):
        head = classifier(20, 3, narrow)
        assert [part.conv.out_channels for part in head.convolutions] == [width] * 2
        assert [part.conv.stride for part in head.convolutions] == [(2, 2)] * 2
        assert head.linear.in_features == width
    assert [head.linear.in_features for head in on_meta(msdnet_imagenet).heads] == [384, 384, 352, 304, 560]
