"""One number for a whole frontier, by which sets of exits on one model are compared."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adaptexit.core.frontier import ParetoFrontier, evaluate
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.search import search_thresholds

N_BUDGETS = 10
N_FOLDS = 2


def even_budgets(stage_costs: NDArray[np.float64], full_cost: float) -> NDArray[np.float64]:
    """Relative costs in even steps between that of the first stage alone and the full model's, both left out."""
    return np.linspace(float(stage_costs[0]) / full_cost, 1.0, N_BUDGETS + 2)[1:-1]


def frontier_score(outputs: ExitOutputs, random_state: int = 0) -> float:
    """Mean accuracy over even budgets, on samples that the thresholds were not searched on.

    Outputs of the same model on the same samples, which differ in what their exits answer and cost, have the same
    budgets, and are compared fairly. Below the cost of its cheapest policy a model answers as large a share of the
    samples as the budget allows, and guesses the rest.

    Parameters
    ----------
    outputs : ExitOutputs
        At least four samples.
    random_state : int
        Seed of the two halves: thresholds searched on one are applied to the other.
    """
    budgets = even_budgets(outputs.stage_costs, outputs.full_cost)
    halves = np.array_split(np.random.default_rng(random_state).permutation(outputs.n_samples), N_FOLDS)
    scores = []
    for f, half in enumerate(halves):
        others = np.sort(np.concatenate([halves[g] for g in range(N_FOLDS) if g != f]))
        frontier, _ = search_thresholds(
            outputs.take(others), n_points=N_BUDGETS, budgets=budgets.tolist(), random_state=random_state
        )
        judged = outputs.take(np.sort(half))
        scores += [_accuracy(frontier, judged, budget) for budget in budgets.tolist()]
    return float(np.mean(scores))


def _accuracy(frontier: ParetoFrontier, judged: ExitOutputs, budget: float) -> float:
    """Of the policy for a budget on other samples."""
    cheapest = frontier.points[0]
    point = cheapest if budget < cheapest.cost else frontier.at(budget=budget)
    accuracy = evaluate(judged, point.thresholds, point.cutoffs).accuracy
    answered = min(budget / cheapest.cost, 1.0)
    assert judged.n_classes is not None
    return answered * accuracy + (1 - answered) / judged.n_classes
