"""One process, or several that ``accelerate launch`` has started: who reads which samples, and who writes."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn


class Alone:
    """A run in one process."""

    rank, count = 0, 1
    device: torch.device | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes and shows what there is."""
        return self.rank == 0

    def prepared(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over all processes."""
        return module

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return values

    def wait(self) -> None:
        """For all processes to come here."""

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of a batch of row numbers."""
        return rows[self.rank :: self.count]


class Accelerated(Alone):
    """One of several processes; accelerate joins them."""

    def __init__(self) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ImportError(
                "several processes were started (WORLD_SIZE is above 1), which takes accelerate: "
                "pip install 'adaptexit[distributed]'."
            ) from error
        self._accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes
        self.device = self._accelerator.device

    def prepared(self, module: nn.Module) -> nn.Module:
        wrapped: Any = self._accelerator.prepare(module)
        return wrapped

    def summed(self, values: Tensor) -> Tensor:
        total: Any = self._accelerator.reduce(values.to(self.device), reduction="sum")
        return total

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


def processes() -> Alone:
    """The processes that this one belongs to."""
    return Accelerated() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Alone()
