r"""The numbers of each task and arm.

A run's evaluations are returns :math:`R(t)`, the mean over episodes, at frames :math:`t_1 < … < t_K`:

.. math:: \text{final} = R(t_K), \qquad \text{best} = \max_k R(t_k), \qquad
    \text{area} = \frac{1}{t_K - t_1} \sum_{k<K} (t_{k+1} - t_k) \frac{R(t_k) + R(t_{k+1})}{2}

so that the area is the mean return over frames (trapezoid). With n seeds, a table has their mean and standard deviation
:math:`\sqrt{\sum_i (x_i - \bar x)^2 / n}`. The difference of two arms' means has the interval of Welch's t-test, which
assumes neither equal variances nor paired seeds; its p-values are corrected for their number by Holm's method.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarl_trust.report.runs import Curve, ReportError, Run

SCORES = ("final", "best", "area")


@dataclass
class Cell:
    """The runs of one task and arm that are compared.

    Attributes:
        task (str): the task.
        label (str): the arm.
        algorithm (str): its algorithm.
        seeds (list of int): one per run.
        curves (list): the metric by frames, one per run.
        frames (int): at which the last evaluation was made.
        scores (dict of numpy.ndarray): ``final``, ``best``, ``area``, and where logged ``time_s`` and ``kl``, [seeds].
    """

    task: str
    label: str
    algorithm: str
    seeds: list[int]
    curves: list[Curve]
    frames: int
    scores: dict[str, np.ndarray]

    @property
    def common(self) -> tuple[np.ndarray, np.ndarray]:
        """The frames at which all seeds were evaluated, [K], and the values there, [seeds, K]."""
        frames = sorted(set.intersection(*(set(curve) for curve in self.curves)))
        return np.array(frames), np.array([[curve[at] for at in frames] for curve in self.curves])


def area(curve: Curve) -> float:
    """The mean over frames, by the trapezoid rule; of one evaluation its value.

    Examples:
        >>> area({10: 0.0, 20: 2.0, 40: 4.0})
        2.3333333333333335
    """
    frames, values = np.array(list(curve), dtype=float), np.array(list(curve.values()))
    return float(np.trapezoid(values, frames) / (frames[-1] - frames[0])) if len(frames) > 1 else float(values[0])


class Difference(NamedTuple):
    """Of two arms' means on a task, the ends of its 95 % interval, and the p-value of no difference."""

    task: str
    label: str
    value: float
    low: float
    high: float
    p: float


def differences(found: list[Cell], baseline: str | None, score: str) -> list[Difference]:
    """Of each arm from the baseline, on the tasks where both have two seeds or more and equal frames.

    Args:
        found (list of Cell): as :func:`cells` gives them.
        baseline (str, optional): an arm's label; with None there are no differences.
        score (str): of ``SCORES``.
    """
    others = {cell.task: cell for cell in found if cell.label == baseline}
    pairs = [(cell, others[cell.task]) for cell in found if cell.task in others and cell.label != baseline]
    return [
        Difference(cell.task, cell.label, *welch(cell.scores[score], other.scores[score]))
        for cell, other in pairs
        if cell.frames == other.frames and min(len(cell.seeds), len(other.seeds)) > 1
    ]


def welch(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float, float]:
    r"""The difference of means, its 95 % interval and its p-value by Welch's t-test.

    :math:`\bar x - \bar y \pm t_\nu \sqrt{s_x^2 / n_x + s_y^2 / n_y}` with the 97.5 % quantile :math:`t_\nu` of
    Student's distribution and the degrees of freedom :math:`\nu` of Welch and Satterthwaite; p is two-sided.

    Args:
        x (numpy.ndarray): one arm's scores, [seeds], two or more.
        y (numpy.ndarray): another's, [seeds'].

    Returns: difference, low, high and p; where neither arm has any spread nothing is known but the difference, nan.

    Examples:
        >>> [round(number, 3) for number in welch(np.array([4.0, 6.0]), np.array([1.0, 3.0]))]
        [3.0, -3.085, 9.085, 0.168]
    """
    from scipy.stats import t

    value = float(x.mean() - y.mean())
    a, b = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    if np.ptp(x) == 0 == np.ptp(y):  # rounding leaves a variance above 0
        return value, math.nan, math.nan, math.nan
    freedom = (a + b) ** 2 / (a**2 / (len(x) - 1) + b**2 / (len(y) - 1))
    half = float(t.ppf(0.975, freedom) * math.sqrt(a + b))
    return value, value - half, value + half, float(2 * t.sf(abs(value) / math.sqrt(a + b), freedom))


def holm(p: np.ndarray) -> np.ndarray:
    r"""p-values corrected for their number, so that the chance of any false one below a level is at most that level.

    :math:`\tilde p_{(i)} = \max_{j \le i} \min(1, (m - j + 1) p_{(j)})` of m values in ascending order (Holm 1979).

    Args:
        p (numpy.ndarray): the values, [m]; those that are nan stay so, and count as the largest.

    Examples:
        >>> holm(np.array([0.04, 0.01, 0.03])).tolist()
        [0.06, 0.03, 0.06]
    """
    corrected = p.copy()
    (known,) = np.nonzero(np.isfinite(p))
    order = known[np.argsort(p[known])]
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(p), len(p) - len(order), -1)).clip(max=1)
    return corrected


