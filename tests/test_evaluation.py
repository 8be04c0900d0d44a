import re
import warnings

import numpy as np
import pytest
import torch

from adaptexit import (
    CascadeSaver,
    CPMCalibrator,
    EENetScheduler,
    EMRouter,
    Evaluation,
    ExitOutputs,
    ThresholdCalibrator,
    evaluate_settings,
)
from adaptexit.core.cost_curves import BudgetCurve
from tests.nets import Columns, Recording, branched, branched_model, column_cascade, column_data, digits
from tests.reference import msdnet_rule
from tests.test_comparison import drawn


def recorded(seed, n_exits=3, **others):
    costs = {"stage_costs": [1e6 * (k + 1) for k in range(n_exits)], "exit_costs": [2e5] * n_exits}
    return drawn(seed, n_exits=n_exits, **(costs | {"cost_unit": "MACs"} | others))


CALIBRATION, TEST = recorded(0), recorded(1)
PAIR = (CALIBRATION, TEST)
VALIDATION, HELD_OUT = digits()[1], digits()[2]
pytestmark = pytest.mark.filterwarnings("ignore::adaptexit.SaverWarning")  # savers on few samples
FEW = ThresholdCalibrator(n_points=20)


def numbers(curve):
    return {name: values.tolist() for name, values in vars(curve).items() if isinstance(values, np.ndarray)}


def curves(evaluation, name):
    return numbers(evaluation.anytime[name]), numbers(evaluation.budgeted[name])


@pytest.fixture(scope="module")
def two():
    return evaluate_settings({"one": PAIR, "other": (recorded(2, 4), recorded(3, 4))}, calibrator=FEW, n_budgets=7)


# -- anytime ----------------------------------------------------------------------------------------------------------


def test_every_exit_answers_at_the_cost_of_all_that_it_passes(cascade):
    evaluation = evaluate_settings({"mine": cascade, "branches": branched_model()}, *HELD_OUT)
    for name, model in (("mine", cascade), ("branches", branched_model())):
        outputs, curve = model.record(*HELD_OUT), evaluation.anytime[name]
        assert curve.accuracy.tolist() == outputs.accuracies.tolist()
        assert curve.cost == pytest.approx(np.cumsum(outputs.stage_costs + outputs.exit_costs))
        assert curve.exit_names == model.exit_names
        assert evaluation.n_samples[name] == len(HELD_OUT[1])
    assert evaluation.unit == "MACs"
    assert evaluation.every_exit_paid


def test_exits_that_are_switched_off_may_be_free(cascade):
    evaluation = evaluate_settings(cascade, *HELD_OUT, every_exit_paid=False)
    assert list(evaluation.anytime) == ["CascadeSaver"]
    assert evaluation.anytime["CascadeSaver"].cost == pytest.approx(cascade.outputs_.alone_costs())
    passing = evaluate_settings(cascade, *HELD_OUT).anytime["CascadeSaver"].cost
    assert passing[-1] - cascade.outputs_.full_cost == pytest.approx(cascade.outputs_.exit_costs[0])


def test_weights_of_samples_count():
    weights = np.random.default_rng(0).random(120)
    test = recorded(1, sample_weight=weights)
    evaluation = evaluate_settings({"mine": (CALIBRATION, test)}, calibrator="geometric")
    right = TEST.predictions == TEST.labels
    assert evaluation.anytime["mine"].accuracy == pytest.approx(right @ weights / weights.sum())


def test_a_single_exit():
    pair = recorded(0, 1), recorded(1, 1)
    for calibrator in ("own", "geometric"):
        evaluation = evaluate_settings({"mine": pair}, calibrator=calibrator, n_budgets=2)
        line = evaluation.budgeted["mine"]
        assert set(line.accuracy) == {pair[1].full_accuracy}
        assert line.cost == pytest.approx([1.2e6] * 2)


# -- budgeted ---------------------------------------------------------------------------------------------------------


