"""A callback of one's own: in how many episodes of balance the package falls.

python examples/custom_callback.py --iterations 40
"""

import argparse

from benchmarl.environments import VmasTask
from benchmarl.experiment import Callback, Experiment
from benchmarl.models import MlpConfig
from tensordict import TensorDictBase

from benchmarl_trust import ClipHappoConfig, experiment_config


class Outcomes(Callback):
    """Logs why episodes of balance end: the share in which the package lies on the ground, in place of at its goal.

    The return mixes this with how near the package comes. A callback is given whole batches, with all that the
    environment says of itself (``info``); quantities of a task have no key, and need none.
    """

    def on_batch_collected(self, batch: TensorDictBase) -> None:
        """Look at the steps that ended an episode; without any there is nothing to log."""
        after = batch["next"]
        fallen = after["agents", "info", "ground_rew"][..., 0, :] < 0  # of each agent the same
        ended = after["terminated"]
        if ended.any():
            share = fallen[ended].float().mean().item()
            self.experiment.logger.log({"collection/fallen": share}, step=self.experiment.n_iters_performed)


def make_experiment(iterations: int, frames: int = 3_000) -> Experiment:
    """BenchMARL's Experiment with the callback; the package adds its own behind it."""
    config = experiment_config(
        "vmas_laptop",
        max_n_iters=iterations,
        max_n_frames=None,
        on_policy_collected_frames_per_batch=frames,
        on_policy_n_envs_per_worker=30,
        evaluation_interval=15_000,
    )
    return Experiment(
        task=VmasTask.BALANCE.get_from_yaml(),
        algorithm_config=ClipHappoConfig.get_from_yaml(),
        model_config=MlpConfig.get_from_yaml(),
        seed=0,
        config=config,
        callbacks=[Outcomes()],
    )


def main() -> None:
    """Train; the share is beside the other numbers, in ``scalars/collection_fallen.csv``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=40)
    experiment = make_experiment(parser.parse_args().iterations)
    experiment.run()
    print(f"Logged in {experiment.folder_name / experiment.name / 'scalars'}")


if __name__ == "__main__":
    main()
