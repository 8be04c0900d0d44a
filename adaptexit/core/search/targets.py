"""What a search is asked for: an objective turns summed quality and summed cost into the number to maximise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptexit.core.search.problem import Problem, blocks

Floats = NDArray[np.float64]

_PREFER = 1e-9  # settles ties; far below one sample's quality or a cost that matters
_FAR = 1e6  # per sample: puts whatever breaks the constraint below whatever keeps it


@dataclass(frozen=True)
class Weighted:
    """Quality minus ``weight`` times cost."""

    weight: float

    def __call__(self, quality: Any, cost: Any) -> Any:
        return quality - self.weight * cost


@dataclass(frozen=True)
class WithinBudget:
    """Best quality among mean relative costs up to ``budget``; beyond it, the nearest to it.

    ``budget`` is one number, or a column (T, 1) for T requests at once.
    """

    budget: Any
    n_samples: int

    def __call__(self, quality: Any, cost: Any) -> Any:
        excess = cost - self.budget * self.n_samples
        return np.where(excess <= 1e-9 * self.n_samples, quality - _PREFER * cost, -_FAR * self.n_samples - excess)


@dataclass(frozen=True)
class WithinDrop:
    """Least cost among accuracies at most ``max_drop`` below the full model's; below that, the nearest to it.

    ``max_drop`` is one number, or a column (T, 1) for T requests at once.
    """

    max_drop: Any
    n_samples: int
    full_quality: float

    def __call__(self, quality: Any, cost: Any) -> Any:
        shortfall = self.full_quality - self.max_drop * self.n_samples - quality
        return np.where(
            shortfall <= 1e-9 * self.n_samples, _PREFER * quality - cost, -_FAR * self.n_samples - shortfall
        )


@dataclass(frozen=True, eq=False)
class Targets:
    """Requests that can be put to any data: mean relative costs (B,), then allowed drops of accuracy (D,).

    T = B + D; whatever is said of all targets is in this order.
    """

    budgets: Floats
    drops: Floats

    @classmethod
    def of(cls, budgets: ArrayLike = (), drops: ArrayLike = ()) -> Targets:
        """Targets from sequences."""
        return cls(np.asarray(budgets, dtype=np.float64), np.asarray(drops, dtype=np.float64))

    def __len__(self) -> int:
        return len(self.budgets) + len(self.drops)

    def objectives(self, problem: Problem) -> list[WithinBudget | WithinDrop]:
        """Each target as an objective on the data of a problem."""
        n, full = problem.n_samples, problem.full_quality
        budgets = [WithinBudget(budget, n) for budget in self.budgets.tolist()]
        return [*budgets, *(WithinDrop(drop, n, full) for drop in self.drops.tolist())]

    def merits(self, problem: Problem, quality: Floats, cost: Floats) -> Floats:
        """What each target's objective gives for candidates of summed quality and cost (P,): shape (T, P)."""
        n = problem.n_samples
        within_budgets = WithinBudget(self.budgets[:, None], n)
        within_drops = WithinDrop(self.drops[:, None], n, problem.full_quality)
        return np.concatenate([within_budgets(quality, cost), within_drops(quality, cost)])

    def best(self, problem: Problem, quality: Floats, cost: Floats) -> tuple[NDArray[np.intp], Floats]:
        """For every target which candidate is best, and what its objective gives there: both (T,)."""
        places, merits = np.zeros(len(self), dtype=np.intp), np.full(len(self), -np.inf)
        everyone = np.arange(len(self))
        # In blocks: with one early exit every sample is a candidate, and all at once would fill the memory.
        for block in blocks(len(quality), len(self)):
            here = self.merits(problem, quality[block], cost[block])
            first = here.argmax(axis=1)
            better = here[everyone, first] > merits
            places[better] = block.start + first[better]
            merits[better] = here[everyone, first][better]
        return places, merits

    def described(self) -> list[dict[str, float]]:
        """Each target as an operating point's params."""
        return [{"budget": b} for b in self.budgets.tolist()] + [{"max_drop": d} for d in self.drops.tolist()]


def broken(merits: Floats, n_samples: int) -> NDArray[np.bool_]:
    """Which of the numbers that a target's objective gave stand for a constraint not kept."""
    return merits <= -_FAR * n_samples
