"""The published recipes inside the estimator: each one's heads, margins, budgets and saving."""

import json

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.neural_network import MLPClassifier

import adaptexit
from adaptexit import BoostNetRecipe, CalexNetRecipe, CPMCalibrator, MultiExitClassifier, ZTWRecipe
from adaptexit.heads import (
    BoostedHead,
    MLPHead,
    PrototypeHead,
    RefinedPrototypeHead,
    ScalarConfidenceHead,
    ZTWHead,
)
from adaptexit.training import PTEERecipe
from tests.nets import branched, branched_trained, digits, flat_head, naive_branches

CUTS = ["one", "two"]
SETTINGS = {"epochs": 4, "batch_size": 150, "lr": 1e-2}
RECIPES = {
    "calexnet": (CalexNetRecipe(**SETTINGS), RefinedPrototypeHead),
    "ptee": (PTEERecipe(**SETTINGS), PrototypeHead),
    "ptee, joint": (PTEERecipe(loss="cumulative", costs=[0.3, 0.6], cost_weight=2.0, **SETTINGS), ScalarConfidenceHead),
    "ztw": (ZTWRecipe(**SETTINGS), ZTWHead),
    "ztw, whole maps": (ZTWRecipe(None, **SETTINGS), ZTWHead),
    "boostnet": (BoostNetRecipe(**SETTINGS), BoostedHead),
}
_made = {}


def made(name):
    """A fitted one for all tests that only ask it questions."""
    if name not in _made:
        recipe, _ = RECIPES[name]
        model = branched(exits=CUTS, head="auto", recipe=recipe, calibrator=CPMCalibrator.published_with(recipe, 0.3))
        _made[name] = model.fit(*digits()[0]).calibrate(*digits()[1])
    return _made[name]


@pytest.fixture(params=RECIPES)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return made(name)


def test_the_recipes_own_head_is_taken_unless_another_is_named(name, model):
    _, own = RECIPES[name]
    assert {type(head) for head in model._network.early} == {own}
    assert model.calibrator_.cascade_aware is (name == "calexnet")
    assert model.outputs_.chained is (name.startswith("ztw") or name == "boostnet")


def test_a_recipe_by_name_and_one_without_a_head_of_its_own():
    assert branched(head="auto", recipe="frozen")._head() == "mlp"

    class Bare:
        def train(self, heads, cache, rows, targets, *, random_state=0, verbose=0):
            return {}

    fitted = branched(exits=["one"], head="auto", recipe=Bare()).fit(*digits()[0])
    assert isinstance(fitted._network.early[0], MLPHead)


def test_a_head_named_with_boostnet_is_boosted():
    model = branched(exits=CUTS, head=flat_head, recipe=BoostNetRecipe(0.25, **SETTINGS)).fit(*digits()[0])
    assert [type(head) for head in model._network.early] == [BoostedHead] * 2
    assert {head.weight for head in model._network.early} == {0.25}


def test_ensembles_know_the_heads_before_them():
    assert [len(head.ensemble_weight) for head in made("ztw")._network.early] == [1, 2]


def test_heads_that_the_recipe_cannot_train_are_refused_before_the_backbone_runs_over_the_data(monkeypatch):
    monkeypatch.setattr("adaptexit.training.retrofit.record_features", lambda *args, **options: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=r"heads must be ZTWHeads for ZTW; got \['MLPHead'\]"):
        branched(exits=CUTS, head="mlp", recipe="ztw").fit(*digits()[0])


def test_answers_equal_a_hand_written_loop_and_the_record(name, model):
    X, y = digits()[2]
    # One threshold an exit for the loop: that of the calibrator's rule is by class.
    flat = np.array([0.5, 0.6])
    recorded = model.record(X, y)
    labels, exits, scores, _ = naive_branches(
        branched_trained(), CUTS, model._network.early, torch.from_numpy(X[:60]), flat
    )
    leaves = recorded.scores[:2, :60] > flat[:, None]
    expected = np.where(leaves[0], 0, np.where(leaves[1], 1, 2))
    clear = (np.abs(recorded.scores[:2, :60] - flat[:, None]) > 1e-4).all(axis=0)
    assert exits[clear].tolist() == expected[clear].tolist()
    rows = np.arange(60)
    assert labels[clear].tolist() == recorded.predictions[expected, rows][clear].tolist()
    np.testing.assert_allclose(scores[clear].astype(float), recorded.scores[expected, rows][clear], atol=1e-4)