def test_under_the_same_pricing_thresholds_are_those_of_the_estimator(cascade, monkeypatch):
    monkeypatch.setattr(ThresholdCalibrator, "fit", None)
    line = evaluate_settings({"mine": cascade}, *HELD_OUT, every_exit_paid=False, n_budgets=9).budgeted["mine"]
    frontier, full = cascade.pareto(*HELD_OUT), cascade.outputs_.full_cost
    calibrated = cascade.calibrator_.frontier_.cost
    assert line.budgets == pytest.approx(np.linspace(calibrated.min(), calibrated.max(), 9) * full)
    points = [frontier.at(budget=float(b)) for b in line.budgets / full]
    assert line.accuracy.tolist() == [p.accuracy for p in points]
    assert line.cost == pytest.approx([p.cost * full for p in points])


def test_under_another_pricing_the_own_calibrator_learns_anew_and_the_estimator_stays(cascade):
    before = cascade.calibrator_, cascade.outputs_, cascade.predict(HELD_OUT[0]).tolist()
    line = evaluate_settings({"mine": cascade}, *HELD_OUT, n_budgets=9).budgeted["mine"]
    test = cascade.record(*HELD_OUT).every_exit_paid()
    again = ThresholdCalibrator().fit(cascade.outputs_.every_exit_paid())
    assert numbers(line) == numbers(BudgetCurve.served(again.pareto(test), test.full_cost, 9))
    assert line.budgets[-1] == pytest.approx(cascade.outputs_.stage_costs.sum() + cascade.outputs_.exit_costs.sum())
    assert (cascade.calibrator_, cascade.outputs_) == before[:2]
    assert cascade.predict(HELD_OUT[0]).tolist() == before[2]


def test_a_pair_of_outputs_equals_its_estimator(cascade):
    pair = cascade.outputs_, cascade.record(*HELD_OUT)
    evaluation = evaluate_settings({"run": cascade, "read": pair}, *HELD_OUT)
    assert curves(evaluation, "run") == curves(evaluation, "read")
    assert evaluation.anytime["read"].exit_names == ["exit 0", "full model"]


def test_the_geometric_rule_equals_a_plain_loop():
    line = evaluate_settings({"mine": PAIR}, calibrator="geometric").budgeted["mine"]
    price = np.cumsum([1.2e6, 2.2e6, 3.2e6])
    rows = []
    for p in range(1, 40):
        powers = np.array([p / 20, (p / 20) ** 2, (p / 20) ** 3])
        quotas = np.floor(120 * powers / powers.sum() + 1e-9).astype(int)
        limits = thresholds_of(CALIBRATION.scores, quotas)
        here, there = leaving(CALIBRATION.scores, limits), leaving(TEST.scores, limits)
        assert here.tolist() == msdnet_rule(CALIBRATION.scores.tolist(), quotas.tolist())
        right = TEST.predictions[there, np.arange(120)] == TEST.labels
        rows.append((price[here].mean(), price[there].mean(), right.mean()))
    rows.sort()
    assert line.budgets == pytest.approx([row[0] for row in rows])
    assert line.cost == pytest.approx([row[1] for row in rows])
    assert line.accuracy == pytest.approx([row[2] for row in rows])


def thresholds_of(scores, quotas):
    """Half way below the last sample that each early exit takes of those left."""
    alive, limits = np.ones(scores.shape[1], dtype=bool), []
    for row, quota in zip(scores[:-1], quotas, strict=False):
        order = [i for i in np.argsort(-row) if alive[i]][:quota]
        if not order:
            limits.append(np.inf)
            continue
        rest = row[row < row[order[-1]]]
        limits.append((row[order[-1]] + rest.max()) / 2 if len(rest) else -np.inf)
        alive &= row <= limits[-1]
    return limits


def leaving(scores, limits):
    above = np.stack([*(row > limit for row, limit in zip(scores, limits, strict=False)), np.ones_like(scores[0]) > 0])
    return above.argmax(axis=0)


def test_labels_of_the_test_data_choose_nothing():
    rolled = drawn(
        1, stage_costs=TEST.stage_costs, exit_costs=TEST.exit_costs, cost_unit="MACs", quality=1.0 - TEST.graded
    )
    for calibrator in (FEW, "geometric"):
        evaluation = evaluate_settings({"mine": PAIR, "odd": (CALIBRATION, rolled)}, calibrator=calibrator)
        mine, odd = evaluation.budgeted.values()
        assert (mine.budgets.tolist(), mine.cost.tolist()) == (odd.budgets.tolist(), odd.cost.tolist())
        assert mine.accuracy == pytest.approx(1 - odd.accuracy)


