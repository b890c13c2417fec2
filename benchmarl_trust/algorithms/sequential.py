"""Agents update one after another, inside BenchMARL's loop.

BenchMARL calls ``process_batch`` once per iteration and group, after collection and before its own loop of optimizer
steps. The algorithms here train the policies in it, once advantages and value targets are there (the *policy phase*);
BenchMARL's loop then trains the critic (the *critic phase*), since the loss that it is given has no policy part.
"""

import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor
from torchrl.objectives import LossModule

from benchmarl_trust import functional as F
from benchmarl_trust.algorithms.checks import refuse
from benchmarl_trust.algorithms.common import TrustRegion, TrustRegionConfig
from benchmarl_trust.algorithms.keys import Choice, Order, TeamLists, setting
from benchmarl_trust.algorithms.metrics import each_and_mean, position_metrics, step_means, to_host
from benchmarl_trust.algorithms.teams import Teams
from benchmarl_trust.algorithms.twins import group_policy
from benchmarl_trust.losses import CriticPhaseLoss
from benchmarl_trust.policy import Agent, GroupPolicy, Head, columns_of, forward, old_outputs, remember_old_policy
from benchmarl_trust.updates import PositionInfo, advantage_score, semi_greedy

ADVANTAGES = ("per_agent", "team")
NO_SCORES = (
    "only natural steps have scores to compare agents by. Take algorithm=hatrpow or hatrpog, or one of random, fixed, "
    "semi_greedy."
)


