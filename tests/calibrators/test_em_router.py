import copy
import json
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError

import adaptexit
from adaptexit import CascadeSaver, EMRouter
from adaptexit.calibrators import em, em_routers
from adaptexit.calibrators.em_routers import Router, new_routers
from adaptexit.calibrators.small_modules import probabilities
from adaptexit.core.answer import Answer
from adaptexit.core.em import halting_targets, log_likelihoods, reach
from adaptexit.core.outputs import ExitOutputs
from adaptexit.heads.layout import pooled
from tests.nets import branched, branched_trained, digits, large_trained, small_trained
from tests.properties.test_calibrator_laws import online_exits

TRAIN, VAL, TEST = digits()
CUTS = ["one", "two"]
QUICK = {"prior": "global", "epochs": 6, "n_points": 10, "hidden": 8}


def recorded(n=400, seed=0, cost_unit="MACs", features=True, **changed):
    """Three exits, the deeper the surer; the features tell which samples are hard."""
    rng = np.random.default_rng(seed)
    labels, hard = rng.integers(0, 3, n), rng.random(n) < 0.5
    strength = np.where(hard, np.array([[0.0], [0.5], [4.0]]), np.array([[3.0], [4.0], [4.0]]))
    logits = rng.normal(size=(3, n, 3)) + strength[:, :, None] * np.eye(3)[labels]
    hints = (hard[:, None] + 0.1 * rng.normal(size=(n, 4))).astype(np.float32)
    settings = {"costs": [100.0, 300.0, 1000.0], "cost_unit": cost_unit} | changed
    return ExitOutputs.from_logits(
        logits, labels, features=[hints, hints[:, :2], hints[:, :0]] if features else None, **settings
    )


OUTPUTS = recorded()


# -- learning ---------------------------------------------------------------------------------------------------------


def test_hard_samples_go_on():
    router = EMRouter(2.0, "per_sample", hidden=8, epochs=60).fit(OUTPUTS)
    hard = OUTPUTS.features[0][:, 0] > 0.5
    exits = router.exit_index(OUTPUTS)
    assert np.mean(exits[hard] > 0) > 0.9
    assert np.mean(exits[~hard] == 0) > 0.9


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("prior", ["global", "per_sample"])
def test_routers_learn_halting_targets(prior, weighted, monkeypatch):
    calls = []
    original = em_routers.train_routers

    def spy(routers, features, targets, weights=None, **settings):
        calls.append((features, targets, weights, settings))
        return original(routers, features, targets, weights, **settings)

    monkeypatch.setattr(em_routers, "train_routers", spy)
    router = EMRouter(0.7, weighted=weighted, **QUICK | {"prior": prior}).fit(OUTPUTS)
    ((features, targets, weights, settings),) = calls
    log_r = router.posterior_.log_responsibilities
    assert np.array_equal(targets, halting_targets(log_r)[:, :2])
    assert np.array_equal(weights, reach(log_r)[:, :2]) if weighted else weights is None
    assert all(np.array_equal(a, b) for a, b in zip(features, OUTPUTS.features[:2], strict=True))
    assert settings["epochs"] == 6
    costs = router._fit_data[2]
    expected = log_likelihoods(OUTPUTS) - 0.7 * costs
    if prior == "per_sample":
        r = np.exp(expected - expected.max(axis=1, keepdims=True))
        np.testing.assert_allclose(np.exp(log_r), r / r.sum(axis=1, keepdims=True))


def test_costs_count_heads_and_routers():
    router = EMRouter(**QUICK).fit(OUTPUTS)
    macs = [4 * 8 + 8, 2 * 8 + 8, 0]
    assert router.extra_costs_.tolist() == macs
    np.testing.assert_allclose(router._fit_data[2], (np.array([100, 300, 1000]) + np.cumsum(macs)) / 1000)
    (point,) = [p for p in router.frontier_.points if p is router.point_]
    costs = np.array([100, 300, 1000]) + np.cumsum(macs)
    assert point.cost == pytest.approx(float(point.exit_rates @ costs) / 1000)


@pytest.mark.parametrize("unit", [None, "seconds", "given"])
def test_routers_are_free_where_costs_are_no_macs(unit):
    outputs = recorded(cost_unit=unit, costs=[0.25, 0.5, 1.0])
    router = EMRouter(**QUICK).fit(outputs)
    assert not router.extra_costs_.any()
    assert router._fit_data[2].tolist() == [0.25, 0.5, 1.0]


