import numpy as np
import pytest

from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.search.problem import Problem
from adaptexit.core.search.targets import Targets, Weighted, WithinBudget, WithinDrop


def problem_of(n_samples):
    rng = np.random.default_rng(0)
    scores = rng.random((3, n_samples))
    return Problem.from_outputs(
        ExitOutputs(scores=scores, quality=rng.random((3, n_samples)) < scores, costs=[1, 2, 3])
    )


def test_objectives_put_whatever_breaks_the_constraint_below_whatever_keeps_it():
    quality, cost = np.array([9.0, 5.0, 5.0]), np.array([6.0, 5.0, 4.0])
    within_budget = WithinBudget(0.5, 10)(quality, cost)
    assert np.argsort(within_budget).tolist() == [0, 1, 2]
    within_drop = WithinDrop(0.1, 10, full_quality=10.0)(quality, cost)
    assert within_drop[0] > within_drop[1] == within_drop[2]
    assert WithinBudget(0.5, 10)(5.0, 4.0) > WithinBudget(0.5, 10)(5.0, 4.5)
    assert WithinDrop(0.1, 10, full_quality=5.0)(5.0, 4.0) > WithinDrop(0.1, 10, full_quality=5.0)(4.5, 4.0)
    assert Weighted(2.0)(quality, cost).tolist() == [-3.0, -5.0, -3.0]


def test_objectives_forgive_rounding():
    cost, quality = np.array([0.1, 0.2, 0.3]).cumsum()[-1:], np.array([8.0])
    assert cost[0] > 0.6
    assert WithinBudget(0.6, 1)(quality, cost) > 0
    assert WithinDrop(0.0, 1, full_quality=cost[0])(np.array([0.6]), np.array([0.5])) > -1


def test_targets_become_objectives_on_data_of_any_size():
    targets = Targets.of(budgets=[0.5], drops=[0.1])
    for n_samples in (10, 40):
        problem = problem_of(n_samples)
        budget, drop = WithinBudget(0.5, n_samples), WithinDrop(0.1, n_samples, problem.full_quality)
        assert targets.objectives(problem) == [budget, drop]


def test_targets_say_which_knob_they_are():
    described = Targets.of(budgets=[0.5, 1.0], drops=[0.0]).described()
    assert described == [{"budget": 0.5}, {"budget": 1.0}, {"max_drop": 0.0}]


@pytest.mark.parametrize("n_candidates", [1, 7, 30_000])
@pytest.mark.parametrize("step", [1, -1, 0], ids=["best last", "best first", "in any order"])
def test_all_targets_at_once_get_what_each_gets_alone(n_candidates, step):
    problem = problem_of(50)
    targets = Targets.of(budgets=[0.1, 0.5, 0.9], drops=[0.0, 0.02])
    rng = np.random.default_rng(0)
    quality, cost = rng.integers(51, size=n_candidates) * 1.0, rng.integers(1, 5, size=n_candidates) * 10.0
    quality = np.sort(quality)[::step] if step else quality  # several equally good, far apart where in any order
    places, merits = targets.best(problem, quality, cost)
    for objective, place, merit in zip(targets.objectives(problem), places, merits, strict=True):
        alone = objective(quality, cost)
        assert (place, merit) == (np.argmax(alone), alone.max())
