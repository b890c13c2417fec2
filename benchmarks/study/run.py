"""Runs what is missing of the study in plan.yaml, one thread per run, and goes on where it was stopped.

    python benchmarks/study/run.py --jobs 2                       # all parts, from top to bottom
    python benchmarks/study/run.py --parts defaults --arms mappo hatrpo --tasks vmas/balance

A run is ``python -m benchmarl.run`` with the plan's settings, in ``<out>/<part>/<task>/<arm>/seed<k>``. The file
``finished`` in its folder says that it is whole, with its settings; a run whose settings the plan has changed is run
anew. ``log.txt`` is what it printed. A run that was cut off starts again, so that its numbers are those of a run that
was not, bit for bit: after a resume environments start anew. A run that fails is named at the end, and is tried again
next time.

A run that is whole is saved at once as a small file in ``<results>/<part>``, with its arm as label:
``python -m benchmarl_trust.report <results>/<part>`` makes tables and pictures of them. What is saved there with the
plan's settings is not run again, on any machine. Of runs with equal settings in several parts one is run, and copied.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import yaml
from tqdm import tqdm

from benchmarl_trust.report.compact import COLUMNS, load, safe, save
from benchmarl_trust.report.runs import Run as SavedRun
from benchmarl_trust.report.runs import find_runs

PLAN = Path(__file__).with_name("plan.yaml")
#: By what runs may be chosen.
CHOICES = ("parts", "tasks", "arms", "seeds")


class Run(NamedTuple):
    """One training; the metrics are saved beside what the report needs."""

    part: str
    task: str
    arm: str
    seed: int
    settings: tuple[str, ...]
    metrics: tuple[str, ...] = ()

    def folder(self, out: Path) -> Path:
        """Where its files are."""
        return out.joinpath(*map(safe, (self.part, self.task, self.arm)), f"seed{self.seed}")


def planned(plan: dict) -> list[Run]:
    """All runs of the plan: part by part, task by task, seed by seed, so that all arms have equal seeds early.

    Raises:
        ValueError: where a part names an arm that the plan does not have.
    """
    runs = []
    for name, part in plan["parts"].items():
        arms = dict(_arms(plan, part))
        common = (*plan["settings"], *part.get("settings", ()))
        for task, seed, arm in itertools.product(part["tasks"], part["seeds"], arms):
            settings = (*common, *arms[arm], *_of_task(task), f"seed={seed}")
            runs.append(Run(name, task, arm, seed, settings, tuple(part.get("metrics", ()))))
    return runs


def _of_task(name: str) -> list[str]:
    """The settings that the task's name says, in the way of the report: ``vmas/balance, n_agents=8``."""
    task, *keys = name.split(", ")
    return [f"task={task}", *(f"task.{key}" for key in keys)]


def _arms(plan: dict, part: dict) -> Iterator[tuple[str, list[str]]]:
    """The part's arms and their settings; with ``radius`` an arm for each value, null for the package's default."""
    radius = part.get("radius")
    known = {**plan["arms"], **plan.get("further_arms", {})}
    for name in radius or (plan["arms"] if part["arms"] == "all" else part["arms"]):
        if name not in known:
            raise ValueError(f"There is no arm {name} in the plan: {', '.join(known)}.")
        if radius is None:
            yield name, known[name]
            continue
        for key, values in radius[name].items():
            for value in values:
                yield (name, known[name]) if value is None else (f"{name} {value:g}", [*known[name], f"{key}={value}"])


