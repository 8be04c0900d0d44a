import pytest
import torch
from timm.layers import Attention, SEModule
from torch import nn
from torch.nn import functional as F

from adaptexit.backbones import CHASE, chase_cifar, chase_imagenet
from adaptexit.backbones.chase import GlobalAttention
from adaptexit.backbones.multi_scale import MultiScaleLayer, PerScale
from adaptexit.staging.cost import counted_macs
from tests.backbones.small_networks import images, made, naive_macs, on_meta, seeded, small, small_chase
from tests.backbones.test_fusion_stem import positions, walked


def convolutions(net):
    """{(block, layer, kind, scale): module} of all layers, blocks and layers counted from 1."""
    depth = sum(isinstance(module, MultiScaleLayer) for stage in net.stages for module in stage) // 3
    places, n = {}, 0
    for stage in net.stages:
        for module in stage:
            if isinstance(module, MultiScaleLayer):
                for kind in ("own", "down"):
                    for scale, part in getattr(module, kind).items():
                        places[n // depth + 1, n % depth + 1, kind, int(scale)] = part
                n += 1
    return places


def attended(net):
    return {place for place, part in convolutions(net).items() if isinstance(part, GlobalAttention)}


def weighed(net):
    """Where channels are weighed before a convolution."""
    return {
        place
        for place, part in convolutions(net).items()
        if any(isinstance(inner, SEModule) for inner in part.modules())
    }


def on_imagenet(**settings):
    return CHASE((32, 64), 24, (1, 2, 4, 20), (1, 2, 2, 1), 4, 2, classifier_channels=320, image_size=224, **settings)


# -- self-attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("in_channels", "channels", "head_channels", "size"), [(6, 16, 8, 4), (20, 12, 32, 3)])
def test_attention_costs_what_a_formula_gives(in_channels, channels, head_channels, size):
    layer, x = GlobalAttention(in_channels, channels, head_channels).eval(), torch.randn(2, in_channels, size, size)
    n, c = size * size, channels
    by_hand = n * (
        in_channels * c  # projection
        + 9 * c  # positions
        + 3 * c * c  # queries, keys and values
        + n * c  # queries with keys: O((HW)^2 C)
        + n * c  # weights with values
        + c * c  # what the heads say together
        + 2 * c * 4 * c  # perceptron
    )
    assert counted_macs(layer, x)[0] == by_hand
    assert naive_macs(layer, x)[0] == by_hand


def naive_attention(layer, x):
    """By loops over heads, in the order of the docstring."""
    part = layer.attention
    x = layer.project(x)
    n, c, h, w = x.shape
    x = x + layer.position.proj(x)
    x = x.reshape(n, c, h * w).permute(0, 2, 1)
    normed = F.layer_norm(x, (c,), layer.norm1.weight, layer.norm1.bias, layer.norm1.eps)
    q, k, v = (normed @ part.qkv.weight.T + part.qkv.bias).split(c, dim=2)
    width = c // part.num_heads
    mixed = []
    for head in range(part.num_heads):
        rows = slice(head * width, (head + 1) * width)
        weights = (q[:, :, rows] @ k[:, :, rows].transpose(1, 2) / width**0.5).softmax(dim=2)
        mixed.append(weights @ v[:, :, rows])
    x = x + torch.cat(mixed, dim=2) @ part.proj.weight.T + part.proj.bias
    normed = F.layer_norm(x, (c,), layer.norm2.weight, layer.norm2.bias, layer.norm2.eps)
    x = x + layer.mlp.fc2(F.gelu(layer.mlp.fc1(normed)))
    return x.permute(0, 2, 1).reshape(n, c, h, w)


def test_attention_is_what_a_loop_over_heads_gives():
    layer = seeded(lambda: GlobalAttention(6, 16, 8)).eval()
    x = torch.randn(3, 6, 4, 5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), naive_attention(layer, x), rtol=1e-4, atol=1e-5)
        assert layer(x).is_contiguous()
    assert layer.attention.num_heads == 2


def test_every_pixel_hears_of_every_other():
    layer = seeded(lambda: GlobalAttention(6, 16, 8)).eval()
    x = torch.randn(1, 6, 6, 6)
    with torch.no_grad():
        before = layer(x)
        x[:, :, 0, 0] += 1
        assert ((layer(x) - before).abs().amax(dim=1) > 0).all()


