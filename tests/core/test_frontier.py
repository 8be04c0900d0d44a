import dataclasses
import math

import numpy as np
import pytest

from adaptexit.core.frontier import OperatingPoint, ParetoFrontier, evaluate, not_dominated
from adaptexit.core.outputs import ExitOutputs
from tests.properties.strategies import at_its_word, frontier_through

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
    return at_its_word(ParetoFrontier.of(points, outputs))


def test_accuracy_and_cost_are_those_of_the_points(frontier):
    assert frontier.accuracy.tolist() == [0.25, 0.5, 0.75, 0.75]
    assert frontier.cost.tolist() == [0.25, 0.5, 0.75, 1.0]


def test_reference_is_the_full_model_and_every_exit_alone(frontier):
    assert frontier.full_accuracy == 0.75
    assert frontier.fixed_accuracy.tolist() == [0.25, 0.5, 0.75]
    assert frontier.fixed_cost.tolist() == [0.25, 0.5, 1.0]
    assert frontier.n_samples == 4


def test_points_stand_in_rising_cost_and_of_equals_in_rising_accuracy(frontier, outputs):
    shuffled = [frontier.points[i] for i in (3, 1, 0, 2)]
    again = ParetoFrontier.of(iter(shuffled), outputs)
    assert again.points == frontier.points
    worse = evaluate(outputs.take(np.array([3])), frontier.points[1].thresholds, frontier.points[1].cutoffs)
    assert (worse.cost, worse.accuracy) == (0.5, 0.0)
    assert ParetoFrontier.of([*frontier.points, worse], outputs).points.index(worse) == 1


def test_points_on_other_data_stand_in_the_order_of_the_frontier_they_were_chosen_on(frontier, outputs):
    reversed_points = frontier.points[::-1]
    elsewhere = ParetoFrontier.of(reversed_points, outputs, chosen_on=frontier)
    assert elsewhere.points == reversed_points
    assert elsewhere.chosen_on is frontier


def test_a_point_is_found_by_what_it_is_not_by_what_it_looks_like(frontier):
    assert [frontier.index(point) for point in frontier.points] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="point must be one of the frontier's own points"):
        frontier.index(dataclasses.replace(frontier.points[0]))


@pytest.mark.parametrize(("budget", "index"), [(0.25, 0), (0.49, 0), (0.5, 1), (0.75, 2), (1.0, 2), (2.0, 2)])
def test_a_budget_gets_the_most_accurate_point_within_it_and_of_equals_the_cheapest(frontier, budget, index):
    assert frontier.index_at(budget=budget) == index
    assert frontier.at(budget=budget) is frontier.points[index]


@pytest.mark.parametrize(("drop", "index"), [(0.0, 2), (0.24, 2), (0.25, 1), (0.5, 0), (1.0, 0)])
def test_a_drop_gets_the_cheapest_point_that_keeps_it(frontier, drop, index):
    assert frontier.index_at(max_drop=drop) == index


# -- choosing on noisy accuracies --------------------------------------------------------------------------------------


def noisy(accuracy, cost, drop_se, n_samples=10**6, plain=(0.9, 1.0)):
    """A frontier of points with errors, and the plain full model, whose own error is nothing."""
    on, off = np.array([0.5, -INF]), np.array([INF, -INF])
    points = [
        OperatingPoint(a, c, np.array([0.5, 0.5]), on, on, drop_se=se)
        for a, c, se in zip(accuracy, cost, drop_se, strict=True)
    ]
    points.append(OperatingPoint(*plain, np.array([0.0, 1.0]), off, off))
    return ParetoFrontier(points, plain[0], np.array([0.5, plain[0]]), np.array([0.1, 1.0]), n_samples)


def test_of_points_that_cannot_be_told_apart_a_budget_gets_the_dearest():
    frontier = noisy([0.89, 0.885], [0.4, 0.5], [0.003, 0.003])
    assert frontier.beaten.tolist() == [False, False, False]
    assert frontier.at(budget=0.6).cost == 0.5


