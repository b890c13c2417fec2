"""A diagonal of the matrix: every task and model, with every algorithm in turn. ``make matrix`` runs all cells."""

import itertools
import json
import subprocess
from importlib.util import find_spec

import pytest
from matrix import COLUMNS, COMBINATIONS, grid_rows, read_cells, rows, run_cell, run_row, table

OURS = COLUMNS[1:]
#: BenchMARL's DeepSets takes sets, which the observations of one agent are not in any task.
UPSTREAM = ("deepsets shared", "deepsets separate")
ROWS = [row for row in rows() if row.name not in UPSTREAM]


def diagonal():
    """Each row with the next algorithm; of a task with both kinds of actions one row, the kinds in turn."""
    names = {row.name for row in ROWS}
    tasks = sorted({row.name.split()[0] for row in ROWS})
    left_out = {f"{task} {('continuous', 'discrete')[k % 2]}" for k, task in enumerate(tasks)}
    left_out = {
        name for name in left_out if {f"{name.split()[0]} {kind}" for kind in ("continuous", "discrete")} <= names
    }
    chosen = [row for row in ROWS if row.name.removesuffix(" teams") not in left_out]
    turns = itertools.cycle(OURS)
    return [(row, next(name for name in turns if name in row.algorithms)) for row in chosen]


DIAGONAL = diagonal()


def cells():
    """Its cells; slow ones are those of further tasks of a suite, of models with shared parameters, and of SMAX, whose
    fast ones are in test_smax.py.
    """
    suites = [row for row, _ in reversed(DIAGONAL) if "/" in row.name and not row.name.startswith("smax")]
    firsts = {row.name.split("/")[0]: row for row in suites}.values()
    for row, name in DIAGONAL:
        fast = row.teams or row in firsts or row.name.endswith((" separate", " only)"))
        yield pytest.param(row, name, id=f"{row.name}-{name}", marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("row", "algorithm"), cells())
def test_diagonal(row, algorithm, tmp_path):
    suite = {"pettingzoo": "pettingzoo", "magent": "magent2", "smax": "jaxmarl"}.get(row.name.split("/")[0])
    if suite and find_spec(suite) is None:  # importing jaxmarl would set sys.stdout
        pytest.skip(f"needs {suite}")
    run_cell(row, algorithm, str(tmp_path))


@pytest.mark.parametrize("algorithm", ["mappo", "happo"])
def test_what_fails_upstream_fails_as_there(algorithm, tmp_path):
    for row in (row for row in rows() if row.name in UPSTREAM):
        with pytest.raises(ValueError, match="DeepSets found no set inputs"):
            run_cell(row, algorithm, str(tmp_path))


def test_the_diagonal_has_every_algorithm():
    assert {algorithm for _, algorithm in DIAGONAL} == set(OURS)


@pytest.mark.slow
def test_a_row_in_its_process_and_the_table(tmp_path, monkeypatch):
    row = next(row for row in ROWS if row.name == "vmas/balance discrete")
    cells = []
    run_row(row, ["mappo", "gpae"], cells.append)
    assert [(cell["row"], cell["algorithm"], cell["why"]) for cell in cells] == [
        (row.name, "mappo", None),
        (row.name, "gpae", None),
    ]
    failed = {"row": row.name, "algorithm": "mars", "why": "ValueError: no", "seconds": None}
    known = {(cell["row"], cell["algorithm"]): cell for cell in [*cells, failed]}
    page = table([row], known)
    assert f"{len(COLUMNS)} cells: 2 pass, 0 fail as MAPPO does, 1 fail otherwise" in page
    assert "- vmas/balance discrete, mars: `ValueError: no`" in page
    known[row.name, "mappo"] = failed | {"algorithm": "mappo"}
    assert "2 fail as MAPPO does, 0 fail otherwise" in table([row], known)
    known[row.name, "mappo"] = failed | {"algorithm": "mappo", "why": "KeyError: other"}
    assert "1 fail as MAPPO does, 1 fail otherwise" in table([row], known)
    monkeypatch.setattr("matrix.CELLS", tmp_path / "cells.jsonl")
    assert read_cells() == {}
    lines = [json.dumps(cell) for cell in (cells[0], failed, failed | {"code": "of before"})]
    (tmp_path / "cells.jsonl").write_text("\n".join(lines))
    assert read_cells() == {(row.name, "mappo"): cells[0]}


def test_the_combinations_have_a_table_of_their_own(tmp_path):
    setting = next(row for row in grid_rows() if row.name == "grid discrete masked separate")
    ran = ["happo log capped gpae", "hatrpo kkt full gae"]
    for name in ran:
        run_cell(setting, name, str(tmp_path))
    known = {(setting.name, name): {"why": None, "seconds": 1} for name in ran}
    known[setting.name, "mars clip gae"] = {"why": "ValueError: no", "seconds": None}
    page = table([ROWS[0], setting], known)
    first, second = page.split("## Combinations")
    assert f"{len(COLUMNS)} cells: 0 pass" in first
    assert "happo log" not in first
    assert "36 cells: 2 pass, 0 fail as MAPPO does, 1 fail otherwise, 33 have not been run" in second
    assert "| preset and keys | discrete masked separate |" in second
    assert "| happo log capped gpae | ✓ |" in second
    assert "| mars clip gae | **fails** |" in second
    assert f"- {setting.name}, mars clip gae: `ValueError: no`" in second


def test_the_grid_is_of_every_combination_in_six_settings():
    assert len(grid_rows()) == 6
    assert all(row.algorithms == list(COMBINATIONS) for row in grid_rows())
    assert not {row.name for row in grid_rows()} & {row.name for row in rows()}


def test_a_process_that_ends_by_itself_is_noted(monkeypatch):
    monkeypatch.setattr("matrix.__file__", "there_is_no_such_file.py")
    cells = []
    run_row(ROWS[0], ["mappo", "mars"], cells.append)
    assert [cell["algorithm"] for cell in cells] == ["mappo", "mars"]
    assert all("its process ended with 2" in cell["why"] for cell in cells)


def test_a_process_that_hangs_is_noted(monkeypatch):
    outputs = [b'{"row": "a", "algorithm": "mappo", "why": null}\n', None]

    def hang(*args, timeout, **kwargs):
        raise subprocess.TimeoutExpired("python", timeout, output=outputs.pop(0))

    monkeypatch.setattr(subprocess, "run", hang)
    cells = []
    run_row(ROWS[0], ["mappo", "mars", "happo"], cells.append)
    assert [cell["algorithm"] for cell in cells] == ["mappo", "mars", "happo"]
    assert cells[0]["why"] is None
    assert all("hung" in cell["why"] for cell in cells[1:])
