import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import adaptexit
from adaptexit.backbones import resnet8_cifar, resnet20_cifar, resnet56_cifar

ROOT = Path(adaptexit.__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="an installed package comes without examples")


def run(script, *arguments, folder):
    """What an example prints and what it says on stderr, run from another folder."""
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / script, *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def rows_of(printed):
    """Allowed drop, relative costs on both data and change of accuracy of every line of the table."""
    lines = re.findall(r"^\s*([\d.]+)%\s*\|\s*([\d.]+)\s*\|\s*([\d.]+)\s*\|\s*([+-][\d.]+)$", printed, re.MULTILINE)
    return [tuple(map(float, line)) for line in lines]


def test_quickstart(tmp_path):
    printed, said = run("quickstart.py", "--out", "curve.png", folder=tmp_path)
    assert said == ""
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