def test_a_point_that_a_cheaper_one_beats_beyond_their_noise_is_passed_over():
    apart = 3 * math.hypot(0.003, 0.003)
    frontier = noisy([0.89, 0.89 - 1.01 * apart], [0.4, 0.5], [0.003, 0.003])
    assert frontier.beaten.tolist() == [False, True, False]
    assert frontier.at(budget=0.6).cost == 0.4
    assert not noisy([0.89, 0.89 - 0.99 * apart], [0.4, 0.5], [0.003, 0.003]).beaten.any()


def test_a_dearer_point_beats_nobody():
    assert not noisy([0.5, 0.8], [0.4, 0.5], [0.001, 0.001]).beaten.any()


def test_the_plain_model_is_passed_over_where_exits_are_better_beyond_noise():
    frontier = noisy([0.95], [0.4], [0.01])
    assert frontier.at(budget=1.0).cost == 0.4
    assert noisy([0.92], [0.4], [0.01]).at(budget=1.0).cost == 1.0


def test_a_drop_is_kept_by_a_margin_of_its_error():
    loss = 0.01
    for drop, cost in ((loss + 0.6 * 0.002 - 2e-4, 0.4), (loss + 0.6 * 0.002 - 4e-4, 1.0)):
        assert noisy([0.9 - loss], [0.4], [0.002]).at(max_drop=drop).cost == cost


def test_the_margin_is_wider_on_few_samples():
    for n_samples, margins in ((500, 1.0), (250, 1.0), (1000, 0.8), (10**9, 0.6)):
        just = noisy([0.89], [0.4], [0.004], n_samples)
        assert just.at(max_drop=0.01 + margins * 0.004 - 2.9e-4).cost == 0.4
        assert just.at(max_drop=0.01 + margins * 0.004 - 3.1e-4).cost == 1.0


def test_the_plain_model_keeps_every_drop():
    assert noisy([0.9], [0.4], [0.01]).at(max_drop=0.0).cost == 1.0


def test_without_the_plain_model_the_safest_point_serves_a_drop_that_none_keeps():
    frontier = noisy([0.8, 0.85], [0.4, 0.5], [0.01, 0.01])
    without = dataclasses.replace(frontier, points=frontier.points[:2])
    assert without.at(max_drop=0.0).cost == 0.5


# -- refusals and other data -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("budget", "question"),
    [
        (40, r"got 40\. Was 0\.4 meant\?"),
        (2.5, r"got 2\.5\. Was 0\.025 meant\?"),
        (1.8e9, r"got 1\.8e\+09\. Divide a cost by the full model's"),
    ],
)
def test_a_percentage_or_an_absolute_cost_is_asked_about(frontier, budget, question):
    allowed = r"budget must be a relative cost, at most 2: 1 is the plain full model; "
    with pytest.raises(ValueError, match=allowed + question):
        frontier.at(budget=budget)


def test_a_budget_may_be_as_large_as_the_dearest_point(outputs):
    dear = outputs.with_costs(outputs.stage_costs, [0.0, 10.0, 0.0])
    runs_all = np.array([4.0, 4.0, -INF])
    frontier = ParetoFrontier.of([evaluate(dear, runs_all, runs_all)], dear)
    assert frontier.cost.tolist() == [3.5]
    assert frontier.index_at(budget=3.5) == 0
    with pytest.raises(ValueError, match=r"at most 3\.5.*got 3\.6"):
        frontier.at(budget=3.6)


@pytest.mark.parametrize("drop", [-0.1, INF, np.nan])
def test_a_drop_that_is_no_share_is_refused(frontier, drop):
    with pytest.raises(ValueError, match="max_drop must be a share of accuracy, at least 0"):
        frontier.at(max_drop=drop)


@pytest.mark.parametrize("choices", [{}, {"budget": 0.5, "max_drop": 0.1}])
def test_exactly_one_of_budget_and_drop_is_asked_for(frontier, choices):
    with pytest.raises(ValueError, match="give exactly one of budget and max_drop"):
        frontier.at(**choices)


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
    errors = ["accuracy", "accuracy_se", "cost", "cost_se", "drop_se"]
    assert list(table.columns) == [*errors, "exit_rate_0", "exit_rate_1", "exit_rate_2", "knob"]
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


