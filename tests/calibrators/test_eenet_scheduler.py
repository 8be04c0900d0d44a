import copy
import json
from functools import cache

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import log_loss

import adaptexit
from adaptexit import CascadeSaver, CPMCalibrator, EENetScheduler, compare
from adaptexit.calibrators.eenet_scorers import Assigner, Scorer, evidence, train_schedule
from adaptexit.calibrators.small_modules import probabilities
from adaptexit.core.answer import Answer
from adaptexit.core.frontier import evaluate
from adaptexit.core.outputs import ExitOutputs
from tests.nets import branched, branched_trained, digits, large_trained, small_trained
from tests.properties.test_calibrator_laws import online_exits

TRAIN, VAL, TEST = digits()
CUTS = ["one", "two"]
QUICK = {"epochs": 15, "n_points": 10}


def recorded(n=600, seed=0, cost_unit="MACs", **changed):
    """Three exits, the deeper the surer; whether the first two say "0" tells if they are right."""
    rng = np.random.default_rng(seed)
    labels, hard = rng.integers(0, 3, n), rng.random(n) < 0.5
    strength = np.where(hard, np.array([[0.0], [0.5], [4.0]]), np.array([[3.0], [4.0], [4.0]]))
    logits = rng.normal(size=(3, n, 3)) + strength[:, :, None] * np.eye(3)[labels]
    settings = {"costs": [100.0, 300.0, 1000.0], "cost_unit": cost_unit} | changed
    return ExitOutputs.from_logits(logits.astype(np.float32), labels, **settings)


OUTPUTS = recorded()


@cache
def scheduled(scale=None):
    """A schedule for the outputs, or for rounded logits times ``scale``, that tests only ask; and the outputs."""
    outputs = OUTPUTS
    if scale is not None:
        outputs = ExitOutputs.from_logits(scale * np.round(OUTPUTS.logits, 1), OUTPUTS.labels, costs=[100, 300, 1000])
    return EENetScheduler(**QUICK).fit(outputs), outputs


# -- learning ---------------------------------------------------------------------------------------------------------


def test_evidence_is_probabilities_the_largest_and_how_low_the_entropy():
    logits = np.array([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0], [40.0, 0.0, 0.0]], dtype=np.float32)
    p = softmax(logits, axis=1)
    numbers = evidence(torch.from_numpy(logits)).numpy()
    np.testing.assert_allclose(numbers[:, :3], p, atol=1e-6)
    np.testing.assert_allclose(numbers[:, 3], p.max(axis=1), atol=1e-6)
    entropy = -(p * np.log(p)).sum(axis=1)
    np.testing.assert_allclose(numbers[:, 4], 1 - entropy / np.log(3), atol=1e-6)
    assert evidence(torch.zeros(2, 1)).tolist() == [[1, 1, 1], [1, 1, 1]]


