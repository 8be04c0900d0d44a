"""The house rules that can be looked up in the source: who may import whom, no circles, files of one sitting."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import adaptexit

PACKAGE = Path(adaptexit.__file__).parent
LONGEST = 400

FLOORS = [
    {"utils", "exceptions"},
    {"core"},
    {"data", "staging", "heads", "backbones"},
    {"networks"},
    {"training"},
    {"calibrators"},
    {
        "predictor",
        "reporting",
        "persistence",
        "saved_config",
        "base",
        "cascade",
        "multi_exit",
        "comparison",
        "evaluation",
    },
]
"""From the ground up; a room knows those on its own floor and below. Displays know the core alone, inside calls."""

FLOOR_OF = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path):
    parts = ("adaptexit", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(tree, *, inside_functions):
    """Modules of the package that a file imports, without those that only types need."""
    names = set()

    def visit(node, in_function):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            in_function = True
        if in_function <= inside_functions:
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    names.add(whole if whole in SOURCES else node.module)
        for child in ast.iter_child_nodes(node):
            visit(child, in_function)

    visit(tree, False)
    return {name for name in names if name in SOURCES and name != "adaptexit"}


def graph(*, inside_functions):
    return {
        name: imports_of(ast.parse(path.read_text()), inside_functions=inside_functions) - {name}
        for name, path in SOURCES.items()
    }


def room(module):
    return module.split(".")[1]


def test_there_is_no_circle_of_imports():
    circle = []
    try:
        TopologicalSorter(graph(inside_functions=True)).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert circle == []


def test_no_arrow_points_upward():
    upward = [
        f"{module} -> {known}"
        for module, imported in graph(inside_functions=True).items()
        if module != "adaptexit" and room(module) in FLOOR_OF
        for known in imported
        if room(known) in FLOOR_OF and FLOOR_OF[room(known)] > FLOOR_OF[room(module)]
    ]
    assert upward == []


def test_every_room_has_its_floor():
    assert {room(module) for module in SOURCES if module != "adaptexit"} == set(FLOOR_OF) | {"displays"}


def test_displays_are_known_to_nobody_and_know_the_core_alone_and_only_inside_calls():
    for inside in (False, True):
        for module, imported in graph(inside_functions=inside).items():
            if module == "adaptexit":
                continue
            rooms = {room(known) for known in imported}
            if room(module) == "displays":
                assert rooms <= {"displays"} | ({"core"} if inside else set()), module
            else:
                assert "displays" not in rooms, module


@pytest.mark.parametrize("path", sorted(SOURCES.values()), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_readable_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= LONGEST
