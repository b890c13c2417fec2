"""Conjugate gradients for several symmetric positive definite systems at once, such as one per agent.

Shapes: N systems of P unknowns each; vectors are [N, P].
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: So many computed residuals in a row without progress, and a system has stagnated.
PATIENCE = 5


class Solution(NamedTuple):
    """What :func:`conjugate_gradient` has found.

    Attributes:
        x (Tensor): [N, P].
        residual (Tensor): b - A x, [N, P], so that A x costs no further product.
        iterations (Tensor): how many steps each system took, [N].
        finite (Tensor): False for a system whose right side or product was not finite, or that met a direction
            without positive curvature, [N]. Its x is that of the last good step.
    """

    x: Tensor
    residual: Tensor
    iterations: Tensor
    finite: Tensor


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    iterations: int = 10,
    tolerance: float = 1e-10,
    start: tuple[Tensor, Tensor] | None = None,
    refresh: int = 10,
) -> Solution:
    r"""Solve A_i x_i = b_i for N matrices that are known by their products alone.

    .. math:: α = \frac{r^T p}{p^T A p}, \quad x ← x + α p, \quad r ← r - α A p, \quad
        p ← r + \frac{r_{new}^T r_{new}}{r^T r} p

    A system stops, while the others go on, once rᵀr ≤ tolerance · bᵀb. There is no host round trip: a stopped system
    is held by ``torch.where``, and all iterations are computed. The recursion's residual drifts from b - A x by
    rounding; every ``refresh`` iterations, if more are to come, it is computed anew at the price of a product, and a
    system that proves not to have converged goes on along it. A system also stops, for good, where :data:`PATIENCE`
    times in a row neither that residual has become smaller than ever before nor the objective bᵀx - xᵀA x/2, which each
    exact step raises, larger by more than rounding. On the CPU, where looking costs no wait, the loop ends once all
    have stopped.

    In exact arithmetic rᵀp = rᵀr. Once the residual has been computed anew they differ: α with rᵀp still leads to the
    minimum along p, with rᵀr it may diverge.

    Source: Hestenes & Stiefel 1952. The trust-region reference implementations stop at an absolute rᵀr < 1e-10, which
    depends on the scale of the advantages; relative to bᵀb it does not.

    Args:
        matvec (callable): maps [N, P] to [N, P], row i to A_i times it.
        b (Tensor): right sides, [N, P]. Give float64 where float32 would lose conjugacy.
        iterations (int): how many at most.
        tolerance (float): relative, on the squared residual.
        start (tuple of two Tensors, optional): x and A x to start from; None for zeros.
        refresh (int): iterations from one computed residual to the next.

    Returns: a :class:`Solution`.

    Raises:
        ValueError: if b is not a matrix.

    Examples:
        >>> A = torch.tensor([[[2.0, 1.0], [1.0, 3.0]]], dtype=torch.float64)
        >>> solution = conjugate_gradient(lambda v: torch.einsum("nij,nj->ni", A, v), A[:, 0])
        >>> solution.x.round(decimals=6)
        tensor([[1., 0.]], dtype=torch.float64)
    """
    if b.ndim != 2:
        raise ValueError(f"b has shape {tuple(b.shape)}; it must be [systems, unknowns]: unsqueeze(0) a single system.")
    x, product = (torch.zeros_like(b), torch.zeros_like(b)) if start is None else start
    residual = b - product
    direction, squared = residual, _dot(residual, residual)
    threshold = tolerance * _dot(b, b)
    finite = squared.isfinite() & threshold.isfinite()
    steps = torch.zeros_like(squared)
    idle, least, highest = torch.zeros_like(squared), squared, _dot(x, b + residual)  # twice the objective
    for k in range(1, iterations + 1):
        product = matvec(direction)
        curvature = _dot(direction, product)
        wanted = finite & (idle < PATIENCE) & (squared > threshold)
        finite = torch.where(wanted, (curvature > 0) & (curvature < math.inf), finite)
        active = wanted & finite
        held = ~active
        length = (_dot(residual, direction) / curvature).masked_fill(held, 0).unsqueeze(-1)
        still = held.unsqueeze(-1)  # what is held has products that may not be finite
        x = torch.where(still, x, x.addcmul(length, direction))
        residual = torch.where(still, residual, residual.addcmul(length, product, value=-1))
        previous, squared = squared, _dot(residual, residual)
        momentum = (squared / previous).masked_fill(held, 0).unsqueeze(-1)
        if k % refresh == 0 and k < iterations:
            computed = b - matvec(x)
            finite = finite & _dot(computed, computed).isfinite()
            residual = torch.where(finite.unsqueeze(-1), computed, residual)
            squared, objective = _dot(residual, residual), _dot(x, b + residual)
            better = (squared < least) | (objective - highest > torch.finfo(b.dtype).eps * objective.abs())
            idle = torch.where(better & (idle < PATIENCE), 0, idle + 1)
            least, highest = torch.minimum(least, squared), torch.maximum(highest, objective)
            if b.device.type == "cpu" and not (finite & (idle < PATIENCE) & (squared > threshold)).any():
                break
        direction = residual.addcmul(momentum, direction)
        steps = steps + active
    return Solution(x, residual, steps, finite)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
