"""What the host of a real GPU would have waited for, and how many kernels it would have launched."""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

PACKAGE = "benchmarl_trust/"
HERE = str(Path(__file__).parent)


class Wait(NamedTuple):
    """``line`` is the nearest that is not torch's, ``ours`` the nearest of the package, ``-`` if there is none."""

    kind: str
    line: str
    ours: str


class Recorder:
    """Counts while ``recording()``; refuses to wait where ``forbids_waits`` is set.

    Attributes:
        waits (Counter of Wait): how often the host waited, by reason and line.
        launches (Counter of str): kernels by operation.
    """

    def __init__(self):
        self.waits: Counter[Wait] = Counter()
        self.launches: Counter[str] = Counter()
        self.forbids_waits = False
        self._on = False

    @contextmanager
    def recording(self, on: bool = True):
        """Count, or with ``on=False`` do not count, what happens inside."""
        before, self._on = self._on, on
        try:
            yield self
        finally:
            self._on = before

    def reset(self):
        self.waits.clear()
        self.launches.clear()

    def wait(self, kind: str, times: int = 1):
        if self.forbids_waits:
            raise RuntimeError(f"called a synchronizing CUDA operation: {kind} at {_where(kind).line}")
        if self._on:
            self.waits[_where(kind)] += times

    def launch(self, name: str):
        if self._on:
            self.launches[name] += 1

    @property
    def own_waits(self) -> Counter:
        """Those that a line of the package itself asked for, by reason and line."""
        own = Counter()
        for wait, times in self.waits.items():
            if wait.line.startswith(PACKAGE):
                own[f"{wait.kind}: {wait.line}"] += times
        return own


def _where(kind: str) -> Wait:
    lines = []
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((HERE, "<")):
            lines.append((_short(file), f"{frame.f_lineno} {frame.f_code.co_name}"))
        frame = frame.f_back
    lines = [f"{file}:{place}" for file, place in lines if not file.startswith("torch/")]
    ours = next((line for line in lines if line.startswith(PACKAGE)), "-")
    return Wait(kind, lines[0] if lines else "-", ours)


def _short(file: str) -> str:
    if "site-packages/" in file:
        return file.split("site-packages/")[-1]
    return PACKAGE + file.split(f"/{PACKAGE}")[-1] if f"/{PACKAGE}" in file else file


RECORDER = Recorder()
