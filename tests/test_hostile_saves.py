"""Saves that somebody made up, with checksums that are right: nothing but a clear refusal comes of them."""

import copy
import json
import os
import shutil
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import adaptexit
from adaptexit import ExitOutputs
from adaptexit.utils.schema import check_form, whole
from tests.contract.cases import CASES, config_of, fitted_once, sign

NAMES = ["two modules", "EENet", "branched, EM routers", "ztw", "native", "perceptron"]


@pytest.fixture
def save_of(tmp_path):
    """A function that gives a save of one of the cases, to be spoilt."""

    def save(name):
        fitted_once(name).save(tmp_path / "model")
        return tmp_path / "model"

    return save


def load(folder, name):
    return adaptexit.load(folder, **CASES[name].needed_again(fitted_once(name), config_of(folder)))


def changed(config, path, value):
    """The config with the value at a path exchanged."""
    config = copy.deepcopy(config)
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return config


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_modules_only(monkeypatch):
    """Making a large layer fails."""
    make = nn.Linear.__init__

    def checked(self, in_features, out_features, *args, **kwargs):
        assert in_features * out_features < 1e6, (in_features, out_features)
        make(self, in_features, out_features, *args, **kwargs)

    monkeypatch.setattr(nn.Linear, "__init__", checked)


SIZES = {
    "widths": (
        "perceptron",
        ["state", "mlp", "widths"],
        [64, 40000, 40000, 64, 64],
        r"do not fit the widths \[64, 4000",
    ),
    "classes of a perceptron": ("perceptron", ["state", "mlp", "n_classes"], 40000, "output.weight must be"),
    "features": ("branched", ["state", "features", 0, "shape"], [40000, 8, 8], "must give the features and logits"),
    "scorers": (
        "EENet",
        ["state", "calibrator", "n_classes"],
        10**9,
        "calibrator.n_classes must be a whole num",
    ),
    "n_scorers": ("EENet", ["state", "calibrator", "n_scorers"], 10**9, "calibrator.n_scorers must be a whole number"),
    "routers": ("EM routers", ["state", "calibrator", "n_routers"], 10**9, "calibrator.n_routers must be a whole num"),
    "labels": ("branched", ["state", "classes_dtype"], "<U200000000", "classes_dtype must be that of labels"),
    "classes": ("branched", ["state", "classes"], list(range(9999)), "classes must be the 10 different ones"),
}


@pytest.mark.parametrize("what", SIZES)
def test_sizes_are_compared_before_anything_is_made(save_of, what, small_modules_only):
    name, path, value, says = SIZES[what]
    folder = save_of(name)
    sign(folder, changed(config_of(folder), path, value))
    with pytest.raises(ValueError, match=rf"(?s){says}.*{folder}|{folder}.*{says}"):
        load(folder, name)


def test_an_array_that_claims_more_than_its_file_holds_is_not_made(save_of):
    folder = save_of("two modules")
    path = folder / "calibration" / "scores.npy"
    for shape in ((99_999, 99_999), (10**30, 0, 10**30), (-1, 5), (3,)):
        with open(path, "wb") as file:
            header = {"descr": "<f8", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(b"0" * 80)
        sign(folder)
        with pytest.raises(ValueError, match=r"scores.npy cannot be read: an array of shape .* which the file has not"):
            load(folder, "two modules")


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../other/labels", "/etc/passwd", "..", "scores.npy/../labels", "Scores", ""])
def test_no_path_leads_out_of_the_folder(save_of, name):
    folder = save_of("two modules")
    header = json.loads((folder / "calibration" / "outputs.json").read_text())
    (folder / "calibration" / "outputs.json").write_text(json.dumps(header | {"arrays": [*header["arrays"], name]}))
    sign(folder)
    with pytest.raises(ValueError, match=r"calibration/outputs.json .*must be the name of an array of outputs; got"):
        load(folder, "two modules")
    with pytest.raises(ValueError, match=r"outputs.json .*must be the name of an array of outputs; got"):
        ExitOutputs.load(folder / "calibration")
    folder = save_of("two modules")
    config = config_of(folder)
    config["files"][name] = "0" * 64
    write_unchecked(folder, config)
    with pytest.raises(ValueError, match=r"config.json cannot be read: files must have names that save gives; got"):
        load(folder, "two modules")


def write_unchecked(folder, config):
    """As ``sign``, the files left as the config names them."""
    from adaptexit.saved_config import UNSIGNED, with_checksum

    (folder / "config.json").write_text(with_checksum(json.dumps(config | {"sha256": UNSIGNED})))


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "calibration/outputs.json", "calibration/scores.npy"]
)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused_at_once(save_of, file, kind):
    folder = save_of("two modules")
    again = CASES["two modules"].needed_again(fitted_once("two modules"), config_of(folder))
    path = folder / file
    path.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}[kind](path)
    with pytest.raises(ValueError, match=f"{path} must be a regular file; it is something else"):
        adaptexit.load(folder, **again)
    if file.startswith("calibration"):
        with pytest.raises(ValueError, match=f"{path} must be a regular file"):
            ExitOutputs.load(folder / "calibration")


