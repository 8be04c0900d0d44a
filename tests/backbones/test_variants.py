"""The networks that have names, against what was published or is promised of them."""

import pytest
import torch
from torch.nn import functional as F

from adaptexit import backbones
from adaptexit.backbones import (
    NAMED,
    chase_cifar,
    chase_imagenet,
    fusion_stem_cifar,
    msdnet_cifar_anytime,
    msdnet_cifar_budgeted,
    msdnet_imagenet,
    ranet_cifar,
)
from tests.backbones.small_networks import n_parameters, naive_exit_macs, on_meta, seeded

CIFAR = [chase_cifar, fusion_stem_cifar, msdnet_cifar_anytime, msdnet_cifar_budgeted, ranet_cifar]
IMAGENET = [chase_imagenet, msdnet_imagenet]
N_EXITS = {
    chase_cifar: 6, fusion_stem_cifar: 6, msdnet_cifar_anytime: 7, msdnet_cifar_budgeted: 5, ranet_cifar: 8,
    chase_imagenet: 8, msdnet_imagenet: 5,
}  # fmt: skip
PUBLISHED = {
    msdnet_cifar_anytime: ([15.0, 25.3, 36.8, 46.0, 56.9, 66.5, 75.5], 3.07),
    msdnet_cifar_budgeted: ([6.8, 14.2, 27.3, 41.4, 58.1], 2.08),
    msdnet_imagenet: ([337, 682, 1004, 1250, 1356], 24.0),
    ranet_cifar: ([15.7, 31.2, 44.5, 50.2, 60.4, 63.4, 89.6, 94.3], 3.35),
}
"""Millions of MACs by exit and of parameters, with 100 classes (1,000 for ImageNet), as the authors' programs count."""


@pytest.fixture(scope="module")
def cifar():
    """CIFAR's networks for 100 classes, as on the CPU nothing takes long to count; tests only ask them questions."""
    networks = {factory: seeded(factory, n_classes=100).eval() for factory in CIFAR}
    return networks | {factory: on_meta(factory) for factory in IMAGENET}


def millions(net, name="macs"):
    return [info[name] / 1e6 for info in net.exit_info]


def by_name(factory):
    return factory.__name__


def test_names_are_those_of_the_factories():
    assert set(NAMED) == {factory.__name__ for factory in N_EXITS}
    assert all(getattr(backbones, name) is factory for name, factory in NAMED.items())
    assert set(NAMED) <= set(backbones.__all__)
    assert all(hasattr(backbones, name) for name in backbones.__all__)


@pytest.mark.parametrize("factory", N_EXITS, ids=by_name)
def test_every_exit_answers(cifar, factory):
    net = cifar[factory]
    x = torch.randn(2, *net.input_size, device=next(net.parameters()).device)
    with torch.no_grad():
        logits = net(x)
    assert [tuple(answer.shape) for answer in logits] == [(2, 100 if factory in CIFAR else 1000)] * N_EXITS[factory]
    assert net.input_size == ((3, 32, 32) if factory in CIFAR else (3, 224, 224))


@pytest.mark.parametrize("factory", CIFAR, ids=by_name)
def test_other_sizes_of_images_are_taken(cifar, factory):
    with torch.no_grad():
        for size in ((24, 40), (48, 48)):
            assert {answer.shape for answer in cifar[factory](torch.randn(1, 3, *size))} == {(1, 100)}


@pytest.mark.parametrize("factory", [*CIFAR, *(pytest.param(f, marks=pytest.mark.slow) for f in IMAGENET)], ids=by_name)
def test_other_images_and_classes(factory):
    net = on_meta(factory, n_classes=4, in_channels=1)
    assert net.input_size[0] == 1
    assert {head.linear.out_features for head in net.heads} == {4}
    with torch.no_grad():
        assert net.heads[0](net.stages[0](torch.empty(2, *net.input_size, device="meta"))).shape == (2, 4)


@pytest.mark.parametrize("factory", PUBLISHED, ids=by_name)
def test_multiply_accumulates_and_parameters_are_the_published_ones(cifar, factory):
    net, (macs, parameters) = cifar[factory], PUBLISHED[factory]
    assert millions(net) == pytest.approx(macs, rel=0.01)
    assert n_parameters(net) / 1e6 == pytest.approx(parameters, rel=0.01)


def test_exits_alone_cost_less(cifar):
    alone = millions(cifar[msdnet_cifar_anytime], "macs_alone")
    assert alone == pytest.approx([15.0, 21.7, 28.8, 34.8, 41.7, 46.3, 51.9], rel=0.01)


def test_the_fusion_stem_network_ends_15_percent_below_msdnet_and_32_below_ranet(cifar):
    macs = millions(cifar[fusion_stem_cifar])
    assert macs[-1] == pytest.approx(64.1, rel=0.03)
    assert macs[-1] < 0.85 * millions(cifar[msdnet_cifar_anytime])[-1]
    assert macs[-1] == pytest.approx(0.68 * millions(cifar[ranet_cifar])[-1], rel=0.03)
    assert macs[0] == pytest.approx(10, rel=0.1)


def test_chase_ends_15_percent_below_msdnet(cifar):
    macs = millions(cifar[chase_cifar])
    assert macs[-1] < 0.85 * 75.5
    assert 10 <= macs[0] < 15


def test_chase_on_imagenet_costs_what_was_published(cifar):
    macs = millions(cifar[chase_imagenet])
    assert [macs[0], *macs[-2:]] == pytest.approx([300, 2150, 2600], rel=0.05)


@pytest.mark.parametrize(
    ("factory", "first", "last", "parameters"),
    [
        (chase_cifar, 13, 63, 3.7), (chase_imagenet, 300, 2500, 59), (fusion_stem_cifar, 10, 64, 4.4),
        (msdnet_cifar_anytime, 15, 75, 3.1), (msdnet_cifar_budgeted, 7, 58, 2.1), (msdnet_imagenet, 300, 1400, 24),
        (ranet_cifar, 16, 94, 3.3),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_docstrings_tell_rounded_figures(cifar, factory, first, last, parameters):
    net = cifar[factory]
    assert [millions(net)[0], millions(net)[-1]] == pytest.approx([first, last], rel=0.13)
    assert n_parameters(net) / 1e6 == pytest.approx(parameters, rel=0.02)


@pytest.mark.parametrize("factory", N_EXITS, ids=by_name)
def test_costs_rise_and_are_what_formulas_give(cifar, factory):
    net = cifar[factory]
    behind, alone = naive_exit_macs(net)
    assert [info["macs"] for info in net.exit_info] == behind
    assert [info["macs_alone"] for info in net.exit_info] == alone
    assert sorted(set(behind)) == behind
    assert sorted(set(alone)) == alone


@pytest.mark.parametrize("factory", N_EXITS, ids=by_name)
def test_classifiers_read_the_coarsest_map(cifar, factory):
    pixels = {chase_cifar: 4, fusion_stem_cifar: 4, chase_imagenet: 7, msdnet_imagenet: 7}.get(factory, 8)
    assert {info["resolution"] for info in cifar[factory].exit_info} == {(pixels, pixels)}


@pytest.mark.slow
@pytest.mark.parametrize("factory", CIFAR, ids=by_name)
def test_gradients_reach_every_parameter(factory):
    net = seeded(factory).train()
    sum(F.cross_entropy(logits, torch.arange(2)) for logits in net(torch.randn(2, 3, 32, 32))).backward()
    assert [n for n, parameter in net.named_parameters() if not parameter.grad.abs().max() > 0] == []
