"""Writes the study's tables, and the text alternatives of its pictures, into the pages of the documentation.

    python benchmarks/study/pages.py    # make report does so, once the pictures are drawn

A table stands between two comments, of which the first says what it has::

    <!-- table: scores tuned final -->
    <!-- end of table -->

and a sentence's numbers, by task, between two others::

    <!-- numbers: difference tuned final hatrpo - mappo -->balance 9.56 (4.55 to 14.56)<!-- end -->

First comes one of ``TABLES`` or ``NUMBERS``, then what its function is told, as a rule a part of the plan. Of a part
the tasks are shown on which all its runs are saved. An arm's number is its radius; without one it has the package's
default.
"""

import argparse
import math
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import fmean, stdev

import yaml
from run import PLAN, planned
from scipy.stats import t

from benchmarl_trust.report import aggregates, compact, statistics, tables
from benchmarl_trust.report.runs import Run as SavedRun
from benchmarl_trust.report.statistics import Cell

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "algorithms").glob("*.md")),
]
TABLE = re.compile(r"<!-- table: (\w+) ([^\n]*?) -->\n(?:.*?\n)??<!-- end of table -->", re.DOTALL)
NUMBER = re.compile(r"<!-- numbers: (\w+) ([^\n]*?) -->[^\n]*?<!-- end -->")
PICTURE = re.compile(r"!\[[^\]]*\]\(((?:docs/|\.\./)?figures/([\w.]+))\)")
#: Of the rows: MAPPO, then who learns at once, in turns by gradient steps, and in turns by natural steps.
ORDER = ["mappo", "ippo", "clip", "mars", "maspo", "log", "gpae", "happo", "cliphappo", "a2po", "happo with gpae"]
ORDER += ["sequential mars", "hatrpo", "cliphatrpo", "hatrpow", "hatrpog"]
WORDS = {"final": "last", "best": "best", "area": "area"}


def arm_of(label: str) -> str:
    """Without its radius.

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
    return compact.load(RESULTS / part) if (RESULTS / part).is_dir() else []


@cache
def whole_tasks(part: str) -> list[str]:
    """The tasks on which all runs of the part are saved, in the plan's order."""
    wanted = Counter(run.task for run in planned(plan()) if run.part == part)
    there = Counter(run.task for run in saved(part))
    return [task for task in wanted if there[task] == wanted[task]]


@cache
def cells_of(part: str, metric: str = "return", whole: bool = True) -> dict[tuple[str, str], Cell]:
    """By task and label, in the order of the pages' rows; of the tasks that are whole, or of all."""
    runs = [run for run in saved(part) if not whole or run.task in whole_tasks(part)]
    known = {arm: place for place, arm in enumerate(ORDER)}
    found = sorted(
        statistics.cells(runs, metric, None, []), key=lambda cell: (known.get(arm_of(cell.label), 99), cell.label)
    )
    return {(cell.task, cell.label): cell for cell in sorted(found, key=lambda cell: tasks_of(part).index(cell.task))}


def tasks_of(part: str) -> list[str]:
    """The part's tasks in the plan's order."""
    return plan()["parts"][part]["tasks"]


def axes_of(part: str) -> tuple[list[str], list[str]]:
    """The tasks and the labels of the cells."""
    keys = list(cells_of(part))
    return list(dict.fromkeys(task for task, _ in keys)), list(dict.fromkeys(label for _, label in keys))


def digits_of(part: str, task: str) -> int:
    """Decimals of a task's returns, as the report has them: rates have three."""
    scores = (abs(cell.scores[name]).max() for (at, _), cell in cells_of(part).items() if at == task for name in WORDS)
    return 2 if max(scores) > 1 else 3


def mean(cell: Cell, score: str, digits: int) -> str:
    """Mean ± standard deviation over seeds."""
    return tables.mean(cell.scores[score], digits)


