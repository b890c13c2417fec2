"""Writes the study's tables and numbers, and the pictures' text alternatives, into the pages of the documentation.

    python benchmarks/study/pages.py    # make report does so, once the pictures are drawn

A table stands between two comments, of which the first says what it has, and so do a sentence's numbers, by task::

    <!-- table: scores tuned final -->
    <!-- end of table -->
    <!-- numbers: difference tuned final hatrpo - mappo -->balance 9.56 (4.55 to 14.56)<!-- end -->

First comes one of ``TABLES`` or ``NUMBERS``, then what its function is told, as a rule a part of the plan. Of a part
the tasks are shown on which all its runs are saved. An arm's number is its radius, or its λ in the arms
that the plan says so of; without one it has the package's default.
"""

import argparse
import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import yaml
from run import PLAN, Run, planned
from scipy.stats import t as student_t

from benchmarl_trust.report import aggregates, compact, statistics, tables
from benchmarl_trust.report.runs import Run as SavedRun
from benchmarl_trust.report.statistics import Cell, Difference

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "algorithms").glob("*.md")),
]
# What is between the comments has no comment itself, so that one without its end does not reach to another's.
TABLE = re.compile(r"<!-- table: (.*?) -->\n(?:(?!.*<!--).*\n)*<!-- end of table -->")
NUMBER = re.compile(r"<!-- numbers: (.*?) -->(?:(?!<!--).)*<!-- end -->")
PICTURE = re.compile(r"!\[(?:(?!!\[).)*?\]\(((?:docs/|\.\./)?figures/([\w.]+))\)")
#: Of the rows: MAPPO, then who learns at once, in turns by gradient steps, and in turns by natural steps.
ORDER = ["mappo", "clip normalised", "ippo", "mars", "clip", "maspo", "log"]
ORDER += ["gpae", "gpae plain", "gpae 4 none", "gpae 4 dt"]
ORDER += ["happo", "happo normalised", "cliphappo", "a2po", "happo with gpae", "sequential mars"]
ORDER += ["hatrpo", "hatrpo normalised", "cliphatrpo", "hatrpow", "hatrpog"]
#: What is compared where it is not the return.
METRICS = {"smax": "win_rate"}
#: Whose factor weighs one advantage for all; A2PO's is another at each position, and orders them.
WEIGHTED = ("happo", "cliphappo")
#: The baselines' names.
NAMES = {"mappo": "MAPPO", "hatrpo": "HATRPO"}
#: What stands at the head of a part's table on an algorithm's page.
TITLES = {"tuned": "with tuned radii", "equal_budgets": "equal budgets", "equal_lambda": "equal λ"}
WORDS = {"final": "last", "best": "best", "area": "area"}


def arm_of(label: str) -> str:
    """Without its number.

    Examples:
        >>> arm_of("happo 0.4"), arm_of("happo with gpae")
        ('happo', 'happo with gpae')
    """
    return re.sub(r" [\d.]+$", "", label)


@cache
def plan() -> dict:
    """The study's."""
    return yaml.safe_load(PLAN.read_text())


@cache
def saved(part: str) -> list[SavedRun]:
    """The part's runs that are there."""
    return compact.load(RESULTS / part) if (RESULTS / part / "runs.json").is_file() else []


def in_order(task: str) -> list[str | int]:
    """The report's order, by which its bootstrap draws, but 16 agents after 2."""
    return [int(text) if text.isdigit() else text for text in re.split(r"(\d+)", task)]


def missing(part: str) -> list[Run]:
    """The part's runs that are not saved as they are planned."""
    there = {(run.task, run.label, run.seed, tuple(run.overrides)) for run in saved(part) if run.finished}
    own = [run for run in planned(plan()) if run.part == part]
    return [run for run in own if (run.task, run.arm, run.seed, run.settings) not in there]


@cache
def whole_tasks(part: str) -> list[str]:
    """The tasks on which all runs of the part are saved, in order."""
    return sorted(set(plan()["parts"][part]["tasks"]) - {run.task for run in missing(part)}, key=in_order)


