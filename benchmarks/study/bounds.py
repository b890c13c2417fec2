"""Which tasks the study takes, by the rule in plan.yaml, and the bounds of their returns, from the part ``screen``.

    python benchmarks/study/bounds.py --out docs/results/tuned

Two returns of a task are its bounds: 0 is that of uniformly random actions, mean over 600 episodes; 1 the mean of
MAPPO's last three evaluations at three times the budget. A task is taken if the mean of MAPPO's last three evaluations
within the budget has come at least half of the way. Printed is the table of all tasks that were screened;
``bounds.json``, for the report, holds those that are taken.
"""

import argparse
import json
from pathlib import Path

import torch
import yaml
from benchmarl.environments import task_config_registry
from run import PLAN

from benchmarl_trust.report.compact import load
from benchmarl_trust.report.runs import Run

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


def main() -> None:
    """Print the table and write the bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--screen", type=Path, default=Path("docs/results/screen"), help="folder of the saved runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for bounds.json")
    arguments = parser.parse_args()
    budget = budget_of(yaml.safe_load(PLAN.read_text()))
    tasks = screened(load(arguments.screen), budget)
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
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "bounds.json").write_text(json.dumps(bounds, indent=1) + "\n")


if __name__ == "__main__":
    main()
