"""Folders that appear whole or not at all, and named arrays in them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


@contextmanager
def written_whole(folder: str | os.PathLike[str], marker: str) -> Iterator[Path]:
    """A scratch folder that takes the place of ``folder`` when the block ends well, and vanishes when it does not.

    ``marker`` is a file that every such folder holds: a folder that is neither empty nor has it is not overwritten.
    """
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / marker).is_file())):
        raise FileExistsError(
            f"folder must be new, empty or an earlier save (one with {marker}); {folder} holds something else. "
            "Choose another folder."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # The scratch folder lies beside the target, so that both moves below are renames on one file system.
    workshop = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        scratch = workshop / "new"
        scratch.mkdir()
        yield scratch
        _give_usual_modes(scratch)
        if target.exists():
            os.replace(target, workshop / "old")
        try:
            os.replace(scratch, target)
        except OSError:
            if (workshop / "old").exists():
                os.replace(workshop / "old", target)
            raise
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _give_usual_modes(folder: Path) -> None:
    """Let the umask say who may read the files: some writers make theirs private to the owner."""
    probe = folder / ".mode"
    probe.touch()
    usual = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(usual)


def write_arrays(folder: Path, marker: str, header: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
    """Arrays as ``.npy`` files, and a header with their names in the JSON file ``marker``."""
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    (folder / marker).write_text(json.dumps(header | {"arrays": list(arrays)}, indent=2) + "\n")


def read_arrays(
    folder: str | os.PathLike[str], marker: str, version: int, what: str, *, mmap: bool = False
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """What :func:`write_arrays` wrote for a ``what`` of that format version; nothing is unpickled."""
    source = Path(folder)
    if not (source / marker).is_file():
        raise FileNotFoundError(f"folder must hold {what} written by save; there is no {marker} in {source}.")
    header = json.loads((source / marker).read_text())
    if header.get("format") != version:
        raise ValueError(
            f"{source} has format {header.get('format')!r}; this version reads format {version}. "
            "Record the outputs again, or read them with the version that wrote them."
        )
    mode: Literal["r"] | None = "r" if mmap else None
    arrays = {name: np.load(source / f"{name}.npy", mmap_mode=mode, allow_pickle=False) for name in header["arrays"]}
    return header, arrays
