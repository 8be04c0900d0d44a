import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from adaptexit import CheckpointWarning, FrozenRecipe
from adaptexit.training.checkpoints import Checkpoints, key_of

STATE = {"weights": torch.arange(3.0), "progress": {"epoch": 2, "loss": [[0.5, 0.25]]}, "average": None}


def assert_same(state):
    assert torch.equal(state["weights"], STATE["weights"])
    assert state["progress"] == STATE["progress"]
    assert state["average"] is None


def test_the_latest_state_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path, "a" * 64)
    assert checkpoints.latest() is None
    checkpoints.keep(1, {"weights": torch.zeros(2)})
    checkpoints.keep(2, STATE)
    assert_same(Checkpoints(tmp_path, "a" * 64).latest())
    assert len(list(tmp_path.iterdir())) == 1


def test_other_runs_are_left_alone(tmp_path):
    Checkpoints(tmp_path, "a" * 64).keep(2, STATE)
    other = Checkpoints(tmp_path, "b" * 64)
    assert other.latest() is None
    other.keep(1, {"weights": torch.zeros(2)})
    assert_same(Checkpoints(tmp_path, "a" * 64).latest())


def test_without_a_folder_nothing_is_kept():
    checkpoints = Checkpoints(None, "a" * 64)
    checkpoints.keep(1, STATE)
    assert checkpoints.latest() is None


def cut_off(place):
    path = place / "state.pt"
    path.write_bytes(path.read_bytes()[:-100])


def change_a_byte(place):
    path = place / "state.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def claim_another_run(place):
    path = place / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"key": "c" * 64}))


def spoil_the_header(place):
    (place / "checkpoint.json").write_text("{")


def lose_the_state(place):
    (place / "state.pt").unlink()


@pytest.mark.parametrize("damage", [cut_off, change_a_byte, claim_another_run, spoil_the_header, lose_the_state])
def test_damage_is_never_trusted_but_passed_over_with_a_warning(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path, "a" * 64)
    checkpoints.keep(2, STATE)
    damage(checkpoints.place)
    with pytest.warns(CheckpointWarning, match="a checkpoint is passed over"):
        assert checkpoints.latest() is None


def test_what_is_something_else_is_neither_read_nor_replaced(tmp_path):
    checkpoints = Checkpoints(tmp_path, "a" * 64)
    checkpoints.place.mkdir()
    (checkpoints.place / "thesis.txt").write_text("mine")
    with pytest.warns(CheckpointWarning, match="passed over"):
        assert checkpoints.latest() is None
    with pytest.raises(FileExistsError):
        checkpoints.keep(1, STATE)
    assert (checkpoints.place / "thesis.txt").read_text() == "mine"


def test_a_state_that_holds_more_than_numbers_is_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path, "a" * 64)
    checkpoints.keep(2, STATE | {"rate": np.float64(0.1)})
    with pytest.warns(CheckpointWarning, match="a checkpoint is passed over"):
        assert checkpoints.latest() is None


class Adding:
    """A transform whose text holds its address."""

    def __init__(self, amount=1, inner=None):
        self.amount, self.inner = amount, inner

    def __call__(self, x):
        return x + self.amount


def times(factor):
    return lambda x: x * factor


def endless():
    one = Adding()
    one.inner = one
    return one


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3}),
        ([1, [2]], [1, [2]], [[1], 2]),
        (torch.ones(2), torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (np.arange(4), np.arange(4), np.arange(4).reshape(2, 2)),
        (FrozenRecipe(epochs=3), FrozenRecipe(epochs=3), FrozenRecipe(epochs=4)),
        (partial(sorted, key=len), partial(sorted, key=len), partial(sorted, key=abs)),
        (torch.optim.SGD, torch.optim.SGD, torch.optim.Adam),
        (Adding(), Adding(), None),
        (Adding(1), Adding(1), Adding(2)),
        (Adding(inner=Adding(1)), Adding(inner=Adding(1)), Adding(inner=Adding(2))),
        (endless(), endless(), Adding()),
        (Adding(1).__call__, Adding(1).__call__, Adding(2).__call__),
        (times(2), times(2), times(3)),
        (lambda x: x.flip(-1), lambda x: x.flip(-1), lambda x: x.flip(-2)),
        (lambda x: np.abs(x), lambda x: np.abs(x), lambda x: np.sign(x)),
        ({"b", "a"}, {"a", "b"}, {"a"}),
        (v2.RandomCrop(32, padding=4), v2.RandomCrop(32, padding=4), v2.RandomCrop(32, padding=3)),
        (0.1, np.float64(0.1), 0.2),
        (str.upper, str.upper, str.lower),
    ],
)
def test_the_key_tells_different_runs_apart_and_no_equal_ones(one, same, other):
    assert key_of(one) == key_of(same) != key_of(other)


def test_the_key_is_the_same_in_every_process():
    """Sets, also those that the compiler makes of constants, have another order in each."""
    script = (
        "from adaptexit.training.checkpoints import key_of\n"
        "print(key_of({'a', 'b', 'c', 'd'}, lambda x: x in {'a', 'b', 'c', 'd'}))"
    )
    keys = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            stdout=subprocess.PIPE,
        ).stdout
        for seed in "12"
    }
    assert len(keys) == 1