def test_any_calibrator_may_choose():
    own = CPMCalibrator(margins=[0.05, 0.2, 0.4])
    line = evaluate_settings({"mine": PAIR}, calibrator=own, n_budgets=5).budgeted["mine"]
    test = TEST.every_exit_paid()
    frontier = CPMCalibrator(margins=[0.05, 0.2, 0.4]).fit(CALIBRATION.every_exit_paid()).pareto(test)
    assert numbers(line) == numbers(BudgetCurve.served(frontier, test.full_cost, 5))
    assert not hasattr(own, "frontier_")


def test_a_budget_or_drop_of_a_calibrator_says_nothing_of_the_curve_and_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lines = [
            evaluate_settings({"mine": PAIR}, calibrator=ThresholdCalibrator(n_points=9, **params)).budgeted["mine"]
            for params in ({}, {"max_drop": 0.01}, {"budget": 0.01})
        ]
    assert numbers(lines[0]) == numbers(lines[1]) == numbers(lines[2])


def test_the_budget_that_a_schedule_learns_for_stays_the_same_absolute_cost():
    schedule = {"epochs": 1, "n_points": 8}
    data = column_data(80)
    model = column_cascade(cost=[10.0, 20.0], calibrator=EENetScheduler(budget=0.75, **schedule)).fit(*data)
    line = evaluate_settings({"mine": model}, *column_data(50, seed=1), n_budgets=4).budgeted["mine"]
    test = model.record(*column_data(50, seed=1)).every_exit_paid()
    again = EENetScheduler(budget=0.5, **schedule).fit(model.outputs_.every_exit_paid())  # 15 of 30 instead of 20
    assert numbers(line) == numbers(BudgetCurve.served(again.pareto(test), test.full_cost, 4))


def test_routers_learn_from_the_training_outputs():
    router = EMRouter(prior="global", epochs=2, n_points=5)
    model = branched(calibrator=router).fit(*digits()[0]).calibrate(*VALIDATION)
    assert model.training_outputs_ is not None
    evaluation = evaluate_settings({"mine": model}, *HELD_OUT, n_budgets=6)
    test = model.record(*HELD_OUT).every_exit_paid()
    priced, training = model.outputs_.every_exit_paid(), model.training_outputs_.every_exit_paid()
    frontier = router.fit(priced, training=training).pareto(test)
    assert numbers(evaluation.budgeted["mine"]) == numbers(BudgetCurve.served(frontier, test.full_cost, 6))


def test_a_model_runs_over_the_test_data_once():
    data, test = column_data(60), column_data(40, seed=1)
    counting = Recording(Columns(1))
    model = column_cascade()
    model = CascadeSaver(counting, model.saver, cost=model.cost).fit(*data)
    for calibrator in ("own", "geometric"):
        counting.sizes.clear()
        evaluate_settings({"mine": model}, *test, calibrator=calibrator)
        assert sum(counting.sizes) == 40


# -- what is said of it -----------------------------------------------------------------------------------------------


def test_the_table_in_long_form(two):
    frame = two.to_frame()
    assert frame.columns.tolist() == ["model", "setting", "exit", "budget", "cost", "accuracy"]
    assert len(frame) == 3 + 4 + 2 * 7
    for name in ("one", "other"):
        rows = frame[frame.model == name]
        exits, along = rows[rows.setting == "anytime"], rows[rows.setting == "budgeted"]
        assert exits.exit.tolist() == two.anytime[name].exit_names
        assert exits.budget.isna().all()
        assert along.exit.isna().all()
        assert along.budget.tolist() == two.budgeted[name].budgets.tolist()
        for part, curve in ((exits, two.anytime[name]), (along, two.budgeted[name])):
            assert part.cost.tolist() == curve.cost.tolist()
            assert part.accuracy.tolist() == curve.accuracy.tolist()


