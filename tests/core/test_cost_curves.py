import numpy as np
import pytest

from adaptexit.core.cost_curves import AnytimeCurve, BudgetCurve, CostCurve, readable_scale
from adaptexit.core.frontier import ParetoFrontier, evaluate
from adaptexit.core.outputs import ExitOutputs

CURVE = CostCurve(np.array([10.0, 30.0, 20.0, 30.0]), np.array([0.5, 0.9, 0.7, 0.8]))


@pytest.mark.parametrize(("accuracy", "cost"), [(0, 10), (0.5, 10), (0.51, 20), (0.75, 30), (0.9, 30), (0.91, np.nan)])
def test_the_least_cost_at_which_an_accuracy_is_reached(accuracy, cost):
    assert CURVE.cost_at(accuracy) == pytest.approx(cost, nan_ok=True)


@pytest.mark.parametrize(("cost", "accuracy"), [(9.9, np.nan), (10, 0.5), (25, 0.7), (29.9, 0.7), (30, 0.8), (99, 0.8)])
def test_accuracy_is_that_of_the_dearest_point_not_of_the_best(cost, accuracy):
    assert CURVE.accuracy_at(cost) == pytest.approx(accuracy, nan_ok=True)


def test_percentages_and_other_things_are_refused():
    with pytest.raises(ValueError, match=r"accuracy must be a share, at most 1; got 94. Was 0.94 meant\?"):
        CURVE.cost_at(94)
    with pytest.raises(ValueError, match="accuracy must be a share"):
        CURVE.cost_at("much")
    with pytest.raises(ValueError, match="cost must be a finite cost in the curve's unit"):
        CURVE.accuracy_at(np.nan)


@pytest.mark.parametrize(
    ("largest", "unit", "scale"),
    [
        (1.3e9, "MACs", (1e9, "G MACs")), (75e6, "MACs", (1e6, "M MACs")), (1e3, "MACs", (1e3, "k MACs")),
        (12, "MACs", (1.0, "MACs")), (2.0, "seconds", (1.0, "s")), (0.02, "seconds", (1e-3, "ms")),
        (1e-9, "seconds", (1e-6, "µs")), (1e9, "given", (1.0, "cost as given")), (1e9, None, (1.0, "cost")),
        (1e9, "joules", (1.0, "joules")),
    ],
)  # fmt: skip
def test_a_scale_that_reads_well(largest, unit, scale):
    assert readable_scale(largest, unit) == scale


def three(chained=False):
    """Three exits on four samples; costs of exits alone: 11, 32 and 60, all exits passed: 11, 33 and 63."""
    return ExitOutputs(
        scores=np.array([[0.9, 0.8, 0.2, 0.1], [0.5, 0.6, 0.9, 0.3], [0.0] * 4]),
        predictions=np.array([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]),
        labels=np.zeros(4, dtype=int), n_classes=2, stage_costs=[10, 20, 30], exit_costs=[1, 2, 0], chained=chained,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("outputs", "costs"),
    [
        (three(), [11, 32, 60]), (three(chained=True), [11, 33, 60]),
        (three().every_exit_paid(), [11, 33, 63]), (three(chained=True).every_exit_paid(), [11, 33, 63]),
    ],
)  # fmt: skip
def test_the_anytime_curve_by_hand(outputs, costs):
    curve = AnytimeCurve.of(outputs, ["a", "b", "c"])
    assert curve.cost.tolist() == costs
    assert curve.accuracy.tolist() == [0.25, 0.5, 1.0]
    assert curve.exit_names == ["a", "b", "c"]


def points_of(outputs):
    """Everybody leaves at the first exit, the surest half does, nobody does before the last."""
    limits = [[-np.inf, np.inf, -np.inf], [0.5, np.inf, -np.inf], [np.inf, np.inf, -np.inf]]
    return [evaluate(outputs, np.array(limit), np.array(limit)) for limit in limits]


def test_a_budget_curve_by_hand():
    calibration = three().every_exit_paid()
    test = calibration.take(np.array([0, 2, 3, 3]))
    frontier = ParetoFrontier.of(points_of(calibration), calibration)
    assert frontier.cost * 63 == pytest.approx([11, 37, 63])
    curve = BudgetCurve.of(frontier.on(test), test.full_cost)
    assert curve.budgets == pytest.approx([11, 37, 63])
    assert curve.cost == pytest.approx([11, 50, 63])
    assert curve.accuracy.tolist() == [0.25, 1.0, 1.0]


def test_budgets_are_served_by_what_the_calibration_data_say():
    calibration = three().every_exit_paid()
    test = calibration.take(np.array([0, 2, 3, 3]))
    frontier = ParetoFrontier.of(points_of(calibration), calibration)
    curve = BudgetCurve.served(frontier.on(test), test.full_cost, 5)
    assert curve.budgets == pytest.approx([11, 24, 37, 50, 63])
    places = [frontier.index_at(budget=b / 63) for b in curve.budgets]
    assert places == [0, 0, 1, 1, 2]
    assert curve.cost == pytest.approx([[11, 50, 63][i] for i in places])
    assert curve.accuracy.tolist() == [[0.25, 1.0, 1.0][i] for i in places]
    calibrated = BudgetCurve.served(frontier, calibration.full_cost, 5)
    assert calibrated.cost == pytest.approx([11, 11, 37, 37, 63])
