"""Features kept in a folder: what names them, and entries that are there whole or not at all.

An entry is written beside its place and renamed when it is complete, so a run that dies half-way leaves nothing that
could be taken for one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adaptexit.networks.weights import weights_in
from adaptexit.utils.folders import locked

try:
    import fcntl
except ImportError:  # Windows: what killed runs left is then never cleared away, but never trusted either
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 1


def cache_key(module: nn.Module, cuts: Sequence[str], reducers: Sequence[str], **settings: object) -> str:
    """Hash of what determines features beside the data: equal keys mean equal features of equal inputs.

    Parameters
    ----------
    module : nn.Module
        Its structure (classes and ``repr`` of all parts), its parameters and buffers with their types, and its device.
        The code of ``forward`` and attributes that ``repr`` does not show are not seen: name them in ``settings``.
    cuts : sequence of K - 1 str
    reducers : sequence of K - 1 str
        What is done to the feature at each cut, in words that change when it does.
    **settings
        Anything else, by its ``repr``: preprocessing, autocast. One whose ``repr`` differs from run to run only
        prevents reuse.
    """
    digest = Digest()
    digest.text(torch.__version__, repr(module), list(cuts), list(reducers), sorted(settings.items()))
    for name, part in module.named_modules():
        digest.text(name, type(part).__module__, type(part).__qualname__)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.text(name, tensor.device.type)
        digest.tensor(tensor)
    ordinary = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    ordinary |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    for name, weight in weights_in(module).items():  # quantised ones are in the state alone
        if name in ordinary:
            continue
        digest.text(name, None if isinstance(weight, Tensor) else weight)
        if isinstance(weight, Tensor):
            digest.tensor(weight)
    return digest.result()


# -- hashing -----------------------------------------------------------------------------------------------------------


class Digest:
    """A hash fed piece by piece."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def text(self, *parts: object) -> None:
        content = repr(parts).encode()
        self._hash.update(f"{len(content)}:".encode() + content)

    def tensor(self, tensor: Tensor) -> None:
        self.text(str(tensor.dtype), tuple(tensor.shape))
        self._hash.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def result(self) -> str:
        return self._hash.hexdigest()


def inputs_hash(batches: Iterable[Tensor]) -> tuple[str, int, Tensor | None]:
    """Hash and number of all samples, as they are cut into batches (rounding may depend on that); the first batch."""
    digest, count, first = Digest(), 0, None
    with torch.inference_mode():
        for x in batches:
            if len(x):
                digest.tensor(x)
                count += len(x)
                first = x.clone() if first is None else first
    return digest.result(), count, first


def model_name(key: str, half: bool, n_cuts: int) -> str:
    digest = Digest()
    digest.text(FORMAT_VERSION, key, bool(half), n_cuts)
    return digest.result()


class Shelf:
    """The entries of one model in a folder: a sub-folder for every data set, each there whole or not at all."""

    def __init__(self, folder: Path, model: str) -> None:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"folder must be a folder or new; {folder} is a file. Choose another.")
        self.folder, self.model = folder.absolute(), model

    def has_entries(self) -> bool:
        return any(self.folder.glob(f"{self.model[:24]}-*/header.json"))

    def find(self, inputs: str, *, check: bool) -> tuple[list[NDArray[Any]], list[torch.dtype]] | None:
        """Arrays of features and logits for these data, and the features' own types.

        None where there are none or, as far as it is checked, damaged ones.
        """
        entry = self._entry(inputs)
        try:
            header = json.loads((entry / "header.json").read_text())
            content = header["described"]
            if header["checksum"] != _checksum(content):
                return None
            if (content["model"], content["inputs"]) != (self.model, inputs):
                return None
            arrays = [_mapped(entry, column, check) for column in content["columns"]]
            dtypes = [getattr(torch, column["came"]) for column in content["columns"][:-1]]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return arrays, dtypes

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder to write to that is gone when the block ends; those that killed runs left are cleared away."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "a") as lock:
            if fcntl is not None:
                with suppress(OSError):  # raised while another run writes: its scratch folder is then let alone
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    for remains in self.folder.glob(".partial-*"):
                        shutil.rmtree(remains, ignore_errors=True)
                with suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_SH)
            workshop = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.folder))
            try:
                (workshop / "new").mkdir()
                yield workshop / "new"
            finally:
                shutil.rmtree(workshop, ignore_errors=True)

    def keep(
        self, scratch: Path, inputs: str, columns: list[dict[str, Any]], *, replace: bool
    ) -> tuple[list[NDArray[Any]], list[torch.dtype]] | None:
        """Finish what was written to ``scratch``, put it in its place, and give what :meth:`find` finds there.

        Without ``replace``, an entry that another run has finished meanwhile stays and is taken.
        """
        content = {"format": FORMAT_VERSION, "model": self.model, "inputs": inputs, "columns": columns}
        header = {"described": content, "checksum": _checksum(content)}
        (scratch / "header.json").write_text(json.dumps(header, indent=2))
        with locked(self.folder):  # until the files are mapped, which no later move can change
            entry = None if replace else self.find(inputs, check=True)
            if entry is None:
                place = self._entry(inputs)
                if place.exists():
                    os.replace(place, scratch.parent / "old")
                os.replace(scratch, place)
                entry = self.find(inputs, check=False)
        return entry

    def _entry(self, inputs: str) -> Path:
        return self.folder / f"{self.model[:24]}-{inputs[:24]}"


def _mapped(entry: Path, column: dict[str, Any], check: bool) -> NDArray[Any]:
    path = entry / f"{column['name']}.bin"
    array = np.memmap(path, np.dtype(column["dtype"]), mode="r", shape=tuple(column["shape"]))
    if path.stat().st_size != array.nbytes:
        raise ValueError(f"{path} has another size than its header says.")
    if check and zlib.crc32(array.reshape(-1).view(np.uint8).data) != column["checksum"]:
        raise ValueError(f"{path} is damaged.")
    return array


def _checksum(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
