"""Small modules of calibrators asked for probabilities, which do not depend on who else is in the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adaptexit.core.scores import CELLS
from adaptexit.staging.contexts import random_state_kept
from adaptexit.utils.validation import stored_array

Floats = NDArray[np.float64]

CHUNK = 8192
"""Rows at a time, fewer where they are wide."""

STEP = 1e-6
"""Distance of neighbouring probabilities."""


def rows_of(array: NDArray[Any], dtype: Any = np.float32) -> Tensor:
    """An array as a tensor of that precision; read-only arrays (memory-mapped ones) are copied."""
    return torch.from_numpy(np.require(array, dtype=dtype, requirements=["C", "W"]))


def rows_at(array: NDArray[Any], rows: Tensor) -> Tensor:
    """Some rows of an array in single precision: all of them would be a copy of what is mapped from disk."""
    return rows_of(np.asarray(array)[rows.numpy()])


def probabilities(module: nn.Module, *arrays: NDArray[Any]) -> Floats:
    """Probability (N,) whose log-odds a module gives for arrays (N, ...).

    Matrix products round differently with the size of a batch. In double precision, some 1e-16, and then rounded to
    ``STEP``, that is seen only where a probability lies within this distance of the middle of a step. So samples with
    equal probabilities stay together wherever they are asked for. A module in single precision is copied for that.
    """
    parameters = module.parameters()
    exact = module if next(parameters).dtype == torch.float64 else copy.deepcopy(module).double()

    def of_rows(rows: slice) -> Tensor:
        inputs = tuple(rows_of(array[rows], np.float64) for array in arrays)
        return exact(*inputs).sigmoid()

    size = max(1, min(CHUNK, CELLS // max(sum(array.shape[1] for array in arrays), 1)))
    with torch.inference_mode():
        parts = [of_rows(slice(start, start + size)) for start in range(0, max(len(arrays[0]), 1), size)]
    return np.rint(torch.cat(parts).numpy() / STEP) * STEP


def state_arrays(prefix: str, modules: list[Any]) -> dict[str, Floats]:
    """Parameters and buffers of modules as named arrays."""
    return {
        f"{prefix}_{k}.{name}": tensor.double().numpy()
        for k, module in enumerate(modules)
        for name, tensor in module.state_dict().items()
    }


def restored(prefix: str, arrays: dict[str, Floats], make: Callable[[int], nn.Module], n: int) -> list[Any]:
    """The modules that :func:`state_arrays` took apart, made by ``make(k)`` and filled."""
    modules = []
    with random_state_kept():
        for k in range(n):
            module = make(k)
            shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
            own = {name: stored_array(arrays, f"{prefix}_{k}.{name}", shape) for name, shape in shapes.items()}
            module.load_state_dict({name: rows_of(array) for name, array in own.items()})
            modules.append(module.eval().double())
    return modules
