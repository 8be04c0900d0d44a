"""The default search on data where what is right is known: budgets spent, noise not taken for skill, drops kept."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import norm

from adaptexit.core.frontier import evaluate
from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.search import search_thresholds
from adaptexit.core.search.methods import geometric_path
from adaptexit.core.search.problem import Problem
from adaptexit.core.search.spending import MOST_SEARCHED, _estimated, spend
from tests.core.test_search import random_outputs, with_useless_exits

BUDGETS = (0.45, 0.6, 0.75, 0.9)


def network(n_samples, seed, n_exits=3, exit_cost=0.0):
    """Exits right on 60 to 85% of the samples, the easy ones above all, whose errors and scores go together."""
    rng = np.random.default_rng(seed)
    ease, shared = rng.normal(size=(2, n_samples))
    level = norm.ppf(np.linspace(0.6, 0.85, n_exits))[:, None] * np.sqrt(3)
    evidence = ease + shared + rng.normal(size=(n_exits, n_samples))
    return ExitOutputs(
        scores=ease + 0.4 * shared + 0.3 * rng.normal(size=(n_exits, n_samples)),
        quality=level + evidence > 0,
        stage_costs=np.full(n_exits, 1 / n_exits),
        exit_costs=np.append(np.full(n_exits - 1, exit_cost), 0.0),
    )


def simple_rule(outputs, budgets):
    """A quantile of the score with two exits, the geometric rule with more: its dearest settings within the budgets."""
    problem = Problem.from_outputs(outputs)
    if problem.n_early == 1:
        policies = np.append(0, problem.ends[0])[:, None]
    else:
        policies = geometric_path(problem, (20 * np.geomspace(0.02, 200, 400)).tolist())
    cost = problem.costs(policies) / problem.n_samples
    best = [int(np.argmax(np.where(cost <= budget + 1e-9, cost, -np.inf))) for budget in budgets]
    return [evaluate(outputs, *setting) for setting in zip(*problem.thresholds(policies[best]), strict=True)]


def on(outputs, points):
    """Accuracy and cost of points on other outputs, (P, 2)."""
    again = (evaluate(outputs, point.thresholds, point.cutoffs) for point in points)
    return np.array([(point.accuracy, point.cost) for point in again])


def standard_error(values):
    return np.std(values, axis=0, ddof=1) / np.sqrt(len(values))


# -- what a sample is worth --------------------------------------------------------------------------------------------


def test_what_a_sample_is_worth_is_a_mixture_of_what_it_was_and_of_what_its_score_says():
    scores = np.array([[1.0, 2.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    outputs = ExitOutputs(scores=scores, quality=[[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]], costs=[0.5, 1.0])
    estimated = _estimated(outputs, Problem.from_outputs(outputs))
    counted = 4 / 5004
    expected = [counted * outputs.quality[0] + (1 - counted) * 0.5, outputs.quality[1]]  # its fit is flat at a half
    np.testing.assert_allclose(estimated.quality * estimated.quality_unit, expected, atol=1e-8)


# -- spent budgets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exit_cost", [0.0, 0.03], ids=["free", "exits cost"])
@pytest.mark.parametrize("n_exits", [2, 4, *(pytest.param(k, marks=pytest.mark.slow) for k in (3, 5))])
def test_points_leave_no_gap_in_cost(n_exits, exit_cost):
    for seed, n_samples in ((0, 1000), (1, 1000), (2, 2500)):
        frontier, _ = search_thresholds(network(n_samples, seed, n_exits, exit_cost))
        within = frontier.cost[frontier.cost <= 1]
        assert within[0] == pytest.approx(1 / n_exits + exit_cost)
        assert within[-1] == pytest.approx(1.0)
        assert np.diff(within).max() <= 0.011


@pytest.mark.parametrize("budget", [0.52, 0.7, 0.999])
def test_a_budget_is_spent_though_scores_tie_coarsely(budget):
    outputs = network(400, 0, 3)
    coarse = outputs.with_scores(np.round(outputs.scores))
    problem = Problem.from_outputs(coarse)
    (policy,) = spend(coarse, problem, [budget])
    # the next tie up at both exits is more than the budget allows
    fewer = [np.append(0, ends)[np.searchsorted(ends, end)] for end, ends in zip(policy, problem.ends, strict=True)]
    assert problem.costs(policy[None])[0] / 400 <= budget < problem.costs(np.array([fewer]))[0] / 400


def test_a_budget_below_every_set_but_the_cheapest_exit_is_kept():
    outputs = ExitOutputs(
        scores=[[1.0], [1.0], [1.0]], quality=[[0], [1], [1]], stage_costs=[8, 8, 48], exit_costs=[2, 8, 0]
    )
    problem = Problem.from_outputs(outputs)
    assert spend(outputs, problem, [10 / 64]).tolist() == [[1, 0]]


# -- the dearer of what cannot be told apart ---------------------------------------------------------------------------


def test_a_cheaper_point_is_taken_where_the_saver_is_clearly_better_on_some():
    rng = np.random.default_rng(0)
    score = rng.random(4000)
    saver, base = (score > 0.5) & (rng.random(4000) < 0.98), rng.random(4000) < 0.8
    outputs = ExitOutputs(scores=np.tile(score, (2, 1)), quality=[saver, base], costs=[0.2, 1.0])
    point = search_thresholds(outputs)[0].at(budget=1.0)
    assert point.accuracy > outputs.full_accuracy + 0.05
    assert point.cost < 0.75


@pytest.mark.parametrize("budget", [0.3, 0.7, 1.0])
def test_the_dearest_point_within_the_budget_is_taken_where_nothing_tells_them_apart(budget):
    rng = np.random.default_rng(1)
    for _ in range(5):
        right = rng.random((2, 200)) < 0.8  # the saver is as good as the base, which 200 samples cannot tell
        outputs = ExitOutputs(scores=rng.random((2, 200)), quality=right, costs=[0.2, 1.0])
        assert search_thresholds(outputs)[0].at(budget=budget).cost == pytest.approx(budget, abs=0.8 / 200 + 1e-9)


# -- a last exit without scores ----------------------------------------------------------------------------------------


def without_last_scores(outputs):
    return outputs.with_scores(np.concatenate([outputs.scores[:-1], np.zeros((1, outputs.n_samples))]))


def test_two_exits_need_no_scores_of_the_last():
    outputs = network(300, 0, n_exits=2)
    one, other = (search_thresholds(o)[0] for o in (outputs, without_last_scores(outputs)))
    assert [p.thresholds[0] for p in one.points] == [p.thresholds[0] for p in other.points]


def test_three_exits_do_as_well_without_scores_of_the_last():
    fresh = network(20_000, 100)
    for seed in range(3):
        outputs = network(1000, seed)
        with_scores, without = (
            on(fresh, [search_thresholds(o)[0].at(budget=budget) for budget in BUDGETS])
            for o in (outputs, without_last_scores(outputs))
        )
        np.testing.assert_allclose(without, with_scores, atol=0.012)
        assert np.abs(without[:, 1] - BUDGETS).max() < 0.04


# -- exits that cost something -----------------------------------------------------------------------------------------


def test_useless_exits_are_off_at_nearly_every_budget_though_there_are_too_many_to_try_all_sets():
    frontier, _ = search_thresholds(with_useless_exits(2000))
    assert len(frontier.points) > 50
    assert np.mean([point.on[[1, 3]].any() for point in frontier.points]) < 0.03
    assert frontier.at(budget=0.45).accuracy > 0.99


def test_useless_exits_are_off_at_every_budget_where_all_sets_are_tried():
    useless = with_useless_exits(2000)
    outputs = dataclasses.replace(
        useless,
        scores=useless.scores[2:],
        quality=useless.quality[2:],
        stage_costs=np.ones(4),
        exit_costs=useless.exit_costs[2:],
    )
    frontier, _ = search_thresholds(outputs)
    assert len(frontier.points) > 50
    assert not any(point.on[1] for point in frontier.points)


# -- many samples ------------------------------------------------------------------------------------------------------


def test_more_samples_than_are_searched_keep_their_budgets_counted_on_all_of_them():
    outputs = network(MOST_SEARCHED + 3000, 0, exit_cost=0.02)
    frontier, _ = search_thresholds(outputs, n_points=40, random_state=3)
    np.testing.assert_allclose(
        on(outputs, frontier.points), np.column_stack([frontier.accuracy, frontier.cost]), atol=1e-12
    )
    unspent = [point.params["budget"] - point.cost for point in frontier.points if point.params]
    assert len(unspent) > 20
    assert min(unspent) >= -1e-8
    assert max(unspent) <= 0.01


def test_the_draw_out_of_many_samples_is_set_by_its_seed():
    outputs = random_outputs(3, MOST_SEARCHED + 2000)

    def thresholds(seed):
        return [p.thresholds.tolist() for p in search_thresholds(outputs, n_points=8, random_state=seed)[0].points]

    assert thresholds(0) == thresholds(0)
    assert thresholds(0) != thresholds(1)


# -- on fresh samples --------------------------------------------------------------------------------------------------

N_DRAWS = 30


@pytest.mark.parametrize("n_exits", [2, 3])
def test_on_average_budgets_are_spent_on_fresh_samples_as_well_as_a_simple_rule_spends_them(n_exits):
    """Mean cost within 0.01 of every budget, mean accuracy no more than 0.3 points behind, with their errors."""
    fresh = network(20_000, 100, n_exits)
    budgets = [budget for budget in BUDGETS if budget > 1 / n_exits + 0.03]
    own, rule = [], []
    for seed in range(N_DRAWS):
        calibration = network(200, seed, n_exits)
        frontier, _ = search_thresholds(calibration)
        own.append(on(fresh, [frontier.at(budget=budget) for budget in budgets]))
        rule.append(on(fresh, simple_rule(calibration, budgets)))
    cost, ahead = np.array(own)[..., 1], (np.array(own) - rule)[..., 0]
    assert (np.abs(cost.mean(axis=0) - budgets) <= 0.01 + 2 * standard_error(cost)).all()
    assert (ahead.mean(axis=0) >= -0.003 - 2 * standard_error(ahead)).all()
    assert (2 * standard_error(ahead) < 0.003).all()


@pytest.mark.parametrize("n_exits", [2, 3])
def test_on_average_an_allowed_drop_is_kept_on_fresh_samples(n_exits):
    """Mean loss at most 0.05 points beyond the allowed, with two standard errors, at less than the full cost."""
    fresh = network(20_000, 100, n_exits)
    drops = np.array([0.0, 0.01])
    chosen = []
    for seed in range(N_DRAWS):
        frontier, _ = search_thresholds(network(500, seed, n_exits))
        chosen.append(on(fresh, [frontier.at(max_drop=drop) for drop in drops]))
    accuracy, cost = np.moveaxis(chosen, 2, 0)
    beyond = fresh.full_accuracy - accuracy - drops
    assert (beyond.mean(axis=0) <= 0.0005 + 2 * standard_error(beyond)).all()
    assert cost[:, 1].mean() < 0.99
