import copy

import numpy as np
import pytest
import timm
import torch
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier
from timm.models import save_for_hf
from torch import nn

import adaptexit
from adaptexit import CascadeSaver
from tests.contract.cases import assert_same, config_of, sign
from tests.nets import (
    digits,
    large_trained,
    middle_trained,
    small_trained,
)

TRAIN, VAL, TEST = digits()
saver_may_not_pay = pytest.mark.filterwarnings("ignore::adaptexit.SaverWarning")


@pytest.fixture(scope="module")
def cascade():
    return CascadeSaver(large_trained(), small_trained()).fit(*VAL)


@pytest.fixture(scope="module")
def saved(cascade, tmp_path_factory):
    """A folder that tests only read."""
    folder = tmp_path_factory.mktemp("saved") / "cascade"
    cascade.save(folder)
    return folder


@pytest.fixture
def scratch(cascade, tmp_path):
    """A folder that a test may spoil."""
    cascade.save(tmp_path / "cascade")
    return tmp_path / "cascade"


# -- round trips ------------------------------------------------------------------------------------------------------


@saver_may_not_pay
def test_timm_names_are_written_and_made_without_their_weights(tmp_path, monkeypatch):
    def named(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = timm.create_model("test_efficientnet", num_classes=3)
            nn.init.normal_(net.classifier.weight)
        save_for_hf(net, tmp_path / f"net{seed}")
        return f"local-dir:{tmp_path / f'net{seed}'}"

    images = np.random.default_rng(0).random((12, 3, 80, 80), dtype=np.float32)
    labels = np.arange(12) % 3
    fitted = CascadeSaver(named(0), named(1), cost=[1, 10]).fit(images, labels)
    fitted.save(tmp_path / "cascade")
    config = config_of(tmp_path / "cascade")
    assert config["given_again"] == []
    assert config["params"]["base"] == f"local-dir:{tmp_path / 'net0'}"

    pretrained = []
    create = timm.create_model

    def watched(*args, **kwargs):
        pretrained.append(kwargs.get("pretrained"))
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", watched)
    loaded = adaptexit.load(tmp_path / "cascade")
    assert pretrained == [False, False]
    assert_same(fitted, loaded, images, labels)
    sizes = []
    loaded.heads_[1].register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[-2:]))
    loaded.predict_anytime(images, 1.0)
    assert sizes == [(160, 160)]


@saver_may_not_pay
def test_timm_preprocessing_is_that_of_the_saved_cascade(tmp_path):
    def network(mean):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return timm.create_model("test_efficientnet", num_classes=3, pretrained_cfg_overlay={"mean": mean}).eval()

    images = np.random.default_rng(0).random((9, 3, 160, 160), dtype=np.float32)
    labels = np.arange(9) % 3
    models = [network((0.1, 0.2, 0.3)), network((0.3, 0.2, 0.1))]
    fitted = CascadeSaver(*models, cost=[1, 10]).fit(images, labels)
    fitted.save(tmp_path / "cascade")
    loaded = adaptexit.load(tmp_path / "cascade", base=network((0.5, 0.5, 0.5)), saver=network((0.5, 0.5, 0.5)))
    for budget in (0.1, 1.0):
        assert loaded.predict_proba(images, budget).tobytes() == fitted.predict_proba(images, budget).tobytes()


def test_classifiers_given_again(tmp_path):
    X, y = load_iris(return_X_y=True, as_frame=True)
    y = np.array(["setosa", "versicolor", "virginica"])[y]
    base = LogisticRegression(max_iter=1000).fit(X.to_numpy(), y)
    saver = DecisionTreeClassifier(max_depth=2, random_state=0).fit(X.to_numpy(), y)
    fitted = CascadeSaver(base, saver, cost=[1, 10]).fit(X, y)
    fitted.save(tmp_path / "cascade")
    loaded = adaptexit.load(tmp_path / "cascade", base=base, saver=FrozenEstimator(saver))
    assert_same(fitted, loaded, X, y)
    assert loaded.n_features_in_ == 4
    assert loaded.feature_names_in_.tolist() == list(X.columns)
    with pytest.raises(NotFittedError):
        adaptexit.load(tmp_path / "cascade", base=LogisticRegression(), saver=saver)
    with pytest.raises(ValueError, match="base must be the fitted scikit-learn classifier that was saved; got Linear"):
        adaptexit.load(tmp_path / "cascade", base=nn.Linear(4, 3), saver=saver)


