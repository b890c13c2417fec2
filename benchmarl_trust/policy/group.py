"""The policies of a group's agents, one at a time.

TorchRL runs all agents of a group in one module. A sequential update moves one agent, so it wants that agent's
parameters as leaves of their own, and a forward pass that computes that agent and no other.

Shapes: [*] is [B], or [B, T] for recurrent policies; N the agents of the group.
"""

import copy
import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import Tensor, nn
from torchrl.data.utils import DEVICE_TYPING
from torchrl.modules.models.multiagent import MultiAgentNetBase

from benchmarl_trust.policy.agent import Agent, AgentPolicy, StackedPolicy
from benchmarl_trust.policy.head import PaddedNormal, head_of


class GroupPolicy:
    """The policies of all agents of a group, separate if no parameter serves two of them.

    A gradient probe on ``example`` tells which agents each parameter reaches. A parameter that serves several agents
    (a shared policy, or a model that mixes the agents' parameters) makes the whole group shared: ``shared``.

    Args:
        policy (ProbabilisticTensorDictSequential): the group's policy; its last module is the distribution.
        n_agents (int): N.
        example (TensorDictBase): any input of the policy with batch size [*], to probe it with.
        make_twin (callable, optional): makes the body of a policy of one agent, with parameters of the same names as
            the group's, without the agent dimension. It is used if its outputs equal the group's.

    Attributes:
        shared (bool): whether a parameter serves several agents.
        fast (bool): whether each agent runs through a twin.
        agents (list of AgentPolicy): one per agent. Those of a shared group have the same ``parameters``.
    """

    def __init__(
        self,
        policy: ProbabilisticTensorDictSequential,
        n_agents: int,
        example: TensorDictBase,
        make_twin: Callable[[], TensorDictModuleBase] | None = None,
    ):
        self.policy = policy
        self.n_agents = n_agents
        self.head = head_of(cast(ProbabilisticTensorDictModule, policy[-1]))
        # TensorDictSequential annotates each of its modules as a list of them.
        self.body = TensorDictSequential(*policy.module[:-1])  # pyright: ignore[reportArgumentType, reportCallIssue]
        named = dict(self.body.named_parameters())
        trainable = {name: p for name, p in named.items() if p.requires_grad}
        device = next(iter(named.values())).device
        with fork_rng(device):  # neither the probe nor the twins' unused initial values move the run's generator
            rows = self._rows(trainable, example)
            self.shared = rows is None
            self.agents: list[AgentPolicy] = [self._whole_group_agent(i, trainable, rows) for i in range(n_agents)]
            twins = None if make_twin is None else self._twins(make_twin(), named)
        self.fast = False
        if twins is not None and self._agree(twins, example):
            self.fast, self.agents = True, twins
        if rows is not None and all(row is None for row in rows.values()):
            stack = StackedPolicy(self.body, self.head, list(trainable.values()))
            for agent in self.agents:
                agent.stack = stack

    def outputs(self, batch: TensorDictBase) -> TensorDictBase:
        """The distribution's parameters of all agents."""
        return self.body(batch.select(*self.body.in_keys, *self.head.keys, strict=False))

    def make_agents(
        self,
        batch: TensorDictBase,
        advantage: Tensor,
        mask: Tensor | None = None,
        optimizers: Sequence[torch.optim.Optimizer | None] | None = None,
        **columns: Tensor,
    ) -> list[Agent]:
        """The group's agents with their data, for :func:`benchmarl_trust.updates.sweep`.

        Args:
            batch (TensorDictBase): what the policy reads, and the executed actions under the key that it writes them
                to; batch size [*].
            advantage (Tensor): A, [*, N].
            mask (Tensor, optional): boolean, [*, N], True where an agent takes part. What an absent agent did counts
                nowhere, and may be NaN.
            optimizers (sequence of Optimizer, optional): one per agent (the same for all of a shared policy); None:
                without, as natural steps are.
            **columns (Tensor): further entries, [*, N], of which each agent's data gets its own column.

        Raises:
            ValueError: if a column is not [*, N].

        Examples: ``examples/torchrl_only.py``.
        """
        columns = {"advantage": advantage, **columns} | ({} if mask is None else {"mask": mask})
        for name, column in columns.items():
            if column.shape != (*batch.batch_size, self.n_agents):
                raise ValueError(
                    f"{name} has shape {tuple(column.shape)}; it must have one entry per step and agent, "
                    f"{(*batch.batch_size, self.n_agents)} (an advantage of [*, N, 1] wants squeeze(-1))."
                )
        actions = self.head.base_action(batch.get(self.policy[-1].out_keys[0]))
        agents = []
        for own, optimizer in zip(self.agents, optimizers or [None] * self.n_agents, strict=True):
            data = TensorDict({"inputs": own.inputs(batch)}, batch_size=batch.batch_size)
            data["action"] = actions.select(batch.ndim, own.index)
            for name, column in columns.items():
                data[name] = column[..., own.index]
            if mask is not None:  # a NaN has a gradient that no later mask would stop
                present = data["mask"].reshape(*data.shape, *[1] * (data["action"].ndim - data.ndim))
                data["action"] = torch.where(present, data["action"], 0)
            agents.append(Agent(own, optimizer, data))
        return agents

    def _rows(self, named: dict[str, nn.Parameter], example: TensorDictBase) -> dict[str, int | None] | None:
        """For each parameter the agent that owns it, or None if its rows are the agents'; None if one is shared."""
        with torch.enable_grad(), _perturbed(self.body):
            reach = [self._reach(agent, named, example) for agent in range(self.n_agents)]
        rows: dict[str, int | None] = {}
        for name, parameter in named.items():
            touching = [agent for agent in range(self.n_agents) if reach[agent][name].any()]
            stacked = parameter.shape[:1] == (self.n_agents,) and all(
                not reach[agent][name][_others(agent, self.n_agents)].any() for agent in touching
            )
            if len(touching) <= 1 and not (stacked and self.n_agents > 1):
                rows[name] = touching[0] if touching else 0
            elif stacked:
                rows[name] = None
            else:
                return None
        return rows

    def _reach(self, agent: int, named: dict[str, nn.Parameter], example: TensorDictBase) -> dict[str, Tensor]:
        """Which entries of each parameter move the agent's outputs."""
        outputs = self.outputs(example.clone())
        heads = [outputs.get(key).select(example.ndim, agent) for key in self.head.keys]
        # Weighted by noise: a plain sum is blind to what only shifts mass between outputs.
        total = torch.stack([(x * torch.randn_like(x)).sum() for x in heads if x.requires_grad]).sum()
        gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        return {
            name: torch.zeros_like(p, dtype=torch.bool) if gradient is None else gradient != 0
            for (name, p), gradient in zip(named.items(), gradients, strict=True)
        }

    def _whole_group_agent(self, i: int, named: dict[str, nn.Parameter], rows: dict | None) -> AgentPolicy:
        if rows is None:
            parameters, sources = list(named.values()), None
        else:
            mine = [(p, i if rows[name] is None else None) for name, p in named.items() if rows[name] in (None, i)]
            parameters = [p if row is None else nn.Parameter(p.data[row]) for p, row in mine]
            sources = mine
        return AgentPolicy(self.body, i, i, self.n_agents, self.head, parameters, sources)

    def _twins(self, prototype: TensorDictModuleBase, named: dict[str, nn.Parameter]) -> list[AgentPolicy] | None:
        """One-agent policies on the group's own memory, or None if their parameters do not correspond."""
        if [_within_sequence(name) for name, _ in prototype.named_parameters()] != list(map(_within_sequence, named)):
            return None
        bodies = [prototype if self.shared or i == 0 else copy.deepcopy(prototype) for i in range(self.n_agents)]
        leaves = [list(body.parameters()) for body in bodies]
        for i, body in enumerate(bodies):
            for leaf, p in zip(leaves[i], named.values(), strict=True):
                memory = p.data if p.shape == leaf.shape else p.data[i]
                if memory.shape != leaf.shape:
                    return None
                leaf.data = memory
                leaf.requires_grad_(p.requires_grad)
            _unwrap(body)
        if self.shared and _paddings(prototype):  # bodies of their own, on one and the same parameters
            one = {id(p): p for p in prototype.parameters()}
            bodies = [copy.deepcopy(prototype, {**one}) for _ in bodies]
            leaves = [list(prototype.parameters()) for _ in bodies]
        for i, body in enumerate(bodies):
            for mine, whole in zip(_paddings(body), _paddings(self.body), strict=True):
                mine.executed = whole.executed[i]
        leaves = [[leaf for leaf in mine if leaf.requires_grad] for mine in leaves]
        return [AgentPolicy(body, 0, i, 1, self.head, leaves[i]) for i, body in enumerate(bodies)]

    @torch.no_grad()
    def _agree(self, twins: list[AgentPolicy], example: TensorDictBase) -> bool:
        """Whether every twin computes what the group's policy computes for its agent."""
        for twin, agent in zip(twins, self.agents, strict=True):
            got, expected = (a.forward(a.inputs(example.clone())) for a in (twin, agent))
            for x, y in zip(got, expected, strict=True):
                if x.shape != y.shape or not torch.allclose(x, y, rtol=1e-4, atol=1e-5):
                    return False
        return True


