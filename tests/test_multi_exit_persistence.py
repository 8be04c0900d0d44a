import warnings

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch import nn

import adaptexit
from adaptexit import CalibrationWarning, FrozenRecipe, MultiExitClassifier, ThresholdCalibrator
from tests.contract.cases import assert_same, config_of, random_states, sign
from tests.nets import (
    assert_same_branches,
    branched,
    branched_model,
    branched_net,
    branched_trained,
    digits,
    flat_head,
)

TRAIN, VAL, TEST = digits()
pytestmark = pytest.mark.filterwarnings("ignore::adaptexit.LabelWarning")
IRIS = load_iris(return_X_y=True)
self_calibrated = pytest.mark.filterwarnings("ignore::adaptexit.CalibrationWarning")


@pytest.fixture(scope="module")
def model():
    """Tests only ask it questions."""
    return branched_model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A folder that tests only read."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save(folder)
    return folder


@pytest.fixture
def scratch(model, tmp_path):
    """A folder that a test may spoil."""
    model.save(tmp_path / "model")
    return tmp_path / "model"


# -- copies in memory -------------------------------------------------------------------------------------------------


def test_random_state_changes_the_split_and_the_heads():
    one, other = (branched(random_state=seed).fit(*TRAIN) for seed in (0, 1))
    assert one.outputs_.labels.tolist() != other.outputs_.labels.tolist()
    assert one.history_ != other.history_


# -- with scikit-learn ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@self_calibrated
def test_grid_search_over_recipe_head_and_exits():
    grid = {"recipe__epochs": [1, 6], "head": [flat_head, "mlp"], "exits": [["one", "two"], ["one"]]}
    search = GridSearchCV(branched(budget=0.25, cost="macs"), grid, cv=2, error_score="raise").fit(*TRAIN)
    scores = {
        (params["recipe__epochs"], params["head"], len(params["exits"])): score
        for params, score in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True)
    }
    assert search.best_params_["head"] is flat_head
    assert scores[6, flat_head, 2] > scores[6, "mlp", 2] > scores[1, "mlp", 2]
    best = clone(branched(budget=0.25)).set_params(**search.best_params_).fit(*TRAIN)
    assert_same_branches(search.best_estimator_, best)
    assert search.score(*TEST) == best.score(*TEST)


@self_calibrated
def test_in_a_pipeline():
    scaled = FunctionTransformer(lambda x: x / 16)
    pipeline = make_pipeline(scaled, branched()).fit(TRAIN[0] * 16, TRAIN[1])
    assert pipeline.predict(TEST[0] * 16).tolist() == branched().fit(*TRAIN).predict(TEST[0]).tolist()


def test_fit_learns_from_clones_of_recipe_and_calibrator():
    recipe, calibrator = FrozenRecipe(epochs=1), ThresholdCalibrator()
    before = dict(vars(recipe))
    branched(recipe=recipe, calibrator=calibrator).fit(*TRAIN)
    assert vars(recipe) == before
    assert not hasattr(calibrator, "frontier_")


# -- round trips ------------------------------------------------------------------------------------------------------


def given_again(fitted, folder, **given):
    fitted.save(folder)
    return adaptexit.load(folder, **given)


@self_calibrated
@pytest.mark.parametrize("head", ["mlp", "conv", "prototype", "refined_prototype"])
def test_heads_by_name_are_written(head, tmp_path):
    fitted = branched(head=head, exits=["two"], recipe=FrozenRecipe(epochs=1)).fit(*TRAIN)
    loaded = given_again(fitted, tmp_path / "model", backbone=branched_net)
    assert config_of(tmp_path / "model")["given_again"] == ["backbone"]
    assert loaded.head == head
    assert_same(fitted, loaded, *TEST)


@self_calibrated
def test_a_wrapped_module(tmp_path):
    fitted = branched(nn.DataParallel(branched_trained())).fit(*TRAIN)
    loaded = given_again(fitted, tmp_path / "model", backbone=nn.DataParallel(branched_net()), head=flat_head)
    assert_same(fitted, loaded, *TEST)


TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 3}


@self_calibrated
def test_a_timm_name_is_written_and_made_without_its_weights(tmp_path, monkeypatch):
    create, requests = timm.create_model, []

    def made(name, pretrained=False):
        requests.append(pretrained)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0 if pretrained else 1)
            overlay = {"input_size": (3, 32, 32), "mean": (0.2, 0.3, 0.4) if pretrained else (0, 0, 0)}
            return create(name, **TINY, pretrained_cfg_overlay=overlay)

    monkeypatch.setattr(timm, "create_model", made)
    X, y = np.random.default_rng(1).random((40, 3, 40, 32), dtype=np.float32), np.arange(40) % 3
    exits = ["blocks.0", "blocks.1"]
    fitted = MultiExitClassifier("vit_tiny_patch16_224", exits, recipe=FrozenRecipe(epochs=2)).fit(X, y)
    assert requests == [True]
    before = random_states()
    loaded = given_again(fitted, tmp_path / "model")
    assert random_states() == before
    assert requests == [True, False]
    assert config_of(tmp_path / "model")["given_again"] == []
    assert loaded.backbone == "vit_tiny_patch16_224"
    assert_same(fitted, loaded, X, y)