def difference(cell: Cell, other: Cell, score: str, digits: int) -> str:
    """Of the means, with Welch's 95 % interval."""
    found = statistics.Difference(cell.task, cell.label, *statistics.welch(cell.scores[score], other.scores[score]))
    return tables.difference(found, digits)


def short(task: str) -> str:
    """A task without its suite."""
    return task.split("/")[-1]


def markdown(rows: list[list[str]]) -> str:
    """Not padded, so that one number's change is one line's."""
    head, *others = rows
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in (head, ["---"] * len(head), *others))


def scores(part: str, *names: str) -> str:
    """A row for each arm: of each task these scores, mean ± standard deviation over seeds."""
    tasks, labels = axes_of(part)
    several = len(names) > 1
    head = [f"{short(task)}: {WORDS[name]}" if several else short(task) for task in tasks for name in names]
    cells, rows = cells_of(part), [["algorithm" if several else WORDS[names[0]], *head]]
    for label in labels:
        own = [mean(cells[task, label], name, digits_of(part, task)) for task in tasks for name in names]
        rows.append([f"`{label}`", *own])
    return markdown(rows)


def differences(part: str, score: str) -> str:
    """A row for each arm: of each task the difference from MAPPO's mean; and which of them Holm's correction leaves."""
    tasks, labels = axes_of(part)
    found = statistics.differences(list(cells_of(part).values()), "mappo", score)
    there = {(d.task, d.label): tables.difference(d, digits_of(part, d.task)) for d in found}
    rows = [[f"`{label}`", *(there[task, label] for task in tasks)] for label in labels if label != "mappo"]
    return f"{markdown([[f'{WORDS[score]}, less MAPPO', *map(short, tasks)], *rows])}\n\n{tables.significant(found)}"


def pairs(part: str, *words: str) -> str:
    """A row for each pair ``a - b``, divided by ``;``: of each task the difference of their last returns and areas."""
    tasks, labels = axes_of(part)
    cells, by_arm = cells_of(part), {arm_of(label): label for label in labels}
    named = [[by_arm[arm] for arm in pair.split(" - ")] for pair in " ".join(words).split("; ")]
    rows = [["difference", "of", *map(short, tasks)]]
    for label, other in named:
        for score in ("final", "area"):
            own = [difference(cells[t, label], cells[t, other], score, digits_of(part, t)) for t in tasks]
            rows.append([f"`{label}` − `{other}`", WORDS[score], *own])
    return markdown(rows)


def page(part: str, *words: str) -> str:
    """For an algorithm's page, a row for each task and score: the arms of the pairs, and the pairs' differences."""
    tasks, labels = axes_of(part)
    cells, by_arm = cells_of(part), {arm_of(label): label for label in labels}
    named = [tuple(by_arm[arm] for arm in pair.split(" - ")) for pair in " ".join(words).split("; ")]
    shown = [label for label in labels if any(label in pair for pair in named)]
    head = [*(f"`{label}`" for label in shown), *(f"`{label}` − `{other}`, 95 %" for label, other in named)]
    rows = [["with tuned radii", *head]]
    for task in tasks:
        for score in ("final", "area"):
            digits = digits_of(part, task)
            own = [mean(cells[task, label], score, digits) for label in shown]
            own += [difference(cells[task, label], cells[task, other], score, digits) for label, other in named]
            rows.append([f"{short(task)}: {WORDS[score]}", *own])
    return markdown(rows)


@cache
def aggregated(part: str, score: str) -> aggregates.Aggregates:
    """The numbers over the part's tasks."""
    bounds = aggregates.read_bounds([RESULTS / part / "bounds.json"], "return")
    return aggregates.aggregate(list(cells_of(part).values()), bounds, "mappo", score, "return", [])


def over_tasks(part: str, *names: str) -> str:
    """A row for each arm: over all tasks the interquartile mean and the probability of improvement over MAPPO."""
    tasks, labels = axes_of(part)
    found = [aggregated(part, name) for name in names]
    head = [f"{WORDS[name]}: {what}" for name in names for what in ("interquartile mean", "P(improvement over MAPPO)")]
    rows = [[f"{len(tasks)} tasks", *head]]
    for label in labels:
        own = [each.get(label) for of in found for each in (of.iqm, of.improvement)]
        rows.append([f"`{label}`", *("" if estimate is None else tables.interval(estimate) for estimate in own)])
    return markdown(rows)


