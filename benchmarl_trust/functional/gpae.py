r"""Generalized per-agent advantage estimation (GPAE) with doubly truncated importance sampling (DT-ISR).

Each agent i has a value of its own, :math:`EQ_i(s, a_{-i}) = E_{a_i \sim π_i}[Q(s, a_i, a_{-i})]`: what the team can
expect when the others' actions are known and its own is not. What its own action adds to that is its advantage.

Source: Kim et al., arXiv 2603.02654. The authors' code was read, the body of the paper was not: formulas are marked
as the authors' where that code has them.

Shapes: [*] stands for any batch dimensions, T for time steps, N for agents; where nothing else is said, a tensor is
[*, T, N]. Log-ratios are log π_i - log μ_i in nats, μ the policy that collected the data and π the one whose values are
wanted. ``mask`` is True where an agent takes part. Nothing here is meant to be differentiated through: the results are
targets, and are detached.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarl_trust.functional.checks import check_choice, check_number, check_same_shape

#: A log-ratio beyond this counts as this: e^20 = 5e8 is past every cap, and the sum over agents stays finite.
LOG_RATIO_BOUND = 20.0

#: The truncations: (own log-ratio, sum of the others', log η) -> log(c / λ), never above 0.
TRACES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "dt": lambda own, others, log_eta: (own + others.clamp(max=log_eta)).clamp(max=0),
    "st": lambda own, others, log_eta: (own + others).clamp(max=0),
    "it": lambda own, others, log_eta: own.clamp(max=0),
    "none": lambda own, others, log_eta: torch.zeros_like(own),
}


def check_gpae(truncation: str, eta: float, lmbda: float, gamma: float, prefix: str = "") -> None:
    """Raise if a setting of the estimator is out of its range.

    Args:
        truncation (str): a key of :data:`TRACES`.
        eta (float): η ≥ 1.
        lmbda (float): λ in [0, 1].
        gamma (float): γ in [0, 1].
        prefix (str): what the error message puts before a key's name, such as ``algorithm.``.

    Raises:
        ValueError: names the setting, its value and its range.

    Examples:
        >>> check_gpae("dt", eta=1.02, lmbda=0.95, gamma=0.99)
    """
    check_choice(f"{prefix}truncation", truncation, TRACES)
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not eta >= 1:
        raise ValueError(
            f"{prefix}eta={eta}: the cap η on the teammates' joint ratio must be at least 1, or it would shorten the "
            "traces of on-policy data too. The authors use 1.02 to 1.05."
        )
    for name, value in (("lmbda", lmbda), ("gamma", gamma)):
        check_number(
            f"{prefix}{name}",
            float(value) if isinstance(value, Tensor) else value,
            usual=0.95 if name == "lmbda" else 0.99,
            least=0,
            most=1,
        )


def trace_coefficient(
    log_ratio: Tensor,
    lmbda: float,
    truncation: str = "dt",
    eta: float = 1.02,
    mask: Tensor | None = None,
) -> Tensor:
    r"""How much of the next step's advantage each agent's trace lets through.

    With :math:`ρ_i = π_i/μ_i` and :math:`ρ_{-i} = \prod_{j≠i} ρ_j`:

    .. math::
        \text{dt:}\quad c_i = λ \min(1, ρ_i \min(η, ρ_{-i})) \qquad \text{st:}\quad c_i = λ \min(1, ρ_i ρ_{-i}) \qquad
        \text{it:}\quad c_i = λ \min(1, ρ_i) \qquad \text{none:}\quad c_i = λ

    ``dt``, the doubly truncated ratio, also is λ min(1, η ρ_i, ρ_i ρ_{-i}): it sees the teammates as ``st`` does, but
    their ratio cannot make up for an own one that is small. On-policy all four are λ. Off-policy none of them makes
    the fixed point the on-policy one: the teammates' executed actions stay those of their old policies.

    Source: Kim et al., arXiv 2603.02654 (the authors' code).

    Args:
        log_ratio (Tensor): log π_i - log μ_i of the executed actions, [*, N].
        lmbda (float): λ in [0, 1].
        truncation (str): a key of :data:`TRACES`.
        eta (float): η ≥ 1, read by ``dt`` alone.
        mask (Tensor, optional): boolean, [*, N]; an absent agent has ratio 1, whatever its log-ratio.

    Returns: c in [0, λ], [*, N].

    Raises:
        ValueError: for a setting out of range, or a mask of another shape.

    Examples:
        >>> log_ratio = torch.tensor([0.2, 5.0]).log()
        >>> torch.stack([trace_coefficient(log_ratio, 1.0, name, eta=1.05)[0] for name in ("st", "it", "dt")])
        tensor([1.0000, 0.2000, 0.2100])
    """
    check_gpae(truncation, eta, lmbda, gamma=1)
    log_ratio = _bounded(log_ratio, mask)
    others = log_ratio.sum(-1, keepdim=True) - log_ratio
    return lmbda * TRACES[truncation](log_ratio, others, math.log(eta)).exp()


def importance_weight(log_ratio: Tensor) -> Tensor:
    r"""The weight :math:`ρ_i = π_i/μ_i` of a sample of an older policy in the objective; 0 where it is not finite:
    such samples are to be left out by a mask.

    Source: Kim et al., arXiv 2603.02654 (the authors' code). With r = π_θ/μ their clipped term
    min(r A, clip(r, ρ(1-ε), ρ(1+ε)) A) is ρ times the clipped gain of π_θ/π, since ρ > 0.

    Args:
        log_ratio (Tensor): log ρ, any shape.

    Returns: ρ, the same shape, detached.

    Examples:
        >>> importance_weight(torch.tensor([0.0, -torch.inf, torch.nan]))
        tensor([1., 0., 0.])
    """
    return torch.where(log_ratio.isfinite(), _bounded(log_ratio, None).exp(), 0)


def per_agent_advantage(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    trace: Tensor | float,
    gamma: float,
    done: Tensor,
    terminated: Tensor,
    time_dim: int = -2,
) -> Tensor:
    r"""The advantages of all agents, each over its own values and its own trace.

    .. math::
        A_{i,t} = δ_{i,t} + γ c_{i,t+1} A_{i,t+1}, \qquad δ_{i,t} = r_t + γ EQ_{i,t+1} - EQ_{i,t}

    The product of traces starts at t + 1: the first error is weighted by nothing, since an agent's own action at t is
    what its advantage is about. ``terminated`` makes the bootstrap 0, ``done`` ends the sum; a value that is not used
    may be anything, NaN included. The last step of the batch bootstraps like any other and sums nothing further.
    With c = λ this is GAE(λ) of EQ_i.

    The sum over time is done by doubling: after k rounds each step holds the sum over the 2^k steps from it on, so
    log₂ T rounds over whole tensors replace T steps.

    Source: Kim et al., arXiv 2603.02654 (the authors' code).

    Args:
        reward (Tensor): r_t; agents may be paid differently.
        value (Tensor): EQ_i(s_t, a_{-i,t}).
        next_value (Tensor): EQ_i(s_{t+1}, a_{-i,t+1}), where the trajectory ends that of its true last observation.
        trace (Tensor or float): c_{i,t} of :func:`trace_coefficient`, entry t for step t; λ if on-policy.
        gamma (float): γ in [0, 1].
        done (Tensor): boolean, [*, T, 1] or [*, T, N]: the trajectory ends with this step.
        terminated (Tensor): boolean, as ``done``: it ends in a state of value 0.
        time_dim (int): the dimension of time.

    Returns: A, detached.

    Raises:
        ValueError: if shapes would broadcast where they must not.

    Examples:
        >>> one, no = torch.ones(3, 2), torch.zeros(3, 1, dtype=torch.bool)
        >>> per_agent_advantage(one, 0 * one, 0 * one, 1.0, 0.5, no, no)[:, 0]
        tensor([1.7500, 1.5000, 1.0000])
    """
    check_same_shape(reward=reward, value=value, next_value=next_value)
    if isinstance(trace, Tensor):
        check_same_shape(trace=trace, value=value)
    for name, flag in (("done", done), ("terminated", terminated)):
        _check_flag(name, flag, value)
    with torch.no_grad():
        delta = reward.to(value) + gamma * torch.where(terminated, 0, next_value) - value
        trace = trace.to(value) if isinstance(trace, Tensor) else torch.full_like(value, trace)
        decay = gamma * torch.where(done, 0, _next_step(trace, time_dim))
        return _linear_recurrence(delta.movedim(time_dim, 0), decay.movedim(time_dim, 0)).movedim(0, time_dim)


def per_agent_value_target(
    value: Tensor, advantage: Tensor, log_ratio: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    r"""What the critic of each agent is regressed on.

    .. math:: EQ_{i,t} + \min(1, ρ_{i,t}) A_{i,t}

    Source: Kim et al., arXiv 2603.02654 (the authors' code). For one agent it is the target of V-trace with
    c̄ = ρ̄ = 1 and traces times λ (Espeholt et al. 2018).

    Args:
        value (Tensor): EQ_i(s_t, a_{-i,t}), any shape.
        advantage (Tensor): A_{i,t}, the same shape.
        log_ratio (Tensor, optional): log ρ_i of the executed action, the same shape; on-policy it is left out.
        mask (Tensor, optional): boolean, the same shape.

    Returns: the target, detached.

    Raises:
        ValueError: if the shapes differ.

    Examples:
        >>> per_agent_value_target(torch.ones(2), torch.ones(2), torch.tensor([0.5, 2.0]).log())
        tensor([1.5000, 2.0000])
    """
    check_same_shape(value=value, advantage=advantage)
    if log_ratio is None:
        return (value + advantage).detach()
    check_same_shape(value=value, log_ratio=log_ratio)
    return (value + _bounded(log_ratio, mask).clamp(max=0).exp() * advantage).detach()


def _bounded(log_ratio: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        check_same_shape(log_ratio=log_ratio, mask=mask)
        log_ratio = torch.where(mask, log_ratio, 0)
    return log_ratio.detach().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _check_flag(name: str, flag: Tensor, value: Tensor) -> None:
    if flag.dtype != torch.bool:
        raise ValueError(f"{name} must be boolean, it is {flag.dtype}.")
    if flag.shape not in (value.shape, (*value.shape[:-1], 1)):
        raise ValueError(
            f"{name} has shape {tuple(flag.shape)}, the values have {tuple(value.shape)}: it must have the same "
            "shape, or one entry for all agents in the last dimension."
        )


def _next_step(x: Tensor, time_dim: int) -> Tensor:
    """Entry t + 1 at t; 0 at the last step."""
    length = x.shape[time_dim]
    return torch.cat([x.narrow(time_dim, 1, length - 1), torch.zeros_like(x.narrow(time_dim, 0, 1))], time_dim)


def _linear_recurrence(term: Tensor, decay: Tensor) -> Tensor:
    """y_t = term_t + decay_t y_{t+1}, time first; the last decay is 0. What a decay of 0 cuts off may be NaN."""
    total, reach = term, 1
    while reach < len(term):
        live = decay[:-reach] != 0
        ahead = torch.where(live, total[reach:], 0)
        total = torch.cat([torch.addcmul(total[:-reach], decay[:-reach], ahead), total[-reach:]])
        decay = torch.cat([decay[:-reach] * torch.where(live, decay[reach:], 0), torch.zeros_like(decay[-reach:])])
        reach *= 2
    return total
