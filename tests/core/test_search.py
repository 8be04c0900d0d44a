import threading
from typing import get_args

import joblib
import numpy as np
import pytest

from adaptexit.core.outputs import ExitOutputs
from adaptexit.core.search import (
    SEARCH_NAMES,
    SEARCHES,
    SearchName,
    SearchReport,
    _bagged,
    _kept_drops,
    choose_search,
    search_thresholds,
    targets_for,
)
from adaptexit.core.search.methods import _drop_exits, coord, exact, geometric_path
from adaptexit.core.search.problem import Problem
from adaptexit.core.search.targets import Targets, Weighted
from tests.properties.strategies import at_its_word


def random_outputs(n_exits, n_samples, seed=0, exit_costs=None, stage_costs=None, scores=None):
    """Exits that are righter the deeper they are, and righter where they are surer."""
    rng = np.random.default_rng(seed)
    ease = rng.random(n_samples)
    skill = np.linspace(0.5, 0.9, n_exits)[:, None]
    noisy = ease + 0.2 * rng.normal(size=(n_exits, n_samples))
    return ExitOutputs(
        scores=noisy if scores is None else scores,
        quality=rng.random((n_exits, n_samples)) < np.clip(skill + 0.5 * (ease - 0.5), 0, 1),
        stage_costs=np.ones(n_exits) if stage_costs is None else stage_costs,
        exit_costs=np.zeros(n_exits) if exit_costs is None else exit_costs,
    )


# -- what is chosen ----------------------------------------------------------------------------------------------------


def test_auto_is_the_smoothed_search_and_says_how_far_it_trusts_the_data():
    assert choose_search("auto", 2, 7) == SearchReport(
        "smoothed", False, "one early exit: as many of the surest samples leave as a budget needs"
    )
    few, many = (choose_search("auto", 3, n) for n in (1000, 50_000))
    assert few.reason == "1000 samples: qualities are 17% counted, policies 25% the geometric rule's"
    assert many.reason.startswith("searched on 10000 of 50000 samples: qualities are 67% counted, policies 1%")
    assert choose_search("smoothed", 3, 1000) == few


def test_the_names_of_the_searches_are_written_once():
    assert get_args(SearchName) == ("auto", "smoothed", *SEARCHES) == SEARCH_NAMES


def test_auto_takes_what_it_reports():
    outputs = random_outputs(3, 100)
    by_auto, report = search_thresholds(outputs, n_points=5)
    assert report == choose_search("auto", 3, 100)
    smoothed, _ = search_thresholds(outputs, "smoothed", n_points=5)
    assert [p.thresholds.tolist() for p in smoothed.points] == [p.thresholds.tolist() for p in by_auto.points]


@pytest.mark.parametrize(("search", "bagged"), [("coord", True), ("shared", False), ("geometric", False)])
def test_a_search_asked_for_is_taken_and_bagged_where_samples_are_few(search, bagged):
    _, report = search_thresholds(random_outputs(4, 50), search, n_points=2)
    assert report == SearchReport(search, bagged, "asked for")


def test_coord_is_not_bagged_where_samples_are_many():
    _, report = search_thresholds(random_outputs(2, 2000), "coord", n_points=2)
    assert report == SearchReport("coord", False, "asked for")


def test_exact_refuses_more_than_three_exits():
    with pytest.raises(ValueError, match=r"search='exact' needs at most 3 exits; got 4\. Use 'coord'"):
        search_thresholds(random_outputs(4, 50), "exact")


# -- targets -----------------------------------------------------------------------------------------------------------


def test_targets_span_the_cheapest_policy_to_the_full_model_and_hold_what_was_asked_for():
    targets = targets_for(Problem.from_outputs(random_outputs(4, 50)), 7, drops=[0.02], budgets=[0.37])
    assert targets.budgets[0] == 0.25
    assert 0.37 in targets.budgets
    assert targets.budgets[-1] == 1.0
    assert len(targets.budgets) >= 8
    assert targets.drops.tolist() == [0.0, 0.001, 0.005, 0.01, 0.02]
    assert len(targets) == len(targets.budgets) + 5


def test_budgets_asked_for_as_well_never_make_the_frontier_worse():
    outputs = random_outputs(3, 80)
    few, _ = search_thresholds(outputs, "exact", n_points=3)
    many, _ = search_thresholds(outputs, "exact", n_points=60, budgets=few.cost)
    assert len(many.points) > len(few.points)
    for point in few.points:
        assert many.at(budget=point.cost).accuracy >= point.accuracy


def test_a_budget_asked_for_gets_its_own_point():
    outputs = random_outputs(3, 80)
    without, _ = search_thresholds(outputs, "exact", n_points=2)
    with_it, _ = search_thresholds(outputs, "exact", n_points=2, budgets=[0.55])
    assert with_it.at(budget=0.55).accuracy > without.at(budget=0.55).accuracy


