r"""The numbers over tasks, by rliable (Agarwal et al. 2021, Deep RL at the Edge of the Statistical Precipice).

Scores :math:`x_{m,n}` of task m and seed n are normalised by fixed bounds of the task, :math:`(x - l_m) / (h_m - l_m)`.

* interquartile mean: the mean of the M N scores of an arm without ⌊M N / 4⌋ scores at each end; of fewer than four
  scores it is the mean
* performance profile: the fraction of the M N scores above τ, over τ
* probability of improvement over a baseline y: :math:`\frac{1}{M} \sum_m P(x_m > y_m)`, in which a tie counts half; it
  compares the scores of each task with each other and needs no bounds

Intervals are percentiles, 2.5 and 97.5 %, of a bootstrap that draws seeds anew within each task (stratified).
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from tqdm import tqdm

from benchmarl_trust.report.runs import ReportError
from benchmarl_trust.report.statistics import Cell

REPETITIONS = 2000  # of the bootstrap


class Bounds(TypedDict):
    """What a task's score of 0 and of 1 is, and how both were measured."""

    low: float
    high: float
    source: str


@dataclass
class Estimate:
    """A number, or one for each τ, and the ends of its 95 % interval."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass
class Aggregates:
    """What is known over tasks: by arm the interquartile mean, the profile, the probability of improvement."""

    tasks: list[str]
    iqm: dict[str, Estimate]
    profile: dict[str, Estimate]
    thresholds: np.ndarray
    improvement: dict[str, Estimate]


def read_bounds(files: list[Path], metric: str) -> dict[str, Bounds]:
    """The bounds of this metric (an entry without ``metric`` is of the return), by task.

    Raises:
        ReportError: naming the file and the task.
    """
    bounds: dict[str, Bounds] = {}
    for file in files:
        try:
            entries = json.loads(file.read_text()).items()
        except (OSError, ValueError, AttributeError) as error:
            raise ReportError(f"{file} cannot be read as bounds by task ({error}).") from error
        for task, entry in entries:
            keys = ("low", "high", "source")
            if not isinstance(entry, dict) or any(key not in entry for key in keys):
                raise ReportError(f"{file}: {task} needs {', '.join(keys)}: two numbers and how they were measured.")
            if not all(_is_finite(entry[key]) for key in keys[:2]) or not entry["low"] < entry["high"]:
                raise ReportError(
                    f"{file}: {task} has low {entry['low']} and high {entry['high']}: both must be finite numbers, low "
                    "the lesser."
                )
            if entry.get("metric", "return") != metric:
                continue
            own = Bounds(low=entry["low"], high=entry["high"], source=entry["source"])
            if bounds.setdefault(task, own) != own:
                raise ReportError(f"{file} and another file have different bounds for {task}: name one by --bounds.")
    return bounds


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def aggregate(
    cells: list[Cell], bounds: dict[str, Bounds], baseline: str | None, score: str, metric: str, notes: list[str]
) -> Aggregates:
    """All numbers over tasks; what they leave out is said in ``notes``."""
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    arms = _complete(cells, tasks, score, notes)
    missing = [task for task in tasks if task not in bounds]
    if missing and arms:
        there = f"There are bounds for {', '.join(bounds)}. " if bounds else ""
        notes.append(
            f"No bounds of {metric} for {', '.join(missing)}: interquartile mean and performance profile are left out. "
            f"{there}"
            'Put {"task": {"low": ..., "high": ..., "source": "how they were measured"}} into bounds.json beside the '
            "runs or name a file by --bounds; measure them by runs that are not compared (docs/report.md)."
        )
    iqm, profile, thresholds = {}, {}, np.linspace(0, 1, 101)
    if not missing and arms:
        low, high = (np.array([bounds[task][key] for task in tasks]) for key in ("low", "high"))
        normalised = {label: (scores - low) / (high - low) for label, scores in arms.items()}
        every = np.concatenate([scores.ravel() for scores in normalised.values()])
        thresholds = np.linspace(min(0, every.min()), max(1, every.max()), 201)
        iqm = _estimates(normalised, interquartile_mean, "interquartile mean")
        profile = _estimates(normalised, lambda x: (x[..., None] > thresholds).mean((0, 1)), "performance profile")
    improvement = {}
    if baseline in arms:
        pairs = {label: [scores, arms[baseline]] for label, scores in arms.items() if label != baseline}
        improvement = _estimates(pairs, probability_of_improvement, "probability of improvement")
    elif baseline is not None and arms:
        notes.append(f"The baseline {baseline} is left out over tasks: no probability of improvement.")
    return Aggregates(tasks, iqm, profile, thresholds, improvement)


def _complete(cells: list[Cell], tasks: list[str], score: str, notes: list[str]) -> dict[str, np.ndarray]:
    """The scores [seeds, tasks] of the arms that have all tasks, with as many seeds, two or more, and equal frames."""
    by_label: dict[str, dict[str, Cell]] = defaultdict(dict)
    for cell in cells:
        by_label[cell.label][cell.task] = cell
    longest = {task: max(cell.frames for cell in cells if cell.task == task) for task in tasks}
    arms, out = {}, defaultdict(list)
    for label, own in by_label.items():
        seeds = {len(cell.seeds) for cell in own.values()}
        if absent := [task for task in tasks if task not in own]:
            out[f"no runs on {', '.join(absent)}"].append(label)
        elif short := [task for task in tasks if own[task].frames < longest[task]]:
            out[f"fewer frames than others on {', '.join(short)}"].append(label)
        elif min(seeds) < 2:
            out["fewer than two seeds on a task"].append(label)
        elif len(seeds) > 1:
            counts = ", ".join(f"{len(own[task].seeds)} on {task}" for task in tasks)
            out[f"unequal seeds, {counts}"].append(label)
        else:
            arms[label] = np.stack([own[task].scores[score] for task in tasks], axis=1)
    for reason, labels in out.items():
        notes.append(f"Left out over tasks: {'; '.join(labels)} ({reason}).")
    return arms


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Of all scores [seeds, tasks], [1]."""
    from rliable.metrics import aggregate_iqm

    return np.array([aggregate_iqm(scores)])


def probability_of_improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The mean over tasks of P(x > y), ties counted half, of scores [seeds, tasks] and [seeds', tasks]; [1].

    ``rliable.metrics`` has the same by a rank test, which takes 400 times as long at five seeds and tasks.
    """
    return np.array([((x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])).mean()])


def _estimates(scores: dict, function: Callable[..., np.ndarray], what: str) -> dict[str, Estimate]:
    """Each arm's number and interval. They do not depend on which arms there are."""
    from rliable.library import get_interval_estimates

    estimates = {}
    for label, own in tqdm(scores.items(), desc=what, leave=False, delay=1):
        with _seeded():
            values, intervals = get_interval_estimates({label: own}, function, reps=REPETITIONS)
        estimates[label] = Estimate(values[label], *intervals[label])
    return estimates


def interval_of_mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % bootstrap interval, [K] and [K], of the mean over seeds of values [seeds, K]."""
    draws = np.random.default_rng(0).integers(len(values), size=(REPETITIONS, len(values)))
    # How often each seed is drawn, [samples, seeds]: values[draws] would be [samples, seeds, K].
    weights = np.stack([(draws == seed).mean(1) for seed in range(len(values))], axis=1)
    low, high = np.percentile(weights @ values, [2.5, 97.5], axis=0)
    return low, high


@contextmanager
def _seeded() -> Iterator[None]:
    """For NumPy's global generator, from which rliable draws whatever random_state it is given."""
    state = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(state)
