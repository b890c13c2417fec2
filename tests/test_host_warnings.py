"""A first run prints nothing that no user can act on, and hides nothing else."""

import os
import re
import subprocess
import sys
import warnings

import pytest
from test_plugin import TINY

from benchmarl_trust.host_warnings import ignore_harmless

DEPRECATED = "SyncDataCollector has been deprecated and will be removed in v0.13. Please use Collector instead."
FAILED = "{} environments failed to load with error message No module named 'chess'."


@pytest.fixture
def warn(monkeypatch):
    """A function that warns from a module, where every warning that is not ignored is an error."""
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield lambda message, category, module: warnings.warn_explicit(message, category, "file.py", 1, module=module)


def test_only_what_is_known_to_be_harmless_is_ignored(warn):
    ignore_harmless()
    warn(DEPRECATED, DeprecationWarning, "torchrl.collectors._base")
    warn(FAILED.format("Classic"), UserWarning, "torchrl.envs.libs.pettingzoo")
    for message, category, module in (
        (DEPRECATED, DeprecationWarning, "mine"),
        (DEPRECATED, UserWarning, "torchrl.collectors._base"),
        ("Something has been deprecated", DeprecationWarning, "torchrl.collectors._base"),
        (FAILED.format("MPE"), UserWarning, "torchrl.envs.libs.pettingzoo"),
    ):
        with pytest.raises(category, match=message):
            warn(message, category, module)


def test_who_asks_for_warnings_gets_them(warn, monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    ignore_harmless()
    with pytest.raises(DeprecationWarning):
        warn(DEPRECATED, DeprecationWarning, "torchrl.collectors._base")


@pytest.mark.slow
def test_a_first_run_prints_its_progress_and_little_else(tmp_path):
    """What is left is on standard output, which README's ``> /dev/null`` leaves out."""
    command = [sys.executable, "-m", "benchmarl.run", "algorithm=mars", *TINY, "experiment.share_policy_params=False"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    progress = [line for line in re.split(r"[\r\n]+", done.stderr) if line]
    assert progress
    assert all(re.search(r"\d+/1 \[", line) for line in progress), done.stderr
    # The file of the configuration that is printed is the run's.
    (config,) = tmp_path.rglob(".hydra/config.yaml")
    assert config.read_text().strip() in done.stdout

    command.append("experiment.lr=fast")
    failed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode != 0
    assert "experiment.lr" in failed.stderr
