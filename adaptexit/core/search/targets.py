"""What a search is asked for: an objective turns summed quality and summed cost into the number to maximise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

_PREFER = 1e-9  # settles ties; far below one sample's quality or a cost that matters
_FAR = 1e6  # per sample: puts whatever breaks the constraint below whatever keeps it


class Objective(Protocol):
    """Number to maximise, for summed quality and summed relative cost (numbers or arrays)."""

    def __call__(self, quality: Any, cost: Any) -> Any: ...


@dataclass(frozen=True)
class Weighted:
    """Quality minus ``weight`` times cost."""

    weight: float

    def __call__(self, quality: Any, cost: Any) -> Any:
        return quality - self.weight * cost


@dataclass(frozen=True)
class WithinBudget:
    """Best quality among mean relative costs up to ``budget``; beyond it, the nearest to it."""

    budget: float
    n_samples: int

    def __call__(self, quality: Any, cost: Any) -> Any:
        excess = cost - self.budget * self.n_samples
        return np.where(excess <= 1e-9 * self.n_samples, quality - _PREFER * cost, -_FAR * self.n_samples - excess)


@dataclass(frozen=True)
class WithinDrop:
    """Least cost among accuracies at most ``max_drop`` below the full model's; below that, the nearest to it."""

    max_drop: float
    n_samples: int
    full_quality: float

    def __call__(self, quality: Any, cost: Any) -> Any:
        missing = self.full_quality - self.max_drop * self.n_samples - quality
        return np.where(missing <= 1e-9 * self.n_samples, _PREFER * quality - cost, -_FAR * self.n_samples - missing)


@dataclass(frozen=True)
class Target:
    """A request that can be put to any data: a budget or an allowed drop of accuracy."""

    budget: float | None = None
    max_drop: float | None = None

    def objective(self, n_samples: int, full_quality: float) -> WithinBudget | WithinDrop:
        """The request as an objective on data of this size."""
        if self.budget is not None:
            return WithinBudget(self.budget, n_samples)
        assert self.max_drop is not None
        return WithinDrop(self.max_drop, n_samples, full_quality)

    def described(self) -> dict[str, float]:
        """The request as an operating point's params."""
        return {"budget": self.budget} if self.budget is not None else {"max_drop": float(self.max_drop or 0.0)}
