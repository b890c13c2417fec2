"""Who moves when, where the advantages decide."""

import torch
from torch import Tensor


def semi_greedy(score: Tensor, generator: torch.Generator) -> list[int]:
    """An order whose positions alternate: the largest score left, then a random one of the rest, and so on.

    Ties are broken at random. (The authors' sort puts agent 0 first, always, where all agents have one value and one
    advantage.) The host waits once, for the order.

    Source: Wang et al. 2023 (A2PO), the authors' code; the ties: ours.

    Args:
        score (Tensor): [N], see :func:`advantage_score`.
        generator (torch.Generator): on the score's device.

    Returns: a permutation of 0 ... N - 1.

    Examples:
        >>> order = semi_greedy(torch.tensor([0.3, 0.1, 0.2, 0.9]), torch.Generator())
        >>> order[0], sorted(order)
        (3, [0, 1, 2, 3])
    """
    n = len(score)
    shuffled = torch.randperm(n, generator=generator, device=score.device)
    ranked = shuffled[score[shuffled].argsort(descending=True, stable=True)]
    draw = torch.rand(n, generator=generator, device=score.device, dtype=torch.float64)
    ranks, draws = torch.stack([ranked.double(), draw]).tolist()
    left = [int(rank) for rank in ranks]
    return [left.pop(0 if k % 2 == 0 else int(draws[k] * len(left))) for k in range(n)]


@torch.no_grad()
def advantage_score(advantage: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""How large each agent's advantages are beside its values.

    .. math:: score_i = \operatorname{mean} |A_i| / \max(|V_i|, \operatorname{mean} |V| / 100)

    Source: Wang et al. 2023 (A2PO), the authors' code, which divides by V itself; the lower bound, by which a value
    near 0 does not decide alone, is ours.

    Args:
        advantage (Tensor): A, normalised as the updates will use it, [*, N].
        value (Tensor): V at the start of the iteration, [*, N].
        mask (Tensor, optional): boolean, [*, N], True where an agent takes part.

    Returns: [N]; 0 for an agent that is absent throughout.

    Examples:
        >>> advantage_score(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]]))
        tensor([0.5000, 1.0000])
    """
    mask = torch.ones_like(advantage, dtype=torch.bool) if mask is None else mask
    size = torch.where(mask, value.abs(), 0)
    floor = size.sum() / mask.sum().clamp(min=1) / 100
    share = advantage.abs() / size.maximum(floor).clamp(min=1e-12)
    return torch.where(mask, share, 0).flatten(0, -2).sum(0) / mask.flatten(0, -2).sum(0).clamp(min=1)
