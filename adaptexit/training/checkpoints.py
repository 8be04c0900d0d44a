"""The state of a training, kept after every epoch: whole or not at all, and taken up only by the same run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptexit.exceptions import CheckpointWarning, warn
from adaptexit.utils.files import parsed_json, read_bytes, sha256_of, write_text
from adaptexit.utils.folders import Kind, put_back, written_whole

FORMAT = 1
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
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
        except (ValueError, OSError, RuntimeError) as error:
            warn(f"a checkpoint is passed over, and training begins anew: {error}", CheckpointWarning)
            return None
        return state


def key_of(*parts: Any) -> str:
    """One hash of settings, numbers and tensors, the same in every process."""
    digest = hashlib.sha256()
    for part in parts:
        _feed(digest, part)
    return digest.hexdigest()


def _feed(digest: Any, part: Any) -> None:
    if isinstance(part, Mapping):
        for name in sorted(part):
            digest.update(f"{name}=".encode())
            _feed(digest, part[name])
    elif isinstance(part, (list, tuple)):
        digest.update(f"{len(part)}[".encode())
        for entry in part:
            _feed(digest, entry)
    elif isinstance(part, (Tensor, np.ndarray)):
        array = part.detach().cpu().contiguous() if isinstance(part, Tensor) else torch.from_numpy(part.copy())
        digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    elif hasattr(part, "get_params"):
        digest.update(type(part).__qualname__.encode())
        _feed(digest, part.get_params(deep=False))
    elif isinstance(part, partial):
        _feed(digest, [part.func, part.args, part.keywords])
    elif hasattr(part, "__qualname__"):
        digest.update(f"{part.__module__}.{part.__qualname__}".encode())
    else:
        digest.update(_ADDRESS.sub("", repr(part)).encode())
    digest.update(b";")
