"""The state of a training, kept after every epoch: whole or not at all, and taken up only by the same run."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptexit.exceptions import CheckpointWarning, warn
from adaptexit.utils.files import parsed_json, read_bytes, sha256_of, write_text
from adaptexit.utils.folders import Kind, put_back, written_whole

FORMAT = 1
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_MARKER, _STATE = "checkpoint.json", "state.pt"

_KIND = Kind(
    marker=_MARKER,
    contents=re.compile(rf"{re.escape(_MARKER)}|{re.escape(_STATE)}"),
    describes=lambda header: isinstance(header, dict) and header.get("kind") == "adaptexit training",
)


class Checkpoints:
    """Where a run keeps its state, ``folder/joint-<key>``; nowhere for a folder of None.

    Parameters
    ----------
    folder : Path or None
    key : str
        Of all that decides how the run goes on: settings, data, weights at the start.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self.place = None if folder is None else folder / f"joint-{key[:16]}"
        self.key = key

    def keep(self, epoch: int, state: dict[str, Any]) -> None:
        """Put the state after ``epoch`` in the place of the one before it."""
        if self.place is None:
            return
        with written_whole(self.place, _KIND) as scratch:
            torch.save(state, scratch / _STATE)
            header = {
                "kind": "adaptexit training", "format": FORMAT, "key": self.key, "epoch": epoch,
                "sha256": sha256_of(scratch / _STATE),
            }  # fmt: skip
            write_text(scratch / _MARKER, json.dumps(header, indent=1))

    def latest(self) -> dict[str, Any] | None:
        """The state that was kept last, if it is there and whole; a damaged one is passed over with a warning."""
        if self.place is None:
            return None
        put_back(self.place)
        if not self.place.exists():
            return None
        try:
            path = self.place / _MARKER
            header = parsed_json(read_bytes(path), path)
            if not _KIND.describes(header) or header.get("format") != FORMAT or header.get("key") != self.key:
                raise ValueError(f"{path} is of another run, or of another version of this package.")
            if sha256_of(self.place / _STATE) != header.get("sha256"):
                raise ValueError(f"{self.place / _STATE} is not what was written.")
            # Tensors and plain values: weights_only runs no code that a file brings.
            state: dict[str, Any] = torch.load(self.place / _STATE, map_location="cpu", weights_only=True)
        except (ValueError, OSError, RuntimeError, pickle.UnpicklingError) as error:
            warn(f"a checkpoint is passed over, and training begins anew: {error}", CheckpointWarning)
            return None
        return state


def key_of(*parts: Any) -> str:
    """One hash of settings, numbers, tensors, functions and objects, the same in every process.

    Functions count by their code and what they hold on to, objects by their class, what it does when it is called, and
    their attributes; the code of what they call in turn is not looked at.
    """
    fingerprint = _Fingerprint()
    for part in parts:
        fingerprint.feed(part)
    return fingerprint.digest.hexdigest()


class _Fingerprint:
    """A hash fed with one part after the other."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.seen: dict[int, Any] = {}  # kept, as the identity of what is gone may come again

    def text(self, *words: Any) -> None:
        self.digest.update(f"{words!r};".encode())

    def feed(self, part: Any) -> None:
        if isinstance(part, np.generic):
            part = part.item()
        if isinstance(part, Mapping):
            self.text("mapping", len(part))
            for name in sorted(part, key=repr):
                self.feed(name)
                self.feed(part[name])
        elif isinstance(part, (list, tuple)):
            self.text("sequence", len(part))
            for entry in part:
                self.feed(entry)
        elif isinstance(part, (set, frozenset)):  # whose order differs from process to process
            self.text("set", sorted(map(repr, part)))
        elif isinstance(part, (Tensor, np.ndarray)):
            self._feed_array(part)
        elif isinstance(part, (type(None), str, bytes, int, float, complex, Enum)):
            self.text(part)
        elif isinstance(part, CodeType):  # not by its text, which tells the file and the line
            self.feed([part.co_code, part.co_names, part.co_consts])
        elif isinstance(part, ModuleType):
            self.text("module", part.__name__)
        elif isinstance(part, MethodType):
            self.feed([part.__func__, part.__self__])
        elif id(part) in self.seen:
            self.text("again", list(self.seen).index(id(part)))
        else:
            self.seen[id(part)] = part
            self._feed_object(part)

    def _feed_array(self, part: Any) -> None:
        array = part.detach().cpu().contiguous() if isinstance(part, Tensor) else torch.from_numpy(part.copy())
        self.text("array", str(array.dtype), tuple(array.shape))
        self.digest.update(array.reshape(-1).view(torch.uint8).numpy().data)

    def _feed_object(self, part: Any) -> None:
        if isinstance(part, partial):
            self.feed([part.func, part.args, part.keywords])
        elif isinstance(part, FunctionType):
            self.text("function", part.__module__, part.__qualname__)
            held = [cell.cell_contents for cell in part.__closure__ or () if _is_filled(cell)]
            self.feed([part.__code__, part.__defaults__, part.__kwdefaults__, held])
        elif hasattr(part, "__qualname__"):  # a class, or a function that is not Python's
            self.text("name", getattr(part, "__module__", None), part.__qualname__)
        else:
            kind = type(part)
            self.text("object", kind.__module__, kind.__qualname__)
            called = "forward" if isinstance(part, nn.Module) else "__call__"
            self.feed(next((vars(base)[called] for base in kind.__mro__ if called in vars(base)), None))
            self.feed(getattr(part, "__dict__", None) or _ADDRESS.sub("", repr(part)))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # of a name that is not bound yet
        return False
