"""What leaving at each exit costs a sample: stages that nobody avoids, and exits that are paid where they are run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptexit.utils.validation import check_shape, real_array

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Costs:
    """Costs of K stages and K exits, and the one rule for which exits are run.

    Attributes
    ----------
    stages, exits : arrays (K,)
        Of stage k, which nobody avoids on the way past exit k, and of exit k itself, paid only where it is run.
    chained : bool
        Exits read earlier exits, so all of them up to the deepest one switched on are run and paid for.
    unit : "MACs", "seconds", "given" or None
    """

    stages: Floats
    exits: Floats
    chained: bool = False
    unit: str | None = None

    @classmethod
    def checked(
        cls,
        stage_costs: ArrayLike | None,
        exit_costs: ArrayLike | None,
        cumulative: ArrayLike | None,
        n_exits: int,
        *,
        chained: bool = False,
        unit: str | None = None,
    ) -> Costs:
        """Costs from what a user gives: both kinds, or cumulative stage costs with free exits; or a ValueError."""
        if cumulative is not None:
            if stage_costs is not None or exit_costs is not None:
                raise ValueError("costs replaces stage_costs and exit_costs: give either costs or those two, not both.")
            rising = cost_array(cumulative, n_exits, "costs")
            if (np.diff(rising) < 0).any():
                raise ValueError(f"costs are cumulative and must not fall from exit to exit; got {rising.tolist()}.")
            stage_costs, exit_costs = np.diff(rising, prepend=0.0), np.zeros(n_exits)
        if stage_costs is None or exit_costs is None:
            missing = [n for n, v in (("stage_costs", stage_costs), ("exit_costs", exit_costs)) if v is None]
            raise ValueError(f"{' and '.join(missing)} must be given, or costs= (cumulative, free exits) instead.")
        stages = cost_array(stage_costs, n_exits, "stage_costs")
        exits = cost_array(exit_costs, n_exits, "exit_costs")
        if stages.sum() + exits[-1] <= 0:
            raise ValueError("the full model must cost something: stage_costs plus the last of exit_costs is 0.")
        return cls(stages, exits, bool(chained), unit)

    @property
    def full(self) -> float:
        """Cost of the plain full model, every other exit switched off: the unit of relative cost."""
        return float(self.stages.sum() + self.exits[-1])

    def runs(self, on: Mask) -> Mask:
        """Exits that are run, shape (K,), when those of ``on`` are switched on (the last always is)."""
        run = np.array(on, dtype=bool)
        if self.chained and run[:-1].any():
            run[: np.flatnonzero(run[:-1])[-1]] = True
        run[-1] = True
        return run

    def paths(self, on: Mask) -> Floats:
        """Cost of a sample that leaves at each exit, shape (K,), when the exits of ``on`` are switched on."""
        return np.asarray(np.cumsum(self.stages + np.where(self.runs(on), self.exits, 0.0)), dtype=np.float64)

    def alone(self) -> Floats:
        """Cost of a sample when exit k answers for everybody and nothing else is switched on, shape (K,)."""
        exits = np.arange(len(self.stages))
        return np.array([self.paths(exits == k)[k] for k in exits])

    def every_exit_paid(self) -> Costs:
        """The same where whoever passes an exit pays for it: exit costs moved into stage costs.

        The pricing of papers on networks with exits (MSDNet's tables), where no exit is ever switched off: a path costs
        the same whichever exits are on, and the full model pays for all of them.
        """
        if not self.exits.any():
            return self
        return dataclasses.replace(self, stages=self.stages + self.exits, exits=np.zeros_like(self.exits))

    def charged(self, extra: Floats, chained: bool) -> Costs:
        """The same with what a calibrator adds to each exit, and makes of their order."""
        if not (extra.any() or chained):
            return self
        return dataclasses.replace(self, exits=self.exits + extra, chained=self.chained or chained)


def cost_array(values: Any, n_exits: int, name: str) -> Floats:
    """One cost an exit, shape (K,), or a ValueError for what cannot be one."""
    array = np.array(real_array(name, values), dtype=np.float64)
    check_shape(array, (n_exits,), name)
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError(f"{name} must be finite and not negative; got {array.tolist()}.")
    return array