@cache
def cells_of(part: str, whole: bool = True) -> dict[tuple[str, str], Cell]:
    """By task and label, in the order of the pages' rows; of the tasks that are whole, or of all.

    Raises:
        ValueError: for a run that cannot be compared.
    """
    runs = [run for run in saved(part) if not whole or run.task in whole_tasks(part)]
    if not runs:
        return {}
    notes: list[str] = []
    found = statistics.cells(runs, METRICS.get(part, "return"), None, notes)
    if sum(len(cell.seeds) for cell in found) < len(runs):
        raise ValueError(f"Runs of {part} cannot be compared, so that its tables are not whole:\n" + "\n".join(notes))
    arms = {arm: place for place, arm in enumerate(ORDER)}

    def place(cell: Cell) -> tuple:
        return in_order(cell.task), arms.get(arm_of(cell.label), len(arms)), cell.label

    return {(cell.task, cell.label): cell for cell in sorted(found, key=place)}


def both(part: str, other_part: str) -> list[str]:
    """The tasks that are whole in two parts.

    Raises:
        ValueError: where there are none.
    """
    tasks = [task for task in axes_of(part)[0] if task in whole_tasks(other_part)]
    if not tasks:
        raise ValueError(f"{part} and {other_part} have no whole task in common.")
    return tasks


def axes_of(part: str) -> tuple[list[str], list[str]]:
    """The tasks and the labels of the cells."""
    keys = list(cells_of(part))
    return list(dict.fromkeys(task for task, _ in keys)), list(dict.fromkeys(label for _, label in keys))


def check(part: str) -> None:
    """Refuse a part that the plan does not have.

    Raises:
        ValueError: which names those that there are.
    """
    if part not in plan()["parts"]:
        raise ValueError(f"{part} is no part of the plan, which has {', '.join(plan()['parts'])}.")


def check_score(score: str) -> None:
    """Refuse a score that there is not.

    Raises:
        ValueError: which names those that there are.
    """
    if score not in WORDS:
        raise ValueError(f"{score} is no score; there are {', '.join(WORDS)}.")


def label_of(part: str, name: str) -> str:
    """The label that is named, with its radius or without.

    Raises:
        ValueError: where there is none, or more than one.
    """
    check(part)
    labels = axes_of(part)[1]
    found = [label for label in labels if label == name] or [label for label in labels if arm_of(label) == name]
    if len(found) != 1:
        one_of = f"Name one of {', '.join(labels)}." if labels else "No task is whole."
        raise ValueError(f"{part}: {name} is {' or '.join(found) or 'not there'}. {one_of}")
    return found[0]


def baseline_of(part: str) -> tuple[str, str]:
    """The label of the arm that others are compared with, the first of the rows, and its name."""
    label = axes_of(part)[1][0]
    return label, NAMES.get(arm_of(label), f"`{label}`")


def pairs_of(part: str, words: tuple[str, ...]) -> list[tuple[str, str]]:
    """The labels of ``a - b; c - d``."""
    named = [pair.split(" - ") for pair in " ".join(words).split("; ")]
    return [(label_of(part, one), label_of(part, other)) for one, other in named]


@cache
def digits_of(part: str, task: str) -> int:
    """Decimals of a task's returns."""
    own = [cell for (at, _), cell in cells_of(part).items() if at == task]
    return tables.decimals(max(abs(cell.scores[name]).max() for cell in own for name in WORDS))


def mean(part: str, task: str, label: str, score: str) -> str:
    """Mean ± standard deviation over seeds."""
    check_score(score)
    return tables.mean(cells_of(part)[task, label].scores[score], digits_of(part, task))


def compared(part: str, task: str, label: str, other: str, score: str, other_part: str = "") -> Difference:
    """The difference of two arms' means by Welch's test; the other arm is of the same part, or of another.

    Raises:
        ValueError: for fewer than two seeds, or unequal frames.
    """
    check_score(score)
    cells = cells_of(part)[task, label], cells_of(other_part or part)[task, other]
    pair = [dataclasses.replace(cell, label=name) for cell, name in zip(cells, ("one", "other"), strict=True)]
    found = statistics.differences(pair, "other", score)
    if not found:
        raise ValueError(f"{task}: {label} and {other} need two seeds or more, and equal frames.")
    return found[0]._replace(label=label)


def difference(part: str, task: str, label: str, other: str, score: str, other_part: str = "") -> str:
    """Of two arms' means, with its 95 % interval."""
    return tables.difference(compared(part, task, label, other, score, other_part), digits_of(part, task))


def short(task: str) -> str:
    """A task without its suite; of a number of agents that alone.

    Examples:
        >>> short("smax/3m"), short("vmas/balance, n_agents=8")
        ('3m', '8 agents')
    """
    return f"{agents_of(task)} agents" if "n_agents=" in task else task.split("/")[-1]


