"""Imports go one way: functional <- policy <- losses, value, updates <- algorithms <- registration.

Alone are environments, and what serves any experiment: algorithms import runtime, which imports none of ours.
"""

import ast
import doctest
from pathlib import Path

import pytest

import benchmarl_trust

PACKAGE = Path(benchmarl_trust.__file__).parent
ALLOWED = {  # layer -> (layers of ours it may import, packages of others it may not)
    "functional": (set(), {"tensordict", "torchrl", "benchmarl", "hydra", "numpy"}),
    "policy": ({"functional"}, {"benchmarl", "hydra"}),
    "losses": ({"functional", "policy"}, {"benchmarl", "hydra"}),
    "value": ({"functional", "policy"}, {"benchmarl", "hydra"}),
    "updates": ({"functional", "policy"}, {"benchmarl", "hydra"}),
    "algorithms": ({"functional", "policy", "losses", "value", "updates", "runtime", "paths"}, {"hydra"}),
    "runtime": (set(), {"hydra"}),
    "environments": ({"paths"}, {"hydra"}),
    "report": (set(), {"torch", "tensordict", "torchrl", "benchmarl", "hydra"}),
}


#: Annotations that are nothing but Any: OmegaConf has no union of a string and a list, and no list of any depth; a
#: field is of the type that its key is annotated with.
ANY = {("sequential.py", "order"), ("trust_games.py", "payoff"), ("keys.py", "setting")}


def examples(file: Path) -> str:
    """The code of its doctests."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    nodes = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kinds))
    texts = (ast.get_docstring(node) or "" for node in nodes)
    return "".join(example.source for text in texts for example in doctest.DocTestParser().get_examples(text))


def imports(code: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(code)):
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
    for name in imports(file.read_text()) | imports(examples(file)):
        top, *rest = name.split(".")
        assert top not in forbidden, f"{layer} may not import {name}"
        if top == "benchmarl_trust" and rest:
            assert rest[0] in ours | {layer}, f"{layer} may not import {name}"


def test_functional_imports_only_torch_and_the_standard_library():
    tops = {name.split(".")[0] for file in (PACKAGE / "functional").glob("*.py") for name in imports(file.read_text())}
    assert tops <= {"torch", "math", "typing", "collections", "benchmarl_trust"}


def test_no_annotation_is_any():
    found = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            named = getattr(node, "annotation", None), getattr(node, "returns", None)
            if any(isinstance(annotation, ast.Name) and annotation.id == "Any" for annotation in named):
                target = getattr(node, "target", node)
                found.add((file.name, getattr(target, "id", None) or getattr(target, "arg", None) or target.name))
    assert found == ANY
