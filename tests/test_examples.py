import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import adaptexit
from adaptexit.backbones import resnet8_cifar, resnet20_cifar, resnet56_cifar

ROOT = Path(adaptexit.__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="an installed package comes without examples")


def done_in(folder, *command):
    """What a Python started in another folder prints and what it says on stderr."""
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def run(script, *arguments, folder):
    """What an example prints and what it says on stderr."""
    return done_in(folder, ROOT / "examples" / script, *arguments)


SEVERAL = """
import json, runpy, sys
script, separator, *runs = sys.argv[1:]
for arguments in runs:
    sys.argv = [script, *json.loads(arguments)]
    runpy.run_path(script, run_name="__main__")
    print(separator)
"""


def run_several(script, *runs, folder):
    """What an example prints at each of several runs, in one process: most of a run's time is spent on imports."""
    separator = "-- next --"
    arguments = [json.dumps([str(argument) for argument in run_arguments]) for run_arguments in runs]
    printed, _ = done_in(folder, "-c", SEVERAL, ROOT / "examples" / script, separator, *arguments)
    *all_printed, rest = printed.split(separator + "\n")
    assert (len(all_printed), rest) == (len(runs), "")
    return all_printed


def rows_of(printed):
    """Allowed drop, relative costs on both data and change of accuracy of every line of the table."""
    lines = re.findall(r"^\s*([\d.]+)%\s*\|\s*([\d.]+)\s*\|\s*([\d.]+)\s*\|\s*([+-][\d.]+)$", printed, re.MULTILINE)
    return [tuple(map(float, line)) for line in lines]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_what_an_example_imports_is_there(path):
    assert runpy.run_path(str(path), run_name="looked at")["__doc__"]


@pytest.mark.slow
def test_quickstart(tmp_path):
    printed, said = run("quickstart.py", "--out", "curve.png", folder=tmp_path)
    assert said.count("Warning") == 1  # some 550 samples do not tell that a cheaper setting loses nothing
    assert "CalibrationWarning: max_drop=0 is kept by the plain full model only" in said
    rows = rows_of(printed)
    assert [row[0] for row in rows] == [1.0, 0.5, 0.1, 0.0]
    calibrated = [row[1] for row in rows]
    assert calibrated == sorted(calibrated)
    assert 0 < calibrated[0] < 0.7
    assert all(abs(row[3]) < 3 for row in rows)
    small, large = (float(x) for x in re.search(r"test accuracy: small ([\d.]+), large ([\d.]+)", printed).groups())
    assert 0.8 < small < large
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.width > 500
        assert np.asarray(picture.convert("L")).std() > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png"]