def markdown(rows: list[list[str]]) -> str:
    """Not padded, so that one number's change is one line's."""
    if len(rows) < 2:
        return "Not run yet."
    head, *others = rows
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *others)]
    return re.sub(r"\|  (?=\|)", "| ", "\n".join(lines))


def scores(part: str, *names: str) -> str:
    """A row for each arm: of each task these scores, mean ± standard deviation over seeds."""
    tasks, labels = axes_of(part)
    columns = [(task, name) for task in tasks for name in names]
    several = len(names) > 1
    head = [f"{short(task)}: {WORDS[name]}" if several else short(task) for task, name in columns]
    rows = [[f"`{label}`", *(mean(part, task, label, name) for task, name in columns)] for label in labels]
    return markdown([["algorithm" if several else WORDS[names[0]], *head], *rows])


def differences(part: str, score: str) -> str:
    """A row for each arm: of each task the difference from the first's mean; and which Holm's correction leaves."""
    baseline, name = baseline_of(part)
    return less_than(part, score, baseline, name, part)


def less(part: str, score: str, other_part: str, *words: str) -> str:
    """The same from an arm of another part, on the tasks of both."""
    other = label_of(other_part, " ".join(words))
    return less_than(part, score, other, f"`{other}`", other_part)


def less_than(part: str, score: str, other: str, name: str, other_part: str) -> str:
    """The table of the arms' differences from one arm, which it calls by its name."""
    tasks, labels = both(part, other_part), axes_of(part)[1]
    rows, all_found = [], []
    for label in labels:
        if (part, label) == (other_part, other):
            continue
        found = [compared(part, task, label, other, score, other_part) for task in tasks]
        rows.append([f"`{label}`", *(tables.difference(d, digits_of(part, d.task)) for d in found)])
        all_found += found
    table = markdown([[f"{WORDS[score]}, less {name}", *map(short, tasks)], *rows])
    return f"{table}\n\n{tables.significant(all_found)}"


def pairs(part: str, *words: str) -> str:
    """A row for each pair ``a - b``, divided by ``;``: of each task the difference of their last returns and areas.

    Below them is which of all these Holm's correction leaves.
    """
    tasks = axes_of(part)[0]
    rows, all_found = [], []
    for (label, other), score in itertools.product(pairs_of(part, words), ("final", "area")):
        found = [compared(part, task, label, other, score) for task in tasks]
        texts = [tables.difference(d, digits_of(part, d.task)) for d in found]
        rows.append([f"`{label}` − `{other}`", WORDS[score], *texts])
        all_found += [d._replace(label=f"{label} − {other}, {WORDS[score]},") for d in found]
    return f"{markdown([['difference', 'of', *map(short, tasks)], *rows])}\n\n{tables.significant(all_found)}"


def page(part: str, *words: str) -> str:
    """For an algorithm's page, a row for each task and score: the arms of the pairs, and the pairs' differences.

    Below them is where each pair is told apart.
    """
    tasks, labels = axes_of(part)
    named = pairs_of(part, words)
    shown = [label for label in labels if any(label in pair for pair in named)]
    head = [*(f"`{label}`" for label in shown), *(f"`{label}` − `{other}`, 95 %" for label, other in named)]
    rows = [[TITLES[part], *head]]
    for task in tasks:
        for score in ("final", "area"):
            own = [mean(part, task, label, score) for label in shown]
            own += [difference(part, task, label, other, score) for label, other in named]
            rows.append([f"{short(task)}: {WORDS[score]}", *own])
    told = "\n".join(f"- {told_apart(part, *pair)}" for pair in named)
    return f"{markdown(rows)}\n\nWhere 0 is not in the interval, before a correction for their number:\n\n{told}"


def told_apart(part: str, label: str, other: str) -> str:
    """A sentence that says on which tasks 0 is not in the interval of a pair's difference, at the end or in area."""
    sides: dict[str, dict[str, list[str]]] = {"above": {}, "below": {}}
    for task, score in itertools.product(axes_of(part)[0], ("final", "area")):
        found = compared(part, task, label, other, score)
        if found.low > 0 or found.high < 0:
            side = sides["above" if found.low > 0 else "below"]
            side.setdefault(short(task), []).append(WORDS[score])
    if not any(sides.values()):
        return f"`{label}` is told apart from `{other}` on no task."
    above, below = (
        ", ".join(f"{task} ({' and '.join(names)})" for task, names in side.items()) for side in sides.values()
    )
    return f"`{label}` is above `{other}` on {above or 'no task'}; below it on {below or 'no task'}."


