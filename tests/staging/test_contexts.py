"""What belongs to the user or to the whole process, used by several threads whose blocks overlap in any order."""

import contextlib
import threading

import pytest
import torch
from torch import nn
from torch.backends import mha

from adaptexit.staging.contexts import (
    evaluating,
    evaluating_parts,
    exact_arithmetic,
    held,
    random_state_kept,
    unfused_attention,
)


class Elsewhere:
    """A block that another thread is in, from ``enter`` to ``leave``."""

    def __init__(self, context):
        self.entered, self.asked = threading.Event(), threading.Event()

        def run():
            with context:
                self.entered.set()
                self.asked.wait(5)

        self.thread = threading.Thread(target=run, daemon=True)

    def enter(self):
        self.thread.start()
        assert self.entered.wait(5)
        return self

    def leave(self):
        self.asked.set()
        self.thread.join(5)
        assert not self.thread.is_alive()


def in_training():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    net[2].eval()
    return net


def modes(net):
    return [part.training for part in net.modules()]


def test_modes_are_given_back():
    net = in_training()
    with contextlib.suppress(KeyError), evaluating([net]):
        assert not any(modes(net))
        raise KeyError
    assert modes(net) == [True, True, True, False]


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_a_module_stays_in_evaluation_mode_until_its_last_user_is_done(first_leaves_first):
    net = in_training()
    one = Elsewhere(evaluating([net])).enter()
    other = Elsewhere(evaluating_parts(list(net.modules()))).enter()
    for user in (one, other) if first_leaves_first else (other, one):
        assert not any(modes(net))
        user.leave()
    assert modes(net) == [True, True, True, False]


def test_users_of_parts_of_a_module_are_counted_by_part():
    net = in_training()
    whole = Elsewhere(evaluating([net])).enter()
    part = Elsewhere(evaluating([net[1]])).enter()
    whole.leave()
    assert modes(net) == [True, True, False, False]
    part.leave()
    assert modes(net) == [True, True, True, False]


def test_a_module_in_evaluation_mode_is_not_counted_and_stays_so():
    net = in_training().eval()
    context = evaluating_parts(list(net.modules()))
    with context:
        assert context.counted == []
    assert not any(modes(net))


def test_a_block_can_be_entered_again_in_the_same_thread():
    net = in_training()
    with evaluating([net]), evaluating([net[0], net]):
        assert not any(modes(net))
    assert modes(net) == [True, True, True, False]


def test_modes_under_many_threads():
    net = nn.Sequential(*(nn.Dropout() for _ in range(30)))
    parts, wrong = list(net.modules()), []

    def use():
        for _ in range(200):
            with evaluating_parts(parts, keep_random_state=False):
                wrong.extend(modes(net))

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(wrong)
    assert all(modes(net))


# -- settings of the process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_a_setting_is_held_until_its_last_user_is_done(first_leaves_first):
    setting = {"value": "as it was"}
    context = held(lambda: setting["value"], lambda value: setting.update(value=value), "as needed")
    one, other = Elsewhere(context).enter(), Elsewhere(context).enter()
    for user in (one, other) if first_leaves_first else (other, one):
        assert setting["value"] == "as needed"
        user.leave()
    assert setting["value"] == "as it was"


def test_attention_is_unfused_while_it_is_counted():
    before = mha.get_fastpath_enabled()
    with unfused_attention:
        assert not mha.get_fastpath_enabled()
    assert mha.get_fastpath_enabled() == before


def test_arithmetic_is_exact_for_a_while():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with exact_arithmetic:
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# -- the random state --------------------------------------------------------------------------------------------------


def test_what_is_drawn_from_a_seed_is_the_same_whoever_looks_at_the_state_meanwhile():
    before = torch.get_rng_state()
    with random_state_kept(3):
        expected = torch.rand(4)
    looking = Elsewhere(evaluating([])).enter()
    with random_state_kept(3):
        numbers = [torch.rand(2)]
        Elsewhere(evaluating([])).enter().leave()
        looking.leave()
        numbers.append(torch.rand(2))
    assert torch.equal(torch.cat(numbers), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_blocks_that_draw_from_a_seed_wait_for_each_other():
    other = Elsewhere(random_state_kept(1))
    with random_state_kept(0):
        other.thread.start()
        assert not other.entered.wait(0.05)
    assert other.entered.wait(5)
    other.leave()


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_the_random_state_is_given_back_when_nobody_keeps_it(first_leaves_first):
    before = torch.get_rng_state()
    one = Elsewhere(evaluating([])).enter()
    torch.rand(3)
    other = Elsewhere(evaluating([])).enter()
    torch.rand(3)
    for user in (one, other) if first_leaves_first else (other, one):
        user.leave()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_random_state_is_given_back_inside_a_block_too():
    with random_state_kept(5):
        expected = torch.rand(4)
    with random_state_kept(5):
        numbers = [torch.rand(2)]
        with evaluating([]):
            torch.rand(7)
        numbers.append(torch.rand(2))
    assert torch.equal(torch.cat(numbers), expected)
