import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adaptexit import CascadeSaver, EMRouter
from adaptexit.networks.models import build_model
from adaptexit.networks.penultimate import with_penultimate
from tests.contract.cases import CASES, fitted_once, quietly
from tests.nets import digits, large_trained, small_trained

VAL, TEST = digits()[1:]
X = torch.from_numpy(TEST[0][:7])


def test_it_is_what_the_last_linear_layer_reads():
    net = large_trained()
    with torch.inference_mode():
        logits, vectors = with_penultimate(net, X)
        assert torch.equal(logits, net(X))
        assert torch.equal(vectors, net[:-1](X))
    assert vectors.shape == (7, 128)


def test_the_last_of_several_counts_by_whatever_name_it_is_called():
    first, last = nn.Linear(4, 3), nn.Linear(3, 2)
    x = torch.randn(5, 4)
    for call in (
        lambda x: last(first(x).relu()),
        lambda x: F.linear(first(x).relu(), last.weight),
        lambda x: F.linear(input=first(x).relu(), weight=last.weight, bias=last.bias),
    ):
        assert torch.equal(with_penultimate(call, x)[1], first(x).relu())


class AllConvolutions(nn.Module):
    """No linear layer at all."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())

    def forward(self, x):
        return self.net(x)


def test_without_a_linear_layer_there_is_none():
    net = AllConvolutions().eval()
    assert with_penultimate(net, X)[1] is None
    with torch.inference_mode():
        answer, _ = build_model(net, None, "base").read(0, X, logits=False, features=True)
    assert answer.features is None
    assert answer.predictions.tolist() == net(X).argmax(1).tolist()


class ByPosition(nn.Module):
    """Answers at every position with one linear layer, on all positions of all samples as rows, and takes the mean."""

    def __init__(self, flat):
        super().__init__()
        self.out, self.flat = nn.Linear(8, 10), flat

    def forward(self, x):
        rows = x[:, 0]
        logits = self.out(rows.reshape(-1, 8)).view(len(x), 8, 10) if self.flat else self.out(rows)
        return logits.mean(dim=1)


@pytest.mark.parametrize(
    "flat",
    [
        False,
        True,
    ],
)
def test_a_layer_that_reads_positions_reads_no_samples(flat):
    net = ByPosition(flat).eval()
    with torch.inference_mode():
        answer, _ = build_model(net, None, "base").read(0, X, logits=False, features=True)
    assert answer.features is None


def test_nothing_is_left_on_the_modules_and_another_thread_sees_nothing():
    net, other = large_trained(), small_trained()
    before = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in net.modules()]
    inside, go_on = threading.Event(), threading.Event()

    def waiting(x):
        inside.set()
        go_on.wait(10)
        return net(x)

    vectors = []
    thread = threading.Thread(target=lambda: vectors.append(with_penultimate(waiting, X)[1]))
    thread.start()
    assert inside.wait(10)
    with torch.inference_mode():
        other(X)  # while the other thread is watching
    go_on.set()
    thread.join()
    assert vectors[0].shape == (7, 128)
    assert [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in net.modules()] == before


def test_threads_watch_each_for_themselves():
    nets = [large_trained(), small_trained()]
    expected = [net[:-1](X).detach() for net in nets]
    watches, barrier = {}, threading.Barrier(2)

    def watch(k):
        def run(x):
            barrier.wait()
            return nets[k](x)

        watches[k] = [with_penultimate(run, X)[1] for _ in range(5)]

    threads = [threading.Thread(target=watch, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        assert all(torch.equal(vectors, expected[k]) for vectors in watches[k])


# -- routers read it --------------------------------------------------------------------------------------------------


def test_features_of_a_cascade_are_those_of_its_models():
    case, model = CASES["EM routers"], fitted_once("EM routers")
    features = model.record(*case.test).features
    with torch.inference_mode():
        for net, vectors in zip((model.saver, model.base), features, strict=True):
            np.testing.assert_allclose(vectors, net[:-1](torch.from_numpy(case.test[0])), rtol=1e-5, atol=1e-6)
    assert model.calibrator_._reads_logits is False
    assert [len(router.mean) for router in model.calibrator_.routers_] == [64]
    assert not model.at().policy.needs_logits


def test_routers_of_a_model_without_a_linear_layer_read_its_logits():
    router = EMRouter(prior="global", epochs=2, hidden=4, n_points=5)
    cascade = quietly(lambda: CascadeSaver(large_trained(), AllConvolutions().eval(), calibrator=router).fit(*VAL))
    assert cascade.calibrator_._reads_logits is True
    assert [len(module.mean) for module in cascade.calibrator_.routers_] == [10]
    exits = cascade.trace(TEST[0], budget=1.0).exits
    assert (
        exits.tolist() == cascade.calibrator_.exit_index(cascade.record(*TEST), cascade.operating_point(1.0)).tolist()
    )
