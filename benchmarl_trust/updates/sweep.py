"""The sequential sweep: agents move one after another, each weighted by what the others did before it.

Where is the sequential advantage? In :func:`sweep`: the line that computes ``weighting`` from ``log_factor``, the
logarithm of the compound ratio M of the agents already updated. Agent i's loss is mean(w(M) · gain(x_i, A)). A is what
it was at the start of the iteration, unless ``advantage`` corrects it at each turn (A2PO).

Shapes: [*] is [B], or [B, T] for recurrent policies. A *row* is an entry of the first dimension: a step, or a sequence.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from benchmarl_trust import functional as F
from benchmarl_trust.policy import Agent, forward, log_ratio_of, old_outputs


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
        log_ratio (Tensor, optional): its log-ratio after the step, [*]; None once it is of no use any more.
        outputs (tuple of Tensor): its distribution's parameters after the step, each [*, ...]; then empty.
    """

    agent: int
    factor_mean: Tensor
    factor_max: Tensor
    factor_ess: Tensor
    advantage_variance: Tensor
    step: NamedTuple
    finite: Tensor
    log_ratio: Tensor | None
    outputs: tuple[Tensor, ...]


#: ``step(agent, data, weight, place)``: the agent, its rows, w [*], and its position k of N as k/N.
Step = Callable[[Agent, TensorDict, Tensor, float], NamedTuple]
#: ``order(weight, moved)``: w(M) [*], and who has moved.
Order = Sequence[int] | Callable[[Tensor, list[int]], int]
#: ``advantage(i, log_factor)``: what agent i's advantages are, [*], given log M [*].
Advantage = Callable[[int, Tensor], Tensor]


def sweep(
    agents: Sequence[Agent],
    order: Order,
    step: Step,
    factor: str = "full",
    rows: Tensor | None = None,
    chunk: int | None = None,
    epsilon: float | None = None,
    advantage: Advantage | None = None,
) -> list[PositionInfo]:
    r"""Update the agents in the given order.

    .. math:: M ← 1; \quad \text{for } i \text{ in order: step on } \operatorname{mean}(w(M) · \mathrm{gain}(x_i, A));
        \quad M ← M · r_i(\text{after the step})

    Where the data is of an older policy μ (``log_importance`` in the agents' data) the chain starts there: the loss's
    weight is w(M) π_i^old/μ_i, and M is multiplied by the whole π_i/μ_i. Agents that have not moved count as μ has
    them. Two agents with μ, old, new = .8, .5, .6 for the first show why: E_μ[new/μ] = 1, but E_μ[new/old] = 1.12.

    Source: Kuba et al. 2022, arXiv 2109.11251; the cap on w: Le & Ta, arXiv 2606.25526; the factor inside the clip:
    Wang et al. 2023 (all the authors' code); older data: derived here.

    Args:
        agents (sequence of Agent): the team.
        order (sequence of int, or callable): a permutation of the team's indices; or ``order(weight, moved)``, which
            picks the next agent, given the present w(M) [*] and the agents that have moved.
        step (callable): ``step(agent, data, weight, place)`` moves one agent, with the rows' data, w(M) [*], and the
            agent's position k/N; it returns a :class:`StepInfo` or another named tuple of scalars, and if one of them
            is not finite the step is undone.
        factor (str): how M weighs, see :func:`benchmarl_trust.functional.factor_weight`. A factor inside the gain goes
            into the step's data, as its ``shift``.
        rows (Tensor, optional): which rows of the data to use; None for all of them.
        chunk (int, optional): rows per forward pass where no gradient is needed; None for all at once.
        epsilon (float, optional): ε by which ``factor="inside_clip"`` bounds M, needed by it alone.
        advantage (callable, optional): ``advantage(i, log_factor)`` gives agent i's advantages [*] at its turn; None:
            those in its data.

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
        weighting = F.factor_weight(log_factor, factor, epsilon)
        i = order(weighting.weight, [info.agent for info in infos]) if callable(order) else order[position]
        data = agents[i].data.copy() if rows is None else agents[i].data[rows]
        if advantage is not None:
            data["advantage"] = advantage(i, log_factor)
        if weighting.shift is not None:
            data["shift"] = weighting.shift
        older = data.get("log_importance", None)
        weight = weighting.weight if older is None else weighting.weight * F.importance_weight(older)
        place = (position + 1) / len(agents)
        info, finite, log_ratio, outputs = _step_or_undo(step, agents[i], data, weight, place, chunk)
        met = _factor_statistics(log_factor, weighting.total, data)
        infos.append(PositionInfo(i, *met, info, finite, log_ratio, outputs))
        log_factor = log_factor + (log_ratio if older is None else log_ratio + older)
    return infos


def _step_or_undo(
    step: Step, agent: Agent, data: TensorDict, weight: Tensor, place: float, chunk: int | None
) -> tuple[NamedTuple, Tensor, Tensor, tuple[Tensor, ...]]:
    """Take the step; if anything in it was not finite, put parameters and optimizer state back, bit for bit.

    The choice is made by ``torch.where`` on the device: the host waits for nothing.

    Returns: the step's info, whether it was finite, and log-ratio and outputs after it.
    """
    with torch.no_grad():
        tensors = _state(agent)
        copies = torch._foreach_clone(tensors)  # pyright: ignore[reportPrivateImportUsage] has no public name
        before = dict(zip(map(id, tensors), copies, strict=True))
    info = step(agent, data, weight, place)
    outputs = forward(agent, data, chunk)
    log_ratio = log_ratio_of(agent.policy, outputs, data)
    finite = torch.stack(list(info)).isfinite().all() & log_ratio.isfinite().all()
    with torch.no_grad():
        for tensor in _state(agent):
            # a moment that was made in this step was zero before it
            old = before[id(tensor)] if id(tensor) in before else torch.zeros_like(tensor)
            torch.where(finite.to(tensor.device), tensor, old, out=tensor)
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
    return (
        F.masked_mean(factor, mask),
        factor.max() if mask is None else torch.where(mask, factor, 0).max(),
        F.effective_sample_size(log_factor.reshape(-1), None if mask is None else mask.reshape(-1)),
        F.masked_mean(centred.square(), mask),
    )
