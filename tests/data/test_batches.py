import gc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.loader import MultiEpochsDataLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from adaptexit import InputWarning
from adaptexit.data.batches import as_batches
from adaptexit.data.inputs import InputSpec
from adaptexit.data.sources import check_source, is_stream, split_pair

N = 11
X = np.random.default_rng(0).normal(size=(N, 2, 3)).astype(np.float32)
Y = np.arange(N) % 4


class Pairs(Dataset):
    """A map-style dataset of what ``form`` makes of x and y."""

    def __init__(self, form=lambda x, y: (x, y)):
        self.form = form

    def __len__(self):
        return N

    def __getitem__(self, i):
        if i >= N:
            raise IndexError
        return self.form(X[i], Y[i])


class ByNumber:
    """A data set of no library."""

    def __init__(self, form):
        self.form = form

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.form(X[i], Y[i])


class Stream(IterableDataset):
    """An iterable dataset of known or unknown length."""

    def __iter__(self):
        yield from zip(X, Y, strict=True)


class StreamWithLength(Stream):
    def __len__(self):
        return N


def memmap(folder, mode="r"):
    path = folder / "x.npy"
    np.save(path, X)
    return np.load(path, mmap_mode=mode)


SOURCES = {
    "array": lambda folder: (X, Y),
    "lists": lambda folder: (X.tolist(), Y.tolist()),
    "tensor": lambda folder: (torch.from_numpy(X), torch.from_numpy(Y)),
    "tensor that requires grad": lambda folder: (torch.from_numpy(X).requires_grad_(), Y),
    "memory map": lambda folder: (memmap(folder), Y),
    "not writeable": lambda folder: (np.broadcast_to(X, X.shape), Y),
    "strides": lambda folder: (np.repeat(X, 2, axis=0)[::2], np.repeat(Y, 2)[::2]),
    "negative strides": lambda folder: (X[::-1, ::-1].copy()[::-1, ::-1], Y[::-1].copy()[::-1]),
    "another byte order": lambda folder: (X.astype(">f4"), Y.astype(">i8")),
    "dataset": lambda folder: (Pairs(), None),
    "tensor dataset": lambda folder: (TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), None),
    "iterable dataset": lambda folder: (Stream(), None),
    "iterable dataset of known length": lambda folder: (StreamWithLength(), None),
    "loader": lambda folder: (DataLoader(Pairs(), batch_size=4), None),
    "loader of one": lambda folder: (DataLoader(Pairs(), batch_size=1), None),
    "loader of all": lambda folder: (DataLoader(Pairs(), batch_size=100), None),
    "loader of an iterable": lambda folder: (DataLoader(Stream(), batch_size=4), None),
    "batch sampler": lambda folder: (
        DataLoader(Pairs(), batch_sampler=BatchSampler(SequentialSampler(Pairs()), 4, drop_last=False)),
        None,
    ),
    "several epochs": lambda folder: (MultiEpochsDataLoader(Pairs(), batch_size=4), None),
    "list of pairs": lambda folder: (list(zip(X, Y, strict=True)), None),
    "list of pairs of tensors": lambda folder: (
        [[torch.from_numpy(x), torch.tensor(y)] for x, y in zip(X, Y, strict=True)], None,
    ),
    "list of pairs of lists": lambda folder: ([(x.tolist(), int(y)) for x, y in zip(X, Y, strict=True)], None),
    "rows by number": lambda folder: (ByNumber(lambda x, y: (x, y)), None),
    "rows with columns": lambda folder: (ByNumber(lambda x, y: {"image": x, "label": y, "id": None}), None),
    "rows of lists": lambda folder: (ByNumber(lambda x, y: {"pixel_values": x.tolist(), "labels": int(y)}), None),
    "list of rows": lambda folder: ([{"img": x, "label": y} for x, y in zip(X, Y, strict=True)], None),
    "dataset with columns": lambda folder: (Pairs(lambda x, y: {"image": x, "label": y}), None),
    "loader with columns": lambda folder: (
        DataLoader(Pairs(lambda x, y: {"pixel_values": x, "image": 0, "labels": y}), batch_size=4), None,
    ),
    "no batching": lambda folder: (
        DataLoader([(torch.from_numpy(X[i : i + 3]), torch.from_numpy(Y[i : i + 3])) for i in range(0, N, 3)],
                   batch_size=None),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_all_samples_in_order(source, tmp_path):
    source_data, y = SOURCES[source](tmp_path)
    batches = as_batches(source_data, y, batch_size=3, labels=True)
    for _ in range(2):
        parts = list(batches)
        assert all(isinstance(x, torch.Tensor) and not x.requires_grad for x in parts)
        assert np.allclose(torch.cat(parts).numpy(), X, atol=0)
        assert batches.labels.tolist() == Y.tolist()
        assert batches.n_batches in (None, len(parts))


@pytest.mark.parametrize("source", SOURCES)
def test_the_first_batch_can_be_looked_at(source, tmp_path):
    source_data, y = SOURCES[source](tmp_path)
    batches = as_batches(source_data, y, batch_size=3, labels=True)
    for _ in range(2):
        first = batches.first()
        for _ in range(2):
            parts = list(batches)
            assert torch.equal(parts[0], first)
            assert np.allclose(torch.cat(parts).numpy(), X, atol=0)
            assert batches.labels.tolist() == Y.tolist()


@pytest.mark.parametrize("source", SOURCES)
def test_labels_are_not_needed_to_predict(source, tmp_path):
    source_data, _ = SOURCES[source](tmp_path)
    assert np.allclose(torch.cat(list(as_batches(source_data, batch_size=4))).numpy(), X, atol=0)


@pytest.mark.parametrize("batch_size", [1, 3, 11, 50])
@pytest.mark.parametrize("given", [X, Pairs(), StreamWithLength()], ids=["array", "dataset", "iterable"])
def test_batch_size_for_sources_without_one(given, batch_size):
    batches = as_batches(given, batch_size=batch_size)
    sizes = [len(x) for x in batches]
    assert batches.batch_size == batch_size
    assert sizes == [batch_size] * (N // batch_size) + [N % batch_size] * (N % batch_size > 0)


@pytest.mark.parametrize("source", ["loader", "batch sampler", "loader of an iterable"])
def test_loaders_bring_their_own_batch_size(source, tmp_path):
    batches = as_batches(SOURCES[source](tmp_path)[0], batch_size=7)
    assert batches.batch_size == 4
    assert [len(x) for x in batches] == [4, 4, 3]


def test_number_of_batches():
    assert as_batches(X, batch_size=4).n_batches == 3
    assert as_batches(DataLoader(Pairs(), batch_size=2), batch_size=4).n_batches == 6
    assert as_batches(Stream(), batch_size=4).n_batches is None


def test_sources_that_can_be_read_once_lose_nothing_by_a_look():
    class Once(IterableDataset):
        samples = iter(zip(X, Y, strict=True))

        def __iter__(self):
            return self.samples

    batches = as_batches(Once(), batch_size=4, labels=True)
    assert torch.equal(batches.first(), batches.first())
    assert np.array_equal(torch.cat(list(batches)).numpy(), X)
    assert batches.labels.tolist() == Y.tolist()


def test_a_look_reads_nothing_twice():
    reads = []
    batches = as_batches(Pairs(lambda x, y: (reads.append(int(y)), (x, y))[1]), batch_size=4, labels=True)
    batches.first()
    batches.first()
    list(batches)
    assert reads == Y.tolist()
    list(batches)
    assert reads == [*Y.tolist(), *Y.tolist()]


def test_a_look_reads_the_first_batch_alone():
    reads = []
    batches = as_batches(Pairs(lambda x, y: (reads.append(int(y)), (x, y))[1]), batch_size=4)
    assert np.array_equal(batches.first().numpy(), X[:4])
    assert np.array_equal(batches.example.numpy(), X[:4])
    assert len(reads) == 4


def test_a_run_that_is_broken_off_after_a_look_begins_anew():
    batches = as_batches(Pairs(), batch_size=4, labels=True)
    batches.first()
    assert np.array_equal(next(iter(batches)).numpy(), X[:4])
    assert np.array_equal(torch.cat(list(batches)).numpy(), X)
    assert batches.labels.tolist() == Y.tolist()


def test_writeable_arrays_are_not_copied_and_read_only_ones_do_not_warn(tmp_path):
    array = X.copy()
    assert next(iter(as_batches(array, batch_size=4))).data_ptr() == array.ctypes.data
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on_disk = memmap(tmp_path)
        assert not on_disk.flags.writeable
        for x in as_batches(on_disk, batch_size=4):
            x += 1.0
    assert np.array_equal(np.load(tmp_path / "x.npy"), X)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8, np.int64, bool])