# -- bagging -----------------------------------------------------------------------------------------------------------


def test_bagging_is_set_by_its_seed():
    outputs = random_outputs(3, 700)

    def thresholds(seed):
        frontier, report = search_thresholds(outputs, "coord", n_points=6, random_state=seed)
        assert report.bagged
        return [point.thresholds.tolist() for point in frontier.points]

    assert thresholds(0) == thresholds(0)
    assert thresholds(0) != thresholds(1)


def test_bagging_in_parallel_gives_the_same_thresholds():
    outputs = random_outputs(3, 700, exit_costs=[0.2, 0.3, 0.5])

    def points(n_jobs):
        with joblib.parallel_config(backend="threading", n_jobs=n_jobs):
            frontier, report = search_thresholds(outputs, "coord", n_points=6)
        assert report.bagged
        return [(p.thresholds.tolist(), p.cutoffs.tolist(), p.accuracy, p.cost, p.params) for p in frontier.points]

    assert points(1) == points(2)


def test_bootstrap_samples_are_searched_by_as_many_threads_as_joblib_is_told():
    outputs = random_outputs(3, 8)
    both = threading.Barrier(2, timeout=30)

    def search(*_):
        both.wait()  # passes only where two are searched at the same time
        return np.array([[8, 2]])

    with joblib.parallel_config(backend="threading", n_jobs=2):
        policies = _bagged(outputs, Problem.from_outputs(outputs), search, Targets.of(budgets=[1.0]), 0)
    assert policies.tolist() == [[8, 2]]


def test_bagging_leaves_the_global_random_state_alone():
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    search_thresholds(random_outputs(3, 60), "coord", n_points=2)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_bagging_averages_positions_of_the_exits_that_most_samples_switch_on():
    outputs = random_outputs(3, 8, exit_costs=[1.0, 1.0, 0.0])
    target = Targets.of(budgets=[1.0])
    runs = iter([[8, 2]] * 6 + [[4, 0]] * 4)
    policies = _bagged(outputs, Problem.from_outputs(outputs), lambda *_: np.array([next(runs)]), target, 0)
    assert policies.tolist() == [[6, 2]]
    runs = iter([[0, 2]] * 5 + [[4, 4]] * 5)
    policies = _bagged(outputs, Problem.from_outputs(outputs), lambda *_: np.array([next(runs)]), target, 0)
    assert policies.tolist() == [[0, 3]]


def test_bagging_free_exits_averages_over_all_bootstrap_samples():
    outputs = random_outputs(3, 8)
    target = Targets.of(budgets=[1.0])
    runs = iter([[8, 2]] * 5 + [[4, 0]] * 5)
    policies = _bagged(outputs, Problem.from_outputs(outputs), lambda *_: np.array([next(runs)]), target, 0)
    assert policies.tolist() == [[6, 1]]


# -- small and flat cases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", SEARCH_NAMES)
def test_one_exit_is_the_plain_model(search):
    outputs = random_outputs(1, 20)
    frontier, _ = search_thresholds(outputs, search)
    assert len(frontier.points) == 1
    assert frontier.points[0].thresholds.tolist() == [-np.inf]
    assert (frontier.points[0].accuracy, frontier.points[0].cost) == (outputs.full_accuracy, 1.0)


@pytest.mark.parametrize("search", SEARCH_NAMES)
def test_one_sample_is_enough(search):
    outputs = random_outputs(3, 1)
    frontier, _ = search_thresholds(outputs, search, n_points=5)
    assert all(sorted(point.exit_rates) == [0.0, 0.0, 1.0] for point in frontier.points)
    assert frontier.cost.max() <= 1.0 + 1e-12


@pytest.mark.parametrize("search", SEARCH_NAMES)
def test_constant_scores_send_everybody_the_same_way(search):
    outputs = random_outputs(3, 40, scores=np.full((3, 40), 0.7))
    frontier, _ = search_thresholds(outputs, search, n_points=10)
    assert all(sorted(point.exit_rates) == [0.0, 0.0, 1.0] for point in frontier.points)
    assert frontier.cost.min() == pytest.approx(1 / 3)
    assert frontier.at(budget=1 / 3).exit_rates.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("search", SEARCH_NAMES)
def test_equal_scores_leave_together(search):
    scores = np.repeat([[3.0, 2.0, 1.0]], 20, axis=1).repeat(3, axis=0)
    outputs = random_outputs(3, 60, scores=scores)
    frontier, _ = search_thresholds(outputs, search, n_points=30)
    assert {round(rate * 3, 9) for point in frontier.points for rate in point.exit_rates} <= {0, 1, 2, 3}
    assert len(frontier.points) > 2