def _unwrap(module: nn.Module) -> None:
    """Put plain networks in the place of TorchRL's multi-agent ones, with the very same parameters.

    Around a single network the container only costs time: it puts the parameters in place anew in every call.
    """
    for name, child in module.named_children():
        if isinstance(child, MultiAgentNetBase) and child.share_params and not child.centralized:
            setattr(module, name, child.get_stateful_net())
        else:
            _unwrap(child)


def _paddings(module: nn.Module) -> list[PaddedNormal]:
    return [child for child in module.modules() if isinstance(child, PaddedNormal)]


def _within_sequence(name: str) -> str:
    """A parameter's name less the places of its module in sequences of modules, which nest as they happen to."""
    return re.sub(r"^(module\.\d+\.)+", "", name)


def fork_rng(device: DEVICE_TYPING):
    """A context in which random numbers of the CPU and of this device can be drawn without moving the generators."""
    device = torch.device(device)
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def _perturbed(module: nn.Module):
    """Noise on all parameters, bit for bit undone at the end: zero weights would hide a layer from a gradient probe."""
    before = [p.detach().clone() for p in module.parameters()]
    try:
        for p in module.parameters():
            p.data.add_(0.3 * torch.randn_like(p))
        yield
    finally:
        for p, old in zip(module.parameters(), before, strict=True):
            p.data.copy_(old)


def _others(agent: int, n_agents: int) -> list[int]:
    return [i for i in range(n_agents) if i != agent]
