"""What the plan leaves to rules of its own, read off the runs that they rest on: tasks, radii, and radii of equal KL.

    python benchmarks/study/choose.py tasks    # from the part `screen`; writes docs/results/tuned/bounds.json
    python benchmarks/study/choose.py radii    # from `tuning`: the part `tuned`, to be added to the plan
    python benchmarks/study/choose.py matched  # from `matching`: the parts `matched_<task>`

Tasks: two returns of a task are its bounds: 0 is that of uniformly random actions, mean over 600 episodes; 1 the mean
of MAPPO's last three evaluations at three times the budget. A task is taken if the mean of MAPPO's last three
evaluations within the budget has come at least half of the way. Printed is the table of all tasks that were screened;
``bounds.json``, for the report, holds those that are taken.

Radii: of each arm's values that with the largest area under the evaluation curve; of equals the smallest.

Equal KL: for each radius of MARS that of each other arm at which the KL per iteration is MARS's, linear between the
grid's neighbouring values in the logarithms of both. Where the grid does not reach it there is none, which is said.
"""

import argparse
import itertools
import json
import math
from collections import defaultdict
from pathlib import Path

import torch
import yaml
from benchmarl.environments import task_config_registry
from run import PLAN

from benchmarl_trust.report.compact import load
from benchmarl_trust.report.runs import Run
from benchmarl_trust.report.statistics import cells

EPISODES = 600
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


def areas(runs: list[Run]) -> dict[str, dict[float, float]]:
    """By arm: the area under the evaluation curve by radius."""
    found: dict[str, dict[float, float]] = defaultdict(dict)
    for cell in cells(runs, "return", None, []):
        arm, _, radius = cell.label.rpartition(" ")
        found[arm][float(radius)] = float(cell.scores["area"].mean())
    return found


def best(by_radius: dict[float, float]) -> float:
    """The radius of the largest area."""
    return max(sorted(by_radius), key=lambda radius: by_radius[radius])


def kls(runs: list[Run]) -> dict[str, dict[str, dict[float, float]]]:
    """By task and arm: the KL per iteration by radius."""
    found: dict[str, dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    for cell in cells(runs, "return", None, []):
        arm, _, radius = cell.label.rpartition(" ")
        found[cell.task][arm][float(radius)] = float(cell.scores["kl"].mean())
    return found


def radius_of(kl: float, grid: dict[float, float]) -> float | None:
    """The radius with this KL, between two neighbours of the grid; None where none of it has less, or more.

    Examples:
        >>> radius_of(0.01, {0.1: 0.001, 0.4: 0.1})
        0.2
        >>> radius_of(1.0, {0.1: 0.001, 0.4: 0.1})
    """
    for (left, below), (right, above) in itertools.pairwise(sorted(grid.items())):
        if below <= kl <= above:
            share = math.log(kl / below) / math.log(above / below)
            return float(f"{left * (right / left) ** share:.3g}")
    return None


def print_tasks(plan: dict, results: Path) -> None:
    """The table of the tasks, and the file of the bounds."""
    budget = budget_of(plan)
    tasks = screened(load(results / "screen"), budget)
    print(
        f"| task | random | MAPPO, {budget} frames | at its end | share of the way | taken |\n|---|---|---|---|---|---|"
    )
    for name, of in sorted(tasks.items()):
        numbers = " | ".join(f"{of[key]:.2f}" for key in ("low", "within", "high", "covered"))
        print(f"| `{name}` | {numbers} | {'yes' if is_taken(of) else 'no'} |")
    source = f"low: random actions, mean of {EPISODES} episodes; high: MAPPO at the end of `screen`, one seed"
    bounds = {
        name: {"low": round(of["low"], 4), "high": round(of["high"], 4), "source": source}
        for name, of in sorted(tasks.items())
        if is_taken(of)
    }
    (results / "tuned").mkdir(parents=True, exist_ok=True)
    (results / "tuned" / "bounds.json").write_text(json.dumps(bounds, indent=1) + "\n")


def print_radii(plan: dict, results: Path) -> None:
    """The table of the areas, and the radii as the plan has them."""
    found, part = areas(load(results / "tuning")), {}
    print("| arm | radius | area | chosen |\n|---|---|---|---|")
    for arm, by_radius in found.items():
        for radius, value in sorted(by_radius.items()):
            print(f"| `{arm}` | {radius:g} | {value:.2f} | {'yes' if radius == best(by_radius) else ''} |")
    for arm, radius in plan["parts"]["tuning"]["radius"].items():
        missing = {value for (values,) in [radius.values()] for value in values} - found[arm].keys()
        if missing:
            raise ValueError(f"tuning: {arm} has not been run with {', '.join(map(str, sorted(missing)))}.")
        part[arm] = {key: [best(found[arm])] for key in radius}
    print("\n" + yaml.safe_dump({"tuned": {"radius": part}}, sort_keys=False))


def print_matched(plan: dict, results: Path) -> None:
    """The radii of equal KL as the plan has them, a part for each task."""
    keys = {arm: next(iter(radius)) for arm, radius in plan["parts"]["matching"]["radius"].items()}
    for task, grids in kls(load(results / "matching")).items():
        part = {"mars": {keys["mars"]: sorted(grids["mars"])}}
        for arm in (arm for arm in keys if arm != "mars"):
            radii = {aim: radius_of(kl, grids[arm]) for aim, kl in sorted(grids["mars"].items())}
            part[arm] = {keys[arm]: [radius for radius in radii.values() if radius is not None]}
            for aim in (aim for aim, radius in radii.items() if radius is None):
                print(f"# {task}: {arm} does not reach the KL of MARS at {aim:g} in its grid.")
        print(yaml.safe_dump({f"matched_{task.split('/')[-1]}": {"radius": part, "tasks": [task]}}, sort_keys=False))


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