def kl(part: str) -> str:
    """A row for each arm that logs its KL: of each task the mean over iterations, agents and seeds, in nats."""
    tasks, labels = axes_of(part)
    rows = [["KL per iteration, nats", *map(short, tasks)]]
    for label in labels:
        means = [float(cells_of(part)[task, label].scores["kl"].mean()) for task in tasks]
        if means[0] == means[0]:  # BenchMARL's own log none
            rows.append([f"`{label}`", *(f"{value:.2g}" for value in means)])
    return markdown(rows)


def matched(part: str) -> str:
    """A row for each arm, by the radius of MARS whose KL is nearest to its own: how near it is, and the difference."""
    ((task,), labels), cells = axes_of(part), cells_of(part)
    measured = {label: float(cells[task, label].scores["kl"].mean()) for label in labels}
    aims = sorted((label for label in labels if arm_of(label) == "mars"), key=measured.__getitem__)
    digits = digits_of(part, task)
    rows = [["MARS's ε", "arm", "KL per iteration", "over MARS's", *(WORDS[name] for name in ("final", "area"))]]
    rows[0] += [f"{WORDS[name]}, less MARS" for name in ("final", "area")]
    for aim in aims:
        for label in labels:
            if aim != min(aims, key=lambda other: abs(math.log(measured[label] / measured[other]))):
                continue
            own = [mean(cells[task, label], name, digits) for name in ("final", "area")]
            less = [difference(cells[task, label], cells[task, aim], name, digits) for name in ("final", "area")]
            share = f"{measured[label] / measured[aim]:.2f}"
            rows.append(
                [aim.split()[-1], f"`{label}`", f"{measured[label]:.2g}", share, *own]
                + (less if label != aim else ["", ""])
            )
    return markdown(rows)


def agents(part: str) -> str:
    """A row for each number of agents and arm: returns, and what the factor does to the variance of the advantages."""
    rows = [["agents", "arm", "last", "area", "last, less MAPPO", "Var(w(M) A) / Var(A), mean over positions"]]
    cells = cells_of(part)
    for (task, label), cell in cells.items():
        own = [mean(cell, name, 2) for name in ("final", "area")]
        less = difference(cell, cells[task, "mappo"], "final", 2) if label != "mappo" else ""
        logs = [log_variance(run) for run in saved(part) if (run.task, run.label) == (task, label)]
        known = [log for log in logs if log is not None]
        rows.append([task.split("=")[-1], f"`{label}`", *own, less, geometric(known) if known else ""])
    return markdown(rows)


def log_variance(run: SavedRun) -> float | None:
    """The mean over iterations of log Var(w(M) A) - log Var(A): the mean over the order's positions, and at its first.

    None where it was not logged, as by MAPPO.
    """
    name = "train_agents_policy_advantage_variance"
    weighted, plain = (run.curves.get(key, {}) for key in (name, f"{name}_position_0"))
    return fmean(math.log(weighted[at] / plain[at]) for at in weighted) if weighted else None


def geometric(logs: list[float]) -> str:
    """Geometric mean over seeds and its 95 % interval, by Student's t of the logarithms."""
    half = float(t.ppf(0.975, len(logs) - 1)) * stdev(logs) / math.sqrt(len(logs))
    low, center, high = (math.exp(fmean(logs) + shift) for shift in (-half, 0, half))
    return f"{center:.3g} ({low:.3g} to {high:.3g})"