def cells(runs: list[Run], metric: str, up_to: int | None, notes: list[str]) -> list[Cell]:
    """The runs by task and arm, without those that cannot be compared, which are said in ``notes``.

    Args:
        runs (list of Run): as read.
        metric (str): what is compared.
        up_to (int, optional): look no further than these frames; None: all.
        notes (list of str): is added to.

    Raises:
        ReportError: if nothing is left.
    """
    grouped: dict[tuple, list[tuple[Run, Curve]]] = defaultdict(list)
    for run in runs:
        curve = {at: v for at, v in sorted(run.curves.get(metric, {}).items()) if up_to is None or at <= up_to}
        if note := _unfit(run, curve, metric, up_to):
            notes.append(note)
        else:
            grouped[run.task, run.label].append((run, curve))
    found = [_cell(own, up_to, notes) for own in grouped.values()]
    if not found:
        raise ReportError("No run can be reported.\n" + "\n".join(f"- {note}" for note in notes))
    _note_unequal(found, notes)
    return found


def _unfit(run: Run, curve: Curve, metric: str, up_to: int | None) -> str | None:
    """Why a run cannot be compared."""
    if not curve and run.curves.get(metric):
        return f"{run.name}: no {metric} in its first {up_to} frames, left out. Take more --frames."
    if not curve and metric == "return":
        return (
            f"{run.name}: empty, no evaluation in its {run.frames} frames, left out. Run it with "
            "experiment.evaluation=True and an evaluation_interval that is a multiple of the frames per batch."
        )
    if not curve:
        has = ", ".join(name for name, own in run.curves.items() if own)
        return f"{run.name}: no {metric}, left out. It has {has or 'nothing'}, and what its CSV files are called."
    if bad := [at for at, value in curve.items() if not math.isfinite(value)]:
        before = f" --frames {bad[0] - 1} looks before it." if bad[0] > min(curve) else ""
        return f"{run.name}: {metric} is not finite at {bad[0]} frames, left out.{before}"
    if not run.finished and (up_to is None or run.frames < up_to):
        return (
            f"{run.name}: unfinished, {run.frames} of {run.planned} frames, left out. Go on with it "
            f"(python -m benchmarl.resume, docs/checkpoints.md), or compare all at --frames {max(curve)}."
        )
    return None


def _cell(own: list[tuple[Run, Curve]], up_to: int | None, notes: list[str]) -> Cell:
    """Of the runs of one arm; shorter ones are left out."""
    longest = max(max(curve) for _, curve in own)
    for run, curve in own:
        if max(curve) < longest:
            notes.append(
                f"{run.name}: last evaluated at {max(curve)} frames, other seeds at {longest}, left out. Compare "
                f"all at --frames {max(curve)}."
            )
    own = [(run, curve) for run, curve in own if max(curve) == longest]
    curves = [curve for _, curve in own]
    scores = {
        "final": np.array([curve[longest] for curve in curves]),
        "best": np.array([max(curve.values()) for curve in curves]),
        "area": np.array([area(curve) for curve in curves]),
    }
    limit = math.inf if up_to is None else up_to
    time = [
        max((v for at, v in run.curves.get("time_s", {}).items() if at <= limit), default=math.nan) for run, _ in own
    ]
    kl = [[v for at, v in run.curves.get("kl", {}).items() if at <= limit] for run, _ in own]
    scores["time_s"] = np.array(time)
    scores["kl"] = np.array([np.mean(values) if values else math.nan for values in kl])
    first = own[0][0]
    cell = Cell(first.task, first.label, first.algorithm, [run.seed for run, _ in own], curves, longest, scores)
    if len(own) < 2:
        notes.append(f"{first.task}, {first.label}: one seed, so nothing is known of the spread. Run more: seed=0,1,2.")
    elif len(cell.common[0]) < min(len(curve) for curve in curves):
        notes.append(
            f"{first.task}, {first.label}: seeds were evaluated at different frames; the picture shows those that all "
            "have."
        )
    return cell


def _note_unequal(found: list[Cell], notes: list[str]) -> None:
    """Between the arms of a task."""
    by_task = defaultdict(list)
    for cell in found:
        by_task[cell.task].append(cell)
    for task, own in by_task.items():
        if len({cell.frames for cell in own}) > 1:
            lengths = ", ".join(f"{cell.label} {cell.frames}" for cell in own)
            notes.append(
                f"{task}: unequal frames ({lengths}), not comparable. Compare all at --frames "
                f"{min(cell.frames for cell in own)}."
            )
        if len({len(cell.seeds) for cell in own}) > 1:
            notes.append(f"{task}: unequal seeds ({', '.join(f'{cell.label} {len(cell.seeds)}' for cell in own)}).")
