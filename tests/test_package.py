import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import adaptexit

ROOT = Path(adaptexit.__file__).parents[1]


def test_every_public_name_can_be_had():
    for name in adaptexit.__all__:
        assert getattr(adaptexit, name) is not None
    assert dir(adaptexit) == sorted(adaptexit.__all__)


def test_unknown_names():
    with pytest.raises(AttributeError, match="No adaptexit attribute CascadeSavers"):
        adaptexit.CascadeSavers  # noqa: B018
    with pytest.raises(ImportError):
        from adaptexit import CascadeSavers  # noqa: F401


def test_the_package_alone_does_not_import_torch():
    script = "import sys, adaptexit; adaptexit.ExitOutputs, adaptexit.ParetoFrontier; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_version_is_that_of_the_distribution():
    try:
        installed = version("adaptexit")
    except PackageNotFoundError:
        pytest.skip("the package is not installed")
    assert adaptexit.__version__ == installed


def test_types_are_shipped():
    assert (Path(adaptexit.__file__).parent / "py.typed").is_file()
