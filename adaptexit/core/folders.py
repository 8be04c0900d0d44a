"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