@cache
def aggregated(part: str, score: str) -> aggregates.Aggregates:
    """The numbers over the part's tasks, returns normalised by the bounds of ``tuned``.

    Raises:
        ValueError: where something is left out of them.
    """
    notes: list[str] = []
    metric = METRICS.get(part, "return")
    bounds = aggregates.read_bounds([RESULTS / "tuned" / "bounds.json"], metric)
    baseline, _ = baseline_of(part)
    found = aggregates.aggregate(list(cells_of(part).values()), bounds, baseline, score, metric, notes)
    if notes:
        raise ValueError("\n".join(notes))
    return found


def over_tasks(part: str, *names: str) -> str:
    """A row for each arm: over all tasks the interquartile mean and the probability of improvement over the first."""
    tasks, labels = axes_of(part)
    _, baseline = baseline_of(part)
    found = [aggregated(part, name) for name in names]
    what = ("interquartile mean", f"P(improvement over {baseline})")
    head = [f"{WORDS[name]}: {text}" for name in names for text in what]
    rows = [[f"{len(tasks)} tasks", *head]]
    for label in labels:
        own = [each.get(label) for of in found for each in (of.iqm, of.improvement)]
        rows.append([f"`{label}`", *("" if estimate is None else tables.interval(estimate) for estimate in own)])
    return markdown(rows)


def kl_of(cell: Cell) -> float:
    """The mean over iterations, agents and seeds, in nats; nan for BenchMARL's own algorithms, which log none."""
    return float(cell.scores["kl"].mean())


def kl(part: str) -> str:
    """A row for each arm that logs its KL: of each task the mean over iterations, agents and seeds, in nats."""
    tasks, labels = axes_of(part)
    means = {label: [kl_of(cells_of(part)[task, label]) for task in tasks] for label in labels}
    rows = [[f"`{label}`", *(f"{x:.2g}" for x in own)] for label, own in means.items() if not any(map(math.isnan, own))]
    return markdown([["KL per iteration, nats", *map(short, tasks)], *rows])


def matched(part: str) -> str:
    """A row for each arm of a part of equal KL, below the MARS whose KL its radius was read off for.

    The radii of an arm are in the order of MARS's, as ``choose.py matched`` prints them.

    Raises:
        ValueError: for an arm that has not one for each of MARS's.
    """
    tasks, _ = axes_of(part)
    rows = [
        ["MARS's ε", "arm", "KL per iteration", "KL / MARS's", "last", "area", "last, less MARS", "area, less MARS"]
    ]
    grids = {arm: next(iter(radius.values())) for arm, radius in plan()["parts"][part]["radius"].items()}
    if unequal := [arm for arm, grid in grids.items() if len(grid) != len(grids["mars"])]:
        raise ValueError(
            f"{', '.join(unequal)} in plan.yaml: give one radius for each of MARS's, or leave the arm out."
        )
    for task in tasks:
        for place, aim in enumerate(grids["mars"]):
            for arm in sorted(grids, key=ORDER.index):
                label, other = f"{arm} {grids[arm][place]:g}", f"mars {aim:g}"
                measured, wanted = (kl_of(cells_of(part)[task, name]) for name in (label, other))
                share = f"{measured / wanted:.2f}" + ("" if abs(measured / wanted - 1) <= 0.2 else ", beyond 20 %")
                own = [mean(part, task, label, score) for score in ("final", "area")]
                own += (
                    ["", ""]
                    if label == other
                    else [difference(part, task, label, other, score) for score in ("final", "area")]
                )
                rows.append([f"{aim:g}", f"`{label}`", f"{measured:.2g}", share, *own])
    return markdown(rows)


def agents(part: str) -> str:
    """A row for each number of agents and arm: returns, and what the factor does to the variance of the advantages."""
    what = "Var(w(M) A) / Var(A): mean over the positions after the first, geometric over iterations and seeds"
    baseline, name = baseline_of(part)
    rows = [["agents", "arm", "last", "area", f"last, less {name}", f"area, less {name}", f"{what}, 95 % interval"]]
    for task, label in cells_of(part):
        own = [mean(part, task, label, score) for score in ("final", "area")]
        less = (
            ["", ""]
            if label == baseline
            else [difference(part, task, label, baseline, score) for score in ("final", "area")]
        )
        ratio = variance(part, task, label) if label in WEIGHTED else ""
        rows.append([str(agents_of(task)), f"`{label}`", *own, *less, ratio])
    return markdown(rows)