@self_calibrated
@pytest.mark.parametrize("backbone", ["mlp", MLPClassifier((8, 8, 8), max_iter=20), MLPClassifier((6,), max_iter=20)])
@pytest.mark.parametrize("names", [np.arange(3), np.array(["setosa", "versicolor", "virginica"])])
def test_tables(tmp_path, backbone, names):
    X, y = IRIS[0], names[IRIS[1]]
    fitted = MultiExitClassifier(backbone, ["hidden.0"], recipe=FrozenRecipe(epochs=2)).fit(X, y)
    written = isinstance(backbone, str)
    loaded = given_again(fitted, tmp_path / "model", **({} if written else {"backbone": clone(backbone)}))
    assert config_of(tmp_path / "model")["given_again"] == ([] if written else ["backbone"])
    assert_same(fitted, loaded, X, y)
    assert loaded.n_features_in_ == 4
    with pytest.raises(ValueError, match="X has 3 features"):
        loaded.predict(X[:, :3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.predict(X)  # its classifier has not seen what the thresholds come from
    assert_same_branches(loaded.calibrate(X, y), fitted.calibrate(X, y))


@self_calibrated
def test_a_fitted_table_model_and_one_of_two_classes(tmp_path):
    X, y = IRIS[0], IRIS[1] // 2
    for dtype in (np.float64, np.float32):
        classifier = MLPClassifier((8, 8), max_iter=20, random_state=0).fit(X.astype(dtype), y)
        fitted = MultiExitClassifier(classifier, ["hidden.0"], recipe=FrozenRecipe(epochs=2)).fit(X.astype(dtype), y)
        loaded = given_again(fitted, tmp_path / "model", backbone=classifier)
        assert_same(fitted, loaded, X.astype(dtype), y)
        with pytest.warns(CalibrationWarning):
            loaded.predict(X)


@self_calibrated
def test_the_flag_of_self_calibration_is_kept(model, saved, tmp_path):
    fitted = branched().fit(*TRAIN)
    loaded = given_again(fitted, tmp_path / "model", backbone=branched_trained(), head=flat_head)
    assert loaded.self_calibrated_ is True
    with pytest.warns(CalibrationWarning):
        loaded.predict(TEST[0])
    again = adaptexit.load(saved, backbone=branched_trained(), head=flat_head)
    assert again.self_calibrated_ is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "max_drop=", CalibrationWarning)  # few samples
        again.predict(TEST[0])
        loaded.calibrate(*VAL).predict(TEST[0])
    assert_same_branches(loaded, model)


# -- what load refuses ------------------------------------------------------------------------------------------------


def wider(spec, n_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * spec.channels, n_classes))


def test_another_head(saved):
    with pytest.raises(ValueError, match=r"(?s)the saved weights do not fit the head at 'one': .*net.2.weight"):
        adaptexit.load(saved, backbone=branched_trained(), head=wider)
    with pytest.raises(ValueError, match=r"(?s)the saved weights do not fit the head at 'one'"):
        adaptexit.load(saved, backbone=branched_trained(), head="mlp")


def test_a_module_where_a_classifier_was_saved(tmp_path):
    mlp = MLPClassifier((8, 8), max_iter=20)
    MultiExitClassifier(mlp, ["hidden.0"], recipe=FrozenRecipe(epochs=1)).fit(*IRIS).save(tmp_path / "model")
    with pytest.raises((ValueError, TypeError), match=r"backbone must be .*MLPClassifier.*got Linear"):
        adaptexit.load(tmp_path / "model", backbone=nn.Linear(4, 3))


@pytest.mark.parametrize("change", ["missing head", "missing weight", "extra head", "extra weight"])
def test_weights_are_strict(scratch, change):
    tensors = safetensors.torch.load_file(scratch / "model.safetensors")
    if change == "missing head":
        tensors = {key: value for key, value in tensors.items() if not key.startswith("heads.1.")}
    elif change == "missing weight":
        del tensors["backbone.out.bias"]
    else:
        tensors["heads.7.net.0.weight" if change == "extra head" else "backbone.new.weight"] = torch.zeros(2)
    safetensors.torch.save_file(tensors, scratch / "model.safetensors")
    sign(scratch)
    with pytest.raises(ValueError, match="do not fit"):
        adaptexit.load(scratch, backbone=branched_trained(), head=flat_head)


def test_other_cuts_in_the_file_are_refused(scratch):
    config = config_of(scratch)
    config["state"]["cuts"][1] = "twice"
    sign(scratch, config)
    with pytest.raises(ValueError, match="has no 'twice'"):
        adaptexit.load(scratch, backbone=branched_trained(), head=flat_head)