def test_leaving_online_is_routing_offline(model):
    X, y = digits()[2]
    recorded = model.record(X, y)
    for point in model.pareto().points[::16]:
        trace = model.trace(X, budget=point.cost)
        point_in_use = model.operating_point(point.cost)
        assert trace.exits.tolist() == model.calibrator_.exit_index(recorded, point_in_use).tolist()


def test_margins_are_the_frontier_and_the_one_in_use_answers(model):
    margins = [point.params.get("margin") for point in model.pareto().points]
    assert sorted(m for m in margins if m is not None) == [0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8]
    assert model.calibrator_.point_.params == {"margin": 0.3}
    X, y = digits()[1]
    assert model.score(X, y) == pytest.approx(model.calibrator_.point_.accuracy)


def test_saved_and_loaded_it_is_the_same(model, tmp_path):
    model.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["given_again"] == ["backbone"]
    loaded = adaptexit.load(tmp_path / "saved", backbone=branched_trained())
    X = digits()[2][0]
    for budget in (None, 1.0):
        assert loaded.predict(X, budget=budget).tolist() == model.predict(X, budget=budget).tolist()
    assert loaded.history_ == model.history_
    assert loaded.recipe.get_params() == model.recipe.get_params()
    assert loaded.calibrator_.precision_.tolist() == model.calibrator_.precision_.tolist()


def test_a_second_fit_is_bit_equal(name, model):
    again = clone(model).fit(*digits()[0]).calibrate(*digits()[1])
    assert again.outputs_.scores.tobytes() == model.outputs_.scores.tobytes()
    assert again.history_ == model.history_


def test_prototype_heads_share_cached_features_boosted_or_not(tmp_path):
    n_files = []
    for recipe, head in (
        (PTEERecipe(**SETTINGS), "auto"), (BoostNetRecipe(**SETTINGS), "auto"), (CalexNetRecipe(**SETTINGS), "auto"),
        (PTEERecipe(loss="cumulative", **SETTINGS), "auto"), (ZTWRecipe(**SETTINGS), "auto"),
        (CalexNetRecipe(**SETTINGS), "residual"),
    ):  # fmt: skip
        branched(exits=CUTS, head=head, recipe=recipe, cache_dir=tmp_path).fit(*digits()[0])
        n_files.append(len(list(tmp_path.rglob("features_0.bin"))))
    assert n_files == [1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("recipe", ["calexnet", "calexnet_reference", "ptee", "ztw", "boostnet"])
@pytest.mark.filterwarnings("ignore::adaptexit.CalibrationWarning")
def test_tables(recipe):
    (X, y), (val, y_val) = ((images.reshape(len(images), -1), labels) for images, labels in digits()[:2])
    mlp = MLPClassifier((32, 32), max_iter=30, random_state=0).fit(X, y)
    settings = {"epochs": 8, "batch_size": 64, "lr": 5e-3}
    recipe = adaptexit.training.recipe_of(recipe).set_params(**settings)
    model = MultiExitClassifier(mlp, recipe=recipe, calibrator=CPMCalibrator(0.2)).fit(X, y).calibrate(val, y_val)
    frontier = model.pareto()
    assert frontier.fixed_accuracy[0] > 0.5
    assert model.predict(val, budget=1.0).shape == y_val.shape


def test_without_labels_accuracy_is_agreement():
    images = digits()[0][0]
    model = branched(exits=CUTS, head="auto", recipe=CalexNetRecipe(**SETTINGS), calibrator=CPMCalibrator(0.2))
    model.fit(images).calibrate(digits()[1][0])
    assert model.labelled_ is False
    assert model.pareto().full_accuracy == 1.0
    assert np.nanmin(model.calibrator_.precision_) == 1.0
