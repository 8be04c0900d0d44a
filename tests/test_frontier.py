import numpy as np
import pytest

from adaptexit.core.frontier import ParetoFrontier, evaluate, not_dominated, reference
from adaptexit.core.outputs import ExitOutputs

INF = np.inf


@pytest.fixture
def outputs():
    """Relative costs of leaving: 0.25 at the first exit, 0.5 at the second."""
    return ExitOutputs(
        scores=np.array([[4, 3, 2, 1], [4, 3, 2, 1], [0, 0, 0, 0]]),
        quality=np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]),
        costs=[1.0, 2.0, 4.0],
    )


@pytest.fixture
def frontier(outputs):
    settings = [[-INF, INF, -INF], [INF, -INF, -INF], [INF, 2.0, -INF], [INF, INF, -INF]]
    points = [evaluate(outputs, np.array(t), np.array(t), {"knob": i}) for i, t in enumerate(settings)]
    return ParetoFrontier(points, *reference(outputs))


def test_accuracy_and_cost_are_those_of_the_points(frontier):
    assert frontier.accuracy.tolist() == [0.25, 0.5, 0.75, 0.75]
    assert frontier.cost.tolist() == [0.25, 0.5, 0.75, 1.0]


def test_reference_is_the_full_model_and_every_exit_alone(frontier):
    assert frontier.full_accuracy == 0.75
    assert frontier.fixed_accuracy.tolist() == [0.25, 0.5, 0.75]
    assert frontier.fixed_cost.tolist() == [0.25, 0.5, 1.0]
    assert frontier.n_samples == 4


@pytest.mark.parametrize(("budget", "index"), [(0.25, 0), (0.49, 0), (0.5, 1), (0.75, 2), (1.0, 2), (9.0, 2)])
def test_a_budget_gets_the_most_accurate_point_within_it_and_of_equals_the_cheapest(frontier, budget, index):
    assert frontier.index_at(budget=budget) == index
    assert frontier.at(budget=budget) is frontier.points[index]


@pytest.mark.parametrize(("drop", "index"), [(0.0, 2), (0.24, 2), (0.25, 1), (0.5, 0), (1.0, 0)])
def test_a_drop_gets_the_cheapest_point_that_keeps_it(frontier, drop, index):
    assert frontier.index_at(max_drop=drop) == index


def test_a_budget_computed_to_a_rounding_error_still_fits(frontier):
    assert frontier.index_at(budget=0.5 - 1e-12) == 1


def test_a_drop_computed_to_a_rounding_error_still_fits(frontier):
    assert frontier.index_at(max_drop=0.25 - 1e-12) == 1


def test_a_budget_below_the_cheapest_point_names_it(frontier):
    with pytest.raises(ValueError, match=r"budget must be at least 0\.25, the relative cost of the cheapest.*got 0\.2"):
        frontier.at(budget=0.2)


@pytest.mark.parametrize("budget", [INF, np.nan])
def test_a_budget_that_is_no_number_is_refused(frontier, budget):
    with pytest.raises(ValueError, match="budget must be a finite relative cost"):
        frontier.at(budget=budget)


@pytest.mark.parametrize("drop", [-0.1, INF, np.nan])
def test_a_drop_that_is_no_share_is_refused(frontier, drop):
    with pytest.raises(ValueError, match="max_drop must be a share of accuracy, at least 0"):
        frontier.at(max_drop=drop)


@pytest.mark.parametrize("asked", [{}, {"budget": 0.5, "max_drop": 0.1}])
def test_exactly_one_of_budget_and_drop_is_asked_for(frontier, asked):
    with pytest.raises(ValueError, match="give exactly one of budget and max_drop"):
        frontier.at(**asked)


def test_on_other_data_every_point_is_kept_in_its_order(frontier, outputs):
    worst_first = outputs.take(np.array([3, 3, 2]))
    elsewhere = frontier.on(worst_first)
    assert elsewhere.accuracy == pytest.approx([0.0, 0.0, 1 / 3, 1 / 3])
    assert elsewhere.cost == pytest.approx([0.25, 0.5, 1.0, 1.0])
    assert elsewhere.full_accuracy == pytest.approx(1 / 3)
    assert elsewhere.n_samples == 3
    assert [p.params for p in elsewhere.points] == [p.params for p in frontier.points]


def test_on_other_data_the_calibrated_point_is_chosen_even_where_another_is_better_there(frontier, outputs):
    elsewhere = frontier.on(outputs.take(np.array([3, 3, 2])))
    assert elsewhere.chosen_on is frontier
    assert elsewhere.index_at(max_drop=0.0) == 2
    assert elsewhere.index_at(budget=0.75) == 2
    with pytest.raises(ValueError, match=r"budget must be at least 0\.25"):
        elsewhere.at(budget=0.2)


def test_data_evaluated_twice_still_choose_by_the_calibrated_frontier(frontier, outputs):
    twice = frontier.on(outputs.take(np.array([3]))).on(outputs.take(np.array([0])))
    assert twice.chosen_on is frontier
    assert twice.index_at(budget=0.5) == 1


def test_the_table_has_a_row_a_point_with_its_params(frontier):
    table = frontier.to_frame()
    assert list(table.columns) == ["accuracy", "cost", "exit_rate_0", "exit_rate_1", "exit_rate_2", "knob"]
    assert table["accuracy"].tolist() == frontier.accuracy.tolist()
    assert table["cost"].tolist() == frontier.cost.tolist()
    assert table["exit_rate_1"].tolist() == [0.0, 1.0, 0.5, 0.0]
    assert table["knob"].tolist() == [0, 1, 2, 3]


def test_repr_gives_the_ranges(frontier):
    expected = "ParetoFrontier(4 points, relative cost 0.250 to 1.000, accuracy 0.2500 to 0.7500, full model 0.7500)"
    assert repr(frontier) == expected


def test_of_equal_points_the_first_is_kept():
    assert not_dominated([0.5, 0.5, 0.4, 0.6], [1.0, 1.0, 0.5, 2.0]).tolist() == [2, 0, 3]


def test_differences_below_rounding_do_not_make_a_point():
    assert not_dominated([0.5, 0.5 + 1e-12], [1.0, 2.0]).tolist() == [0]
