"""Advantages: who deserves what.

Shapes: ``[*]`` stands for any batch dimensions, such as [B] or [B, T]; N is the number of agents.
"""

import torch
from torch import Tensor

from benchmarl_trust.functional.checks import check_choice

NORMALIZATIONS = ("none", "batch", "per_agent")


def normalize_advantage(advantage: Tensor, over: str, mask: Tensor | None = None) -> Tensor:
    """Shift and scale advantages to mean 0 and standard deviation 1.

    .. math:: A ← (A - mean(A)) / max(std(A), 1e-6)

    ``batch`` takes the statistics over all samples and agents together, which keeps the agents' advantages
    comparable; ``per_agent`` takes them for each agent alone, so that an agent with small advantages learns as
    fast as the others. The standard deviation is the population's. Equal advantages give 0.

    Source: common practice in PPO implementations; BenchMARL's issue #255 asks for the choice.

    Args:
        advantage (Tensor): [*, N, 1].
        over (str): ``none``, ``batch`` or ``per_agent``.
        mask (Tensor, optional): boolean, [*, N]; absent agents enter no statistic and get 0.

    Returns: [*, N, 1].

    Raises:
        ValueError: if ``over`` is unknown.

    Examples:
        >>> normalize_advantage(torch.tensor([[[1.0]], [[3.0]]]), "batch").flatten()
        tensor([-1.,  1.])
    """
    check_choice("normalize_advantage", over, NORMALIZATIONS)
    if over == "none":
        return advantage
    mask = torch.ones_like(advantage, dtype=torch.bool) if mask is None else mask.unsqueeze(-1)
    # In float64: in float32 the rounding of the mean would be blown up to deviation 1 where all advantages are equal.
    value = torch.where(mask, advantage.double(), 0)
    dims = tuple(range(advantage.ndim)) if over == "batch" else tuple(range(advantage.ndim - 2))
    count = mask.sum(dims, keepdim=True).clamp(min=1)
    mean = value.sum(dims, keepdim=True) / count
    centred = torch.where(mask, value - mean, 0)
    std = (centred.square().sum(dims, keepdim=True) / count).sqrt()
    return (centred / std.clamp(min=1e-6)).to(advantage.dtype)


def temporal_difference(advantage: Tensor, decay: float, done: Tensor) -> Tensor:
    r"""The errors of which GAE's advantages are the sums.

    .. math:: A_t = δ_t + γλ A_{t+1} \quad ⟹ \quad δ_t = A_t - γλ A_{t+1}

    with nothing subtracted where the trajectory or the batch ends.

    Source: Schulman et al. 2016, arXiv 1506.02438, solved for δ.

    Args:
        advantage (Tensor): GAE(λ), [*, T, N].
        decay (float): γλ.
        done (Tensor): boolean, [*, T, N] or [*, T, 1]: the trajectory ends with this step.

    Returns: δ, [*, T, N].

    Examples:
        >>> temporal_difference(torch.tensor([[1.5], [1.0]]), 0.5, torch.tensor([[False], [True]])).flatten()
        tensor([1., 1.])
    """
    following = torch.cat([advantage[..., 1:, :], torch.zeros_like(advantage[..., :1, :])], -2)
    return advantage - decay * torch.where(done, 0, following)


def team_advantage(advantage: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""One advantage for the whole team: the mean over the agents that are present.

    .. math:: A = \frac{1}{|\{i \text{ present}\}|} \sum_{i \text{ present}} A_i

    The sequential algorithms' theory is of one joint advantage; per-agent rewards give one per agent.

    Args:
        advantage (Tensor): [*, N, 1].
        mask (Tensor, optional): boolean, [*, N].

    Returns: [*, N, 1], equal over agents.

    Examples:
        >>> team_advantage(torch.tensor([[[1.0], [3.0]]])).flatten()
        tensor([2., 2.])
    """
    if mask is None:
        return advantage.mean(-2, keepdim=True).expand_as(advantage)
    mask = mask.unsqueeze(-1)
    count = mask.sum(-2, keepdim=True).clamp(min=1)
    return (torch.where(mask, advantage, 0).sum(-2, keepdim=True) / count).expand_as(advantage)