def test_links_to_files_are_followed(save_of, tmp_path):
    """As stores of files by their content give them."""
    folder = save_of("two modules")
    for file in ("config.json", "model.safetensors"):
        shutil.move(folder / file, tmp_path / file)
        (folder / file).symlink_to(tmp_path / file)
    loaded, X = load(folder, "two modules"), CASES["two modules"].test[0]
    assert loaded.predict_proba(X).tobytes() == fitted_once("two modules").predict_proba(X).tobytes()


# -- values ------------------------------------------------------------------------------------------------------------

MADE_UP = {
    "a method": (["state", "table", "predict"], 1, r"state.table must have nothing but .*; it has predict"),
    "a private name": (["state", "table"], {"_network": None}, "it has _network"),
    "a point before the first": (["state", "calibrator", "point_in_use"], -1, "point_in_use must be a whole number"),
    "a point behind the last": (["state", "calibrator", "point_in_use"], 999, "point_in_use must be .* at most"),
    "a point that is a switch": (["state", "calibrator", "point_in_use"], True, "point_in_use must be a whole number"),
    "other samples": (["state", "calibrator", "frontier", "n_samples"], 3, "outputs must be the 3 calibrated on; got"),
    "a search": (["state", "calibrator", "search_report", "search"], "magic", "search must be 'smoothed' or 'exact'"),
    "a kind of model": (["state", "models", 0, "kind"], "pickle", r"models\[0\].kind must be 'torch' or"),
    "a parameter": (["params", "hook"], "os.system", r"must be parameters of CascadeSaver, .*; got \['hook'\]"),
    "twice": (["params", "base"], "resnet18", r"must be parameters of CascadeSaver, each once: .*; got \['base'\]"),
    "a calibrator": (["params", "calibrator"], {"class": "os", "params": {}}, "params.calibrator holds a 'os'"),
    "its parameter": (
        ["params", "calibrator"],
        {"class": "ThresholdCalibrator", "params": {"hook": 1}},
        "params.calibrator must be parameters of ThresholdCalibrator",
    ),
    "a recipe": (
        ["params", "calibrator"], {"class": "FrozenRecipe", "params": {}}, "calibrator must be a Calibrator; got Froz"
    ),
    "a dtype": (["state", "classes_dtype"], "i4,i4", "classes_dtype must be that of labels"),
    "no dtype": (["state", "classes_dtype"], "labels", "'labels'"),
    "the same class twice": (["state", "classes"], [0] * 10, "10 different ones of the calibration outputs; got 10, 1"),
    "a file too few": (["files"], {"model.safetensors": "0" * 64}, "files must have calibration/outputs.json"),
    "no checksum": (["files", "model.safetensors"], "", "must be a checksum of 64 hexadecimal digits"),
    "reports": (["state", "saver_reports"], [{"saver": 0}], r"saver_reports\[0\] must have delta_cost, job_ratio"),
    "a list": (["state"], [], "config.state must be an object; got"),
}  # fmt: skip


