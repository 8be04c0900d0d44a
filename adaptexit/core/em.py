"""Exits as a latent variable: which exit should have answered a sample, given its label and what exits cost.

Kyauk, "Adaptive Multi-Exit Neural Networks using EM-Based Routing", section 4.3. Exit k explains the label of sample i
with probability p_ik; a cost weight lambda takes lambda c_k off its logarithm. Responsibilities are kept as logarithms:
those far below the smallest number still have targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logsumexp

from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.scores import in_double, row_blocks, true_logits

Floats = NDArray[np.float64]

LEAST = 1e-12
"""Probability that an exit gives to a label, at least."""

_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, eq=False)
class Posterior:
    """Responsibilities of the exits for every sample, and how they were found.

    Attributes
    ----------
    log_responsibilities : array (N, K)
        Rows sum to 1 once exponentiated.
    prior : array (K,) or (N, K)
        Of the exits; by sample where each has its own.
    history : list of float
        Mean penalised log-likelihood of a sample before each step, and at the end: mean_i log sum_k pi_k p_ik
        exp(-lambda c_k).
    converged : bool
        Whether the last step gained less than the tolerance.
    """

    log_responsibilities: Floats
    prior: Floats
    history: list[float]
    converged: bool


def log_likelihoods(outputs: ExitOutputs) -> Floats:
    """Log-probability of each sample's label at each exit, shape (N, K), at least log(1e-12)."""
    if outputs.logits is None or outputs.labels is None:
        absent = "logits (record them with keep_logits=True)" if outputs.logits is None else "labels"
        raise ValueError(f"likelihoods of exits need logits and labels; the outputs lack {absent}.")
    columns = []
    for exit_logits in outputs.logits:
        evidence = np.empty(outputs.n_samples)
        for rows in row_blocks(exit_logits):
            evidence[rows] = logsumexp(in_double(exit_logits[rows]), axis=1)
        columns.append(true_logits(exit_logits, outputs.labels) - evidence)
    return np.asarray(np.maximum(np.stack(columns, axis=1), np.log(LEAST)))


def expectation(log_p: Floats, prior: Floats, penalty: Floats) -> tuple[Floats, float]:
    """E-step: log-responsibilities (N, K) = log softmax(log p + log pi - penalty), and the mean log-likelihood.

    Equation 2 of the paper; ``penalty`` (K,) is lambda c.
    """
    joint = log_p + np.log(np.maximum(prior, _TINY)) - penalty
    evidence = logsumexp(joint, axis=1, keepdims=True)
    return joint - evidence, float(evidence.mean())


def fit_global(log_p: Floats, penalty: Floats, *, n_iter: int = 1000, tol: float = 1e-8) -> Posterior:
    """EM with one prior for all samples, pi = mean responsibilities: its likelihood never falls.

    Parameters
    ----------
    log_p : array (N, K)
    penalty : array (K,)
        Cost weight times cost.
    n_iter : int
        Steps at most.
    tol : float
        Gain of the mean log-likelihood at which to stop.
    """
    utility = log_p - penalty
    best = utility.max(axis=1, keepdims=True)
    relative = np.exp(utility - best)  # rows have a 1, so no evidence vanishes as long as no prior does
    prior = np.full(log_p.shape[1], 1.0 / log_p.shape[1])
    history: list[float] = []
    for step in range(n_iter + 1):
        evidence = relative @ np.maximum(prior, _TINY)
        history.append(float(np.log(evidence).mean() + best.mean()))
        if step == n_iter or _settled(history, tol):
            break
        prior = prior * (relative.T @ (1.0 / evidence)) / len(evidence)
    return Posterior(expectation(log_p, prior, penalty)[0], prior, history, _settled(history, tol))


def fit_per_sample(log_p: Floats, penalty: Floats, *, n_iter: int = 1) -> Posterior:
    """The paper's prior of each sample's own: pi = its last responsibilities.

    After T steps responsibilities are softmax(T (log p - penalty)), so T sharpens them until the best exit takes all;
    one step is the posterior under an even prior.
    """
    prior = np.full(log_p.shape, 1.0 / log_p.shape[1])
    history: list[float] = []
    log_r = np.log(prior)
    for step in range(1, n_iter + 1):
        history.append(expectation(log_p, prior, penalty)[1])
        # Every step so far has multiplied by the same exp(utility): their product is written down at once.
        total_utility = step * (log_p - penalty)
        log_r = total_utility - logsumexp(total_utility, axis=1, keepdims=True)
        prior = np.exp(log_r)
    history.append(expectation(log_p, prior, penalty)[1])
    return Posterior(log_r, prior, history, True)


def _settled(history: list[float], tol: float) -> bool:
    return len(history) > 1 and history[-1] - history[-2] < tol


def halting_targets(log_r: Floats) -> Floats:
    """Probability of leaving at each exit for those who reach it, (N, K): t_k = r_k / sum_(j >= k) r_j; t_K = 1.

    From log-responsibilities, as sigmoid(log r_k - logsumexp_(j > k) log r_j): no 0/0.
    """
    targets = np.ones_like(log_r)
    later = np.logaddexp.accumulate(log_r[:, ::-1], axis=1)[:, ::-1]
    targets[:, :-1] = expit(log_r[:, :-1] - later[:, 1:])
    return targets


def reach(log_r: Floats) -> Floats:
    """Probability of reaching each exit, (N, K): s_k = sum_(j >= k) r_j; the weights of the exact M-step."""
    return np.minimum(np.exp(np.logaddexp.accumulate(log_r[:, ::-1], axis=1)[:, ::-1]), 1.0)


def exit_probabilities(halting: Floats) -> Floats:
    """Probability of leaving at each exit, (N, K), from that of leaving once there: t_k prod_(j < k) (1 - t_j)."""
    staying = np.cumprod(1.0 - halting[:, :-1], axis=1)
    return np.asarray(halting * np.concatenate([np.ones((len(halting), 1)), staying], axis=1))


def expected_cost(log_r: Floats, costs: NDArray[Any]) -> float:
    """Mean cost of a sample that leaves by its responsibilities."""
    return float((np.exp(log_r) @ costs).mean())
