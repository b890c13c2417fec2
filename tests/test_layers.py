"""Imports go one way: functional <- losses, value <- updates <- algorithms <- registration.

Alone are environments, and what serves any experiment: algorithms import runtime, which imports none of ours.
"""

import ast
from pathlib import Path

import pytest

import benchmarl_trust

PACKAGE = Path(benchmarl_trust.__file__).parent
ALLOWED = {  # layer -> (layers of ours it may import, packages of others it may not)
    "functional": (set(), {"tensordict", "torchrl", "benchmarl", "hydra", "numpy"}),
    "losses": ({"functional"}, {"benchmarl", "hydra"}),
    "value": ({"functional"}, {"benchmarl", "hydra"}),
    "updates": ({"functional", "losses"}, {"benchmarl", "hydra"}),
    "algorithms": ({"functional", "losses", "value", "updates", "runtime", "paths"}, {"hydra"}),
    "runtime": (set(), {"hydra"}),
    "environments": ({"paths"}, {"hydra"}),
}


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_folder_is_a_known_layer():
    folders = {file.parent.name for file in PACKAGE.glob("*/*.py")}
    assert folders == set(ALLOWED)


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("*/*.py")), ids=lambda f: f"{f.parent.name}/{f.name}")
def test_import_direction(file):
    layer = file.parent.name
    ours, forbidden = ALLOWED[layer]
    for name in imports(file):
        top, *rest = name.split(".")
        assert top not in forbidden, f"{layer} may not import {name}"
        if top == "benchmarl_trust" and rest:
            assert rest[0] in ours | {layer}, f"{layer} may not import {name}"


def test_functional_imports_only_torch_and_the_standard_library():
    tops = {name.split(".")[0] for file in (PACKAGE / "functional").glob("*.py") for name in imports(file)}
    assert tops <= {"torch", "math", "typing", "collections", "benchmarl_trust"}
