"""What the plan leaves to rules of its own, read off the runs that they rest on: tasks, radii, and radii of equal KL.

    python benchmarks/study/choose.py tasks    # from the part `screen`; writes docs/results/tuned/bounds.json
    python benchmarks/study/choose.py radii    # from `tuning`: the part `tuned`, to be added to the plan
    python benchmarks/study/choose.py matched  # from `matching`: the parts `matched_<task>`

Tasks: two returns of a task are its bounds: 0 is that of uniformly random actions, mean over 600 episodes; 1 the mean
of MAPPO's last three evaluations at three times the budget. A task is taken if the mean of MAPPO's last three
evaluations within the budget has come at least half of the way, in the plan's order, until there are five. Printed is
the table of all tasks that were screened; ``bounds.json``, for the report, holds those that are taken.

Radii: of each arm's values that with the largest area under the evaluation curve; of equals the smallest. Printed is
null for the package's default, so that its runs are those of `defaults`.

Equal KL: for each radius of MARS that of each other arm at which the KL per iteration is MARS's: the smallest at which
it rises through it, linear between the grid's neighbouring values in the logarithms of both. Where it does not, there
is none, which is said.

A part that is not whole is refused.
"""

import argparse
import itertools
import json
import math
from collections import defaultdict
from pathlib import Path

import torch
import yaml
from benchmarl.algorithms import algorithm_config_registry
from benchmarl.environments import task_config_registry
from run import PLAN, planned

from benchmarl_trust.report.compact import load
from benchmarl_trust.report.runs import Run
from benchmarl_trust.report.statistics import cells

EPISODES = 600
SEEDS = [0, 1, 2, 3, 4]  # of the parts that are printed
TAKEN = 5  # tasks
COVERED = 0.5  # of the way from random actions to three times the budget, for a task to be taken


def random_return(name: str, episodes: int = EPISODES) -> float:
    """The mean return of uniformly random actions: a sum over an episode of the mean over agents, as BenchMARL's."""
    torch.manual_seed(0)
    task = task_config_registry[name].get_from_yaml()
    env = task.get_env_fun(num_envs=episodes, continuous_actions=True, seed=0, device="cpu")()
    groups = task.group_map(env)
    rollout = env.rollout(task.max_steps(env), break_when_any_done=False)["next"]
    reward = torch.stack([rollout[group, "reward"].mean(-2) for group in groups]).mean(0)
    ended_before = rollout["done"].cumsum(1) - rollout["done"].long()
    return float((reward * (ended_before == 0)).sum(1).mean())


def last_three(run: Run, frames: int) -> float:
    """The mean of the last three evaluations up to these frames."""
    values = [value for at, value in sorted(run.curves["return"].items()) if at <= frames]
    return sum(values[-3:]) / 3


def screened(runs: list[Run], budget: int) -> dict[str, dict[str, float]]:
    """By task: the return of random actions, MAPPO's within the budget and at its end, and the share of the way."""
    tasks = {}
    for run in runs:
        low, within, high = random_return(run.task), last_three(run, budget), last_three(run, run.frames)
        tasks[run.task] = {"low": low, "within": within, "high": high, "covered": (within - low) / (high - low)}
    return tasks


def is_taken(of_task: dict[str, float]) -> bool:
    """MAPPO rises, and clearly within the budget."""
    return of_task["high"] > of_task["low"] and of_task["covered"] >= COVERED


def budget_of(plan: dict) -> int:
    """The frames of the plan's runs."""
    (frames,) = (text.partition("=")[2] for text in plan["settings"] if text.startswith("experiment.max_n_frames="))
    return int(frames)


def saved_part(name: str, plan: dict, results: Path) -> list[Run]:
    """The saved runs of a part.

    Raises:
        ValueError: where one of them is not there or has not come to its end.
    """
    runs = load(results / name)
    wanted = {(run.task, run.arm, run.seed) for run in planned(plan) if run.part == name}
    missing = wanted - {(run.task, run.label, run.seed) for run in runs if run.finished}
    if missing:
        raise ValueError(f"{name} is not whole: {', '.join(f'{t} {a} seed {s}' for t, a, s in sorted(missing))}.")
    return runs


