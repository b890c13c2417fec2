"""The commands of the documentation's pages, as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def commands(page: str) -> list[str]:
    """The page's blocks of shell commands."""
    return re.findall(r"^```bash\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def shell(command: str, cwd: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", command], cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    return output


def test_contributing_names_what_is_there():
    root = DOCS.parent
    text = (root / "CONTRIBUTING.md").read_text()
    assert len(text.splitlines()) < 120
    named = set(re.findall(r"^make (\S+)$|`make ([a-z-]+)`", text, re.MULTILINE))
    targets = re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE)
    assert len(named) >= 5
    assert {first or second for first, second in named} <= set(targets)
    paths = set(re.findall(r"(?:`|\()((?:tests|docs|conf|algorithms)/[\w/.]*)(?:`|\))", text))
    assert len(paths) >= 8
    for path in paths:
        assert (root / path).exists() or (root / "benchmarl_trust" / path).exists(), path
    for selected in re.findall(r"-m pytest (.+)$", text, re.MULTILINE):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", *selected.split()]
        assert subprocess.run(command, cwd=root, capture_output=True, check=False).returncode == 0, selected


@pytest.mark.slow
def test_checkpoints(tmp_path):
    first, after_a_crash, longer, warm, evaluate = commands("checkpoints.md")

    def iterations(folder="first"):
        (file,) = (tmp_path / "outputs" / folder).rglob("counters_iter.csv")
        return [int(row.split(",")[0]) for row in file.read_text().splitlines()]

    shell(first, tmp_path)
    assert iterations() == [0, 1]
    assert "Reloaded experiment" in shell(after_a_crash, tmp_path)
    assert iterations() == [0, 1]  # it was finished
    shell(longer, tmp_path)
    assert iterations() == [0, 1, 2, 3]
    assert "algorithm was mars and is maspo" in shell(warm, tmp_path)
    assert iterations("warm") == [4, 5]
    assert iterations() == [0, 1, 2, 3]
    assert "Evaluation results logged" in shell(evaluate, tmp_path)


@pytest.mark.slow
def test_export(tmp_path):
    train, export, loop = commands("export.md")
    (tmp_path / "examples").symlink_to(DOCS.parent / "examples")
    shell(train, tmp_path)
    assert len(shell(export, tmp_path).splitlines()) == 4
    (use,) = re.findall(r"^```python\n(.*?)^```", (DOCS / "export.md").read_text(), re.MULTILINE | re.DOTALL)
    shell(f"python -c '{use}assert action.shape == (5, 2)'", tmp_path)
    assert re.search(r"mean return -?\d+\.\d{4} of 4 agents in 60 environments", shell(loop, tmp_path))