def agents_of(task: str) -> int:
    """The number that its name ends with."""
    return int(task.split("=")[-1])


def variance_of(part: str, task: str, label: str) -> tuple[float, float, float]:
    """Var(w(M) A) / Var(A), geometric mean over iterations and seeds, and its interval."""
    own = [run for run in saved(part) if (run.task, run.label) == (task, label)]
    return geometric(np.array([log_variance(run, agents_of(task)) for run in own]))


def variance(part: str, task: str, label: str) -> str:
    """The ratio of the variances, and its interval."""
    return "{:#.3g} ({:#.3g} to {:#.3g})".format(*variance_of(part, task, label))


def log_variance(run: SavedRun, number: int) -> float:
    """The mean over iterations of log Var(w(M) A) / Var(A), the former the mean over the positions after the first.

    Logged are the mean over all positions and the first, whose M is 1.

    Raises:
        ValueError: where one is not logged, or not finite.
    """
    name = "train_agents_policy_advantage_variance"
    keys = (name, f"{name}_position_0")
    if absent := [key for key in keys if key not in run.curves]:
        raise ValueError(f"{run.name}: {', '.join(absent)} not saved. Name it in the part's `metrics` in plan.yaml.")
    everywhere, first = (np.array(list(run.curves[key].values())) for key in keys)
    log = float(np.log((number * everywhere - first) / (number - 1) / first).mean())
    if not math.isfinite(log):
        raise ValueError(f"{run.name}: a variance of its advantages is not finite, or 0.")
    return log


def student(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over seeds and the ends of its 95 % interval, by Student's t, of values [seeds].

    Raises:
        ValueError: for fewer than two seeds.
    """
    if len(values) < 2:
        raise ValueError("An interval over seeds needs two seeds or more.")
    half = student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    center = values.mean()
    return float(center), float(center - half), float(center + half)


def geometric(logs: np.ndarray) -> tuple[float, float, float]:
    """Geometric mean over seeds and the ends of its interval, of logarithms [seeds]."""
    center, low, high = map(math.exp, student(logs))
    return center, low, high


def runs(part: str) -> str:
    """A row for each task and arm of all that is there: final and best evaluation, area, and KL per iteration."""
    rows = [["task", "arm", "seeds", "last", "best", "area", "KL per iteration"]]
    cells = cells_of(part, whole=False)
    digits = tables.decimals(max(abs(cell.scores[name]).max() for cell in cells.values() for name in WORDS))
    for (task, label), cell in cells.items():
        own = [tables.mean(cell.scores[name], digits) for name in WORDS]
        value = kl_of(cell)
        rows.append(
            [f"`{task}`", f"`{label}`", str(len(cell.seeds)), *own, "" if math.isnan(value) else f"{value:.2g}"]
        )
    return markdown(rows)


def state() -> str:
    """A row for each part of the plan: how many of its runs are saved, and on which tasks all are."""
    rows = [["part", "arms", "tasks", "seeds", "runs", "done", "whole on"]]
    everything, there = planned(plan()), 0
    for part in plan()["parts"]:
        own = [run for run in everything if run.part == part]
        arms, tasks, seeds = (len({getattr(run, name) for run in own}) for name in ("arm", "task", "seed"))
        whole = whole_tasks(part)
        on = "all" if len(whole) == tasks else ", ".join(map(short, whole)) or "none"
        done = len(own) - len(missing(part))
        rows.append([f"`{part}`", *map(str, (arms, tasks, seeds, len(own), done)), on])
        there += done
    return markdown([*rows, ["together", "", "", "", str(len(everything)), str(there), ""]])


def by_task(tasks: list[str], of_task: Callable[[str], str]) -> str:
    """For a sentence."""
    return ", ".join(f"{short(task)} {re.sub(r'-(?=[0-9])', '−', of_task(task))}" for task in tasks)


def difference_by_task(part: str, score: str, *words: str) -> str:
    """Of each task the difference of a pair ``a - b``."""
    ((label, other),) = pairs_of(part, words)
    return by_task(axes_of(part)[0], lambda task: difference(part, task, label, other, score))


def mean_by_task(part: str, score: str, *words: str) -> str:
    """Of each task an arm's mean ± standard deviation."""
    label = label_of(part, " ".join(words))
    return by_task(axes_of(part)[0], lambda task: mean(part, task, label, score))


def late_by_task(part: str, number: str, *words: str) -> str:
    """Of each task the mean over an arm's last evaluations, so many; mean ± standard deviation over seeds."""
    label = label_of(part, " ".join(words))

    def of_task(task: str) -> str:
        _, values = cells_of(part)[task, label].common
        if not 0 < int(number) <= values.shape[1]:
            raise ValueError(f"{number} of {label}'s evaluations on {task}: it has {values.shape[1]}.")
        return tables.mean(values[:, -int(number) :].mean(axis=1), digits_of(part, task))

    return by_task(axes_of(part)[0], of_task)


def across_by_task(part: str, other_part: str, score: str, *words: str) -> str:
    """Of each task the difference of a pair ``a - b``, of which b is another part's."""
    one, other = " ".join(words).split(" - ")
    label, other_label = label_of(part, one), label_of(other_part, other)
    tasks = both(part, other_part)
    return by_task(tasks, lambda task: difference(part, task, label, other_label, score, other_part))


def variance_by_task(part: str, *words: str) -> str:
    """Of each number of agents what an arm's factor makes of the variance of the advantages."""
    label = label_of(part, " ".join(words))
    return by_task(axes_of(part)[0], lambda task: variance(part, task, label))


def iqm(part: str, score: str, *words: str) -> str:
    """Over all tasks an arm's interquartile mean."""
    return tables.interval(aggregated(part, score).iqm[label_of(part, " ".join(words))])


def improvement(part: str, score: str, *words: str) -> str:
    """Over all tasks an arm's probability of improvement over the first."""
    return tables.interval(aggregated(part, score).improvement[label_of(part, " ".join(words))])


TABLES: dict[str, Callable[..., str]] = {
    "scores": scores,
    "differences": differences,
    "pairs": pairs,
    "less": less,
    "page": page,
    "over_tasks": over_tasks,
    "kl": kl,
    "matched": matched,
    "agents": agents,
    "runs": runs,
    "state": state,
}
NUMBERS: dict[str, Callable[..., str]] = {
    "difference": difference_by_task,
    "mean": mean_by_task,
    "late": late_by_task,
    "across": across_by_task,
    "variance": variance_by_task,
    "iqm": iqm,
    "improvement": improvement,
}


def made(kinds: dict[str, Callable[..., str]], words: str) -> str:
    """What a comment's words ask for, or that no task of the part is whole.

    Raises:
        ValueError: where they ask for what is not there; it names them.
    """
    kind, *arguments = words.split()
    try:
        if kind not in kinds:
            raise ValueError(f"{kind} is none of {', '.join(kinds)}.")
        for part in arguments[:1]:
            check(part)
            if kind != "runs" and not whole_tasks(part):
                return markdown([])
        return kinds[kind](*arguments)
    except KeyError as error:
        raise ValueError(f"<!-- {words} -->: there is no {error}.") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"<!-- {words} -->: {error}") from error


