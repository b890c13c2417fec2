"""Who deserves what: the estimators of advantages, each with its critic, the batches it keeps and what it logs.

An algorithm has one, named by its key ``estimator``, and asks it for whatever depends on that choice.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from benchmarl.algorithms import EnsembleAlgorithmConfig, Mappo
from benchmarl.models.common import EnsembleModelConfig, ModelConfig, SequenceModelConfig
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, TensorDictModuleBase
from torch import Tensor
from torchrl.data import (
    Categorical,
    Composite,
    LazyTensorStorage,
    OneHot,
    ReplayBuffer,
    SamplerWithoutReplacement,
    TensorDictReplayBuffer,
    Unbounded,
)
from torchrl.data.utils import DEVICE_TYPING
from torchrl.envs import Compose, Transform
from torchrl.objectives import ValueEstimators

from benchmarl_trust import functional as F
from benchmarl_trust.algorithms.checks import LEAST_BYTES, check_memory, refuse
from benchmarl_trust.algorithms.metrics import advantage_metrics, each_and_mean, variance_of_each
from benchmarl_trust.losses import SurrogateLoss
from benchmarl_trust.updates import Advantage
from benchmarl_trust.value import GPAE, CounterfactualCritic

if TYPE_CHECKING:
    from benchmarl_trust.algorithms.common import TrustRegion
    from benchmarl_trust.algorithms.teams import Teams

#: The name of the counterfactual critic's additional input: who did what.
TABLE = "joint_action"
#: A log-ratio up to this is rounding when it is logged which ratios exceed a cap.
ROUNDING = 1e-4


class GaeEstimator:
    """The host's: GAE(λ) over MAPPO's critic, on the newest batch alone.

    Args:
        algorithm (TrustRegion): whose estimator it is.
        truncation (str), eta (float), n_rollouts (int): see :class:`GpaeEstimator`; here only ``n_rollouts=1`` has a
            meaning.

    Raises:
        ValueError: on a bad setting, before anything is collected.
    """

    #: Whether data of older policies is among the batches.
    off_policy = False
    #: Whether other agents' values are told this agent's action, so that their advantages are none of its.
    sees_own_action = False

    def __init__(self, algorithm: "TrustRegion", truncation: str, eta: float, n_rollouts: int):
        self.algorithm = algorithm
        self.truncation, self.eta, self.n_rollouts = truncation, eta, n_rollouts
        self._check()

    def n_batches(self, batch: TensorDictBase) -> int:
        """How many batches :meth:`with_kept` has put together into this one, [B, T]."""
        return 1

    def _check(self) -> None:
        if self.n_rollouts > 1:
            refuse(
                "n_rollouts",
                self.n_rollouts,
                "older batches need the ratios of algorithm.estimator=gpae. Take that, or n_rollouts=1.",
            )

    def check_teams(self, teams: "Teams") -> None:
        """Refuse teams that the estimator has no advantages for."""

    def critic(self, group: str) -> TensorDictModule:
        """The value network."""
        return Mappo.get_critic(self.algorithm, group)

    def attach(self, group: str, loss: SurrogateLoss, policy: ProbabilisticTensorDictSequential) -> None:
        """Make the loss's value estimator, which MAPPO's ``process_batch`` calls."""
        loss.make_value_estimator(
            ValueEstimators.GAE, gamma=self.algorithm.experiment_config.gamma, lmbda=self.algorithm.lmbda
        )

    def buffer(self, group: str, transforms: list[Transform] | None) -> ReplayBuffer:
        """The group's buffer."""
        # MAPPO's own default is None.
        return Mappo.get_replay_buffer(self.algorithm, group, transforms)  # pyright: ignore[reportArgumentType]

    def with_kept(self, group: str, batch: TensorDictBase) -> TensorDictBase:
        """The batches to train on: this one."""
        return batch

    def mask(self, group: str, batch: TensorDictBase) -> Tensor | None:
        """Which samples count, [*, N]: those of agents that are present; None for all."""
        return batch.get((group, "mask"), None)

    def columns(self, group: str, batch: TensorDictBase) -> dict[str, Tensor]:
        """What a sequential update must know of each agent's samples beside the advantages, each [*, N]."""
        return {}

    def correction(
        self, group: str, batch: TensorDictBase, as_used: Callable[[Tensor, Tensor | None], Tensor]
    ) -> Advantage | None:
        """What a sequential update asks for each agent's advantages at its turn; None: they stay as they are.

        Args:
            group (str): the team's only group.
            batch (TensorDictBase): [B, T], processed; its value targets may still be changed.
            as_used (callable): makes of advantages [B, T, N, 1] and a mask [B, T, N] those that updates use.
        """
        return None

    def metrics(self, group: str, batch: TensorDictBase) -> dict[str, Tensor]:
        """What is logged of the advantages, before they are normalised."""
        return {}


