import subprocess
import sys
from pathlib import Path

import adaptexit

IMPORT_ALL = """
import importlib, pkgutil, sys
import adaptexit.core
names = [m.name for m in pkgutil.walk_packages(adaptexit.core.__path__, "adaptexit.core.")]
for name in names:
    importlib.import_module(name)
print(len(names), "torch" in sys.modules)
"""


def test_importing_every_module_of_core_does_not_import_torch():
    root = Path(adaptexit.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=root, capture_output=True, text=True, check=True)
    count, torch_came_along = run.stdout.split()
    assert int(count) >= 10
    assert torch_came_along == "False"