def test_dtypes_are_kept(dtype):
    x = next(iter(as_batches(np.ones((3, 2), dtype=dtype), batch_size=4)))
    assert x.numpy().dtype == dtype


@pytest.mark.parametrize("form", [lambda x, y: x, lambda x, y: (x,), lambda x, y: [x]])
def test_datasets_of_inputs_alone(form):
    assert np.array_equal(torch.cat(list(as_batches(Pairs(form), batch_size=4))).numpy(), X)
    with pytest.raises(ValueError, match=r"must give \(x, y\) pairs here; it gave x alone"):
        list(as_batches(Pairs(form), batch_size=4, labels=True))


def test_string_labels_of_a_dataset():
    batches = as_batches(Pairs(lambda x, y: (x, "abcd"[y])), batch_size=4, labels=True)
    list(batches)
    assert batches.labels.tolist() == ["abcd"[y] for y in Y]


def test_a_pair_is_taken_apart_only_where_no_y_is_given():
    X_, y_ = split_pair((X, Y), None)
    assert X_ is X
    assert y_ is Y
    pair = (X, Y)
    assert split_pair(pair, Y) == (pair, Y)
    assert split_pair([X, Y], None)[1] is None
    assert split_pair((X, Y, Y), None)[1] is None


def test_streams_are_datasets_and_loaders():
    assert all(is_stream(source) for source in (Pairs(), Stream(), DataLoader(Pairs())))
    assert not any(is_stream(source) for source in (X, torch.zeros(1), [1.0], (X, Y)))