def test_what_texts_quote(two):
    for setting, by_name in (("anytime", two.anytime), ("budgeted", two.budgeted)):
        share = by_name["one"].accuracy.max()
        costs, accuracies = two.cost_at(share, setting), two.accuracy_at(3.5e6, setting)
        for name, curve in by_name.items():
            enough = curve.cost[curve.accuracy >= share]
            assert costs[name] == pytest.approx(min(enough, default=np.nan), nan_ok=True)
            assert accuracies[name] in curve.accuracy
        assert costs["one"] > 0
    assert two.accuracy_at(3.5e6, "anytime")["one"] == two.anytime["one"].accuracy[1]
    assert np.isnan(two.accuracy_at(1e5)["one"])
    assert np.isnan(two.cost_at(1.0)["one"])
    assert two.cost_at(0.5) == two.cost_at(0.5, "budgeted")


def test_it_prints_both_settings(two):
    lines = str(two).splitlines()
    assert re.split(r"  +", lines[1].strip()) == ["model", "exit", "M MACs", "accuracy"]
    printed = [re.split(r"  +", line) for line in lines[2:9]]
    expected = [
        (name, exit_name, cost / 1e6, accuracy)
        for name, curve in two.anytime.items()
        for exit_name, cost, accuracy in zip(curve.exit_names, curve.cost, curve.accuracy, strict=True)
    ]
    assert [tuple(row[:2]) for row in printed] == [row[:2] for row in expected]
    cells = np.array([row[2:] for row in printed], dtype=float)
    np.testing.assert_allclose(cells, np.array([row[2:] for row in expected], dtype=float), atol=5.1e-5)
    assert lines[10] == "Budgeted batch: accuracy at a mean of at most so many M MACs"
    costs = [float(cell) for cell in lines[11].split()[1:]]
    assert costs == [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    for name, line in zip(("one", "other"), lines[12:14], strict=True):
        assert line.split() == [name, *(f"{two.accuracy_at(cost * 1e6)[name]:.4f}" for cost in costs)]
    assert lines[-1] == "Costs of a sample, where whoever passes an exit pays for it; 120 samples."
    assert repr(two) == "Evaluation(one, other; MACs)"


def test_it_prints_no_accuracy_below_the_cheapest_point_and_one_cost_of_a_single_exit():
    dear = tuple(recorded(seed, stage_costs=[3e7, 1e6, 2e6]) for seed in (0, 1))
    lines = str(evaluate_settings({"one": PAIR, "dear": dear}, calibrator="geometric")).splitlines()
    costs, cells = lines[10].split()[1:], lines[12].split()[1:]
    assert [cell == "-" for cell in cells] == [float(cost) < 30.2 for cost in costs]
    assert 0 < cells.count("-") < len(cells)
    alone = recorded(0, 1), recorded(1, 1)
    lines = str(evaluate_settings({"one": alone}, calibrator="geometric")).splitlines()
    assert lines[5:7] == ["model     1.2", f"one    {alone[1].full_accuracy:.4f}"]


def test_it_says_which_pricing_and_how_many_samples():
    pairs = {"one": PAIR, "other": (CALIBRATION, recorded(4, n=50))}
    text = str(evaluate_settings(pairs, calibrator="geometric", every_exit_paid=False))
    assert text.endswith("Costs of a sample, where exits switched off are not paid for; 50 to 120 samples.")


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "error", "message"),
    [
        ([PAIR], TypeError, r"models must be a dict of names to fitted estimators or pairs .*; got list"),
        ({}, ValueError, "models must be a dict .*; got an empty dict"),
        ({1: PAIR}, TypeError, "models must be a dict .*; got the key 1"),
        ({"a": CascadeSaver}, TypeError, r"models\['a'\] is the class CascadeSaver"),
        ({"a": CALIBRATION}, TypeError, r"models\['a'\] is ExitOutputs"),
        ({"a": (CALIBRATION,)}, TypeError, r"models\['a'\] must be two ExitOutputs, .*; got \(ExitOutputs\)"),
        ({"a": (CALIBRATION, 3)}, TypeError, r"models\['a'\] must be two ExitOutputs, .*; got \(ExitOutputs, int\)"),
        (
            {"a": (CALIBRATION, recorded(1, 2))},
            ValueError,
            r"models\['a'\]\[1\] must have the exits and classes of models\['a'\]\[0\], 3 and 4; got 2 and 4",
        ),
        (
            {"a": (CALIBRATION, TEST.every_exit_paid())},
            ValueError,
            r"models\['a'\] must be two outputs at the same costs; got stage_costs=.* Record both with the same",
        ),
        (
            {"a": (CALIBRATION, recorded(1, chained=True))},
            ValueError,
            "must be two outputs at the same costs; got .*chained=False beside .*chained=True",
        ),
        (
            {"a": PAIR, "b": (recorded(0, cost_unit="seconds"), recorded(1, cost_unit="seconds"))},
            ValueError,
            r"one unit; got 'MACs' \(models\['a'\]\), .*'seconds' \(models\['b'\]\)",
        ),
        (
            {"a": (CALIBRATION, recorded(1, cost_unit=None))},
            ValueError,
            r"one unit; got 'MACs' \(models\['a'\]\), None \(models\['a'\]\[1\]\)",
        ),
    ],
)  # fmt: skip
def test_models_that_are_none(models, error, message):
    with pytest.raises(error, match=message):
        evaluate_settings(models)


