"""GPAE: each agent its own advantage, from a critic that knows the others' actions and not the agent's own."""

import math
from dataclasses import MISSING, dataclass
from types import MappingProxyType

import torch
from benchmarl.algorithms import EnsembleAlgorithmConfig
from benchmarl.algorithms.common import Algorithm
from benchmarl.models.common import EnsembleModelConfig, ModelConfig, SequenceModelConfig
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.data import (
    Categorical,
    Composite,
    LazyTensorStorage,
    OneHot,
    SamplerWithoutReplacement,
    TensorDictReplayBuffer,
    Unbounded,
)
from torchrl.envs import Compose, Transform
from torchrl.objectives import LossModule

from benchmarl_trust import functional as F
from benchmarl_trust.algorithms.common import Simultaneous, TrustRegionConfig
from benchmarl_trust.value import GPAE, CounterfactualCritic

OBJECTIVES = ("clip", "quadratic", "reciprocal")
#: The name of the critic's additional input: who did what.
TABLE = "joint_action"
#: A log-ratio up to this is rounding when it is logged which ratios exceed a cap.
ROUNDING = 1e-4


class Gpae(Simultaneous):
    r"""Generalized per-agent advantage estimation (Kim et al., arXiv 2603.02654).

    .. math::
        A_{i,t} = δ_{i,t} + γ c_{i,t+1} A_{i,t+1}, \qquad
        δ_{i,t} = r_t + γ EQ_i(s_{t+1}, a_{-i,t+1}) - EQ_i(s_t, a_{-i,t})

    The formulas are those of the authors' code; see :mod:`benchmarl_trust.functional.gpae`,
    :class:`~benchmarl_trust.value.GPAE` and :class:`~benchmarl_trust.value.CounterfactualCritic`. The critic's model is
    the one of the configuration (``critic_model_config``), with the table of joint actions as one more input. EQ_i
    conditions on the actions of the agent's own group: other groups' actions are not in a group's batch.

    With ``n_rollouts > 1`` the newest batches are kept whole in the group's buffer. In every iteration values,
    features, ratios and advantages of all of them are computed anew under the policy of the moment, and minibatches,
    as many and as large as ever, are drawn from all of them without replacement.

    Args:
        clip_epsilon (float): ε, the radius of the trust region, whatever the objective.
        objective (str): the surrogate gain: ``clip`` (the authors'), ``quadratic`` or ``reciprocal``.
        truncation (str): of the traces: ``dt``, ``st``, ``it`` or ``none``; without effect if ``n_rollouts`` is 1.
        eta (float): η ≥ 1, the cap on the teammates' joint ratio in ``dt``.
        n_rollouts (int): how many batches are trained on; 1 is on-policy.
        **kwargs: those of :class:`~benchmarl_trust.algorithms.common.TrustRegion`.

    Raises:
        ValueError: on a bad setting, before anything is collected.
    """

    epsilon_key = "clip_epsilon"
    loss_settings = MappingProxyType({"critic_on_absent": True})  # it bootstraps from the values of absent agents

    def __init__(
        self, clip_epsilon: float, objective: str, truncation: str, eta: float, n_rollouts: int, lmbda: float, **kwargs
    ):
        if objective not in OBJECTIVES:
            raise ValueError(f"algorithm.objective={objective} is unknown: choose one of {', '.join(OBJECTIVES)}.")
        super().__init__(epsilon=clip_epsilon, surrogate=objective, lmbda=lmbda, **kwargs)
        F.check_gpae(truncation, eta, lmbda, gamma=1, prefix="algorithm.")
        F.check_gpae(truncation, eta, lmbda, gamma=self.experiment_config.gamma, prefix="experiment.")
        self.truncation, self.eta, self.n_rollouts = truncation, eta, n_rollouts
        self._check_rollouts()
        if self.off_policy:
            config = self.experiment_config
            frames, envs = config.collected_frames_per_batch(self.on_policy), config.n_envs_per_worker(self.on_policy)
            self.resume_state.batch_shapes |= {group: [envs, -(-frames // envs)] for group in self.group_map}
        if not self.share_param_critic:
            raise ValueError(
                "algorithm.share_param_critic=False: GPAE has one critic that is told whose value is wanted. Separate "
                "critics would cost the same time and N times the parameters. Leave it at True."
            )

    def _check_rollouts(self) -> None:
        if self.n_rollouts < 1:
            raise ValueError(f"algorithm.n_rollouts={self.n_rollouts} must be at least 1, which is on-policy.")
        if self.n_rollouts > 1 and isinstance(self.experiment.algorithm_config, EnsembleAlgorithmConfig):
            raise ValueError(
                f"algorithm.n_rollouts={self.n_rollouts}: an ensemble of algorithms does not hand on a buffer that "
                "keeps past batches. Use n_rollouts=1, or one algorithm for all groups."
            )

    @property
    def off_policy(self) -> bool:
        """Whether there are batches of older policies, and so ratios."""
        return self.n_rollouts > 1

    ###################
    # Loss and critic
    ###################

    def _get_loss(self, group: str, policy_for_loss: TensorDictModule, continuous: bool) -> tuple[LossModule, bool]:
        loss, use_target = super()._get_loss(group, policy_for_loss, continuous)
        if self.off_policy:
            loss.set_keys(sample_log_prob=(group, "old_log_prob"), importance_weight=(group, "importance_weight"))
        estimator = GPAE(
            gamma=self.experiment_config.gamma,
            lmbda=self.lmbda,
            actor_network=policy_for_loss,
            value_network=loss.critic_network,
            truncation=self.truncation,
            eta=self.eta,
            off_policy=self.off_policy,
        )
        names = ["reward", "action", "mask", "advantage", "value_target"]
        names += ["policy_features", "old_log_prob", "importance_weight"]
        estimator.set_keys(
            **{name: (group, name) for name in names},
            value=(group, "state_value"),
            sample_log_prob=(group, "log_prob"),
        )  # done and terminated stay those of the root: the team's
        loss.make_value_estimator(estimator)
        return loss, use_target

    def get_critic(self, group: str) -> CounterfactualCritic:
        """The configured model as a counterfactual critic."""
        return counterfactual_critic(
            self.critic_model_config,
            group,
            n_agents=len(self.group_map[group]),
            observation_spec=self.observation_spec,
            state_spec=self.state_spec,
            action_spec=self.action_spec,
            device=self.device,
        )

    ##############
    # Past batches
    ##############

    def get_replay_buffer(self, group: str, transforms: list[Transform] | None = None) -> TensorDictReplayBuffer:
        """BenchMARL's buffer, with room for ``n_rollouts`` batches."""
        buffer = super().get_replay_buffer(group, transforms)
        if not self.off_policy:
            return buffer
        config = self.experiment_config
        frames, envs = config.collected_frames_per_batch(self.on_policy), config.n_envs_per_worker(self.on_policy)
        rows = envs if self.has_rnn else envs * -(-frames // envs)  # a batch is whole steps of all environments
        return TensorDictReplayBuffer(
            storage=LazyTensorStorage(rows * self.n_rollouts, device=self.device),
            sampler=SamplerWithoutReplacement(),
            batch_size=buffer._batch_size,
            transform=Compose(*transforms) if transforms is not None else None,
        )

    def process_batch(self, group: str, batch: TensorDictBase) -> TensorDictBase:
        """GPAE's advantages and value targets of this batch and of those kept, normalised as configured."""
        return super().process_batch(group, self._with_kept(group, batch) if self.off_policy else batch)

    def _with_kept(self, group: str, batch: TensorDictBase) -> TensorDictBase:
        """The batches in the buffer, the oldest first, and this one. The buffer is emptied: all come back processed."""
        if (group, "log_prob") not in batch.keys(True):
            raise ValueError(
                f"The batch has no {(group, 'log_prob')}: with algorithm.n_rollouts={self.n_rollouts} the policy must "
                "store the log-prob of its actions, without which older data has no ratio."
            )
        buffer = self.experiment.replay_buffers[group]
        rows, length = batch.shape
        if len(buffer) == 0:
            return batch
        if len(buffer.storage._storage) < buffer.storage.max_size:
            raise ValueError(
                f"algorithm.n_rollouts={self.n_rollouts}: the restored checkpoint was saved with fewer, and its "
                "buffer has no room for as many. Restore with the n_rollouts it was saved with, or save checkpoints "
                "without their buffers (experiment.exclude_buffer_from_checkpoint=True)."
            )
        kept = buffer.storage[: len(buffer)].reshape(-1, length)[-rows * (self.n_rollouts - 1) :]
        kept = kept.select(*batch.keys(True, True)).to(batch.device)
        batch = torch.cat([kept, batch])
        buffer.empty()
        return batch

    #########
    # Logging
    #########

    @torch.no_grad()
    def _on_advantages(self, group: str, batch: TensorDictBase) -> None:
        mask = batch.get((group, "mask"), None)
        advantage, value, target = (batch[group, key] for key in ("advantage", "state_value", "value_target"))
        metrics = _advantage_metrics(advantage.squeeze(-1), mask)
        unexplained = _variance((target - value).squeeze(-1)) / _variance(target.squeeze(-1)).clamp(min=1e-12)
        metrics |= _each_and_mean("value_explained_variance", 1 - unexplained)
        if self.off_policy:
            metrics |= self._ratio_metrics(group, batch, mask)
        values = torch.stack([metric.double() for metric in metrics.values()]).tolist()
        metrics = {f"train/{group}/{name}": value for name, value in zip(metrics, values, strict=True)}
        if self.off_policy:
            envs = self.experiment_config.n_envs_per_worker(self.on_policy)
            metrics[f"train/{group}/data_age"] = (batch.shape[0] / envs - 1) / 2
        self.experiment.logger.log(metrics, step=self.experiment.n_iters_performed)

    def _ratio_metrics(self, group: str, batch: TensorDictBase, mask: Tensor | None) -> dict[str, Tensor]:
        """What the traces let through, and the shares of ratios that each cap truncates."""
        log_ratio = F.log_ratio(batch[group, "old_log_prob"], batch[group, "log_prob"], mask)
        own = torch.where(log_ratio.isfinite(), log_ratio, 0)
        others = own.sum(-1, keepdim=True) - own
        log_eta = math.log(self.eta)
        steps = {
            "trace_mean": F.trace_coefficient(own, self.lmbda, self.truncation, self.eta),
            "ratio_above_one": own > ROUNDING,
            "joint_ratio_above_one": own + others > ROUNDING,
            "teammates_ratio_above_eta": others > log_eta + ROUNDING,
            "dt_ratio_above_one": own + others.clamp(max=log_eta) > ROUNDING,
            "ratio_not_finite": ~log_ratio.isfinite(),
        }
        metrics = {}
        for name, value in steps.items():
            metrics |= _each_and_mean(name, _mean_of_each(value.double(), mask))
        return metrics


def counterfactual_critic(
    model_config: ModelConfig,
    group: str,
    n_agents: int,
    observation_spec: Composite,
    state_spec: Composite | None,
    action_spec: Composite,
    device: torch.device | str,
) -> CounterfactualCritic:
    """A BenchMARL model as a counterfactual critic.

    The model is built as MAPPO builds its shared critic: centralised, over the global state if the task has one and
    over all observations otherwise. The table of joint actions is one more input: an array per agent beside the
    observations, or one array beside the state. So every model that takes an array does (an image network in its MLP
    part, a set network as features of the set's members), and every critic model of MAPPO takes one.

    Args:
        model_config (ModelConfig): of the critic.
        group (str): the agents' group.
        n_agents (int): its size.
        observation_spec (Composite): of the task, read at ``group``.
        state_spec (Composite, optional): of the task.
        action_spec (Composite): of the task, read at ``(group, "action")``.
        device (torch.device or str): the model's.

    Returns: a critic that writes ``(group, "state_value")``, [*, N, 1].
    """
    action = action_spec[group, "action"]
    discrete = isinstance(action, Categorical | OneHot)
    width = (action.space.n if discrete else 2 * action.shape[-1]) + 1
    extra = [1] * (_feature_dims(model_config, group) - 1)
    if state_spec is not None:
        input_spec, key, shape = state_spec.clone(), TABLE, (*extra, n_agents * width)
        input_spec[TABLE] = Unbounded(shape)
    else:
        input_spec, key, shape = (
            Composite({group: observation_spec[group].clone()}),
            (group, TABLE),
            (n_agents, *extra, width),
        )
        input_spec[group][TABLE] = Unbounded(shape)
    network = model_config.get_model(
        input_spec=input_spec.to(device),
        output_spec=Composite({"state_value": Unbounded(shape=(1,))}),
        n_agents=n_agents,
        centralised=True,
        input_has_agent_dim=state_spec is None,
        agent_group=group,
        share_params=True,
        device=device,
        action_spec=action_spec,
    )
    return CounterfactualCritic(
        network,
        table_shape=shape,
        table_key=key,
        action_key=(group, "action"),
        features_key=(group, "policy_features"),
        value_key=(group, "state_value"),
        mask_key=(group, "mask"),
    )


def _feature_dims(model_config: ModelConfig, group: str) -> int:
    """How many trailing dimensions of an input the first model takes for features (an MLP may take several)."""
    if isinstance(model_config, EnsembleModelConfig):
        model_config = model_config.model_configs_map[group]
    if isinstance(model_config, SequenceModelConfig):
        model_config = model_config.model_configs[0]
    return getattr(model_config, "num_feature_dims", 1)


def _each_and_mean(name: str, value: Tensor) -> dict[str, Tensor]:
    """A quantity of each agent, [N], and its mean over agents."""
    return {f"{name}_agent_{i}": value[i] for i in range(len(value))} | {name: value.mean()}


def _mean_of_each(value: Tensor, mask: Tensor | None) -> Tensor:
    """Each agent's mean over the samples [*, N] in which it takes part, [N]; 0 if there is none."""
    value = value.flatten(0, -2)
    if mask is None:
        return value.mean(0)
    mask = mask.flatten(0, -2)
    return torch.where(mask, value, 0).sum(0) / mask.sum(0).clamp(min=1)


def _variance(value: Tensor) -> Tensor:
    """Each agent's variance over the samples [*, N], [N]."""
    return value.flatten(0, -2).var(0, correction=0)


def _advantage_metrics(advantage: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Mean and spread of each agent's advantages [*, N], and the mean correlation between two agents'."""
    n_agents = advantage.shape[-1]
    flat = advantage.reshape(-1, n_agents).double()
    present = torch.ones_like(flat) if mask is None else mask.reshape(-1, n_agents).double()
    mean = _mean_of_each(flat, mask)
    centred = (flat - mean) * present
    std = (centred.square().sum(0) / present.sum(0).clamp(min=1)).sqrt()
    metrics = _each_and_mean("advantage_mean", mean) | _each_and_mean("advantage_std", std)
    if n_agents > 1:
        both = present.T @ present
        scale = ((centred.square().T @ present) * (present.T @ centred.square())).sqrt()
        correlation = (centred.T @ centred) / scale.clamp(min=1e-12)
        pairs = ~torch.eye(n_agents, dtype=torch.bool, device=flat.device) & (both > 0)
        metrics["advantage_correlation"] = F.masked_mean(correlation, pairs)
    return metrics


@dataclass
class GpaeConfig(TrustRegionConfig):
    """Configuration dataclass for :class:`Gpae`."""

    clip_epsilon: float = MISSING
    objective: str = MISSING
    truncation: str = MISSING
    eta: float = MISSING
    n_rollouts: int = MISSING

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`Gpae`."""
        return Gpae
