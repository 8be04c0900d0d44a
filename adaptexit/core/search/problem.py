"""The threshold search as a problem: who can leave where, what that is worth and what it costs, sorted once.

A *policy* is an integer array (K-1,): at exit k the ``policy[k]`` surest of all N samples would leave, 0 switches the
exit off. Only tie ends are allowed, so that equal scores leave together and a policy is the same as thresholds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.routing import midpoint
from adaptexit.core.search.targets import Objective

Floats = NDArray[np.float64]
Policy = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Problem:
    """Presorted calibration data; costs are relative to the plain full model.

    Attributes
    ----------
    quality : float64 array (K, N)
    order, rank : integer arrays (K-1, N)
        Samples from surest to least sure at each early exit, and the inverse permutation.
    sorted_scores : array (K-1, N), falling
    ends : list of K-1 arrays
        Prefix lengths that end between two different scores, N included, 0 not.
    stage_costs, exit_costs : arrays (K,)
    chained : bool
    allowed : boolean array (K-1,)
        Exits that the search may switch on.
    """

    quality: Floats
    order: NDArray[np.intp]
    rank: NDArray[np.int32]
    sorted_scores: NDArray[Any]
    ends: list[NDArray[np.int64]]
    stage_costs: Floats
    exit_costs: Floats
    chained: bool
    allowed: NDArray[np.bool_]

    @classmethod
    def from_outputs(cls, outputs: ExitOutputs) -> Problem:
        """Sort every early exit of ``outputs`` once."""
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
        return cls(
            quality=outputs.graded.astype(np.float64), order=order, rank=rank, sorted_scores=sorted_scores, ends=ends,
            stage_costs=outputs.stage_costs / outputs.full_cost, exit_costs=outputs.exit_costs / outputs.full_cost,
            chained=outputs.chained, allowed=np.ones(early, dtype=bool),
        )  # fmt: skip

    @property
    def n_samples(self) -> int:
        """Number of samples N."""
        return int(self.quality.shape[1])

    @property
    def n_early(self) -> int:
        """Number of early exits K-1."""
        return int(self.order.shape[0])

    @cached_property
    def full_quality(self) -> float:
        """Summed quality of the full model."""
        return float(self.quality[-1].sum())

    @cached_property
    def tie_ends(self) -> list[NDArray[np.int64]]:
        """For every position in ``order`` the end of its tie: K-1 arrays (N,)."""
        return [np.repeat(ends, np.diff(ends, prepend=0)) for ends in self.ends]

    @property
    def free(self) -> bool:
        """Whether early exits cost nothing of their own."""
        return not self.exit_costs[:-1].any()

    def committed(self, exits: NDArray[np.bool_]) -> Problem:
        """The same problem when exactly ``exits`` (K-1,) are run for everybody who passes: their cost is sunk."""
        last_paid = np.flatnonzero(exits)[-1] + 1 if self.chained and exits.any() else 0
        paid = exits | (np.arange(self.n_early) < last_paid)
        sunk = np.append(np.where(paid, self.exit_costs[:-1], 0.0), 0.0)
        return dataclasses.replace(
            self,
            stage_costs=self.stage_costs + sunk,
            exit_costs=np.append(np.zeros(self.n_early), self.exit_costs[-1]),
            chained=False,
            allowed=exits,
        )

    def _paid(self, policy: Policy) -> NDArray[np.bool_]:
        on = policy > 0
        if self.chained and on.any():
            on = np.arange(self.n_early) <= np.flatnonzero(on)[-1]
        return np.append(on, True)

    def _switch_cost(self, k: int, policy: Policy) -> float:
        """What everybody who reaches exit k pays more when it is on than when it is off."""
        if not self.chained:
            return float(self.exit_costs[k])
        if (policy[k + 1 :] > 0).any():
            return 0.0
        before = np.flatnonzero(policy[:k] > 0)
        return float(self.exit_costs[(before[-1] + 1 if len(before) else 0) : k + 1].sum())

    def outcome(self, policy: Policy) -> tuple[float, NDArray[np.int64], Floats]:
        """Summed quality of a policy, how many samples leave at each exit (K,) and what leaving there costs (K,)."""
        counts = np.zeros(self.n_early + 1, dtype=np.int64)
        quality, staying = 0.0, np.ones(self.n_samples, dtype=bool)
        for k in np.flatnonzero(policy > 0):
            leaves = staying & (self.rank[k] < policy[k])
            counts[k] = np.count_nonzero(leaves)
            quality += float(self.quality[k] @ leaves)
            staying &= ~leaves
        counts[-1] = self.n_samples - counts.sum()
        quality += float(self.quality[-1] @ staying)
        paths = np.cumsum(self.stage_costs + np.where(self._paid(policy), self.exit_costs, 0.0))
        return quality, counts, paths

    def value(self, policy: Policy) -> tuple[float, float]:
        """Summed quality and summed relative cost of a policy."""
        quality, counts, paths = self.outcome(policy)
        return quality, float(counts @ paths)

    def values(self, policies: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Summed quality and summed relative cost of policies (P, K-1)."""
        pairs = [self.value(policy) for policy in policies]
        return np.array([q for q, _ in pairs]), np.array([c for _, c in pairs])

    def sweep(
        self, policy: Policy, objective: Objective, totals: tuple[float, float] | None = None
    ) -> tuple[Policy, tuple[float, float]]:
        """Every exit from deep to shallow set to the exact best for ``objective``, the others held; never worse.

        One pass is O(K N): at each exit all prefixes of the samples that reach it are evaluated by cumulative sums,
        and switching the exit off beside them. Takes (where known) and returns the policy's :meth:`value` too.
        """
        policy = policy.copy()
        reached: list[NDArray[np.bool_] | None] = [None]  # None: everybody
        for k in range(self.n_early - 1):
            stays = self.rank[k] >= policy[k] if policy[k] else None
            so_far = reached[-1]
            reached.append(so_far if stays is None else stays if so_far is None else so_far & stays)
        total_q, total_c = self.value(policy) if totals is None else totals
        best = _at(objective, total_q, total_c)
        # What a sample that goes on after exit k still earns and still costs.
        later_q = self.quality[-1]
        later_c = np.full(self.n_samples, self.stage_costs[-1] + self.exit_costs[-1])
        for k in range(self.n_early - 1, -1, -1):
            if self.allowed[k]:
                prefixes, gain_q, gain_c, n_reach = self._scan(k, reached[k], later_q, later_c)
                entry = self._switch_cost(k, policy) * n_reach
                now = int(np.searchsorted(prefixes, policy[k], side="right")) - 1 if policy[k] else -1
                off_q, off_c = total_q, total_c
                if policy[k]:
                    off_q -= gain_q[now] if now >= 0 else 0.0
                    off_c -= entry - (gain_c[now] if now >= 0 else 0.0)
                off = _at(objective, off_q, off_c)
                choice, chosen = -1, -np.inf
                if len(prefixes):
                    candidates = objective(off_q + gain_q, off_c + entry - gain_c)
                    choice = int(np.argmax(candidates))
                    chosen = float(candidates[choice])
                if max(chosen, off) > best + 1e-9 * max(1.0, abs(best)):
                    if off >= chosen:
                        policy[k], best, total_q, total_c = 0, off, off_q, off_c
                    else:
                        policy[k], best = prefixes[choice], chosen
                        total_q, total_c = off_q + float(gain_q[choice]), off_c + entry - float(gain_c[choice])
            if k:
                here = self.stage_costs[k] + (self.exit_costs[k] if self._paid(policy)[k] else 0.0)
                if policy[k]:
                    goes_on = self.rank[k] >= policy[k]
                    later_q = np.where(goes_on, later_q, self.quality[k])
                    later_c = here + later_c * goes_on
                else:
                    later_c = here + later_c
        return policy, (total_q, total_c)

    def _scan(
        self, k: int, reach: NDArray[np.bool_] | None, later_q: Floats, later_c: Floats
    ) -> tuple[NDArray[np.int64], Floats, Floats, int]:
        """Prefixes of exit k that tell the samples reaching it apart, what each gains and saves, and who reaches it."""
        if reach is None:
            samples, prefixes = self.order[k], self.ends[k]
            positions = prefixes - 1
        else:
            positions = np.flatnonzero(reach[self.order[k]])
            samples = self.order[k][positions]
            prefixes = positions + 1
            if len(self.ends[k]) < self.n_samples:  # equal scores leave together
                prefixes = self.tie_ends[k][positions]
            positions = np.arange(len(samples))
        gain_q = np.cumsum(self.quality[k][samples] - later_q[samples])
        gain_c = np.cumsum(later_c[samples])
        if len(self.ends[k]) < self.n_samples:
            if reach is not None:
                last = np.flatnonzero(np.diff(prefixes, append=self.n_samples + 1))
                prefixes, positions = prefixes[last], positions[last]
            gain_q, gain_c = gain_q[positions], gain_c[positions]
        return prefixes, gain_q, gain_c, len(samples)

    def settle(self, policy: Policy, objective: Objective, max_sweeps: int = 30) -> tuple[Policy, float]:
        """Sweeps to a fixed point; returns the policy and its objective."""
        reached, totals = self.sweep(policy, objective)
        for _ in range(max_sweeps - 1):
            if np.array_equal(reached, policy):
                break
            policy = reached
            reached, totals = self.sweep(policy, objective, totals)
        return reached, _at(objective, *totals)

    def snap(self, policy: NDArray[Any]) -> Policy:
        """The nearest prefixes that end between two different scores; 0 stays off."""
        snapped = np.zeros(self.n_early, dtype=np.int64)
        for k, wanted in enumerate(policy):
            if wanted > 0:
                ends = self.ends[k]
                right = min(int(np.searchsorted(ends, wanted)), len(ends) - 1)
                left = max(right - 1, 0)
                snapped[k] = ends[left] if wanted - ends[left] < ends[right] - wanted else ends[right]
        return snapped

    def thresholds(self, policy: Policy) -> tuple[Floats, Floats]:
        """Thresholds and cutoffs, both (K,): see :mod:`adaptexit.core.routing`."""
        thresholds = np.full(self.n_early + 1, np.inf)
        cutoffs = np.full(self.n_early + 1, np.inf)
        thresholds[-1] = cutoffs[-1] = -np.inf
        for k, n in enumerate(policy):
            if n == self.n_samples:
                thresholds[k] = cutoffs[k] = -np.inf
            elif n > 0:
                above, below = self.sorted_scores[k, n - 1 : n + 1].astype(np.float64)
                thresholds[k], cutoffs[k] = below, midpoint(below, above)
        return thresholds, cutoffs


def _at(objective: Objective, quality: float, cost: float) -> float:
    return float(objective(np.array([quality]), np.array([cost]))[0])