# -- order ------------------------------------------------------------------------------------------------------------


class Repeated:
    """A sampler around another one."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        return iter(self.sampler)


class Shard(Repeated):
    """The same under another name."""

    def __init__(self, batch_sampler):
        super().__init__(None)
        self.batch_sampler = batch_sampler

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        return iter(self.batch_sampler)


def shuffled_batches():
    return BatchSampler(RandomSampler(Pairs()), 4, False)


SHUFFLED = {
    "shuffle": lambda: DataLoader(Pairs(), batch_size=4, shuffle=True),
    "random sampler": lambda: DataLoader(Pairs(), batch_size=4, sampler=RandomSampler(Pairs())),
    "subset": lambda: DataLoader(Pairs(), batch_size=4, sampler=SubsetRandomSampler(range(N))),
    "weighted": lambda: DataLoader(Pairs(), batch_size=4, sampler=WeightedRandomSampler([1.0] * N, N)),
    "batch sampler": lambda: DataLoader(Pairs(), batch_sampler=BatchSampler(RandomSampler(Pairs()), 4, False)),
    "no batching": lambda: DataLoader(Pairs(lambda x, y: (x[None], [y])), batch_size=None, shuffle=True),
    "several epochs": lambda: MultiEpochsDataLoader(Pairs(), batch_size=4, shuffle=True),
    "sampler in a sampler": lambda: DataLoader(Pairs(), batch_sampler=Repeated(Repeated(shuffled_batches()))),
    "batch sampler inside": lambda: DataLoader(Pairs(), batch_sampler=Shard(shuffled_batches())),
}
DROPPING = {
    "drop_last": lambda: DataLoader(Pairs(), batch_size=4, drop_last=True),
    "batch sampler": lambda: DataLoader(Pairs(), batch_sampler=BatchSampler(SequentialSampler(Pairs()), 4, True)),
    "several epochs": lambda: MultiEpochsDataLoader(Pairs(), batch_size=4, drop_last=True),
}


@pytest.mark.parametrize("loader", SHUFFLED.values(), ids=SHUFFLED)
def test_a_shuffling_loader_is_an_error_only_where_order_matters(loader):
    with pytest.raises(ValueError, match=r"X must keep its order.*DataLoader that shuffles.*shuffle=False"):
        as_batches(loader(), batch_size=4)
    batches = as_batches(loader(), batch_size=4, labels=True, ordered=False)
    inputs = torch.cat(list(batches)).numpy()
    rows = [int(np.flatnonzero((x == X).all(axis=(1, 2)))[0]) for x in inputs]
    assert batches.labels.tolist() == Y[rows].tolist()


@pytest.mark.parametrize("loader", DROPPING.values(), ids=DROPPING)
def test_a_loader_that_drops_samples_is_an_error_only_where_order_matters(loader):
    with pytest.raises(ValueError, match=r"X must keep every sample; got a DataLoader with drop_last=True"):
        as_batches(loader(), batch_size=4)
    assert sum(len(x) for x in as_batches(loader(), batch_size=4, ordered=False)) == 8


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [Pairs(), Stream(), DataLoader(Pairs())])
def test_labels_given_twice(given):
    with pytest.raises(ValueError, match=rf"y is taken from X where X is a {type(given).__name__}.*Leave y out"):
        as_batches(given, Y, batch_size=4, labels=True)


def test_labels_missing():
    with pytest.raises(ValueError, match=r"labels are needed: give y, a pair \(X, y\), or a Dataset.*got y=None"):
        as_batches(X, batch_size=4, labels=True)


@pytest.mark.parametrize("y", [Y[:-1], Y[:, None], 3, np.eye(4)[Y]], ids=["short", "column", "scalar", "one-hot"])
def test_labels_of_the_wrong_shape(y):
    with pytest.raises(ValueError, match=r"y must have shape \(11,\), one label a sample of X; got shape"):
        as_batches(X, y, batch_size=4, labels=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numbers_that_are_not_finite(bad, dtype):
    x = X.astype(dtype)
    x[-1, 0, 1] = bad
    batches = as_batches(x, batch_size=4)
    with pytest.raises(ValueError, match="X must be finite; it contains NaN or infinity"):
        list(batches)
    with pytest.raises(ValueError, match="X must be finite"):
        as_batches(x[-1:], batch_size=4).first()


@pytest.mark.parametrize(("dtype", "value"), [(np.float16, 6e4), (np.float32, 3e38), (np.float64, 1e308)])
def test_finite_numbers_whose_sum_overflows_are_allowed(dtype, value):
    x = np.full((5, 40), value, dtype=dtype)
    assert np.array_equal(torch.cat(list(as_batches(x, batch_size=3))).numpy(), x)


@pytest.mark.parametrize("given", [{"x": X}, {1.0, 2.0}, 3.0, None, iter([1.0])])
def test_things_that_are_no_data(given):
    with pytest.raises(TypeError, match=rf"X must be an array or tensor.*got {type(given).__name__}"):
        as_batches(given, batch_size=4)


@pytest.mark.parametrize(
    ("given", "came"),
    [
        (["a", "b"], "dtype <U1"),
        (np.array([X, None], dtype=object), "dtype object"),
        (np.array(["2020-01-01"], dtype="M8[D]"), "dtype datetime64"),
        ([X[0], X[0, :, :2]], "different shapes"),
    ],
)
def test_arrays_that_are_not_numeric(given, came):
    with pytest.raises(TypeError, match=f"X must be a numeric array.*{came}.*different sizes go through a Dataset"):
        as_batches(given, batch_size=4)


@pytest.mark.parametrize("given", [X[:0], [], torch.zeros(0, 3)])
def test_empty_arrays(given):
    with pytest.raises(ValueError, match="X holds no samples; give at least one"):
        as_batches(given, batch_size=4)


def test_empty_streams():
    class Nothing(IterableDataset):
        def __iter__(self):
            return iter([])

    for given in (TensorDataset(torch.zeros(0, 3)), Nothing()):
        with pytest.raises(ValueError, match="X holds no samples; give at least one"):
            as_batches(given, batch_size=4).first()


def test_dict_batches():
    with pytest.raises(TypeError, match=r"a batch must be x, \(x,\) or \(x, y\); got a dict"):
        list(as_batches(Pairs(lambda x, y: {"x": x, "y": y}), batch_size=4))


def test_batches_of_three():
    with pytest.raises(ValueError, match=r"a batch must be x, \(x,\) or \(x, y\); got 3 items"):
        list(as_batches(Pairs(lambda x, y: (x, y, y)), batch_size=4))


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "8", None])
def test_batch_sizes(batch_size):
    with pytest.raises(ValueError, match=rf"batch_size must be a whole number, at least 1; got {batch_size!r}"):
        as_batches(X, batch_size=batch_size)


# -- labels where there are any ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_labels_are_collected_where_there_are_any(source, tmp_path):
    source_data, y = SOURCES[source](tmp_path)
    batches = as_batches(source_data, y, batch_size=3, labels=None)
    assert not batches.labelled
    batches.first()
    assert not batches.labelled
    for _ in range(2):
        assert np.allclose(torch.cat(list(batches)).numpy(), X, atol=0)
        assert batches.labelled
        assert batches.labels.tolist() == Y.tolist()


@pytest.mark.parametrize(
    "given",
    [X, torch.from_numpy(X), Pairs(lambda x, y: x), Pairs(lambda x, y: (x,)), DataLoader(Pairs(lambda x, y: x))],
    ids=["array", "tensor", "dataset", "dataset of one", "loader"],
)
def test_inputs_alone_have_no_labels(given):
    batches = as_batches(given, batch_size=3, labels=None)
    assert np.array_equal(torch.cat(list(batches)).numpy(), X)
    assert not batches.labelled


def test_labels_that_are_not_asked_for_are_not_looked_at():
    batches = as_batches(Pairs(lambda x, y: (x, "abcd"[y])), batch_size=4)
    list(batches)
    assert not batches.labelled
    assert as_batches(X, "no labels", batch_size=4).n_batches == 3


def test_a_run_that_is_begun_anew_forgets_the_labels_of_the_last():
    batches = as_batches(X, Y, batch_size=3, labels=None)
    list(batches)
    next(iter(batches))
    assert batches.labels.tolist() == Y[:3].tolist()


def test_labels_that_may_be_given_must_still_fit():
    with pytest.raises(ValueError, match=r"y must have shape \(11,\), one label a sample of X; got shape \(10,\)"):
        as_batches(X, Y[:-1], batch_size=4, labels=None)
    with pytest.raises(ValueError, match=r"y is taken from X where X is a Pairs of \(x, y\).*Leave y out"):
        as_batches(Pairs(), Y, batch_size=4, labels=None)


# -- pictures and paths ------------------------------------------------------------------------------------------------

PICTURE = Image.new("RGB", (8, 6))
MEND = r"transform=torchvision\.transforms\.v2\.Compose.*to_tensor\(image\)\[None\] for one"


@pytest.mark.parametrize("given", ["images/", b"images", Path("images")], ids=["str", "bytes", "Path"])
def test_a_path_is_told_how_to_be_read(given):
    for ask in (
        check_source,
        lambda X: as_batches(X, batch_size=4),
        lambda X: as_batches(X, batch_size=4, labels=True),
    ):
        with pytest.raises(TypeError, match=r"got the path .*images.*give torchvision\.datasets\.ImageFolder\(path"):
            ask(given)


@pytest.mark.parametrize(
    "given", [PICTURE, [PICTURE, PICTURE], (PICTURE, PICTURE, PICTURE)], ids=["one", "list", "tuple"]
)
def test_pictures_are_told_how_to_become_tensors(given):
    for ask in (check_source, lambda X: as_batches(X, batch_size=4), lambda X: as_batches(X, [0, 1], batch_size=4)):
        with pytest.raises(TypeError, match=f"X must be an array or tensor .*got PIL images.*{MEND}"):
            ask(given)


@pytest.fixture
def impatient(monkeypatch):
    """PyTorch waits five seconds for the workers of a loader that failed, once it is collected as garbage."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.05)
    yield
    gc.collect()


