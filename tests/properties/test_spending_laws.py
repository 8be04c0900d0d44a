"""Of the default search: what holds whatever the outputs are."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from adaptexit.core.routing import exit_index
from adaptexit.core.search import search_thresholds
from adaptexit.core.search.problem import Problem
from adaptexit.core.search.spending import cheapest, spend
from tests.properties.strategies import exit_outputs, increasing_maps, large_outputs, permutations_of

few_or_many = exit_outputs(min_exits=2, max_samples=12) | large_outputs(max_exits=5)
two_exits = exit_outputs(min_exits=2, max_exits=2, max_samples=12) | large_outputs(max_exits=2)
shares = st.lists(st.floats(0, 1), min_size=1, max_size=4)


def spent(outputs, shares):
    """Budgets between the cheapest policy's cost and 1, the policies for them, and what these cost; None where the
    cheapest exit is dearer than the full model."""
    problem = Problem.from_outputs(outputs)
    least = float(problem.costs(cheapest(problem))[0]) / problem.n_samples
    if least > 1:
        return None
    budgets = np.sort(least + (1 - least) * np.array(shares))
    policies = spend(outputs, problem, budgets.tolist())
    return budgets, policies, problem.costs(policies) / problem.n_samples


def same_exits(one, outputs, other, image):
    """Whether two frontiers send every sample of their outputs the same way, point by point."""
    assert len(one.points) == len(other.points)
    for before, after in zip(one.points, other.points, strict=True):
        assert exit_index(outputs, before.cutoffs).tolist() == exit_index(image, after.cutoffs).tolist()


@given(few_or_many, shares)
def test_every_policy_is_within_its_budget(outputs, shares):
    if (run := spent(outputs, shares)) is not None:
        budgets, _, cost = run
        assert (cost <= budgets + 1e-8).all()


@given(few_or_many, shares)
def test_every_position_is_a_tie_end(outputs, shares):
    if (run := spent(outputs, shares)) is not None:
        for k, ends in enumerate(Problem.from_outputs(outputs).ends):
            assert set(run[1][:, k]) <= {0, *ends}


@given(two_exits, shares)
def test_with_two_exits_as_few_leave_as_the_budget_needs(outputs, shares):
    if (run := spent(outputs, shares)) is not None:
        budgets, _, cost = run
        (ends,) = Problem.from_outputs(outputs).ends
        first, full = outputs.path_costs(np.array([True, True])) / outputs.full_cost
        prefixes = full - (full - first) * ends / outputs.n_samples
        for budget, own in zip(budgets, cost, strict=True):
            within = prefixes <= budget + 1e-9
            if budget < 1 - 1e-9 and within.any():
                assert abs(own - prefixes[within].max()) < 1e-8


@given(exit_outputs(min_exits=1, max_samples=12))
def test_the_plain_full_model_and_the_cheapest_exit_for_everybody_are_points(outputs):
    frontier, _ = search_thresholds(outputs, n_points=4)
    assert any(not point.on[:-1].any() for point in frontier.points)
    assert abs(frontier.cost.min() - frontier.fixed_cost.min()) < 1e-8


@given(few_or_many, st.data())
def test_an_increasing_map_of_the_scores_changes_no_exit(outputs, data):
    image = outputs.with_scores(np.stack([data.draw(increasing_maps())(row) for row in outputs.scores]))
    one, other = (search_thresholds(o, n_points=5)[0] for o in (outputs, image))
    same_exits(one, outputs, other, image)


@given(few_or_many, st.data())
def test_permuting_the_samples_changes_no_threshold(outputs, data):
    shuffled = outputs.take(data.draw(permutations_of(outputs.n_samples)))
    one, other = (search_thresholds(o, n_points=5)[0] for o in (outputs, shuffled))
    assert [p.thresholds.tolist() for p in one.points] == [p.thresholds.tolist() for p in other.points]
