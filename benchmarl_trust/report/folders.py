"""Reads all runs below the folders of a report, BenchMARL's own and saved ones, and names them."""

import re
from collections.abc import Iterable
from pathlib import Path

from benchmarl_trust.report import compact
from benchmarl_trust.report.runs import ReportError, Run, check_once, find_runs, name_arms, name_tasks


def split_label(text: str) -> tuple[Path, str | None]:
    """``FOLDER`` or ``FOLDER=LABEL``.

    Examples:
        >>> split_label("outputs/a=MARS at 0.45")
        (PosixPath('outputs/a'), 'MARS at 0.45')
    """
    if Path(text).exists() or "=" not in text:
        return Path(text), None
    folder, _, label = text.rpartition("=")
    return Path(folder), label.strip() or None


def read_folders(folders: Iterable[str], metric: str = "return") -> tuple[list[Run], list[str]]:
    """All runs, with their labels.

    Args:
        folders (list of str): each ``FOLDER`` or ``FOLDER=LABEL``. Without labels runs are called by their algorithm,
            with several folders also by the folder's name. Saved runs keep the label they were saved with.
        metric (str): a further curve to read.

    Returns: runs, and notes on what was left out.

    Raises:
        ReportError: for folders without runs, and for a run that is there twice.
    """
    named = [split_label(text) for text in folders]
    suffixes = [path.resolve().name for path, label in named if label is None]
    runs, notes = [], []
    for folder, label in named:
        if not folder.is_dir():
            raise ReportError(f"{folder}: there is no such folder.")
        saved = [run for file in _saved(folder) for run in compact.load(file.parent)]
        found = find_runs(folder, metric, notes)
        if not saved and not found:
            raise ReportError(
                f"{folder} holds no runs: name a folder with BenchMARL's JSON or CSV files below it "
                "(experiment.create_json=True experiment.loggers=[csv]), or one that --save has written."
            )
        suffix = folder.resolve().name if len(named) > 1 and label is None else ""
        if found and suffixes.count(suffix) > 1:
            raise ReportError(f"Two folders are called {suffix}: give each a label, FOLDER=LABEL.")
        labels = {*name_arms(found, suffix), *(run.label for run in saved)}
        if label is not None:
            if len(labels) > 1:
                raise ReportError(f"{folder}={label}: a label is for one arm, there are {'; '.join(sorted(labels))}.")
            for run in [*saved, *found]:
                run.label = label
        runs += [*saved, *found]
    name_tasks(runs)
    check_once(runs)
    return sorted(runs, key=lambda run: (natural(run.task), natural(run.label), run.seed)), notes


def _saved(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("runs.json")) if compact.read_index(file) is not None]


def natural(text: str) -> list:
    """A key to sort by, in which n_agents=8 comes before n_agents=16."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", text)]
