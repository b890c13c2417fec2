"""Results as small files, for a repository: one CSV per run and ``runs.json`` beside them."""

import csv
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import benchmarl_trust
from benchmarl_trust.report.runs import UNREADABLE, ReportError, Run

COLUMNS = ("time_s", "return", "collection_return", "kl")
#: Settings that name places on a machine.
PLACES = {"experiment.save_folder", "experiment.restore_file", "experiment.restore_map_location"}


def safe(name: str) -> str:
    """A part of a file's name that every file system takes."""
    return re.sub(r"[^A-Za-z0-9.+]+", "_", name)


def file_name(run: Run) -> str:
    """Of a saved run.

    Examples:
        >>> file_name(Run("vmas/balance", "mars", 0, [], {}, label="mars, epsilon=0.1"))
        'vmas_balance-mars_epsilon_0.1-seed0.csv'
    """
    return "-".join(map(safe, (run.task, run.label, f"seed{run.seed}"))) + ".csv"


def save(runs: list[Run], folder: Path) -> None:
    """Write the runs into a folder, beside those that it holds already; a run that it holds is replaced.

    Values have five significant digits.

    Raises:
        ReportError: for two runs whose files would have one name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = {file_name(run): run for run in (load(folder) if (folder / "runs.json").is_file() else [])}
    written: dict[str, Run] = {}
    for run in runs:
        name = file_name(run)
        for other in (written.get(name), saved.get(name)):
            if other is not None and (other.task, other.label) != (run.task, run.label):
                raise ReportError(f"{other.name} and {run.name} would both be {name}: give one another label.")
        written[name] = run
    for name, run in written.items():
        run.versions = run.versions or _versions()
        _write_curves(run, folder / name)
    entries = {name: _entry(name, run) for name, run in sorted((saved | written).items())}
    common = _common([entry["settings"] for entry in entries.values()])
    for entry in entries.values():
        entry["settings"] = {key: value for key, value in entry["settings"].items() if key not in common}
    lines = ",\n".join(json.dumps(entry, default=str) for entry in entries.values())
    shared = json.dumps(common, default=str)
    (folder / "runs.json").write_text(f'{{"shared_settings": {shared},\n"runs": [\n{lines}\n]}}\n')


def load(folder: Path) -> list[Run]:
    """The runs of a folder written by :func:`save`.

    Raises:
        ReportError: for files that are not there or not as they were written.
    """
    file, runs = folder / "runs.json", []
    try:
        data = json.loads(file.read_text())
        for entry in data["runs"]:
            file = folder / entry["file"]
            settings = data["shared_settings"] | entry["settings"]
            known = {key: entry[key] for key in ("task", "algorithm", "seed", "label", "frames", "finished")}
            known |= {key: entry[key] for key in ("overrides", "versions")}
            known["planned"] = entry["planned_frames"]
            runs.append(Run(places=[file], curves=_read_curves(file), settings=settings, **known))
    except FileNotFoundError as error:
        raise ReportError(f"{file} is missing, which runs.json beside it names: save the run anew (--save).") from error
    except UNREADABLE as error:
        raise ReportError(f"{file} is not as --save writes it ({error!r}): save its run anew.") from error
    return runs


def is_index(file: Path) -> bool:
    """Whether it is a ``runs.json`` of :func:`save`, even if it is cut off."""
    return b'"shared_settings"' in file.read_bytes()


def _entry(name: str, run: Run) -> dict[str, Any]:
    return {
        "file": name,
        "task": run.task,
        "label": run.label,
        "algorithm": run.algorithm,
        "seed": run.seed,
        "frames": run.frames,
        "planned_frames": run.planned,
        "finished": run.finished,
        "versions": run.versions,
        "overrides": run.overrides,
        "settings": {key: value for key, value in sorted(run.settings.items()) if key not in PLACES},
    }


def _common(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """What all runs share. None of them may lack the key."""
    first, *others = settings
    return {key: value for key, value in first.items() if all(key in o and o[key] == value for o in others)}


def _versions() -> dict[str, str]:
    """Those that are installed: a run's folder does not say with which it was made."""
    hosts = {package: importlib.metadata.version(package) for package in ("benchmarl", "torchrl", "torch")}
    return {"benchmarl_trust": benchmarl_trust.__version__, **hosts}


def _write_curves(run: Run, file: Path) -> None:
    names = [*COLUMNS, *sorted(run.curves.keys() - set(COLUMNS))]
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(["frames", *names])
        for frames in sorted({frames for curve in run.curves.values() for frames in curve}):
            values = (run.curves.get(name, {}).get(frames) for name in names)
            writer.writerow([frames, *("" if value is None else f"{value:.5g}" for value in values)])


def _read_curves(file: Path) -> dict[str, dict[int, float]]:
    with file.open(newline="") as lines:
        header, *rows = csv.reader(lines)
    if header[0] != "frames" or any(len(row) != len(header) for row in rows):
        raise ValueError("its first column is not frames, or a row is not whole")
    columns = list(enumerate(header))[1:]
    return {name: {int(row[0]): float(row[i]) for row in rows if row[i]} for i, name in columns}
