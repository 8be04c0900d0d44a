import re
from collections import UserList, deque

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from adaptexit import CascadeSaver, FrozenRecipe, MultiExitClassifier
from adaptexit.data.batches import as_batches
from adaptexit.data.sources import check_source, is_stream, split_pair

X = np.random.default_rng(0).normal(size=(6, 3, 4)).astype(np.float32)
Y = np.arange(6) % 2


class Rows:
    """A data set of no library, of these rows."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class Named(Rows):
    """One whose rows go by name."""

    def __getitem__(self, i):
        return {"a": 1}[i]


def rows(**columns):
    return Rows([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])


@pytest.mark.parametrize(
    "source",
    [
        list(zip(X, Y, strict=True)),
        [(x, "ab"[y]) for x, y in zip(X, Y, strict=True)],
        [(Image.new("L", (3, 4)), 1)],
        deque(zip(X, Y, strict=True)),
        Rows(X),
        Rows([(x,) for x in X]),
        rows(image=X, label=Y),
        [{"image": X[0]}],
    ],
)
def test_rows_by_number_are_a_data_set(source):
    assert is_stream(source)


@pytest.mark.parametrize(
    "source",
    [
        X,
        X.tolist(),
        list(X),
        [(1.0, 2.0)],
        [[1.0, 2.0], [3.0, 4.0]],
        [(X[0], X[1])],
        [(X[0], None)],
        [],
        (X, Y),
        Rows([]),
        UserList([1.0, 2.0]),
        range(4),
        Named(X),
        "ab",
        {0: (X[0], 1)},
        3,
        None,
    ],
    ids=repr,
)
def test_what_is_an_array_or_nothing_is_none(source):
    assert not is_stream(source)


def test_inputs_alone():
    for source in (Rows(X), Rows([(x,) for x in X]), rows(image=X), rows(image=X, caption=Y)):
        batches = as_batches(source, batch_size=4, labels=None)
        assert torch.cat(list(batches)).tolist() == X.tolist()
        assert not batches.labelled


def test_labels_that_have_names():
    batches = as_batches([(x, "ab"[y]) for x, y in zip(X, Y, strict=True)], batch_size=4, labels=True)
    list(batches)
    assert batches.labels.tolist() == ["ab"[y] for y in Y]


UNCLEAR = {
    "no image": rows(picture=X, label=Y),
    "two images": rows(image=X, img=X, label=Y),
    "two labels": rows(image=X, label=Y, labels=Y),
    "fine and coarse": rows(img=X, fine_label=Y, coarse_label=Y),
    "target": rows(image=X, target=Y),
}


@pytest.mark.parametrize("source", UNCLEAR)
def test_columns_that_say_nothing(source):
    data = UNCLEAR[source]
    message = f"got a dict with the columns {list(data[0])}, of which one has to be the image (pixel_values"
    for labels in (True, None):
        with pytest.raises(TypeError, match=re.escape(message) + r".*Rename them, or give pairs: \[\(row"):
            list(as_batches(data, batch_size=4, labels=labels))
    if "image" not in source:  # labels that nobody asks for need no name
        assert torch.cat(list(as_batches(data, batch_size=4))).tolist() == X.tolist()


def test_pictures_in_columns_are_told_how_to_become_tensors():
    picture = Image.new("RGB", (8, 6))
    for source in (rows(image=[picture] * 3, label=Y[:3]), [(picture, 0)] * 3):
        with pytest.raises(TypeError, match=r"X gives PIL images, .*Hugging Face: with_format\('torch'\)"):
            list(as_batches(source, batch_size=4))


def test_errors_of_rows_come_through():
    class Broken(Rows):
        def __getitem__(self, i):
            raise RuntimeError("file 0 is damaged")

    with pytest.raises(RuntimeError, match="file 0 is damaged"):
        as_batches(Broken(X), batch_size=4)


def test_labels_beside_rows():
    with pytest.raises(ValueError, match=r"y is taken from X where X is a list of \(x, y\).*Leave y out"):
        as_batches(list(zip(X, Y, strict=True)), Y, batch_size=4)


@pytest.mark.filterwarnings("ignore::adaptexit.SaverWarning")
def test_estimators_take_rows_of_every_kind():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    sources = (list(zip(X, Y, strict=True)), rows(pixel_values=list(X), label=Y.tolist()))
    for estimator in (
        CascadeSaver(net, net, cost=[1, 2]),
        MultiExitClassifier([nn.Flatten(), nn.Linear(12, 2)], recipe=FrozenRecipe(epochs=1)),
    ):
        arrays = estimator.fit(np.concatenate([X] * 4), np.concatenate([Y] * 4)).calibrate(X, Y)
        expected, accuracy = arrays.predict(X).tolist(), arrays.score(X, Y)
        for source in sources:
            model = estimator.calibrate(source)
            assert model.outputs_.labels.tolist() == Y.tolist()
            assert model.predict(source).tolist() == expected
            assert model.score(source) == accuracy


# -- values that would be read otherwise than they are meant ---------------------------------------------------------

MASKED = np.ma.masked_array(X, X > 1)


@pytest.mark.parametrize("given", [MASKED, X.astype(complex), torch.from_numpy(X).to(torch.complex64)])
def test_masked_and_complex_inputs(given):
    message = "X must be a plain array; got a masked one. Leave|X must be real numbers; got (torch.)?complex"
    for ask in (check_source, lambda data: as_batches(data, batch_size=4)):
        with pytest.raises((TypeError, ValueError), match=message):
            ask(given)
    if isinstance(given, torch.Tensor):
        with pytest.raises(ValueError, match=message):
            list(as_batches(Rows(given), batch_size=4))


@pytest.mark.parametrize("given", [np.ma.masked_array(Y, Y > 0), Y.astype(complex), torch.from_numpy(Y) * 1j])
def test_masked_and_complex_labels(given):
    message = "y must be a plain array; got a masked one. Leave|y must be real numbers; got (torch.)?complex"
    for ask in (
        lambda: split_pair(X, given),
        lambda: split_pair((X, given), None),
        lambda: as_batches(X, given, batch_size=4, labels=True),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ask()


def test_labels_with_gradients():
    y = torch.from_numpy(Y).float().requires_grad_()
    assert split_pair(X, y)[1].tolist() == Y.tolist()
    batches = as_batches(X, y, batch_size=4, labels=True)
    list(batches)
    assert batches.labels.tolist() == Y.tolist()
    pairs = [(x, label) for x, label in zip(X, y, strict=True)]
    streamed = as_batches(pairs, batch_size=4, labels=True)
    list(streamed)
    assert streamed.labels.tolist() == Y.tolist()
    assert y.requires_grad


def test_labels_of_different_lengths():
    with pytest.raises(ValueError, match="y must be an array; got entries of different shapes"):
        split_pair(X, [[1], [1, 2]])
