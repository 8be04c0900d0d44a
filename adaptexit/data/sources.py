"""Where samples come from: what serves as a data set, what never can, and whether a loader keeps the order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from adaptexit.data.classes import as_labels
from adaptexit.utils.validation import check_plain

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)

_IMAGE_COLUMNS = ("pixel_values", "image", "img")
_LABEL_COLUMNS = ("label", "labels")

TO_TENSORS = (
    "Turn them into tensors: give the data set transform=torchvision.transforms.v2.Compose([v2.ToImage(), "
    "v2.ToDtype(torch.float32, scale=True)]) (one of Hugging Face: with_format('torch')), or use "
    "torchvision.transforms.functional.to_tensor(image)[None] for one."
)


def split_pair(X: Any, y: Any) -> tuple[Any, Any]:
    """(X, y) given as one pair, taken apart where no y is given beside it."""
    X, y = X if y is None and isinstance(X, tuple) and len(X) == 2 else (X, y)
    return X, None if y is None else as_labels(y)


def is_stream(X: Any) -> bool:
    """Whether X is a Dataset or DataLoader, or serves as one, rather than an array or tensor."""
    return isinstance(X, (DataLoader, Dataset)) or is_foreign(X)


def check_source(X: Any) -> None:
    """Refuse what no data come from, before anything else is said of it.

    Raises
    ------
    TypeError
        For paths, PIL images, masked arrays and complex numbers.
    """
    if isinstance(X, (str, bytes, os.PathLike)):
        raise TypeError(
            f"X must be an array or tensor of shape (N, ...), a Dataset or a DataLoader; got the path {X!r}. For a "
            "folder of images give torchvision.datasets.ImageFolder(path, transform)."
        )
    if are_images(X):
        raise TypeError(f"X must be an array or tensor of shape (N, ...); got PIL images. {TO_TENSORS}")
    check_plain("X", X)


def are_images(x: Any) -> bool:
    """Whether these are PIL images, one or a sequence."""
    return isinstance(x, Image) or (isinstance(x, (list, tuple)) and len(x) > 0 and isinstance(x[0], Image))


def check_table(X: Any, where: str) -> None:
    """Refuse a Dataset or DataLoader where an array is needed, which ``where`` says."""
    if is_stream(X):
        raise ValueError(
            f"X must be an array where {where}; got a {type(X).__name__}. Give arrays, or a classifier that is fitted."
        )


# -- data sets of others ----------------------------------------------------------------------------------------------


class ForeignDataset(Dataset[Any]):
    """Rows by number from what is no Dataset of torch: a list of (x, y), or a data set of another library."""

    def __init__(self, rows: Any, labels: bool | None) -> None:
        self.rows, self.labels = rows, labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        row = self.rows[i]
        if isinstance(row, Mapping):
            x, y = from_columns(row, self.labels)
            row = (x,) if y is None else (x, y)
        if not isinstance(row, (tuple, list)):
            return row
        x, *rest = row
        return np.asarray(x) if isinstance(x, (tuple, list)) else x, *rest


def is_foreign(X: Any) -> bool:
    """Whether something that torch does not know as a data set serves as one: its first row tells."""
    if isinstance(X, (np.ndarray, Tensor, Dataset, DataLoader, tuple, str, bytes, Mapping)):
        return False
    if not isinstance(X, list):
        if hasattr(X, "__array__") or hasattr(X, "shape"):  # tables of other libraries
            return False
        if not (hasattr(X, "__len__") and hasattr(X, "__getitem__")):
            return False
    try:
        row = X[0] if len(X) else None
    except (IndexError, KeyError, TypeError):  # no rows by number
        return False
    alone = not isinstance(X, list) and (_is_input(row) or (isinstance(row, tuple) and len(row) == 1))
    return isinstance(row, Mapping) or _is_pair(row) or alone


def _is_pair(row: Any) -> bool:
    if not (isinstance(row, (tuple, list)) and len(row) == 2):
        return False
    x, y = row
    return (_is_input(x) or (isinstance(x, (tuple, list)) and len(x) > 0)) and y is not None and np.ndim(y) == 0


def _is_input(x: Any) -> bool:
    return isinstance(x, Image) or (isinstance(x, (np.ndarray, Tensor)) and x.ndim > 0)


def from_columns(row: Mapping[str, Any], labels: bool | None) -> tuple[Any, Any]:
    """Input and label of a row, or of a batch of them, by the names of its columns; no label where none is wanted.

    Raises
    ------
    TypeError
        Where the names do not say which is which.
    """
    names = [str(name) for name in row]
    image = _sole([name for name in _IMAGE_COLUMNS if name in row][: 1 if "pixel_values" in row else None])
    label = _sole([name for name in _LABEL_COLUMNS if name in row])
    unclear = label is None and any("label" in name or name in ("target", "targets", "y") for name in names)
    if image is None or (labels is not False and unclear):
        raise TypeError(
            f"a batch must be x, (x,) or (x, y); got a {type(row).__name__} with the columns {names}, of which one has "
            "to be the image (pixel_values, image or img) and one the label (label or labels). Rename them, or give "
            "pairs: [(row['the_image'], row['the_label']) for row in X]."
        )
    return row[image], None if labels is False or label is None else row[label]


def _sole(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None


# -- order ------------------------------------------------------------------------------------------------------------


def check_order(loader: DataLoader[Any]) -> None:
    """Refuse a loader that shuffles or drops samples, however deep inside others the sampler is that does."""
    samplers = [sampler for outer in (loader.batch_sampler, loader.sampler) for sampler in _samplers_in(outer)]
    if any(isinstance(sampler, _SHUFFLING) or getattr(sampler, "shuffle", False) for sampler in samplers):
        raise ValueError(
            "X must keep its order, since answers and weights are in input order; got a DataLoader that shuffles. "
            "Build it with shuffle=False."
        )
    if loader.drop_last or any(getattr(sampler, "drop_last", False) for sampler in samplers):
        raise ValueError("X must keep every sample; got a DataLoader with drop_last=True. Build it without.")


def _samplers_in(outer: Any) -> Iterator[Any]:
    """A sampler and those inside it, from the outermost: loaders of several epochs or processes wrap them."""
    passed: list[Any] = []
    while outer is not None and not any(outer is sampler for sampler in passed):
        yield outer
        passed.append(outer)
        names = ("sampler", "batch_sampler", "base_sampler")
        outer = next((inner for name in names if (inner := getattr(outer, name, None)) is not None), None)