PICTURES = {
    "pairs": lambda: Pairs(lambda x, y: (PICTURE, y)),
    "alone": lambda: Pairs(lambda x, y: PICTURE),
    "loader": lambda: DataLoader(Pairs(lambda x, y: (PICTURE, y)), batch_size=3),
    "workers": lambda: DataLoader(Pairs(lambda x, y: (PICTURE, y)), batch_size=3, num_workers=1),
    "no batching": lambda: DataLoader(Pairs(lambda x, y: (PICTURE, y)), batch_size=None),
    "collated as a list": lambda: DataLoader(Pairs(lambda x, y: PICTURE), batch_size=3, collate_fn=list),
}


@pytest.mark.parametrize("make", PICTURES.values(), ids=PICTURES)
def test_pictures_of_a_dataset_are_told_how_to_become_tensors(make, impatient):
    for ask in (list, lambda batches: batches.first()):
        with pytest.raises(TypeError, match=f"X gives PIL images, .*{MEND}"):
            ask(as_batches(make(), batch_size=4))


# -- errors of the source ----------------------------------------------------------------------------------------------


class Broken(Exception):
    """What a data set may raise."""


def failing(error):
    """Pairs of which the last one raises."""

    def form(x, y):
        if x is not X[-1] and not np.array_equal(x, X[-1]):
            return x, y
        raise error

    return Pairs(form)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [Broken("page torn"), TypeError("page torn"), ValueError("page torn")])
