"""Small relatives of the networks that are built with exits, and oracles for them."""

from functools import cache

import numpy as np
import torch
from timm.layers import Attention
from torch import nn

from adaptexit.backbones import CHASE, FusionStem, MSDNet, RANet
from tests.nets import digits


def small_msdnet(**settings):
    settings = {"n_classes": 10, "in_channels": 1, "image_size": 16} | settings
    return MSDNet([2, 1, 2], 8, 4, (1, 2, 4), (1, 2, 4), **settings)


def small_ranet(**settings):
    """Sub-networks of 1, 2, 3 and 4 blocks; the second halves once, the third and fourth twice."""
    settings = {"channels": 8, "growth": 4, "n_blocks": 1, "more_blocks": 1, "depth": 2} | settings
    settings = {"in_channels": 1, "image_size": 16} | settings
    return RANet((1, 2, 3, 3), (4, 2, 1, 1), (4, 2, 1, 1), **settings)


def small_fusion_stem(**settings):
    settings = {"depth": 2, "exit_every": 2, "in_channels": 1, "image_size": 16} | settings
    return FusionStem((6, 8), 4, (1, 2, 4), (1, 2, 4), **settings)


def small_chase(**settings):
    settings = {"depth": 2, "exit_every": 2, "in_channels": 1, "image_size": 16} | settings
    settings = {"head_channels": 8, "classifier_channels": 16} | settings
    return CHASE((6, 8), 4, (1, 2, 4), (1, 2, 4), **settings)


SMALL = {"msdnet": small_msdnet, "ranet": small_ranet, "fusion_stem": small_fusion_stem, "chase": small_chase}


@cache
def images():
    """Digits of 16 pixels, (600, 1, 16, 16), and their labels."""
    X, y = digits()[0]
    return np.repeat(np.repeat(X, 2, axis=2), 2, axis=3), y


def with_statistics(net, x):
    """A network in evaluation mode whose batch statistics are those of some images, so that they matter."""
    net.train()
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = None
        net(x)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 0.1
    return net.eval()


def seeded(factory, seed=0, **settings):
    """What a factory makes from a seed; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory(**settings)


@cache
def small(name):
    """A small network by name; tests only ask it questions."""
    return with_statistics(seeded(SMALL[name]), torch.from_numpy(images()[0][:64]))


@cache
def on_meta(factory, **settings):
    """A network without weights, for shapes and the counts of large ones."""
    with torch.device("meta"):
        return factory(**settings).eval()


@cache
def made(factory, **settings):
    """A small network as it was made, on the CPU, where counting is faster; tests only ask it questions."""
    return seeded(factory, **settings).eval()


def n_parameters(net):
    return sum(parameter.numel() for parameter in net.parameters())


def naive_macs(module, carried):
    """Multiply-accumulates of a module on one sample, by formulas for convolutions, linear layers and attention."""
    total = 0

    def convolved(part, inputs, output):
        nonlocal total
        total += output[0].numel() * part.weight[0].numel()

    def mapped(part, inputs, output):
        nonlocal total
        total += output[0].numel() * part.in_features

    def attended(part, inputs, output):
        nonlocal total
        _, n_tokens, channels = inputs[0].shape
        total += 2 * n_tokens**2 * channels  # queries with keys, and the weights with values; the rest is linear

    kinds = {nn.Conv2d: convolved, nn.Linear: mapped, Attention: attended}
    hooks = [
        part.register_forward_hook(count)
        for part in module.modules()
        for kind, count in kinds.items()
        if isinstance(part, kind)
    ]
    with torch.no_grad():
        output = module(carried)
    for hook in hooks:
        hook.remove()
    return total, output


def naive_exit_macs(net):
    """What :attr:`exit_info` has as macs and macs_alone, by :func:`naive_macs`."""
    carried = torch.zeros(1, *net.input_size, device=next(net.parameters()).device)
    behind, alone, stages, heads = [], [], 0, 0
    for stage, head in zip(net.stages, net.heads, strict=True):
        count, carried = naive_macs(stage, carried)
        head_count, _ = naive_macs(head, carried)
        stages, heads = stages + count, heads + head_count
        behind.append(stages + heads)
        alone.append(stages + head_count)
    return behind, alone