@pytest.mark.slow
def test_cascade_cifar10_on_pictures_of_noise(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("val", "test"):
        for k in range(10):
            folder = tmp_path / "data" / split / f"class{k}"
            folder.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    (tmp_path / "weights").mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for depth, factory in ((8, resnet8_cifar), (20, resnet20_cifar), (56, resnet56_cifar)):
            save_file(factory().state_dict(), tmp_path / "weights" / f"resnet{depth}.safetensors")
    printed, _ = run(
        "cascade_cifar10.py", "--data", "data", "--weights", "weights", "--savers", "8", "20",
        "--out", "curve.png", folder=tmp_path,
    )  # fmt: skip
    for depth, macs in ((8, "12.2"), (20, "40.6"), (56, "125.5")):
        assert f"ResNet-{depth}: {macs} M MACs" in printed
    assert [row[0] for row in rows_of(printed)] == [1.0, 0.5, 0.1, 0.0]
    assert (tmp_path / "curve.png").stat().st_size > 5000


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """An image folder of four classes, told by where a square lies and, for half of the images, hard to see."""
    folder = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    for split, n in (("train", 10), ("val", 5), ("test", 5)):
        for k in range(4):
            (folder / split / f"class{k}").mkdir(parents=True)
            for i in range(n):
                image = rng.integers(0, 120, (40, 48, 3))
                image[10 * (k // 2) + 5 :, 12 * (k % 2) + 5 :][:10, :10] += 20 if i % 2 else 130
                Image.fromarray(image.astype(np.uint8)).save(folder / split / f"class{k}" / f"{i}.png")
    return folder


def checkpoint_of(n_classes, path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = timm.create_model("test_resnet", num_classes=n_classes)
    save_file(net.state_dict(), path)
    return path


def retrofit(squares, folder, n_classes, *more):
    """Arguments for a model of so many classes; the picture is named after them."""
    checkpoint = checkpoint_of(n_classes, folder / f"model{n_classes}.safetensors")
    options = ("--model", "test_resnet", "--data", squares, "--checkpoint", checkpoint, "--num-classes", n_classes)
    return (*options, "--out", f"curve{n_classes}.png", *more)


@pytest.fixture(scope="module")
def retrofitted(squares, tmp_path_factory):
    """What is printed for a model with the folder's classes and for one with others, and where the pictures are."""
    folder = tmp_path_factory.mktemp("retrofitted")
    same = retrofit(squares, folder, 4, "--exits", "layer1", "layer3", "--head", "refined_prototype")
    return *run_several("retrofit.py", same, retrofit(squares, folder, 11), folder=folder), folder


def alone(printed):
    """Name, accuracy and relative cost of every exit when it answers for everybody."""
    line = r"^(\S+|full model): (?:accuracy|agreement) ([\d.]+) \((?:val|test)\) at ([\d.]+)"
    lines = re.findall(line, printed, re.MULTILINE)
    return [(name, float(accuracy), float(cost)) for name, accuracy, cost in lines]


@pytest.mark.slow
def test_retrofit_with_the_folders_classes(retrofitted):
    printed, _, folder = retrofitted
    exits = alone(printed)
    assert [name for name, _, _ in exits] == ["layer1", "layer3", "full model"]
    assert 0 < exits[0][2] < exits[1][2] < exits[2][2] == 1
    assert "(test)" in printed
    assert re.search(r"^   1\.0 \| ", printed, re.MULTILINE)
    with Image.open(folder / "curve4.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5


@pytest.mark.slow
def test_retrofit_of_a_model_with_other_classes(retrofitted):
    """The heads learn the model's answers: the full model agrees with itself."""
    _, printed, _ = retrofitted
    exits = alone(printed)
    assert exits[-1] == ("full model", 1.0, 1.0)
    assert len(exits) >= 2
    assert "full model: agreement 1.0000 (test)" in printed


@pytest.mark.slow
def test_exits_together_with_their_network_on_digits(tmp_path):
    printed, _ = run("joint_cifar10.py", "--digits", "--epochs", "4", "--out", "joint.png", folder=tmp_path)
    rows = re.findall(r"^\| (\S.*?)\s+\|(.*)\|$", printed, re.MULTILINE)
    names = ["frozen exits", "exits and network together", "cascade"]
    losses = {name: [float(cell) if cell.strip() != "-" else np.nan for cell in row.split("|")] for name, row in rows}
    assert list(losses) == names
    assert losses["frozen exits"][-1] == losses["cascade"][-1] == 0
    assert np.nanmean(losses["exits and network together"][:3]) < np.nanmean(losses["frozen exits"][:3]) - 2
    assert re.search(r"where it had 0\.\d+; both agree on \d+\.\d%", printed)
    with Image.open(tmp_path / "joint.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.slow
def test_calexnet_on_digits(tmp_path):
    printed, _ = run("calexnet_cifar10.py", "--digits", "--seeds", "1", "--out", "curves.png", folder=tmp_path)
    rows = {
        line[0]: line[1:] for line in (list(map(str.strip, row.split("|")[1:-1])) for row in printed.splitlines()[2:-1])
    }
    names = ["CalexNet", "CalexNet, reference", "PTEEnet", "ZTW", "BoostNet"]
    assert list(rows)[1:6] == names
    assert len(rows) == 8
    assert list(rows["method"]) == [f"{rule} at {r}" for rule in ("margins", "searched") for r in (0.6, 0.7, 0.75, 0.8)]
    lost = {
        name: [float(cell) if cell != "-" else np.nan for cell in cells]
        for name, cells in rows.items()
        if name in names
    }
    assert all(np.isfinite(cells).sum() >= 2 for cells in lost.values())
    assert lost["CalexNet"][-1] < lost["PTEEnet"][-1] - 5  # heads with a perceptron against heads without
    assert lost["PTEEnet"][-1] > lost["PTEEnet"][-4] > 0  # the more is saved, the more is lost
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1500
        assert np.asarray(picture.convert("L")).std() > 5


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], marks=pytest.mark.slow, id="macs"),
        pytest.param(["--paper-costs"], marks=pytest.mark.exhaustive, id="paper costs"),
    ],
)
def test_em_routing_on_digits(tmp_path, more):
    printed, _ = run("em_routing_cifar10.py", "--digits", *more, "--out", "em.png", folder=tmp_path)
    number = r"\s+([\d.]+)"
    rows = re.findall(rf"^(\S.*?){number}{number}{number}{number}{number}{number}$", printed, re.MULTILINE)
    table = {name.strip(): tuple(map(float, row)) for name, *row in rows}
    assert {"full model", "oracle", "random exit", "patience 1", "BranchyNet (entropy)"} < set(table)
    assert {f"EM routing, {prior}" for prior in ("amortized", "global", "per_sample")} < set(table)
    accuracy, cost, *rates = table["full model"]
    assert (cost, rates) == (1.0, [0, 0, 0, 1])
    assert table["oracle"][0] > accuracy
    assert all(sum(row[2:]) == pytest.approx(1, abs=1e-3) for row in table.values())
    if more:
        assert table["layer1.2 alone"][1] == 0.25
    sweep = re.findall(r"^\s*([\d.]+) \|\s+([\d.]+) \|\s+([\d.]+) \|", printed, re.MULTILINE)
    weights, _, costs = np.array(sweep, dtype=float).T
    assert weights.tolist() == [0.1, 0.32, 1.0, 3.16, 10.0]
    assert costs[0] > costs[-1] + 0.3
    with Image.open(tmp_path / "em.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