@pytest.mark.parametrize("prior", ["global", "per_sample", "amortized"])
def test_a_huge_cost_weight_sends_everybody_to_the_cheapest_exit(prior):
    router = EMRouter(1e6, **QUICK | {"prior": prior, "epochs": 40}).fit(OUTPUTS)
    assert (router.exit_index(OUTPUTS) == 0).all()


def test_without_cost_one_step_of_the_papers_prior_is_bayes_rule():
    router = EMRouter(0.0, **QUICK | {"prior": "per_sample"}).fit(OUTPUTS)
    p = np.exp(log_likelihoods(OUTPUTS))
    np.testing.assert_allclose(np.exp(router.posterior_.log_responsibilities), p / p.sum(axis=1, keepdims=True))


def test_amortized_routers_are_the_prior():
    router = EMRouter(0.5, hidden=8, epochs=10, n_points=10).fit(OUTPUTS)
    assert router.posterior_.converged
    halts = [probabilities(r, f) for r, f in zip(router.routers_, OUTPUTS.features[:2], strict=True)]
    prior = np.stack([halts[0], (1 - halts[0]) * halts[1], (1 - halts[0]) * (1 - halts[1])], axis=1)
    np.testing.assert_allclose(router.posterior_.prior, prior, atol=1e-9)
    history = router.posterior_.history
    assert history[-1] > history[0]
    assert history[-1] - history[-2] < 1e-3


def test_not_to_converge_is_told():
    for steps in (1, 2):
        with pytest.warns(ConvergenceWarning, match=f"EM stopped after {steps} steps without having conv") as warned:
            router = EMRouter(n_iter=steps, tol=1e-9, epochs=2, n_points=10).fit(OUTPUTS)
        assert not router.posterior_.converged
        assert warned[0].filename == __file__


