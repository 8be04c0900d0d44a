"""Models that are moved or converted after a fit: data follow them."""

import numpy as np
import pytest
import torch
from torch import nn

from adaptexit import MultiExitClassifier
from tests.contract.cases import CASES, IMAGES, quietly
from tests.nets import QUICK, branched_trained, digits

TRAIN, VAL, TEST = digits()


@pytest.fixture(params=[*IMAGES, "EM routers", "ztw", "boostnet", "stages"])
def name(request):
    return request.param


def modules_of(model):
    return [*model.stages_, *model.heads_]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_is_read_when_it_is_used(case, own, dtype):
    X = case.test[0][:100]
    before = own.trace(X)
    for module in modules_of(own):
        module.to(dtype)
    after = own.trace(X)
    for budget in (None, 1.0):
        assert np.isfinite(own.predict_proba(X, budget=budget)).all()
    assert np.mean(after.labels == before.labels) > 0.9
    if dtype == torch.float64:
        assert after.exits.tolist() == before.exits.tolist()
        np.testing.assert_allclose(after.scores, before.scores, rtol=1e-4)
    quietly(lambda: own.calibrate(*case.val))
    assert own.outputs_.n_samples == len(case.val[1])


def test_the_backbone_alone_is_moved():
    """The heads stay as they are and are given features in their own precision."""
    case = CASES["branched"]
    model = case.fitted()
    before = model.trace(case.test[0][:100], budget=0.5)
    model.stages_[0].model.double()
    after = model.trace(case.test[0][:100], budget=0.5)
    assert after.exits.tolist() == before.exits.tolist()
    assert after.labels.tolist() == before.labels.tolist()


class MadeFor(nn.Module):
    """Reads precision and device in Python, so that both stand in its stages."""

    def __init__(self):
        super().__init__()
        net = branched_trained()
        self.one, self.two = net.one, net.two
        self.top = nn.Sequential(net.three, net.pool, net.flat, net.drop, net.out)

    def forward(self, x):
        x = self.one(x)
        x = self.two(x + torch.zeros(x.shape[1:], dtype=x.dtype, device=x.device))
        return self.top(x.to(x.dtype))


def test_stages_are_made_anew_for_another_precision():
    model = MultiExitClassifier(MadeFor().eval(), ["one", "two"], recipe=QUICK).fit(*TRAIN).calibrate(*VAL)
    before = model.predict_proba(TEST[0][:50], budget=1.0)
    model.stages_[0].model.double()
    after = model.predict_proba(TEST[0][:50], budget=1.0)
    assert after.dtype == np.float64
    np.testing.assert_allclose(after, before, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_an_estimator_is_moved_as_a_whole(case, own, device):
    X = case.test[0][:50]
    expected = own.predict(X).tolist()
    assert own.to(device) is own
    assert own.predict(X).tolist() == expected
    assert {tensor.device.type for module in modules_of(own) for tensor in module.parameters()} == {"cpu"}
    for wrong in ("cqu", 3.5, None):
        with pytest.raises((ValueError, TypeError), match="device must be"):
            own.to(wrong)
