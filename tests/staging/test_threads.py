"""Splits are made in one thread while others call modules, and make splits of their own."""

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.fx import _symbolic_trace

from adaptexit.exceptions import SplitError
from adaptexit.staging.cuts import list_cuts
from adaptexit.staging.fx_trace import TRACING
from adaptexit.staging.splitting import split
from tests.staging.test_splitting import NET_CUTS, Chain, Net, assert_staged_equals_plain, built, images, plain, vectors
from tests.threads import frequent_turns, together

CALL, GETATTR = nn.Module.__call__, nn.Module.__getattr__


@pytest.fixture(autouse=True)
def often():
    with frequent_turns():
        yield
    assert nn.Module.__call__ is CALL
    assert nn.Module.__getattr__ is GETATTR


class Meanwhile(Chain):
    """In the middle of each forward another thread does something, which is waited for."""

    task = None

    def forward(self, x):
        x = self.a(x)
        if self.task is not None:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(self.task).result(5)
        return self.b(x).tanh()


def split_meanwhile(model, task):
    model.task = task
    parts = split(model, ["a"], vectors())
    model.task = None
    assert_staged_equals_plain(parts, model, vectors())
    return parts


def test_other_threads_call_other_modules_while_a_split_is_made():
    other, x = built(Net), images()
    expected, answers = plain(other, x), []
    split_meanwhile(built(Meanwhile), lambda: answers.append(plain(other, x)))
    assert len(answers) > 2
    assert all(torch.equal(answer, expected) for answer in answers)


def test_other_threads_call_the_parts_of_the_same_module_while_it_is_split():
    model, x, answers = built(Meanwhile), vectors(), []
    expected = plain(nn.Sequential(model.a, model.b), x)

    def task():
        assert type(model.a.weight) is nn.Parameter
        answers.append(plain(model.b, model.a(x)))

    split_meanwhile(model, task)
    assert all(torch.equal(answer, expected) for answer in answers)


def test_cuts_are_listed_while_other_threads_call_the_module():
    model, x = built(Meanwhile), vectors()
    expected = [(point.name, point.macs) for point in list_cuts(model, x, every=True).points]
    assert "a" in dict(expected)
    model.task = lambda: plain(model.b, model.a(x))
    assert [(point.name, point.macs) for point in list_cuts(model, x, every=True).points] == expected


def test_one_thread_traces_at_a_time():
    def held_elsewhere():
        if held := TRACING.acquire(blocking=False):
            TRACING.release()
        return not held

    seen = []
    split_meanwhile(built(Meanwhile), lambda: seen.append(held_elsewhere()))
    assert {*seen} == {True, False}  # the model is also run without being traced, which need not be waited for
    assert not held_elsewhere()


def test_threads_that_use_a_split_just_after_unpickling(often):
    net, x = built(Net), images()
    parts = split(net, NET_CUTS, x)
    expected = plain(net, x)
    for _ in range(5):
        twins = [pickle.loads(pickle.dumps(parts)) for _ in range(2)]
        answers = together([lambda twin=twin: plain(twin, x) for twin in twins * 2])
        assert all(torch.equal(answer, expected) for answer in answers)


def test_a_split_is_made_anew_once_for_all_threads(monkeypatch):
    twin, made = pickle.loads(pickle.dumps(split(built(Net), NET_CUTS, images()))), []
    make = twin._source.compiled
    monkeypatch.setattr(twin._source, "compiled", lambda batches: made.append(1) or make(batches))
    together([lambda: plain(twin, images())] * 4)
    assert made == [1]


def test_splits_in_several_threads():
    nets = [built(Net) for _ in range(4)]
    made = together([lambda net=net: split(net, NET_CUTS, images()) for net in [*nets, *nets]])
    for parts, net in zip(made, [*nets, *nets], strict=True):
        assert_staged_equals_plain(parts, net, images())


@pytest.mark.parametrize("nth", [0, 1])
def test_an_interrupt_while_torch_fx_cleans_up(monkeypatch, nth):
    revert, calls = _symbolic_trace._PatchedFnSetAttr.revert, []

    def interrupted(patch):
        calls.append(patch)
        if len(calls) == nth + 1:
            raise KeyboardInterrupt
        revert(patch)

    monkeypatch.setattr(_symbolic_trace._PatchedFnSetAttr, "revert", interrupted)
    names = [dict(vars(module)) for module in (torch, sys.modules[__name__], sys.modules[Net.__module__])]
    with pytest.raises(KeyboardInterrupt):
        split(built(Net), NET_CUTS, images())
    assert nn.Module.__call__ is CALL
    assert nn.Module.__getattr__ is GETATTR
    assert _symbolic_trace.CURRENT_PATCHER is None
    assert names == [vars(module) for module in (torch, sys.modules[__name__], sys.modules[Net.__module__])]
    net = built(Net)
    assert_staged_equals_plain(split(net, NET_CUTS, images()), net, images())


def test_what_an_earlier_trace_left_in_place_is_cleared_away():
    class Stopping(torch.fx.Tracer):
        stopped = False

        def call_module(self, m, forward, args, kwargs):
            if self.stopped:
                return forward(*args, **kwargs)
            self.stopped = True
            raise KeyboardInterrupt

        def getattr(self, attr, attr_val, parameter_proxy_cache):
            return attr_val

    revert = _symbolic_trace._PatchedFnSetAttr.revert
    _symbolic_trace._PatchedFnSetAttr.revert = lambda patch: None
    try:
        with pytest.raises(KeyboardInterrupt):
            Stopping().trace(built(Net))
    finally:
        _symbolic_trace._PatchedFnSetAttr.revert = revert
    assert nn.Module.__call__ is not CALL
    net = built(Net)
    parts = split(net, NET_CUTS, images())
    assert nn.Module.__call__ is CALL
    assert_staged_equals_plain(parts, net, images())


def test_a_failed_trace_lets_the_next_one_in():
    class Broken(Chain):
        def forward(self, x):
            return self.b(self.a(x)).no_such_method()

    with pytest.raises(SplitError):
        split(built(Broken), ["a"], vectors())
    net = built(Net)
    (parts,) = together([lambda: split(net, NET_CUTS, images())])
    assert_staged_equals_plain(parts, net, images())
