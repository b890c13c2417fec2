"""The pictures of the documentation, made by commands.

    python docs/figures.py              # make figures: draws what needs no training, in seconds
    python docs/figures.py --animate    # make animations: trains HATRPO on two tasks, then draws an episode of each
    python docs/figures.py --portray    # pictures of robots, which need the extra mamujoco and OpenGL
    python docs/figures.py --measure    # measures again what the drawings show, a quarter of an hour on one core

Drawings are SVG; their data is in ``docs/results``, each file with the command that made it in ``MEASUREMENTS``, or by
``record_battle``, which needs the extra ``smax``. Their
bytes depend on nothing but the data and the versions of the libraries that each file names. The
text alternatives are in ``alt.yaml`` beside the pictures; entries of pictures that are made elsewhere stay.

Drawing needs the extra ``report``. Animations need VMAS (extra ``vmas``) and OpenGL, on Debian and Ubuntu ``apt-get
install libegl1 libgl1 libglu1-mesa``, but no display. A task that has a run in ``outputs/animations`` is not trained
again.
"""

import argparse
import contextlib
import csv
import io
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import matplotlib as mpl
import matplotlib.style
import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from PIL import Image, ImageDraw

from benchmarl_trust.environments.trust_games import differential_reward
from benchmarl_trust.functional import SURROGATES
from benchmarl_trust.report import __main__ as report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks" / "study")]

import pages  # noqa: E402

#: The colours that Paul Tol calls high-contrast: distinct for all kinds of colour vision, and as shades of grey.
BLACK, BLUE, RED, YELLOW = "#000000", "#004488", "#BB5566", "#DDAA33"
GREY = "#888888"

#: White behind, so that pictures can be read on dark pages; text as paths, so that no font is needed.
STYLE = {
    "svg.hashsalt": "benchmarl_trust",
    "svg.fonttype": "path",
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}
VERSIONS = ", ".join(f"{name} {version(name)}" for name in ("matplotlib", "numpy", "contourpy", "rliable", "arch"))

#: The commands that measure what is drawn, and where the file of theirs goes that is drawn.
MEASUREMENTS = {
    "examples/advantage_variance.py --out outputs/advantage_variance": ("seeds.csv", "advantage_variance.csv"),
    "examples/joint_constraint.py --algorithms happo mappo hatrpo hatrpow hatrpog --seeds 0 1 2 3 "
    "--out outputs/joint_constraint": ("paths.csv", "differential_game/paths.csv"),
}

#: The training of the animations; the task and the folder are added.
TRAINING = ["algorithm=hatrpo", "experiment=vmas_laptop", "experiment.max_n_frames=240000", "model.num_cells=[64,64]"]
TRAINING += ["critic_model.num_cells=[64,64]", "experiment.checkpoint_at_end=True"]

#: What is to be seen in the animations.
ANIMATIONS = {
    "balance": "Four agents under a line gather below the red package on it, and lift it towards the green goal "
    "without letting it fall; in the 100 steps of an episode they do not get there",
    "navigation": "Three agents, discs with the rays by which they sense each other, drive to goals of their colours",
}


class Curves(NamedTuple):
    """Runs of docs/results whose learning curves are drawn: a part of the study, and what of it.

    The first arm is the baseline. Without arms it is the aggregate over tasks of all arms of the part, over MAPPO.
    """

    part: str
    tasks: list[str]
    arms: list[str]
    metric: str = "return"
    words: str = "mean return"
    digits: int = 1
    settings: str = "this package's defaults"


TUNED = pages.whole_tasks("tuned")
ALIKE = {"settings": "radii tuned alike", "digits": 2}