@pytest.mark.parametrize("what", MADE_UP)
def test_values_that_no_save_writes_are_refused(save_of, what):
    path, value, says = MADE_UP[what]
    folder = save_of("two modules")
    again = CASES["two modules"].needed_again(fitted_once("two modules"), config_of(folder))
    write_unchecked(folder, changed(config_of(folder), path, value))
    with pytest.raises((ValueError, TypeError), match=says) as caught:
        adaptexit.load(folder, **again)
    assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff\xfe{", b"{}", b"[]", b"", b'{"format": 3', b'{"format": NaN}'])
def test_configs_that_are_none(save_of, text):
    folder = save_of("two modules")
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"{folder / 'config.json'} (cannot be read|has format None)"):
        adaptexit.load(folder, base=None, saver=None)


ARRAYS = {
    "NaN": ("two modules", "calibrator.cutoffs", lambda a: a * np.nan, "array cutoffs must be finite or inf"),
    "no last row": ("two modules", "calibrator.cutoffs", lambda a: np.ones_like(a), "array cutoffs must end in -inf"),
    "one row": ("two modules", "calibrator.cutoffs", lambda a: a[0], r"array cutoffs must have shape"),
    "integers": ("two modules", "calibrator.cost", lambda a: a.astype(int), "array cost must hold floats; got dtype"),
    "negative": ("two modules", "calibrator.cost", lambda a: -a, "must not be negative"),
    "infinite": ("two modules", "calibrator.accuracy", lambda a: a + np.inf, "array accuracy must be finite"),
    "too few": ("two modules", "calibrator.thresholds", lambda a: a[:-1], r"array thresholds must have shape"),
    "gone": ("two modules", "calibrator.exit_rates", lambda a: None, "array exit_rates is missing"),
    "router": ("EM routers", "calibrator.router_0.net.0.weight", lambda a: a * np.nan, "net.0.weight must be finite"),
    "no router": ("EM routers", "calibrator.router_0.net.0.weight", lambda a: None, "net.0.weight is missing"),
    "other router": ("EM routers", "calibrator.router_0.mean", lambda a: a[:-1], "router_0.mean must have shape"),
    "shares": ("EENet", "calibrator.shares", lambda a: a[:-1], r"array shares must have shape \(3,\)"),
    "scorer": ("EENet", "calibrator.scorer_1.net.weight", lambda a: a[:, :-1], "scorer_1.net.weight must have shape"),
    "precision": ("ztw", "calibrator.precision", lambda a: a[:-1], r"array precision must have shape \(10,\)"),
    "example": ("branched", "example", lambda a: None, "must hold an example of the inputs"),
    "small example": ("branched", "example", lambda a: a[:, :, :1, :1], "features and logits that were saved"),
    "flat example": ("branched", "example", lambda a: a.reshape(len(a), -1), ""),
}


@pytest.mark.parametrize("what", ARRAYS)
def test_learned_values_are_checked(save_of, what):
    name, key, change, says = ARRAYS[what]
    folder = save_of(name)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    array = change(tensors.pop(key).numpy())
    tensors |= {} if array is None else {key: torch.from_numpy(np.ascontiguousarray(array))}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    sign(folder)
    with pytest.raises(ValueError, match=rf"(?s){says}.*{folder}"):
        load(folder, name)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("change", ["no scores", "no labels", "too few features", "text", "flat logits", "no key"])
