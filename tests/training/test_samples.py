import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from adaptexit.training.samples import Hashed, Samples, seeded

X, Y = np.arange(40, dtype=np.float32).reshape(20, 2), np.arange(20) % 3
BATCHES = [torch.tensor([3, 1, 7]), torch.tensor([0, 19])]


class Noisy(Dataset):
    """Adds what torch, NumPy and Python draw."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        noise = torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002
        return torch.from_numpy(X[i]) + noise, int(Y[i])


def sources():
    dataset = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    return {
        "array": (X, Y),
        "tensor": (torch.from_numpy(X), torch.from_numpy(Y)),
        "dataset": (dataset, None),
        "loader": (DataLoader(dataset, batch_size=8), None),
        "shuffling loader": (DataLoader(dataset, batch_size=8, shuffle=True), None),
        "list": ([(torch.from_numpy(x), int(y)) for x, y in zip(X, Y, strict=True)], None),
    }


@pytest.mark.parametrize("kind", sources())
def test_every_source_gives_the_same_samples_by_number_and_in_order(kind):
    samples = Samples(*sources()[kind], 8)
    assert len(samples) == 20
    for batch, rows in zip(samples.read(BATCHES, seed=0), BATCHES, strict=True):
        np.testing.assert_array_equal(batch.numpy(), X[rows.numpy()])
    for rows in (None, np.array([2, 5, 11])):
        batches = samples.in_order(rows)
        np.testing.assert_array_equal(torch.cat(list(batches)).numpy(), X if rows is None else X[rows])
        np.testing.assert_array_equal(batches.labels, Y if rows is None else Y[rows])


def test_a_loaders_batch_size_workers_and_collation_are_used():
    def collate(rows):
        x, y = zip(*rows, strict=True)
        return torch.stack(x) + 100, torch.tensor(y)

    dataset = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    samples = Samples(DataLoader(dataset, batch_size=5, collate_fn=collate), None, 8)
    first, *rest = samples.in_order()
    assert len(first) == 5
    assert len(rest) == 3
    np.testing.assert_array_equal(next(iter(samples.read(BATCHES, 0))).numpy(), X[[3, 1, 7]] + 100)


def test_augmentation_changes_each_sample_by_itself():
    samples = Samples(X, Y, 8, augment=lambda x: x + torch.rand(()))
    with seeded(3):
        (batch,) = samples.read([torch.arange(10)], 0)
    shift = (batch.numpy() - X[:10])[:, 0]
    assert len(np.unique(shift.round(4))) == 10
    np.testing.assert_array_equal(torch.cat(list(samples.in_order())).numpy(), X)  # what is recorded stays as it is


def test_augmentation_may_take_whole_batches():
    samples = Samples(X, Y, 8, augment=lambda x: x + torch.arange(len(x))[:, None], in_batches=True)
    (batch,) = samples.read([torch.tensor([3, 1, 7])], 0)
    np.testing.assert_array_equal(batch.numpy(), X[[3, 1, 7]] + np.arange(3)[:, None])


@pytest.mark.parametrize("wrong", [lambda x: x[:-1], lambda x: list(x)])
def test_a_batch_that_augmentation_spoils_is_refused(wrong):
    samples = Samples(X, Y, 8, augment=wrong, in_batches=True)
    with pytest.raises(ValueError, match="as many samples, 3"):
        next(iter(samples.read([torch.tensor([3, 1, 7])], 0)))


def test_what_is_drawn_is_the_same_for_the_same_numbers_and_nobody_elses_numbers_change():
    samples = Samples(Noisy(), None, 8)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002
    expected = [torch.rand(3), np.random.rand(3), random.random()]  # noqa: NPY002
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002
    reads = []
    for numbers in ((1, 2), (1, 2), (1, 3)):
        with seeded(*numbers) as seed:
            reads.append(torch.cat(list(samples.read(BATCHES, seed))))
    assert torch.equal(reads[0], reads[1])
    assert not torch.equal(reads[0], reads[2])
    actual = [torch.rand(3), np.random.rand(3), random.random()]  # noqa: NPY002
    assert torch.equal(expected[0], actual[0])
    assert (expected[1] == actual[1]).all()
    assert expected[2] == actual[2]


def test_the_hash_is_that_of_the_samples():
    hashes = []
    for x in (X, X.copy(), X + 1, X[::-1]):
        hashed = Hashed(Samples(x, Y, 8).in_order(), 0)
        assert len(torch.cat(list(hashed))) == 20
        hashes.append(hashed.result)
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_what_transforms_draw_is_the_same_whenever_samples_are_hashed():
    hashed = Hashed(Samples(Noisy(), None, 8).in_order(), 0)
    first, one = torch.cat(list(hashed)), hashed.result
    torch.rand(3)
    assert torch.equal(torch.cat(list(hashed)), first)
    assert hashed.result == one


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


def test_sources_without_numbers_are_refused():
    with pytest.raises(TypeError, match="X must be read by number"):
        Samples(Stream(), None, 8)
    with pytest.raises(TypeError, match="X must be read by number"):
        Samples(DataLoader(Stream(), batch_size=4), None, 8)


def test_a_loader_that_draws_by_weight_is_refused():
    sampler = WeightedRandomSampler([1.0] * 20, 20)
    loader = DataLoader(TensorDataset(torch.from_numpy(X)), sampler=sampler, batch_size=4)
    with pytest.raises(ValueError, match="a loader that gives every sample once"):
        Samples(loader, None, 8)


def test_a_loader_of_whole_batches_is_refused():
    batches = [(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(ValueError, match="got one with batch_size=None, whose Dataset gives whole batches"):
        Samples(DataLoader(batches, batch_size=None), None, 8)


def test_augmentation_beside_a_dataset_is_refused():
    with pytest.raises(ValueError, match="augment must be left out where X is a TensorDataset"):
        Samples(TensorDataset(torch.from_numpy(X)), None, 8, augment=torch.abs)
