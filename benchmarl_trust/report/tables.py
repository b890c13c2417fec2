"""Writes the numbers as markdown, which reads as a table in a terminal too, and as CSV."""

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarl_trust.report.aggregates import Aggregates, Bounds, Estimate
from benchmarl_trust.report.statistics import SCORES, Cell, Difference, holm


def by_task(cells: list[Cell]) -> str:
    """A row per task and arm: mean ± standard deviation over seeds."""
    rows = [["task", "algorithm", "seeds", "frames", *SCORES, "wall time (s)", "KL per iteration"]]
    largest = defaultdict(float)
    for cell in cells:
        largest[cell.task] = max(largest[cell.task], *(abs(cell.scores[name]).max() for name in SCORES))
    for cell in cells:
        digits = decimals(largest[cell.task])
        scores = [mean(cell.scores[name], digits) for name in SCORES]
        time, kl = (float(cell.scores[name].mean()) for name in ("time_s", "kl"))
        seeds, frames = str(len(cell.seeds)), str(cell.frames)
        rows.append([cell.task, cell.label, seeds, frames, *scores, _number(time, ".0f"), _number(kl, ".2g")])
    return table(rows, left=2)


def over_tasks(aggregates: Aggregates, baseline: str | None) -> str:
    """A row per arm; an empty string where nothing is known."""
    parts = []
    if aggregates.iqm:
        parts.append(("interquartile mean", aggregates.iqm))
    if aggregates.improvement:
        parts.append((f"P(improvement over {baseline})", aggregates.improvement))
    labels = dict.fromkeys(label for _, own in parts for label in own)
    rows = [["algorithm", *(f"{name}, 95 % interval" for name, _ in parts)]]
    rows += [[label, *(interval(own.get(label)) for _, own in parts)] for label in labels]
    return table(rows, left=1) if parts else ""


def differences(found: list[Difference]) -> str:
    """A row per arm and a column per task; an empty string where nothing is known."""
    tasks, labels = (list(dict.fromkeys(column)) for column in ([d.task for d in found], [d.label for d in found]))
    largest: dict[str, float] = defaultdict(float)
    for d in found:
        largest[d.task] = max(largest[d.task], *(abs(number) for number in d[2:5] if math.isfinite(number)))
    there = {(d.task, d.label): difference(d, decimals(largest[d.task])) for d in found}
    rows = [["algorithm", *tasks], *([label, *(there.get((task, label), "-") for task in tasks)] for label in labels)]
    return table(rows, left=1) if found else ""


def significant(found: list[Difference], level: float = 0.05) -> str:
    """Which differences are left once their p-values are corrected for their number; of one there is nothing to say."""
    corrected = zip(holm(np.array([d.p for d in found])).tolist(), found, strict=True)
    corrected = sorted(((p, d) for p, d in corrected if math.isfinite(p)), key=lambda pair: (pair[0], pair[1].p))
    if len(found) < 2 or not corrected:
        return ""
    named = [f"{d.label} on {d.task} (p = {rounded(p, level)})" for p, d in corrected]
    left = [name for name, (p, _) in zip(named, corrected, strict=True) if p < level]
    words = ", ".join(left) if left else f"none; the least is {named[0]}"
    return f"With Holm's correction for these {len(found)} differences p is below {level:g} for {words}."


def rounded(p: float, level: float) -> str:
    """Two digits, or as many as show on which side of the level it is.

    Examples:
        >>> rounded(0.0231, 0.05), rounded(0.04987, 0.05), rounded(0.049996, 0.05)
        ('0.023', '0.0499', '0.049996')
    """
    texts = (f"{p:.{digits}g}" for digits in range(2, 18))
    return next(text for text in texts if (float(text) < level) == (p < level))