def test_routers_learn_from_the_training_outputs_and_thresholds_from_the_others():
    training = recorded(300, seed=1)
    router = EMRouter(**QUICK).fit(OUTPUTS, training=training)
    alone = EMRouter(**QUICK).fit(training)
    for one, other in zip(router.routers_, alone.routers_, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert len(router.posterior_.log_responsibilities) == 300
    assert router.frontier_.n_samples == 400


def test_training_outputs_of_another_model():
    other = ExitOutputs.from_logits(np.zeros((2, 5, 3)), np.zeros(5, int), costs=[1, 2])
    with pytest.raises(ValueError, match="training must have the 3 exits and 3 classes of outputs; got 2 exits and 3"):
        EMRouter(**QUICK).fit(OUTPUTS, training=other)


def test_a_seed_determines_all_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    one, same, other = (EMRouter(**QUICK, random_state=seed).fit(OUTPUTS) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert one.rescored(OUTPUTS).scores.tolist() == same.rescored(OUTPUTS).scores.tolist()
    assert one.rescored(OUTPUTS).scores.tolist() != other.rescored(OUTPUTS).scores.tolist()


def test_routers_standardise_what_they_read():
    features = np.random.default_rng(0).normal(50, 9, (200, 3)).astype(np.float32)
    features[:, 2] = 7.0
    (router,) = new_routers([features], 5, 0)
    inputs = (torch.from_numpy(features) - router.mean) * router.scale
    np.testing.assert_allclose(inputs.mean(0), [0, 0, 0], atol=1e-4)
    np.testing.assert_allclose(inputs.std(0), [1, 1, 0], atol=0.01)
    assert router.macs == 3 * 5 + 5
    assert probabilities(router, features[:0]).shape == (0,)


# -- routing ----------------------------------------------------------------------------------------------------------


def test_leaving_online_is_routing_offline():
    router = EMRouter(**QUICK).fit(OUTPUTS)
    batches = np.split(np.arange(400), [7, 200])
    for point in router.frontier_.points:
        assert online_exits(router, OUTPUTS, batches, point).tolist() == router.exit_index(OUTPUTS, point).tolist()


def test_online_scores_are_the_offline_ones_and_1_at_the_last_exit():
    router = EMRouter(**QUICK).fit(OUTPUTS)
    for k in range(3):
        batch = Answer(
            predictions=OUTPUTS.predictions[k],
            scores=OUTPUTS.scores[k],
            features=OUTPUTS.features[k] if k < 2 else None,
        )
        scores, memory = router.scores(k, batch)
        assert scores.tolist() == router.rescored(OUTPUTS).scores[k].tolist()
        assert memory is None
    assert (scores == 1).all()


def test_logits_are_asked_for_online_only_where_routers_read_them():
    by_features, by_logits = EMRouter(**QUICK).fit(OUTPUTS), EMRouter(**QUICK, inputs="logits").fit(OUTPUTS)
    assert by_features.needs_logits
    assert by_logits.needs_logits  # routers learn from what logits say of the labels
    policies = by_features.policy(), by_logits.policy()
    assert [(policy.needs_logits, policy.needs_features) for policy in policies] == [(False, True), (True, False)]


def test_without_features_routers_read_logits():
    outputs = recorded(features=False)
    router = EMRouter(**QUICK).fit(outputs)
    assert [len(r.mean) for r in router.routers_] == [3, 3]
    exits = online_exits(router, outputs, [np.arange(200), np.arange(200, 400)], router.point_)
    assert exits.tolist() == router.exit_index(outputs).tolist()
    same = EMRouter(**QUICK, inputs="logits").fit(OUTPUTS)
    assert same.rescored(OUTPUTS).scores.tolist() == router.rescored(outputs).scores.tolist()


def test_the_point_in_use_has_the_threshold_and_budgets_searched_ones():
    router = EMRouter(**QUICK, threshold=0.3).fit(OUTPUTS)
    assert router.thresholds_.tolist() == [0.3, 0.3, -np.inf]
    assert router.point_.params == {"cost_weight": 0.5, "threshold": 0.3}
    costs = router.frontier_.cost
    assert (np.diff(costs) >= 0).all()
    assert router.policy(budget=0.5).point.cost <= 0.5
    assert router.policy(budget=1.0).point.accuracy >= OUTPUTS.full_accuracy


def test_the_sweep_trains_a_router_for_each_weight_on_the_same_likelihoods(monkeypatch):
    router = EMRouter(**QUICK | {"epochs": 40}).fit(OUTPUTS)
    monkeypatch.setattr(em, "log_likelihoods", lambda outputs: pytest.fail("again"))
    sweep = router.pareto(OUTPUTS, refit=True, cost_weights=[0.0, 0.5, 1e6])
    assert {p.params["cost_weight"] for p in sweep.points} == {0.0, 0.5, 1e6}
    assert sweep.points[0].params["cost_weight"] == 1e6
    assert sweep.points[0].exit_rates[0] == 1
    (own,) = [p for p in sweep.points if p.params["cost_weight"] == 0.5]
    assert own.accuracy == router.point_.accuracy
    assert own.cost == router.point_.cost
    assert [p.cost for p in router.pareto(refit=True, cost_weights=[0.5]).points] == [router.point_.cost]


def test_a_sweep_is_chosen_from_on_the_calibration_data():
    router, fresh = EMRouter(**QUICK).fit(OUTPUTS), recorded(seed=3)
    own, sweep = (router.pareto(o, refit=True, cost_weights=[0.1, 1.0, 3.0]) for o in (None, fresh))
    assert own.chosen_on is None
    assert sweep.chosen_on.cost.tolist() == own.cost.tolist()
    assert [p.params for p in sweep.points] == [p.params for p in own.points]
    assert sweep.index_at(max_drop=0.05) == own.index_at(max_drop=0.05)
    assert sweep.n_samples == fresh.n_samples
    assert sweep.fixed_cost.tolist() == (fresh.alone_costs() / fresh.full_cost).tolist()


@pytest.mark.parametrize("scale", [*(pytest.param(s, marks=pytest.mark.slow) for s in (1.0, 30.0)), 300.0])
def test_saturated_and_tied_inputs_leave_online_as_offline(scale):
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 3, 701)
    logits = (scale * np.round(rng.normal(size=(4, 701, 3)) + np.eye(3)[labels], 1)).astype(np.float32)
    outputs = ExitOutputs.from_logits(logits, labels, costs=[1.0, 2.0, 3.0, 4.0])
    router = EMRouter(**QUICK).fit(outputs)
    order = rng.permutation(701)
    for point in router.frontier_.points[::9]:
        offline = router.exit_index(outputs, point).tolist()
        for size in (1, 7, 32):
            batches = np.split(order, range(size, 701, size))
            assert online_exits(router, outputs, batches, point).tolist() == offline


@pytest.mark.parametrize("prior", ["global", "per_sample", "amortized"])
def test_one_exit_has_no_router(prior):
    alone = ExitOutputs.from_logits(np.eye(3)[None], np.arange(3), costs=[10.0])
    router = EMRouter(prior=prior).fit(alone)
    assert router.routers_ == []
    assert router.exit_index(alone).tolist() == [0, 0, 0]


def test_what_routers_read_is_settled_by_fit():
    router = EMRouter(**QUICK).fit(recorded(features=False))
    assert not router.needs_features
    features = [np.ones((400, 3), dtype=np.float32)] * 3
    with_both = ExitOutputs.from_logits(OUTPUTS.logits, OUTPUTS.labels, costs=[100, 300, 1000], features=features)
    assert router.exit_index(with_both).tolist() == router.exit_index(recorded(features=False)).tolist()
    one_lacks_them = EMRouter(**QUICK).fit(OUTPUTS, training=recorded(200, features=False))
    assert [len(r.mean) for r in one_lacks_them.routers_] == [3, 3]
    narrow = ExitOutputs.from_logits(
        OUTPUTS.logits,
        OUTPUTS.labels,
        costs=[1, 2, 3],
        features=[np.ones((400, 2)), np.ones((400, 0)), np.ones((400, 0))],
    )
    assert [len(r.mean) for r in EMRouter(**QUICK).fit(narrow).routers_] == [3, 3]


def test_memory_mapped_outputs(tmp_path):
    OUTPUTS.save(tmp_path / "outputs")
    on_disk = ExitOutputs.load(tmp_path / "outputs", mmap=True)
    for inputs in ("logits", "features"):
        router, other = (EMRouter(**QUICK, inputs=inputs).fit(o) for o in (on_disk, OUTPUTS))
        assert router.rescored(on_disk).scores.tolist() == other.rescored(OUTPUTS).scores.tolist()


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"cost_weight": -1}, r"cost_weight must be a number of nats from 0 to 1e\+06; got -1"),
        ({"cost_weight": 1e7}, r"cost_weight must be a number of nats from 0 to 1e\+06; got 10000000.0"),
        ({"tol": -1}, "tol must be a finite number, at least 0, or None; got -1"),
        ({"random_state": None}, "random_state must be a whole number, at least 0; got None"),
        ({"prior": "flat"}, r"prior must be one of \['amortized', 'global', 'per_sample'\]; got 'flat'"),
        ({"inputs": "pixels"}, r"inputs must be one of \['auto', 'features', 'logits'\]; got 'pixels'"),
        ({"search": "luck"}, "search must be one of .* got 'luck'"),
        ({"threshold": 1.0}, "threshold must be a probability below 1; got 1.0"),
        ({"hidden": 0}, "hidden must be a whole number, at least 1; got 0"),
        ({"n_iter": 1.5}, "n_iter must be a whole number, at least 1; got 1.5"),
        ({"epochs": "many"}, "epochs must be a whole number, at least 1 or 'auto'; got 'many'"),
        ({"batch_size": 1}, "batch_size must be a whole number, at least 2; got 1"),
        ({"lr": 0}, "lr must be a finite number above 0; got 0"),
        ({"weighted": "yes"}, "weighted must be True or False; got 'yes'"),
    ],
)
def test_parameters_that_cannot_be(params, message):
    router = EMRouter(**QUICK).fit(OUTPUTS)
    before = router.point_
    with pytest.raises(ValueError, match=message):
        router.set_params(**params).fit(OUTPUTS)
    assert router.point_ is before


