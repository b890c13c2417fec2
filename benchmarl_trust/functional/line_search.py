"""Backtracking along a step, under a bound on the KL divergence."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: A step that lands exactly on the bound must not be rejected by rounding: neither that of the step, relative to δ, ...
KL_SLACK = 1e-6
#: ... nor that of the KL itself: each of its terms is a difference of numbers near 1, off by some units of rounding.
KL_ROUNDING = 8
#: This may matter as much as a hundredth of δ, not more.
KL_ROUNDING_SHARE = 0.01


class Search(NamedTuple):
    """What :func:`line_search` has done; scalars.

    Attributes:
        fraction (Tensor): of the full step, 0 if it was rejected.
        kl (Tensor): KL divergence after the step, 0 if rejected.
        gain (Tensor): how much the objective rose, 0 if rejected.
        trials (Tensor): how many fractions were tried.
    """

    fraction: Tensor
    kl: Tensor
    gain: Tensor
    trials: Tensor


@torch.no_grad()
def line_search(
    parameters: Sequence[Tensor],
    step: Sequence[Tensor],
    evaluate: Callable[[], tuple[Tensor, Tensor]],
    expected: Tensor,
    kl_bound: Tensor | float,
    trials: int = 10,
    accept_ratio: float = 0.5,
    backtrack_coeff: float = 0.8,
) -> Search:
    r"""The largest fraction f = c^k, k = 0 ... trials - 1, of a step that keeps the KL bound and its promise.

    .. math:: θ = θ_{old} + f Δ: \quad KL ≤ δ (1 + 10^{-6}) + \min(8 u, δ/100), \quad J(θ) - J(θ_{old}) > 0, \quad
        \frac{J(θ) - J(θ_{old})}{f\, g^T Δ} > a

    with u the rounding of the KL's type, 1.2e-7 for float32.

    If no fraction does, or if the step does not ascend (gᵀΔ is not positive), the parameters are put back bit for bit,
    also when ``evaluate`` raises. A NaN or an infinity fails its trial. Each trial waits for its result on the host. On
    a GPU that wait tells too whether the step ascends: one which does not costs an evaluation, but no wait of its own.

    Source: TRPO's search with the constants of the HATRPO authors' code, save the slack, ours: their strict KL < δ
    rejects by rounding a step that lands on δ.

    Args:
        parameters (sequence of Tensor): θ, changed in place.
        step (sequence of Tensor): Δ, of the same shapes.
        evaluate (callable): J(θ) - J(θ_old) and the KL divergence at the present parameters, scalars.
        expected (Tensor): gᵀΔ, what the full step promises, a scalar.
        kl_bound (Tensor or float): δ, in nats.
        trials (int): how many fractions to try.
        accept_ratio (float): a, the share of the promise that must be kept.
        backtrack_coeff (float): c in (0, 1).

    Returns: a :class:`Search`.

    Examples:
        >>> theta = torch.zeros(1)
        >>> search = line_search([theta], [torch.ones(1)], lambda: (theta.sum(), theta.square().sum()),
        ...                      torch.tensor(1.0), kl_bound=0.5)
        >>> search.fraction, theta
        (tensor(0.6400), tensor([0.6400]))
    """
    before = [parameter.detach().clone() for parameter in parameters]
    accepted, zero = False, torch.zeros_like(expected)
    untried = search = Search(zero, zero, zero, zero)
    ascends = expected.isfinite() & (expected > 0)
    if not expected.is_cuda and not ascends:
        return untried
    try:
        for k in range(trials):
            fraction = backtrack_coeff**k
            for parameter, old, change in zip(parameters, before, step, strict=True):
                torch.add(old, fraction * change, out=parameter)
            gain, kl = evaluate()
            kept = (gain > 0) & (gain > accept_ratio * fraction * expected)
            kept = kept & _within(kl, kl_bound) & gain.isfinite() & kl.isfinite()
            tried, accepted = torch.stack([ascends, ascends & kept]).tolist()
            if not tried:
                return untried
            search = Search(zero, zero, zero, zero + k + 1)
            if accepted:
                return Search(zero + fraction, kl, gain, zero + k + 1)
        return search
    finally:
        if not accepted:
            for parameter, old in zip(parameters, before, strict=True):
                parameter.copy_(old)


def _within(kl: Tensor, bound: Tensor | float) -> Tensor:
    """Whether the KL keeps its bound, but for rounding."""
    rounding = KL_ROUNDING * torch.finfo(kl.dtype).eps
    bound = torch.as_tensor(bound, dtype=torch.float64)
    return kl <= bound * (1 + KL_SLACK) + (bound * KL_ROUNDING_SHARE).clamp(max=rounding)
