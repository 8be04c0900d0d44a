"""The network protocol: K stages with an exit after each, whatever they were made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adaptexit.core.answer import Answer
from adaptexit.core.costs import Costs
from adaptexit.networks.readers import LogitsReader, Reader
from adaptexit.staging.cost import StageLatencies, count_macs, measure_latency
from adaptexit.staging.nested import Rows
from adaptexit.utils.validation import plain_array, real_array

State = tuple[dict[str, Any], dict[str, Tensor]]
"""A JSON value and named tensors."""


class Network(ABC):
    """K stages with an exit after each; the last exit is the full model.

    A subclass makes ``stages`` and ``heads`` once and says how samples go through them. Networks compose: a row of
    networks (:class:`adaptexit.networks.row.Row`) is a network.

    Attributes
    ----------
    stages, heads : nn.ModuleList of length K
        The computation up to each exit from the one before it, and what answers there.
    exit_names : list of K str
    reader : Reader
        What turns an exit's output into answer and score.
    chained : bool
        Whether heads read what earlier ones left, so that those have to be run.
    """

    stages: nn.ModuleList
    heads: nn.ModuleList
    exit_names: list[str]
    reader: Reader = LogitsReader()
    chained: bool = False

    @property
    def n_exits(self) -> int:
        """Number of exits K."""
        return len(self.heads)

    @property
    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """What has to be in evaluation mode while the network runs."""

    # -- running -------------------------------------------------------------------------------------------------------

    def prepare(self, x: Any) -> Any:
        """Raw inputs as the first stage takes them."""
        return x

    @abstractmethod
    def stage(self, k: int, carried: Rows) -> Rows:
        """Run stage k on prepared inputs (k = 0) or on what went on after exit k - 1."""

    @abstractmethod
    def exit(self, k: int, carried: Rows, features: bool = False) -> tuple[Any, Rows]:
        """What exit k gives for what stage k returned, for :attr:`reader`, and what goes on from it.

        With ``features`` it is an :class:`Answer` that has a vector (B, d) of what the exit has seen, where it can.
        """

    def advance(self, carried: Rows, after: int, to: int) -> Rows:
        """Run the stages behind exit ``after`` (-1: the inputs) up to that of exit ``to``."""
        if after < 0:
            carried = self.prepare(carried)
        for k in range(after + 1, to + 1):
            carried = self.stage(k, carried)
        return carried

    def read(self, k: int, carried: Rows, *, logits: bool = False, features: bool = False) -> tuple[Answer, Rows]:
        """What exit k says, as arrays, and what goes on from it."""
        output, onward = self.exit(k, carried, features)
        return self.reader(k, output, logits=logits), onward

    # -- costs ---------------------------------------------------------------------------------------------------------

    def costs(self, x: Tensor, cost: Any = "auto") -> Costs:
        """What stages and exits cost a sample.

        Parameters
        ----------
        x : tensor (B, ...)
            Raw inputs to count or measure on.
        cost : {"auto", "macs", "latency"} or sequence of K floats
            Multiply-accumulates counted, or seconds measured; "auto" counts where that can be done. Numbers are what
            a sample costs that one exit answers, every other exit switched off (:meth:`given_costs`).
        """
        if not isinstance(cost, str):
            return self._checked_costs(cost)
        if cost not in ("auto", "macs", "latency"):
            raise ValueError(f"cost must be 'auto', 'macs', 'latency' or a sequence of numbers; got {cost!r}.")
        if cost == "latency" or (cost == "auto" and not self.countable):
            return Costs(*self.measured(x, measure_latency), unit="seconds")
        costs = Costs(*self.measured(x[:1], partial(count_macs, roots=self.modules)), unit="MACs")
        self._check_counted(costs)
        return costs

    def _check_counted(self, counted: Costs) -> None:
        if counted.full <= 0:
            raise ValueError("cost='macs' found no multiply-accumulates. Use cost='latency' or give the costs.")

    @property
    def countable(self) -> bool:
        """Whether multiply-accumulates can be counted."""
        return True

    def measured(
        self, x: Tensor, measure: Callable[[Callable[[Rows], Any], Rows], float]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What a measure gives for every stage and every exit, each (K,), on inputs ``x``."""
        stages, exits = np.zeros(self.n_exits), np.zeros(self.n_exits)
        # Counted outside inference mode, whose tensors some operations refuse to be counted on.
        with torch.inference_mode(measure is measure_latency), torch.no_grad():
            carried: Any = self.prepare(x)
            for k in range(self.n_exits):
                if not isinstance(self.stages[k], nn.Identity):
                    stages[k] = measure(partial(self.stage, k), carried)
                carried = self.stage(k, carried)
                if not isinstance(self.heads[k], nn.Identity):
                    exits[k] = measure(partial(self.exit, k), carried)
                carried = self.exit(k, carried)[1]
        return stages, exits

    def given_costs(self, alone: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Stage and exit costs from those of each exit alone (K,): here stages are shared, and exits are free."""
        if (np.diff(alone) < 0).any():
            raise ValueError(
                "cost must not fall from exit to exit, as a sample that goes on has passed the stages before; got "
                f"{alone.tolist()}."
            )
        return np.diff(alone, prepend=0.0), np.zeros(self.n_exits)

    def _checked_costs(self, cost: Any) -> Costs:
        try:
            alone = np.asarray(real_array("cost", cost), dtype=np.float64)
        except ValueError:
            alone = np.empty(0)
        if alone.shape != (self.n_exits,) or not (np.isfinite(alone).all() and (alone > 0).all()):
            raise ValueError(
                f"cost must be {self.n_exits} positive numbers, what a sample costs that each exit answers alone "
                f"({', '.join(self.exit_names)}); got {cost!r}."
            )
        return Costs(*self.given_costs(alone), unit="given")

    def latencies(self, x: Tensor, batch_sizes: Sequence[int]) -> StageLatencies:
        """Measured seconds of every stage and exit on batches of several sizes, made from the inputs ``x``."""
        sizes = plain_array("batch_sizes", batch_sizes)
        if sizes.ndim != 1 or not len(sizes) or sizes.dtype.kind not in "iu" or (sizes < 1).any():
            raise ValueError(f"batch_sizes must be positive integers; got {batch_sizes!r}.")
        rows = [self.measured(x[torch.arange(size) % len(x)], measure_latency) for size in sizes]
        stage_s, exit_s = (np.stack(part, axis=1) * sizes for part in zip(*rows, strict=True))
        return StageLatencies(self.exit_names, sizes, stage_s, exit_s)

    # -- persistence ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def get_state(self) -> State:
        """What describes it and its weights, for writing."""


def named_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """The state of a module under a prefix."""
    return {f"{prefix}.{key}": value for key, value in module.state_dict().items()}


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
