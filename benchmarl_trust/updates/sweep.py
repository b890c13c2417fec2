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
from benchmarl_trust.updates.policy import AgentPolicy


class Agent(NamedTuple):
    """An agent of the team, with what an update of it needs.

    ``data`` has batch size [*] and the entries ``inputs`` (of the policy), ``action`` (before squashing),
    ``advantage`` [*] and, once :func:`remember_old_policy` has run, ``old_log_prob`` [*] and ``old_0``, ``old_1``,
    the old distribution's parameters; optionally ``mask`` [*], True where the agent takes part.
    """

    policy: AgentPolicy
    optimizer: torch.optim.Optimizer
    data: TensorDict


class StepInfo(NamedTuple):
    """What one agent's step leaves behind: scalars on the agent's device."""

    loss: Tensor
    grad_norm: Tensor
    finite: Tensor


class PositionInfo(NamedTuple):
    """What the agent at one position of the order met: scalars, and the agent's index in the team."""

    agent: int
    factor_mean: Tensor
    factor_max: Tensor
    factor_ess: Tensor
    advantage_variance: Tensor
    step: StepInfo


Step = Callable[[Agent, TensorDict, Tensor], StepInfo]


def sweep(
    agents: Sequence[Agent],
    order: Sequence[int],
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
        order (sequence of int): a permutation of the team's indices.
        step (callable): ``step(agent, data, weight)`` moves one agent, with the rows' data and w(M) [*].
        clip_factor (bool): cap the weight, never the chain, at 1.
        rows (Tensor, optional): which rows of the data to use; None for all of them.
        chunk (int, optional): rows per forward pass where no gradient is needed; None for all at once.

    Returns: what happened at each position, in order.
    """
    log_factor, infos = None, []
    for i in order:
        agent = agents[i]
        data = agent.data if rows is None else agent.data[rows]
        if log_factor is None:
            log_factor = torch.zeros_like(data["old_log_prob"])
        weight = F.factor_weight(log_factor, clip_factor)
        info, log_ratio = _step_or_undo(step, agent, data, weight, chunk)
        infos.append(_position(i, log_factor, weight, data, info))
        log_factor = log_factor + log_ratio
    return infos


@torch.no_grad()
def remember_old_policy(agent: Agent, chunk: int) -> None:
    """Store the log-probs and distribution of the policy as it is now: π_old of this iteration.

    They are computed on the batch rather than taken from collection: a recurrent policy, which training runs from a
    zero state, has other log-probs there, and its ratios would not start at 1.

    Args:
        agent (Agent): its ``data`` gets ``old_log_prob`` and ``old_0``, ``old_1``.
        chunk (int): rows per forward pass, which bounds the memory.
    """
    outputs = _forward_in_chunks(agent, agent.data, chunk)
    agent.data["old_log_prob"] = agent.policy.log_prob(outputs, agent.data["action"])
    for i, output in enumerate(outputs):
        agent.data[f"old_{i}"] = output


@torch.no_grad()
def current_log_ratio(agent: Agent, data: TensorDict, chunk: int | None = None) -> Tensor:
    """The log-ratio log π - log π_old on the given rows, [*]; 0 where the agent is absent."""
    outputs = _forward_in_chunks(agent, data, chunk)
    log_prob = agent.policy.log_prob(outputs, data["action"])
    return F.log_ratio(log_prob, data["old_log_prob"], data.get("mask", None))


def _forward_in_chunks(agent: Agent, data: TensorDict, chunk: int | None) -> tuple[Tensor, ...]:
    if chunk is None or chunk >= len(data):
        return agent.policy.forward(data["inputs"].copy())
    parts = [agent.policy.forward(part) for part in data["inputs"].split(chunk)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _step_or_undo(
    step: Step, agent: Agent, data: TensorDict, weight: Tensor, chunk: int | None
) -> tuple[StepInfo, Tensor]:
    """Take the step; if anything in it was not finite, put parameters and optimizer state back, bit for bit.

    The choice is made by ``torch.where`` on the device: the host waits for nothing.
    """
    before = {id(tensor): tensor.detach().clone() for tensor in _state(agent)}
    info = step(agent, data, weight)
    log_ratio = current_log_ratio(agent, data, chunk)
    finite = info.finite & log_ratio.isfinite().all()
    for tensor in _state(agent):
        old = before.get(id(tensor), 0)  # a moment that was made in this step was zero before it
        tensor.data.copy_(torch.where(finite.to(tensor.device), tensor, old))
    return info._replace(finite=finite), torch.where(finite, log_ratio, 0)


def _state(agent: Agent) -> list[Tensor]:
    moments = [
        value
        for leaf in agent.policy.parameters
        for value in agent.optimizer.state.get(leaf, {}).values()
        if isinstance(value, Tensor)
    ]
    return [*agent.policy.parameters, *moments]


@torch.no_grad()
def _position(i: int, log_factor: Tensor, weight: Tensor, data: TensorDict, step: StepInfo) -> PositionInfo:
    mask = data.get("mask", None)
    factor = log_factor.exp()
    weighted = weight * data["advantage"]
    mean = F.masked_mean(weighted, mask)
    return PositionInfo(
        agent=i,
        factor_mean=F.masked_mean(factor, mask),
        factor_max=factor.max() if mask is None else torch.where(mask, factor, 0).max(),
        factor_ess=F.effective_sample_size(
            log_factor.reshape(-1, 1), None if mask is None else mask.reshape(-1, 1)
        ).squeeze(),
        advantage_variance=F.masked_mean((weighted - mean).square(), mask),
        step=step,
    )