def test_errors_of_a_data_set_come_through(error, workers, impatient):
    batches = as_batches(DataLoader(failing(error), batch_size=4, num_workers=workers), batch_size=4)
    batches.first()
    with pytest.raises(type(error), match="page torn") as raised:
        list(batches)
    assert "PIL images" not in str(raised.value)
    assert ("worker process" in str(raised.value)) == bool(workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_inside_pil_is_not_taken_for_pictures(workers, impatient):
    def form(x, y):
        return np.asarray(Image.fromarray(np.zeros((2, 2), dtype=complex))), y  # PIL raises a TypeError of its own

    batches = as_batches(DataLoader(Pairs(form), batch_size=4, num_workers=workers), batch_size=4)
    with pytest.raises(TypeError, match="Cannot handle this data type") as raised:
        list(batches)
    assert "X gives PIL images" not in str(raised.value)


def test_workers_bring_all_samples_in_order_after_a_look():
    batches = as_batches(DataLoader(Pairs(), batch_size=4, num_workers=1), batch_size=4, labels=True)
    assert np.array_equal(batches.first().numpy(), X[:4])
    assert np.array_equal(torch.cat(list(batches)).numpy(), X)
    assert batches.labels.tolist() == Y.tolist()


# -- inputs that look otherwise than those of fit ----------------------------------------------------------------------

IMAGES = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)
GIVEN = {
    "array": lambda x: x,
    "tensor": torch.from_numpy,
    "dataset": lambda x: TensorDataset(torch.from_numpy(x)),
    "loader": lambda x: DataLoader(TensorDataset(torch.from_numpy(x)), batch_size=2),
}


