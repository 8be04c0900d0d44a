import numpy as np
import pytest
import torch

from adaptexit.staging.nested import join, kind, n_bytes, n_rows, take, tensors_in


def nested(start, stop):
    """Samples start ... stop - 1 in every kind of nesting; each leaf tells which sample a row is."""
    numbers = np.arange(start, stop)
    column = torch.from_numpy(numbers)[:, None]
    return {
        "image": (column.float() + torch.tensor([0.0, 100.0]), numbers.astype(np.int16)),
        "state": [column * 2, {"deep": column.double() * 3}],
    }


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = list(one.values()), list(other.values())
    if isinstance(one, (tuple, list)):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)
    else:
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()


def test_size_of_nested_rows():
    rows = nested(0, 5)
    assert n_rows(rows) == 5
    assert n_bytes(rows) == 5 * (2 * 4 + 2 + 8 + 8)
    assert n_rows(np.zeros((4, 2))) == 4
    assert n_bytes(torch.zeros(3, 2, dtype=torch.float16)) == 12


@pytest.mark.parametrize("samples", [[0, 2, 3], [], [4, 1], [3, 3, 3]])
def test_take_picks_the_same_samples_of_every_leaf(samples):
    parts = [nested(i, i + 1) for i in samples] or [take(nested(0, 1), slice(0, 0))]
    assert_same(take(nested(0, 5), np.array(samples, dtype=np.intp)), join(parts))


def test_take_of_a_slice():
    assert_same(take(nested(0, 6), slice(2, 4)), nested(2, 4))
    assert_same(take(nested(0, 6), slice(4, None)), nested(4, 6))


def test_join_puts_parts_one_after_the_other():
    assert_same(join([nested(0, 2), nested(2, 3), nested(3, 7)]), nested(0, 7))


def test_join_of_one_part_does_not_copy():
    part = nested(0, 3)
    assert join([part]) is part


def test_take_with_indices_copies():
    rows = nested(0, 3)
    taken = take(rows, np.array([0, 1, 2]))
    for part in (rows["image"][0], rows["image"][1], rows["state"][1]["deep"]):
        part[:] = -1
    assert_same(taken, nested(0, 3))


@pytest.mark.parametrize("samples", [np.array([0, 2, 5]), slice(1, 4)])
def test_channels_last_is_kept(samples):
    images = torch.rand(6, 3, 4, 5).to(memory_format=torch.channels_last)
    taken = take(images, samples)
    for result in (taken, join([taken, taken])):
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert not result.is_contiguous()
    assert torch.equal(taken, images[samples if isinstance(samples, slice) else samples.tolist()])


def test_leaves_of_different_length_are_not_joined_silently():
    with pytest.raises(ValueError, match=r"zip\(\)"):
        join([(torch.zeros(1), torch.zeros(1)), (torch.zeros(1),)])


class Rising:
    """An object that knows how to be taken from and joined."""

    def __init__(self, numbers):
        self.numbers = list(numbers)
        self.n_rows, self.nbytes = len(self.numbers), 100 * len(self.numbers)

    def taken(self, samples):
        return Rising(np.array(self.numbers, dtype=int)[samples].tolist())

    def joined(self, others):
        return Rising(sum((other.numbers for other in others), self.numbers))


@pytest.mark.parametrize("samples", [np.array([2, 0]), slice(1, 3), np.array([], dtype=np.intp)], ids=str)
def test_leaves_that_know_how_are_asked(samples):
    rows = {"object": Rising([5, 6, 7]), "tensor": (torch.arange(3),)}
    assert n_rows(rows) == n_rows((rows["object"],)) == 3
    assert n_bytes(rows) == 300 + 24
    taken = take(rows, samples)
    expected = np.array([5, 6, 7])[samples].tolist()
    assert taken["object"].numbers == expected
    joined = join([taken, rows, taken])
    assert joined["object"].numbers == [*expected, 5, 6, 7, *expected]
    assert joined["tensor"][0].tolist() == [number - 5 for number in joined["object"].numbers]


def test_none_is_an_empty_nesting():
    rows = (None, torch.arange(3), {"state": None})
    assert n_rows(rows) == 3
    assert n_bytes(rows) == 24
    assert n_bytes(None) == 0
    nothing, column, state = join([take(rows, np.array([2])), take(rows, slice(0, 1))])
    assert nothing is None
    assert column.tolist() == [2, 0]
    assert state == {"state": None}
    assert take(None, np.array([0])) is join([None, None]) is None


def test_tensors_in_nested_values():
    one, two, three = torch.ones(1), torch.zeros(2), torch.zeros(3)
    tensors = list(tensors_in([one, (2, {"a": two, "b": "text", "c": [None, three]}), np.zeros(4)]))
    assert [id(tensor) for tensor in tensors] == [id(one), id(two), id(three)]
    assert list(tensors_in("text")) == []


def test_rows_that_can_be_joined_are_of_one_kind():
    rows = [{"x": torch.ones(n, 3), "y": (np.ones((n, 2)), None)} for n in (1, 4)]
    assert kind(rows[0]) == kind(rows[1])
    assert hash(kind(rows[0])) == hash(kind(rows[1]))
    others = [
        {"x": torch.ones(4, 5), "y": (np.ones((4, 2)), None)},
        {"x": torch.ones(4, 3).double(), "y": (np.ones((4, 2)), None)},
        {"x": torch.ones(4, 3), "y": (np.ones((4, 2)), np.ones(4))},
        {"x": torch.ones(4, 3), "y": [np.ones((4, 2)), None]},
    ]
    assert len({kind(other) for other in [*rows, *others]}) == 5
