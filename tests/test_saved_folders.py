"""What may lie where an estimator is saved, and what a save that is killed or damaged leaves."""

import copy
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import adaptexit
from adaptexit import ExitOutputs
from tests.contract.cases import CASES, assert_same, config_of, fitted_once

ROOT = Path(adaptexit.__file__).parents[1]
KINDS = ["two modules", "branched, EM routers"]


def tree(folder):
    """Everything below a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(params=KINDS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return fitted_once(name)


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path / "model")
    return tmp_path / "model"


def loaded_from(folder, name, config=None):
    return adaptexit.load(folder, **CASES[name].needed_again(fitted_once(name), config or config_of(folder)))


# -- what is in the way of a save -------------------------------------------------------------------------------------


def hugging_face(here):
    (here / "config.json").write_text(json.dumps({"architectures": ["ViTModel"], "model_type": "vit"}))
    (here / "model.safetensors").write_bytes(b"weights")


def project(here):
    (here / "config.json").write_text(json.dumps({"class": "CascadeSaver", "format": "2"}))
    (here / ".git").mkdir()
    (here / ".git" / "HEAD").write_text("ref: refs/heads/main")


def own(**changes):
    """A save, its config changed."""

    def write(here):
        fitted_once(KINDS[0]).save(here)
        (here / "config.json").write_text(json.dumps(config_of(here) | changes))

    return write


def with_notes(here):
    fitted_once(KINDS[0]).save(here)
    (here / "calibration" / "notes.txt").write_text("weeks of work")


IN_THE_WAY = {
    "a model of transformers": (hugging_face, "a config.json of another kind"),
    "a project": (project, "a config.json of another kind"),
    "a list": (lambda here: (here / "config.json").write_text("[]"), "a config.json of another kind"),
    "a save with notes": (with_notes, "something else: calibration/notes.txt"),
    "another class": (own(**{"class": "ThresholdCalibrator"}), "a config.json of another kind"),
    "a class that is none": (own(**{"class": ["CascadeSaver"]}), "a config.json of another kind"),
    "a later format": (own(format=4), "a config.json of another kind"),
}


@pytest.mark.parametrize("what", IN_THE_WAY)
@pytest.mark.parametrize("inside", [False, True])
def test_nothing_but_an_earlier_save_is_replaced(tmp_path, monkeypatch, what, inside):
    write, says = IN_THE_WAY[what]
    here = tmp_path / "here"
    here.mkdir()
    write(here)
    before = tree(tmp_path)
    if inside:
        monkeypatch.chdir(here)
    with pytest.raises(FileExistsError, match=rf"folder must be new, empty or an earlier save .*{says}.* Nothing was"):
        fitted_once(KINDS[0]).save("." if inside else here)
    assert tree(tmp_path) == before


def test_the_folder_worked_in_is_no_place_for_a_save(saved, model, monkeypatch):
    monkeypatch.chdir(saved)
    before = tree(saved)
    with pytest.raises(FileExistsError, match="folder must not be the one worked in"):
        model.save(".")
    assert tree(saved) == before


def test_a_save_of_the_format_before_is_replaced(saved, model, name):
    config = {key: value for key, value in config_of(saved).items() if key not in ("sha256", "files")}
    (saved / "config.json").write_text(json.dumps(config | {"format": 2}))
    with pytest.raises(ValueError, match=r"config.json has format 2; this version reads format 3"):
        loaded_from(saved, name)
    model.save(saved)
    assert_same(model, loaded_from(saved, name), *CASES[name].test)


def test_outputs_replace_only_outputs(tmp_path):
    outputs = ExitOutputs(scores=np.zeros((2, 2)), quality=np.eye(2), costs=[1, 2])
    outputs.save(tmp_path)
    outputs.save(tmp_path)
    (tmp_path / "outputs.csv").write_text("precious")
    with pytest.raises(FileExistsError, match=r"one with outputs.json\); .* something else: outputs.csv"):
        outputs.save(tmp_path)
    (tmp_path / "outputs.csv").unlink()
    (tmp_path / "outputs.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"outputs\.json of another kind"):
        outputs.save(tmp_path)


# -- saves that are killed --------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from itertools import count
from pathlib import Path
import adaptexit
from tests.contract.cases import fitted_once
from tests.nets import large_trained, small_trained

root = Path(sys.argv[1])
target = root / "it"
STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.scandir"}
first, second = fitted_once("two modules"), fitted_once("entropy")
contents = {model.calibrator_.frontier_.points[5].thresholds.tobytes(): k for k, model in enumerate((first, second))}


def kill_at(step):
    seen = count()

    def hook(event, arguments):
        if event in STEPS and next(seen) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


outcomes = []
for step in count():
    first.save(target)
    assert os.listdir(root) == ["it"], os.listdir(root)
    child = os.fork()
    if child == 0:
        kill_at(step)
        second.save(target)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    loaded = adaptexit.load(target, base=first.base, saver=first.saver)
    outcomes.append(contents[loaded.calibrator_.frontier_.points[5].thresholds.tobytes()])
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
assert outcomes == sorted(outcomes) and outcomes.count(0) > 50 and outcomes.count(1) > 10, outcomes
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_save_killed_at_any_step_leaves_the_earlier_one_or_itself_and_the_next_clears_away(tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_load_puts_back_what_a_killed_save_had_moved_aside(saved, name, model):
    workshop = saved.parent / ".model-abcd1234.saving"
    shutil.copytree(saved, workshop / "new")
    saved.rename(workshop / "old")
    assert_same(model, loaded_from(saved, name, config_of(workshop / "old")), *CASES[name].test)
    assert saved.is_dir()
    model.save(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_a_save_that_is_exchanged_while_it_is_loaded_is_read_anew(saved, name, model, monkeypatch):
    def meanwhile(path):
        monkeypatch.undo()
        copy.copy(model).set_params(batch_size=77).save(saved)
        return "a checksum that the earlier one has not"

    monkeypatch.setattr("adaptexit.persistence.sha256_of", meanwhile)
    assert loaded_from(saved, name).batch_size == 77


# -- damaged saves ----------------------------------------------------------------------------------------------------


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def bits_of(path, most):
    """All bits of a file, or some of them, the first and the last among them."""
    n_bits = 8 * path.stat().st_size
    if n_bits <= most:
        return range(n_bits)
    return sorted({0, n_bits - 1, *np.random.default_rng(0).integers(0, n_bits, most).tolist()})


def check_flips(saved, name, most):
    config = config_of(saved)
    for path in sorted(path for path in saved.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for bit in bits_of(path, most):
            path.write_bytes(flipped(content, bit))
            with pytest.raises(ValueError, match=path.name):
                loaded_from(saved, name, config)
        path.write_bytes(content)
    assert_same(fitted_once(name), loaded_from(saved, name), *CASES[name].test)


def test_flipped_bits_are_noticed_in_every_file(saved, name):
    check_flips(saved, name, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES, indirect=True)
def test_flipped_bits_are_noticed_everywhere(saved, name):
    check_flips(saved, name, 50)


def test_no_bit_of_a_config_can_change_what_is_read(saved, name):
    """Nor in ways that JSON does not see, as other cases of digits."""
    path = saved / "config.json"
    content = path.read_bytes()
    for old, new in ((b'"format": 3', b'"format":  3'), (b"e-", b"E-"), (b"\n}\n", b"\n}"), (b": ", b":\t")):
        if old in content:
            path.write_bytes(content.replace(old, new, 1))
            with pytest.raises(ValueError, match=r"config.json is not what was saved: its checksum differs"):
                loaded_from(saved, name)


@pytest.mark.parametrize("change", ["calibration", "truncated", "longer", "empty", "gone"])
def test_other_damages_are_noticed(saved, name, change, tmp_path):
    path = saved / "model.safetensors"
    if change == "calibration":
        other = fitted_once(name)
        scores = other.outputs_.scores.copy()
        scores[0, 0] += 1e-3
        other.outputs_.with_scores(scores).save(saved / "calibration")
        path = saved / "calibration" / "scores.npy"
    elif change == "gone":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes({"truncated": content[:-1], "longer": content + b"0", "empty": b""}[change])
    with pytest.raises((ValueError, FileNotFoundError), match=str(path)):
        loaded_from(saved, name)


def test_files_that_no_save_wrote_are_not_read(saved, name, model):
    model.outputs_.save(saved / "training")
    if name != "two modules":
        pytest.skip("it has training outputs of its own")
    assert getattr(loaded_from(saved, name), "training_outputs_", None) is None


# -- full disks --------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk():
    """Takes files of at most 500 bytes, whoever writes: no longer than the block, as the log of a run may be a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_names_the_file_and_leaves_the_earlier_save(saved, model):
    outputs = ExitOutputs(scores=np.zeros((2, 99)), quality=np.zeros((2, 99)), costs=[1, 2])
    before = tree(saved.parent)
    with small_disk(), pytest.raises(OSError, match=r"model\.safetensors"):
        model.save(saved)
    with small_disk(), pytest.raises(OSError, match=r"scores\.npy"):
        outputs.save(saved.parent / "outputs")
    assert tree(saved.parent) == before


def test_a_tilde_is_the_home_folder(model, name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model.save("~/models/own")
    model.outputs_.save("~/outputs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "outputs"]
    loaded = loaded_from("~/models/own", name, config_of(tmp_path / "models" / "own"))
    assert loaded.outputs_.n_samples == ExitOutputs.load("~/outputs").n_samples == model.outputs_.n_samples
