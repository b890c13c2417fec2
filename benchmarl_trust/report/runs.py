"""Reads BenchMARL's runs from the JSON and CSV files that it writes, and tells them apart.

Nothing is unpickled: ``config.pkl`` is left alone, settings come from the CSV logger's ``hparams`` or from Hydra's
folder.
"""

import ast
import csv
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from tqdm import tqdm

#: Settings that say what is written, how long and where, but not how is learned: they tell no two arms apart.
BOOKKEEPING = re.compile(
    r"experiment\.(save_folder|restore|max_n_|evaluation|checkpoint|keep_|exclude_|loggers|render|create_json|project"
    r"|wandb|.*_device)"
)

Curve = dict[int, float]  # value by frames
Content = TypeVar("Content", list, dict)


#: What reading a file that is not as it was written may raise.
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError, csv.Error, yaml.YAMLError)


class ReportError(ValueError):
    """Runs that cannot be reported as asked; the message says what to do."""


@dataclass
class Run:
    """One run.

    Attributes:
        task (str): ``environment/task``, with the settings in which tasks of this name differ.
        algorithm (str): BenchMARL's name.
        seed (int): the seed.
        places (list of Path): where it was found.
        curves (dict): name -> value by frames: ``return`` (evaluation), ``collection_return``, ``kl``, ``time_s`` and
            a metric that was asked for.
        frames (int): collected.
        planned (int, optional): the frames that it is to have; None where it is not known.
        finished (bool): it has them.
        settings (dict): by key, such as ``algorithm.epsilon``.
        overrides (list of str): of Hydra, where its folder is there.
        versions (dict): of the packages that were installed when it was saved.
        label (str): what it is called in tables and pictures.
    """

    task: str
    algorithm: str
    seed: int
    places: list[Path]
    curves: dict[str, Curve]
    frames: int = 0
    planned: int | None = None
    finished: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.task}, {self.label or self.algorithm}, seed {self.seed} ({', '.join(map(str, self.places))})"


def read_rows(file: Path) -> Curve:
    """Value by step of a CSV file without a header; of a step that is there twice the later row counts.

    A last row without its end, of a run that was killed, is left out.

    Raises:
        ValueError: naming the file, for rows that are no two numbers.
    """
    try:
        whole, _, _ = file.read_text().rpartition("\n")
        return {int(step): float(value) for step, value in csv.reader(whole.splitlines())}
    except UNREADABLE as error:
        raise ValueError(f"{file}: {error}") from error


def find_runs(folder: Path, metric: str, notes: list[str]) -> list[Run]:
    """The runs below a folder. What cannot be read is said in ``notes``."""
    reports, scalars = defaultdict(list), {}
    for file in sorted(folder.rglob("*.json")):
        try:
            data = json.loads(file.read_text())
        except (OSError, ValueError):
            notes.append(f"{file} is not whole; the run is read from its CSV files, where it has some.")
            continue
        if isinstance(data, dict) and (runs := list(_reports(data))):
            reports[file.parent] += runs
    for place in sorted(folder.rglob("scalars")):
        if (place / "counters_total_frames.csv").is_file() or (place.parent / "texts").is_dir():
            scalars[place.parent.parent] = place
    runs = []
    for place in tqdm(sorted({*reports, *scalars}), desc="reading", leave=False, delay=1):
        try:
            found = _runs_at(place, reports[place], scalars.get(place), metric)
        except UNREADABLE as error:
            notes.append(f"{place} cannot be read ({type(error).__name__}: {error}): left out.")
            continue
        if not found:
            notes.append(f"{place} has neither a BenchMARL report (json) nor the csv logger's hparams: left out.")
        runs += found
    return _join(runs, notes)


def _reports(data: dict) -> Iterator[tuple[str, str, int, dict]]:
    """Task, algorithm, seed and evaluations of all runs in the content of a JSON file; none if it is another's."""
    try:
        for environment, tasks in data.items():
            for task, algorithms in tasks.items():
                for algorithm, seeds in algorithms.items():
                    for seed, report in seeds.items():
                        if seed.startswith("seed_") and isinstance(report, dict):
                            yield f"{environment}/{task}", algorithm, int(seed.removeprefix("seed_")), report
    except (AttributeError, ValueError):
        return


