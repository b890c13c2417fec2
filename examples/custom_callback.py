"""A callback of one's own: learning rates that fall linearly towards zero.

python examples/custom_callback.py --iterations 40
"""

import argparse

from benchmarl.environments import VmasTask
from benchmarl.experiment import Callback, Experiment
from benchmarl.models import MlpConfig
from tensordict import TensorDictBase

from benchmarl_trust import ClipHappoConfig, experiment_config


class LinearDecay(Callback):
    """Lowers the learning rates of all optimizers, those of single agents and of the critics alike.

    They are in ``experiment.optimizers[group]``, as in BenchMARL: ``loss_objective_agent_<i>`` and ``loss_critic`` for
    HAPPO with separate policies.
    """

    def on_batch_collected(self, batch: TensorDictBase) -> None:
        """Set the rates of this iteration, and log them. They follow from its number: a resumed run goes on alike."""
        config, done = self.experiment.config, self.experiment.n_iters_performed
        lr = config.lr * (1 - done / config.get_max_n_iters(self.experiment.on_policy))
        for optimizers in self.experiment.optimizers.values():
            for optimizer in optimizers.values():
                for parameters in optimizer.param_groups:
                    parameters["lr"] = lr
        self.experiment.logger.log({"train/lr": lr}, step=done)


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
        callbacks=[LinearDecay()],
    )


def main() -> None:
    """Train, and show the last rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=40)
    experiment = make_experiment(parser.parse_args().iterations)
    experiment.run()
    for name, optimizer in experiment.optimizers["agents"].items():
        print(f"{name}: lr {optimizer.param_groups[0]['lr']:.1e}")


if __name__ == "__main__":
    main()
