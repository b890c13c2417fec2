"""The examples start, and the plot of learning curves reads what BenchMARL writes."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarl_trust import MarsConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
BENCHMARKS = EXAMPLES.parent / "benchmarks"


def python(*arguments, fails=False) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "script", ["compare.py", "barrier.py", "advantage_variance.py", "learning_curves.py", "joint_constraint.py"]
)
def test_help(script):
    assert "usage:" in python(EXAMPLES / script, "--help")


def test_benchmark_help():
    assert "--agents" in python(BENCHMARKS / "sequential_update.py", "--help")


def test_torchrl_only():
    assert len((EXAMPLES / "torchrl_only.py").read_text().splitlines()) < 80
    (line,) = [line for line in python(EXAMPLES / "torchrl_only.py", 1).splitlines() if "mean of M" in line]
    first, *others = map(float, line.split("mean of M")[1].split())
    assert first == 1
    assert all(0.9 < factor < 1.1 for factor in others)
    assert any(factor != 1 for factor in others)


def test_joint_constraint(tmp_path):
    picture = tmp_path / "joint_constraint.png"
    settings = ("--seeds", 2, "--iterations", 2, "--frames", 32, "--out", picture)
    output = python(EXAMPLES / "joint_constraint.py", *settings)
    rows = [line.split() for line in output.splitlines() if line.startswith("HATRPO") and "±" in line]
    assert [row[0] for row in rows] == ["HATRPO", "HATRPO-W", "HATRPO-G"]
    for row in rows:
        assert sum(map(int, row[5:8])) == 2  # seeds
        assert 0 < float(row[-1]) <= 0.0201  # KL of both agents
    assert picture.stat().st_size > 10_000


def test_learning_curves(run, tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    for seed in (0, 1):
        run(MarsConfig.get_from_yaml(), seed=seed, save_folder=str(folder))
    output = python(EXAMPLES / "learning_curves.py", folder)
    row = next(line for line in output.splitlines() if line.startswith("balance"))
    assert row.split()[:3] == ["balance", "mars", "2"]
    assert (folder / "learning_curves.png").stat().st_size > 10_000
    run(MarsConfig.get_from_yaml(), seed=1, save_folder=str(folder))
    assert "is there twice" in python(EXAMPLES / "learning_curves.py", folder, fails=True)
    assert "no evaluation" in python(EXAMPLES / "learning_curves.py", EXAMPLES, fails=True)