def test_shared_and_views_of_weights(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10))
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    net[3].weight = net[1].weight
    net[1].bias.data = torch.zeros(128)[::2]
    fitted = CascadeSaver(large_trained(), net, cost=[1, 10])
    with pytest.warns(adaptexit.SaverWarning):
        fitted.fit(*VAL)
    fitted.save(tmp_path / "cascade")
    assert_same(fitted, adaptexit.load(tmp_path / "cascade", base=large_trained(), saver=copy.deepcopy(net)), *TEST)


# -- what is written --------------------------------------------------------------------------------------------------


def test_parameters_that_json_cannot_hold_are_given_again(cascade, tmp_path):
    other = copy.copy(cascade).set_params(memory_limit=float("inf"), cost="macs")
    other.save(tmp_path / "cascade")
    config = config_of(tmp_path / "cascade")
    assert config["given_again"] == ["base", "memory_limit", "saver"]
    assert "memory_limit" not in config["params"]


def test_an_object_array_is_refused(scratch):
    np.save(scratch / "calibration" / "scores.npy", np.array([{}, None], dtype=object), allow_pickle=True)
    sign(scratch)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        adaptexit.load(scratch, base=large_trained(), saver=small_trained())


# -- arguments of load ------------------------------------------------------------------------------------------------


def test_another_number_of_savers(saved):
    with pytest.raises(ValueError, match="saver must be the 1 that were saved; got 2"):
        adaptexit.load(saved, base=large_trained(), saver=[small_trained(), middle_trained()])


# -- folders that cannot be read --------------------------------------------------------------------------------------


def load_again(folder):
    return adaptexit.load(folder, base=large_trained(), saver=small_trained())


def test_a_folder_that_is_no_save(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=r"folder must hold an estimator written by save; there is no conf"):
            adaptexit.load(folder)


@pytest.mark.parametrize("name", ["MultiHead", "os.system", "ExitOutputs", "ThresholdCalibrator"])
def test_a_class_outside_the_registry(scratch, name):
    sign(scratch, config_of(scratch) | {"class": name})
    with pytest.raises(ValueError, match=rf"the folder holds a '{name}'; this version knows \['CascadeSaver', 'Multi"):
        load_again(scratch)


def test_the_method_of_another_class(scratch):
    class Derived(CascadeSaver):
        pass

    with pytest.raises(ValueError, match=r"folder must hold a Derived; .* holds a CascadeSaver"):
        Derived.load(scratch, base=large_trained(), saver=small_trained())


@pytest.mark.parametrize("part", ["model.safetensors", "calibration/scores.npy", "calibration/outputs.json"])
def test_missing_files(scratch, part):
    (scratch / part).unlink()
    with pytest.raises(FileNotFoundError):
        load_again(scratch)


# -- saving -----------------------------------------------------------------------------------------------------------


def test_a_subclass_is_not_saved_under_its_parents_name(tmp_path):
    class Derived(CascadeSaver):
        pass

    fitted = Derived(large_trained(), small_trained()).fit(*VAL)
    with pytest.raises(TypeError, match=r"save knows \['AutoRecipe', .*\]; got Derived"):
        fitted.save(tmp_path / "cascade")
    assert not (tmp_path / "cascade").exists()


def test_a_save_replaces_an_earlier_one(scratch):
    other = CascadeSaver(large_trained(), middle_trained()).fit(*VAL)
    other.save(scratch)
    assert_same(other, adaptexit.load(scratch, base=large_trained(), saver=middle_trained()), *TEST)


@pytest.mark.parametrize("step", ["config", "weights", "calibration"])
def test_a_failure_while_saving_leaves_the_earlier_save(cascade, scratch, monkeypatch, step):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    before = {path.name: path.read_bytes() for path in scratch.rglob("*") if path.is_file()}
    other = CascadeSaver(large_trained(), middle_trained()).fit(*VAL)
    if step == "config":
        monkeypatch.setattr("pathlib.Path.write_text", full)
    elif step == "weights":
        monkeypatch.setattr("adaptexit.persistence.save_file", full)
    else:
        monkeypatch.setattr("adaptexit.core.outputs.np.save", full)
    with pytest.raises(OSError, match="no space left"):
        other.save(scratch)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in scratch.rglob("*") if path.is_file()} == before
    assert [path.name for path in scratch.parent.iterdir()] == [scratch.name]
    assert_same(cascade, load_again(scratch), *TEST)


def test_a_folder_with_something_else_is_not_overwritten(cascade, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="folder must be new, empty or an earlier save"):
        cascade.save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
