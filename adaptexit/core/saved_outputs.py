"""Outputs in a folder: one ``.npy`` file an array, and a JSON file that names them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptexit.utils.files import naming, parsed_json, read_array, read_bytes, write_array, write_text
from adaptexit.utils.folders import Kind, put_back, written_whole
from adaptexit.utils.schema import check_form, whole
from adaptexit.utils.validation import check_shape

FORMAT_VERSION = 1
ARRAYS = ("predictions", "scores", "labels", "stage_costs", "exit_costs", "logits", "quality", "sample_weight")
_ARRAY_NAME = rf"({'|'.join(ARRAYS)}|features_[0-9]+)"

OUTPUTS_FOLDER = Kind(
    "outputs.json",
    re.compile(rf"outputs\.json|{_ARRAY_NAME}\.npy"),
    lambda header: isinstance(header, dict) and {"format", "n_exits", "arrays"} <= header.keys(),
)
"""What tells a folder of outputs from others."""


def _array_name(value: Any) -> bool:
    """the name of an array of outputs"""
    return isinstance(value, str) and re.fullmatch(_ARRAY_NAME, value) is not None


_HEADER = {
    "format": int, "n_classes": (None, whole(1)), "chained": bool, "cost_unit?": (None, str), "n_exits": whole(1),
    "n_samples": whole(1), "arrays": [_array_name],
}  # fmt: skip


def write_outputs(folder: str | os.PathLike[str], header: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
    """Write arrays by name, and a header; an earlier folder of outputs is replaced whole."""
    with written_whole(folder, OUTPUTS_FOLDER) as scratch:
        for name, array in arrays.items():
            write_array(scratch / f"{name}.npy", array)
        whole_header = {"format": FORMAT_VERSION} | header | {"arrays": list(arrays)}
        write_text(scratch / OUTPUTS_FOLDER.marker, json.dumps(whole_header, indent=2) + "\n")


def read_outputs(folder: str | os.PathLike[str], *, mmap: bool) -> dict[str, Any]:
    """The fields of outputs that :func:`write_outputs` wrote; shapes are checked, values are not.

    Raises
    ------
    FileNotFoundError, ValueError
        For what is no such folder, or a damaged one: the message names the file.
    """
    source = Path(folder).expanduser()
    put_back(source)
    path = source / OUTPUTS_FOLDER.marker
    if not path.exists():
        raise FileNotFoundError(f"folder must hold ExitOutputs written by save; there is no {path.name} in {source}.")
    header = parsed_json(read_bytes(path), path)
    version = header.get("format") if isinstance(header, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {version!r}; this version reads format {FORMAT_VERSION}. "
            "Record the outputs again, or read them with the version that wrote them."
        )
    with naming(path):
        check_form(header, _HEADER, "header")
    arrays = {name: read_array(source / f"{name}.npy", mmap=mmap) for name in header["arrays"]}
    _check_shapes(header, arrays, source)
    fields: dict[str, Any] = {name: arrays.get(name) for name in ARRAYS}
    fields["features"] = [array for name, array in arrays.items() if name.startswith("features_")] or None
    fields |= {name: np.array(arrays[name]) for name in ("stage_costs", "exit_costs")}
    return fields | {name: header.get(name) for name in ("n_classes", "chained", "cost_unit")}


def _check_shapes(header: dict[str, Any], arrays: dict[str, NDArray[Any]], folder: Path) -> None:
    """Refuse arrays of other shapes than a header says, without reading them, and outputs that lack some."""
    n_exits, n_samples = header["n_exits"], header["n_samples"]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("predictions", "scores", "quality"), (n_exits, n_samples))
    shapes |= dict.fromkeys(("labels", "sample_weight"), (n_samples,))
    shapes |= {"logits": (n_exits, n_samples, header["n_classes"])}
    shapes |= dict.fromkeys(("stage_costs", "exit_costs"), (n_exits,))
    for name, array in arrays.items():
        with naming(folder / f"{name}.npy"):
            check_shape(array, shapes.get(name, (n_samples, *array.shape[1:2])), name)
            if array.dtype.kind not in "fiub":
                raise ValueError(f"{name} must be numbers; got dtype {array.dtype}.")
    needed = ["scores", "stage_costs", "exit_costs"] + ([] if "quality" in arrays else ["predictions", "labels"])
    if absent := [name for name in needed if name not in arrays]:
        raise ValueError(f"{folder} must hold {', '.join(absent)}; its header names {', '.join(arrays)} alone.")
    if sum(name not in shapes for name in arrays) not in (0, n_exits):
        raise ValueError(f"{folder} must hold features of all {n_exits} exits; its header names {', '.join(arrays)}.")