def _runs_at(place: Path, reports: list[tuple], scalars: Path | None, metric: str) -> list[Run]:
    """The runs of one run's folder: one, unless somebody has merged reports there."""
    settings, about = _settings(place, scalars)
    by_identity: dict[tuple, dict] = defaultdict(dict)
    for *identity, report in reports:
        by_identity[tuple(identity)].update(report)
    if not by_identity and {"environment_name", "task_name", "algorithm_name", "seed"} <= about.keys():
        task = f"{about['environment_name']}/{about['task_name']}"
        by_identity[task, about["algorithm_name"], int(about["seed"])] = {}
    alone = len(by_identity) == 1
    overrides = _yaml(place.parent / ".hydra" / "overrides.yaml", empty=[])
    runs = []
    for (task, algorithm, seed), report in by_identity.items():
        logged = scalars if alone else None
        curves, collected = _curves(report, logged, metric)
        run = Run(task, algorithm, seed, [place], curves, settings=settings, overrides=overrides)
        run.frames = collected or max(curves["return"], default=0)
        run.planned = _planned(settings, about.get("on_policy", True))
        # Without CSV files the last evaluation is all that is known of the run's length.
        slack = 0 if collected else settings.get("experiment.evaluation_interval", 1) - 1
        run.finished = run.planned is None or run.frames + slack >= run.planned
        runs.append(run)
    return runs


def _curves(report: dict, scalars: Path | None, metric: str) -> tuple[dict[str, Curve], int]:
    """A run's curves, and the frames that it has collected according to its CSV files."""
    logged = {} if scalars is None else {file.stem: file for file in sorted(scalars.glob("*.csv"))}
    frames = _read(logged, ["counters_total_frames"])

    def curve(names: Iterable[str]) -> Curve:
        """The mean of these files, over frames."""
        return {int(frames[step]): value for step, value in _read(logged, names).items() if step in frames}

    evaluations = {key: _evaluations(report, key) for key in ("return", metric)}
    first = min(evaluations["return"], default=math.inf)
    # BenchMARL's own report of a resumed run begins at the checkpoint; the CSV file has the evaluations before.
    before = {at: value for at, value in curve(["eval_reward_episode_reward_mean"]).items() if at < first}
    agents = [name for name in logged if re.fullmatch(r"train_.+_policy_kl_agent_\d+", name)]
    curves = {
        "return": before | evaluations["return"],
        "collection_return": curve(["collection_reward_episode_reward_mean"]),
        "kl": curve(agents or [name for name in logged if re.fullmatch(r"train_.+_policy_kl", name)]),
        "time_s": curve(["timers_total_time"]),
    }
    if metric not in curves:
        curves[metric] = evaluations[metric] or curve(metric_files(metric, logged))
    return curves, int(max(frames.values(), default=0))


def metric_files(metric: str, logged: Iterable[str]) -> list[str]:
    """The CSV files of a metric, by their names: that file, or an environment's info in evaluation or collection.

    Examples:
        >>> metric_files("win_rate", ["collection_agents_info_win_rate", "collection_reward_reward_mean"])
        ['collection_agents_info_win_rate']
        >>> metric_files("train/agents/entropy", ["train_agents_entropy"])
        ['train_agents_entropy']
    """
    name = re.escape(metric.replace("/", "_"))
    for pattern in (name, f"eval_(.+_)?info_{name}", f"collection_(.+_)?info_{name}"):
        if found := [file for file in logged if re.fullmatch(pattern, file)]:
            return found
    return []


def _evaluations(report: dict, key: str) -> Curve:
    """The mean over episodes at each evaluation, from BenchMARL's JSON."""
    steps = [step for name, step in report.items() if name.startswith("step_") and step.get(key)]
    steps = [step for step in steps if isinstance(step[key], list)]  # step_count is a number
    steps.sort(key=lambda step: step["step_count"])
    return {int(step["step_count"]): sum(step[key]) / len(step[key]) for step in steps}


def _read(logged: dict[str, Path], names: Iterable[str]) -> Curve:
    """By step the mean over those of these files that have it."""
    values = defaultdict(list)
    for name in names:
        if name in logged:
            for step, value in read_rows(logged[name]).items():
                values[step].append(value)
    return {step: sum(own) / len(own) for step, own in sorted(values.items())}