def test_scores_say_who_is_right_better_than_the_largest_probability():
    """Two classes that an exit is sure of and always gets wrong for one answer: only a learned score can tell."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 2000)
    first = np.where(rng.random(2000) < 0.5, labels, 1)  # answers 1 are right in two of three, answers 0 always
    logits = np.stack([3.0 * np.eye(2)[first], 3.0 * np.eye(2)[labels]]).astype(np.float32)
    outputs = ExitOutputs.from_logits(logits, labels, costs=[1.0, 10.0])
    scores = EENetScheduler(0.6).fit(outputs).rescored(outputs).scores[0]
    right = (first == labels).astype(int)
    assert scores[first == 0].min() > 0.95
    assert scores[first == 1].max() == pytest.approx(right[first == 1].mean(), abs=0.05)
    assert log_loss(right, scores) < log_loss(right, outputs.scores[0]) - 0.05


def test_shares_follow_the_budget():
    cheap, dear = (EENetScheduler(budget, epochs=60, n_points=10).fit(OUTPUTS) for budget in (0.3, 0.8))
    costs = np.array([0.1, 0.3, 1.0])
    assert cheap.shares_ @ costs == pytest.approx(0.3, abs=0.06)
    assert dear.shares_ @ costs == pytest.approx(0.8, abs=0.06)
    for model in (cheap, dear):
        assert model.shares_.sum() == pytest.approx(1.0)
        assert model.point_.params == {"budget": model.budget}
        assert model.budget - 0.01 <= model.point_.cost <= model.budget
        assert model.history_[-1][2] < model.history_[0][2]


def test_the_losses_are_the_papers():
    """One epoch of one batch at a learning rate of next to nothing: the terms as the formula gives them."""
    correct, costs = OUTPUTS.graded, np.array([0.1, 0.3, 1.0])
    settings = {"hidden": 4, "epochs": 1, "batch_size": OUTPUTS.n_samples, "lr": 1e-12, "random_state": 3}
    scorers, shares, history = train_schedule(
        OUTPUTS.logits, correct, costs, 0.4, kl_weight=0.5, budget_weight=2.0, **settings
    )
    scores = np.empty((OUTPUTS.n_samples, 0))
    for k, scorer in enumerate(scorers):
        scores = np.column_stack([scores, probabilities(scorer, OUTPUTS.logits[k], scores)])
    twice, _, other = train_schedule(OUTPUTS.logits, correct, costs, 0.4, kl_weight=1.0, budget_weight=4.0, **settings)
    assert torch.equal(twice[0].net.weight, scorers[0].net.weight)
    wrong, divergence, distance = history[0]
    assert other[0] == pytest.approx([wrong, 2 * divergence, 2 * distance], rel=1e-5)
    assert distance == pytest.approx(2.0 * abs(shares @ costs - 0.4) / 0.4, rel=1e-4)
    each = -(correct.T * np.log(scores) + ~correct.T * np.log(1 - scores))
    weights = assignment(scores, 4, 3)
    np.testing.assert_allclose(weights.mean(axis=0), shares, rtol=1e-4)
    assert wrong == pytest.approx(np.mean((weights * each).sum(axis=0) / weights.sum(axis=0)), rel=1e-5)
    assert wrong != pytest.approx(each.mean(), rel=1e-4)
    alone = train_schedule(OUTPUTS.logits[:, :1], correct[:, :1], costs, 0.4, kl_weight=1, budget_weight=1, **settings)
    q, r = scores[0], alone[1]
    assert alone[2][0][0] == pytest.approx(each[0].mean(), rel=1e-4)  # of one sample the weights are 1
    assert alone[2][0][1] == pytest.approx(np.sum(q / q.sum() * np.log(q / q.sum() / r)), rel=1e-3)


def assignment(scores, hidden, seed):
    """What the assigner of a fresh schedule says of OUTPUTS, (N, K)."""
    torch.manual_seed(seed)
    _ = [Scorer(3, k) for k in range(3)]
    assigner = Assigner(3, 3, hidden)
    inputs = [
        torch.cat([evidence(torch.from_numpy(OUTPUTS.logits[k])), torch.from_numpy(scores[:, :k]).float()], dim=1)
        for k in range(3)
    ]
    with torch.no_grad():
        return assigner(inputs).softmax(dim=1).double().numpy()


def test_earlier_scores_are_taken_as_they_are():
    """No exit's score learns to serve a later one: a step of the first is the same whatever the second has to learn."""
    settings = {"hidden": 4, "epochs": 1, "batch_size": 600, "lr": 0.1, "random_state": 3}
    both = {"kl_weight": 0.0, "budget_weight": 0.0}
    three, *_ = train_schedule(OUTPUTS.logits, OUTPUTS.graded, [0.1, 0.3, 1.0], 0.4, **both, **settings)
    wrong = np.stack([OUTPUTS.graded[0], ~OUTPUTS.graded[1], OUTPUTS.graded[2]])
    other, *_ = train_schedule(OUTPUTS.logits, wrong, [0.1, 0.3, 1.0], 0.4, **both, **settings)
    assert torch.equal(three[0].net.weight, other[0].net.weight)
    assert not torch.equal(three[1].net.weight, other[1].net.weight)


def test_the_first_exits_score_reads_itself_alone_and_the_next_what_came_before():
    model, _ = scheduled()
    assert [scorer.net.in_features for scorer in model.scorers_] == [5, 6]
    other = OUTPUTS.logits.copy()
    other[0] = -other[0]
    after = model.rescored(ExitOutputs.from_logits(other, OUTPUTS.labels, costs=[100.0, 300.0, 1000.0]))
    assert not np.allclose(after.scores[1], model.rescored(OUTPUTS).scores[1])


