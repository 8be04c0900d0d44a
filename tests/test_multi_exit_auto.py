"""The default recipe inside the estimator: it finds a head, and all goes on as if that had been asked for."""

import json

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.neural_network import MLPClassifier

import adaptexit
from adaptexit import AutoRecipe, CalibrationWarning, EMRouter, MultiExitClassifier
from adaptexit.heads import GridHead, MLPHead
from tests.contract.cases import assert_same, config_of, sign
from tests.nets import branched_trained, digits, flat_head

CUTS = ["one", "two"]
TRAIN = tuple(np.concatenate([digits()[0][i], digits()[1][i]]) for i in range(2))
VAL = digits()[1]
TEST = digits()[2]
HEADS = ["grid", "linear"]
QUICK = AutoRecipe(HEADS, epochs=4)


def auto(recipe=QUICK, head="auto", **params):
    params = {"exits": CUTS, "calibration_size": 0.1, "random_state": 0} | params
    return MultiExitClassifier(branched_trained(), recipe=recipe, head=head, **params)


@pytest.fixture(scope="module")
def model():
    """Tests only ask it questions."""
    return auto().fit(*TRAIN).calibrate(*VAL)


def weights(model):
    return [value for head in model._network.early for value in head.state_dict().values()]


def test_the_default_is_the_choice(monkeypatch):
    monkeypatch.setattr(AutoRecipe, "usual_epochs", 1)
    monkeypatch.setattr("adaptexit.training.loop.MINIBATCHES", 1)
    choice = MultiExitClassifier(branched_trained(), CUTS).fit(*TRAIN).history_["choice"]
    assert list(choice["candidates"]) == ["linear", "mlp", "grid", "grid-64", "wide-32", "wide-64"]
    assert choice["head"] in choice["candidates"]


def test_history_says_what_was_compared(model):
    choice = model.history_["choice"]
    assert json.loads(json.dumps(model.history_)) == model.history_
    assert list(choice["candidates"]) == HEADS
    assert choice["head"] == "grid"
    assert isinstance(model._network.early[0], GridHead)
    assert [len(loss) for loss in model.history_["loss"]] == [4, 4]


def test_the_winner_is_trained_as_if_it_had_been_named(model):
    weight = model.history_["choice"]["distillation"]
    named = auto(AutoRecipe(epochs=4, distillation=weight), head="grid").fit(*TRAIN).calibrate(*VAL)
    assert "choice" not in named.history_
    assert named.history_["loss"] == model.history_["loss"]
    for one, other in zip(weights(model), weights(named), strict=True):
        assert torch.equal(one, other)
    assert named.outputs_.scores.tobytes() == model.outputs_.scores.tobytes()


def test_a_second_fit_is_bit_equal(model):
    again = clone(model).fit(*TRAIN).calibrate(*VAL)
    assert again.history_ == model.history_
    assert again.outputs_.scores.tobytes() == model.outputs_.scores.tobytes()


@pytest.mark.parametrize("head", [flat_head, "grid-64"])
def test_a_head_that_is_named_alone_is_trained(head):
    fitted = auto(AutoRecipe(epochs=2), head=head).fit(*TRAIN)
    assert "choice" not in fitted.history_


def test_another_recipe_takes_its_own_head():
    assert isinstance(auto("frozen", exits=["two"]).fit(*digits()[0])._network.early[0], MLPHead)


def test_the_model_runs_once_whatever_is_compared(monkeypatch):
    counts = {}
    for heads in (["grid"], ["grid", "linear", "mlp", "wide-32"]):
        net = branched_trained()
        seen = []
        net.three.register_forward_hook(lambda module, args, output, seen=seen: seen.append(len(output)))
        MultiExitClassifier(net, CUTS, recipe=AutoRecipe(heads, epochs=1)).fit(*TRAIN)
        counts[len(heads)] = sum(n for n in seen if n > 10)
    assert counts[1] == counts[4] == len(TRAIN[1])


def test_without_labels_heads_are_compared_by_agreement():
    fitted = auto().fit(TRAIN[0])
    assert fitted.history_["choice"]["head"] == "grid"
    assert not fitted.labelled_


