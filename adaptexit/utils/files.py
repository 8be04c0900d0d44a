"""Files that are read with care: whatever lies there, what is wrong is said with the file's name."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray


@contextmanager
def naming(path: Path, *damages: type[Exception]) -> Iterator[None]:
    """Say in errors of the block which file they are about; of ``damages``, a library's own, make ValueErrors."""
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError, *damages)
    try:
        yield
    except OSError as error:
        if error.filename is not None or str(path) in str(error):
            raise
        if error.errno is None:
            raise type(error)(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error
    except kinds as error:
        if str(path) in str(error) and isinstance(error, (ValueError, TypeError)):
            raise
        raise ValueError(f"{path} cannot be read: {error}") from error


def regular_file(path: Path) -> Path:
    """The path, if a file lies there; pipes and devices, which may hang, are refused."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing.")
    if not path.is_file():
        raise ValueError(f"{path} must be a regular file; it is something else.")
    return path


def sha256_of(path: Path) -> str:
    """Checksum of a file's content, as 64 hexadecimal digits."""
    with naming(path), open(regular_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(path: Path) -> bytes:
    """The whole content of a file."""
    with naming(path):
        return regular_file(path).read_bytes()


def parsed_json(content: bytes, path: Path) -> Any:
    """The JSON value in the content of a file; NaN and infinite numbers are refused."""

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(f"{text} is no finite number.")
        return number

    with naming(path, RecursionError):
        return json.loads(content, parse_constant=finite, parse_float=finite)


def write_text(path: Path, text: str) -> None:
    """A text file."""
    with naming(path):
        path.write_text(text)


def write_array(path: Path, array: NDArray[Any]) -> None:
    """An array as a ``.npy`` file."""
    with naming(path):
        np.save(path, array, allow_pickle=False)
    try:
        read_array(path, mmap=True)
    except ValueError as error:  # NumPy does not say when the end of a small array finds no room
        raise OSError(f"{path} cannot be written whole. Is the disk full?") from error


def read_array(path: Path, *, mmap: bool = False) -> NDArray[Any]:
    """The array in a ``.npy`` file, whose size is compared with what its header says before anything is made."""
    with naming(path, Exception), open(regular_file(path), "rb") as file:
        first = npy.read_magic(file) == (1, 0)
        shape, fortran_order, dtype = (npy.read_array_header_1_0 if first else npy.read_array_header_2_0)(file)
        offset = file.tell()
        if dtype.hasobject:
            raise ValueError("it holds objects, which are not loaded (allow_pickle=False).")
        size = offset + math.prod(shape) * dtype.itemsize
        if any(length < 0 for length in shape) or size != os.fstat(file.fileno()).st_size:
            raise ValueError(f"an array of shape {shape} and {dtype} takes {size} bytes, which the file has not.")
        if mmap and size > offset:
            order: Any = "F" if fortran_order else "C"
            return np.memmap(path, dtype, mode="r", offset=offset, shape=shape, order=order)
        flat = np.fromfile(file, dtype, math.prod(shape))
        return flat.reshape(shape[::-1]).T if fortran_order else flat.reshape(shape)