def test_qualities_on_a_large_scale_are_reported_without_rounding():
    rng = np.random.default_rng(0)
    quality = np.repeat(1e6 * rng.random((1, 30)), 3, axis=0)
    quality[:2] -= 5 * (rng.random((2, 30)) < 0.3)
    outputs = ExitOutputs(scores=rng.random((3, 30)), quality=quality, costs=[1, 2, 3])
    frontier, _ = search_thresholds(outputs, "exact", n_points=5)
    assert frontier.accuracy.tolist() == frontier.on(outputs).accuracy.tolist()
    assert frontier.at(max_drop=0.0).accuracy >= outputs.full_accuracy


# -- exits that cost something -----------------------------------------------------------------------------------------


def with_useless_exits(n_samples=200):
    """Six exits of which two are always wrong and dear, and the others are good where they are sure."""
    rng = np.random.default_rng(3)
    scores = rng.random((6, n_samples))
    quality = np.ones((6, n_samples))
    for k in (0, 2, 4):
        quality[k] = scores[k] > 0.4
    quality[[1, 3]] = 0
    return ExitOutputs(
        scores=scores, quality=quality, stage_costs=np.ones(6), exit_costs=[0.1, 2.0, 0.1, 2.0, 0.1, 1.0]
    )


@pytest.mark.parametrize("search", ["auto", "coord", "shared", "geometric"])
def test_exits_that_do_not_earn_their_cost_are_switched_off(search):
    frontier = at_its_word(search_thresholds(with_useless_exits(), search, n_points=6)[0])
    lossless = frontier.at(max_drop=0.0)
    assert not lossless.on[[1, 3]].any()
    assert lossless.on[0]
    assert lossless.cost < 0.6


def test_nobody_ever_runs_an_exit_that_is_always_wrong():
    frontier, _ = search_thresholds(with_useless_exits(), "coord", n_points=6)
    for point in frontier.points:
        arriving = 1 - np.append(0.0, np.cumsum(point.exit_rates)[:-1])
        assert not (point.on & (arriving > 1e-9))[[1, 3]].any()


def test_an_exit_is_dropped_when_another_can_take_over_its_samples():
    # Exit 0 serves 30 samples. Exit 1 could serve them too, but ranks one that it gets wrong (90) before them: while
    # exit 0 is on, exit 1 stops short of it, and only with exit 0 off and one more error it goes on to 91.
    n = np.arange(100)
    order = np.concatenate([n[30:90], [90], n[:30], n[91:]])
    second = np.empty(100)
    second[order] = -np.searchsorted([60, 61, 91], n, side="right")
    wrong = np.zeros(100)
    outputs = ExitOutputs(
        scores=np.stack([n < 30, second, wrong, wrong, wrong]),
        quality=np.stack([n < 30, n < 90, wrong, wrong, wrong + 1]),
        stage_costs=np.zeros(5),
        exit_costs=[6.0, 10.0, 5.0, 5.0, 100.0],
    )
    problem, objective = Problem.from_outputs(outputs), Weighted(0.8)
    start, _ = problem.settle(np.array([30, 60, 0, 0]), objective)
    assert start.tolist() == [30, 60, 0, 0]
    policy = _drop_exits(problem, start, objective)
    assert policy.tolist() == [0, 91, 0, 0]
    assert np.concatenate(problem.values(policy[None])) == pytest.approx([99.0, 19.0])
    assert coord(problem, Targets.of(drops=[0.01])).tolist() == [policy.tolist()]


def test_a_middle_exit_is_kept_when_it_is_cheap_and_dropped_when_it_is_dear():
    rng = np.random.default_rng(0)
    scores = rng.random((3, 60))
    quality = np.ones((3, 60))
    quality[0], quality[1] = scores[0] > 0.7, scores[1] > 0.2
    answers = {"scores": scores, "quality": quality, "stage_costs": np.zeros(3)}
    cheap, _ = search_thresholds(ExitOutputs(**answers, exit_costs=[1.0, 2.0, 20.0]), "exact")
    dear, _ = search_thresholds(ExitOutputs(**answers, exit_costs=[1.0, 19.0, 20.0]), "exact")
    assert at_its_word(cheap).at(max_drop=0.0).on[1]
    assert at_its_word(dear).at(max_drop=0.0).on.tolist() == [True, False, True]


@pytest.mark.parametrize("exit_costs", [[0.0, 0.0, 0.0], [0.05, 0.1, 0.0]])
def test_exact_spends_nothing_that_earns_nothing_with_three_exits(exit_costs):
    budgets = np.linspace(0.4, 1.0, 13).tolist()
    outputs = random_outputs(3, 60, seed=3, exit_costs=exit_costs)
    problem = Problem.from_outputs(outputs)
    pairs = np.array([[i, j] for i in [0, *problem.ends[0]] for j in [0, *problem.ends[1]]])
    quality, cost = problem.values(pairs)
    frontier = at_its_word(search_thresholds(outputs, "exact", n_points=1, budgets=budgets)[0])
    for budget in budgets:
        point = frontier.at(budget=budget)
        as_accurate = quality >= point.accuracy * outputs.n_samples - 1e-6
        assert point.cost * outputs.n_samples == pytest.approx(cost[as_accurate].min(), abs=1e-9)


