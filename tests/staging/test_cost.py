import time

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.backends import mha

from adaptexit.backbones import resnet8_cifar, resnet20_cifar, resnet56_cifar
from adaptexit.staging.cost import count_macs, measure_latency


class SelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("net", "shape", "macs"),
    [
        (nn.Linear(7, 5), (7,), 7 * 5),
        (nn.Linear(7, 5), (4, 7), 4 * 7 * 5),
        (nn.Conv2d(3, 8, 3, padding=1), (3, 6, 5), 3 * 8 * 9 * 6 * 5),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), (4, 6, 6), 4 * 8 * 9 // 2 * 3 * 3),
        (nn.Conv2d(6, 6, 3, groups=6), (6, 5, 5), 6 * 9 * 3 * 3),
        (nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), (2, 2, 2), 8 * 4 + 4 * 2),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)), (3, 4, 4), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_macs_by_formula(net, shape, macs, batch):
    assert count_macs(net.eval(), torch.zeros(batch, *shape)) == macs


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
def test_macs_of_attention_are_counted_in_every_mode(inference, trainable):
    width, heads, tokens = 16, 4, 10
    net = SelfAttention(width, heads).eval().requires_grad_(trainable)
    with torch.inference_mode(inference):
        macs = count_macs(net, torch.zeros(2, tokens, width))
    projections, mixing = 4 * tokens * width * width, 2 * tokens * tokens * width
    assert macs == projections + mixing


@pytest.mark.parametrize("trainable", [True, False])
def test_macs_of_an_encoder_layer(trainable):
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=40, batch_first=True).eval().requires_grad_(trainable)
    macs = count_macs(layer, torch.zeros(1, 10, 16))
    assert macs == 4 * 10 * 16 * 16 + 2 * 10 * 10 * 16 + 2 * 10 * 16 * 40


@pytest.mark.parametrize("enabled", [True, False])
def test_the_fused_path_is_given_back_as_it_was(enabled):
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(enabled)
    try:
        count_macs(nn.Linear(2, 2), torch.zeros(1, 2))
        assert mha.get_fastpath_enabled() is enabled
        with pytest.raises(RuntimeError):
            count_macs(nn.Linear(2, 2), torch.zeros(1, 3))
        assert mha.get_fastpath_enabled() is enabled
    finally:
        mha.set_fastpath_enabled(before)


def test_counting_leaves_no_gradients():
    net = nn.Linear(2, 2)
    count_macs(net, torch.zeros(1, 2))
    assert net.weight.grad is None
    assert torch.is_grad_enabled()


def test_macs_of_resnet18():
    net = torchvision.models.resnet18(weights=None).eval()
    assert count_macs(net, torch.zeros(1, 3, 224, 224)) == pytest.approx(1.81e9, rel=0.005)


@pytest.mark.parametrize(
    ("factory", "n", "million"), [(resnet8_cifar, 1, 12), (resnet20_cifar, 3, 41), (resnet56_cifar, 9, 126)]
)
def test_macs_of_the_cifar_resnets(factory, n, million):
    same, narrowing = 16 * 16 * 9 * 32 * 32, 16 * 32 * 9 * 16 * 16
    expected = 3 * 16 * 9 * 32 * 32 + 2 * n * same + 2 * (narrowing + (2 * n - 1) * same) + 64 * 10
    macs = count_macs(factory().eval(), torch.zeros(2, 3, 32, 32))
    assert macs == expected == pytest.approx(million * 1e6, rel=0.03)


def test_latency_is_seconds_a_sample():
    small, large = nn.Linear(256, 1), nn.Sequential(*(nn.Linear(256, 256) for _ in range(40)))
    x = torch.zeros(64, 256)
    quick, slow = (measure_latency(net, x, min_seconds=0.01) for net in (small, large))
    assert 0 < quick < slow / 3
    assert slow < 0.01


def test_latency_is_divided_by_the_batch():
    alone, together = (
        measure_latency(lambda x: time.sleep(0.005), torch.zeros(n, 1), min_seconds=0.05) for n in (1, 100)
    )
    assert alone / together == pytest.approx(100, rel=0.5)


class Token(nn.Module):
    """Passes a view of a parameter, a token a sample, through ``calls`` calls of one layer."""

    def __init__(self, calls):
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 3, 4))
        self.layer = nn.Linear(4, 4)
        self.calls = calls

    def forward(self, x):
        token = self.token.expand(len(x), -1, -1)
        for _ in range(self.calls):
            token = self.layer(token)
        return token + x


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("calls", [1, 2])
def test_macs_where_a_module_is_given_a_view_of_a_parameter(calls, trainable, inference):
    net = Token(calls).eval().requires_grad_(trainable)
    with torch.inference_mode(inference):
        macs = count_macs(net, torch.zeros(2, 3, 4))
    assert macs == calls * 3 * 4 * 4
    assert net.token.grad is None
    assert net.layer.weight.grad is None
    assert torch.is_grad_enabled()


def test_macs_of_a_transformer_with_class_attention():
    net = timm.create_model("cait_xxs24_224", img_size=16).eval()
    x = torch.zeros(2, 3, 16, 16)
    with_gradients, without_gradients = count_macs(net, x), count_macs(net.requires_grad_(False), x)
    n_weights = sum(p.numel() for p in net.parameters() if p.ndim == 2)
    assert with_gradients == without_gradients > n_weights - net.head.weight.numel()


def test_an_assertion_of_the_model_itself_is_not_hidden():
    def picky(x):
        assert len(x) == 2, "two at a time"
        return x

    assert count_macs(picky, torch.zeros(2, 1)) == 0
    with pytest.raises(AssertionError, match="two at a time"):
        count_macs(picky, torch.zeros(3, 1))