def _settings(place: Path, scalars: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings by key, and what else the CSV logger has noted: of the run's last start, where it was resumed."""
    about = {}
    texts = [] if scalars is None else sorted((scalars.parent / "texts").glob("hparams*.txt"))
    for file in texts:
        for key, _, value in (line.partition(": ") for line in file.read_text().splitlines()):
            try:  # classes are written as <class 'torch.nn.modules.activation.Tanh'>
                about[key] = ast.literal_eval(re.sub(r"<class '([^']*)'>", r"'\1'", value))
            except (ValueError, SyntaxError):
                about[key] = value  # a name
    parts = ("algorithm", "experiment", "task", "model", "critic_model")
    if "experiment_config" in about:
        of = {part: about.get(f"{part}_config") for part in parts}
    else:
        of = {part: _yaml(place.parent / ".hydra" / "config.yaml", empty={}).get(part) for part in parts}
    settings = {
        f"{part}.{key}": value for part, own in of.items() if isinstance(own, dict) for key, value in own.items()
    }
    return settings, about


def _yaml(file: Path, empty: Content) -> Content:
    return (yaml.safe_load(file.read_text()) if file.is_file() else None) or empty


def _planned(settings: dict[str, Any], on_policy: bool) -> int | None:
    """The frames that a run is to have, as BenchMARL counts them; None where it is not known."""
    batch = settings.get(f"experiment.{'on' if on_policy else 'off'}_policy_collected_frames_per_batch")
    iterations, frames = settings.get("experiment.max_n_iters"), settings.get("experiment.max_n_frames")
    limits = [frames] if frames is not None else []
    if iterations is not None and batch is not None:
        limits.append(iterations * batch)
    return int(min(limits)) if limits else None


def _join(runs: list[Run], notes: list[str]) -> list[Run]:
    """Folders of one name, of a run that was resumed into another place or copied, as one run.

    Each must go beyond the one before, or be equal to it where both have values; of what is there twice the later
    counts. Others stay two runs.
    """
    parts: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        parts[run.task, run.algorithm, run.seed, run.places[0].name].append(run)
    joined = []
    for own in parts.values():
        own = sorted(own, key=lambda run: run.frames)
        if any(run.frames == later.frames and not _agree(run, later) for run, later in pairwise(own)):
            joined += own
            continue
        *earlier, last = own
        if earlier:
            last.places = [place for run in [*earlier, last] for place in run.places]
            last.curves = {
                name: dict(sorted(_later_wins([*(run.curves[name] for run in earlier), curve]).items()))
                for name, curve in last.curves.items()
            }
            notes.append(f"{last.name}: folders of one run's name were read as one run (resumed or copied).")
        joined.append(last)
    return joined


def _agree(a: Run, b: Run) -> bool:
    """Their curves are equal where both have values."""
    return all(
        b.curves[name].get(at, value) == value for name, curve in a.curves.items() for at, value in curve.items()
    )


def _later_wins(curves: list[Curve]) -> Curve:
    return {frames: value for curve in curves for frames, value in curve.items()}


def name_arms(runs: list[Run]) -> None:
    """Label the runs of one folder by their algorithm, and by the settings in which its runs on a task differ."""
    by_task, keys = defaultdict(list), defaultdict(set)
    for run in runs:
        by_task[run.task, run.algorithm].append(run)
    for (_, algorithm), own in by_task.items():
        keys[algorithm] |= arms_differ(own)
    for run in runs:
        run.label = ", ".join([run.algorithm, *values(run, keys[run.algorithm])])


def name_folders(folders: list[tuple[str, list[Run]]], named: list[Run]) -> None:
    """Add the folder's name to a label that would be of two runs, or of two arms, in different folders.

    Args:
        folders (list of tuple): a folder's name and its runs, whose labels are set.
        named (list of Run): further runs, which keep their labels.
    """
    arms: dict[tuple, list[tuple[int, Run]]] = defaultdict(list)
    for i, own in enumerate([named, *(own for _, own in folders)]):
        for run in own:
            arms[run.task, run.label].append((i, run))
    unclear = set()
    for (_, label), found in arms.items():
        once = {(i, run.seed) for i, run in found}
        if len(once) > len({seed for _, seed in once}) or arms_differ([run for _, run in found]):
            unclear.add(label)
    for name, own in folders:
        for run in own:
            if run.label in unclear:
                run.label = f"{run.label}, {name}"


def name_tasks(runs: list[Run]) -> None:
    """Add to the tasks' names the settings in which tasks of one name differ; saved runs may have some already."""
    by_task = defaultdict(list)
    for run in runs:
        by_task[run.task.partition(", ")[0]].append(run)
    for task, own in by_task.items():
        keys = {key for key in differing(own) if key.startswith("task.")}
        for run in own:
            run.task = ", ".join([task, *values(run, keys)])


def differing(runs: list[Run]) -> set[str]:
    """The keys of settings that these runs do not share; a run without settings says nothing."""
    known = [run.settings for run in runs if run.settings]
    keys = {key for settings in known for key in settings}
    return {key for key in keys if any(settings.get(key) != known[0].get(key) for settings in known)}


def arms_differ(runs: list[Run]) -> set[str]:
    """The keys of settings that make different arms of these runs."""
    return {key for key in differing(runs) if not key.startswith("task.") and not BOOKKEEPING.match(key)}


def values(run: Run, keys: Iterable[str]) -> list[str]:
    """``epsilon=0.1`` for each key of the run's settings."""
    short = {key: re.sub(r"^(algorithm|experiment|task)\.", "", key) for key in sorted(keys)}
    return [f"{name}={run.settings.get(key)}" for key, name in short.items()]


def check_once(runs: list[Run]) -> None:
    """Refuse two runs of one task, label and seed.

    Raises:
        ReportError: naming both.
    """
    seen: dict[tuple, Run] = {}
    for run in runs:
        other = seen.setdefault((run.task, run.label, run.seed), run)
        if other is not run:
            places = " and ".join(", ".join(map(str, own.places)) for own in (other, run))
            raise ReportError(
                f"{run.task}, {run.label}, seed {run.seed} is there twice: {places}. Name folders that hold it "
                "once, or give each a label: FOLDER=LABEL."
            )
