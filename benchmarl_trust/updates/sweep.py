"""The sequential sweep: agents move one after another, each weighted by what the others did before it.

Where is the sequential advantage? In :func:`sweep`: the line that computes ``weight`` from ``log_factor``, the
compound ratio M of the agents already updated. The advantage A is the same for all; agent i's loss is
mean(w(M) · gain(x_i, A)).

Shapes: [*] is [B], or [B, T] for recurrent policies. A *row* is an entry of the first dimension: a step, or a sequence.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from benchmarl_trust import functional as F
from benchmarl_trust.losses import old_outputs
from benchmarl_trust.updates.policy import AgentPolicy


class Agent(NamedTuple):
    """An agent of the team, with what an update of it needs.

    ``data`` has batch size [*] and the entries ``inputs`` (of the policy), ``action`` (before squashing),
    ``advantage`` [*] and, once :func:`remember_old_policy` has run, ``old_log_prob`` [*] and ``old_0``, ``old_1``,
    the old distribution's parameters; optionally ``mask`` [*], True where the agent takes part. A natural step needs no
    optimizer.
    """

    policy: AgentPolicy
    optimizer: torch.optim.Optimizer | None
    data: TensorDict


class StepInfo(NamedTuple):
    """What one agent's step leaves behind: scalars on the agent's device, not finite if anything in it was not.

    Other steps return other named tuples; all that they hold is logged.
    """

    loss: Tensor
    grad_norm: Tensor


class PositionInfo(NamedTuple):
    """What the agent at one position of the order met and did.

    Attributes:
        agent (int): its index in the team.
        factor_mean, factor_max, factor_ess (Tensor): of M, over the rows.
        advantage_variance (Tensor): Var(w(M) A).
        step (StepInfo or another named tuple of scalars): its step.
        finite (Tensor): False if the step was undone.
        log_ratio (Tensor): its log-ratio after the step, [*].
        outputs (tuple of Tensor): its distribution's parameters after the step, each [*, ...].
    """

    agent: int
    factor_mean: Tensor
    factor_max: Tensor
    factor_ess: Tensor
    advantage_variance: Tensor
    step: StepInfo
    finite: Tensor
    log_ratio: Tensor
    outputs: tuple[Tensor, ...]


Step = Callable[[Agent, TensorDict, Tensor], StepInfo]
Order = Sequence[int] | Callable[[Tensor, list[int]], int]


def sweep(
    agents: Sequence[Agent],
    order: Order,
    step: Step,
    clip_factor: bool,
    rows: Tensor | None = None,
    chunk: int | None = None,
) -> list[PositionInfo]:
    r"""Update the agents in the given order.

    .. math:: M ← 1; \quad \text{for } i \text{ in order: step on } \operatorname{mean}(w(M) · \mathrm{gain}(x_i, A));
        \quad M ← M · r_i(\text{after the step})

    Source: Kuba et al. 2022, arXiv 2109.11251; the cap on w: Le & Ta, arXiv 2606.25526 (both the authors' code).

    Args:
        agents (sequence of Agent): the team.
        order (sequence of int, or callable): a permutation of the team's indices; or ``order(weight, moved)``, which
            picks the next agent, given the present w(M) [*] and the agents that have moved.
        step (callable): ``step(agent, data, weight)`` moves one agent, with the rows' data and w(M) [*]; it returns a
            :class:`StepInfo` or another named tuple of scalars, and if one of them is not finite the step is undone.
        clip_factor (bool): cap the weight, never the chain, at 1.
        rows (Tensor, optional): which rows of the data to use; None for all of them.
        chunk (int, optional): rows per forward pass where no gradient is needed; None for all at once.

    Returns: what happened at each position, in order.

    Raises:
        ValueError: if an agent's data lacks ``old_log_prob``.

    Examples: ``examples/torchrl_only.py`` is a complete training loop around it.
    """
    if any("old_log_prob" not in agent.data.keys() for agent in agents):
        raise ValueError("An agent's data has no 'old_log_prob': call remember_old_policy on every agent first.")
    infos: list[PositionInfo] = []
    old_log_prob = agents[0].data["old_log_prob"]
    log_factor = torch.zeros_like(old_log_prob if rows is None else old_log_prob[rows])
    for position in range(len(agents)):
        weight = F.factor_weight(log_factor, clip_factor)
        i = order(weight, [info.agent for info in infos]) if callable(order) else order[position]
        data = agents[i].data if rows is None else agents[i].data[rows]
        after = _step_or_undo(step, agents[i], data, weight, chunk)
        infos.append(PositionInfo(i, *_factor_statistics(log_factor, weight, data), *after))
        log_factor = log_factor + infos[-1].log_ratio
    return infos


@torch.no_grad()
def remember_old_policy(agent: Agent, chunk: int | None = None) -> None:
    """Store the log-probs and distribution of the policy as it is now: π_old of this iteration.

    They are computed on the batch rather than taken from collection: a recurrent policy, which training runs from a
    zero state, has other log-probs there, and its ratios would not start at 1.

    Args:
        agent (Agent): its ``data`` gets ``old_log_prob`` and ``old_0``, ``old_1``.
        chunk (int, optional): rows per forward pass, which bounds the memory.
    """
    outputs = forward(agent, agent.data, chunk)
    agent.data["old_log_prob"] = agent.policy.log_prob(outputs, agent.data["action"])
    for i, output in enumerate(outputs):
        agent.data[f"old_{i}"] = output.clone()  # it may be a parameter itself, such as a standard deviation


@torch.no_grad()
def forward(agent: Agent, data: TensorDict, chunk: int | None = None) -> tuple[Tensor, ...]:
    """The distribution's parameters for this agent as its policy is now, each [*, ...]."""
    if chunk is None or chunk >= len(data):
        return agent.policy.forward(data["inputs"].copy())
    parts = [agent.policy.forward(part) for part in data["inputs"].split(chunk)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


@torch.no_grad()
def log_ratio_of(agent: Agent, data: TensorDict, outputs: tuple[Tensor, ...]) -> Tensor:
    """The log-ratio log π - log π_old on the given rows, [*]; 0 where the agent is absent."""
    log_prob = agent.policy.log_prob(outputs, data["action"])
    return F.log_ratio(log_prob, data["old_log_prob"], data.get("mask", None))


def _step_or_undo(
    step: Step, agent: Agent, data: TensorDict, weight: Tensor, chunk: int | None
) -> tuple[StepInfo, Tensor, Tensor, tuple[Tensor, ...]]:
    """Take the step; if anything in it was not finite, put parameters and optimizer state back, bit for bit.

    The choice is made by ``torch.where`` on the device: the host waits for nothing.

    Returns: the step's info, whether it was finite, and log-ratio and outputs after it.
    """
    before = {id(tensor): tensor.detach().clone() for tensor in _state(agent)}
    info = step(agent, data, weight)
    outputs = forward(agent, data, chunk)
    log_ratio = log_ratio_of(agent, data, outputs)
    finite = torch.stack([value.isfinite() for value in info]).all() & log_ratio.isfinite().all()
    for tensor in _state(agent):
        old = before.get(id(tensor), 0)  # a moment that was made in this step was zero before it
        tensor.data.copy_(torch.where(finite.to(tensor.device), tensor, old))
    outputs = tuple(torch.where(finite, new, old) for new, old in zip(outputs, old_outputs(data), strict=True))
    return info, finite, torch.where(finite, log_ratio, 0), outputs


def _state(agent: Agent) -> list[Tensor]:
    state = {} if agent.optimizer is None else agent.optimizer.state
    moments = [value for leaf in agent.policy.parameters for value in state.get(leaf, {}).values()]
    return [*agent.policy.parameters, *(value for value in moments if isinstance(value, Tensor))]


@torch.no_grad()
def _factor_statistics(log_factor: Tensor, weight: Tensor, data: TensorDict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, maximum and effective sample size of M, and Var(w(M) A)."""
    mask = data.get("mask", None)
    factor = log_factor.exp()
    weighted = weight * data["advantage"]
    centred = weighted - F.masked_mean(weighted, mask)
    as_column = None if mask is None else mask.reshape(-1, 1)
    return (
        F.masked_mean(factor, mask),
        factor.max() if mask is None else torch.where(mask, factor, 0).max(),
        F.effective_sample_size(log_factor.reshape(-1, 1), as_column).squeeze(),
        F.masked_mean(centred.square(), mask),
    )
