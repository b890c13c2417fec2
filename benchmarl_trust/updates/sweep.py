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
    """What one agent's step leaves behind: scalars on the agent's device, not finite if anything in it was not."""

    loss: Tensor
    grad_norm: Tensor


class PositionInfo(NamedTuple):
    """What the agent at one position of the order met and did.

    Attributes:
        agent (int): its index in the team.
        factor_mean, factor_max, factor_ess (Tensor): of M, over the rows.
        advantage_variance (Tensor): Var(w(M) A).
        step (StepInfo): its step.
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

    Raises:
        ValueError: if an agent's data lacks ``old_log_prob``.

    Examples: ``examples/torchrl_only.py`` is a complete training loop around it.
    """
    log_factor, infos = None, []
    for i in order:
        agent = agents[i]
        if "old_log_prob" not in agent.data.keys():
            raise ValueError("An agent's data has no 'old_log_prob': call remember_old_policy on every agent first.")
        data = agent.data if rows is None else agent.data[rows]
        if log_factor is None:
            log_factor = torch.zeros_like(data["old_log_prob"])
        weight = F.factor_weight(log_factor, clip_factor)
        after = _step_or_undo(step, agent, data, weight, chunk)
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
        agent.data[f"old_{i}"] = output


def old_outputs(data: TensorDict) -> tuple[Tensor, ...]:
    """The old distribution's parameters that :func:`remember_old_policy` stored."""
    return tuple(data[key] for key in ("old_0", "old_1") if key in data.keys())


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
    finite = info.loss.isfinite() & info.grad_norm.isfinite() & log_ratio.isfinite().all()
    for tensor in _state(agent):
        old = before.get(id(tensor), 0)  # a moment that was made in this step was zero before it
        tensor.data.copy_(torch.where(finite.to(tensor.device), tensor, old))
    outputs = tuple(torch.where(finite, new, old) for new, old in zip(outputs, old_outputs(data), strict=True))
    return info, finite, torch.where(finite, log_ratio, 0), outputs


def _state(agent: Agent) -> list[Tensor]:
    moments = [
        value
        for leaf in agent.policy.parameters
        for value in agent.optimizer.state.get(leaf, {}).values()
        if isinstance(value, Tensor)
    ]
    return [*agent.policy.parameters, *moments]


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
