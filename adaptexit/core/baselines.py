"""Simple routing rules without a curve to choose from: what a learned or calibrated rule has to beat.

The first three are the baselines of Kyauk, "Adaptive Multi-Exit Neural Networks using EM-Based Routing", section 5.2,
at the costs that were recorded instead of quarters; patience is the rule of PABEE (Zhou et al., "BERT Loses Patience",
NeurIPS 2020).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.routing import summarise
from adaptexit.utils.validation import check_whole

Floats = NDArray[np.float64]
Exits = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class RulePoint:
    """What a rule without thresholds gives on named data.

    Attributes
    ----------
    name : str
    accuracy : float
        Mean of :attr:`ExitOutputs.graded`.
    cost : float
        Mean relative cost: 1 is the plain full model.
    exit_rates : array of shape (K,)
        Share of the samples that each exit answers.
    params : dict
        Of the rule: ``exit`` of a fixed one, ``patience``.
    """

    name: str
    accuracy: float
    cost: float
    exit_rates: Floats
    params: dict[str, Any] = field(default_factory=dict)


def fixed_exits(outputs: ExitOutputs) -> list[RulePoint]:
    """Each exit alone answers for everybody, K points; the last is the plain full model at cost 1.

    An exit's cost is :meth:`ExitOutputs.alone_costs`: every other exit is switched off, but for those that a chained
    one reads.
    """
    last = outputs.n_exits - 1
    costs = outputs.alone_costs() / outputs.full_cost
    return [
        RulePoint(
            "full model" if k == last else f"exit {k} alone", float(accuracy), float(costs[k]), rates, {"exit": k}
        )
        for k, (accuracy, rates) in enumerate(zip(outputs.accuracies, np.eye(outputs.n_exits), strict=True))
    ]


def random_routing(outputs: ExitOutputs) -> RulePoint:
    """An exit drawn uniformly for each sample before it is run, in expectation: nothing is sampled.

    Only the exit drawn is paid for, so this is the mean of :func:`fixed_exits`.
    """
    cost = float(outputs.alone_costs().mean()) / outputs.full_cost
    rates = np.full(outputs.n_exits, 1.0 / outputs.n_exits)
    return RulePoint("random exit", float(outputs.accuracies.mean()), cost, rates)


def oracle_exits(outputs: ExitOutputs) -> Exits:
    """The exit that :func:`oracle` chooses for every sample, shape (N,); of equally cheap ones the first."""
    by_cost = np.argsort(outputs.alone_costs(), kind="stable")
    return np.asarray(by_cost[np.argmax(outputs.graded[by_cost], axis=0)], dtype=np.intp)


def oracle(outputs: ExitOutputs) -> RulePoint:
    """The cheapest of the exits that answer a sample best: no rule on these exits is more accurate.

    By classes that is the cheapest exit that is right, and where none is, the cheapest of all. The oracle knows the
    label and runs the chosen exit alone, so no rule that is as accurate costs less either.
    """
    accuracy, _, rates = summarise(outputs, oracle_exits(outputs), np.ones(outputs.n_exits, dtype=bool))
    return RulePoint("oracle", accuracy, float(rates @ outputs.alone_costs()) / outputs.full_cost, rates)


def confirmations(predictions: NDArray[Any]) -> NDArray[np.int64]:
    """How many exits in a row, right before each exit, answer as it does, (K, N), for predictions (K, N)."""
    counts = np.zeros(predictions.shape, dtype=np.int64)
    for k in range(1, len(predictions)):
        counts[k] = np.where(predictions[k] == predictions[k - 1], counts[k - 1] + 1, 0)
    return counts


def patience_exits(outputs: ExitOutputs, patience: int) -> Exits:
    """The exit at which every sample leaves when so many exits in a row have confirmed an answer, shape (N,).

    Parameters
    ----------
    outputs : ExitOutputs
        With predictions.
    patience : int
        A sample leaves at the first exit that answers as each of the ``patience`` exits before it, at least 1; the
        full model answers where there is none.

    Raises
    ------
    ValueError
        For another patience, or outputs without predictions.
    """
    check_whole("patience", patience)
    if outputs.predictions is None:
        raise ValueError("patience compares predictions, but the outputs have none: they were graded by quality.")
    leaves = confirmations(outputs.predictions) >= patience
    leaves[-1] = True
    return np.asarray(np.argmax(leaves, axis=0), dtype=np.intp)


def patience(outputs: ExitOutputs) -> list[RulePoint]:
    """PABEE's rule for a patience of 1 ... K - 1, K - 1 points.

    Every exit up to the one left at is run and paid for, whether or not anybody leaves there, as the next ones are
    compared with it: at the largest patience everybody gets the full model's answer and pays for all exits.
    """
    every = np.ones(outputs.n_exits, dtype=bool)
    return [
        RulePoint(f"patience {p}", *summarise(outputs, patience_exits(outputs, p), every), {"patience": p})
        for p in range(1, outputs.n_exits)
    ]
