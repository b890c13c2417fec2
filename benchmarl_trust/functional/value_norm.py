"""Running statistics of what a value function regresses on.

Shapes: S is that of the statistics, () for one of all agents, (N, 1) for one of each agent; ``[*]`` is any batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarl_trust.functional.checks import check_same_shape

#: How much of the running sums one update keeps.
BETA = 0.99999
#: The least weight that they are divided by: without data the mean is 0.
LEAST_WEIGHT = 1e-5
#: The least variance: equal returns, or none yet, count as of a standard deviation of 0.1.
LEAST_VARIANCE = 1e-2


class Moments(NamedTuple):
    """Exponentially weighted sums over the updates, each of shape S: of the means, of the mean squares, of 1."""

    mean: Tensor
    square: Tensor
    weight: Tensor


def update_moments(moments: Moments, value: Tensor, mask: Tensor | None = None, beta: float = BETA) -> Moments:
    r"""The moments after one more batch of values, which counts as one, whatever its size.

    .. math::
        m ← β m + (1 - β) \operatorname{mean}(x), \qquad q ← β q + (1 - β) \operatorname{mean}(x^2), \qquad
        w ← β w + (1 - β)

    A batch without values, or whose moments are not finite, changes nothing. Where S has agents that is seen for each
    by itself. Sums are in float64: in float32 the variance of returns in the thousands would be rounding.

    Source: ``ValueNorm`` of the HARL authors' code (``harl/common/valuenorm.py``), with its β. (Its option
    ``per_element_update``, off there too, is not here.)

    Args:
        moments (Moments): so far, each of shape S; zeros at first.
        value (Tensor): [*, S].
        mask (Tensor, optional): boolean, [*, S]; what is False does not count.
        beta (float): β.

    Returns: the moments, in float64.

    Raises:
        ValueError: if the shapes of value and mask differ.

    Examples:
        >>> moments = update_moments(Moments(*torch.zeros(3)), torch.tensor([1.0, 3.0]))
        >>> [round(x.item(), 4) for x in mean_and_std(moments)]
        [2.0, 1.0]
    """
    value = value.double()
    mask = torch.ones_like(value, dtype=torch.bool) if mask is None else mask
    check_same_shape(value=value, mask=mask)
    value, mask = (x.reshape(-1, *moments.mean.shape) for x in (torch.where(mask, value, 0), mask))
    count = mask.sum(0)
    batch = Moments(value.sum(0) / count, value.square().sum(0) / count, torch.ones_like(moments.weight))
    counts = batch.mean.isfinite() & batch.square.isfinite()  # neither is without values, 0/0
    new = (beta * old + (1 - beta) * now for old, now in zip(moments, batch, strict=True))
    return Moments(*(torch.where(counts, now, old.double()) for old, now in zip(moments, new, strict=True)))


def mean_and_std(moments: Moments) -> tuple[Tensor, Tensor]:
    r"""Mean and standard deviation of the values so far.

    .. math::
        μ = m / \max(w, 10^{-5}), \qquad σ^2 = \max(q / \max(w, 10^{-5}) - μ^2, 10^{-2})

    The division by w takes out that m and q start at 0: after one update they are that batch's own.

    Source: as :func:`update_moments`, constants included.

    Args:
        moments (Moments): each of shape S.

    Returns: μ and σ, of shape S.

    Examples:
        >>> mean_and_std(Moments(*torch.zeros(3, dtype=torch.float64)))  # before any data
        (tensor(0., dtype=torch.float64), tensor(0.1000, dtype=torch.float64))
    """
    weight = moments.weight.clamp(min=LEAST_WEIGHT)
    mean = moments.mean / weight
    return mean, (moments.square / weight - mean.square()).clamp(min=LEAST_VARIANCE).sqrt()
