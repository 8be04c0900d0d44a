"""One number for a whole frontier, by which sets of exits on one model are compared."""

from __future__ import annotations

import numpy as np

from adaptexit.core.frontier import ParetoFrontier, evaluate
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.search import search_thresholds

BUDGETS = tuple(round(0.1 * tenths, 1) for tenths in range(4, 10))
"""Relative costs at which exits are used: below, little of the model's accuracy is left; above, little is saved."""

N_FOLDS = 2


def frontier_score(outputs: ExitOutputs, random_state: int = 0) -> float:
    """Mean accuracy over :data:`BUDGETS`, on samples that the thresholds were not searched on.

    Outputs of the same model on the same samples may differ in what their exits answer and cost. Below the cost of its
    cheapest policy a model answers as large a share of the samples as the budget allows, and guesses the rest.

    Parameters
    ----------
    outputs : ExitOutputs
        At least four samples.
    random_state : int
        Seed of the two halves: thresholds searched on one are applied to the other.
    """
    halves = np.array_split(np.random.default_rng(random_state).permutation(outputs.n_samples), N_FOLDS)
    scores = []
    for f, half in enumerate(halves):
        others = np.sort(np.concatenate([halves[g] for g in range(N_FOLDS) if g != f]))
        frontier, _ = search_thresholds(
            outputs.take(others), n_points=len(BUDGETS), budgets=BUDGETS, random_state=random_state
        )
        judged = outputs.take(np.sort(half))
        scores += [_accuracy(frontier, judged, budget) for budget in BUDGETS]
    return float(np.mean(scores))


def _accuracy(frontier: ParetoFrontier, judged: ExitOutputs, budget: float) -> float:
    """Of the policy for a budget on other samples."""
    cheapest = frontier.points[0]
    point = cheapest if budget < cheapest.cost else frontier.at(budget=budget)
    accuracy = evaluate(judged, point.thresholds, point.cutoffs).accuracy
    answered = min(budget / cheapest.cost, 1.0)
    assert judged.n_classes is not None
    return answered * accuracy + (1 - answered) / judged.n_classes
