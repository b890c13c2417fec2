"""The sequential algorithms whose agents take gradient steps on PPO's clipped objective."""

from dataclasses import MISSING, dataclass

import torch
from torch import Tensor
from torchrl.objectives import LossModule

from benchmarl_trust import functional as F
from benchmarl_trust.algorithms.sequential import Sequential, SequentialConfig
from benchmarl_trust.updates import (
    Agent,
    GradientStep,
    MinibatchEpochs,
    PositionInfo,
    fused,
    log_ratio_of,
    shuffles,
    sweep,
)


class SequentialClip(Sequential):
    """Epochs of clipped minibatch steps, one agent after another, each with an optimizer of its own.

    Args:
        clip_epsilon (float): ε in (0, 1).
        actor_epochs (int, optional): passes of each agent over the batch; None: the experiment's
            ``on_policy_n_minibatch_iters``, so that each agent gets as many steps as MAPPO's policy. (Minibatches of
            recurrent policies are whole sequences, which can make a step less per epoch.)
        actor_minibatch_size (int, optional): frames per step of an agent; None: the experiment's
            ``on_policy_minibatch_size``.
        **kwargs: those of :class:`~benchmarl_trust.algorithms.sequential.Sequential`.

    Raises:
        ValueError: on a bad setting, before anything is collected.
    """

    epsilon_key = "clip_epsilon"
    shared_policy_note = (
        "The agents will take turns within each minibatch, and the one network makes as many times more steps than "
        "MAPPO's as there are agents."
    )

    def __init__(self, clip_epsilon: float, actor_epochs: int | None, actor_minibatch_size: int | None, **kwargs):
        super().__init__(surrogate="clip", epsilon=clip_epsilon, **kwargs)
        self._check_steps(actor_epochs, actor_minibatch_size)
        self.actor_epochs = actor_epochs or self.experiment_config.n_optimizer_steps(self.on_policy)
        self.minibatch_frames = actor_minibatch_size or self.experiment_config.train_minibatch_size(self.on_policy)

    def _check_steps(self, epochs: int | None, minibatch: int | None) -> None:
        frames = self.experiment_config.collected_frames_per_batch(self.on_policy)
        if epochs is not None and epochs < 1:
            raise ValueError(f"algorithm.actor_epochs={epochs} must be at least 1, or null for the experiment's.")
        if minibatch is not None and not 1 <= minibatch <= frames:
            raise ValueError(
                f"algorithm.actor_minibatch_size={minibatch} must lie between 1 and the {frames} frames of a batch "
                "(experiment.on_policy_collected_frames_per_batch), or be null for the experiment's."
            )

    def _get_parameters(self, group: str, loss: LossModule) -> dict[str, list]:
        """One optimizer per agent (one Adam for all would move the others by stale momentum), and the critic's."""
        agents = self._policies[group].agents
        own = {self._optimizer_name(group, agent.index): agent.parameters for agent in agents}
        self.guard.policy_phase[group] |= own.keys()
        return own | super()._get_parameters(group, loss)

    def _optimizer(self, group: str, agent: int) -> torch.optim.Optimizer:
        return fused(self.experiment.optimizers[group][self._optimizer_name(group, agent)])

    def _optimizer_name(self, group: str, agent: int) -> str:
        return "loss_objective_shared" if self._policies[group].shared else f"loss_objective_agent_{agent}"

    def _sweep(self, team: list[str], agents: list[Agent], order: list[int]) -> list[PositionInfo]:
        if self._is_shared(team):
            return self._minibatch_sweeps(agents, order)
        chunk = self._chunk(agents)
        step = MinibatchEpochs(self._gradient_step(), self.actor_epochs, chunk, self.generator)
        return sweep(agents, order, step, self.clip_factor, chunk=chunk)

    def _minibatch_sweeps(self, agents: list[Agent], order: list[int]) -> list[PositionInfo]:
        """Shared policies: an update of one agent moves the others, so the sweep runs within each minibatch.

        Source: reconstructed after Le & Ta's shared variant, whose running product is never reset; here M starts at 1
        in every minibatch.
        """
        infos, step = [], self._gradient_step()
        for permutation in shuffles(len(agents[0].data), self.actor_epochs, self.generator):
            for rows in permutation.split(self._chunk(agents)):
                infos += sweep(agents, order, step, self.clip_factor, rows)
        return infos

    def _gradient_step(self) -> GradientStep:
        config = self.experiment_config
        by_norm = config.clip_grad_norm and config.clip_grad_val is not None
        return GradientStep(
            surrogate=self.surrogate,
            epsilon=self.clip_epsilon,
            entropy_coef=self.entropy_coef,
            max_grad_norm=config.clip_grad_val if by_norm else None,
            max_grad_value=None if by_norm else config.clip_grad_val,
        )

    def _chunk(self, agents: list[Agent]) -> int:
        """Rows per minibatch: steps, or whole sequences for recurrent policies, counted as BenchMARL counts them."""
        if not self.has_rnn:
            return self.minibatch_frames
        return -(-self.minibatch_frames // agents[0].data.shape[1])

    def _agent_metrics(self, agent: Agent, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        log_ratio = log_ratio_of(agent, agent.data, outputs)
        low, high = F.SURROGATES["clip"].log_bounds(self.clip_epsilon, self.clip_epsilon)
        outside = ((log_ratio < low) | (log_ratio > high)).to(log_ratio.dtype)
        clip_fraction = F.masked_mean(outside, agent.data.get("mask", None))
        return super()._agent_metrics(agent, outputs) | {"clip_fraction": clip_fraction}


@dataclass
class SequentialClipConfig(SequentialConfig):
    """What the configurations of these algorithms have; :class:`SequentialClip` says what the keys mean."""

    clip_epsilon: float = MISSING
    actor_epochs: int | None = MISSING
    actor_minibatch_size: int | None = MISSING
