"""Folders that appear whole or not at all, and never in the place of something else."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: what killed saves left is then put back, but never cleared away
    fcntl = None  # type: ignore[assignment]

WORKSHOP = ".saving"
"""How the names of folders end in which a save is prepared, beside its place: ``.name-xxxxxxxx.saving``."""


@dataclass(frozen=True)
class Kind:
    """What tells folders of one kind from all others.

    Attributes
    ----------
    marker : str
        A JSON file that every such folder holds.
    contents : pattern
        Of the paths of files and folders that it may hold, relative and with slashes.
    describes : callable
        Whether what the marker holds is that of such a folder.
    """

    marker: str
    contents: re.Pattern[str]
    describes: Callable[[Any], bool]


@contextmanager
def written_whole(folder: str | os.PathLike[str], kind: Kind) -> Iterator[Path]:
    """A scratch folder that takes the place of ``folder`` when the block ends well, and vanishes when it does not.

    What is there already is replaced if it is empty or of the same kind, with nothing else in it, and not touched
    otherwise. A process that is killed leaves the earlier folder in its place or beside it, where :func:`put_back`
    finds it, and the next call clears away what else it left.

    Raises
    ------
    FileExistsError
        If the folder holds something else, or cannot be exchanged as somebody works in it.
    """
    target = Path(os.path.realpath(os.path.expanduser(folder)))
    put_back(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent) as alone:  # nobody exchanges the folder while it is looked at
        _check_replaceable(target, kind)
        if alone:
            _clear_away(target)
        # Beside the target, so that the moves below are renames on one file system.
        workshop = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=WORKSHOP, dir=target.parent))
        in_use = _lock(workshop, wait=True)
    try:
        scratch = workshop / "new"
        scratch.mkdir()
        yield scratch
        _give_usual_modes(scratch)
        with locked(target.parent):
            try:
                if target.exists():
                    os.replace(target, workshop / "old")
                os.replace(scratch, target)
            finally:
                _put_back(target)
    finally:
        if target.exists() or not (workshop / "old").exists():  # never the only copy, whatever went wrong
            shutil.rmtree(workshop, ignore_errors=True)
        _unlock(in_use)


def put_back(folder: str | os.PathLike[str]) -> None:
    """Give a folder that a killed :func:`written_whole` had moved aside its place again."""
    target = Path(os.path.realpath(os.path.expanduser(folder)))
    if _is_vacant(target) and target.parent.is_dir():
        with locked(target.parent):
            _put_back(target)


def _put_back(target: Path) -> None:
    """The same while nobody else moves folders."""
    for workshop in _workshops(target):
        # Both are there between the two renames alone; an earlier folder by itself has been replaced already.
        if (workshop / "new").is_dir() and (workshop / "old").is_dir() and _is_vacant(target):
            os.replace(workshop / "old", target)


def _is_vacant(target: Path) -> bool:
    try:
        return not target.exists() or (target.is_dir() and not any(target.iterdir()))
    except FileNotFoundError:  # somebody exchanges it just now
        return True


def _clear_away(target: Path) -> None:
    """Remove what killed runs left; runs that still write hold a lock."""
    for workshop in _workshops(target):
        lock = _lock(workshop, wait=False)
        if lock is not None:
            shutil.rmtree(workshop, ignore_errors=True)
            _unlock(lock)


def _workshops(target: Path) -> list[Path]:
    own = re.compile(re.escape(f".{target.name}-") + "[a-z0-9_]{8}" + re.escape(WORKSHOP))
    return sorted(path for path in target.parent.iterdir() if own.fullmatch(path.name) and not path.is_symlink())


# -- what may be replaced ----------------------------------------------------------------------------------------------


def _check_replaceable(target: Path, kind: Kind) -> None:
    """Refuse to replace anything but an empty folder, or one of the same kind with nothing else in it."""
    if not os.path.lexists(target):
        return
    reason = _in_the_way(target, kind)
    if reason:
        raise FileExistsError(
            f"folder must be new, empty or an earlier save (one with {kind.marker}); {target} holds something else: "
            f"{reason}. Nothing was written or deleted. Choose another folder."
        )
    with suppress(FileNotFoundError):  # somebody works in a folder that is gone
        if Path.cwd().is_relative_to(target):
            raise FileExistsError(
                f"folder must not be the one worked in, as it is exchanged whole; got {target}. Choose a folder in it."
            )


def _in_the_way(target: Path, kind: Kind) -> str:
    """What is no part of a folder of that kind, in words; empty if nothing is."""
    if not target.is_dir():
        return "it is a file"
    paths = sorted(_paths_below(target))
    if not paths:
        return ""
    if kind.marker not in paths:
        return _listed(paths)
    try:
        is_ours = kind.describes(json.loads((target / kind.marker).read_bytes()))
    except (ValueError, RecursionError):
        is_ours = False
    if not is_ours:
        return f"a {kind.marker} of another kind, or a damaged one"
    return _listed([path for path in paths if not kind.contents.fullmatch(path)])


def _paths_below(folder: Path, prefix: str = "") -> Iterator[str]:
    """Relative paths of all files and folders; links and what else is no file end in a question mark."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            yield prefix + entry.name
            yield from _paths_below(Path(entry.path), f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name + ("" if entry.is_file(follow_symlinks=False) else "?")


def _listed(paths: list[str], most: int = 3) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")


# -- modes and locks ---------------------------------------------------------------------------------------------------


def _give_usual_modes(folder: Path) -> None:
    """Let the umask say who may read the files: some writers make theirs private to the owner."""
    probe = folder / ".mode"
    probe.touch()
    usual = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(usual)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Wait until nobody else is in such a block for the same folder; whether that can be known here."""
    lock = _lock(folder, wait=True)
    try:
        yield lock is not None
    finally:
        _unlock(lock)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A descriptor that holds a lock on a folder and gives it back when closed; None where there is none to be had."""
    if fcntl is None:
        return None
    with suppress(OSError):  # file systems without locks, folders that must not be read, or locked by another
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise
    return None


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)
