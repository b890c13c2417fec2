r"""How a team's KL budget is divided among its agents.

An agent's natural-gradient step under a bound δ_i gains at best √(2 s_i δ_i), to first order, where

.. math:: s_i = \frac{(g_i^T d_i)^2}{d_i^T (F_i + λI) d_i}, \qquad (F_i + λI) d_i = g_i

is its *score*, g_i the gradient of its surrogate and F_i its Fisher matrix.

Shapes: N agents; scores and bounds are [N], in units of gain² and in nats.

Source: equal bounds are HATRPO's (Kuba et al. 2022). That W divides a total budget by KKT and that G picks the best
agent by improvement per KL is known from the abstract of arXiv 2508.10340 and a reader's published note; their formulas
are reconstructed, derived here.
"""

import torch
from torch import Tensor

#: A score below this share of the best counts as none; it also keeps quotients finite.
TINY = 1e-100


def uniform_budget(score: Tensor, total: Tensor | float) -> Tensor:
    r"""Equal bounds, HATRPO's if D = N δ.

    .. math:: \max_δ \min_i δ_i \quad \text{subject to} \quad \sum_i δ_i ≤ D \quad ⟹ \quad δ_i = D / N

    Args:
        score (Tensor): [N]; only its shape counts.
        total (Tensor or float): D.

    Returns: δ, [N].

    Examples:
        >>> uniform_budget(torch.tensor([9.0, 16.0]), 0.02)
        tensor([0.0100, 0.0100])
    """
    return torch.ones_like(score) * total / score.numel()


def kkt_budget(score: Tensor, total: Tensor | float, low: Tensor | float, high: Tensor | float) -> Tensor:
    r"""HATRPO-W's bounds: the best joint gain under a joint budget.

    .. math:: \max_δ \sum_i \sqrt{2 s_i δ_i} \quad \text{subject to} \quad \sum_i δ_i ≤ D, \quad l_i ≤ δ_i ≤ h_i

    Stationarity, √(s_i / 2δ_i) = const for every δ_i strictly between its bounds, gives

    .. math:: δ_i = \mathrm{clip}(k s_i, l_i, h_i), \qquad k \text{ such that } \sum_i δ_i = D,

    which without bounds is δ_i = D s_i / Σs. The sum grows with k and is linear between the breakpoints l_i / s_i and
    h_i / s_i, so k is found by sorting them: no iteration, no host round trip. (To clip first and rescale afterwards
    breaks the bounds.)

    Edges: D ≥ Σh gives h; D ≤ Σl gives l scaled to D; s_i = 0 gives l_i, and what nobody can use stays unspent; all
    s = 0 counts as all s equal, which gives D/N where the bounds allow it.

    Args:
        score (Tensor): s ≥ 0, [N].
        total (Tensor or float): D ≥ 0.
        low (Tensor or float): l ≥ 0, a number or [N].
        high (Tensor or float): h ≥ l, a number or [N].

    Returns: δ, [N].

    Raises:
        ValueError: if the scores are no vector.

    Examples:
        >>> kkt_budget(torch.tensor([9.0, 16.0]), 0.02, 0.0, 1.0)
        tensor([0.0072, 0.0128])
    """
    if score.ndim != 1:
        raise ValueError(f"The scores have shape {tuple(score.shape)}; they must be a vector, one per agent.")
    dtype, score = score.dtype, score.double()
    low, high, total = (_tensor(value, score) for value in (low, high, total))
    low, high = low.expand_as(score), high.minimum(total).expand_as(score)  # nobody can have more than D
    scale = score / score.amax().clamp(min=torch.finfo(score.dtype).tiny)
    positive = scale > TINY
    scale = torch.where(positive, scale, 1)
    positive = positive | ~positive.any()  # if nobody gains, all count alike

    def bounds(k: Tensor) -> Tensor:  # [K] -> [K, N]; an agent that gains nothing gets its lower bound
        return torch.where(positive, (k.unsqueeze(-1) * scale).clamp(low, high), low)

    breakpoints = torch.cat([low / scale, high / scale]).masked_fill(~positive.repeat(2), 0).sort().values
    sums = bounds(breakpoints).sum(-1)
    right = (sums < total).sum(0, keepdim=True).clamp(1, len(sums) - 1)
    segment = torch.cat([right - 1, right])  # D lies between these two; gathered, since indexing would synchronise
    (from_sum, to_sum), (from_k, to_k) = sums.gather(0, segment), breakpoints.gather(0, segment)
    share = ((total - from_sum) / (to_sum - from_sum).clamp(min=TINY)).clamp(0, 1)

    budget = bounds((from_k + share * (to_k - from_k)).unsqueeze(0)).squeeze(0)
    lowest = low.sum()
    return torch.where(total <= lowest, low * total / lowest.clamp(min=TINY), budget).to(dtype)


def greedy_bound(
    score: Tensor,
    chosen: Tensor | int,
    remaining: Tensor | float,
    low: Tensor | float,
    high: Tensor | float,
) -> Tensor:
    r"""HATRPO-G's bound for the agent that moves next: its share of what is left of the budget.

    .. math:: j = \arg\max_i \frac{\sqrt{2 s_i δ}}{δ} \text{ at a common probe } δ \quad ⟹ \quad j = \arg\max_i s_i
    .. math:: δ_j = \mathrm{clip}\Big(D_{rem} \frac{s_j}{\sum_i s_i},\ l,\ \min(h, D_{rem})\Big)

    The sum runs over the agents that have not moved. The agent j is the one with the largest improvement per KL: at a
    common probe δ the predicted gain is √(2 s_i δ), so it is argmax s_i. (At different KL the ratio would favour small
    steps.) With no bounds, and if each spends what it is given, this is :func:`kkt_budget` again, agent by agent.

    Args:
        score (Tensor): s ≥ 0 of the agents that have not moved, [R].
        chosen (Tensor or int): the index of j among them.
        remaining (Tensor or float): D_rem.
        low (Tensor or float): l.
        high (Tensor or float): h; min(h, D_rem) wins over l.

    Returns: δ_j, a scalar.

    Examples:
        >>> greedy_bound(torch.tensor([1.0, 3.0]), 1, 0.02, 0.0, 1.0)
        tensor(0.0150)
    """
    share = remaining * score[chosen] / score.sum().clamp(min=torch.finfo(score.dtype).tiny)
    limit = _tensor(remaining, score).clamp(min=0).clamp(max=high)
    return share.clamp(min=low).minimum(limit)


def _tensor(value: Tensor | float, like: Tensor) -> Tensor:
    """A tensor of the same type and device, filled there rather than copied from the host."""
    return value.to(like) if isinstance(value, Tensor) else torch.full((), value, dtype=like.dtype, device=like.device)
