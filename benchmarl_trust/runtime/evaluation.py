"""What a task tells of its evaluations, which BenchMARL logs of collection alone."""

from typing import Protocol, cast

from benchmarl.experiment import Experiment
from tensordict import TensorDictBase
from torch import Tensor

from benchmarl_trust.runtime.guard import OwnCallback, own_callback


class TellsOfEvaluation(Protocol):
    """A task that has numbers of evaluated episodes."""

    def evaluation_info(self, rollouts: list[TensorDictBase]) -> dict[str, Tensor]:
        """By name one number per episode; the rollouts end where the episodes do."""
        ...


class EvaluationInfo(OwnCallback):
    """Logs the task's ``evaluation_info``: means as ``eval/info/<name>``, and each episode's in BenchMARL's report."""

    @classmethod
    def add_to(cls, experiment: Experiment) -> None:
        """Add it, if the task has such numbers."""
        if hasattr(experiment.task, "evaluation_info"):
            own_callback(experiment, cls)

    def on_evaluation_end(self, rollouts: list[TensorDictBase]) -> None:
        """BenchMARL has cut and logged the rollouts."""
        experiment = self.experiment
        info = cast(TellsOfEvaluation, experiment.task).evaluation_info(rollouts)
        means = {f"eval/info/{name}": each.mean().item() for name, each in info.items()}
        experiment.logger.log(means, step=experiment.n_iters_performed)
        if experiment.logger.json_writer is not None:
            step = experiment.total_frames // experiment.config.evaluation_interval
            # It takes tensors, as BenchMARL gives it; its annotation says lists of them.
            experiment.logger.json_writer.write(experiment.total_frames, cast(dict, info), step)