def test_outputs_that_lack_what_is_needed():
    with pytest.raises(ValueError, match="inputs='features' needs features of every early exit, but"):
        EMRouter(**QUICK, inputs="features").fit(recorded(features=False))
    with pytest.raises(ValueError, match=r"need logits and labels; the outputs lack logits|routers need logits"):
        EMRouter(**QUICK).fit(recorded(features=False, keep_logits=False))
    router = EMRouter(**QUICK).fit(OUTPUTS)
    with pytest.raises(ValueError, match="routers need features, but the outputs have none"):
        router.exit_index(recorded(features=False))
    wider = ExitOutputs.from_logits(
        OUTPUTS.logits, OUTPUTS.labels, costs=[1, 2, 3], features=[np.ones((400, 5))] * 3, cost_unit="MACs"
    )
    with pytest.raises(ValueError, match=r"read vectors of widths \[4, 2\]; the outputs have \[5, 5\]"):
        router.exit_index(wider)
    with pytest.raises(ValueError, match="routers need features, but the batch has none"):
        router.policy().decide(0, Answer(predictions=np.zeros(1, int), scores=np.zeros(1)))
    with pytest.raises(NotFittedError):
        EMRouter().rescored(OUTPUTS)
    for weights, message in (
        ([], r"cost_weights must be a sequence of at least one number; got \[\]"),
        ("ab", "cost_weights must be a sequence of at least one number; got 'ab'"),
        ([-1], "cost_weights must be a number of nats from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            router.pareto(OUTPUTS, refit=True, cost_weights=weights)
    with pytest.raises(TypeError, match="outputs must be ExitOutputs; got list"):
        router.pareto([1], refit=True)


# -- copies and estimators --------------------------------------------------------------------------------------------


def test_state_there_and_back():
    router = EMRouter(**QUICK).fit(OUTPUTS)
    state, arrays = router.get_state()
    other = clone(router).set_params(hidden=99, inputs="logits")
    other.set_state(json.loads(json.dumps(state)), arrays, OUTPUTS)
    assert other.needs_features
    with pytest.raises(ValueError, match="learns anew from the data of fit, which are not saved"):
        other.pareto(OUTPUTS, refit=True)
    assert other.rescored(OUTPUTS).scores.tolist() == router.rescored(OUTPUTS).scores.tolist()
    assert other.exit_index(OUTPUTS).tolist() == router.exit_index(OUTPUTS).tolist()
    assert other.extra_costs_.tolist() == router.extra_costs_.tolist()
    assert copy.deepcopy(router).exit_index(OUTPUTS).tolist() == router.exit_index(OUTPUTS).tolist()


@pytest.fixture(scope="module", params=["mlp", "prototype"])
def model(request):
    router = EMRouter(0.3, **QUICK)
    return branched(exits=CUTS, head=request.param, calibrator=router).fit(*TRAIN).calibrate(*VAL)


def test_features_are_means_over_positions_live_and_cached(model):
    outputs = model.record(*TEST)
    x = torch.from_numpy(TEST[0])
    net = branched_trained()
    with torch.inference_mode():
        feature = x
        for k, name in enumerate(CUTS):
            feature = getattr(net, name)(feature)
            expected = pooled(feature, model._network.heads[k].spec)
            np.testing.assert_allclose(outputs.features[k], expected, atol=1e-5)
    assert outputs.features[2].shape == (len(x), 0)
    training = model.training_outputs_
    assert training.n_samples == 450
    again = model.record(*TRAIN)
    order = {tuple(np.round(row, 3)): i for i, row in enumerate(again.logits[2])}
    places = [order[tuple(np.round(row, 3))] for row in training.logits[2]]
    for k in range(2):
        np.testing.assert_allclose(training.features[k], again.features[k][places], atol=1e-4)


def test_an_estimator_leaves_as_its_record_says(model):
    outputs = model.record(*TEST)
    for budget in (None, 1.0):
        trace = model.trace(TEST[0], budget=budget)
        point = model.operating_point(budget)
        assert trace.exits.tolist() == model.calibrator_.exit_index(outputs, point).tolist()
        evaluated = model.pareto(*TEST).points[model.pareto().index(point)]
        assert trace.relative_costs.mean() == pytest.approx(evaluated.cost)
    assert model.calibrator_.extra_costs_.tolist() == [8 * 8 + 8, 16 * 8 + 8, 0]


def test_saved_loaded_and_calibrated_again(model, tmp_path):
    model.save(tmp_path / "saved")
    loaded = adaptexit.load(tmp_path / "saved", backbone=branched_trained())
    assert loaded.predict(TEST[0]).tolist() == model.predict(TEST[0]).tolist()
    anew = loaded.calibrate(*VAL)
    assert anew.calibrator_.rescored(anew.outputs_).scores.tolist() == (
        model.calibrator_.rescored(model.outputs_).scores.tolist()
    )


@pytest.mark.filterwarnings("ignore::adaptexit.SaverWarning")
@pytest.mark.parametrize(("inputs", "width"), [("auto", 64), ("features", 64), ("logits", 10)])
def test_cascades_route_by_what_their_models_have_seen_or_by_logits(inputs, width):
    cascade = CascadeSaver(large_trained(), small_trained(), calibrator=EMRouter(0.5, inputs=inputs, **QUICK)).fit(*VAL)
    assert [len(router.mean) for router in cascade.calibrator_.routers_] == [width]
    exits = cascade.trace(TEST[0]).exits
    assert exits.tolist() == cascade.calibrator_.exit_index(cascade.record(*TEST)).tolist()


def test_given_costs_in_an_estimator():
    model = branched(exits=CUTS, cost=[0.25, 0.5, 1.0], head="mlp", calibrator=EMRouter(0.3, **QUICK))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(*TRAIN)
    model.calibrate(*VAL)
    assert model.outputs_.cost_unit == "given"
    assert set(model.trace(TEST[0]).costs.tolist()) <= {0.25, 0.5, 1.0}


def test_a_router_is_small():
    assert sum(p.numel() for p in Router(6, 4).parameters()) == 6 * 4 + 4 + 4 + 1