def test_positions_matter():
    """Attention alone gives moved pixels moved answers; the depthwise convolution tells where they are."""
    layer = seeded(lambda: GlobalAttention(6, 16, 8)).eval()
    x = torch.randn(1, 6, 4, 4)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    moved = x.flatten(2)[:, :, order].unflatten(2, (4, 4))
    with torch.no_grad():
        assert not torch.allclose(layer(moved), layer(x).flatten(2)[:, :, order].unflatten(2, (4, 4)), atol=1e-4)
        layer.position.proj[0].weight.zero_()
        torch.testing.assert_close(
            layer(moved), layer(x).flatten(2)[:, :, order].unflatten(2, (4, 4)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("channels", "head_channels", "n_heads"), [(64, 32, 2), (36, 32, 1), (8, 32, 1), (240, 32, 6), (480, 32, 15)]
)
def test_heads_are_as_many_as_divide_the_channels(channels, head_channels, n_heads):
    with torch.device("meta"):
        part = GlobalAttention(4, channels, head_channels).attention
    assert isinstance(part, Attention)
    assert part.num_heads == n_heads


@pytest.mark.parametrize("attention_blocks", [0, 1, 2])
def test_attention_stands_on_the_coarsest_map_of_the_last_blocks(attention_blocks):
    net = made(small_chase, attention_blocks=attention_blocks)
    blocks = range(4 - attention_blocks, 4)
    assert attended(net) == {(block, layer, "own", 2) for block in blocks for layer in (1, 2)}


def test_blocks_of_attention_change_nothing_before_them():
    none, one, two = (made(small_chase, attention_blocks=n).exit_info for n in (0, 1, 2))
    costs = [[info["macs"] for info in infos] for infos in (none, one, two)]
    assert costs[0][:2] == costs[1][:2]
    assert costs[0][0] == costs[1][0] == costs[2][0]
    assert costs[0][2] != costs[1][2] != costs[2][2]
    for key in ("num_chs", "resolution"):
        assert [info[key] for info in none] == [info[key] for info in one] == [info[key] for info in two]


@pytest.mark.slow
def test_every_block_of_attention_costs_more_on_imagenet():
    """As in Fig. 5: 2.6 G with one block, more with two, less with none."""
    none, one, two = ([e["macs"] / 1e9 for e in on_meta(on_imagenet, attention_blocks=n).exit_info] for n in (0, 1, 2))
    assert none[:6] == one[:6]
    assert none[:4] == one[:4] == two[:4]
    assert none[-1] < one[-1] < two[-1]


# -- weights of channels -----------------------------------------------------------------------------------------------


def test_channels_are_weighed_before_all_convolutions_some_or_none():
    everywhere, fine, none = (made(small_chase, channel_attention=name) for name in ("all", "fine", None))
    places = set(convolutions(everywhere))
    assert places == set(convolutions(fine)) == set(convolutions(none))
    assert attended(everywhere) == attended(fine) == attended(none)
    assert weighed(none) == set()
    assert weighed(everywhere) == places - attended(everywhere)
    assert weighed(fine) == {place for place in places if not (place[2] == "own" and place[3] == 2)}
    costs = [[info["macs"] for info in net.exit_info] for net in (none, fine, everywhere)]
    assert all(a < b < c for a, b, c in list(zip(*costs, strict=True))[1:])


def test_the_rest_is_the_same_whether_channels_are_weighed_or_not():
    everywhere, none = made(small_chase), made(small_chase, channel_attention=None)

    def shapes(net):
        return sorted(
            tuple(p.shape)
            for part in net.modules()
            if isinstance(part, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))
            for p in part.parameters()
        )

    weights = [part for part in everywhere.modules() if isinstance(part, SEModule)]
    extra = sorted(tuple(p.shape) for part in weights for p in part.parameters())
    assert sorted(shapes(none) + extra) == shapes(everywhere)


def test_a_channels_weight_comes_from_all_means():
    """Fig. 2c: pooling, 1x1 to half the channels, GELU, 1x1, sigmoid, times the map; then the convolution."""
    part = convolutions(small("chase"))[1, 2, "own", 0]
    weigh, convolution = part
    x = torch.randn(2, weigh.fc1.in_channels, 8, 8)
    assert weigh.fc1.out_channels == weigh.fc1.in_channels // 2
    with torch.no_grad():
        means = x.flatten(2).mean(dim=2)
        hidden = F.gelu(means @ weigh.fc1.weight[:, :, 0, 0].T + weigh.fc1.bias)
        weights = torch.sigmoid(hidden @ weigh.fc2.weight[:, :, 0, 0].T + weigh.fc2.bias)
        torch.testing.assert_close(part(x), convolution(x * weights[:, :, None, None]), rtol=1e-4, atol=1e-5)


# -- the network -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "exit_every"), [(2, 2), (3, 2), (2, 5)])
def test_exits_are_where_a_walk_comes_by_and_read_what_was_added_last(depth, exit_every):
    net = made(small_chase, depth=depth, exit_every=exit_every)
    where, read = walked(3, depth, exit_every, whole=False, growth=4 * 4)
    assert positions(net.stages, depth) == where
    assert [head.reads for head in net.heads] == read
    assert [head.convolutions[0].conv.in_channels for head in net.heads] == read


@pytest.mark.parametrize(
    ("factory", "places"),
    [
        (chase_cifar, [(1, 3), (2, 0), (2, 3), (3, 0), (3, 3), (3, 6)]),
        (chase_imagenet, [(1, 2), (2, 0), (2, 2), (3, 0), (3, 2), (4, 0), (4, 2), (4, 4)]),
    ],
)
def test_positions_of_the_named_ones(factory, places):
    net = on_meta(factory)
    assert positions(net.stages, 6 if factory is chase_cifar else 4) == places
    assert len(net.heads) == len(places)


def test_transitions_halve_what_the_last_layer_added():
    carried = torch.from_numpy(images()[0][:2])
    with torch.no_grad():
        *layers, transition = small("chase").stages[0]
        for layer in layers:
            before = carried
            carried = layer(carried)
        after = transition(carried)
    assert isinstance(transition, PerScale)
    for s in (1, 2):
        new = carried[s][:, before[s].shape[1] :]
        assert after[s].shape[1] == new.shape[1] // 2
        with torch.no_grad():
            assert torch.equal(after[s], transition.scales[str(s)].module(new))


def test_activations_are_smooth_everywhere():
    assert not any(isinstance(part, nn.ReLU) for part in small("chase").modules())


def test_large_images_are_halved_by_the_first_convolution():
    for factory, stride in ((small_chase, 1), (on_imagenet, 2)):
        assert on_meta(factory).stages[0][0].module.conv1.conv.stride == (stride, stride)


@pytest.mark.parametrize("settings", [{"channel_attention": None}, {"attention_blocks": 2}, {"attention_blocks": 0}])
def test_every_parameter_learns_with_a_switch_turned(settings):
    net = seeded(small_chase, **settings).train()
    sum(logits.square().sum() for logits in net(torch.from_numpy(images()[0][:6]))).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
