"""The sequential algorithms whose agents take epochs of minibatch gradient steps."""

from dataclasses import dataclass
from typing import cast

import torch
from benchmarl.experiment import ExperimentConfig
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor
from torchrl.objectives import LossModule

from benchmarl_trust import functional as F
from benchmarl_trust.algorithms.checks import check_compiler, refuse
from benchmarl_trust.algorithms.keys import Flag, Number, Radius, setting
from benchmarl_trust.algorithms.sequential import Sequential, SequentialConfig
from benchmarl_trust.policy import Agent, Head, forward, log_ratio_of
from benchmarl_trust.updates import (
    Advantage,
    CompiledGradient,
    GradientStep,
    MinibatchEpochs,
    PositionInfo,
    StepInfo,
    exceeds_kl,
    shuffles,
    sweep,
    with_epochs,
)


class SequentialGradient(Sequential):
    """Epochs of minibatch steps on a surrogate gain, one agent after another, each with an optimizer of its own.

    Args:
        epsilon_by_position (bool): the agent at position k of N has the radius ε (1 + k/N)/2.
        actor_epochs (int, optional): passes of each agent over the batch; None: the experiment's
            ``on_policy_n_minibatch_iters``, so that each agent gets as many steps as MAPPO's policy. (Minibatches of
            recurrent policies are whole sequences, which can make a step less per epoch.)
        actor_minibatch_size (int, optional): frames per step of an agent; None: the experiment's
            ``on_policy_minibatch_size``.
        compile (bool): loss and gradient of a minibatch are one function of ``torch.compile``, for all agents of a
            group; see :class:`~benchmarl_trust.updates.CompiledGradient`. The numbers are the same to rounding.
        **kwargs: those of :class:`~benchmarl_trust.algorithms.sequential.Sequential`.

    Raises:
        ValueError: on a bad setting, before anything is collected.
    """

    corrects_advantages = True
    shared_policy_note = (
        "The agents will take turns within each minibatch, and the one network makes as many times more steps than "
        "MAPPO's as there are agents."
    )

    def __init__(
        self,
        epsilon_by_position: bool,
        actor_epochs: int | None,
        actor_minibatch_size: int | None,
        compile: bool,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if self.factor == "inside_clip" and self.surrogate != "clip":
            refuse(
                "factor",
                self.factor,
                f"algorithm.surrogate={self.surrogate} has no clip for the factor to be inside of. Take "
                "algorithm.surrogate=clip, or factor=full or capped.",
            )
        self.epsilon_by_position = epsilon_by_position
        self.actor_epochs = actor_epochs or self.experiment_config.n_optimizer_steps(self.on_policy)
        self.minibatch_frames = actor_minibatch_size or self.experiment_config.train_minibatch_size(self.on_policy)
        self._compiled: dict[tuple[Head, str, float], CompiledGradient] | None = {} if compile else None

    def _get_loss(
        self, group: str, policy_for_loss: ProbabilisticTensorDictSequential, continuous: bool
    ) -> tuple[LossModule, bool]:
        loss = super()._get_loss(group, policy_for_loss, continuous)
        if self._compiled is not None:
            self._check_compilable(group)
        return loss

    def _check_compilable(self, group: str) -> None:
        """A compiled step runs one agent's network. (BenchMARL's recurrent ones make modules on the way, which
        ``torch.compile`` does not trace.)
        """
        recurrent = self.model_config.is_rnn
        if recurrent or not all(agent.alone for agent in self._policies[group].agents):
            kind = "is recurrent" if recurrent else "cannot be run for one agent alone"
            refuse(
                "compile",
                True,
                f"the policy of group {group} {kind} ({type(self.model_config).__name__}). Take "
                "algorithm.compile=False, or a model of separate agents without a state (an MLP or a CNN).",
            )

    def _get_parameters(self, group: str, loss: LossModule) -> dict[str, list]:
        """One optimizer per agent (one Adam for all would move the others by stale momentum), and the critic's."""
        names = self._optimizer_names(group)
        self.guard.policy_phase[group].update(names)
        own = {name: agent.parameters for name, agent in zip(names, self._policies[group].agents, strict=True)}
        return own | super()._get_parameters(group, loss)

    def _optimizer_names(self, group: str) -> list[str]:
        """The optimizer of each agent of the group; of a shared policy, the same for all."""
        policy = self._policies[group]
        return [f"loss_objective_{'shared' if policy.shared else f'agent_{a.index}'}" for a in policy.agents]

    def _optimizers(self, group: str) -> list[torch.optim.Optimizer]:
        return [self.experiment.optimizers[group][name] for name in self._optimizer_names(group)]

    def _sweep(self, team: list[str], agents: list[Agent], order: list[int]) -> list[PositionInfo]:
        chunk, rows = self._chunk(agents), self._rows(team, agents)
        correction = self.estimator.correction(team[0], self._batches[team[0]], self._as_used)
        if self._is_shared(team):
            return self._minibatch_sweeps(agents, order, rows, correction)
        step = MinibatchEpochs(self._gradient_step(), self.actor_epochs, chunk, self.generator, rows, self.target_kl)
        return sweep(agents, order, step, self.factor, chunk=chunk, epsilon=self.epsilon[1], advantage=correction)

    def _minibatch_sweeps(
        self, agents: list[Agent], order: list[int], rows: int, correction: Advantage | None
    ) -> list[PositionInfo]:
        """Shared policies: an update of one agent moves the others, so the sweep runs within each minibatch.

        Source: reconstructed after Le & Ta's shared variant, whose running product is never reset; here M starts at 1
        in every minibatch. Advantages that are corrected at each turn are corrected here from the second epoch on, once
        in each, for what all agents have become (ours). No agent has a turn of its own that could end, so ``target_kl``
        bounds the mean over the team's agents, and all end with the same epoch.
        """
        infos, step, chunk = [], self._gradient_step(), self._chunk(agents)
        for k, epoch in enumerate(shuffles(len(agents[0].data), self.actor_epochs, self.generator, rows)):
            if correction is not None and k > 0:
                log_ratios = (log_ratio_of(a.policy, forward(a, a.data, chunk), a.data) for a in agents)
                moved = cast(Tensor, sum(log_ratios))
                for i, agent in enumerate(agents):
                    agent.data["advantage"] = correction(i, moved)
            for minibatch in epoch.split(chunk):
                turns = sweep(agents, order, step, self.factor, minibatch, epsilon=self.epsilon[1])
                # What was computed on these rows is of no use later, and there may be many minibatches.
                infos += [turn._replace(log_ratio=None, outputs=()) for turn in turns]
            if k + 1 < self.actor_epochs and exceeds_kl(self.target_kl, agents, rows, chunk):
                break
        if self.target_kl is None:
            return infos
        return [info._replace(step=with_epochs(cast(StepInfo, info.step), k + 1)) for info in infos]

    def _gradient_step(self) -> GradientStep:
        config = self.experiment_config
        by_norm = config.clip_grad_norm and config.clip_grad_val is not None
        return GradientStep(
            surrogate=self.surrogate,
            epsilon=self.epsilon,
            entropy_coef=self.entropy_coef,
            max_grad_norm=config.clip_grad_val if by_norm else None,
            max_grad_value=None if by_norm else config.clip_grad_val,
            by_position=self.epsilon_by_position,
            compiled=self._compiled,
        )

    def _chunk(self, agents: list[Agent]) -> int:
        """Rows per minibatch: steps, or whole sequences for recurrent policies, counted as BenchMARL counts them."""
        if not self.has_rnn:
            return self.minibatch_frames
        return -(-self.minibatch_frames // agents[0].data.shape[1])

    def _agent_metrics(self, head: Head, data: TensorDict, outputs: tuple[Tensor, ...], rows: int) -> dict[str, Tensor]:
        log_ratio, mask = log_ratio_of(head, outputs, data), data.get("mask", None)
        shares = {
            name: F.mean_of_each(F.is_outside(surrogate, log_ratio, self.epsilon).to(log_ratio.dtype), mask)
            for name, surrogate in (("clip_fraction", "clip"), ("outside_fraction", self.surrogate))
        }
        return super()._agent_metrics(head, data, outputs, rows) | shares


@dataclass
class SequentialGradientConfig(SequentialConfig):
    """What the configurations of these algorithms have; :class:`SequentialGradient` says what the keys mean."""

    epsilon: float = setting(Radius(usual=0.2))
    epsilon_negative: float | None = setting(Radius(null=True, usual=None))
    epsilon_by_position: bool = setting(Flag(usual=False))
    actor_epochs: int | None = setting(Number(least=1, most=10_000, whole=True, null=True, usual=None))
    actor_minibatch_size: int | None = setting(Number(most=None, whole=True, null=True, usual=None))
    compile: bool = setting(Flag(usual=False))

    def check_keys(self, experiment: ExperimentConfig) -> None:
        """Also the size of a minibatch, which has as many frames as a batch at most; and what ``compile`` needs."""
        super().check_keys(experiment)
        if self.compile:
            check_compiler(experiment.train_device)
        frames = experiment.collected_frames_per_batch(self.on_policy())
        if self.actor_minibatch_size is not None and not 1 <= self.actor_minibatch_size <= frames:
            refuse(
                "actor_minibatch_size",
                self.actor_minibatch_size,
                f"it must be a whole number between 1 and the {frames} frames of a batch "
                "(experiment.on_policy_collected_frames_per_batch), or null for the experiment's. The usual value is "
                "null.",
            )