CURVES = {
    "learning_curves.svg": Curves("defaults", ["vmas/balance"], ["mappo", "hatrpo", "hatrpog", "happo", "mars"]),
    "tuned_at_once.svg": Curves("tuned", TUNED, ["mappo", "ippo", "mars 0.45", "maspo 0.9", "gpae"], **ALIKE),
    "tuned_in_turns.svg": Curves(
        "tuned",
        TUNED,
        ["mappo", "happo 0.4", "cliphappo 0.4", "a2po 0.4", "happo with gpae", "sequential mars 0.45"],
        **ALIKE,
    ),
    "tuned_natural.svg": Curves(
        "tuned", TUNED, ["mappo", "hatrpo", "cliphatrpo", "hatrpow 0.03", "hatrpog 0.03"], **ALIKE
    ),
    "tuned_aggregate.svg": Curves("tuned", TUNED, [], **ALIKE),
    "mamujoco_curves.svg": Curves(
        "mamujoco",
        pages.whole_tasks("mamujoco"),
        ["mappo", "happo", "cliphappo", "hatrpo", "hatrpow", "hatrpog"],
        digits=0,
        settings="this package's defaults, the experiment mamujoco_small",
    ),
    "smax_curves.svg": Curves(
        "smax",
        pages.whole_tasks("smax"),
        ["mappo 0.95", "gpae plain", "gpae 4 dt", "gpae 4 none", "mars 0.95"],
        metric="win_rate",
        words="win rate",
        digits=3,
        settings="λ = 0.95, no normalised advantages, the experiment smax_small",
    ),
}

#: Tasks whose robots are shown.
PORTRAITS = ["halfcheetah_2x3", "halfcheetah_6x1", "coupledhalfcheetah", "hopper_3x1", "ant_4x2", "humanoid_9_8"]
PORTRAITS_ALT = (
    "Six robots with the limbs that each agent moves in a colour of its own: HalfCheetah with two agents, one for each "
    "leg, and with six, one for each joint, for whom four colours are used in turn; two HalfCheetahs that a tendon "
    "couples; Hopper with three agents; Ant with four, one for each leg; Humanoid with two, one for the upper body and "
    "one for the legs."
)


def read(name: str) -> list[dict[str, str]]:
    """The rows of a file in ``docs/results``."""
    with (RESULTS / name).open() as file:
        return list(csv.DictReader(file))