def test_outputs_that_no_save_writes_are_refused(tmp_path, change, mmap):
    logits = np.random.default_rng(0).normal(size=(2, 5, 3))
    outputs = ExitOutputs.from_logits(logits, np.arange(5) % 3, costs=[1, 2], features=[logits[0], logits[1]])
    outputs.save(tmp_path)
    header = json.loads((tmp_path / "outputs.json").read_text())
    gone = {"no scores": "scores", "no labels": "labels", "too few features": "features_1"}.get(change)
    if change == "no key":
        del header["chained"]
    elif change == "text":
        np.save(tmp_path / "labels.npy", np.full(5, "a"))
    elif change == "flat logits":
        np.save(tmp_path / "logits.npy", logits[0])
    header["arrays"] = [name for name in header["arrays"] if name != gone]
    (tmp_path / "outputs.json").write_text(json.dumps(header))
    says = {
        "text": r"labels.npy .*must be numbers; got dtype <U1",
        "flat logits": r"logits.npy .*must have shape \(2, 5, 3\)",
        "no key": r"outputs.json .*header must have chained",
    }.get(change, r"must hold .*; its header names")
    with pytest.raises(ValueError, match=rf"{tmp_path}.*{says}"):
        ExitOutputs.load(tmp_path, mmap=mmap)


# -- anything ----------------------------------------------------------------------------------------------------------

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([2**31, 10**12, -(10**30)]), st.floats(),
    st.text(max_size=3), st.sampled_from(["../x", "auto", "<f8", "torch", "NC", "x" * 99]), st.just([]), st.just({}),
    st.lists(st.integers(-1, 2), max_size=3), st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)  # fmt: skip


def places_in(value, path=()):
    """All paths in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*path, key)
        yield from places_in(part, (*path, key))


@st.composite
def spoilt(draw, value):
    """A JSON value with some places exchanged, taken out, given twice or under another name."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places_in(value))
        if not paths:
            break
        *path, key = draw(st.sampled_from(paths))
        place = value
        for step in path:
            place = place[step]
        how = draw(st.sampled_from(["exchange", "exchange", "remove", "rename", "wrap", "other"]))
        if how == "exchange":
            place[key] = draw(ODD)
        elif how == "remove":
            del place[key]
        elif how == "wrap":
            place[key] = draw(st.sampled_from([[place[key]], {"class": place[key]}, str(place[key])]))
        elif how == "other":
            other = value
            for step in draw(st.sampled_from(paths)):
                other = other[step] if isinstance(other, (dict, list)) and step in _keys(other) else other
            place[key] = copy.deepcopy(other)
        elif isinstance(place, dict):
            place[draw(st.text(max_size=5))] = place.pop(key)
        else:
            place.append(draw(ODD))
    return value


def _keys(value):
    return value if isinstance(value, dict) else range(len(value))


@st.composite
def spoilt_tensors(draw, tensors):
    """Tensors with some taken out, renamed, of other shapes, types or values."""
    tensors = dict(tensors)
    for _ in range(draw(st.integers(1, 2))):
        key = draw(st.sampled_from(sorted(tensors)))
        tensor = tensors.pop(key)
        change = draw(
            st.sampled_from(["gone", "renamed", "flat", "shorter", "empty", "NaN", "type", "scalar", "swapped"])
        )
        if change == "renamed":
            tensors[draw(st.sampled_from([key + "x", "heads.9.x", "calibrator.", "models.7.x"]))] = tensor
        elif change == "swapped":
            other = draw(st.sampled_from(sorted(tensors)))
            tensors[key], tensors[other] = tensors[other], tensor
        elif change == "type":
            tensors[key] = tensor.to(draw(st.sampled_from([torch.bfloat16, torch.int8, torch.float64, torch.bool])))
        elif change != "gone":
            tensors[key] = {
                "flat": tensor.reshape(-1), "shorter": tensor[:-1] if tensor.ndim else tensor, "empty": tensor[:0]
                if tensor.ndim else tensor, "NaN": tensor * float("nan"), "scalar": tensor.sum(),
            }[change]  # fmt: skip
    return {key: tensor.clone().contiguous() for key, tensor in tensors.items()}