def runs(part: str, metric: str, digits: str) -> str:
    """A row for each task and arm: final and best evaluation, area, and KL per iteration."""
    rows = [["task", "arm", "seeds", "last", "best", "area", "KL per iteration"]]
    for (task, label), cell in cells_of(part, metric, whole=False).items():
        own = [mean(cell, name, int(digits)) for name in ("final", "best", "area")]
        value = float(cell.scores["kl"].mean())
        rows.append([f"`{task}`", f"`{label}`", str(len(cell.seeds)), *own, f"{value:.2g}" if value == value else ""])
    return markdown(rows)


def state(*_: str) -> str:
    """A row for each part of the plan: how many of its runs are saved, and on which tasks all are."""
    rows = [["part", "arms", "tasks", "seeds", "runs", "done", "whole on"]]
    everything = planned(plan())
    for part in plan()["parts"]:
        own = [run for run in everything if run.part == part]
        arms, tasks, seeds = (len({getattr(run, name) for run in own}) for name in ("arm", "task", "seed"))
        whole = whole_tasks(part)
        on = "all" if len(whole) == tasks else ", ".join(map(short, whole)) or "none"
        rows.append([f"`{part}`", *map(str, (arms, tasks, seeds, len(own), len(saved(part)))), on])
    there = sum(len(saved(part)) for part in plan()["parts"])
    return markdown([*rows, ["together", "", "", "", str(len(everything)), str(there), ""]])


TABLES: dict[str, Callable[..., str]] = {
    "scores": scores,
    "differences": differences,
    "pairs": pairs,
    "page": page,
    "over_tasks": over_tasks,
    "kl": kl,
    "matched": matched,
    "agents": agents,
    "runs": runs,
    "state": state,
}


def by_task(part: str, of_task: Callable[[str], str]) -> str:
    """For a sentence."""
    return ", ".join(f"{short(task)} {of_task(task)}" for task in axes_of(part)[0]).replace("-", "−")


def in_words_difference(part: str, score: str, *words: str) -> str:
    """Of each task the difference of a pair ``a - b``."""
    cells, by_arm = cells_of(part), {arm_of(label): label for label in axes_of(part)[1]}
    label, other = (by_arm[arm] for arm in " ".join(words).split(" - "))
    return by_task(part, lambda task: difference(cells[task, label], cells[task, other], score, digits_of(part, task)))


def in_words_mean(part: str, score: str, *words: str) -> str:
    """Of each task an arm's mean ± standard deviation."""
    cells, by_arm = cells_of(part), {arm_of(label): label for label in axes_of(part)[1]}
    label = by_arm[" ".join(words)]
    return by_task(part, lambda task: mean(cells[task, label], score, digits_of(part, task)))


def in_words_iqm(part: str, score: str, *words: str) -> str:
    """Over all tasks an arm's interquartile mean."""
    by_arm = {arm_of(label): label for label in axes_of(part)[1]}
    return tables.interval(aggregated(part, score).iqm[by_arm[" ".join(words)]])


NUMBERS = {"difference": in_words_difference, "mean": in_words_mean, "iqm": in_words_iqm}


def filled(text: str, alts: dict[str, str]) -> str:
    """A page with its tables, numbers and text alternatives as they are made now."""

    def with_table(found: re.Match) -> str:
        kind, words = found[1], found[2].split()
        return f"<!-- table: {kind} {found[2]} -->\n{TABLES[kind](*words)}\n<!-- end of table -->"

    def with_numbers(found: re.Match) -> str:
        words = NUMBERS[found[1]](*found[2].split())
        return f"<!-- numbers: {found[1]} {found[2]} -->{words}<!-- end -->"

    def with_alt(found: re.Match) -> str:
        return f"![{alts[found[2]]}]({found[1]})" if found[2] in alts else found[0]

    return PICTURE.sub(with_alt, NUMBER.sub(with_numbers, TABLE.sub(with_table, text)))


def main() -> None:
    """Write what has changed."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    alts = yaml.safe_load((ROOT / "docs" / "figures" / "alt.yaml").read_text())
    for file in PAGES:
        text = file.read_text()
        now = filled(text, alts)
        if now != text:
            file.write_text(now)
            print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()