def test_when_no_exit_pays_only_the_plain_full_model_keeps_its_accuracy():
    outputs = ExitOutputs(
        scores=np.arange(10.0).reshape(2, 5), quality=[[0] * 5, [1] * 5], stage_costs=[0, 0], exit_costs=[5, 10]
    )
    frontier, _ = search_thresholds(outputs)
    assert frontier.at(max_drop=0.0).on.tolist() == [False, True]
    assert frontier.at(max_drop=0.0).cost == 1.0
    assert frontier.at(budget=1.5).cost == 1.0


def test_exits_dearer_than_the_full_model_are_never_on():
    outputs = random_outputs(3, 50, exit_costs=[9.0, 9.0, 0.0])
    for search in SEARCHES:
        frontier, _ = search_thresholds(outputs, search, n_points=5)
        assert [point.on.tolist() for point in frontier.points] == [[False, False, True]]


# -- published rule ----------------------------------------------------------------------------------------------------


def problem_of(scores):
    scores = np.array(scores, dtype=float)
    return Problem.from_outputs(
        ExitOutputs(scores=scores, quality=np.ones_like(scores), costs=np.arange(1, len(scores) + 1))
    )


def test_geometric_takes_quotas_among_those_left():
    # p = 20: thirds; at the second exit samples 0 and 1 have left, so the surest two others are 5 and 2
    problem = problem_of([[6, 5, 4, 3, 2, 1], [6, 5, 3, 1, 2, 4], [0] * 6])
    assert geometric_path(problem)[19].tolist() == [2, 4]
    assert problem.outcomes(np.array([[2, 4]]))[1].tolist() == [[2, 2, 2]]


def test_geometric_lets_all_leave_where_fewer_are_left_than_the_quota():
    # five of six tie at the first exit and leave together: one is left for the second exit's quota of two
    problem = problem_of([[2, 2, 2, 2, 2, 1], [1, 2, 3, 4, 5, 6], [0] * 6])
    policies = geometric_path(problem)[19:20]
    assert problem.outcomes(policies)[1].tolist() == [[5, 1, 0]]


def test_geometric_switches_off_an_exit_without_a_quota():
    problem = problem_of([[6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1], [0] * 6])
    assert geometric_path(problem)[0].tolist() == [5, 0]


# -- against each other ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exit_costs", [None, [0.2, 0.4, 0.5]])
def test_coord_comes_near_the_exact_optimum_with_three_exits(exit_costs):
    outputs = random_outputs(3, 300, exit_costs=exit_costs)
    problem = Problem.from_outputs(outputs)
    targets = targets_for(problem, 15, (), ())
    best, near = (problem.values(search(problem, targets)) for search in (exact, coord))
    budgets, drops = np.split(np.arange(len(targets)), [len(targets.budgets)])
    assert (near[0] <= best[0] + 1e-9)[budgets].all()
    assert (near[0] >= best[0] - 0.02 * 300)[budgets].all()
    assert (near[1] <= best[1] + 0.02 * 300)[drops].all()


def test_an_average_that_loses_accuracy_is_mended_where_none_may_be_lost():
    # the saver is right on its 6 surest samples only; averaged positions let 8 leave
    right = np.array([[1] * 6 + [0] * 4, [1] * 10], dtype=bool)
    outputs = ExitOutputs(
        scores=np.tile(np.arange(10, 0, -1.0), (2, 1)), quality=right, stage_costs=[0, 0], exit_costs=[1, 10]
    )
    problem = Problem.from_outputs(outputs)
    policies = _kept_drops(problem, Targets.of(budgets=[0.5], drops=[0.0]), np.array([[9], [8]]))
    assert policies.tolist() == [[9], [6]]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_bagged_thresholds_of_three_models_still_save_where_no_accuracy_may_be_lost(seed):
    rng = np.random.default_rng(seed)
    ease = rng.random(700)
    right = (rng.random((3, 700)) < np.array([[0.5], [0.7], [0.8]])) | (ease > 0.4)  # the easy 60% are right anyway
    outputs = ExitOutputs(scores=np.tile(ease, (3, 1)), quality=right, stage_costs=[0, 0, 0], exit_costs=[1, 4, 12])
    frontier, report = search_thresholds(outputs, "coord")
    assert report.bagged
    lossless = at_its_word(frontier).at(max_drop=0.0)
    assert lossless.accuracy >= outputs.full_accuracy
    assert lossless.cost < 0.75
