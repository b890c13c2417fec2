"""Draws the learning curves of a folder of BenchMARL runs, from the JSON and CSV files that BenchMARL writes.

    python -m benchmarl.run -m algorithm=mars,mappo task=vmas/balance experiment=vmas_laptop seed=0,1,2
    python examples/learning_curves.py multirun/<day>/<time>

Runs of one algorithm with different settings go into a folder each; with several folders, the folder's name stands
behind the algorithm's.

For each task it draws the return over the collected frames for every algorithm: on the left the deterministic policy
in evaluation (JSON), on the right the stochastic policy in collection (CSV); lines are means over seeds, bands run
from the worst to the best seed. The picture is written as ``learning_curves.png`` into the folder of ``--out``, by
default the first folder of runs, and a table is printed: the mean over seeds of the last evaluation's return and of the
area under the evaluation curve (the mean return over all frames).
"""

import csv
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from _common import make_parser
from benchmarl.eval_results import get_raw_dict_from_multirun_folder
from matplotlib.ticker import EngFormatter

Curves = dict[str, dict[str, list[tuple[np.ndarray, np.ndarray]]]]  # env/task -> algorithm -> (frames, return) by seed


def check_runs(folder: Path) -> None:
    """Refuse a folder in which a run was made twice: merging BenchMARL's reports would keep one of the two."""
    seen: dict[tuple, Path] = {}
    for file in sorted(folder.rglob("*.json")):
        for env, tasks in json.loads(file.read_text()).items():
            runs = [(env, t, a, s) for t, names in tasks.items() for a, seeds in names.items() for s in seeds]
            for run in runs:
                if run in seen:
                    raise SystemExit(f"{' '.join(run)} is there twice: {seen[run]} and {file}. Name one multirun.")
                seen[run] = file


def evaluation_curves(folder: Path) -> Curves:
    """The mean return of each evaluation, from BenchMARL's JSON reports."""
    curves: Curves = {}
    for env, tasks in get_raw_dict_from_multirun_folder(str(folder)).items():
        for task, algorithms in tasks.items():
            for algorithm, seeds in algorithms.items():
                for report in seeds.values():
                    steps = sorted(
                        (step["step_count"], np.mean(step["return"]))
                        for name, step in report.items()
                        if name.startswith("step_")
                    )
                    if steps:
                        frames, values = np.array(steps).T
                        curves.setdefault(f"{env}/{task}", {}).setdefault(algorithm, []).append((frames, values))
    return curves


def collection_curves(folder: Path) -> Curves:
    """The mean return of the episodes collected in each iteration, from the CSV logger's files."""
    curves: Curves = {}
    for file in sorted(folder.rglob("collection_reward_episode_reward_mean.csv")):
        report = next(file.parents[2].glob("*.json"), None)
        if report is None:
            continue  # a run that has not been evaluated yet
        ((env, tasks),) = get_raw_dict_from_multirun_folder(str(report.parent)).items()
        ((task, algorithms),) = tasks.items()
        (algorithm,) = algorithms
        frames = _read(file.with_name("counters_total_frames.csv"))
        points = [(frames[step], value) for step, value in _read(file).items() if step in frames]
        curves.setdefault(f"{env}/{task}", {}).setdefault(algorithm, []).append(tuple(np.array(points).T))
    return curves


def side_by_side(curves: dict[str, Curves]) -> Curves:
    """The curves of several folders in one, each algorithm with the name of its folder."""
    if len(curves) == 1:
        return next(iter(curves.values()))
    merged: Curves = {}
    for folder, tasks in curves.items():
        for task, algorithms in tasks.items():
            named = {f"{algorithm}, {folder}": seeds for algorithm, seeds in algorithms.items()}
            merged.setdefault(task, {}).update(named)
    return merged


def _read(file: Path) -> dict[int, float]:
    """Value by step; what a resumed run has done again replaces what it had done before."""
    with file.open() as lines:
        return {int(step): float(value) for step, value in csv.reader(lines)}


def _stack(seeds: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The frames that all seeds have, and the values there, [seeds, frames]."""
    common = sorted(set.intersection(*(set(frames) for frames, _ in seeds)))
    return np.array(common), np.stack([values[np.isin(frames, common)] for frames, values in seeds])


def draw(evaluation: Curves, collection: Curves, path: Path) -> None:
    """One row of two axes per task."""
    figure, rows = plt.subplots(len(evaluation), 2, figsize=(10, 3.6 * len(evaluation)), squeeze=False)
    for axes, task in zip(rows, sorted(evaluation), strict=True):
        for axis, curves, kind in zip(axes, (evaluation, collection), ("evaluation", "collection"), strict=True):
            for algorithm, seeds in sorted(curves.get(task, {}).items()):
                frames, values = _stack(seeds)
                (line,) = axis.plot(frames, values.mean(0), label=f"{algorithm} ({len(seeds)} seeds)")
                axis.fill_between(frames, values.min(0), values.max(0), alpha=0.2, color=line.get_color())
            axis.set(title=f"{task}, {kind}", xlabel="frames", ylabel="return")
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.grid(alpha=0.3)
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def table(curves: Curves) -> str:
    """Last return and area under the curve, mean and standard deviation over seeds."""
    names = {name for algorithms in curves.values() for name in algorithms}
    first, second = (max(map(len, words)) + 2 for words in ({"task", *curves}, {"algorithm", *names}))
    lines = [f"{'task':<{first}}{'algorithm':<{second}}{'seeds':>5}{'last return':>20}{'area under curve':>20}"]
    for task, algorithms in sorted(curves.items()):
        for algorithm, seeds in sorted(algorithms.items()):
            last = [values[-1] for _, values in seeds]
            area = [
                np.trapezoid(values, frames) / (frames[-1] - frames[0]) for frames, values in seeds if len(frames) > 1
            ]
            cells = "".join(f"{np.mean(x):>12.2f} ± {np.std(x):<5.2f}" if x else f"{'-':>20}" for x in (last, area))
            lines.append(f"{task:<{first}}{algorithm:<{second}}{len(seeds):>5}{cells}")
    return "\n".join(lines)


def main() -> None:
    """Read, draw, print."""
    files = "learning_curves.png, the picture. By default that folder is the first of the runs"
    parser = make_parser(__doc__, None, files)
    parser.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="folder",
        help="a folder with BenchMARL runs below it, such as a Hydra multirun's",
    )
    arguments = parser.parse_args()
    folders = {folder.resolve().name: folder for folder in arguments.folders}
    if len(folders) < len(arguments.folders):
        parser.error("the folders must have different names, which stand behind those of the algorithms")
    for folder in folders.values():
        check_runs(folder)
    evaluation = side_by_side({name: evaluation_curves(folder) for name, folder in folders.items()})
    if not evaluation:
        parser.error(
            f"no evaluation in the BenchMARL reports (*.json) below {', '.join(map(str, arguments.folders))}: run with "
            "experiment.create_json=True and experiment.evaluation=True"
        )
    out = getattr(arguments, "out", arguments.folders[0])
    out.mkdir(parents=True, exist_ok=True)
    path = (out / "learning_curves.png").resolve()
    draw(evaluation, side_by_side({name: collection_curves(folder) for name, folder in folders.items()}), path)
    print(table(evaluation))
    print(f"\nLearning curves: {path}")


if __name__ == "__main__":
    main()
