"""Surrogate gains: what one sample contributes to the policy objective.

Every objective of this package is ``weight * gain(log_ratio, advantage)``, averaged. A gain is a pure
elementwise function; it knows nothing of networks, batches or agents. It can be differentiated once, in the log-ratio:
its slope is computed along with its value, which takes a fraction of autograd's operations.

Shapes: ``log_ratio`` and ``advantage`` have the same shape, any shape. Units: ``log_ratio`` is
``log π_θ(a|o) - log π_old(a|o)`` in nats, summed over action dimensions; ``advantage`` is in units of return.
``epsilon`` is the radius of the trust region: a float; a pair (ε where A < 0, ε where A ≥ 0); or a tensor that
broadcasts against ``advantage``.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from benchmarl_trust.functional.checks import check_same_shape
from benchmarl_trust.functional.ratio import masked_mean

#: From this log-ratio on, before its exponentials overflow, a gain goes on linearly; the reciprocal one on both sides.
#: exp(10) = 22026 is far outside any trust region, while the square of a ratio leaves float32 at a log-ratio of 44.
LINEAR_BEYOND = 10.0

#: A radius, or a pair of them: (where A < 0, where A ≥ 0).
Epsilon = float | tuple[float, float] | Tensor


def radius(epsilon: Epsilon, advantage: Tensor) -> float | Tensor:
    """The radius of each sample's trust region.

    A pair is spread over the samples on their own device: nothing is copied from the host.

    Args:
        epsilon (float, pair of floats or Tensor): ε; a pair is (ε where A < 0, ε where A ≥ 0).
        advantage (Tensor): A, any shape.

    Returns: a number, or a tensor that broadcasts against the advantage.

    Examples:
        >>> radius((0.1, 0.3), torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.1000, 0.3000, 0.3000])
    """
    if not isinstance(epsilon, tuple):
        return epsilon
    negative, positive = epsilon
    if negative == positive:
        return positive
    return torch.full_like(advantage, negative).masked_fill(advantage >= 0, positive)


def linear_gain(log_ratio: Tensor, advantage: Tensor, epsilon: Epsilon) -> Tensor:
    r"""The importance-weighted advantage, :math:`L = r A`, without any bound: a KL bound must come from elsewhere.

    Like the others it goes on linearly from a log-ratio of 10 on.

    Source: the surrogate of TRPO (Schulman et al. 2015, arXiv 1502.05477) and HATRPO (Kuba et al. 2022).

    Args:
        log_ratio (Tensor): x, any shape.
        advantage (Tensor): A, the same shape.
        epsilon (float, pair or Tensor): not used; all gains are called alike.

    Returns: the gain, to be maximised, in the shape of ``log_ratio``.

    Examples:
        >>> linear_gain(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0]), 0.2)
        tensor([2.0000, 5.4366])
    """
    with torch.no_grad():
        inner = log_ratio.clamp(max=LINEAR_BEYOND)
        slope = inner.exp() * advantage
        value = slope * (1 + log_ratio - inner)
    return _WithSlope.apply(log_ratio, value, slope)


def clip_gain(log_ratio: Tensor, advantage: Tensor, epsilon: Epsilon) -> Tensor:
    r"""The clipped gain of PPO.

    .. math:: L = \min(r A,\ \mathrm{clip}(r, 1-ε, 1+ε) A), \qquad r = e^x

    Source: Schulman et al. 2017, arXiv 1707.06347, eq. 7 (the authors' formula).

    Args:
        log_ratio (Tensor): x, any shape.
        advantage (Tensor): A, the same shape.
        epsilon (float, pair or Tensor): ε in (0, 1).

    Returns: the gain, to be maximised, in the shape of ``log_ratio``.

    Examples:
        >>> clip_gain(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0]), 0.2)
        tensor([2.0000, 2.4000])
    """
    epsilon = radius(epsilon, advantage)
    high, low = _log1p(epsilon), _log1p(-epsilon)

    with torch.no_grad():
        # The minimum is r A with the ratio capped on the side towards which A pushes it.
        bounded = torch.where(advantage >= 0, log_ratio.clamp(max=high), log_ratio.clamp(min=low))
        slope = bounded.clamp(max=LINEAR_BEYOND).exp() * advantage
        value = slope * (1 + (bounded - LINEAR_BEYOND).clamp(min=0))
        slope = slope * (bounded == log_ratio)
    return _WithSlope.apply(log_ratio, value, slope)


def quadratic_gain(log_ratio: Tensor, advantage: Tensor, epsilon: Epsilon) -> Tensor:
    r"""MASPO: the clip replaced by a quadratic penalty on the ratio.

    .. math:: L = r A - \frac{|A|}{2ε} (r - 1)^2, \qquad r = e^x

    Its maximum over r lies at 1 + ε for A > 0 and at 1 - ε for A < 0. At r = 0 the penalty is finite and its
    pull on the log-ratio vanishes, which is what MARS mends.

    Source: the formula is SPO's (Xie et al., arXiv 2401.16025, the authors'). Its use with the per-agent
    ratio and the joint advantage is reconstructed from the abstract of arXiv 2605.09212.

    Args:
        log_ratio (Tensor): x, any shape.
        advantage (Tensor): A, the same shape.
        epsilon (float, pair or Tensor): ε in (0, 1).

    Returns: the gain, to be maximised, in the shape of ``log_ratio``.

    Examples:
        >>> quadratic_gain(torch.tensor([1.0, 1.2]).log(), torch.ones(2), 0.2)
        tensor([1.0000, 1.1000])
    """
    strength = advantage.abs() / (2 * radius(epsilon, advantage))

    def value_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
        ratio = x.exp()
        away = ratio - 1
        return ratio * advantage - strength * away.square(), ratio * (advantage - 2 * strength * away)

    return _linear_beyond(value_and_slope, log_ratio, low=-math.inf)


def reciprocal_gain(log_ratio: Tensor, advantage: Tensor, epsilon: Epsilon) -> Tensor:
    r"""MARS: a penalty that is symmetric under r → 1/r and unbounded at r = 0.

    .. math:: L = r A - \frac{|A|}{2ε} \left(r + \frac1r - 2\right)
                = r A - \frac{2|A|}{ε} \sinh^2\frac x2, \qquad r = e^x

    Derivation. The abstract of arXiv 2605.09212 asks for a penalty f with f(r) = f(1/r), f → ∞ as r → 0, and
    a corrective gradient that outliers keep. r + 1/r - 2 is the simplest rational function with f(1) = f'(1) = 0
    that does; f''(1) = 2 equals that of (r - 1)², so c = 1/(2ε) is the same stiffness at r = 1 as in MASPO.
    Setting ∂L/∂r = A - \|A\|/(2ε) (1 - 1/r²) to zero puts the maximum at 1/√(1 - 2ε) for A > 0 and at
    1/√(1 + 2ε) for A < 0; the first exists only for ε < 1/2.

    Source: reconstructed from the abstract; the body of the paper was not available.

    Args:
        log_ratio (Tensor): x, any shape.
        advantage (Tensor): A, the same shape.
        epsilon (float, pair or Tensor): ε in (0, 0.5).

    Returns: the gain, to be maximised, in the shape of ``log_ratio``.

    Examples:
        >>> x = torch.tensor([-7.0, 0.0, 7.0], requires_grad=True)
        >>> reciprocal_gain(x, -torch.ones(3), 0.2).sum().backward()
        >>> (x.grad > 0).tolist()  # a collapsed ratio is pulled back up, although A < 0
        [True, False, False]
    """
    twice_strength = advantage.abs() / radius(epsilon, advantage)

    def value_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
        linear = x.exp() * advantage
        penalty = 2 * (x / 2).sinh().square()  # half of 4 sinh²(x/2) = r + 1/r - 2, without its cancellation near r = 1
        return linear - twice_strength * penalty, linear - twice_strength * x.sinh()

    return _linear_beyond(value_and_slope, log_ratio, low=-LINEAR_BEYOND)


def log_gain(log_ratio: Tensor, advantage: Tensor, epsilon: Epsilon) -> Tensor:
    r"""The quadratic in the log-ratio, an ablation of MARS.

    .. math:: L = A x - \frac{|A|}{2ε} x^2

    It replaces the ratio by its logarithm in both terms, so it is symmetric and unbounded at both ends; its
    maximum lies at x = ±ε. It is no importance-weighted objective: only its gradient at r = 1 is that of r A.

    Source: reconstructed, as an ablation.

    Args:
        log_ratio (Tensor): x, any shape.
        advantage (Tensor): A, the same shape.
        epsilon (float, pair or Tensor): ε > 0.

    Returns: the gain, to be maximised, in the shape of ``log_ratio``.

    Examples:
        >>> log_gain(torch.tensor([0.2]), torch.tensor([1.0]), 0.2)
        tensor([0.1000])
    """
    return advantage * log_ratio - advantage.abs() / (2 * radius(epsilon, advantage)) * log_ratio.square()


class Surrogate(NamedTuple):
    """A gain with the trust region that its maxima draw."""

    gain: Callable[[Tensor, Tensor, Epsilon], Tensor]
    """The gain as a function of (log_ratio, advantage, epsilon)."""
    log_bounds: Callable[[float, float], tuple[float, float]]
    """The log-ratios of its maxima for A < 0 and A > 0, from (epsilon at A < 0, epsilon at A > 0)."""
    epsilon_limit: float
    """The smallest ε for which these maxima are lost: ε must be smaller."""


def _interval_bounds(low: float, high: float) -> tuple[float, float]:
    return math.log1p(-low) if low < 1 else -math.inf, math.log1p(high)


#: The gains, by the name that the key ``surrogate`` takes.
SURROGATES: dict[str, Surrogate] = {
    "clip": Surrogate(clip_gain, _interval_bounds, 1.0),
    "quadratic": Surrogate(quadratic_gain, _interval_bounds, 1.0),
    "reciprocal": Surrogate(
        reciprocal_gain,
        lambda low, high: (-math.log1p(2 * low) / 2, -math.log1p(-2 * high) / 2),
        0.5,
    ),
    "log": Surrogate(log_gain, lambda low, high: (-low, high), math.inf),
    "linear": Surrogate(linear_gain, lambda low, high: (-math.inf, math.inf), math.inf),
}


def weighted_gain(
    name: str, log_ratio: Tensor, advantage: Tensor, weight: Tensor | float, epsilon: Epsilon, shift: Tensor | None
) -> Tensor:
    r"""What each sample contributes, :math:`w · \mathrm{gain}(x + \log g, A)`.

    Args:
        name (str): a key of :data:`SURROGATES`.
        log_ratio (Tensor): x, any shape.
        advantage (Tensor): A, the same shape.
        weight (Tensor or float): w, broadcasting against them.
        epsilon (float, pair or Tensor): ε.
        shift (Tensor, optional): log g, broadcasting against them: a factor inside the gain; None: g = 1.

    Returns: the shape of ``log_ratio``, to be maximised.

    Examples:
        >>> weighted_gain("clip", torch.zeros(2), torch.ones(2), 0.5, 0.2, torch.tensor([0.0, 1.0]))
        tensor([0.5000, 0.6000])
    """
    shifted = log_ratio if shift is None else log_ratio + shift
    return weight * SURROGATES[name].gain(shifted, advantage, epsilon)


def share_outside(name: str, log_ratio: Tensor, epsilon: tuple[float, float], mask: Tensor | None = None) -> Tensor:
    """The share of ratios beyond the optima of a surrogate: for ``clip``, outside [1 - ε, 1 + ε].

    Args:
        name (str): a key of :data:`SURROGATES`.
        log_ratio (Tensor): x, any shape.
        epsilon (pair of floats): ε where A < 0, where A ≥ 0.
        mask (Tensor, optional): boolean, the same shape.

    Returns: a scalar.

    Examples:
        >>> share_outside("clip", torch.tensor([0.7, 1.0, 1.1, 1.3]).log(), (0.2, 0.2))
        tensor(0.5000)
    """
    return masked_mean(is_outside(name, log_ratio, epsilon).to(log_ratio.dtype), mask)


def is_outside(name: str, log_ratio: Tensor, epsilon: tuple[float, float]) -> Tensor:
    """Which ratios lie beyond the optima of a surrogate, boolean.

    Args:
        name (str): a key of :data:`SURROGATES`.
        log_ratio (Tensor): x, any shape.
        epsilon (pair of floats): ε where A < 0, where A ≥ 0.

    Returns: the shape of ``log_ratio``.

    Examples:
        >>> is_outside("clip", torch.tensor([0.7, 1.0]).log(), (0.2, 0.2))
        tensor([ True, False])
    """
    return log_ratio != log_ratio.clamp(*SURROGATES[name].log_bounds(*epsilon))


def surrogate_objective(
    name: str,
    log_ratio: Tensor,
    advantage: Tensor,
    weight: Tensor,
    epsilon: Epsilon,
    mask: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    r"""One agent's objective, :math:`\operatorname{mean}(w · \mathrm{gain}(x + \log g, A))` over the steps where it is
    present.

    Args:
        name (str): a key of :data:`SURROGATES`.
        log_ratio (Tensor): x, any shape; 0 where absent.
        advantage (Tensor): A, the same shape.
        weight (Tensor): w, the same shape.
        epsilon (float, pair or Tensor): ε.
        mask (Tensor, optional): boolean, the same shape.
        shift (Tensor, optional): log g, the same shape: a factor inside the gain; None: g = 1.

    Returns: a scalar, to be maximised.

    Raises:
        ValueError: if the shapes differ.

    Examples:
        >>> surrogate_objective("linear", torch.zeros(2), torch.tensor([1.0, 3.0]), torch.ones(2), 0.2)
        tensor(2.)
    """
    check_same_shape(log_ratio=log_ratio, advantage=advantage, weight=weight)
    if shift is not None:
        check_same_shape(log_ratio=log_ratio, shift=shift)
    return masked_mean(weighted_gain(name, log_ratio, advantage, weight, epsilon, shift), mask)


def check_surrogate(name: str, epsilon: object, key: str = "epsilon") -> None:
    """Refuse an unknown surrogate, or an ε for which its trust region does not exist.

    Args:
        name (str): a key of :data:`SURROGATES`.
        epsilon (float or pair of floats): ε, the radius of the trust region.
        key (str): what the error calls ε.

    Raises:
        ValueError: naming the key, the reason and a value that works.

    Examples:
        >>> check_surrogate("reciprocal", 0.2)
    """
    if name not in SURROGATES:
        raise ValueError(f"Unknown surrogate {name!r}: choose one of {', '.join(SURROGATES)}.")
    limit = SURROGATES[name].epsilon_limit
    for value in epsilon if isinstance(epsilon, tuple) else (epsilon,):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < limit:
            raise ValueError(
                f"{key}={value}: the {name} surrogate needs 0 < {key} < {limit}, where its optimal ratio "
                f"exists. The usual value is {key}=0.2."
            )


def _linear_beyond(
    value_and_slope: Callable[[Tensor], tuple[Tensor, Tensor]],
    log_ratio: Tensor,
    low: float,
) -> Tensor:
    """Continue a gain below ``low`` and above LINEAR_BEYOND with the value and the slope it has there.

    Clamping the log-ratio alone would drop the gradient of just those samples that must be pulled back.
    """
    with torch.no_grad():
        inner = log_ratio.clamp(low, LINEAR_BEYOND)
        value, slope = value_and_slope(inner)
        value = value + slope * (log_ratio - inner)
    return _WithSlope.apply(log_ratio, value, slope)


class _WithSlope(torch.autograd.Function):
    """``value``, whose derivative in ``x`` is ``slope``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[2])

    @staticmethod
    def backward(ctx: BackwardCFunction, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, slope = ctx.saved_tensors  # pyright: ignore[reportAssignmentType] to torch's stubs a tuple of one
        return _Once.apply(gradient * slope, x), None, None


class _Once(torch.autograd.Function):
    """The gradient of a gain, which does not know how it depends on ``x``: a second derivative would be wrong."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, x: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: BackwardCFunction, gradient: Tensor) -> NoReturn:
        raise RuntimeError("A gain can be differentiated once: its second derivative is not computed.")


def _log1p(x: float | Tensor) -> float | Tensor:
    return x.log1p() if isinstance(x, Tensor) else math.log1p(x)
