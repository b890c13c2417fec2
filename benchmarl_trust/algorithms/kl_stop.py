"""An end of the policy's steps in BenchMARL's own loop, which no plugin can break out of."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from benchmarl_trust.runtime import OwnCallback


@dataclass
class _Turn:
    """A group's iteration so far."""

    target: float
    kl: Callable[[], Tensor]
    epoch: int
    epochs: int
    steps: int = 0
    stopped: bool = False


class KlStop(OwnCallback):
    """Ends a group's policy steps of an iteration once, after an epoch, its KL exceeds a target.

    BenchMARL's loop makes all its optimizer steps. Once a group has stopped, its algorithm hands the loop no policy
    loss, so that the policy's optimizer is not stepped: neither parameters nor moments change. The critic goes on.

    What BenchMARL logs of the loss stays a mean over all minibatches of the iteration; those after the stop see the
    policy as it stays, and the norm of its gradient, which is not taken, counts as 0. ``train/{group}/policy/epochs``
    says how many epochs there were.
    """

    def __init__(self):
        super().__init__()
        self._turns: dict[str, _Turn] = {}

    def watch(self, group: str, target: float, kl: Callable[[], Tensor]) -> None:
        """An iteration of the group begins.

        Args:
            group (str): its name.
            target (float): the KL from the iteration's old policy that no further epoch starts beyond.
            kl (callable): that KL as it is now, of each agent, [N].
        """
        config, on_policy = self.experiment.config, self.experiment.on_policy
        epoch = -(-config.train_batch_size(on_policy) // config.train_minibatch_size(on_policy))
        self._turns[group] = _Turn(target, kl, epoch, config.n_optimizer_steps(on_policy))

    def stopped(self, group: str) -> bool:
        """Whether the policy has made its last step of the iteration."""
        return group in self._turns and self._turns[group].stopped

    def on_train_step(self, batch: TensorDictBase, group: str) -> TensorDictBase | None:
        """Count the step; at the end of an epoch look at the KL, for which the host waits once."""
        turn = self._turns.get(group)
        if turn is None:
            return None  # a group of an ensemble with another algorithm
        if turn.stopped:
            return TensorDict({"grad_norm_loss_objective": torch.zeros((), device=self.experiment.config.train_device)})
        turn.steps += 1
        if turn.steps % turn.epoch == 0 and turn.steps < turn.epoch * turn.epochs:
            turn.stopped = not turn.kl().double().mean() <= turn.target
        return None

    def on_train_end(self, training_td: TensorDictBase, group: str) -> None:
        """Log the epochs."""
        if group in self._turns:
            turn = self._turns.pop(group)
            self.experiment.logger.log(
                {f"train/{group}/policy/epochs": turn.steps / turn.epoch}, step=self.experiment.n_iters_performed
            )
