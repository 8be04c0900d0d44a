from collections import OrderedDict, namedtuple
from math import prod

import numpy as np
import pytest
import torch
from torch import nn

from adaptexit.exceptions import UnsupportedValueError
from adaptexit.staging.carried import Along, Carried, Count, Live, Nest, Static, layout_of
from adaptexit.staging.nested import join, n_bytes, n_rows, take

Pair = namedtuple("Pair", ["left", "right"])


def grown(samples, other, dim, per_sample, dtype=torch.int64):
    """A tensor with ``per_sample`` rows a sample along axis ``dim``; every cell tells which sample it belongs to."""
    rows = np.add.outer(np.asarray(samples, dtype=np.int64) * per_sample, np.arange(per_sample)).reshape(-1)
    cells = torch.arange(prod(other)).reshape(*other[:dim], 1, *other[dim:])
    at = [-1 if axis == dim else 1 for axis in range(len(other) + 1)]
    return (cells + 1000 * torch.from_numpy(rows).reshape(at)).to(dtype)


def same(one, other):
    """Equal in type, dtype, shape and content."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and same(list(one.values()), list(other.values()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def everything(samples):
    """All kinds of values at once, nested."""
    n = len(samples)
    return {
        "tokens": grown(samples, (3, 2), 1, 4, torch.float32),
        "shape": torch.Size([2 * n, 5]),
        "deep": [Pair(grown(samples, (), 0, 1), "left"), (n, [grown(samples, (2, 3, 2), 3, 1)], None)],
        "constant": torch.arange(4.0),
    }


def live_of(make, samples):
    """What is made of some samples, as :class:`Live`."""
    return Live((make(samples),), (layout_of(make([0, 1]), make([2, 3, 4])),), len(samples))


# -- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [1, 2, 5])
@pytest.mark.parametrize(
    ("other", "dim"), [((), 0), ((7,), 0), ((7,), 1), ((4, 5), 0), ((4, 5), 1), ((4, 5), 2), ((2, 3), 1), ((0,), 1)]
)
def test_tensors_grow_along_one_axis(other, dim, per_sample):
    two, three = grown([0, 1], other, dim, per_sample), grown([7, 3, 5], other, dim, per_sample)
    assert layout_of(two, three) == Along(dim, per_sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.bool, torch.complex64, torch.uint8])
def test_tensors_of_every_dtype(dtype):
    assert layout_of(torch.ones(4, 5, dtype=dtype), torch.zeros(6, 5, dtype=dtype)) == Along(0, 2)
    assert layout_of(torch.ones(4, 5, dtype=dtype), torch.ones(4, 5, dtype=dtype)) == Static()


@pytest.mark.parametrize("per_sample", [1, 2, 9, -1])
def test_integers_that_count_the_samples(per_sample):
    assert layout_of(2 * per_sample, 3 * per_sample) == Count(per_sample)


@pytest.mark.parametrize(
    "value",
    [
        0, 2, 6, -1, 0.5, True, "nearest", None, torch.float32, torch.device("cpu"), ..., slice(0, 2),
        torch.contiguous_format, range(3), 1 + 2j, frozenset({1}), torch.tensor(3.0), torch.arange(6).reshape(2, 3),
        torch.zeros(0), torch.tensor([1.0, float("nan")]), nn.Parameter(torch.ones(2)),
    ],
    ids=repr,
)  # fmt: skip
def test_values_that_do_not_change(value):
    again = value.clone() if type(value) is torch.Tensor else value
    assert layout_of(value, again) == Static()


def test_floats_that_differ_by_rounding_do_not_change():
    assert layout_of(torch.tensor([1.0, 2.0]), torch.tensor([1.0 + 1e-7, 2.0])) == Static()


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda n: torch.Size([n, 5, 3 * n]), (Count(1), Static(), Count(3))),
        (lambda n: (torch.ones(n), 4), (Along(0, 1), Static())),
        (lambda n: [torch.ones(3, 2 * n), n], (Along(1, 2), Count(1))),
        (lambda n: {"b": torch.ones(n), "a": "text"}, (Along(0, 1), Static())),
        (lambda n: OrderedDict(b=n, a=torch.ones(4)), (Count(1), Static())),
        (lambda n: Pair(right=torch.ones(n), left=0.5), (Static(), Along(0, 1))),
        (lambda n: torch.arange(4.0 * n).reshape(n, 4).max(dim=1), (Along(0, 1), Along(0, 1))),
        (lambda n: ((), [], {}), (Nest(()), Nest(()), Nest(()))),
        (lambda n: [(n, {"k": [torch.ones(1, n)]})], (Nest((Count(1), Nest((Nest((Along(1, 1),)),)))),)),
    ],
    ids=["size", "tuple", "list", "dict", "ordered dict", "named tuple", "torch.return_types", "empty", "deep"],
)
def test_nested_values(make, parts):
    assert layout_of(make(2), make(3)) == Nest(parts)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("two", "three", "reason"),
    [
        (torch.ones(2, 2), torch.ones(3, 3), r"more than one axis that grows .*\(2, 2\) for 2 samples and \(3, 3\)"),
        (torch.ones(2, 4, 4), torch.ones(3, 4, 6), r"more than one axis that grows"),
        (torch.ones(2), torch.ones(3, 1), r"\(2,\) for 2 samples and \(3, 1\) for 3"),
        (torch.ones(()), torch.ones(3), r"\(\) for 2 samples and \(3,\) for 3"),
        (torch.ones(1, 5), torch.ones(2, 5), r"no whole number of rows a sample, \(1, 5\) for 2"),
        (torch.ones(3), torch.ones(4), "no whole number of rows a sample"),
        (torch.ones(4), torch.ones(5), "no whole number of rows a sample"),
        (torch.ones(3, 2), torch.ones(3, 0), "no whole number of rows a sample"),
        (torch.ones(2), torch.ones(2) + 0.01, "without an axis for the samples that changes with them"),
        (torch.tensor(1), torch.tensor(2), "without an axis for the samples that changes with them"),
        (torch.tensor([True, False]), torch.tensor([True, True]), "without an axis for the samples that changes"),
        (torch.tensor([1.0]), torch.tensor([float("nan")]), "without an axis for the samples that changes"),
        (torch.eye(2).to_sparse(), torch.eye(3).to_sparse(), "a sparse or nested tensor"),
        (0.5, 0.75, "a float that changes with the samples: 0.5 and 0.75"),
        (2.0, 3.0, "a float that changes with the samples"),
        (3, 4, "an? int that changes with the samples: 3 and 4"),
        (2, 4, "an? int that changes with the samples"),
        (0, 1, "an? int that changes with the samples"),
        (True, False, "a bool that changes with the samples"),
        ("ab", "abc", "a str that changes with the samples: 'ab' and 'abc'"),
        (slice(0, 2), slice(0, 3), "a slice that changes with the samples"),
        (np.zeros(2), np.zeros(2), "an? ndarray that changes with the samples"),
        ([1, 1], [1, 1, 1], "a list whose entries change with the samples"),
        ((1,), (), "a tuple whose entries change with the samples"),
        ({"a": 1, "b": 1}, {"b": 1, "a": 1}, "a dict whose entries change with the samples"),
        ({"a": 1}, {"b": 1}, "a dict whose entries change with the samples"),
        (2, 3.0, "an? int for 2 samples and a float for 3"),
        (True, 1, "a bool for 2 samples and an? int for 3"),
        (None, torch.ones(3), "a NoneType for 2 samples and a Tensor for 3"),
        ((1, 2), [1, 2], "a tuple for 2 samples and a list for 3"),
        ({"a": [(0, torch.ones(2, 2))]}, {"a": [(0, torch.ones(3, 3))]}, "more than one axis that grows"),
        ((2, 0.5), (3, 0.25), "a float that changes with the samples"),
    ],
)
def test_values_that_samples_cannot_be_picked_out_of(two, three, reason):
    with pytest.raises(UnsupportedValueError, match=f"^it is .*{reason}"):
        layout_of(two, three)


# -- picking samples ---------------------------------------------------------------------------------------------------

CHOICES = [[0, 1, 2, 3, 4], [3], [4, 0, 2], [1, 1, 1], []]
SLICES = [slice(None), slice(1, 3), slice(3, None), slice(0, 2), slice(5, None), slice(2, 2), slice(0, 5, 2)]


@pytest.mark.parametrize("samples", CHOICES, ids=str)
def test_taken_by_indices(samples):
    taken = live_of(everything, [5, 6, 7, 8, 9]).taken(np.array(samples, dtype=np.intp))
    assert same(taken.values[0], everything([5 + i for i in samples]))
    assert taken.n_rows == n_rows(taken) == len(samples)


@pytest.mark.parametrize("chosen", SLICES, ids=str)
@pytest.mark.parametrize(
    "make", [everything, lambda samples: (grown(samples, (2,), 1, 1), len(samples))], ids=["rows", "one row"]
)
def test_taken_by_a_slice(make, chosen):
    samples = [5, 6, 7, 8, 9]
    taken = live_of(make, samples).taken(chosen)
    assert same(taken.values[0], make(samples[chosen]))
    assert taken.n == len(samples[chosen])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_taken_by_indices_in_reverse(n):
    samples = list(range(n))
    taken = live_of(everything, samples).taken(np.arange(n)[::-2])
    assert same(taken.values[0], everything(samples[::-2]))


def test_taken_by_a_mask():
    mask = np.array([True, False, False, True, True])
    taken = live_of(everything, [5, 6, 7, 8, 9]).taken(mask)
    assert same(taken.values[0], everything([5, 8, 9]))
    assert taken.n == 3


def test_taken_by_indices_is_not_overwritten_through_its_origin():
    live = live_of(lambda samples: [grown(samples, (2,), 0, 1), grown(samples, (2,), 0, 3)], [0, 1, 2])
    taken = live.taken(np.array([0, 1, 2]))
    for tensor in live.values[0]:
        tensor.fill_(-1)
    assert all((tensor >= 0).all() for tensor in taken.values[0])


@pytest.mark.parametrize(
    "beside", [lambda samples: None, lambda samples: grown(samples, (2,), 0, 3)], ids=["alone", "beside rows"]
)
def test_slices_of_one_row_a_sample_are_views(beside):
    live = live_of(lambda samples: (grown(samples, (2,), 0, 1), beside(samples)), [0, 1, 2])
    assert live.taken(slice(1, None)).values[0][0].data_ptr() == live.values[0][0][1:].data_ptr()


def test_live_values_of_which_there_are_none():
    live = Live((), (), 4)
    assert live.taken(np.array([1, 2])) == Live((), (), 2)
    assert live.taken(slice(1, None)) == Live((), (), 3)
    assert live.joined([live]) == Live((), (), 8)
    assert live.nbytes == 0


@pytest.mark.parametrize(
    "samples", [np.array([4, 0, 2]), np.array([4, 0, 2])[::-1], slice(1, 4), slice(0, 5, 2), np.array([3])], ids=str
)
@pytest.mark.parametrize("per_sample", [1, 2])
def test_channels_last_is_kept(samples, per_sample):
    images = torch.rand(5 * per_sample, 3, 4, 6).to(memory_format=torch.channels_last)
    live = Live((images,), (Along(0, per_sample),), 5)
    taken = live.taken(samples)
    for result in (taken.values[0], taken.joined([taken]).values[0]):
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert not result.is_contiguous()


# -- joining -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [[[3], [1, 0]], [[2, 0, 4], [], [1]], [[5]], [[], [6, 6]]], ids=str)
def test_joined(parts):
    first, *others = (live_of(everything, part) for part in parts)
    joined = first.joined(others)
    assert same(joined.values[0], everything([sample for part in parts for sample in part]))
    assert joined.n_rows == sum(map(len, parts))
    assert joined.layouts == first.layouts


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda samples, size: size, r"8.*10"),
        (lambda samples, size: (grown(samples, (), 0, 1), [f"{size}"]), r"'8'.*'10'"),
        (lambda samples, size: torch.Size([len(samples), size]), r"8.*10"),
        (lambda samples, size: torch.arange(float(size)), r"\(8,\).*\(10,\)"),
        (lambda samples, size: {"deep": (torch.full((3,), size),)}, r"\(3,\)"),
        (lambda samples, size: [grown(samples, (3, size), 0, 1)], r"\(2, 3, 8\).*\(2, 3, 10\)"),
        (lambda samples, size: grown(samples, (size,), 1, 2), r"\(8, 4\).*\(10, 4\)"),
    ],
    ids=["number", "nested", "size", "shape", "content", "grows", "grows along the second axis"],
)
def test_values_of_inputs_of_other_sizes_are_not_merged(make, words):
    eight, ten = (live_of(lambda samples, size=size: make(samples, size), [0, 1]) for size in (8, 10))
    with pytest.raises(ValueError, match=rf"inputs have the same size; .*{words}.*Give inputs of one size"):
        eight.joined([eight, ten])
    assert eight.joined([eight]).n == 4


def test_other_errors_of_joining_are_not_taken_for_sizes():
    one = live_of(lambda samples: grown(samples, (2,), 0, 1), [0, 1])
    other = Live((torch.ones(2, 2, device="meta"),), one.layouts, 2)
    with pytest.raises(RuntimeError, match="device"):
        one.joined([other])


@pytest.mark.parametrize(
    "make",
    [
        lambda samples, size: grown(samples, (2, size), 1, 2),
        lambda samples, size: [{"side": size}, len(samples)],
        lambda samples, size: torch.ones(4, size),
        lambda samples, size: torch.arange(4) * size,
        lambda samples, size: (size, 2.5, None, "text", slice(size)),
    ],
    ids=["grows", "number", "shape", "content", "nested"],
)
def test_values_that_can_be_merged_are_of_one_kind(make):
    eight, more, ten = (
        live_of(lambda samples, size=size: make(samples, size), samples)
        for size, samples in ((8, [0, 1]), (8, [4, 5, 6]), (10, [0, 1]))
    )
    assert eight.kind == more.kind != ten.kind
    assert Carried(eight).kind == Carried(more).kind != Carried(eight, None, {"left": torch.ones(2, 3)}).kind
    assert len({eight.kind, more.kind, ten.kind}) == 2
    assert eight.joined([more]).n == 5


# -- size --------------------------------------------------------------------------------------------------------------


def test_memory_is_that_of_the_tensors_that_grow():
    live = live_of(everything, [0, 1, 2])
    per_sample = 4 * 3 * 2 * 4 + 8 + 2 * 3 * 2 * 8
    assert live.nbytes == n_bytes(live) == 3 * per_sample
    assert live.taken(np.array([2, 0])).nbytes == 2 * per_sample
    assert live.taken(slice(3, None)).nbytes == 0
    assert live_of(lambda samples: [torch.ones(100), "text", len(samples)], [0, 1]).nbytes == 0


# -- what leaves a stage -----------------------------------------------------------------------------------------------


def carried_of(samples):
    state = {"hidden": grown(samples, (2,), 0, 1), "votes": np.array(samples, dtype=np.int16)}
    return Carried(live_of(everything, samples), torch.ones(len(samples), 1000), state)


@pytest.mark.parametrize("indices", [np.array([2, 0]), slice(1, None), np.array([], dtype=np.intp)], ids=str)
def test_carried_takes_along_its_state_and_leaves_its_feature(indices):
    samples = np.array([4, 5, 6])
    carried = carried_of(samples.tolist())
    for taken in (carried.taken(indices), take(carried, indices), take({"both": (carried,)}, indices)["both"][0]):
        expected = carried_of(samples[indices].tolist())
        assert taken.feature is None
        assert same(taken.live.values, expected.live.values)
        assert taken.state["hidden"].tolist() == expected.state["hidden"].tolist()
        assert taken.state["votes"].tolist() == expected.state["votes"].tolist()
        assert taken.n_rows == n_rows(taken) == len(samples[indices])
    assert carried.feature is not None


def test_carried_is_joined_with_its_state_and_without_its_feature():
    parts = [carried_of([3]), carried_of([0, 2]), carried_of([1])]
    for joined in (parts[0].joined(parts[1:]), join(parts)):
        expected = carried_of([3, 0, 2, 1])
        assert joined.feature is None
        assert same(joined.live.values, expected.live.values)
        assert joined.state["hidden"].tolist() == expected.state["hidden"].tolist()
        assert joined.state["votes"].tolist() == expected.state["votes"].tolist()
        assert joined.n_rows == 4


def test_carried_without_a_state():
    carried = Carried(live_of(everything, [0, 1, 2]), "feature")
    assert carried.taken(np.array([1])).state is None
    assert carried.joined([carried]).state is None
    assert carried.nbytes == carried.live.nbytes


def test_memory_of_what_goes_on_leaves_the_feature_out():
    carried = carried_of([0, 1, 2])
    assert carried.nbytes == n_bytes(carried) == carried.live.nbytes + 3 * (2 * 8 + 2)
    assert Carried(carried.live, None, carried.state).nbytes == carried.nbytes
