"""Trains on environments that are not vectorised, each copy in a process of its own and with a seed of its own.

    python examples/parallel_collection.py algorithm=happo task=pettingzoo/simple_spread experiment=vmas_laptop \
        experiment.parallel_collection=True experiment.on_policy_n_envs_per_worker=4 experiment.evaluation_episodes=4

This is BenchMARL's own command line, with all its overrides and ``-m``, and one callback. Without
``experiment.parallel_collection=True`` the copies take turns in one process, which is as fast where a step is cheap.
PettingZoo's tasks need the extra ``pettingzoo``; MaMuJoCo's run in processes with ``task.vectorized=False``.
"""

import hydra
from benchmarl.experiment import Callback
from benchmarl.hydra_config import load_experiment_from_hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig


class OwnSeeds(Callback):
    """Gives each copy of the environment a seed of its own.

    BenchMARL builds all copies with the seed of the experiment, so that those of PettingZoo go through the same
    sequence of initial states: thirty copies then show the policy no more beginnings than one.
    """

    def on_setup(self):
        """TorchRL derives the seed of each copy from the first one's. The collector began when it was made: anew."""
        self.experiment.collector.env.set_seed(self.experiment.seed)
        self.experiment.collector.reset()


@hydra.main(version_base=None, config_path="pkg://benchmarl.conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """What ``python -m benchmarl.run`` does, with the callback."""
    task = HydraConfig.get().runtime.choices.task
    load_experiment_from_hydra(cfg, task_name=task, callbacks=[OwnSeeds()]).run()


if __name__ == "__main__":
    main()