def table(rows: Sequence[Sequence[str]], left: int) -> str:
    """A markdown table, padded; the first columns, so many, to the left.

    Examples:
        >>> print(table([["a", "b"], ["ccc", "1"]], left=1))
        | a   | b |
        |:----|--:|
        | ccc | 1 |
    """
    rows = [[cell.replace("|", "/") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = [
        " | ".join(
            cell.ljust(n) if i < left else cell.rjust(n) for i, (cell, n) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    rule = "|".join(":" + "-" * (n + 1) if i < left else "-" * (n + 1) + ":" for i, n in enumerate(widths))
    return "\n".join([f"| {first} |", f"|{rule}|", *(f"| {row} |" for row in others)])


def write_csv(cells: list[Cell], aggregates: Aggregates, out: Path) -> list[Path]:
    """``report.csv``, a row per task and arm, and where there is something over tasks ``aggregate.csv``."""
    names = [*SCORES, "time_s", "kl"]
    header = ["task", "label", "algorithm", "seeds", "frames"] + [f"{n}_{of}" for n in names for of in ("mean", "std")]
    rows: list[list] = [header]
    for cell in cells:
        values = [float(f(cell.scores[name])) for name in names for f in (np.mean, _deviation)]
        seeds = " ".join(map(str, cell.seeds))
        rows.append([cell.task, cell.label, cell.algorithm, seeds, cell.frames, *map(_plain, values)])
    files = [_write(rows, out / "report.csv")]
    parts = {"iqm": aggregates.iqm, "improvement": aggregates.improvement}
    labels = dict.fromkeys(label for own in parts.values() for label in own)
    if labels:
        header = ["label", "tasks"] + [f"{name}_{of}" for name in parts for of in ("estimate", "low", "high")]
        rows = [header]
        for label in labels:
            ends = [x for own in parts.values() for x in _three(own.get(label))]
            rows.append([label, len(aggregates.tasks), *map(_plain, ends)])
        files.append(_write(rows, out / "aggregate.csv"))
    return files


def write_differences(found: list[Difference], out: Path) -> None:
    """``differences.csv``, a row per task and arm, where there are any."""
    if found:
        corrected = holm(np.array([d.p for d in found]))
        rows = [[d.task, d.label, *map(_plain, (*d[2:], p))] for d, p in zip(found, corrected, strict=True)]
        _write([["task", "label", "difference", "low", "high", "p", "p_holm"], *rows], out / "differences.csv")


def describe_bounds(bounds: dict[str, Bounds], tasks: list[str]) -> list[str]:
    """A line per task."""
    return [
        f"{task}: {bounds[task]['low']:g} to {bounds[task]['high']:g} ({bounds[task]['source']})"
        for task in tasks
        if task in bounds
    ]


def _three(estimate: Estimate | None) -> tuple[float, float, float]:
    if estimate is None:
        return math.nan, math.nan, math.nan
    return estimate.value.item(), estimate.low.item(), estimate.high.item()


def decimals(largest: float) -> int:
    """Of a task's numbers by the largest: two; three where none is above 1, as of rates; none with one over 1000."""
    return 3 if largest <= 1 else 2 if largest <= 1000 else 0


def interval(estimate: Estimate | None) -> str:
    """An estimate with its interval."""
    return "-" if estimate is None else "{:.2f} [{:.2f}, {:.2f}]".format(*_three(estimate))


def difference(found: Difference, digits: int) -> str:
    """A difference with its interval, where that is known."""
    value, low, high = (f"{round(number, digits) + 0.0:.{digits}f}" for number in found[2:5])  # no -0.00
    return f"{value} ({low} to {high})" if math.isfinite(found.low) else value


def mean(values: np.ndarray, digits: int) -> str:
    """The mean over seeds, of several with the standard deviation."""
    text = f"{values.mean():.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {values.std():.{digits}f}"


def _deviation(values: np.ndarray) -> float:
    return float(values.std()) if len(values) > 1 else math.nan


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _plain(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else ""


def _write(rows: list[list], file: Path) -> Path:
    with file.open("w", newline="") as lines:
        csv.writer(lines, lineterminator="\n").writerows(rows)
    return file
