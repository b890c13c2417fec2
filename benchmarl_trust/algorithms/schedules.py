"""What changes over a run: factors of the learning rates and of ε, which follow from where the run is.

Nothing of them is saved, so a resumed run goes on exactly, and a run that is made longer is from then on where it would
have been, had it been as long from the start.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from benchmarl.experiment import Experiment
from torch import Tensor

SCHEDULES = ("constant", "linear")


@dataclass(frozen=True)
class Schedule:
    r"""A factor for each iteration.

    .. math:: f_k = \min(1, F_k / F_{warm}) \cdot \begin{cases} 1 & \text{constant} \\ 1 - k/K & \text{linear}
        \end{cases}

    k iterations of K are done and :math:`F_k` frames are collected, those of this iteration included. So neither the
    first nor the last batch is learned from with a factor of 0.

    BenchMARL ends a run by its iterations, so k/K is the share of its frames; with batches of another size after a
    resume it is still what is left of the loop that counts.

    Source: the linear decay of PPO's implementations and HARL's (``use_linear_lr_decay``, lr (1 - episode/episodes));
    the warm-up is ours.

    Args:
        kind (str): ``constant`` or ``linear``.
        warmup_frames (int): :math:`F_{warm}`; 0 for none.
    """

    kind: str
    warmup_frames: int = 0

    @property
    def moves(self) -> bool:
        """Whether it is not 1 all the time."""
        return self.kind != "constant" or self.warmup_frames > 0

    def factor(self, experiment: Experiment) -> float:
        """Of the iteration whose batch has just been collected; beyond the run's end that of the last."""
        warm = min(1.0, experiment.total_frames / self.warmup_frames) if self.warmup_frames else 1.0
        if self.kind == "constant":
            return warm
        iterations = experiment.config.get_max_n_iters(experiment.on_policy)
        return warm * (1 - min(experiment.n_iters_performed, iterations - 1) / iterations)


def set_lr(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """Give all parameters of these optimizers the rate; one that lies on a device stays there."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