def test_a_calibrator_that_reads_features_gets_them():
    fitted = auto(calibrator=EMRouter(epochs=1)).fit(*TRAIN)
    channels = [head.spec.channels for head in fitted._network.early]
    assert [array.shape[1] for array in fitted.outputs_.features[:2]] == channels


@pytest.mark.filterwarnings("ignore::adaptexit.CalibrationWarning")
def test_few_samples():
    fitted = MultiExitClassifier(branched_trained(), CUTS, recipe=AutoRecipe(epochs=2)).fit(
        TRAIN[0][:60], TRAIN[1][:60]
    )
    choice = fitted.history_["choice"]
    assert choice["n_validation"] == 0
    assert max(choice["candidates"][choice["head"]]["head_costs"]) < 0.03


@pytest.mark.filterwarnings("ignore::adaptexit.CalibrationWarning")
def test_tables():
    X, y = TRAIN[0].reshape(len(TRAIN[0]), -1), TRAIN[1]
    mlp = MLPClassifier((64, 64), max_iter=10, random_state=0).fit(X, y)
    fitted = MultiExitClassifier(mlp, ["hidden.0"], recipe=AutoRecipe(epochs=4), calibration_size=0.1).fit(X, y)
    assert list(fitted.history_["choice"]["candidates"]) == ["linear", "mlp", "mlp-64"]
    assert fitted._network.early[0].spec.layout == "NC"
    assert fitted.score(X, y) > 0.8


# -- saving ------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_has_the_head_that_was_chosen(model, tmp_path):
    model.save(tmp_path / "model")
    assert config_of(tmp_path / "model")["given_again"] == ["backbone"]
    assert config_of(tmp_path / "model")["state"]["head"] == "grid"
    loaded = adaptexit.load(tmp_path / "model", backbone=branched_trained())
    assert loaded.history_ == model.history_
    assert_same(model, loaded, *TEST)
    loaded.save(tmp_path / "again")
    assert_same(model, adaptexit.load(tmp_path / "again", backbone=branched_trained()), *TEST)


def test_factories_are_given_again(tmp_path):
    fitted = auto(AutoRecipe([flat_head, "linear"], epochs=4)).fit(*TRAIN).calibrate(*VAL)
    assert fitted.history_["choice"]["head"] == "heads[0]"
    fitted.save(tmp_path / "model")
    recipe = AutoRecipe([flat_head, "linear"])
    loaded = adaptexit.load(tmp_path / "model", backbone=branched_trained(), recipe=recipe)
    assert_same(fitted, loaded, *TEST)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("linear", "do not fit the head|must be"),
        ("wide-64", r"head must be one of those that were compared, grid, linear; got 'wide-64'"),
        ("os.system", r"head must be one of those that were compared"),
        (3, r"state.head must be"),
    ],
)
def test_a_head_that_was_made_up_is_refused(model, tmp_path, name, says):
    model.save(tmp_path / "model")
    config = config_of(tmp_path / "model")
    config["state"]["head"] = name
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    sign(tmp_path / "model")
    with pytest.raises(ValueError, match=says):
        adaptexit.load(tmp_path / "model", backbone=branched_trained())


def test_folders_from_before_heads_were_chosen_have_perceptrons(tmp_path):
    """They hold the same parameters, and no name of a head."""
    fitted = auto("frozen").fit(*digits()[0]).calibrate(*VAL)
    fitted.save(tmp_path / "model")
    config = config_of(tmp_path / "model")
    assert "head" not in config["state"]
    config["params"]["recipe"] = "auto"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    sign(tmp_path / "model")
    loaded = adaptexit.load(tmp_path / "model", backbone=branched_trained())
    assert loaded.predict_proba(TEST[0]).tobytes() == fitted.predict_proba(TEST[0]).tobytes()


def test_bad_heads_are_refused_before_the_backbone_runs(monkeypatch):
    monkeypatch.setattr("adaptexit.training.retrofit.record_features", lambda *args, **options: pytest.fail("it ran"))
    with pytest.raises(ValueError, match="heads must be names among"):
        auto(AutoRecipe(["grdi"])).fit(*TRAIN)


def test_the_warning_of_data_given_to_fit_is_as_ever():
    with pytest.warns(CalibrationWarning, match="thresholds come from data given to fit"):
        auto().fit(*TRAIN).predict(TEST[0][:2])