def by_radius(runs: list[Run], score: str) -> dict[str, dict[str, dict[float, float]]]:
    """By task and arm: a score by radius.

    Raises:
        ValueError: where one is not finite.
    """
    found: dict[str, dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    for cell in cells(runs, "return", None, []):
        arm, _, radius = cell.label.rpartition(" ")
        found[cell.task][arm][float(radius)] = float(cell.scores[score].mean())
    for run in runs:
        arm, _, radius = run.label.rpartition(" ")
        if not math.isfinite(found[run.task][arm].get(float(radius), math.nan)):
            raise ValueError(f"{run.name}: its {score} is not finite, or its returns are not.")
    return found


def default(settings: list[str], key: str) -> float:
    """The value that the package has for ``algorithm.<key>``."""
    (name,) = (value for setting, _, value in (text.partition("=") for text in settings) if setting == "algorithm")
    return getattr(algorithm_config_registry[name].get_from_yaml(), key.removeprefix("algorithm."))


def best(areas: dict[float, float]) -> float:
    """The radius of the largest area."""
    return max(sorted(areas), key=lambda radius: areas[radius])


def radius_of(kl: float, grid: dict[float, float]) -> float | None:
    """The smallest radius at which the KL rises through this one, between two neighbours of the grid; None: nowhere.

    Examples:
        >>> radius_of(0.01, {0.1: 0.001, 0.4: 0.1})
        0.2
        >>> radius_of(1.0, {0.1: 0.001, 0.4: 0.1})
    """
    for (left, below), (right, above) in itertools.pairwise(sorted(grid.items())):
        if 0 < below <= kl <= above and below < above:
            share = math.log(kl / below) / math.log(above / below)
            return float(f"{left * (right / left) ** share:.3g}")
    return None


def print_tasks(plan: dict, results: Path) -> None:
    """The table of the tasks, and the file of the bounds."""
    budget = budget_of(plan)
    tasks = screened(saved_part("screen", plan, results), budget)
    print(
        f"| task | random | MAPPO, {budget} frames | at its end | share of the way | taken |\n|---|---|---|---|---|---|"
    )
    rise = [name for name in plan["parts"]["screen"]["tasks"] if is_taken(tasks[name])]
    taken = rise[:TAKEN]
    for name in plan["parts"]["screen"]["tasks"]:
        of = tasks[name]
        numbers = " | ".join(f"{of[key]:.2f}" for key in ("low", "within", "high", "covered"))
        verdict = "yes" if name in taken else f"no: {TAKEN} before it" if name in rise else "no"
        print(f"| `{name}` | {numbers} | {verdict} |")
    source = f"low: random actions, mean of {EPISODES} episodes; high: MAPPO at the end of `screen`, one seed"
    bounds = {
        name: {"low": round(tasks[name]["low"], 4), "high": round(tasks[name]["high"], 4), "source": source}
        for name in taken
    }
    (results / "tuned").mkdir(parents=True, exist_ok=True)
    (results / "tuned" / "bounds.json").write_text(json.dumps(bounds, indent=1) + "\n")


def print_radii(plan: dict, results: Path) -> None:
    """The table of the areas, the largest in bold, and the part that follows from them."""
    bounds = results / "tuned" / "bounds.json"
    if not bounds.is_file():
        raise ValueError(f"There is no {bounds}, which names the tasks: run `choose.py tasks` first.")
    tasks = list(json.loads(bounds.read_text()))
    ((_, found),) = by_radius(saved_part("tuning", plan, results), "area").items()
    print("| arm | radius: area | | | default |\n|---|---|---|---|---|")
    radii = {}
    for arm, radius in plan["parts"]["tuning"]["radius"].items():
        (key,) = radius
        value, usual = best(found[arm]), default(plan["arms"][arm], key)
        areas = {at: f"{at:g}: {area:.2f}" for at, area in sorted(found[arm].items())}
        areas[value] = f"**{areas[value]}**"
        print(f"| `{arm}` | {' | '.join(areas.values())} | {usual:g} |")
        radii[arm] = {key: [None if value == usual else value]}
    print_part("tuned", tasks, radii)


def print_matched(plan: dict, results: Path) -> None:
    """The table of the KLs, and the parts that follow from them, one for each task."""
    keys = {arm: next(iter(radius)) for arm, radius in plan["parts"]["matching"]["radius"].items()}
    found = by_radius(saved_part("matching", plan, results), "kl")
    print("| task | arm | radius | KL per iteration |\n|---|---|---|---|")
    for task, arm in itertools.product(found, keys):
        for radius, kl in sorted(found[task][arm].items()):
            print(f"| `{task}` | `{arm}` | {radius:g} | {kl:.2g} |")
    for task, grids in found.items():
        aims = sorted(grids["mars"].items())
        radii = {}
        for arm, key in keys.items():
            own = {aim: aim if arm == "mars" else radius_of(kl, grids[arm]) for aim, kl in aims}
            radii[arm] = {key: [radius for radius in own.values() if radius is not None]}
            for aim in (aim for aim, radius in own.items() if radius is None):
                print(f"# {task}: the KL of {arm} does not rise through that of MARS at {aim:g}.")
        print_part(f"matched_{task.split('/')[-1]}", [task], radii)


def print_part(name: str, tasks: list[str], radii: dict[str, dict[str, list[float | None]]]) -> None:
    """A part as the plan has it."""
    print("\n" + yaml.safe_dump({name: {"tasks": tasks, "seeds": SEEDS, "radius": radii}}, sort_keys=False, width=120))


RULES = {"tasks": print_tasks, "radii": print_radii, "matched": print_matched}


def main() -> None:
    """Print what a rule says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rule", choices=RULES, help="what is to be chosen")
    parser.add_argument("--plan", type=Path, default=PLAN, metavar="FILE", help="the plan")
    parser.add_argument(
        "--results", type=Path, default=Path("docs/results"), metavar="FOLDER", help="folder of the saved results"
    )
    arguments = parser.parse_args()
    RULES[arguments.rule](yaml.safe_load(arguments.plan.read_text()), arguments.results)


if __name__ == "__main__":
    main()
