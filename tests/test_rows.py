import numpy as np
import pytest
import torch

from adaptexit.staging.rows import join, n_bytes, n_rows, take


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
