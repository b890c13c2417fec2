"""Agents update one after another, inside BenchMARL's loop.

BenchMARL calls ``process_batch`` once per iteration and group, after collection and before its own loop of optimizer
steps. The algorithms here train the policies in it, once advantages and value targets are there (the *policy phase*);
BenchMARL's loop then trains the critic (the *critic phase*), since the loss that it is given has no policy part.
"""

import warnings
from dataclasses import MISSING, dataclass
from typing import Any

import torch
from benchmarl.algorithms import EnsembleAlgorithmConfig
from benchmarl.models import Deepsets, Gnn
from benchmarl.models.common import Model
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from tensordict.nn.distributions import NormalParamExtractor
from torch import Tensor
from torchrl.data import Composite
from torchrl.objectives import LossModule

from benchmarl_trust import functional as F
from benchmarl_trust.algorithms.common import TrustRegion, TrustRegionConfig
from benchmarl_trust.losses import CriticPhaseLoss, old_outputs
from benchmarl_trust.updates import Agent, GroupPolicy, PositionInfo, fork_rng, forward, remember_old_policy

ADVANTAGES = ("per_agent", "team")


class Sequential(TrustRegion):
    """The base of the sequential algorithms: who is in a team, in which order its agents move, and what is logged.

    A subclass says how they move (:meth:`_sweep`).

    Args:
        fixed_order (bool or list of int): False: a fresh random order in every iteration; True: that of the agents;
            or a permutation of the team's agents, counted through its groups.
        advantage (str): ``per_agent``, as in MAPPO, or ``team``, the mean over the team's agents, which is what the
            theory of sequential updates speaks of. They are equal where the reward is shared.
        teams (list of list of str, optional): groups whose agents form one team, through which the compound ratio
            runs; None: each group is its own team. Groups that are not named are teams of their own.
        clip_factor (bool): cap the weight w(M) at 1.
        **kwargs: those of :class:`~benchmarl_trust.algorithms.common.TrustRegion`.

    Raises:
        ValueError: on a bad setting, before anything is collected; on a batch in which a team's rewards differ.
    """

    loss_class = CriticPhaseLoss
    #: What a shared policy means for this kind of update; part of a warning.
    shared_policy_note: str

    def __init__(
        self,
        fixed_order: bool | list[int],
        advantage: str,
        teams: list[list[str]] | None,
        clip_factor: bool,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.fixed_order = fixed_order
        self.advantage = advantage
        self.clip_factor = clip_factor
        self.teams = self._resolve_teams(teams)
        if advantage not in ADVANTAGES:
            raise ValueError(f"algorithm.advantage={advantage} is unknown: choose one of {', '.join(ADVANTAGES)}.")

        self.generator = torch.Generator(self.device).manual_seed(self.experiment.seed)
        self.resume_state.generators.append(self.generator)
        self.guard.checks.append(self._check_team_rewards)
        self._policies: dict[str, GroupPolicy] = {}
        self._batches: dict[str, TensorDictBase] = {}

    ##########
    # Settings
    ##########

    def _resolve_teams(self, teams: list[list[str]] | None) -> list[list[str]]:
        teams = [list(team) for team in teams or []]
        named = [group for team in teams for group in team]
        if teams and isinstance(self.experiment.algorithm_config, EnsembleAlgorithmConfig):
            raise ValueError(
                "algorithm.teams cannot be used in an ensemble, where every group has an algorithm of its own: give "
                "all groups of the team one algorithm, or leave teams at null."
            )
        unknown = sorted(set(named) - set(self.group_map))
        if unknown:
            raise ValueError(f"algorithm.teams names {unknown}; the groups of this task are {list(self.group_map)}.")
        if len(set(named)) < len(named):
            raise ValueError(f"algorithm.teams={teams}: a group can be in one team only.")
        return teams + [[group] for group in self.group_map if group not in named]

    def _check_order(self, group: str) -> None:
        """A given order must fit the group's team. (In an ensemble, other groups are other algorithms' concern.)"""
        team = self._team_of(group)
        size = sum(len(self.group_map[name]) for name in team)
        order = self.fixed_order
        if not isinstance(order, bool) and not (isinstance(order, list) and sorted(order) == list(range(size))):
            raise ValueError(
                f"algorithm.fixed_order={order} must be False, True or a permutation of 0 ... {size - 1}, the agents "
                f"of the team {'+'.join(team)}."
            )

    def _team_of(self, group: str) -> list[str]:
        return next(team for team in self.teams if group in team)

    def _check_team_rewards(self, batch: TensorDictBase) -> None:
        """One joint advantage needs one joint reward: compare the groups of each team, in every batch."""
        for team in self.teams:
            missing = [group for group in team if group not in self.experiment.train_group_map]
            if missing and len(team) > 1:
                raise ValueError(
                    f"algorithm.teams: of the team {'+'.join(team)} the group {missing[0]} is not trained; a team's "
                    "compound ratio needs all of its groups. Take it out of the team, or train it."
                )
            first, *others = (batch.get(("next", group, "reward"), None) for group in team)
            for group, reward in zip(team[1:], others, strict=True):
                if first is None or reward is None:
                    continue  # a reward at the root belongs to all groups
                if not torch.allclose(first.mean(-2), reward.mean(-2), rtol=1e-4, atol=1e-5):
                    raise ValueError(
                        f"algorithm.teams: the groups {team[0]} and {group} are paid differently (their mean rewards "
                        "differ in the collected batch), so they have no joint advantage. Put only groups with the "
                        "same reward into a team."
                    )

    ######
    # Loss
    ######

    def _get_loss(self, group: str, policy_for_loss: TensorDictModule, continuous: bool) -> tuple[LossModule, bool]:
        self._check_order(group)
        policy = GroupPolicy(
            policy_for_loss,
            n_agents=len(self.group_map[group]),
            example=self._example(group),
            make_twin=self._twin_maker(group, policy_for_loss, continuous),
        )
        self._policies[group] = policy
        if policy.shared:
            self._warn_of_shared_policy(group)
        return super()._get_loss(group, policy_for_loss, continuous)

    def _get_parameters(self, group: str, loss: LossModule) -> dict[str, list]:
        """The critic's, for BenchMARL's loop."""
        return {"loss_critic": list(loss.critic_network_params.flatten_keys().values())}

    def _warn_of_shared_policy(self, group: str) -> None:
        asked = self.experiment_config.share_policy_params
        cause = "experiment.share_policy_params is True" if asked else "this model mixes the parameters of the agents"
        cure = (
            "Set experiment.share_policy_params=False." if asked else "Use a model without such a layer (an MLP, say)."
        )
        warnings.warn(
            f"{type(self).__name__}: the agents of group {group} share policy parameters ({cause}). The update of one "
            "agent then moves the others too, and the argument for monotonic improvement, which needs one policy per "
            f"agent, does not hold. {self.shared_policy_note} {cure}",
            stacklevel=2,
        )

    def _example(self, group: str) -> TensorDict:
        """A random input of the group's policy, to probe it with."""
        shape = (2, 3) if self.has_rnn else (4,)
        example = TensorDict({}, batch_size=shape, device=self.device)
        with fork_rng(self.device):  # the run's random numbers stay as they are
            agents = self.observation_spec[group].rand(shape).to(self.device)
        if self.action_mask_spec is not None and group in self.action_mask_spec.keys():
            agents.update(self.action_mask_spec[group].to(self.device).one(shape))
        example[group] = agents.apply(lambda x: x if x.dtype == torch.bool else x.float())
        example["is_init"] = torch.zeros(*shape, 1, dtype=torch.bool, device=self.device)
        return example

    def _twin_maker(self, group: str, policy: TensorDictModule, continuous: bool):
        """A function that makes the policy of one agent, without its distribution; None for graph networks.

        Those keep one module per agent and look at all of them.
        """
        model = next(module for module in policy.modules() if isinstance(module, Model))
        if any(isinstance(module, Gnn | Deepsets) for module in model.modules()):
            return None

        def of_one_agent(spec: Composite) -> Composite:
            return Composite({group: spec[group][:1]})

        def make_twin() -> TensorDictModuleBase:
            twin = self.model_config.get_model(
                input_spec=of_one_agent(model.input_spec),
                output_spec=of_one_agent(model.output_spec),
                agent_group=group,
                input_has_agent_dim=True,
                n_agents=1,
                centralised=False,
                share_params=True,
                device=self.device,
                action_spec=self.action_spec,
            )
            if not continuous:
                return TensorDictSequential(twin)
            extractor = TensorDictModule(
                NormalParamExtractor(scale_mapping=self.scale_mapping),
                in_keys=[(group, "logits")],
                out_keys=[(group, "loc"), (group, "scale")],
            )
            return TensorDictSequential(twin, extractor)

        return make_twin

    ##############
    # Policy phase
    ##############

    def process_batch(self, group: str, batch: TensorDictBase) -> TensorDictBase:
        """MAPPO's advantages and value targets; then, with the last group of a team, the team's policy phase."""
        batch = super().process_batch(group, batch)
        self._batches[group] = batch
        team = self._team_of(group)
        if group == [name for name in self.experiment.train_group_map if name in team][-1]:
            self._policy_phase(team)
        return batch

    def _policy_phase(self, team: list[str]) -> None:
        """Update the policies of the team's agents, one after another, on the batches of its groups."""
        agents = self._agents(team)
        chunk = self._chunk(agents)
        for agent in agents:
            remember_old_policy(agent, chunk)
        infos = self._sweep(team, agents, self._order(len(agents)))
        self._log(team, agents, infos, chunk)

    def _sweep(self, team: list[str], agents: list[Agent], order: list[int]) -> list[PositionInfo]:
        """Move the agents; what happened at each position, or at each position of each minibatch."""
        raise NotImplementedError

    def _chunk(self, agents: list[Agent]) -> int | None:
        """Rows per forward pass where no gradient is needed; None for all at once."""
        return None

    def _optimizer(self, group: str, agent: int) -> torch.optim.Optimizer | None:
        """The agent's optimizer, if its steps need one."""
        return None

    def _is_shared(self, team: list[str]) -> bool:
        return any(self._policies[group].shared for group in team)

    def _agents(self, team: list[str]) -> list[Agent]:
        batches = {group: self._batches.pop(group) for group in team}
        if not self.has_rnn:
            batches = {group: batch.reshape(-1) for group, batch in batches.items()}
        batches = {group: self._transformed(group, batch) for group, batch in batches.items()}
        advantages = self._advantages(batches)
        agents = []
        for group, batch in batches.items():
            policy = self._policies[group]
            actions = policy.head.base_action(batch[group, "action"])
            for agent in policy.agents:
                data = TensorDict(
                    {
                        "inputs": agent.inputs(batch),
                        "action": actions.select(batch.ndim, agent.index),
                        "advantage": advantages[..., len(agents), 0],
                    },
                    batch_size=batch.batch_size,
                )
                if (group, "mask") in batch.keys(True):
                    data["mask"] = batch[group, "mask"].select(batch.ndim, agent.index)
                    # What an absent agent did may be NaN, whose gradient no later mask would stop.
                    present = data["mask"].reshape(*data.shape, *[1] * (data["action"].ndim - data.ndim))
                    data["action"] = torch.where(present, data["action"], 0)
                agents.append(Agent(agent, self._optimizer(group, agent.index), data))
        return agents

    def _transformed(self, group: str, batch: TensorDictBase) -> TensorDictBase:
        """What the task's replay-buffer transforms do to a sample (images to floats, for instance)."""
        transforms = self.experiment.task.get_replay_buffer_transforms(self.experiment.test_env, group)
        for transform in transforms:
            batch = transform(batch.copy())
        return batch

    def _advantages(self, batches: dict[str, TensorDictBase]) -> Tensor:
        """The advantages of all agents of the team, [*, N, 1]."""
        advantage = torch.cat([batch[group, "advantage"] for group, batch in batches.items()], -2)
        masks = [
            batch.get((group, "mask"), torch.ones_like(batch[group, "advantage"][..., 0], dtype=torch.bool))
            for group, batch in batches.items()
        ]
        mask = torch.cat(masks, -1)
        if self.advantage == "team":
            advantage = F.team_advantage(advantage, mask)
        return F.normalize_advantage(advantage, self.normalize_advantage, mask)

    def _order(self, size: int) -> list[int]:
        if self.fixed_order is True:
            return list(range(size))
        if self.fixed_order is False:
            return torch.randperm(size, generator=self.generator, device=self.device).tolist()
        return list(self.fixed_order)

    #########
    # Logging
    #########

    @torch.no_grad()
    def _log(self, team: list[str], agents: list[Agent], infos: list[PositionInfo], chunk: int | None) -> None:
        """Log what happened, with one transfer to the host."""
        metrics: dict[str, Tensor] = {}
        names = [(group, i) for group in team for i in range(len(self.group_map[group]))]
        shared = self._is_shared(team)
        for k, (group, i) in enumerate(names):
            own = [info for info in infos if info.agent == k]
            # A separate policy is as its turn has left it; a shared one has gone on since, and on other rows.
            outputs = forward(agents[k], agents[k].data, chunk) if shared else own[-1].outputs
            values = self._agent_metrics(agents[k], outputs)
            for name in own[0].step._fields:
                values[name] = torch.stack([getattr(info.step, name) for info in own]).mean()
            values["skipped"] = torch.stack([~info.finite for info in own]).sum()
            metrics |= {f"{group}/policy/{name}_agent_{i}": value for name, value in values.items()}
        n = len(agents)
        for position in range(n):
            here = infos[position::n]  # one for separate policies, one per minibatch for shared ones
            stats = {
                "factor_mean": torch.stack([info.factor_mean for info in here]).mean(),
                "factor_max": torch.stack([info.factor_max for info in here]).max(),
                "factor_ess": torch.stack([info.factor_ess for info in here]).mean(),
                "advantage_variance": torch.stack([info.advantage_variance for info in here]).mean(),
            }
            metrics |= {f"{'+'.join(team)}/policy/{k}_position_{position}": v for k, v in stats.items()}
        values = torch.stack([value.to(torch.float64) for value in metrics.values()]).tolist()
        order = {f"{'+'.join(team)}/policy/order_position_{k}": float(infos[k].agent) for k in range(n)}
        self._write(team, dict(zip(metrics, values, strict=True)) | order)

    def _write(self, team: list[str], metrics: dict[str, float]) -> None:
        for group in team:  # means over the group's agents beside the single ones
            skipped = [metrics.pop(f"{group}/policy/skipped_agent_{i}") for i in range(len(self.group_map[group]))]
            self.guard.skipped[group] += int(sum(skipped))
            names = [key.removesuffix("_agent_0") for key in metrics if key.startswith(f"{group}/policy/")]
            for name in (name for name in names if f"{name}_agent_0" in metrics):
                single = [metrics[f"{name}_agent_{i}"] for i in range(len(self.group_map[group]))]
                metrics[name] = sum(single) / len(single)
        name = f"{'+'.join(team)}/policy/advantage_variance"
        variances = [value for key, value in metrics.items() if key.startswith(f"{name}_position_")]
        metrics[name] = sum(variances) / len(variances)
        self.experiment.logger.log(
            {f"train/{key}": value for key, value in metrics.items()}, step=self.experiment.n_iters_performed
        )

    def _agent_metrics(self, agent: Agent, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """What is logged of an agent beside its steps' infos."""
        mask = agent.data.get("mask", None)
        return {
            "kl": F.masked_mean(agent.policy.kl(old_outputs(agent.data), outputs), mask),
            "entropy": F.masked_mean(agent.policy.entropy(outputs), mask),
        }


@dataclass
class SequentialConfig(TrustRegionConfig):
    """What the configurations of all sequential algorithms have; :class:`Sequential` says what the keys mean."""

    fixed_order: Any = MISSING
    advantage: str = MISSING
    teams: list[list[str]] | None = MISSING
