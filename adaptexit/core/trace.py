"""What happened to every sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adaptexit.utils.frames import as_frame

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class ExitTrace:
    """Where every sample left, with what answer and at what cost; all arrays have shape (N,).

    Attributes
    ----------
    labels : answers
    exits : exit index, from shallow to deep
    costs : what each sample spent, in the estimator's unit of cost
    scores : what was compared with the threshold where the sample left
    full_cost : what the plain full model costs a sample
    """

    labels: NDArray[Any]
    exits: NDArray[np.intp]
    costs: NDArray[np.float64]
    scores: NDArray[Any]
    full_cost: float

    @property
    def relative_costs(self) -> NDArray[np.float64]:
        """Costs divided by the full model's."""
        return self.costs / self.full_cost

    def to_frame(self) -> pandas.DataFrame:
        """A pandas table, one row a sample: label, exit, cost, relative_cost, score (needs pandas)."""
        return as_frame(
            {
                "label": self.labels, "exit": self.exits, "cost": self.costs, "relative_cost": self.relative_costs,
                "score": self.scores,
            }
        )  # fmt: skip
