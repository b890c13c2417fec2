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


@pytest.mark.slow
def test_report(tmp_path):
    """The page's commands, with shorter training."""
    pytest.importorskip("rliable")
    preset = "experiment=vmas_laptop"
    short = f"{preset} experiment.on_policy_n_minibatch_iters=1"
    first, labelled, metric, bounds, saved = (
        page.replace(preset, short).replace("max_n_frames=36000", "max_n_frames=6000") for page in commands("report.md")
    )

    def arms(output):
        rows = [row.split("|") for row in output.splitlines() if row.startswith("| vmas/balance")]
        return {row[2].strip(): [cell.strip() for cell in row[3:-1]] for row in rows}

    found = {arm: row[:2] for arm, row in arms(shell(first, tmp_path)).items()}
    assert found == {"mappo": ["2", "12000"], "mars": ["2", "12000"]}
    assert arms(shell(labelled, tmp_path)).keys() == {"MARS at 0.45", "mappo, first", "mars, first"}
    assert "no ground_rew" not in shell(metric, tmp_path)
    output = shell(bounds, tmp_path)
    assert "vmas/balance: -6.39 to 5.81 (200 random episodes, seed 100; MAPPO at 36000 frames, seed 100)" in output
    again = shell(saved, tmp_path)
    (*_, first_table), (*_, second_table) = (text.split("# Report") for text in (output, again))
    assert first_table.split("Written")[0] == second_table.split("Written")[0]
    files = {file.name for file in (tmp_path / "outputs" / "first").iterdir()}
    pictures = {
        f"{name}{end}" for name in ("learning_curves", "aggregate", "performance_profile") for end in (".png", ".svg")
    }
    assert pictures | {"report.md", "report.csv", "aggregate.csv"} <= files
    (random,) = re.findall(r"^```python\n(.*?)^```", (DOCS / "report.md").read_text(), re.MULTILINE | re.DOTALL)
    (value,) = re.findall(
        r"tensor\((.*)\)", shell(f"python -W ignore -c '{random.replace(chr(39), chr(34))}'", tmp_path)
    )
    assert float(value) == pytest.approx(-6.39, abs=1)