class GpaeEstimator(GaeEstimator):
    r"""A per-agent advantage from a counterfactual critic (Kim et al., arXiv 2603.02654).

    See :mod:`benchmarl_trust.functional.gpae`, :class:`~benchmarl_trust.value.GPAE` and
    :class:`~benchmarl_trust.value.CounterfactualCritic`. The critic's model is the one of the configuration, with the
    table of joint actions as one more input. EQ_i conditions on the actions of the agent's own group: other groups'
    actions are not in a group's batch.

    With ``n_rollouts > 1`` the newest batches are kept whole in the group's buffer. In every iteration values,
    features, ratios and advantages of all of them are computed anew under the policy of the moment, and minibatches,
    as many and as large as ever, are drawn from all of them without replacement.

    Args:
        algorithm (TrustRegion): whose estimator it is.
        truncation (str): of the traces: ``dt``, ``st``, ``it`` or ``none``; without effect if ``n_rollouts`` is 1.
        eta (float): η ≥ 1, the cap on the teammates' joint ratio in ``dt``.
        n_rollouts (int): how many batches are trained on; 1 is on-policy.
    """

    sees_own_action = True

    @property
    def off_policy(self) -> bool:
        """Whether there are batches of older policies, and so ratios."""
        return self.n_rollouts > 1

    def _check(self) -> None:
        if self.off_policy and isinstance(self.algorithm.experiment.algorithm_config, EnsembleAlgorithmConfig):
            refuse(
                "n_rollouts",
                self.n_rollouts,
                "an ensemble of algorithms does not hand on a buffer that keeps past batches. Use n_rollouts=1, or "
                "one algorithm for all groups.",
            )
        if self.off_policy:
            envs, steps = self._batch_shape
            check_memory(self.n_rollouts, envs * steps, self.algorithm.device, self._frame_bytes())
            state, groups = self.algorithm.resume_state, self.algorithm.group_map
            state.batch_shapes |= {group: self._batch_shape for group in groups}
            state.n_rollouts |= {group: self.n_rollouts for group in groups}
        if not self.algorithm.share_param_critic:
            refuse(
                "share_param_critic",
                False,
                "GPAE has one critic that is told whose value is wanted. Separate critics would cost the same time "
                "and N times the parameters. Set algorithm.share_param_critic=True.",
            )

    @property
    def _batch_shape(self) -> list[int]:
        """Environments and steps of a batch, which is whole steps of all environments."""
        config, on_policy = self.algorithm.experiment_config, self.algorithm.on_policy
        envs = config.n_envs_per_worker(on_policy)
        return [envs, -(-config.collected_frames_per_batch(on_policy) // envs)]

    def _frame_bytes(self) -> int:
        """Of all groups: observations and states come twice, since each frame has the next one's too."""
        algorithm = self.algorithm
        specs = [algorithm.observation_spec, algorithm.observation_spec, algorithm.action_spec]
        specs += [algorithm.state_spec] * 2 if algorithm.state_spec is not None else []
        leaves = [leaf for spec in specs for leaf in spec.values(True, True)]
        n_agents = sum(len(agents) for agents in algorithm.group_map.values())
        return n_agents * LEAST_BYTES + sum(leaf.shape.numel() * leaf.dtype.itemsize for leaf in leaves)

    def critic(self, group: str) -> CounterfactualCritic:
        """The configured model as a counterfactual critic."""
        algorithm = self.algorithm
        return counterfactual_critic(
            algorithm.critic_model_config,
            group,
            n_agents=len(algorithm.group_map[group]),
            observation_spec=algorithm.observation_spec,
            state_spec=algorithm.state_spec,
            action_spec=algorithm.action_spec,
            device=algorithm.device,
        )

    def attach(self, group: str, loss: SurrogateLoss, policy: ProbabilisticTensorDictSequential) -> None:
        """Make the loss's value estimator. With older data the loss's ratios are against the policy of the iteration's
        start, weighted, and what cannot be weighted is masked.
        """
        if self.off_policy:
            keys = {"sample_log_prob": "old_log_prob", "importance_weight": "importance_weight", "mask": "valid"}
            loss.set_keys(**{key: (group, name) for key, name in keys.items()})
        estimator = GPAE(
            gamma=self.algorithm.experiment_config.gamma,
            lmbda=self.algorithm.lmbda,
            actor_network=policy,
            value_network=cast(TensorDictModuleBase, loss.critic_network),
            truncation=self.truncation,
            eta=self.eta,
            off_policy=self.off_policy,
        )
        names = ["reward", "action", "mask", "advantage", "value_target"]
        names += ["policy_features", "old_log_prob", "importance_weight", "valid"]
        estimator.set_keys(
            **{name: (group, name) for name in names},
            value=(group, "state_value"),
            sample_log_prob=(group, "log_prob"),
        )  # done and terminated stay those of the root: the team's
        # It takes an estimator too, as its docstring says.
        loss.make_value_estimator(estimator)  # pyright: ignore[reportArgumentType]

    def buffer(self, group: str, transforms: list[Transform] | None) -> ReplayBuffer:
        """BenchMARL's buffer, with room for ``n_rollouts`` batches."""
        buffer = super().buffer(group, transforms)
        if not self.off_policy:
            return buffer
        envs, steps = self._batch_shape
        rows = envs if self.algorithm.has_rnn else envs * steps
        return TensorDictReplayBuffer(
            storage=LazyTensorStorage(rows * self.n_rollouts, device=torch.device(self.algorithm.device)),
            sampler=SamplerWithoutReplacement(),
            batch_size=buffer._batch_size,
            # Compose annotates each of its transforms as a list of them.
            transform=Compose(*transforms) if transforms is not None else None,  # pyright: ignore[reportArgumentType]
        )

    def n_batches(self, batch: TensorDictBase) -> int:
        """At first there are fewer than ``n_rollouts``."""
        return len(batch) // self._batch_shape[0] if self.off_policy else 1

    def with_kept(self, group: str, batch: TensorDictBase) -> TensorDictBase:
        """The batches in the buffer, the oldest first, and this one. The buffer is emptied: all come back processed."""
        if not self.off_policy:
            return batch
        if (group, "log_prob") not in batch.keys(True):
            raise ValueError(
                f"The batch has no {(group, 'log_prob')}: with algorithm.n_rollouts={self.n_rollouts} the policy must "
                "store the log-prob of its actions, without which older data has no ratio."
            )
        buffer = self.algorithm.experiment.replay_buffers[group]
        rows, length = batch.shape
        if len(buffer) == 0:
            return batch
        kept = buffer.storage[: len(buffer)].reshape(-1, length)[-rows * (self.n_rollouts - 1) :]
        kept = kept.select(*batch.keys(True, True)).to(batch.device)
        batch = cast(TensorDictBase, torch.cat([kept, batch]))
        buffer.empty()
        return batch

    def mask(self, group: str, batch: TensorDictBase) -> Tensor | None:
        """With older data, the samples that have a finite ratio too."""
        return batch[group, "valid"] if self.off_policy else super().mask(group, batch)

    def columns(self, group: str, batch: TensorDictBase) -> dict[str, Tensor]:
        """With older data, its ratios to the policy of the iteration's start."""
        if not self.off_policy:
            return {}
        old, collected = batch[group, "old_log_prob"], batch[group, "log_prob"]
        return {"log_importance": F.log_ratio(old, collected, self.mask(group, batch))}

    @torch.no_grad()
    def metrics(self, group: str, batch: TensorDictBase) -> dict[str, Tensor]:
        """Spread and correlation of the advantages, how well the critic knows its targets, and what the ratios do."""
        mask = batch.get((group, "mask"), None)
        advantage, value, target = (batch[group, key] for key in ("advantage", "state_value", "value_target"))
        metrics = advantage_metrics(advantage.squeeze(-1), mask)
        unexplained = variance_of_each((target - value).squeeze(-1))
        unexplained = unexplained / variance_of_each(target.squeeze(-1)).clamp(min=1e-12)
        metrics |= each_and_mean("value_explained_variance", 1 - unexplained)
        if self.off_policy:
            metrics |= self._ratio_metrics(group, batch, mask)
            metrics["data_age"] = torch.full((), (self.n_batches(batch) - 1) / 2, device=advantage.device)
        return metrics

    def _ratio_metrics(self, group: str, batch: TensorDictBase, mask: Tensor | None) -> dict[str, Tensor]:
        """What the traces let through, and the shares of ratios that each cap truncates."""
        log_ratio = F.log_ratio(batch[group, "old_log_prob"], batch[group, "log_prob"], mask)
        own = torch.where(log_ratio.isfinite(), log_ratio, 0)
        others = own.sum(-1, keepdim=True) - own
        log_eta = math.log(self.eta)
        steps = {
            "trace_mean": F.trace_coefficient(own, self.algorithm.lmbda, self.truncation, self.eta),
            "ratio_above_one": own > ROUNDING,
            "joint_ratio_above_one": own + others > ROUNDING,
            "teammates_ratio_above_eta": others > log_eta + ROUNDING,
            "dt_ratio_above_one": own + others.clamp(max=log_eta) > ROUNDING,
            "ratio_not_finite": ~log_ratio.isfinite(),
        }
        metrics = {}
        for name, value in steps.items():
            metrics |= each_and_mean(name, F.mean_of_each(value.double(), mask))
        return metrics


class PreopcEstimator(GaeEstimator):
    r"""A2PO's preceding-agent off-policy correction (Wang et al. 2023, arXiv 2302.06205).

    .. math::
        A_{i,t} = δ_{i,t} + γ c_{t+1} A_{i,t+1}, \qquad c_t = λ \min(1, M_t), \qquad
        M_t = \prod_{j \text{ before } i} r_{j,t}

    At an agent's turn the batch is older data for the team that those before it have become: M, the chain itself,
    truncates the traces. The first agent has GAE(λ). The critic's target of agent i is its corrected return V + A.

    δ comes of GAE's own advantages, δ_t = A_t - γλ A_{t+1} within a trajectory, so the values are those of the start of
    the iteration (ours: the critic is trained last).

    Source: the authors' code, save for λ, which that multiplies in twice from the second position on, so that M = 1
    would not give GAE(λ); here it does.

    Args:
        algorithm (TrustRegion): whose estimator it is.
        truncation (str), eta (float), n_rollouts (int): of :class:`GpaeEstimator`; here only ``n_rollouts=1`` has a
            meaning.
    """

    def _check(self) -> None:
        super()._check()
        if not self.algorithm.corrects_advantages:
            refuse(
                "estimator",
                "preopc",
                "it corrects an agent's advantages for those that moved before it, each time anew, which has a meaning "
                "in sequential gradient steps alone. Take algorithm=a2po or algorithm=happo, or estimator=gae.",
            )

    def check_teams(self, teams: "Teams") -> None:
        """Refuse teams over several groups."""
        if any(len(team) > 1 for team in teams.teams):
            refuse(
                "estimator",
                "preopc",
                "the critics of a team's earlier groups are trained before the team's policies move, on targets that "
                "would be corrected too late. Leave algorithm.teams at null, or take estimator=gae.",
            )

    def correction(
        self, group: str, batch: TensorDictBase, as_used: Callable[[Tensor, Tensor | None], Tensor]
    ) -> Advantage:
        """The corrected advantages of one agent after another. Each call sets that agent's value target too."""
        gamma, lmbda = self.algorithm.experiment_config.gamma, self.algorithm.lmbda
        mask, advantage = batch.get((group, "mask"), None), batch[group, "advantage"].squeeze(-1)
        done, terminated = (batch["next", group, key].squeeze(-1) for key in ("done", "terminated"))
        delta = F.temporal_difference(advantage, gamma * lmbda, done)
        zero = torch.zeros_like(delta)

        def advantages_of(i: int, log_factor: Tensor) -> Tensor:
            trace = lmbda * log_factor.reshape(batch.shape).clamp(max=0).exp().unsqueeze(-1).expand_as(delta)
            corrected = F.per_agent_advantage(delta, zero, zero, trace, gamma, done, terminated).unsqueeze(-1)
            target = batch[group, "state_value"] + corrected
            batch[group, "value_target"][..., i, :] = target[..., i, :]
            return as_used(corrected, mask)[..., i, 0].reshape(log_factor.shape)

        return advantages_of


#: The estimators by the name of the key ``estimator``.
ESTIMATORS: dict[str, type[GaeEstimator]] = {
    "gae": GaeEstimator,
    "gpae": GpaeEstimator,
    "preopc": PreopcEstimator,
}


def counterfactual_critic(
    model_config: ModelConfig,
    group: str,
    n_agents: int,
    observation_spec: Composite,
    state_spec: Composite | None,
    action_spec: Composite,
    device: DEVICE_TYPING,
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
    # The task's specs are on the sampling device, one made here is on the CPU: they are put together there.
    if state_spec is not None:
        input_spec, key, shape = state_spec.clone().to("cpu"), TABLE, (*extra, n_agents * width)
        input_spec[TABLE] = Unbounded(torch.Size(shape))
    else:
        input_spec, key, shape = (
            Composite({group: observation_spec[group].clone().to("cpu")}),
            (group, TABLE),
            (n_agents, *extra, width),
        )
        input_spec[group][TABLE] = Unbounded(torch.Size(shape))
    network = model_config.get_model(
        input_spec=input_spec.to(device),
        output_spec=Composite({"state_value": Unbounded(shape=torch.Size((1,)))}),
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