def refusal_of(call):
    """The error of a call, if it is one of those that a user may be told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except (ValueError, TypeError, OSError) as error:
            return error
    return None


def fuzz(name, tmp_path_factory, data):
    original = tmp_path_factory.getbasetemp() / f"fuzz {name}"
    if not original.exists():
        fitted_once(name).save(original)
    folder = tmp_path_factory.mktemp("spoilt") / "model"
    shutil.copytree(original, folder)
    try:
        part = data.draw(st.sampled_from(["config", "config", "tensors", "outputs", "array"]))
        config = config_of(original)
        if part == "config":
            body = {key: value for key, value in config.items() if key not in ("sha256", "files", "format")}
            sign(folder, config | data.draw(spoilt(body)))
        elif part == "tensors":
            tensors = safetensors.torch.load_file(folder / "model.safetensors")
            safetensors.torch.save_file(data.draw(spoilt_tensors(tensors)), folder / "model.safetensors")
            sign(folder)
        elif part == "outputs":
            path = folder / "calibration" / "outputs.json"
            path.write_text(json.dumps(data.draw(spoilt(json.loads(path.read_text())))))
            sign(folder)
        else:
            path = data.draw(st.sampled_from(sorted(folder.rglob("*.npy"))))
            content = bytearray(path.read_bytes())
            for _ in range(data.draw(st.integers(1, 4))):
                content[data.draw(st.integers(0, min(len(content) - 1, 140)))] = data.draw(st.integers(0, 255))
            path.write_bytes(content)
            sign(folder)
        again = CASES[name].needed_again(fitted_once(name), config)
        error = refusal_of(lambda: adaptexit.load(folder, **again))
        assert error is None or str(folder) in str(error) or "given to load" in str(error), repr(error)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", NAMES)
@settings(suppress_health_check=list(HealthCheck), max_examples=6)
@given(data=st.data())
def test_whatever_was_changed_is_refused_with_the_files_name(name, tmp_path_factory, data):
    fuzz(name, tmp_path_factory, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@settings(suppress_health_check=list(HealthCheck), max_examples=30)
@given(data=st.data())
def test_many_changes_are_refused_with_the_files_name(name, tmp_path_factory, data):
    fuzz(name, tmp_path_factory, data)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CASES)
@settings(suppress_health_check=list(HealthCheck), max_examples=500)
@given(data=st.data())
def test_hundreds_of_changes_are_refused_with_the_files_name(name, tmp_path_factory, data):
    fuzz(name, tmp_path_factory, data)


# -- descriptions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "form", "says"),
    [
        (1.0, int, "x must be a whole number; got 1.0"),
        (True, int, "x must be a whole number; got True"),
        (True, float, "x must be a number; got True"),
        (0, False, "x must be False; got 0"),
        (1, 1.0, "x must be 1.0; got 1"),
        ("b", ("a", None), "x must be 'a' or null; got 'b'"),
        ([1, "a"], [int], r"x\[1\] must be a whole number; got 'a'"),
        ({"a": 1}, [int], "x must be a list"),
        ([], {"a": int}, "x must be an object with a; got"),
        ({}, {"a": int}, "x must have a; it has not"),
        ({"a": 1, "b": 1}, {"a": int, "c?": int}, r"x must have nothing but a, c\?; it has b"),
        ({"c": "1"}, {"c?": int}, "x.c must be a whole number"),
        ({"c?": 1}, {"c?": int}, r"it has c\?"),
        ({"z": "1"}, {"*": int}, "x.z must be a whole number"),
        (3, whole(0, 2), "x must be a whole number, at least 0 and at most 2; got 3"),
        ("y" * 999, int, "got 'y{79} ...$|got 'y+ [.]{3}"),
    ],
)
def test_values_of_another_form_are_refused(value, form, says):
    with pytest.raises(ValueError, match=says):
        check_form(value, form, "x")


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (1, float), (1.5, float), (None, None), ({"a": [1, 2], "z": 1}, {"a": [int], "*": object}), ({}, {"a?": int}),
        ([], [int]), ("a", ("b", "a")), (2, whole(0, 2)), ({"b": None}, {"b": (None, {"c": int})}),
    ],
)  # fmt: skip
def test_values_of_the_form_are_taken(value, form):
    check_form(value, form, "x")
