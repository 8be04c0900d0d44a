"""The threshold search as a problem: who can leave where, what that is worth and what it costs, sorted once.

A *policy* is an integer array (K-1,): at exit k the ``policy[k]`` surest of all N samples would leave, 0 switches the
exit off. Only tie ends are allowed, so that equal scores leave together and a policy is the same as thresholds.

Qualities and costs are held as 64-bit integers in small units: sums are then exact whatever their order, and cumulative
sums several times faster than in floating point.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.routing import midpoint

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Policy = NDArray[np.int64]

COST_UNIT = 2.0**-40
"""Unit of relative costs: sums over four million samples still fit."""

_QUALITY_STEPS = 2.0**30

_BLOCK = 2**16
"""Cells of a matrix worked on at once: enough to be quick on few samples, few enough to stay in the cache."""


class Objective(Protocol):
    """Number to maximise, for summed quality and summed relative cost (numbers or arrays)."""

    def __call__(self, quality: Any, cost: Any) -> Any: ...


@dataclass(frozen=True, eq=False)
class Problem:
    """Presorted calibration data.

    Attributes
    ----------
    n_early, n_samples : int
        Early exits K-1 and samples N.
    quality : int64 array (K, N)
        In units of ``quality_unit``, each sample's as often as it counts.
    quality_unit : float
    order, rank : integer arrays (K-1, N)
        Samples from surest to least sure at each early exit, and the inverse permutation.
    sorted_scores : array (K-1, N), falling
    ends : list of K-1 arrays
        Prefix lengths that end between two different scores, N included, 0 not.
    stage_costs, exit_costs : int64 arrays (K,)
        Relative to the plain full model, in units of ``COST_UNIT``.
    chained : bool
    allowed : boolean array (K-1,)
        Exits that the search may switch on.
    weights : float64 array (N,) or None
        How much each sample counts in sums and quotas, above 0 and 1 on average; None: all alike.
    """

    n_early: int
    n_samples: int
    quality: Integers
    quality_unit: float
    order: NDArray[np.intp]
    rank: NDArray[np.int32]
    sorted_scores: NDArray[Any]
    ends: list[Integers]
    stage_costs: Integers
    exit_costs: Integers
    chained: bool
    allowed: NDArray[np.bool_]
    weights: Floats | None = None

    @classmethod
    def from_outputs(cls, outputs: ExitOutputs) -> Problem:
        """Sort every early exit of ``outputs`` once; they have no samples of weight 0 (``outputs.counted()``)."""
        early, n = outputs.n_exits - 1, outputs.n_samples
        order = np.empty((early, n), dtype=np.intp)
        rank = np.empty((early, n), dtype=np.int32)
        sorted_scores = np.empty((early, n), dtype=outputs.scores.dtype)
        ends = []
        for k in range(early):
            order[k] = np.argsort(-outputs.scores[k], kind="stable")
            rank[k][order[k]] = np.arange(n, dtype=np.int32)
            sorted_scores[k] = outputs.scores[k][order[k]]
            ends.append(np.append(np.flatnonzero(np.diff(sorted_scores[k])) + 1, n))
        weights = outputs.sample_weight
        quality, unit = in_units(outputs.graded if weights is None else outputs.graded * weights)
        full_cost = outputs.full_cost
        return cls(
            n_early=early,
            n_samples=n,
            quality=quality,
            quality_unit=unit,
            order=order,
            rank=rank,
            sorted_scores=sorted_scores,
            ends=ends,
            stage_costs=np.rint(outputs.stage_costs / full_cost / COST_UNIT).astype(np.int64),
            exit_costs=np.rint(outputs.exit_costs / full_cost / COST_UNIT).astype(np.int64),
            chained=outputs.chained,
            allowed=np.ones(early, dtype=bool),
            weights=weights,
        )

    @cached_property
    def full_quality(self) -> float:
        """Summed quality of the full model."""
        return int(self.quality[-1].sum()) * self.quality_unit

    @cached_property
    def effective_size(self) -> float:
        """Samples of equal weight that say as much: N without weights."""
        return float(self.n_samples if self.weights is None else self.n_samples**2 / (self.weights @ self.weights))

    @cached_property
    def prefix_sizes(self) -> list[NDArray[Any]]:
        """How much the surest 0 ... N samples of each early exit count together: K-1 arrays (N + 1,)."""
        if self.weights is None:
            return [np.arange(self.n_samples + 1)] * self.n_early
        return [np.append(0.0, np.cumsum(self.weights[order])) for order in self.order]

    def _each(self, cost: Any) -> Integers:
        """What samples (N,) that cost so much add to the sum."""
        costs = np.broadcast_to(cost, self.n_samples)
        return costs if self.weights is None else np.rint(self.weights * costs).astype(np.int64)

    @cached_property
    def tie_ends(self) -> list[Integers]:
        """For every position in ``order`` the end of its tie: K-1 arrays (N,)."""
        return [np.repeat(ends, np.diff(ends, prepend=0)) for ends in self.ends]

    @cached_property
    def free(self) -> bool:
        """Whether early exits cost nothing of their own."""
        return not self.exit_costs[:-1].any()

    def committed(self, exits: NDArray[np.bool_]) -> Problem:
        """The same problem when exactly ``exits`` (K-1,) are run for everybody who passes: their cost is sunk."""
        sunk = np.where(self._runs(exits[None])[0, :-1], self.exit_costs[:-1], 0)
        return dataclasses.replace(
            self,
            stage_costs=self.stage_costs + np.append(sunk, 0),
            exit_costs=np.append(np.zeros(self.n_early, dtype=np.int64), self.exit_costs[-1]),
            chained=False,
            allowed=exits,
        )

    def priced(self, weight: float) -> Problem:
        """The same problem with every free exit's cost taken off its quality at ``weight``: nothing costs any more."""
        paths = np.cumsum(self.stage_costs + self.exit_costs) * COST_UNIT
        each = paths[:, None] if self.weights is None else paths[:, None] * self.weights
        quality, unit = in_units(self.quality * self.quality_unit - weight * each)
        nothing = np.zeros(self.n_early + 1, dtype=np.int64)
        return dataclasses.replace(self, quality=quality, quality_unit=unit, stage_costs=nothing, exit_costs=nothing)

    def _runs(self, on: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Exits that are run, (P, K), where early exits (P, K-1) are on: chained ones up to the deepest of these."""
        if self.chained:
            on = np.logical_or.accumulate(on[:, ::-1], axis=1)[:, ::-1]
        return np.concatenate([on, np.ones((len(on), 1), dtype=bool)], axis=1)

    def _switch_cost(self, k: int, policy: Policy) -> int:
        """What everybody who reaches exit k pays more when it is on than when it is off."""
        if not self.chained:
            return int(self.exit_costs[k])
        if (policy[k + 1 :] > 0).any():
            return 0
        before = np.flatnonzero(policy[:k] > 0)
        return int(self.exit_costs[(before[-1] + 1 if len(before) else 0) : k + 1].sum())

    def outcomes(self, policies: Integers) -> tuple[Integers, NDArray[Any], Integers]:
        """What becomes of policies (P, K-1), in units.

        Returns
        -------
        (quality, counts, costs)
            Summed quality and summed cost, (P,), and how many samples leave at each exit, (P, K), by weight.
        """
        quality = np.zeros(len(policies), dtype=np.int64)
        counts = self._counts(policies, quality)
        return quality, counts, self._charged(policies, counts)

    def costs(self, policies: Integers) -> Floats:
        """Summed relative cost of policies (P, K-1), (P,): what :meth:`values` gives, without the qualities."""
        return np.asarray(self._charged(policies, self._counts(policies)) * COST_UNIT)

    def disagreements(self, policies: Integers) -> Integers:
        """How many samples get another quality from policies (P, K-1) than from the full model: (P,), weights apart."""
        differing = dataclasses.replace(self, quality=(self.quality != self.quality[-1]).astype(np.int64))
        differing._counts(policies, numbers := np.zeros(len(policies), dtype=np.int64))
        return numbers

    def _counts(self, policies: Integers, quality: Integers | None = None) -> NDArray[Any]:
        """How many samples leave at each exit, (P, K), by weight; their qualities are added to ``quality`` (P,)."""
        counts = np.zeros((len(policies), self.n_early + 1), dtype=np.int64 if self.weights is None else np.float64)
        for block in blocks(len(policies), self.n_samples):
            ends = policies[block].astype(np.int32)  # as ranks are: comparing other types takes several times as long
            staying = np.ones((len(ends), self.n_samples), dtype=bool)
            for k in np.flatnonzero(ends.any(axis=0)):
                leaving = staying & (self.rank[k] < ends[:, k, None])
                counts[block, k] = (
                    leaving.sum(axis=1, dtype=np.int32) if self.weights is None else leaving @ self.weights
                )
                if quality is not None:
                    quality[block] += leaving @ self.quality[k]
                staying &= ~leaving
            if quality is not None:
                quality[block] += staying @ self.quality[-1]
        counts[:, -1] = self.n_samples - counts.sum(axis=1)
        return counts

    def _charged(self, policies: Integers, counts: NDArray[Any]) -> Integers:
        """Summed cost of policies (P, K-1) with so many leaving at each exit (P, K)."""
        paths = np.cumsum(self.stage_costs + np.where(self._runs(policies > 0), self.exit_costs, 0), axis=1)
        costs = (counts * paths).sum(axis=1)
        return np.asarray(costs if self.weights is None else np.rint(costs).astype(np.int64))

    def _totals(self, policy: Policy) -> tuple[int, int]:
        """Summed quality and summed cost of a policy, in units."""
        quality, _, cost = self.outcomes(policy[None])
        return int(quality[0]), int(cost[0])

    def values(self, policies: Integers) -> tuple[Floats, Floats]:
        """Summed quality and summed relative cost of policies (P, K-1), each (P,)."""
        quality, _, cost = self.outcomes(policies)
        return np.asarray(quality * self.quality_unit), np.asarray(cost * COST_UNIT)

    def sweep(
        self, policy: Policy, objective: Objective, totals: tuple[int, int] | None = None
    ) -> tuple[Policy, tuple[int, int]]:
        """Every exit from deep to shallow set to the exact best for ``objective``, the others held; never worse.

        One pass is O(K N): at each exit all prefixes of the samples that reach it are evaluated by cumulative sums,
        and switching the exit off beside them. Takes (where known) and returns the policy's summed quality and cost in
        units.
        """
        policy, unit = policy.copy(), self.quality_unit
        arrivals: list[NDArray[np.bool_] | None] = [None]  # who reaches each exit; None: everybody
        for k in range(self.n_early - 1):
            stays = self.rank[k] >= policy[k] if policy[k] else None
            so_far = arrivals[-1]
            arrivals.append(so_far if stays is None else stays if so_far is None else so_far & stays)
        total_q, total_c = self._totals(policy) if totals is None else totals
        best = float(objective(total_q * unit, total_c * COST_UNIT))
        # What a sample that goes on after exit k still earns and still costs; None where nothing costs.
        later_q = self.quality[-1]
        later_c: Integers | None = None
        if self.stage_costs.any() or self.exit_costs.any():
            later_c = self._each(self.stage_costs[-1] + self.exit_costs[-1])
        for k in range(self.n_early - 1, -1, -1):
            if self.allowed[k]:
                prefixes, gain_q, gain_c, n_reach = self._scan(k, arrivals[k], later_q, later_c)
                entry = int(np.rint(self._switch_cost(k, policy) * n_reach))
                off_q, off_c = total_q, total_c
                if policy[k]:
                    # The prefix in force ends where the last of those that it lets leave here ends, if any is left.
                    now = int(np.searchsorted(prefixes, policy[k], side="right")) - 1
                    off_q -= int(gain_q[now]) if now >= 0 else 0
                    off_c -= entry - (int(gain_c[now]) if now >= 0 else 0)
                off = float(objective(off_q * unit, off_c * COST_UNIT))
                choice, on = -1, -np.inf
                if len(prefixes):
                    candidates = objective((off_q + gain_q) * unit, (off_c + entry - gain_c) * COST_UNIT)
                    choice = int(np.argmax(candidates))
                    on = float(candidates[choice])
                # Beyond rounding: an exit that moves for less could move back at the next sweep, and so for ever.
                if max(on, off) > best + 1e-12 * abs(best):
                    if off >= on:
                        policy[k], best, total_q, total_c = 0, off, off_q, off_c
                    else:
                        policy[k], best = prefixes[choice], on
                        total_q, total_c = off_q + int(gain_q[choice]), off_c + entry - int(gain_c[choice])
            if k:
                goes_on = self.rank[k] >= policy[k] if policy[k] else None
                if goes_on is not None:
                    later_q = np.where(goes_on, later_q, self.quality[k])
                if later_c is not None:
                    runs = policy[k:].any() if self.chained else policy[k]
                    here = self.stage_costs[k] + (self.exit_costs[k] if runs else 0)
                    later_c = self._each(here) + (later_c if goes_on is None else later_c * goes_on)
        return policy, (total_q, total_c)

    def _scan(
        self, k: int, reach: NDArray[np.bool_] | None, later_q: Integers, later_c: Integers | None
    ) -> tuple[Integers, Integers, Integers, Any]:
        """Prefixes of exit k that tell the samples reaching it apart, what each gains and saves, and how many do."""
        if reach is None:
            samples, prefixes = self.order[k], self.ends[k]
            positions = prefixes - 1
        else:
            positions = np.flatnonzero(reach[self.order[k]])
            samples = self.order[k][positions]
            prefixes = positions + 1
            if len(self.ends[k]) < self.n_samples:  # equal scores leave together
                prefixes = self.tie_ends[k][positions]
        gain_q = np.cumsum((self.quality[k] - later_q).take(samples))
        gain_c = np.zeros(1, dtype=np.int64) if later_c is None else np.cumsum(later_c.take(samples))
        if len(self.ends[k]) < self.n_samples:
            if reach is not None:  # of each tie the last sample that is still there
                positions = np.append(np.flatnonzero(prefixes[1:] != prefixes[:-1]), max(len(samples) - 1, 0))
                positions = positions[: len(samples)]
                prefixes = prefixes[positions]
            gain_q, gain_c = gain_q[positions], gain_c if later_c is None else gain_c[positions]
        if later_c is None:
            gain_c = np.broadcast_to(gain_c, gain_q.shape)
        return prefixes, gain_q, gain_c, len(samples) if self.weights is None else self.weights[samples].sum()

    def settle(self, policy: Policy, objective: Objective, max_sweeps: int = 30) -> tuple[Policy, float]:
        """Sweeps to a fixed point; returns the policy and its objective."""
        previous = policy
        policy, totals = self.sweep(policy, objective)
        for _ in range(max_sweeps - 1):
            if np.array_equal(policy, previous):
                break
            previous = policy
            policy, totals = self.sweep(policy, objective, totals)
        return policy, float(objective(totals[0] * self.quality_unit, totals[1] * COST_UNIT))

    def snap(self, positions: NDArray[Any]) -> Integers:
        """The nearest prefixes, (..., K-1), that end between two different scores; 0 stays off."""
        snapped = np.zeros(positions.shape, dtype=np.int64)
        for k, ends in enumerate(self.ends):
            position = positions[..., k]
            after = np.minimum(np.searchsorted(ends, position), len(ends) - 1)
            before = np.maximum(after - 1, 0)
            nearest = np.where(position - ends[before] < ends[after] - position, ends[before], ends[after])
            snapped[..., k] = np.where(position > 0, nearest, 0)
        return snapped

    def moved(self, positions: Floats, other: Problem) -> Floats:
        """Positions (..., K-1) of a problem on other samples, as those of the same scores here; 0 stays off."""
        here = np.zeros(positions.shape)
        for k, (own, scores) in enumerate(zip(self.sorted_scores, other.sorted_scores, strict=True)):
            last = np.clip(np.rint(positions[..., k]).astype(np.int64) - 1, 0, len(scores) - 1)
            here[..., k] = np.searchsorted(-own, -scores[last], side="right")
        return np.where(positions > 0, here, 0.0)

    def thresholds(self, policies: Integers) -> tuple[Floats, Floats]:
        """Thresholds and cutoffs, both (..., K), of policies (..., K-1): see :mod:`adaptexit.core.routing`."""
        thresholds = np.full((*policies.shape[:-1], self.n_early + 1), -np.inf)
        cutoffs = thresholds.copy()
        for k, scores in enumerate(self.sorted_scores):
            n = policies[..., k]
            above = scores[np.maximum(n - 1, 0)].astype(np.float64)
            below = scores[np.minimum(n, self.n_samples - 1)].astype(np.float64)
            unlimited = np.where(n == 0, np.inf, -np.inf)
            part = (n > 0) & (n < self.n_samples)
            thresholds[..., k] = np.where(part, below, unlimited)
            cutoffs[..., k] = np.where(part, midpoint(below, above), unlimited)
        return thresholds, cutoffs


def blocks(n_rows: int, width: int) -> list[slice]:
    """The rows of a matrix in runs that are worked on at once."""
    size = max(1, _BLOCK // max(width, 1))
    return [slice(start, start + size) for start in range(0, n_rows, size)]


def in_units(quality: NDArray[Any]) -> tuple[Integers, float]:
    """Qualities as integers, and their unit."""
    if quality.dtype.kind in "biu":
        return quality.astype(np.int64), 1.0
    unit = max(float(np.abs(quality).max()) or 1.0, 1e-300) / _QUALITY_STEPS
    return np.rint(quality / unit).astype(np.int64), unit