@pytest.mark.parametrize(("unit", "expected"), [("MACs", [5, 6, 0]), ("seconds", [0, 0, 0]), (None, [0, 0, 0])])
def test_what_scores_cost(unit, expected):
    model = EENetScheduler(**QUICK).fit(recorded(cost_unit=unit))
    assert model.extra_costs_.tolist() == expected
    assert model.rescored(OUTPUTS).exit_costs.tolist() == expected
    assert model.rescored(OUTPUTS).chained


def test_without_a_budget_the_middle_counts():
    model, _ = scheduled()
    assert model.point_.params["budget"] == pytest.approx((105 / 1000 + 1) / 2)


def test_one_exit_has_nothing_to_learn_of():
    alone = ExitOutputs.from_logits(OUTPUTS.logits[-1:], OUTPUTS.labels, costs=[10.0])
    model = EENetScheduler(**QUICK).fit(alone)
    assert model.scorers_ == []
    assert model.point_.cost == 1.0
    assert model.exit_index(alone).tolist() == [0] * 600


def test_a_seed_determines_all_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    one, same, other = (EENetScheduler(random_state=seed, **QUICK).fit(OUTPUTS) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert one.rescored(OUTPUTS).scores.tolist() == same.rescored(OUTPUTS).scores.tolist()
    assert one.shares_.tolist() == same.shares_.tolist()
    assert one.rescored(OUTPUTS).scores.tolist() != other.rescored(OUTPUTS).scores.tolist()


# -- answering --------------------------------------------------------------------------------------------------------


def test_online_scores_are_the_offline_ones_and_1_at_the_last_exit():
    model, _ = scheduled()
    memory = None
    for k in range(3):
        batch = Answer(predictions=OUTPUTS.predictions[k], scores=OUTPUTS.scores[k], logits=OUTPUTS.logits[k])
        scores, memory = model.scores(k, batch, memory)
        assert scores.tolist() == model.rescored(OUTPUTS).scores[k].tolist()
        assert memory is None or memory.shape == (600, k + 1)
    assert (scores == 1).all()


@pytest.mark.parametrize("size", [1, 7, 64, 600])
@pytest.mark.parametrize("scale", [1, 30, 300])
def test_leaving_online_is_routing_offline(size, scale):
    """Also where probabilities saturate and tie: rounding with the size of a batch must not part them."""
    model, outputs = scheduled(scale)
    order = np.random.default_rng(1).permutation(outputs.n_samples)
    for point in model.frontier_.points[:: 4 if size == 1 else 1]:
        exits = online_exits(model, outputs, np.split(order, range(size, 600, size)), point)
        assert exits.tolist() == model.exit_index(outputs, point).tolist()


def test_each_exit_alone_is_charged_nothing_for_scores_or_for_those_before_it():
    outputs = recorded(costs=None, stage_costs=[100.0, 0.0, 0.0], exit_costs=[10.0, 200.0, 890.0])
    model = EENetScheduler(**QUICK).fit(outputs)
    alone = outputs.alone_costs() / outputs.full_cost
    assert model.pareto().fixed_cost.tolist() == alone.tolist()
    assert model.pareto(outputs.take(np.arange(50))).fixed_cost.tolist() == alone.tolist()


@pytest.fixture(scope="module")
def half():
    """A schedule for half the cost, which tests only ask."""
    return EENetScheduler(0.5, **QUICK).fit(OUTPUTS)


def test_budgets_are_served_by_points_within_them(half):
    for budget in (0.2, 0.5, 0.9, 1.0):
        assert half.policy(budget=budget).point.cost <= budget + 1e-9
    fresh = half.pareto(recorded(seed=1))
    assert fresh.at(budget=0.5).cost == pytest.approx(0.5, abs=0.05)
    assert len(fresh.points) == len(half.frontier_.points)


def test_a_schedule_for_each_budget(half):
    fresh = recorded(seed=1)
    sweep = half.pareto(fresh, refit=True, budgets=[0.8, 0.5])
    assert [point.params["budget"] for point in sweep.points] == [0.5, 0.8]
    own = half.pareto(fresh).points[[p.params for p in half.frontier_.points].index({"budget": 0.5})]
    assert (sweep.points[0].accuracy, sweep.points[0].cost) == (own.accuracy, own.cost)
    quick = EENetScheduler(epochs=1).fit(OUTPUTS).pareto(fresh, refit=True)
    assert len(quick.points) == 10
    assert quick.chosen_on.n_samples == OUTPUTS.n_samples
    assert (quick.chosen_on.cost <= [p.params["budget"] for p in quick.points]).all()


def test_quality_is_what_points_are_judged_by_and_correctness_what_scores_learn():
    graded = ExitOutputs(
        predictions=OUTPUTS.predictions, labels=OUTPUTS.labels, n_classes=3, logits=OUTPUTS.logits,
        scores=OUTPUTS.scores, costs=[100, 300, 1000], quality=10.0 * OUTPUTS.graded - 10.0, cost_unit="MACs",
    )  # fmt: skip
    model, other = EENetScheduler(**QUICK).fit(graded), scheduled()[0]
    assert model.rescored(graded).scores.tolist() == other.rescored(OUTPUTS).scores.tolist()
    assert model.point_.accuracy == pytest.approx(10.0 * other.point_.accuracy - 10.0)


def test_a_first_exit_dearer_than_the_full_model():
    outputs = recorded(costs=None, stage_costs=[100.0, 300.0, 600.0], exit_costs=[1200.0, 0.0, 0.0], cost_unit=None)
    for budget in (None, 1.0):
        model = EENetScheduler(budget, **QUICK).fit(outputs)
        assert model.point_.cost == 1.0
        assert model.point_.exit_rates.tolist() == [0, 0, 1]
        assert model.point_.params == {"budget": 1.0}


def test_memory_mapped_outputs(tmp_path):
    OUTPUTS.save(tmp_path / "outputs")
    on_disk = ExitOutputs.load(tmp_path / "outputs", mmap=True)
    model, other = EENetScheduler(**QUICK).fit(on_disk), scheduled()[0]
    assert model.rescored(on_disk).scores.tolist() == other.rescored(OUTPUTS).scores.tolist()


def test_in_a_comparison():
    comparison = compare(
        OUTPUTS, {"EENet": EENetScheduler(0.5, **QUICK), "CPM": CPMCalibrator()}, test=recorded(seed=1)
    )
    assert comparison.at(0.5)["EENet"].accuracy > comparison.points["random exit"][0].accuracy


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"budget": 0.1}, r"budget must be at least 0.105, the relative cost of the first exit; got 0.1\. Raise"),
        ({"budget": float("nan")}, "budget must be a finite relative cost"),
        ({"kl_weight": -1}, "kl_weight must be a finite number, at least 0; got -1"),
        ({"budget_weight": -1}, "budget_weight must be a finite number, at least 0; got -1"),
        ({"hidden": 0}, "hidden must be a whole number, at least 1; got 0"),
        ({"n_points": 0}, "n_points must be a whole number, at least 1; got 0"),
        ({"epochs": "some"}, "epochs must be a whole number, at least 1 or 'auto'; got 'some'"),
        ({"batch_size": 1}, "batch_size must be a whole number, at least 2; got 1"),
        ({"lr": 0}, "lr must be a finite number above 0; got 0"),
        ({"random_state": None}, "random_state must be a whole number, at least 0; got None"),
        ({"weight_decay": -1}, "weight_decay must be a finite number, 0 or above; got -1"),
    ],
)
def test_parameters_that_cannot_be(params, message):
    model = copy.copy(scheduled()[0])
    before = model.point_
    with pytest.raises(ValueError, match=message):
        model.set_params(**params).fit(OUTPUTS)
    assert model.point_ is before