def filled(text: str, alts: dict[str, str]) -> str:
    """A page with its tables, numbers and text alternatives as they are made now.

    Raises:
        ValueError: where a comment has no end, or an end no beginning.
    """
    for begin, end, pattern in (("table:", "end of table", TABLE), ("numbers:", "end", NUMBER)):
        counts = text.count(f"<!-- {begin} "), text.count(f"<!-- {end} -->"), len(pattern.findall(text))
        if len(set(counts)) > 1:
            raise ValueError(f"<!-- {begin} ... -->: {counts[0]} begin, {counts[1]} end, {counts[2]} are whole.")

    def with_table(found: re.Match) -> str:
        return f"<!-- table: {found[1]} -->\n{made(TABLES, found[1])}\n<!-- end of table -->"

    def with_numbers(found: re.Match) -> str:
        return f"<!-- numbers: {found[1]} -->{made(NUMBERS, found[1])}<!-- end -->"

    def with_alt(found: re.Match) -> str:
        return f"![{alts[found[2]]}]({found[1]})" if found[2] in alts else found[0]

    return PICTURE.sub(with_alt, NUMBER.sub(with_numbers, TABLE.sub(with_table, text)))


def main() -> None:
    """Write what has changed."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    alts = yaml.safe_load((ROOT / "docs" / "figures" / "alt.yaml").read_text())
    for file in PAGES:
        text = file.read_text()
        try:
            now = filled(text, alts)
        except ValueError as error:
            raise ValueError(f"{file.relative_to(ROOT)}: {error}") from error
        if now != text:
            file.write_text(now)
            print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()
