import copy

import pytest
import torch
from torch import nn

from adaptexit.training.averages import average_of, take_statistics_anew


class Indexed(nn.Module):
    """A weight, and indices in a buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("index", torch.arange(100_000))


@pytest.mark.parametrize("averaging", ["ema", "swa"])
@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_integers_are_not_averaged(averaging, decay):
    module = Indexed()
    average = average_of(module, averaging, decay)
    for step in range(20):
        module.weight.data.fill_(float(step))
        average.update_parameters(module)
    assert torch.equal(average.module.index, module.index)
    mean = sum(range(20)) / 20
    if averaging == "swa":
        torch.testing.assert_close(average.module.weight.data, torch.full((2,), mean))
    else:
        expected = 0.0
        for step in range(1, 20):
            expected = decay * expected + (1 - decay) * step
        torch.testing.assert_close(average.module.weight.data, torch.full((2,), expected))


def test_nothing_is_averaged_where_nothing_is_asked_for():
    assert average_of(Indexed(), None, 0.9) is None


def test_statistics_are_those_of_the_batches_in_layers_that_are_training():
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    net(torch.randn(5, 3))
    net[2].eval()
    before = copy.deepcopy(net.state_dict())
    batches = [torch.randn(8, 3) + 2, torch.randn(8, 3) - 1]
    take_statistics_anew(net, batches)
    torch.testing.assert_close(net[0].running_mean, torch.stack([x.mean(0) for x in batches]).mean(0))
    torch.testing.assert_close(net[0].running_var, torch.stack([x.var(0) for x in batches]).mean(0))
    assert net[0].momentum == 0.1
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("0."))