def test_outputs_and_batches_that_lack_what_is_needed():
    without = ExitOutputs.from_logits(OUTPUTS.logits, OUTPUTS.labels, costs=[1, 2, 3], keep_logits=False)
    with pytest.raises(ValueError, match="a schedule learns which answers are right; the outputs lack logits"):
        EENetScheduler().fit(without)
    with pytest.raises(TypeError, match="outputs must be ExitOutputs; got list"):
        EENetScheduler().fit([])
    model, _ = scheduled()
    with pytest.raises(ValueError, match="a schedule needs logits, but the outputs have none"):
        model.rescored(without)
    fewer = ExitOutputs.from_logits(OUTPUTS.logits[1:], OUTPUTS.labels, costs=[1, 2])
    with pytest.raises(ValueError, match="learned for 3 exits and 3 classes; the outputs have 2 and 3"):
        model.rescored(fewer)
    batch = Answer(predictions=np.zeros(2, int), scores=np.zeros(2), logits=np.zeros((2, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="exit 1 reads the scores of the 1 exits before it; the memory brings 0"):
        model.policy().decide(1, batch)
    with pytest.raises(ValueError, match="a schedule needs logits, but the batch has none"):
        model.policy().decide(0, Answer(predictions=np.zeros(1, int), scores=np.zeros(1)))
    with pytest.raises(NotFittedError):
        EENetScheduler().rescored(OUTPUTS)
    with pytest.raises(ValueError, match=r"budgets must be a sequence of at least one number; got \[\]"):
        model.pareto(refit=True, budgets=[])


# -- copies and estimators --------------------------------------------------------------------------------------------


def test_state_there_and_back():
    model, _ = scheduled()
    state, arrays = model.get_state()
    other = clone(model)
    other.set_state(json.loads(json.dumps(state)), arrays, OUTPUTS)
    assert other.rescored(OUTPUTS).scores.tolist() == model.rescored(OUTPUTS).scores.tolist()
    assert other.exit_index(OUTPUTS).tolist() == model.exit_index(OUTPUTS).tolist()
    assert other.extra_costs_.tolist() == model.extra_costs_.tolist()
    assert other.shares_.tolist() == model.shares_.tolist()
    assert copy.deepcopy(model).exit_index(OUTPUTS).tolist() == model.exit_index(OUTPUTS).tolist()
    with pytest.raises(ValueError, match="learns anew from the data of fit, which are not saved"):
        other.pareto(OUTPUTS, refit=True)


@pytest.fixture(scope="module")
def model():
    return branched(exits=CUTS, head="mlp", batch_size=50, calibrator=EENetScheduler(0.7, **QUICK)).fit(*TRAIN)


@pytest.fixture(scope="module")
def calibrated(model):
    return copy.deepcopy(model).calibrate(*VAL)


def test_an_estimator_leaves_as_its_record_says(calibrated):
    outputs = calibrated.record(*TEST)
    for point in calibrated.calibrator_.frontier_.points:
        trace = calibrated.trace(TEST[0], budget=point.cost)
        own = calibrated.operating_point(point.cost)
        assert trace.exits.tolist() == calibrated.calibrator_.exit_index(outputs, own).tolist()
        evaluated = calibrated.pareto(*TEST).at(budget=point.cost)
        assert trace.relative_costs.mean() == pytest.approx(evaluated.cost)


def test_exits_before_the_deepest_one_on_are_asked_and_paid_though_nobody_leaves_there(calibrated):
    outputs = calibrated.outputs_
    scheduled = calibrated.calibrator_.rescored(outputs)
    thresholds = np.array([np.inf, float(np.median(scheduled.scores[1])), -np.inf])
    point = evaluate(scheduled, thresholds, thresholds)
    policy = calibrated.calibrator_.policy(point=point)
    assert policy.runs.tolist() == [True, True, True]
    assert point.on.tolist() == [False, True, True]
    trace = calibrated._predictor(policy).trace(VAL[0])
    assert trace.exits.tolist() == calibrated.calibrator_.exit_index(outputs, point).tolist()
    assert set(trace.exits.tolist()) == {1, 2}
    costs = np.cumsum(outputs.stage_costs + outputs.exit_costs + calibrated.calibrator_.extra_costs_)
    np.testing.assert_allclose(policy.path_costs, costs)
    np.testing.assert_allclose(trace.costs, costs[trace.exits])
    assert trace.relative_costs.mean() == pytest.approx(point.cost)


def test_saved_and_loaded(calibrated, tmp_path):
    calibrated.save(tmp_path / "saved")
    loaded = adaptexit.load(tmp_path / "saved", backbone=branched_trained())
    for budget in (None, 0.9):
        assert loaded.predict(TEST[0], budget=budget).tolist() == calibrated.predict(TEST[0], budget=budget).tolist()


@pytest.mark.filterwarnings("ignore::adaptexit.SaverWarning")
def test_in_a_cascade():
    cascade = CascadeSaver(large_trained(), small_trained(), calibrator=EENetScheduler(**QUICK)).fit(*VAL)
    exits = cascade.trace(TEST[0]).exits
    assert exits.tolist() == cascade.calibrator_.exit_index(cascade.record(*TEST)).tolist()
    assert 0 < exits.mean() < 1


def test_probabilities_of_nobody():
    assert probabilities(Scorer(3, 1), np.empty((0, 3)), np.empty((0, 1))).shape == (0,)