# -- accuracy at equal cost -------------------------------------------------------------------------------------------

REDUCTION, ACCURACY = [0.6, 0.2, 0.4], [0.7, 0.88, 0.82]


def matched(targets, reduction=REDUCTION, accuracy=ACCURACY, full=0.9, **options):
    return frontier_through(reduction, accuracy, full).accuracy_at(reduction=targets, **options).tolist()


def test_matched_accuracy_is_linear_between_points_in_any_order():
    assert matched([0.2, 0.3, 0.4, 0.45, 0.6]) == pytest.approx([0.88, 0.85, 0.82, 0.79, 0.7])


def test_the_anchor_is_the_full_model():
    assert matched([0.15, 0.125]) == pytest.approx([0.885, 0.8875])
    assert matched([0.15], full=0.96) == pytest.approx([0.9])


def test_nothing_far_outside_the_measured_range():
    accuracies = matched([-0.01, 0.0, 0.11, 0.12, 0.6, 0.61])
    assert np.isnan(accuracies).tolist() == [True, True, True, False, False, True]
    assert np.isnan(matched([0.11, 0.0, -0.01], below=0.2)).tolist() == [False, False, True]
    assert np.isnan(matched([0.19], below=0.0)).all()
    assert matched([0.2], below=0.0) == pytest.approx([0.88])


def test_the_edge_of_what_is_allowed_is_not_lost_to_rounding():
    assert 0.38 - 0.08 > 0.3 - 1e-16
    for least in (0.38, 0.18, 0.48, 0.28, 0.98):
        (accuracy,) = matched([round(least - 0.08, 2)], [least], [0.8])
        assert accuracy == pytest.approx(0.9 - 0.1 * (least - 0.08) / least)


def test_clamping_gives_the_last_accuracy():
    accuracies = matched([0.6, 0.61, 0.68, 0.69], clamp=True)
    assert accuracies[:3] == pytest.approx([0.7] * 3)
    assert math.isnan(accuracies[3])
    assert np.isnan(matched([0.65], clamp=True, below=0.01)).all()


def test_of_equal_reductions_the_most_accurate_counts():
    assert matched([0.4, 0.5], [0.4, 0.6, 0.4, 0.4], [0.8, 0.7, 0.85, 0.6]) == pytest.approx([0.85, 0.775])


def test_the_shape_is_that_of_the_targets():
    frontier = frontier_through(REDUCTION, ACCURACY, 0.9)
    assert frontier.accuracy_at(reduction=0.4).shape == ()
    assert frontier.accuracy_at(reduction=[[0.4], [0.2]]) == pytest.approx(np.array([[0.82], [0.88]]))
    assert math.isnan(frontier.accuracy_at(reduction=math.nan))


def test_the_full_model_lies_among_points_that_cost_more_and_points_that_cost_less():
    accuracies = matched([-0.1, -0.05, 0.0, 0.1, 0.2], [-0.1, 0.2], [0.86, 0.8])
    assert accuracies == pytest.approx([0.86, 0.88, 0.9, 0.85, 0.8])
    assert np.isnan(matched([-0.11, -0.15], [-0.1, 0.2], [0.86, 0.8])).all()


def test_a_point_that_saves_nothing_is_compared_with_the_full_model():
    assert matched([0.0], [0.0, 0.5], [0.85, 0.7]) == [0.9]
    assert matched([0.0], [0.0, 0.5], [0.95, 0.7]) == [0.95]


def test_points_that_all_cost_more_than_the_full_model():
    accuracies = matched([-0.3, -0.2, -0.15, -0.1, -0.05, 0.0], [-0.2, -0.1], [0.9, 0.8], clamp=True)
    assert accuracies[1:5] == pytest.approx([0.9, 0.85, 0.8, 0.8])
    assert np.isnan(accuracies).tolist() == [True, False, False, False, False, True]
    assert np.isnan(matched([-0.05], [-0.2, -0.1], [0.9, 0.8])).all()