def draw_gains() -> tuple[Figure, str]:
    """The gains and their pulls over the ratio, for A = 1 and A = -1, by the functions that train."""
    epsilon = 0.2
    lines = {  # label, colour, style and width of the line, size of the dot: clip's and quadratic's are at one ratio
        "clip": ("clip (MAPPO, HAPPO)", BLACK, "--", 1.6, 11),
        "quadratic": ("quadratic (MASPO)", RED, "-.", 1.6, 7),
        "reciprocal": ("reciprocal (MARS)", BLUE, "-", 1.6, 7),
        "log": ("log (ablation of MARS)", YELLOW, ":", 2.6, 7),
    }
    figure = Figure(figsize=(8, 5.6))
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for (top, bottom), sign in zip(axes.T, (1.0, -1.0), strict=True):
        for name, (label, color, style, width, size) in lines.items():
            log_ratio = torch.linspace(math.log(0.1), math.log(4), 301, dtype=torch.float64, requires_grad=True)
            gain = SURROGATES[name].gain(log_ratio, torch.full_like(log_ratio, sign), epsilon)
            (pull,) = torch.autograd.grad(gain.sum(), log_ratio)
            ratio = log_ratio.detach().exp()
            top.plot(ratio, gain.detach(), style, color=color, label=label, linewidth=width)
            bottom.plot(ratio, pull, style, color=color, linewidth=width)
            best = torch.tensor([SURROGATES[name].log_bounds(epsilon, epsilon)[sign > 0]], dtype=torch.float64)
            height = SURROGATES[name].gain(best, torch.full_like(best, sign), epsilon)
            for ax, y in ((top, height), (bottom, torch.zeros(1))):
                ax.plot(best.exp(), y, "o", color=color, markeredgecolor="white", markersize=size, zorder=3)
        top.set(title=f"advantage A = {sign:+.0f}".replace("-", "−"), ylim=(-5, 2))
        bottom.set(xlabel=r"ratio $r = \pi(a|o) / \pi_{old}(a|o)$", ylim=(-5, 8), xscale="log", xlim=(0.1, 4))
        mark(bottom, [0.1, 0.2, 0.5, 1, 2, 4])
        for ax in (top, bottom):
            ax.axvline(1, color=GREY, linewidth=0.8, zorder=0)
        bottom.axhline(0, color=GREY, linewidth=0.8, zorder=0)
    axes[0, 0].set_ylabel("gain (units of A)")
    axes[1, 0].set_ylabel("pull, d gain / d log r (units of A)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"What one sample contributes, and how it pulls on its log-ratio (ε = {epsilon}; dots: optima)")
    alt = (
        "Four panels over the ratio r from 0.1 to 4 on a logarithmic axis: above the gain, below its derivative in "
        f"log r, left for A = +1, right for A = -1, at epsilon = {epsilon}. All four gains pull with A at r = 1. The "
        "clip has no pull beyond its optimum, 1.2 or 0.8. Beyond theirs the quadratic, reciprocal and log gains pull "
        "back. For A = -1 and r towards 0 the quadratic's pull falls to 0, while the reciprocal's and the log's grow."
    )
    return figure, alt


def draw_advantage_variance() -> tuple[Figure, str]:
    """The advantage variance at the last position over N, geometric mean over seeds and 95 % interval."""
    rows = read("advantage_variance.csv")
    agents = sorted({int(row["n_agents"]) for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    figure = Figure(figsize=(6, 3.8))
    ax = figure.subplots()
    said = {}
    for name, color, style, shift in (("HAPPO", BLUE, "o-", 0.97), ("clip-HAPPO", RED, "s--", 1.03)):
        own = [(int(row["n_agents"]), float(row["ratio_last"])) for row in rows if row["algorithm"] == name]
        logs = np.log([[ratio for count, ratio in own if count == n] for n in agents])  # [numbers of agents, seeds]
        found = [pages.geometric(row) for row in logs]
        x = shift * np.array(agents)
        plot_intervals(ax, x, found, {"fmt": style, "color": color, "capsize": 3, "label": name})
        ax.plot(x, np.exp(logs), ".", color=GREY, markersize=4, zorder=3)
        values = zip(agents, found, strict=True)
        said[name] = ", ".join(f"{c:.3g} ({a:.3g} to {b:.3g}) at N = {n}" for n, (c, a, b) in values)
    ax.axhline(1, color=BLACK, linewidth=0.8, linestyle=":", label="bound of clip-HAPPO")
    ax.set(xscale="log", yscale="log", xlabel="number of agents N", ylabel="Var(w(M) A) / Var(A)")
    mark(ax, agents)
    ax.legend(loc="upper left")
    mean = f"geometric mean and 95 % interval over seeds {' '.join(seeds)}"
    ax.set_title(f"Variance of the last agent's weighted advantages on vmas/dispersion:\n{mean}")
    alt = (
        "The variance of the weighted advantages over that of the advantages at the last position of the order on "
        f"vmas/dispersion, over the number of agents N, both axes logarithmic; {mean}. HAPPO: {said['HAPPO']}. "
        f"Clip-HAPPO: {said['clip-HAPPO']}. The bound of clip-HAPPO is 1."
    )
    return figure, alt


def draw_many_agents() -> tuple[Figure, str]:
    """Last returns on balance, and the variance of the weighted advantages, over N; mean, seeds and 95 % interval."""
    part = "many_agents"
    cells = pages.cells_of(part)
    tasks, labels = pages.axes_of(part)
    if not tasks:
        raise ValueError(
            f"No number of agents is whole in {RESULTS / part}: run benchmarks/study/run.py --parts {part}."
        )
    agents = [pages.agents_of(task) for task in tasks]
    figure = Figure(figsize=(8, 3.8))
    left, right = figure.subplots(1, 2)
    ends, factors = [], []
    looks = ((BLACK, "D-.", 0.94), (BLUE, "o-", 0.98), (RED, "s--", 1.02), (YELLOW, "^:", 1.06))
    for label, (color, style, shift) in zip(labels, looks, strict=True):
        x = shift * np.array(agents)
        returns = np.array([cells[task, label].scores["final"] for task in tasks])  # [numbers of agents, seeds]
        look = {"fmt": style, "color": color, "capsize": 3, "markersize": 4, "label": label}
        plot_intervals(left, x, [pages.student(row) for row in returns], look)
        left.plot(x, returns, ".", color=GREY, markersize=4, zorder=3)
        ends.append(f"{label} {', '.join(pages.mean(part, task, label, 'final') for task in tasks)}")
        if label in pages.WEIGHTED:
            plot_intervals(right, x, [pages.variance_of(part, task, label) for task in tasks], look)
            factors.append(f"{label} {', '.join(pages.variance(part, task, label) for task in tasks)}")
    right.axhline(1, color=GREY, linewidth=0.8, zorder=0)
    left.set(ylabel="return of the last evaluation", xscale="log")
    right.set(ylabel="Var(w(M) A) / Var(A)", xscale="log")
    for ax in (left, right):
        ax.set_xlabel("number of agents N")
        mark(ax, agents)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    seeds = len(cells[tasks[0], labels[0]].seeds)
    figure.suptitle(f"vmas/balance over the number of agents: mean and 95 % interval over {seeds} seeds")
    numbers = listed([str(number) for number in agents])
    alt = (
        f"Two panels over the number of agents N, {numbers}, on vmas/balance; mean and 95 % interval over {seeds} "
        f"seeds. Left the return of the last evaluation, mean ± standard deviation: {'; '.join(ends)}. Right the "
        "variance of the weighted advantages over that of the advantages, at the positions after the first: "
        f"{'; '.join(factors)}."
    )
    return figure, alt


def mark(ax: Axes, places: Sequence[float]) -> None:
    """Plain numbers at these places of a logarithmic axis, and no others."""
    ax.xaxis.set(major_locator=FixedLocator(places), minor_locator=NullLocator())
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def plot_intervals(ax: Axes, x: np.ndarray, found: list[tuple[float, float, float]], look: dict) -> None:
    """Centers and the ends of their intervals."""
    center, low, high = np.array(found).T
    ax.errorbar(x, center, (center - low, high - center), **look)


def draw_differential_game() -> tuple[Figure, str]:
    """The reward of the differential game, and under each algorithm the path of the mean joint action per seed."""
    from joint_constraint import MAXIMA, NAMES, RADIUS

    rows = read("differential_game/paths.csv")
    paths: dict[str, dict[str, list[list[float]]]] = {}
    for row in rows:
        paths.setdefault(row["algorithm"], {}).setdefault(row["seed"], []).append([float(row["a1"]), float(row["a2"])])
    figure = Figure(figsize=(8, 5.6))
    surface, *panels = figure.subplots(2, 3, sharex=True, sharey=True).flat
    plot_reward(surface, MAXIMA, labels=True)
    surface.set_title("shared reward of the joint action")
    said = []
    for ax, name in zip(panels, paths, strict=True):
        plot_reward(ax, MAXIMA, labels=False)
        actions = np.array(list(paths[name].values()))  # [seeds, iterations + 1, 2]
        shown = np.r_[0:20:2, 20 : actions.shape[1] : 4]  # large steps come first; fewer points, a smaller file
        for path in actions:
            ax.plot(*path[shown].T, color=BLUE, linewidth=0.9)
        ax.plot(*actions[:, 0].T, "o", color="white", markeredgecolor=BLUE, markersize=4, zorder=3)
        ax.plot(*actions[:, -1].T, "o", color=RED, markeredgecolor=BLACK, markersize=4, zorder=4)
        distance = {place: np.linalg.norm(actions[:, -1] - np.array(MAXIMA[place]), axis=1) for place in MAXIMA}
        ends = {place: int((distance[place] <= RADIUS).sum()) for place in MAXIMA}
        ends["on the way"] = len(actions) - sum(ends.values())
        words = ", ".join(f"{count} {end}" for end, count in ends.items() if count)
        ax.set_title(f"{NAMES[name]}: {words}")
        said.append(f"{NAMES[name]} {words}")
    for ax in (surface, *panels):
        ax.set(xlim=(0, 7), ylim=(0, 7), aspect="equal")
        ax.grid(False)
    figure.supxlabel("action of agent 1", fontsize=9)
    figure.supylabel("action of agent 2", fontsize=9)
    iterations = actions.shape[1] - 1
    figure.suptitle(
        f"Differential game: mean joint action over {iterations} iterations of 256 games, {len(actions)} seeds\n"
        "white dots: start, near the saddle; red dots: end; stars: the two maxima"
    )
    alt = (
        "Contours of the shared reward of two agents' actions between 0 and 7: a better maximum, 1.04, at "
        "(5.192, 5.000) and a worse one, 0.95, at (1.120, 1.000). On them, one panel per algorithm, the paths of the "
        f"mean joint action of {len(actions)} seeds over {iterations} iterations from near the saddle between the "
        f"two. Seeds by the maximum where they end: {'; '.join(said)}."
    )
    return figure, alt


def draw_smax() -> tuple[Figure, str]:
    """A battle of 5m_vs_6m at six of its steps."""
    rows = read("smax_battle.csv")
    steps = sorted({int(row["step"]) for row in rows})
    shown = [steps[round(k * (len(steps) - 1) / 5)] for k in range(6)]
    figure = Figure(figsize=(8, 3.2))
    said = []
    for ax, step in zip(figure.subplots(2, 3, sharex=True, sharey=True).flat, shown, strict=True):
        units = [row for row in rows if int(row["step"]) == step]
        left = {}
        for side, color, marker in (("ally", BLUE, "o"), ("enemy", RED, "s")):
            place, health = (
                np.array([[float(row[key]) for key in keys] for row in units if row["side"] == side])
                for keys in (("x", "y"), ("health",))
            )
            alive = health[:, 0] > 0
            ax.scatter(*place[alive].T, 30, "white", marker=marker, edgecolors=color, linewidths=1.2, zorder=2)
            ax.scatter(*place[alive].T, 30 * health[alive, 0], color, marker=marker, linewidths=0, zorder=3)
            left[side] = int(alive.sum())
        ax.set(
            title=f"step {step}: {left['ally']} against {left['enemy']}", xlim=(5, 27), ylim=(12, 20), aspect="equal"
        )
        ax.grid(False)
        said.append(f"{left['ally']} against {left['enemy']} at step {step}")
    figure.suptitle("smax/5m_vs_6m: allies (blue discs) and enemies (red squares), filled by their health")
    alt = (
        "Six pictures of one battle on smax/5m_vs_6m, seen from above. Five allied marines, blue discs, go right and "
        "attack the first enemy in range, six enemies, red squares, come to meet them; marks are filled by the unit's "
        f"health, the dead are not shown. Left are {', '.join(said)}."
    )
    return figure, alt


def record_battle() -> None:
    """Write down a battle of the script: attack the first enemy in range, or else go right."""
    from benchmarl_trust.environments import Smax

    env = Smax("5m_vs_6m", seed=0)
    td, allies, units, east = env.reset(), 5, 11, 1
    with (RESULTS / "smax_battle.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "side", "unit", "x", "y", "health"])
        for step in range(101):
            state = td["state"][0, : 10 * units].view(units, 10)  # of each unit: health, x, y, cooldown, six types
            for unit, (health, x, y) in enumerate(state[:, :3].tolist()):
                side = "ally" if unit < allies else "enemy"
                writer.writerow([step, side, unit, f"{x:.2f}", f"{y:.2f}", f"{health:.3f}"])
            if td["done"].any():
                return
            attack = td["agents", "action_mask"][..., 5:]
            action = torch.where(attack.any(-1), 5 + attack.int().argmax(-1), east)
            alive = td["agents", "mask"]
            td = env.step(td.set(("agents", "action"), torch.where(alive, action, 4)))["next"]


def plot_reward(ax: Axes, maxima: dict[str, tuple[float, float]], labels: bool) -> None:
    """Contours of the reward, its maxima as stars."""
    axis = torch.linspace(0, 7, 43, dtype=torch.float64)
    reward = differential_reward(torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1))
    lines = ax.contour(axis, axis, reward, levels=np.arange(1, 6) / 5, colors=GREY, linewidths=0.6)
    if labels:
        ax.clabel(lines, fontsize=6, colors=BLACK)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        for name, (x, y) in maxima.items():
            ax.annotate(name, (x, y), (0, 8), textcoords="offset points", ha="center", weight="bold", bbox=box)
    ax.plot(*zip(*maxima.values(), strict=True), "*", color=YELLOW, markeredgecolor=BLACK, markersize=13, zorder=2)


def draw_learning_curves(curves: Curves) -> tuple[str, str]:
    """The report's picture of runs in docs/results."""
    picture, tables = reported(curves, "learning_curves.svg", "report.csv")
    rows = {(row["task"], row["label"]): row for row in tables}
    row = rows[curves.tasks[0], curves.arms[0]]
    seeds = row["seeds"].split()
    number = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    spread = "" if len(seeds) == 1 else ", mean ± standard deviation"
    ends = "; ".join(
        (f"on {task} " if len(curves.tasks) > 1 else "")
        + ", ".join(f"{arm} {final(rows[task, arm], curves.digits)}" for arm in curves.arms)
        for task in curves.tasks
    )
    alt = (
        f"Learning curves on {listed(curves.tasks)}: {curves.words} in evaluation over {int(row['frames']):,} "
        f"frames, {number}, networks of 64 x 64, {curves.settings}. At the end{spread}: {ends}."
    )
    return picture, alt


def draw_aggregate(curves: Curves) -> tuple[str, str]:
    """The report's picture of all arms over tasks."""
    picture, rows = reported(curves, "aggregate.svg", "aggregate.csv")

    def estimates(name: str) -> str:
        there = [row for row in rows if row[f"{name}_estimate"]]
        numbers = ([float(row[f"{name}_{end}"]) for end in ("estimate", "low", "high")] for row in there)
        return ", ".join(
            f"{row['label']} {value:.2f} ({low:.2f} to {high:.2f})"
            for row, (value, low, high) in zip(there, numbers, strict=True)
        )

    alt = (
        f"Aggregates of the last evaluation over {listed(curves.tasks)}, {curves.settings}, with 95 % bootstrap "
        f"intervals. Interquartile mean, normalised: {estimates('iqm')}. Probability of improvement over mappo: "
        f"{estimates('improvement')}."
    )
    return picture, alt


def reported(curves: Curves, picture: str, table: str) -> tuple[str, list[dict[str, str]]]:
    """A picture and the rows of a table that the report makes of them."""
    if not curves.tasks:
        raise ValueError(f"No task is whole in {RESULTS / curves.part}: run the study's part {curves.part}.")
    asked = ["--tasks", *curves.tasks, "--metric", curves.metric, "--baseline", (curves.arms or ["mappo"])[0]]
    asked += ["--labels", *curves.arms] if curves.arms else []
    with TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            report.main([str(RESULTS / curves.part), *asked, "--out", folder])
        drawn = (Path(folder) / picture).read_text()
        with (Path(folder) / table).open() as file:
            rows = list(csv.DictReader(file))
    return drawn.replace("<svg ", f"<!-- docs/figures.py, {VERSIONS} -->\n<svg ", 1), rows


def listed(names: list[str]) -> str:
    """Names with commas and an `and`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def final(row: dict[str, str], digits: int) -> str:
    """The last evaluation, of several seeds with their standard deviation."""
    mean = f"{float(row['final_mean']):.{digits}f}"
    return f"{mean} ± {float(row['final_std']):.{digits}f}" if len(row["seeds"].split()) > 1 else mean


DRAWINGS: dict[str, Callable[[], tuple[Figure, str]]] = {
    "gains.svg": draw_gains,
    "advantage_variance.svg": draw_advantage_variance,
    "many_agents.svg": draw_many_agents,
    "differential_game.svg": draw_differential_game,
    "smax.svg": draw_smax,
}


def draw(out: Path) -> dict[str, str]:
    """Draw everything that needs no training; the text alternatives."""
    alts = {}
    with mpl.style.context(["default", STYLE]):
        for name, picture in DRAWINGS.items():
            figure, alts[name] = picture()
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": f"docs/figures.py, {VERSIONS}"})
            # Two decimals of a point: a third of the size, and no differences in the last bits between processors.
            rounded = re.sub(r'(?<=[ "])-?\d+\.\d{3,}', lambda match: f"{float(match[0]):.2f}", buffer.getvalue())
            (out / name).write_text(rounded)
    for name, curves in CURVES.items():
        picture, alts[name] = (draw_learning_curves if curves.arms else draw_aggregate)(curves)
        (out / name).write_text(picture)
    return alts


def animate(out: Path) -> None:
    """Train, draw an episode of each task, and write down what was reached."""
    from show import draw as draw_episode

    rows = []
    for task in ANIMATIONS:
        run = trained(task)
        (returns,) = run.rglob("eval_reward_episode_reward_mean.csv")
        last = float(returns.read_text().split()[-1].split(",")[-1])
        episodes = [draw_episode(run / "checkpoints" / "latest.pt", seed=seed) for seed in range(5)]
        shown = [episode.scalars["eval_reward_episode_reward_mean"] for episode in episodes]
        nearest = min(range(5), key=lambda k: abs(shown[k] - last))  # neither the best nor a failure
        save_gif(episodes[nearest].video, out / f"{task}_trained.gif")
        rows.append([task, "hatrpo", 0, 240_000, f"{last:.2f}", f"{shown[nearest]:.2f}", nearest])
    with (RESULTS / "animations.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["task", "algorithm", "seed", "frames", "last_evaluation", "shown", "episode"], *rows])


def trained(task: str) -> Path:
    """The folder of the task's run, which is made where there is none."""
    folder = ROOT / "outputs" / "animations" / task
    if not list(folder.glob("*/checkpoints/latest.pt")):
        shutil.rmtree(folder, ignore_errors=True)
        command = ["-m", "benchmarl.run", *TRAINING, f"task=vmas/{task}", "seed=0", f"hydra.run.dir={folder}"]
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
    return next(folder.glob("*/checkpoints/latest.pt")).parents[1]


def save_gif(video: torch.Tensor, file: Path, size: int = 320, colors: int = 32) -> None:
    """A video [T, 3, height, width] as a small picture in few colours, at twenty steps per second."""
    frames = [Image.fromarray(frame.numpy()) for frame in video.permute(0, 2, 3, 1).contiguous()]
    for frame in frames:
        frame.thumbnail((size, size))
    palette = frames[0].quantize(colors)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first.save(file, save_all=True, append_images=others, duration=50, loop=0, optimize=True)


def describe_animations() -> dict[str, str]:
    """The text alternatives of the animations, from what was written down when they were made."""
    return {
        f"{row['task']}_trained.gif": f"Animation of vmas/{row['task']}. {ANIMATIONS[row['task']]}. Trained with "
        f"HATRPO for {int(row['frames']):,} frames, seed {row['seed']}: mean return {row['last_evaluation']} in the "
        f"last evaluation, {row['shown']} in the episode that is shown, of five the nearest to that mean."
        for row in read("animations.csv")
    }


def portray(out: Path, size: int = 220) -> None:
    """The robots of MaMuJoCo, each limb in the colour of the agent that moves its joint."""
    from benchmarl_trust.environments import MamujocoTask

    sheet = Image.new("RGB", (3 * size, 2 * size), "white")
    colors = [[int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)] for color in (BLUE, YELLOW, RED, BLACK)]
    for k, name in enumerate(PORTRAITS):
        env = MamujocoTask[name.upper()].get_from_yaml().get_env_fun(1, True, 0, "cpu")()
        env.reset()
        model = env._copies[0].single_agent_env.unwrapped.model
        model.geom_matid[model.geom_bodyid > 0] = -1  # colours in place of materials, but for the floor
        model.geom_rgba[model.geom_bodyid > 0, :3] = 0.8
        for i, part in enumerate(env._copies[0].agent_action_partitions):
            bodies = [model.jnt_bodyid[model.actuator_trnid[joint.act_ids, 0]] for joint in part]
            model.geom_rgba[np.isin(model.geom_bodyid, bodies), :3] = colors[i % len(colors)]
        picture = Image.fromarray(env.render()).resize((size, size))
        env.close()
        ImageDraw.Draw(picture).text((6, 6), name, fill="black", stroke_width=2, stroke_fill="white")
        sheet.paste(picture, (k % 3 * size, k // 3 * size))
    sheet.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out / "mamujoco.png", optimize=True)


def measure() -> None:
    """Run the examples that measure what is drawn, and keep the files that are drawn."""
    for command, (made, kept) in MEASUREMENTS.items():
        subprocess.run([sys.executable, *command.split()], check=True, cwd=ROOT)
        shutil.copyfile(ROOT / command.split()[-1] / made, RESULTS / kept)
    record_battle()


def main() -> None:
    """Measure or animate first where that is asked for, then draw, and write the text alternatives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures", help="folder of the pictures")
    parser.add_argument("--measure", action="store_true", help="measure again what the drawings show")
    parser.add_argument("--animate", action="store_true", help="train, and make the animations")
    parser.add_argument("--portray", action="store_true", help="make the pictures of robots")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.measure:
        measure()
    if args.animate:
        animate(args.out)
    if args.portray:
        portray(args.out)
    file = args.out / "alt.yaml"
    others = yaml.safe_load(file.read_text()) if file.exists() else {}
    drawn, animated = draw(args.out), describe_animations()
    alts = others | drawn | animated | {"mamujoco.png": PORTRAITS_ALT}
    file.write_text(yaml.safe_dump(alts, width=110, allow_unicode=True))
    for name in (*drawn, *(animated if args.animate else ()), *(["mamujoco.png"] if args.portray else ())):
        print(args.out / name)


if __name__ == "__main__":
    main()
