"""Draws learning curves, aggregates and performance profiles as PNG and SVG.

Arms are told apart by colour (Okabe and Ito's, for the colour-blind), by line style and by marker, so that a picture
survives greyscale. The same data gives the same bytes, with one version of matplotlib.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarl_trust.report.aggregates import Aggregates, Estimate, interval_of_mean
from benchmarl_trust.report.statistics import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLOURS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*<>"
WIDTH = 8.4  # inches, the width of a README's text at 100 pixels each
NAMES = ("learning_curves", "aggregate", "performance_profile")
DPI = 200  # twice as many, for screens that have them
SETTINGS: dict = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and read aloud
    "svg.hashsalt": "benchmarl_trust",
    "text.parse_math": False,  # a label may have a dollar sign
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def styles(labels: Iterable[str]) -> dict[str, dict]:
    """How each arm is drawn: 28 differ in colour or line, 140 with the markers.

    Examples:
        >>> styles(["mappo"])["mappo"]
        {'color': '#000000', 'linestyle': '-', 'marker': 'o'}
    """
    return {
        label: {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": LINES[i % len(LINES)],
            "marker": MARKERS[i % len(MARKERS)],
        }
        for i, label in enumerate(labels)
    }


def draw(
    cells: list[Cell], over_tasks: Aggregates, baseline: str | None, words: str, score: str, out: Path
) -> list[Path]:
    """Write all pictures that the data gives.

    Args:
        cells (list of Cell): tasks and arms.
        over_tasks (Aggregates): what is known over tasks.
        baseline (str, optional): of the probability of improvement.
        words (str): what the curves show, for their axis.
        score (str): what the aggregates are of, in words.
        out (Path): the folder, which is there.

    Returns: the PNG files; beside each there is an SVG.
    """
    import matplotlib

    labels = dict.fromkeys(cell.label for cell in cells)
    look = styles(sorted(labels, key=lambda label: label != baseline))  # the baseline first, in black
    with matplotlib.rc_context(SETTINGS):
        files = [_write(learning_curves(cells, words, look), out / "learning_curves")]
        if over_tasks.iqm or over_tasks.improvement:
            files.append(_write(aggregate(over_tasks, baseline, score, look), out / "aggregate"))
        if over_tasks.profile:
            files.append(_write(profile(over_tasks, score, look), out / "performance_profile"))
    return files


def learning_curves(cells: list[Cell], words: str, look: dict[str, dict]) -> "Figure":
    """One panel per task."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    tasks = list(dict.fromkeys(cell.task for cell in cells))
    columns = min(len(tasks), 3 if len(tasks) > 4 else 2)
    rows = -(-len(tasks) // columns)
    in_a_row = max(1, min(len(look), 84 // (max(map(len, look)) + 6)))  # of the legend
    height = (3.2 if columns < 3 else 2.6) * rows + 0.25 * -(-len(look) // in_a_row)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, task in zip(axes, tasks, strict=False):
        for cell in (cell for cell in cells if cell.task == task):
            _curve(axis, cell, look[cell.label])
        axis.set(title=task, xlabel="frames", ylabel=words)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.locator_params(axis="x", nbins=5)
    for axis in axes[len(tasks) :]:
        axis.set_visible(False)
    counts = sorted({len(cell.seeds) for cell in cells})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    note = f"Lines: mean over {seeds} seeds. Bands: 95 % bootstrap interval of that mean."
    figure.supxlabel("One seed, no bands." if counts == [1] else note, fontsize=9)
    lines = {line.get_label(): line for axis in axes for line in axis.lines}
    handles, labels = _labelled([lines[label] for label in look if label in lines])
    figure.legend(handles, labels, loc="outside upper center", ncols=in_a_row)
    return figure


def _curve(axis: "Axes", cell: Cell, style: dict) -> None:
    frames, values = cell.common
    every = max(1, len(frames) // 6)
    axis.plot(frames, values.mean(0), label=cell.label, markevery=every, markersize=4.5, linewidth=1.6, **style)
    if len(values) > 1:
        low, high = interval_of_mean(values)
        axis.fill_between(frames, low, high, color=style["color"], alpha=0.13, linewidth=0)


def aggregate(over_tasks: Aggregates, baseline: str | None, score: str, look: dict[str, dict]) -> "Figure":
    """The interquartile mean, and the probability of improvement, with their intervals: what there is of the two."""
    from matplotlib.figure import Figure

    panels = []
    if over_tasks.iqm:
        panels.append((over_tasks.iqm, f"interquartile mean of the\n{score}, normalised"))
    if over_tasks.improvement:
        panels.append((over_tasks.improvement, f"probability of improvement\nover {baseline}, {score}"))
    labels = [label for label in look if any(label in own for own, _ in panels)]
    figure = Figure(figsize=(WIDTH, 1.3 + 0.32 * len(labels)), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (own, words) in zip(axes, panels, strict=True):
        for label, estimate in own.items():
            _interval(axis, labels.index(label), estimate, look[label])
        axis.set(xlabel=words, ylim=(len(labels) - 0.4, -0.7))
        axis.set_yticks(range(len(labels)), labels)
        axis.grid(visible=False, axis="y")
        if own is over_tasks.improvement:
            axis.axvline(0.5, color="0.5", linewidth=1, zorder=0)
            axis.set_xlim(-0.03, 1.03)
    figure.supxlabel(f"Bars: 95 % stratified bootstrap intervals. {_tasks(over_tasks)}", fontsize=9)
    return figure


def _interval(axis: "Axes", height: int, estimate: Estimate, style: dict) -> None:
    value, low, high = (end.item() for end in (estimate.value, estimate.low, estimate.high))
    axis.plot([low, high], [height, height], color=style["color"], linewidth=5, alpha=0.35, solid_capstyle="butt")
    axis.plot([value], [height], color=style["color"], marker=style["marker"], linestyle="none", markersize=6)
    axis.annotate(f"{value:.2f}", (value, height), (0, 6), textcoords="offset points", ha="center", fontsize=8)


def profile(over_tasks: Aggregates, score: str, look: dict[str, dict]) -> "Figure":
    """The fraction of runs above each normalised score."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    axis = figure.subplots()
    every = len(over_tasks.thresholds) // 8
    for i, (label, estimate) in enumerate(over_tasks.profile.items()):
        style = look[label]
        marks = (i * every // len(over_tasks.profile), every)  # not all at the same place
        axis.plot(over_tasks.thresholds, estimate.value, label=label, markevery=marks, markersize=4.5, **style)
        axis.fill_between(
            over_tasks.thresholds, estimate.low, estimate.high, color=style["color"], alpha=0.1, linewidth=0
        )
    axis.set(xlabel=f"τ: {score}, normalised", ylabel="fraction of runs above τ", ylim=(-0.02, 1.02))
    axis.set_xlim(over_tasks.thresholds[0], over_tasks.thresholds[-1])
    figure.legend(*_labelled(axis.lines), loc="outside right upper")
    figure.supxlabel(f"Bands: 95 % stratified bootstrap intervals. {_tasks(over_tasks)}", fontsize=9)
    return figure


def _labelled(lines: "Sequence[Line2D]") -> tuple[list, list[str]]:
    """Lines and labels of a legend. Matplotlib leaves out labels that begin with an underscore: they get a space."""
    labels = [str(line.get_label()) for line in lines]
    return [*lines], [f" {label}" if label.startswith("_") else label for label in labels]


def _tasks(over_tasks: Aggregates) -> str:
    n = len(over_tasks.tasks)
    return "One task." if n == 1 else f"{n} tasks."


def _write(figure: "Figure", path: Path) -> Path:
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    png = path.with_suffix(".png")
    figure.savefig(png, dpi=DPI, metadata={"Software": None})
    return png
