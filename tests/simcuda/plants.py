"""Put a fault into a module that is imported already, and take it out again."""

import importlib
import inspect
from contextlib import contextmanager
from pathlib import Path
from types import CodeType

import benchmarl_trust

PACKAGE = Path(benchmarl_trust.__file__).parent


@contextmanager
def planted(file: str, text: str, replacement: str):
    """Let the functions of a file of the package be as if a text in it, which must be there once, were another.

    The functions stay the objects that others have imported: they are given the code of the changed source.
    """
    source = (PACKAGE / file).read_text()
    assert source.count(text) == 1, f"{file} has {source.count(text)} times {text!r}"
    module = importlib.import_module("benchmarl_trust." + file.removesuffix(".py").replace("/", "."))
    old, new = (_codes(compile(s, str(PACKAGE / file), "exec")) for s in (source, source.replace(text, replacement)))
    changed = {name: _function(module, name) for name in new if new[name] != old[name]}
    assert changed, f"{replacement!r} changes no function"
    before = {name: function.__code__ for name, function in changed.items()}
    try:
        for name, function in changed.items():
            function.__code__ = new[name]
        yield
    finally:
        for name, function in changed.items():
            function.__code__ = before[name]


def _codes(code: CodeType, path: str = "") -> dict[str, CodeType]:
    """The functions of a module and the methods of its classes, by qualified name."""
    codes = {}
    for constant in code.co_consts:
        if isinstance(constant, CodeType) and not constant.co_name.startswith("<"):
            name = f"{path}{constant.co_name}"
            is_function = constant.co_flags & inspect.CO_OPTIMIZED  # a class body is none
            codes |= {name: constant} if is_function else _codes(constant, f"{name}.")
    return codes


def _function(module, name: str):
    *path, last = name.split(".")
    owner = module
    for part in path:
        owner = getattr(owner, part)
    found = vars(owner)[last]
    found = getattr(found, "fget", None) or getattr(found, "__func__", found)
    return inspect.unwrap(found)
