"""What is written is what was fitted, and nothing but it; copies in memory answer alike."""

import copy
import json
import os
import pickle
import stat

import joblib
import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.base import clone
from sklearn.neural_network import MLPClassifier
from torch import nn

import adaptexit
from adaptexit import ThresholdCalibrator
from adaptexit.core.scores import max_proba
from adaptexit.saved_config import FORMAT_VERSION
from tests.contract.cases import (
    ALIKE,
    CASES,
    IMAGES,
    KINDS,
    LEARNED,
    assert_as_before,
    assert_same,
    config_of,
    fitted_once,
    in_turn,
    learned,
    quietly,
    random_states,
    snapshot,
)

pytestmark = pytest.mark.filterwarnings("ignore::adaptexit.SaverWarning")


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path / "model")
    return tmp_path / "model"


def loaded_from(folder, case, model):
    again = case.given_again(model)
    return adaptexit.load(folder, **{name: again[name] for name in config_of(folder)["given_again"]})


# -- round trips ------------------------------------------------------------------------------------------------------


def test_what_is_loaded_is_what_was_saved(case, model, saved):
    assert_same(model, loaded_from(saved, case, model), *case.test)


@pytest.mark.parametrize("way", [lambda m: adaptexit.load, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_shown_as_the_original(way, tmp_path):
    model = fitted_once("two modules")
    model.save(tmp_path)
    loader = way(model)
    other = loader(tmp_path, base=model.base, saver=model.saver) if loader is adaptexit.load else loader
    assert repr(other) == repr(model)


@pytest.mark.parametrize("name", in_turn([*KINDS, *LEARNED, "ztw"]), indirect=True)
def test_a_loaded_one_can_be_calibrated_and_saved_again(case, own, model, saved, tmp_path):
    before = random_states()
    loaded = loaded_from(saved, case, model)
    assert random_states() == before
    quietly(lambda: [estimator.calibrate(*case.train) for estimator in (own, loaded)])
    assert_same(own, loaded, *case.test)
    loaded.save(tmp_path / "again")
    assert_same(loaded, loaded_from(tmp_path / "again", case, loaded), *case.test)


@pytest.mark.parametrize("name", in_turn([*KINDS, *LEARNED, "ztw"]), indirect=True)
def test_a_second_fit_of_a_clone_is_bit_equal(case, model):
    copied = clone(model)
    assert learned(copied) == {}
    assert_same(model, quietly(lambda: copied.fit(*case.train).calibrate(*case.val)), *case.test)


def modules_in(given):
    """The modules among what is given again, by the argument that gives them."""
    flat = [(name, part) for name, entry in given.items() for part in (entry if isinstance(entry, list) else [entry])]
    return [(name, part) for name, part in flat if isinstance(part, nn.Module)]


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("kind", [*IMAGES, "three modules", "stages"])
def test_modules_are_shared_where_they_have_the_weights_and_copied_where_not(kind, same, tmp_path):
    case, model = CASES[kind], fitted_once(kind)
    model.save(tmp_path)
    again = case.given_again(model)
    arguments = {name: again[name] for name in config_of(tmp_path)["given_again"]}
    modules = [module for _, module in modules_in(arguments) if list(module.parameters())]
    for module in modules:
        module.train()
        if not same:
            with torch.no_grad():
                list(module.parameters())[-1].add_(1.0)
    before = [snapshot(module) for module in modules]
    loaded = adaptexit.load(tmp_path, **arguments)
    assert_same(model, loaded, *case.test)
    made_of = {id(p) for part in (*loaded.stages_, *loaded.heads_) for p in part.parameters()}
    for module, known in zip(modules, before, strict=True):
        assert all((id(p) in made_of) is same for p in module.parameters())
        assert_as_before(module, known)


def squared(logits):
    return max_proba(logits, torch) ** 2


def doubled(x):
    return 2 * x


def gap(logits):
    return np.sort(logits, axis=1)[:, -1] - np.sort(logits, axis=1)[:, -2]


@pytest.mark.parametrize("kind", IMAGES)
def test_callables_are_given_again(kind, tmp_path):
    case = CASES[kind]
    preprocess = dict.fromkeys(("base_preprocess", "saver_preprocess") if case.cascade else ["preprocess"], doubled)
    params = {"confidence": squared, "calibrator": ThresholdCalibrator(gap, search="geometric")} | preprocess
    model = case.fitted(**params)
    model.save(tmp_path)
    config = config_of(tmp_path)
    assert params.keys() <= set(config["given_again"])
    assert not params.keys() & config["params"].keys()
    loaded = adaptexit.load(tmp_path, **{name: getattr(model, name) for name in config["given_again"]})
    assert_same(model, loaded, *case.test)


@pytest.mark.parametrize("kind_of", [float, np.float64])
@pytest.mark.parametrize("kind", IMAGES)
def test_parameters_are_the_same(kind, kind_of, tmp_path):
    case, n_exits = CASES[kind], len(fitted_once(kind).exit_names)
    params = {
        "budget": kind_of(0.4),
        "cost": np.linspace(1, 10, n_exits) if kind_of is np.float64 else np.linspace(1, 10, n_exits).tolist(),
        "batch_size": 33, "memory_limit": 1000, "calibration_size": 0.5, "random_state": 5, "device": "cpu",
        "confidence": "margin", "classes": list(range(10)),
        "calibrator": ThresholdCalibrator("entropy", search="geometric", max_drop=0.01, n_points=15, random_state=3),
    }  # fmt: skip
    if kind == "branched":
        params |= {"layout": "NCHW", "cache_half": True, "cache_memory": 0, "cache_dir": str(tmp_path / "cache")}
    model = case.fitted(**params)
    model.save(tmp_path / "model")
    loaded = loaded_from(tmp_path / "model", case, model)
    assert loaded.calibrator.get_params() == params.pop("calibrator").get_params()
    assert np.asarray(loaded.cost).tolist() == np.asarray(params.pop("cost")).tolist()
    assert {name: getattr(loaded, name) for name in params} == params
    assert_same(model, loaded, *case.test)


@pytest.mark.parametrize(
    "classes",
    [list("abcdefghij"), np.array(list("abcdefghij"), dtype=object), np.arange(10) * 10.5, list(range(5, 15))],
)
@pytest.mark.parametrize("kind", IMAGES)
def test_classes_of_every_kind(kind, classes, tmp_path):
    case, labels = CASES[kind], np.asarray(classes)
    model = copy.deepcopy(fitted_once(kind)).set_params(classes=classes)
    model.calibrate(case.val[0], labels[case.val[1]]).save(tmp_path)
    assert_same(model, loaded_from(tmp_path, case, model), case.test[0], labels[case.test[1]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", IMAGES)
def test_modules_of_other_precision(kind, dtype, tmp_path):
    case = CASES[kind]
    estimator, again = case.make(), case.make().get_params(deep=False)
    for _, module in (*modules_in(estimator.get_params(deep=False)), *modules_in(again)):
        module.to(dtype)
    model = quietly(lambda: estimator.fit(*case.train).calibrate(*case.val))
    model.save(tmp_path)
    loaded = adaptexit.load(tmp_path, **{name: again[name] for name in config_of(tmp_path)["given_again"]})
    assert_same(model, loaded, *case.test)
    other = case.given_again(model)
    name, module = modules_in(other)[-1]
    with pytest.raises(ValueError, match=rf"do not fit {name}: .* is {dtype}, the module's torch.float32. Convert"):
        adaptexit.load(tmp_path, **{name: other[name] for name in config_of(tmp_path)["given_again"]})


def through_joblib(model, folder):
    joblib.dump(model, folder / "model.joblib")
    return joblib.load(folder / "model.joblib")


COPIES = {
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "joblib": through_joblib,
    "copy": lambda model, folder: copy.copy(model),
    "deepcopy": lambda model, folder: copy.deepcopy(model),
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=pytest.mark.slow if name in ALIKE else ())
        for name in CASES
        for way in (COPIES if name in KINDS else ["pickle"])
    ],
    indirect=["name"],
)
def test_copies_answer_alike(case, model, way, tmp_path):
    model.predict(case.test[0][:1])
    other = COPIES[way](model, tmp_path)
    assert_same(model, other, *case.test)
    labels = model.predict(case.test[0])
    quietly(lambda: other.calibrate(case.train[0][:300], case.train[1][:300]))
    assert other.outputs_.n_samples == 300
    assert model.predict(case.test[0]).tolist() == labels.tolist()
    assert model.outputs_.n_samples == len(case.val[1])


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
@pytest.mark.parametrize("name", KINDS, indirect=True)
def test_a_copy_shares_no_weights(case, model, way, tmp_path):
    other = COPIES[way](model, tmp_path)
    answers = model.predict_anytime(case.test[0], 1.0).tolist()
    with torch.no_grad():
        for parameter in (*other.stages_.parameters(), *other.heads_.parameters()):
            parameter.zero_()
    if list(other.heads_.parameters()):
        assert len(set(other.predict_anytime(case.test[0], 1.0))) == 1
    assert model.predict_anytime(case.test[0], 1.0).tolist() == answers


# -- what is written --------------------------------------------------------------------------------------------------


def test_the_config_is_strict_and_names_what_it_cannot_hold(case, model, saved):
    config = config_of(saved)
    assert config["format"] == FORMAT_VERSION == 3
    assert config["class"] == type(model).__name__
    written, again = set(config["params"]), set(config["given_again"])
    assert not written & again
    assert written | again == set(model.get_params(deep=False))


def test_the_files(model, saved):
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    own = {name for name in files if not name.startswith(("calibration/", "training/"))}
    assert own == {"config.json", "model.safetensors"}
    arrays = {f"calibration/{name}.npy" for name in ("exit_costs", "labels", "predictions", "scores", "stage_costs")}
    assert files >= arrays | {"calibration/outputs.json"}
    assert any(name.startswith("training/") for name in files) == (
        getattr(model, "training_outputs_", None) is not None
    )
    for path in saved.rglob("*.npy"):
        assert b"'O'" not in path.read_bytes()[:128]


def test_weights_are_written_as_they_are(case, model, saved):
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    for module in (*model.stages_, *model.heads_):
        for value in module.state_dict().values():
            assert any(value.shape == tensor.shape and torch.equal(value, tensor) for tensor in tensors.values())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
@pytest.mark.parametrize("name", KINDS, indirect=True)
def test_files_are_readable_by_those_whom_the_umask_allows(model, tmp_path, umask):
    before = os.umask(umask)
    try:
        model.save(tmp_path / "model")
    finally:
        os.umask(before)
    for path in (tmp_path / "model", *(tmp_path / "model").rglob("*")):
        allowed = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == allowed & ~umask, path


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_pickled(kind, tmp_path, monkeypatch):
    case, model = CASES[kind], fitted_once(kind)
    again = case.given_again(model)

    def forbidden(*args, **kwargs):
        raise AssertionError("pickle was used")

    class Forbidden:
        def __init__(self, *args, **kwargs):
            forbidden()

    for name in ("dump", "dumps", "load", "loads"):
        monkeypatch.setattr(pickle, name, forbidden)
    for name in ("Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, Forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(torch, "save", forbidden)
    model.save(tmp_path / "model")
    loaded = adaptexit.load(
        tmp_path / "model", **{name: again[name] for name in config_of(tmp_path / "model")["given_again"]}
    )
    assert loaded.predict(case.test[0]).tolist() == model.predict(case.test[0]).tolist()


def test_saving_changes_nothing(model, tmp_path):
    before = dict(vars(model))
    model.save(tmp_path / "new" / "model")
    assert vars(model).keys() == before.keys()
    assert all(vars(model)[name] is value for name, value in before.items())


# -- what load refuses ------------------------------------------------------------------------------------------------


def test_what_is_lacking_or_too_much_is_named(case, model, saved):
    again = case.given_again(model)
    needed = config_of(saved)["given_again"]
    arguments = {name: again[name] for name in needed}
    if needed:
        names = ", ".join(f"{name}=" for name in needed)
        with pytest.raises(ValueError, match=rf"^{names} could not be written and must be given to load again"):
            adaptexit.load(saved)
        with pytest.raises(ValueError, match=rf"^{needed[0]}= could not be written.*\(in all: {', '.join(needed)}\)"):
            adaptexit.load(saved, **{name: arguments[name] for name in needed[1:]})
    with pytest.raises(ValueError, match=r"^batch_size, budget cannot be given to load: they are stored"):
        adaptexit.load(saved, **arguments, budget=0.3, batch_size=3)
    with pytest.raises(ValueError, match=r"^bas cannot be given to load"):
        adaptexit.load(saved, **arguments, bas=1)


@pytest.mark.parametrize("name", KINDS, indirect=True)
def test_the_method_of_the_class(case, model, saved):
    again = case.given_again(model)
    arguments = {name: again[name] for name in config_of(saved)["given_again"]}
    assert_same(model, type(model).load(saved, **arguments), *case.test)
    other = adaptexit.MultiExitClassifier if case.cascade else adaptexit.CascadeSaver
    with pytest.raises(ValueError, match=rf"folder must hold a {other.__name__}; .* holds a {type(model).__name__}"):
        other.load(saved, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_another_format_is_refused(kind, tmp_path):
    fitted_once(kind).save(tmp_path)
    config = config_of(tmp_path)
    for version in (0, 2, 4, None, "3", True, 3.5):
        (tmp_path / "config.json").write_text(json.dumps(config | {"format": version}))
        says = rf"config.json has format {version!r}; this version reads format 3\. Read it with the version that wrote"
        with pytest.raises(ValueError, match=says):
            adaptexit.load(tmp_path)


def test_another_kind_of_model_is_refused(case, model, saved):
    again = case.given_again(model)
    needed = config_of(saved)["given_again"]
    if not needed:
        pytest.skip("it is written by its name")
    arguments = {name: again[name] for name in needed}
    wrong = torch.nn.Linear(64, 10) if case.table else MLPClassifier()
    kind = "fitted scikit-learn classifier" if case.table else "module"
    name = "backbone" if "backbone" in needed else "base"
    with pytest.raises(
        (ValueError, TypeError), match=rf"{name} must be the {kind} that was saved; got {type(wrong).__name__}"
    ):
        adaptexit.load(saved, **arguments | {name: wrong})


def narrowed(module):
    """The module with an output less, and the name of the first weight that no longer fits."""
    name, last = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear)][-1]
    last.weight, last.bias = nn.Parameter(last.weight[:-1]), nn.Parameter(last.bias[:-1])
    return module, f"{name}.weight"


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("change", [narrowed, lambda module: (nn.Sequential(module), "0.")])
def test_weights_that_do_not_fit_name_the_key(kind, change, tmp_path):
    model = fitted_once(kind)
    model.save(tmp_path)
    again = CASES[kind].given_again(model)
    name, module = modules_in(again)[0]
    changed, key = change(module)
    arguments = {name: again[name] for name in config_of(tmp_path)["given_again"]}
    for other in (changed, lambda: changed):
        with pytest.raises(ValueError, match=rf"(?s)the saved weights do not fit {name}: .*{key}"):
            adaptexit.load(tmp_path, **arguments | {name: other})