@pytest.mark.parametrize(
    ("others", "error", "message"),
    [
        ({"X": HELD_OUT[0]}, ValueError, "X is for estimators, but models are recorded outputs alone"),
        ({"every_exit_paid": "no"}, ValueError, "every_exit_paid must be True or False; got 'no'"),
        ({"n_budgets": 1}, ValueError, "n_budgets must be a whole number, at least 2; got 1"),
        ({"calibrator": "best"}, TypeError, "calibrator must be 'own', 'geometric' or a Calibrator, .*; got 'best'"),
        ({"calibrator": CPMCalibrator}, TypeError, "got the class CPMCalibrator: call it first"),
    ],
)
def test_arguments_that_cannot_be(others, error, message):
    with pytest.raises(error, match=message):
        evaluate_settings({"a": PAIR}, **others)


def test_estimators_need_data_and_a_fit(cascade):
    with pytest.raises(ValueError, match="X must be the test data, which estimators are run on; got None"):
        evaluate_settings({"a": PAIR, "b": cascade})
    with pytest.raises(ValueError, match="not fitted"):
        evaluate_settings({"a": CascadeSaver(torch.nn.Flatten(), torch.nn.Flatten())}, *HELD_OUT)


def test_settings_that_there_are_not(two):
    for ask in (two.cost_at, two.accuracy_at):
        with pytest.raises(ValueError, match=r"setting must be one of \['anytime', 'budgeted'\]; got 'batch'"):
            ask(0.5, "batch")


def test_logits_that_are_missing_are_refused_before_anything_runs(monkeypatch):
    model = column_cascade().fit(*column_data(60))
    assert model.outputs_.logits is None
    monkeypatch.setattr(type(model), "record", None)
    message = (
        r"calibration outputs of models\['a'\] must have logits for ThresholdCalibrator; they have none. Calibrate the "
        "model with such a calibrator, which records them, or evaluate by a calibrator that does without"
    )
    with pytest.raises(ValueError, match=message):
        evaluate_settings({"a": model}, *column_data(9), calibrator=ThresholdCalibrator("entropy"))


@pytest.mark.parametrize(("place", "source"), [(0, "calibration"), (1, "test")])
def test_logits_that_recorded_outputs_lack(place, source):
    pair = [CALIBRATION, TEST]
    pair[place] = recorded(place, keep_logits=False)
    message = rf"{source} outputs of models\['a'\] must have logits for ThresholdCalibrator; .* \(keep_logits=True\)"
    with pytest.raises(ValueError, match=message):
        evaluate_settings({"a": tuple(pair)}, calibrator=ThresholdCalibrator("entropy"))
    assert isinstance(evaluate_settings({"a": tuple(pair)}, calibrator="geometric"), Evaluation)


def test_features_that_recorded_outputs_lack():
    router = EMRouter(prior="global", inputs="features", epochs=1)
    with pytest.raises(ValueError, match=r"must have features of every early exit for EMRouter; they have none. Rec"):
        evaluate_settings({"a": PAIR}, calibrator=router)


def test_weights_that_a_calibrator_does_not_read():
    weighted = recorded(0, sample_weight=np.arange(1.0, 121.0))
    assert isinstance(weighted, ExitOutputs)
    with pytest.raises(ValueError, match="EENetScheduler does not read sample_weight"):
        evaluate_settings({"a": (weighted, TEST)}, calibrator=EENetScheduler(epochs=1))