@pytest.mark.parametrize("source", GIVEN.values(), ids=GIVEN)
def test_inputs_are_compared_with_those_of_fit(source):
    def read(x, resizes=False):
        batches = as_batches(source(x), batch_size=2, like=InputSpec((3, 8, 8), resizes))
        return torch.cat(list(batches)).numpy()

    assert np.array_equal(read(IMAGES), IMAGES)
    with pytest.raises(ValueError, match=r"got \(\d, 1, 8, 8\): 1 channels instead of 3"):
        read(IMAGES[:, :1])
    larger = np.repeat(IMAGES, 2, axis=3)
    with pytest.warns(InputWarning, match=r"inputs have shape \(3, 8, 16\), those of fit had \(3, 8, 8\)") as warned:
        assert np.array_equal(read(larger), larger)
    assert {warning.filename for warning in warned} == {__file__}
    assert np.array_equal(read(larger, resizes=True), larger)


@pytest.mark.parametrize("given", [IMAGES[0], torch.from_numpy(IMAGES[0])], ids=["array", "tensor"])
def test_one_image_is_told_what_it_lacks(given):
    with pytest.raises(ValueError, match=r"got \(3, 8, 8\), which looks like one input alone.*X\[None\]"):
        as_batches(given, batch_size=2, like=InputSpec((3, 8, 8)))
