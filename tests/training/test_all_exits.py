import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adaptexit import JointRecipe, MultiExitClassifier
from adaptexit.networks.branched import BranchedNetwork
from adaptexit.networks.build import new_network
from adaptexit.networks.models import TorchModel
from adaptexit.networks.native import NativeNetwork
from adaptexit.training.all_exits import all_exits
from tests.nets import EXITS, AddingHead, branched_net, branched_trained, digits, flat_head, native_net

X = torch.from_numpy(digits()[2][0][:12])


def network(head=flat_head, net=None, exits=EXITS):
    model = TorchModel(branched_trained() if net is None else net, None, "backbone")
    return new_network(model, exits, head, None, X, 10, 0)


def answers_of(net, x):
    """Logits of every exit, one exit after the other."""
    carried, answers = x, []
    for k in range(net.n_exits):
        carried = net.advance(carried, k - 1, k)
        answer, carried = net.read(k, carried, logits=True)
        answers.append(torch.as_tensor(answer.logits))
    return answers


class Resized(nn.Module):
    """In-place layers behind the cuts, and dropout in the forward of the model itself."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.rectify = nn.ReLU(inplace=True)
        self.out = nn.Linear(8, 10)

    def forward(self, x):
        x = self.rectify(self.one(x))
        x = self.rectify(self.two(x))
        return self.out(F.dropout(x.mean((2, 3)), 0.5, self.training))


def test_heads_of_a_network_in_half_precision_read_their_own():
    net = network("mlp", Resized().bfloat16().eval(), ["one", "two"])
    answers = all_exits(net)(X.bfloat16())
    assert [logits.dtype for logits in answers] == [torch.float32, torch.float32, torch.bfloat16]
    sum(logits.float().sum() for logits in answers).backward()
    assert net.model.module.one.weight.grad is not None


def stages_given():
    return nn.Sequential(*branched_trained().children())


@pytest.mark.parametrize("head", [flat_head, AddingHead, "residual", "mlp"])
def test_the_answers_are_the_networks_own(head):
    net = network(head)
    for module in net.modules:
        module.eval()
    with torch.no_grad():
        actual, expected = all_exits(net)(X), answers_of(net, X)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_same_of_a_network_built_with_exits_and_of_stages_that_were_given():
    for model in (native_net(), stages_given()):
        native = hasattr(model, "heads")
        net = NativeNetwork(TorchModel(model.eval(), None, "")) if native else network("mlp", model, None)
        with torch.no_grad():
            for module in net.modules:
                module.eval()
            for one, other in zip(all_exits(net)(X), answers_of(net, X), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_models_own_forward_runs_in_training_with_its_dropout():
    net = network(net=Resized().eval(), exits=["one", "two"])
    exits = all_exits(net)
    exits.train()
    torch.manual_seed(0)
    first = exits(X)
    assert not torch.equal(first[-1], exits(X)[-1])
    torch.testing.assert_close(first[0], exits(X)[0])  # no dropout before the first cut


def test_features_that_layers_behind_the_cut_write_into_can_be_learned_from():
    net = network(net=Resized().eval(), exits=["one", "two"])
    exits = all_exits(net).train()
    sum(logits.square().mean() for logits in exits(X)).backward()
    assert all(p.grad is not None and p.grad.any() for p in exits.parameters())
    with torch.no_grad():
        exits.eval()
        torch.testing.assert_close(exits(X)[0], answers_of(net, X)[0], rtol=1e-5, atol=1e-5)


class Skipping(nn.Module):
    """Passes its second layer twice, or not at all, in training."""

    def __init__(self, times):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.out, self.times = nn.Linear(4, 10), times

    def forward(self, x):
        x = self.one(x)
        for _ in range(self.times if self.training else 1):
            x = self.two(x)
        return self.out(x)


@pytest.mark.parametrize("times", [0, 2])
def test_layers_that_training_skips_or_repeats_are_named(times):
    model = TorchModel(Skipping(times).eval(), None, "backbone")
    net = new_network(model, ["one", "two"], "mlp", None, torch.rand(8, 4), 10, 0)
    with pytest.raises(
        ValueError, match=f"must pass each of its 2 cuts once in training mode, too; it passed {1 + times}"
    ):
        all_exits(net).train()(torch.rand(8, 4))


def test_no_hook_is_left_behind_even_after_an_error():
    net = network()
    exits = all_exits(net)
    exits(X)
    with pytest.raises(RuntimeError):
        exits(X[:, :, 0])
    assert not any(part._forward_hooks for part in net.model.module.modules())


def test_chained_heads_pass_no_gradient_to_those_before_them():
    exits = all_exits(network(AddingHead))
    exits(X)[1].sum().backward()
    first, second, _ = exits.heads
    assert first.linear.weight.grad is None
    assert second.linear.weight.grad.any()


def gradients_of(net, rescale, losses):
    exits = all_exits(net, rescale).eval()
    exits.zero_grad()
    losses(exits(X)).backward()
    return [copy.deepcopy(p.grad) for p in net.model.module.parameters()]


class Overwriting(nn.Module):
    """A network built with exits, whose second stage writes into what it reads."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            [nn.Conv2d(1, 8, 3, padding=1), nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1))]
        )
        self.heads = nn.ModuleList(
            [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)) for _ in range(2)]
        )


def networks():
    return {
        "branched": network(),
        "branched, written into": network(net=Resized().eval(), exits=["one", "two"]),
        "native": NativeNetwork(TorchModel(native_net().eval(), None, "")),
        "native, written into": NativeNetwork(TorchModel(Overwriting().eval(), None, "")),
    }


@pytest.mark.parametrize("kind", networks())
def test_rescaled_gradients_are_the_shares_of_the_paper(kind):
    """Of K exits, the part of exit k in the layers before it is 1/(K-k) times prod_{j<k} (K-j-1)/(K-j) = 1/K."""
    net = networks()[kind]
    n = net.n_exits
    stem = 0  # the first convolution lies before every exit
    together = gradients_of(net, True, lambda answers: sum(logits.square().mean() for logits in answers))[stem]
    plain = gradients_of(net, False, lambda answers: sum(logits.square().mean() for logits in answers))[stem]
    torch.testing.assert_close(together, plain / n, rtol=1e-4, atol=1e-7)


def test_a_network_that_was_moved_after_it_was_cut_is_looked_at_where_it_is():
    net = network("mlp", Resized().eval(), ["one", "two"])
    for module in net.modules:
        module.to("meta")
    net.model._like = net.model.module.one.weight  # "meta" alone makes new parameters
    assert all_exits(net)(X.to("meta"))[-1].device.type == "meta"


def test_rescaling_changes_no_answer():
    net = network()
    with torch.no_grad():
        for one, other in zip(all_exits(net, True).eval()(X), all_exits(net).eval()(X), strict=True):
            assert torch.equal(one, other)


def test_boosted_heads_learn_what_earlier_ones_leave_over():
    model = MultiExitClassifier(branched_net(), EXITS, head=flat_head, recipe=JointRecipe.boostnet(epochs=1))
    net = network(model._head())
    assert isinstance(net, BranchedNetwork)
    one, two, *_ = all_exits(net).eval()(X)
    features = []
    with torch.no_grad():
        net.split.visit(X, lambda k, feature: features.append(feature))
        own = net.early[1].inner(features[1]).logits
    torch.testing.assert_close(two, own + 0.5 * one, rtol=1e-5, atol=1e-5)
