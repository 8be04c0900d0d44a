"""Policies: one operating point made ready to decide, batch by batch, who leaves where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from adaptexit.core.answer import Answer
from adaptexit.core.costs import Costs
from adaptexit.core.frontier import OperatingPoint
from adaptexit.core.routing import accepts

Floats = NDArray[np.float64]


class Decision(NamedTuple):
    """What a policy makes of a batch at one exit.

    ``leave``, booleans (B,); ``scores`` (B,), those that it compared; ``memory`` (B, m) or None, what it is to be given
    at the next exit for those who stay.
    """

    leave: NDArray[np.bool_]
    scores: NDArray[Any]
    memory: NDArray[Any] | None = None


class Policy(Protocol):
    """Who leaves where, and what has to be run and read for that.

    Attributes
    ----------
    runs : boolean array (K,)
        Exits that are run; the last always is.
    path_costs : array (K,)
        What a sample has spent when it leaves at each exit, in the unit of the model's costs.
    full_cost : float
        What the plain full model costs a sample.
    needs_logits, needs_features : bool
        What :meth:`decide` reads beside predictions and scores.
    """

    @property
    def runs(self) -> NDArray[np.bool_]: ...
    @property
    def path_costs(self) -> Floats: ...
    @property
    def full_cost(self) -> float: ...
    @property
    def needs_logits(self) -> bool: ...
    @property
    def needs_features(self) -> bool: ...

    def decide(self, k: int, batch: Answer, memory: NDArray[Any] | None = None) -> Decision:
        """Who of the samples that reached exit k leaves there; ``memory`` is what the policy left at the one before."""
        ...


Scoring = Callable[[int, Answer, NDArray[Any] | None], tuple[NDArray[Any], NDArray[Any] | None]]
"""(k, batch, memory) -> the scores to compare with thresholds, and the memory for the next exit."""


def recorded_scores(k: int, batch: Answer, memory: NDArray[Any] | None) -> tuple[NDArray[Any], None]:
    """The scores as the model gave them."""
    return batch.scores, None


@dataclass(frozen=True, eq=False)
class ThresholdPolicy:
    """An operating point's thresholds on a calibrator's scores.

    Attributes
    ----------
    point : OperatingPoint
    runs, path_costs, full_cost, needs_logits, needs_features
        As for :class:`Policy`.
    scoring : callable (k, batch, memory) -> (scores, memory)
    """

    point: OperatingPoint
    runs: NDArray[np.bool_]
    path_costs: Floats
    full_cost: float
    scoring: Scoring = recorded_scores
    needs_logits: bool = False
    needs_features: bool = False

    @classmethod
    def of(
        cls,
        point: OperatingPoint,
        costs: Costs,
        scoring: Scoring = recorded_scores,
        *,
        needs_logits: bool = False,
        needs_features: bool = False,
    ) -> ThresholdPolicy:
        """The policy of a point at costs that hold when it decides."""
        on = point.on
        return cls(point, costs.runs(on), costs.paths(on), costs.full, scoring, needs_logits, needs_features)

    @cached_property
    def limits(self) -> list[float] | None:
        """What an exit's own score has to exceed, K numbers, where that alone decides; None where more does."""
        plain = self.scoring is recorded_scores and self.point.cutoffs.ndim == 1
        return self.point.cutoffs.tolist() if plain else None

    def decide(self, k: int, batch: Answer, memory: NDArray[Any] | None = None) -> Decision:
        scores, memory = self.scoring(k, batch, memory)
        return Decision(accepts(batch.predictions, scores, self.point.cutoffs[k]), scores, memory)


@dataclass(frozen=True, eq=False)
class ExitAlone:
    """One exit answers for everybody; those before it are run only where it reads them.

    Attributes
    ----------
    exit : int
    runs, path_costs, full_cost
        As for :class:`Policy`.
    """

    exit: int
    runs: NDArray[np.bool_]
    path_costs: Floats
    full_cost: float
    needs_logits = False
    needs_features = False

    @classmethod
    def of(cls, k: int, costs: Costs) -> ExitAlone:
        """The policy of exit k; the exits behind it are never reached."""
        on = np.arange(len(costs.stages)) == k
        return cls(k, costs.runs(on), costs.paths(on), costs.full)

    def decide(self, k: int, batch: Answer, memory: NDArray[Any] | None = None) -> Decision:
        return Decision(np.full(len(batch.scores), k >= self.exit), batch.scores)