class Sequential(TrustRegion):
    """The base of the sequential algorithms: who is in a team, in which order its agents move, and what is logged.

    A subclass says how they move (``_sweep``).

    Args:
        order (str or list of int, optional): ``random``, afresh in every iteration; ``fixed``, that of the agents; a
            permutation of the team's agents, counted through its groups; ``semi_greedy``, see
            :func:`benchmarl_trust.updates.semi_greedy`; further ones of a subclass (``orders``). None: the
            subclass's own, which is ``random`` if nothing else is said.
        advantage (str): ``per_agent``, as in MAPPO, or ``team``, the mean over the team's agents, which is what the
            theory of sequential updates speaks of. They are equal where the reward is shared.
        teams (list of list of str, optional): groups whose agents form one team, through which the compound ratio
            runs; None: each group is its own team. Groups that are not named are teams of their own.
        **kwargs: those of :class:`~benchmarl_trust.algorithms.common.TrustRegion`.

    Raises:
        ValueError: on a bad setting, before anything is collected; on a batch in which a team's rewards differ.
    """

    loss_class = CriticPhaseLoss
    orders: tuple[str, ...] = ("random", "fixed", "semi_greedy")
    #: What a shared policy means for this kind of update; part of a warning.
    shared_policy_note: str = ""
    factor: str  # no preset in turns has null, and its rule refuses that

    def __init__(self, order: str | list[int] | None, advantage: str, teams: list[list[str]] | None, **kwargs):
        super().__init__(**kwargs)
        if advantage == "team" and self.estimator.sees_own_action:
            refuse(
                "advantage",
                advantage,
                "the mean of gpae's advantages contains the baselines of other agents, which see this agent's action, "
                "so it is no advantage of it. Use algorithm.advantage=per_agent, or algorithm.estimator=gae.",
            )
        self.advantage = advantage
        self.teams = Teams(teams, self.experiment, self.group_map)
        self.estimator.check_teams(self.teams)
        self.order = order
        self.generator = torch.Generator(self.device).manual_seed(self.experiment.seed)
        self.resume_state.generators.append(self.generator)
        self.guard.checks.append(self.teams.check_rewards)
        self._policies: dict[str, GroupPolicy] = {}
        self._batches: dict[str, TensorDictBase] = {}

    def _get_loss(
        self, group: str, policy_for_loss: ProbabilisticTensorDictSequential, continuous: bool
    ) -> tuple[LossModule, bool]:
        self._check_order(group)
        policy = self._policies[group] = group_policy(self, group, policy_for_loss, continuous)
        if policy.shared:
            self._warn_of_shared_policy(group)
        return super()._get_loss(group, policy_for_loss, continuous)

    def _check_order(self, group: str) -> None:
        """A given order must fit the group's team. (In an ensemble, other groups are other algorithms' concern.)"""
        team = self.teams.of(group)
        size = self.teams.size(team)
        if isinstance(self.order, list) and len(self.order) != size:
            raise ValueError(
                f"algorithm.order={self.order} must be a permutation of 0 ... {size - 1}, the agents of the team "
                f"{'+'.join(team)}, or null or one of {', '.join(self.orders)}."
            )

    def _get_parameters(self, group: str, loss: LossModule) -> dict[str, list]:
        """The critic's, for BenchMARL's loop."""
        return {"loss_critic": super()._get_parameters(group, loss)["loss_critic"]}

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

    def process_batch(self, group: str, batch: TensorDictBase) -> TensorDictBase:
        """Advantages and value targets; then, with the last group of a team, the team's policy phase."""
        batch = super().process_batch(group, batch)
        self._batches[group] = batch
        if self.teams.ends_with(group):
            self._policy_phase(self.teams.of(group))
        self.normalize_targets(group, batch)  # after the policy phase, which may correct them
        return batch

    def _policy_phase(self, team: list[str]) -> None:
        """Update the policies of the team's agents, one after another, on the batches of its groups."""
        agents = self._agents(team)
        chunk = self._chunk(agents)
        for agent in agents:
            remember_old_policy(agent, chunk)
        infos = self._sweep(team, agents, self._order(agents))
        self._log(team, agents, infos, chunk)
        for group in team:
            self._batches.pop(group)

    def _sweep(self, team: list[str], agents: list[Agent], order: list[int] | None) -> list[PositionInfo]:
        """Move the agents; what happened at each position, or at each position of each minibatch."""
        raise NotImplementedError

    def _chunk(self, agents: list[Agent]) -> int | None:
        """Rows per forward pass where no gradient is needed; None for all at once."""
        return None

    def _rows(self, team: list[str], agents: list[Agent]) -> int:
        """Rows of one batch, of which the agents' data may have several."""
        return len(agents[0].data) // self.estimator.n_batches(self._batches[team[0]])

    def _optimizers(self, group: str) -> list[torch.optim.Optimizer] | None:
        """The optimizers of the group's agents, if their steps need some."""
        return None

    def _is_shared(self, team: list[str]) -> bool:
        return any(self._policies[group].shared for group in team)

    def _agents(self, team: list[str]) -> list[Agent]:
        batches = {group: self._batches[group] for group in team}
        if not self.has_rnn:
            batches = {group: batch.reshape(-1) for group, batch in batches.items()}
        batches = {group: self.as_sampled(group, batch) for group, batch in batches.items()}
        advantages = self._advantages(batches).squeeze(-1)
        agents = []
        for group, batch in batches.items():
            mine = slice(len(agents), len(agents) + len(self.group_map[group]))
            columns = self.estimator.columns(group, batch)
            if self.order == "semi_greedy":
                columns["value"] = batch[group, "state_value"].squeeze(-1)
            policy, optimizers = self._policies[group], self._optimizers(group)
            mask = self.estimator.mask(group, batch)
            agents += policy.make_agents(batch, advantages[..., mine], mask, optimizers, **columns)
        return agents

    def _advantages(self, batches: dict[str, TensorDictBase]) -> Tensor:
        """The advantages of all agents of the team, [*, N, 1]."""
        advantage = torch.cat([batch[group, "advantage"] for group, batch in batches.items()], -2)
        masks = []
        for group, batch in batches.items():
            mask = self.estimator.mask(group, batch)
            masks.append(torch.ones_like(batch[group, "advantage"][..., 0], dtype=torch.bool) if mask is None else mask)
        return self._as_used(advantage, torch.cat(masks, -1))

    def _as_used(self, advantage: Tensor, mask: Tensor | None) -> Tensor:
        """The advantages as the updates use them: the team's, normalised; as configured."""
        if self.advantage == "team":
            advantage = F.team_advantage(advantage, mask)
        return F.normalize_advantage(advantage, self.normalize_advantage, mask)

    def _order(self, agents: list[Agent]) -> list[int] | None:
        """Who moves when; None where that is decided on the way."""
        if self.order in (None, "random"):
            return torch.randperm(len(agents), generator=self.generator, device=self.device).tolist()
        if self.order == "semi_greedy":
            advantage, value = (
                torch.stack([agent.data[key] for agent in agents], -1) for key in ("advantage", "value")
            )
            present = [
                agent.data.get("mask", torch.ones_like(agent.data["value"], dtype=torch.bool)) for agent in agents
            ]
            return semi_greedy(advantage_score(advantage, value, torch.stack(present, -1)), self.generator)
        return list(range(len(agents))) if self.order == "fixed" else list(cast(list[int], self.order))

    @torch.no_grad()
    def _log(self, team: list[str], agents: list[Agent], infos: list[PositionInfo], chunk: int | None) -> None:
        """Log what happened, with one transfer to the host."""
        metrics: dict[str, Tensor] = {}
        rows, first = self._rows(team, agents), 0
        for group in team:
            mine = range(first, first + len(self.group_map[group]))
            first = mine.stop
            turns = [[info for info in infos if info.agent == k] for k in mine]
            # A separate policy is as its turn has left it; a shared one has gone on since, and on other rows.
            outputs = [
                forward(agents[k], agents[k].data, chunk) if self._is_shared(team) else own[-1].outputs
                for k, own in zip(mine, turns, strict=True)
            ]
            data = columns_of([agents[k] for k in mine])
            columns = tuple(torch.stack(parts, data.ndim) for parts in zip(*outputs, strict=True))
            values = step_means(turns) | self._agent_metrics(self._policies[group].head, data, columns, rows)
            for name, value in values.items():
                metrics |= each_and_mean(f"{group}/policy/{name}", value)
            metrics[f"{group}/skipped"] = (~torch.stack([info.finite for own in turns for info in own])).sum()
        metrics |= position_metrics("+".join(team), len(agents), infos)
        values = to_host(metrics)
        for group in team:
            self.guard.skipped[group] += int(values.pop(f"{group}/skipped"))
        for k in range(len(agents)):
            values[f"{'+'.join(team)}/policy/order_position_{k}"] = float(infos[k].agent)
        self.experiment.logger.log(
            {f"train/{key}": value for key, value in values.items()}, step=self.experiment.n_iters_performed
        )

    def _agent_metrics(self, head: Head, data: TensorDict, outputs: tuple[Tensor, ...], rows: int) -> dict[str, Tensor]:
        """What is logged of a group's policies as the iteration leaves them, [N] each. ``outputs`` and ``data`` are
        [*, N]. The KL is that on the newest batch's ``rows``, as simultaneous algorithms have it.
        """
        newest, mask = cast(TensorDict, data[-rows:]), data.get("mask", None)
        kl = head.kl(old_outputs(newest), tuple(x[-rows:] for x in outputs))
        return {
            "kl": F.mean_of_each(kl, newest.get("mask", None)),
            "entropy": F.mean_of_each(head.entropy(outputs), mask),
        }


@dataclass
class SequentialConfig(TrustRegionConfig):
    """What the configurations of all sequential algorithms have; :class:`Sequential` says what the keys mean."""

    order: Any = setting(Order(elsewhere=dict.fromkeys(("score", "greedy"), NO_SCORES)))  # noqa: RUF009
    advantage: str = setting(Choice(among=ADVANTAGES, usual="per_agent"))
    teams: list[list[str]] | None = setting(TeamLists())  # noqa: RUF009
