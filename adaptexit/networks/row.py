"""Networks in a row: the samples that one of them keeps go on to the next, which begins with the inputs again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from adaptexit.core.costs import Costs
from adaptexit.networks.base import Network, State
from adaptexit.networks.readers import Reader
from adaptexit.staging.nested import Rows


class Row(Network):
    """Networks one after the other, as one network: a cascade of whole models, or a saver before a branched model.

    What is carried is a pair: the raw inputs, for the networks still to come (None in the last of them), and what the
    present network carries (None between networks).

    Parameters
    ----------
    networks : sequence of Network
        From small to large. All but the last have one exit, whose cost is then the whole network's.
    exit_names : sequence of K str, optional
        Those of the networks unless given.
    reader : Reader, optional
        For the exits of all of them.
    """

    def __init__(
        self, networks: Sequence[Network], exit_names: Sequence[str] | None = None, reader: Reader | None = None
    ) -> None:
        if several := [network.exit_names for network in networks[:-1] if network.n_exits > 1]:
            raise ValueError(f"networks before the last must have one exit each; got one with the exits {several[0]}.")
        self.networks = list(networks)
        self.stages = nn.ModuleList(stage for network in networks for stage in network.stages)
        self.heads = nn.ModuleList(head for network in networks for head in network.heads)
        self.exit_names = list(exit_names or (name for network in networks for name in network.exit_names))
        self.reader = reader or networks[-1].reader
        self.chained = networks[-1].chained
        # (network, its exit) of every exit of the row
        self._places = [(i, k) for i, network in enumerate(networks) for k in range(network.n_exits)]

    @property
    def modules(self) -> list[nn.Module]:
        return [module for network in self.networks for module in network.modules]

    def prepare(self, x: Any) -> Rows:
        return x, None

    def stage(self, k: int, carried: Rows) -> Rows:
        return self._go(carried, k - 1, k)

    def exit(self, k: int, carried: Rows, features: bool = False) -> tuple[Any, Rows]:
        x, inner = carried
        i, own = self._places[k]
        output, inner = self.networks[i].exit(own, inner, features)
        return output, (x, inner)

    def advance(self, carried: Rows, after: int, to: int) -> Rows:
        """As for any network; networks that are passed by are not run."""
        return self._go((carried, None) if after < 0 else carried, after, to)

    def _go(self, carried: Rows, after: int, to: int) -> Rows:
        x, inner = carried
        i, own = self._places[to]
        first = to - own  # the network's first exit in the row
        if after < first:
            inner = self.networks[i].advance(x, -1, own)
        else:
            inner = self.networks[i].advance(inner, after - first, own)
        return (None if i == len(self.networks) - 1 else x), inner

    def measured(
        self, x: Tensor, measure: Callable[[Callable[[Rows], Any], Rows], float]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """As for any network; of a whole model preparing its inputs is part of its cost."""
        stages, exits = [], []
        for network in self.networks:
            if network.n_exits == 1:
                stages.append(np.zeros(1))
                exits.append(np.array([measure(lambda rows, n=network: n.exit(0, n.advance(rows, -1, 0)), x)]))  # type: ignore[misc]
            else:
                own = network.measured(x, measure)
                stages.append(own[0])
                exits.append(own[1])
        return np.concatenate(stages), np.concatenate(exits)

    @property
    def countable(self) -> bool:
        return all(network.countable for network in self.networks)

    def costs(self, x: Tensor, cost: Any = "auto") -> Costs:
        if isinstance(cost, str) and cost == "macs":
            for network, name in zip(self.networks, self.exit_names, strict=False):
                if not network.countable:
                    raise ValueError(
                        f"cost='macs' cannot be counted for {name}, a scikit-learn classifier. Use cost='latency' or "
                        "give the costs."
                    )
        return super().costs(x, cost)

    def _check_counted(self, counted: Costs) -> None:
        for (i, _), name, macs in zip(self._places, self.exit_names, counted.exits, strict=True):
            if macs <= 0 and self.networks[i].n_exits == 1:
                raise ValueError(
                    f"cost='macs' found no multiply-accumulates in {name}. Use cost='latency' or give the costs."
                )
        super()._check_counted(counted)

    def given_costs(self, alone: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Whole models share nothing, so that their costs are exit costs; the last network splits its own."""
        n_before = len(self.networks) - 1
        stages, exits = self.networks[-1].given_costs(alone[n_before:])
        return np.concatenate([np.zeros(n_before), stages]), np.concatenate([alone[:n_before], exits])

    def get_state(self) -> State:
        headers: list[Any] = []
        tensors: dict[str, Tensor] = {}
        for i, network in enumerate(self.networks):
            own, weights = network.get_state()
            headers.append(own)
            tensors |= {f"models.{i}.{key}": tensor for key, tensor in weights.items()}
        return {"models": headers}, tensors
