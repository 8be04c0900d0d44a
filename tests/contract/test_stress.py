"""Eight threads predict while others split and fit the same modules, which were given in training mode."""

import copy
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from joblib import parallel_config
from sklearn.model_selection import cross_val_score
from torch import nn

from adaptexit import CascadeSaver, MultiExitClassifier
from adaptexit.staging.cuts import auto_cuts
from adaptexit.staging.splitting import split
from tests.contract.cases import assert_as_before, budgets_of, quietly, snapshot
from tests.nets import QUICK, branched_trained, digits, flat_head, large_trained, small_trained
from tests.threads import frequent_turns

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::adaptexit.SaverWarning")]
N_PREDICTING, SECONDS = 8, 15.0


@pytest.fixture(autouse=True)
def often():
    with frequent_turns(1e-4):
        yield


class Stateful(nn.Module):
    """A network that counts its calls and keeps sizes on itself, in evaluation mode too, inside wrapping modules."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.register_buffer("steps", torch.tensor(0))
        self.cache = {}

    def forward(self, x):
        self.steps.add_(1)
        self.cache.setdefault("side", 8)
        return self.net(x.reshape(len(x), -1, self.cache["side"], int(x.shape[3])))


def in_training(net):
    """A copy in training mode, but for one part."""
    net = Stateful(copy.deepcopy(net)).train()
    next(part for part in net.net.modules() if not part._modules).eval()
    return net


def fitted(backbone):
    model = MultiExitClassifier(
        backbone, exits=["net.one", "net.two"], head=flat_head, recipe=QUICK, calibration_size=0.3
    )
    return quietly(lambda: model.fit(*digits()[0]).calibrate(*digits()[1]))


def test_threads_predict_split_and_fit_at_once():
    (X, y), (X_test, _) = digits()[0], digits()[2]
    X_test = X_test[:60]
    backbone, base, saver = (in_training(net()) for net in (branched_trained, large_trained, small_trained))
    classifier = fitted(backbone)
    cascade = quietly(lambda: CascadeSaver(base, saver).fit(X, y).calibrate(*digits()[1]))
    modules = [backbone, base, saver]
    call, getattribute = nn.Module.__call__, nn.Module.__getattr__
    names = [dict(vars(torch)), dict(vars(sys.modules[__name__]))]
    random_state = torch.get_rng_state()
    questions = [
        lambda model=model, budget=budget: model.predict(X_test, budget=budget)
        for model in (classifier, cascade)
        for budget in budgets_of(model)
    ]
    expected = [question().tolist() for question in questions]
    example = torch.from_numpy(X[:8])
    cuts = auto_cuts(backbone, example, 2)
    before = [snapshot(module) for module in modules]
    counted = [[module.steps.clone(), dict(module.cache)] for module in modules]
    done = threading.Event()

    def predict(k):
        while not done.is_set():
            for i in range(len(questions)):
                i = (i + k) % len(questions)
                assert questions[i]().tolist() == expected[i]
        return "predicted"

    def make_splits():
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            parts = pickle.loads(pickle.dumps(split(backbone, ["net.one", "net.two"], example)))
            parts.function(0)
            assert auto_cuts(backbone, example, 2) == cuts
            split(base, ["net.0"], example)
        return "split"

    def fit():
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            again = fitted(backbone)
            assert [again.predict(X_test, budget=b).tolist() for b in budgets_of(classifier)] == expected[:4]
        return "fitted"

    with ThreadPoolExecutor(N_PREDICTING + 4) as pool:
        predicting = [pool.submit(predict, k) for k in range(N_PREDICTING)]
        making = [pool.submit(task) for task in (make_splits, make_splits, fit, fit)]
        try:
            results = [future.result() for future in making]
        finally:
            done.set()
        results += [future.result() for future in predicting]
    assert results == ["split"] * 2 + ["fitted"] * 2 + ["predicted"] * N_PREDICTING
    for module, state, (steps, cache) in zip(modules, before, counted, strict=True):
        assert module.steps > steps  # what is predicted counts, as it does in the module alone
        module.steps.copy_(steps)
        assert_as_before(module, state)
        assert module.cache == cache == {"side": 8}
        pickle.dumps(module)
    assert nn.Module.__call__ is call
    assert nn.Module.__getattr__ is getattribute
    assert names == [vars(torch), vars(sys.modules[__name__])]
    assert torch.equal(torch.get_rng_state(), random_state)


def test_cross_validation_in_threads():
    X, y = digits()[0]
    backbone = branched_trained()

    def scores(n_jobs):
        model = MultiExitClassifier(backbone, exits=["one", "two"], head=flat_head, recipe=QUICK)
        with parallel_config(backend="threading", n_jobs=n_jobs):
            return quietly(lambda: cross_val_score(model, X, y, cv=4, error_score="raise"))

    np.testing.assert_array_equal(scores(4), scores(1))
