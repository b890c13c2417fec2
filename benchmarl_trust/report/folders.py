"""Reads all runs below the folders of a report, BenchMARL's own and saved ones, and names them."""

import re
from collections.abc import Iterable
from pathlib import Path

from benchmarl_trust.report import compact
from benchmarl_trust.report.runs import ReportError, Run, check_once, find_runs, name_arms, name_folders, name_tasks


def split_label(text: str) -> tuple[Path, str | None]:
    """``FOLDER`` or ``FOLDER=LABEL``.

    Examples:
        >>> split_label("outputs/a=MARS at 0.45")
        (PosixPath('outputs/a'), 'MARS at 0.45')
    """
    if Path(text).exists() or "=" not in text:
        return Path(text), None
    # Both may have "=" in them: the first before which there is a folder parts them.
    signs = [sign.start() for sign in re.finditer("=", text)]
    end = next((sign for sign in signs if sign and Path(text[:sign]).is_dir()), signs[-1])
    return Path(text[:end]), text[end + 1 :].strip() or None


def read_folders(folders: Iterable[str], metric: str = "return") -> tuple[list[Run], list[str]]:
    """All runs, with their labels.

    Args:
        folders (list of str): each ``FOLDER`` or ``FOLDER=LABEL``. Without labels runs are called by their algorithm,
            also by the folder's name if it would be of two arms else. Saved runs keep the label they were saved with.
        metric (str): a further curve to read.

    Returns: runs, and notes on what was left out.

    Raises:
        ReportError: for folders without runs, and for a run that is there twice.
    """
    named = [split_label(text) for text in folders]
    fixed: list[Run] = []  # runs that have their labels
    free: list[tuple[str, list[Run]]] = []  # others by their folder's name
    notes: list[str] = []
    for folder, label in named:
        if not folder.is_dir():
            raise ReportError(f"{folder}: there is no such folder.")
        saved = [run for file in _saved(folder) for run in compact.load(file.parent)]
        found = find_runs(folder, metric, notes)
        if not saved and not found:
            message = (
                f"{folder} holds no runs: name a folder with BenchMARL's JSON or CSV files below it "
                "(experiment.create_json=True experiment.loggers=[csv]), or one that --save has written."
            )
            raise ReportError("\n".join([message, *(f"- {note}" for note in notes)]))
        name_arms(found)
        labels = {run.label for run in [*saved, *found]}
        if label is None:
            fixed += saved
            free.append((folder.resolve().name, found))
        else:
            if len(labels) > 1:
                raise ReportError(f"{folder}={label}: a label is for one arm, there are {'; '.join(sorted(labels))}.")
            for run in [*saved, *found]:
                run.label = label
            fixed += [*saved, *found]
    runs = [*fixed, *(run for _, found in free for run in found)]
    name_tasks(runs)
    if len(named) > 1:
        name_folders(free, fixed)
    check_once(runs)
    return sorted(runs, key=lambda run: (natural(run.task), natural(run.label), run.seed)), notes


def _saved(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("runs.json")) if compact.is_index(file)]


def natural(text: str) -> list:
    """A key to sort by, in which n_agents=8 comes before n_agents=16."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", text)]