def train(run: Run, out: Path) -> bool:
    """Run it from its start; whether it is whole now."""
    folder = run.folder(out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = ["benchmarl.run", *run.settings, f"hydra.run.dir={folder.resolve()}"]
    with (folder / "log.txt").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-m", *command], stdout=log, stderr=log, env=environment)
    if done.returncode == 0:
        (folder / "finished").write_text("\n".join(run.settings))
    return done.returncode == 0


def is_whole(run: Run, out: Path) -> bool:
    """Whether it has been run to its end, with the settings that the plan has now."""
    file = run.folder(out) / "finished"
    return file.exists() and file.read_text() == "\n".join(run.settings)


def work(run: Run | SavedRun) -> tuple:
    """What makes two runs the same run: task, seed and settings."""
    return run.task, run.seed, tuple(run.settings if isinstance(run, Run) else run.overrides)


def copy_and_list_missing(runs: list[Run], results: Path) -> list[Run]:
    """The runs that are not saved, once those are copied that another part has run with equal settings."""
    files = sorted(results.glob("*/runs.json"))
    there = {(file.parent.name, run.label, work(run)): run for file in files for run in load(file.parent)}
    equal = defaultdict(list)
    for key, run in there.items():
        equal[key[-1]].append(run)
    missing = []
    for run in runs:
        if (run.part, run.arm, work(run)) in there:
            continue
        found = [other for other in equal[work(run)] if other.curves.keys() >= set(run.metrics)]
        if found:
            curves = {name: found[0].curves[name] for name in (*COLUMNS, *run.metrics) if name in found[0].curves}
            save([replace(found[0], label=run.arm, curves=curves)], results / run.part)
        else:
            missing.append(run)
    return missing


def save_result(run: Run, out: Path, results: Path) -> None:
    """Save a run that is whole."""
    (found,) = find_runs(run.folder(out), "return", [])
    for metric in run.metrics:
        (other,) = find_runs(run.folder(out), metric, [])
        found.curves[metric] = other.curves[metric]
    found.task, found.label = run.task, run.arm
    save([found], results / run.part)


def main() -> None:
    """Run what is missing, and save each run when it ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, default=PLAN, metavar="FILE", help="the plan")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="how many runs at a time")
    parser.add_argument("--out", type=Path, default=Path("outputs/study"), metavar="FOLDER", help="folder of the runs")
    parser.add_argument(
        "--results", type=Path, default=Path("docs/results"), metavar="FOLDER", help="folder of the saved results"
    )
    for name in CHOICES:
        kind = int if name == "seeds" else str
        parser.add_argument(f"--{name}", nargs="+", type=kind, metavar=name[:-1].upper(), help=f"these {name} alone")
    arguments = parser.parse_args()
    runs = planned(yaml.safe_load(arguments.plan.read_text()))
    for name in CHOICES:
        wanted, known = getattr(arguments, name), {getattr(run, name[:-1]) for run in runs}
        if wanted is not None and not known.issuperset(wanted):
            parser.error(f"--{name}: the plan has {', '.join(map(str, sorted(known)))}")
        runs = [run for run in runs if wanted is None or getattr(run, name[:-1]) in wanted]
    for run in copy_and_list_missing(runs, arguments.results):
        if is_whole(run, arguments.out):  # the study was stopped before it was saved
            save_result(run, arguments.out, arguments.results)
    first: dict[tuple, Run] = {}
    for run in copy_and_list_missing(runs, arguments.results):
        first.setdefault((work(run), run.metrics), run)
    missing = list(first.values())
    failed = []
    with (
        ThreadPoolExecutor(arguments.jobs) as pool,
        tqdm(total=len(runs), initial=len(runs) - len(missing), unit="run") as bar,
    ):
        futures = {pool.submit(train, run, arguments.out): run for run in missing}
        try:
            for future in as_completed(futures):
                run = futures[future]
                bar.set_postfix_str(f"{run.part} {run.task} {run.arm} seed {run.seed}")
                bar.update()
                if future.result():
                    save_result(run, arguments.out, arguments.results)
                else:
                    failed.append(run.folder(arguments.out))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # else those that wait would be started
            raise
    copy_and_list_missing(runs, arguments.results)
    if failed:
        sys.exit("These runs failed, see log.txt in their folders:\n" + "\n".join(map(str, failed)))


if __name__ == "__main__":
    main()
