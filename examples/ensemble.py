"""An algorithm for each group: HAPPO for the hunters of simple_tag, BenchMARL's MAPPO for the hunted.

python examples/ensemble.py --iterations 40
"""

import argparse

from benchmarl.algorithms import EnsembleAlgorithmConfig, MappoConfig
from benchmarl.environments import VmasTask
from benchmarl.experiment import Experiment
from benchmarl.models import MlpConfig

from benchmarl_trust import HappoConfig, experiment_config


def make_experiment(iterations: int, frames: int = 3_000) -> Experiment:
    """BenchMARL's Experiment, with an ensemble where an algorithm would stand."""
    config = experiment_config(
        "vmas_laptop",
        max_n_iters=iterations,
        max_n_frames=None,
        on_policy_collected_frames_per_batch=frames,
        on_policy_n_envs_per_worker=30,
        evaluation_interval=15_000,
    )
    return Experiment(
        task=VmasTask.SIMPLE_TAG.get_from_yaml(),
        algorithm_config=EnsembleAlgorithmConfig(
            {"adversary": HappoConfig.get_from_yaml(), "agent": MappoConfig.get_from_yaml()}
        ),
        model_config=MlpConfig.get_from_yaml(),
        seed=0,
        config=config,
    )


def main() -> None:
    """Train, and say where the logs of each group are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=40)
    experiment = make_experiment(parser.parse_args().iterations)
    experiment.run()
    scalars = experiment.folder_name / experiment.name / "scalars"
    for group in experiment.group_map:
        rewards = (scalars / f"collection_{group}_reward_episode_reward_mean.csv").read_text().splitlines()
        first, last = (float(row.split(",")[1]) for row in (rewards[0], rewards[-1]))
        print(f"{group}: mean return {first:.2f} in the first iteration, {last:.2f} in the last")


if __name__ == "__main__":
    main()
