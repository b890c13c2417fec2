"""Ratios of policies and statistics over them.

Shapes: ``[*]`` stands for any batch dimensions, such as [B] or [B, T]; N is the number of agents.
``mask`` is True where an agent takes part; a padded or absent agent counts nowhere.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarl_trust.functional.checks import check_choice, check_same_shape

#: The largest log M that weighs a loss without a cap.
LOG_FACTOR_BOUND = 20.0


def log_ratio(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor | None = None) -> Tensor:
    """The log-ratio x = log π_θ - log π_old, 0 where an agent is absent.

    Args:
        log_prob (Tensor): log π_θ(a|o), [*, N], summed over action dimensions.
        old_log_prob (Tensor): log π_old(a|o), the same shape.
        mask (Tensor, optional): boolean, the same shape.

    Returns: x in nats, [*, N].

    Raises:
        ValueError: if the shapes differ, which would broadcast silently.

    Examples:
        >>> log_ratio(torch.tensor([-1.0, -torch.inf]), torch.tensor([-2.0, -torch.inf]), torch.tensor([True, False]))
        tensor([1., 0.])
    """
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob)
    difference = log_prob - old_log_prob
    return difference if mask is None else torch.where(mask, difference, 0)


def masked_mean(value: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over the valid entries; 0 if there is none.

    Args:
        value (Tensor): any shape. Entries that the mask excludes may be non-finite.
        mask (Tensor, optional): boolean, the same shape.

    Returns: a scalar.

    Examples:
        >>> masked_mean(torch.tensor([1.0, torch.nan]), torch.tensor([True, False]))
        tensor(1.)
    """
    if mask is None:
        return value.mean()
    check_same_shape(value=value, mask=mask)
    return torch.where(mask, value, 0).sum() / mask.sum().clamp(min=1)


def mean_of_each(value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Each agent's mean over the samples in which it takes part; 0 if there is none.

    Args:
        value (Tensor): [*, N]. Entries that the mask excludes may be non-finite.
        mask (Tensor, optional): boolean, the same shape.

    Returns: [N].

    Examples:
        >>> mean_of_each(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[True, True], [True, False]]))
        tensor([2., 2.])
    """
    value = value.flatten(0, -2)
    if mask is None:
        return value.mean(0)
    mask = mask.flatten(0, -2)
    return torch.where(mask, value, 0).sum(0) / mask.sum(0).clamp(min=1)


def effective_sample_size(log_weight: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""The effective sample size of importance weights, as a share of the samples, per agent.

    .. math:: ESS = \frac{(\sum_b w_b)^2}{n \sum_b w_b^2} \in [1/n, 1]

    Source: Kish 1965; as TorchRL's PPO losses log it, but over all batch dimensions.

    Args:
        log_weight (Tensor): log w, [*, N]; or the weights of one agent, [B], without the dimension of agents.
        mask (Tensor, optional): boolean, the same shape.

    Returns: [N] (for one agent a scalar), between 1/n (one sample has all the weight) and 1 (equal weights); 0 for an
    agent that is absent throughout.

    Examples:
        >>> effective_sample_size(torch.zeros(8, 3))
        tensor([1., 1., 1.])
    """
    if log_weight.ndim == 1:
        mask = None if mask is None else mask.unsqueeze(-1)
        return effective_sample_size(log_weight.unsqueeze(-1), mask).squeeze(-1)
    log_weight = log_weight.reshape(-1, log_weight.shape[-1])
    count = log_weight.shape[0]
    if mask is not None:
        mask = mask.reshape(log_weight.shape)
        log_weight = log_weight.masked_fill(~mask, -torch.inf)
        count = mask.sum(0).clamp(min=1)
    log_size = 2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)
    size = log_size.exp() / count
    return size if mask is None else torch.where(mask.any(0), size, 0)


class Weighting(NamedTuple):
    r"""How the compound ratio of the agents already updated enters the next agent's objective.

    .. math:: L = w · \mathrm{gain}(x + \log g, A)

    Attributes:
        weight (Tensor): w, [*].
        shift (Tensor, optional): log g, [*], for a factor inside the clip; None: no factor there.
    """

    weight: Tensor
    shift: Tensor | None

    @property
    def total(self) -> Tensor:
        """The product w g: what the advantage is multiplied by where the agent has not moved yet, [*]."""
        return self.weight if self.shift is None else self.weight * self.shift.exp()


def _inside_clip(log_factor: Tensor, epsilon: float | None) -> Tensor:
    if epsilon is None:
        raise ValueError("factor=inside_clip bounds M by epsilon, which is missing: give it that of the clip.")
    return log_factor.clamp(math.log1p(-epsilon / 2), math.log1p(epsilon / 2))


#: Bounds of log M by the name of the factor: (log M, ε) -> log of what weighs a loss.
FACTORS: dict[str, Callable[[Tensor, float | None], Tensor]] = {
    "full": lambda log_factor, epsilon: log_factor.clamp(max=LOG_FACTOR_BOUND),
    "capped": lambda log_factor, epsilon: log_factor.clamp(max=0),
    "inside_clip": _inside_clip,
}


def factor_weight(log_factor: Tensor, factor: str = "full", epsilon: float | None = None) -> Weighting:
    r"""The weight that the compound ratio M of the agents already updated gives to the next agent's loss.

    .. math:: M = \prod_{j \text{ before } i} r_j

    - ``full`` (HAPPO, HATRPO): :math:`w = M`,
    - ``capped`` (clip-HAPPO, clip-HATRPO): :math:`w = \min(M, 1)`,
    - ``inside_clip`` (A2PO): :math:`w = 1`, and :math:`g = \mathrm{clip}(M, 1 ± ε/2)` multiplies the ratio inside the
      gain: min(r g A, clip(r g, 1 ± ε) A).

    The chain itself is never clipped: the bound is applied where M enters a loss. With ``capped`` the variance of
    w(M) A is at most E[A²], however many agents came before. With ``full`` an M above e^20 = 5e8 counts as that:
    policies at the bounds of their actions can have ratios beyond the range of floats, which would make every later
    turn's loss infinite.

    Source: full: Kuba et al. 2022, arXiv 2109.11251; capped: Le & Ta, arXiv 2606.25526; inside_clip: Wang et al. 2023
    (A2PO), whose code clips the others' factor at half the radius (all three the authors'); e^20: ours.

    Args:
        log_factor (Tensor): log M, [*].
        factor (str): a key of :data:`FACTORS`.
        epsilon (float, optional): ε, needed by ``inside_clip`` alone.

    Returns: a :class:`Weighting`.

    Raises:
        ValueError: if ``factor`` is unknown, or ``inside_clip`` has no ε.

    Examples:
        >>> factor_weight(torch.tensor([0.5, 2.0]).log(), "capped").weight
        tensor([0.5000, 1.0000])
        >>> factor_weight(torch.tensor([0.5, 2.0]).log(), "inside_clip", epsilon=0.2).total
        tensor([0.9000, 1.1000])
    """
    check_choice("factor", factor, FACTORS)
    bounded = FACTORS[factor](log_factor, epsilon)
    if factor == "inside_clip":
        return Weighting(torch.ones_like(bounded), bounded)
    return Weighting(bounded.exp(), None)
