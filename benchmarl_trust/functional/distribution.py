"""Log-probs, entropies and divergences of the policies' distributions, as functions of their parameters.

Building a distribution object for every optimizer step costs as much as a small network; these functions are what
is left of one. A squashed normal (TanhNormal) is handled through its base normal: the squashing is a bijection, so it
drops out of ratios and leaves the KL divergence unchanged.

Shapes: [*] any batch dimensions, D the action dimensions, K the number of discrete actions. ``loc`` and ``scale`` are
[*, D], ``log_probs`` (normalised log-probabilities of all actions) [*, K]; results are [*], summed over D.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx


def normal_log_prob(loc: Tensor, scale: Tensor, value: Tensor) -> Tensor:
    r"""Log-density of independent normals, :math:`\sum_d -\frac12 z_d^2 - \log σ_d - \frac12 \log 2π`.

    Args:
        loc (Tensor): means, [*, D].
        scale (Tensor): standard deviations, [*, D].
        value (Tensor): [*, D].

    Returns: [*], in nats.

    Examples:
        >>> normal_log_prob(torch.zeros(2), torch.ones(2), torch.zeros(2)).round(decimals=4)
        tensor(-1.8379)
    """
    return _NormalLogProb.apply(*torch.broadcast_tensors(loc, scale, value))


class _NormalLogProb(torch.autograd.Function):
    """The log-density with its own derivatives, in half of autograd's operations. Of all orders."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loc: Tensor, scale: Tensor, value: Tensor) -> Tensor:
        standard = (value - loc) / scale
        return (-0.5 * standard.square() - scale.log()).sum(-1) - 0.5 * math.log(2 * math.pi) * loc.shape[-1]

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: BackwardCFunction, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        # To torch's stubs these are tuples of one.
        loc, scale, value = ctx.saved_tensors  # pyright: ignore[reportAssignmentType]
        standard = (value - loc) / scale
        per_scale = gradient.unsqueeze(-1) / scale
        to_loc = per_scale * standard
        wanted = ctx.needs_input_grad[2]  # pyright: ignore[reportGeneralTypeIssues]
        return to_loc, to_loc * standard - per_scale, -to_loc if wanted else None


def normal_kl(old_loc: Tensor, old_scale: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    r"""KL(old ‖ new) of independent normals.

    .. math:: \sum_d \log\frac{σ_d}{σ^{old}_d} + \frac{(σ^{old}_d)^2 + (μ^{old}_d - μ_d)^2}{2 σ_d^2} - \frac12

    Args:
        old_loc (Tensor): [*, D].
        old_scale (Tensor): [*, D].
        loc (Tensor): [*, D].
        scale (Tensor): [*, D].

    Returns: [*], in nats.

    Examples:
        >>> normal_kl(torch.zeros(1), torch.ones(1), torch.ones(1), torch.ones(1))
        tensor(0.5000)
    """
    ratio = (old_scale / scale).square()
    shift = ((old_loc - loc) / scale).square()
    return 0.5 * (ratio + shift - 1 - ratio.log()).sum(-1)


def normal_kl_curvature(scale: Tensor) -> tuple[Tensor, Tensor]:
    r"""The Hessian of KL(old ‖ ·) in (loc, scale) at the old normal itself, which is diagonal.

    .. math:: \frac{\partial^2 KL}{\partial μ_d^2} = \frac{1}{σ_d^2}, \qquad
        \frac{\partial^2 KL}{\partial σ_d^2} = \frac{2}{σ_d^2}

    Args:
        scale (Tensor): [*, D].

    Returns: its entries for loc and for scale, each [*, D].

    Examples:
        >>> normal_kl_curvature(torch.tensor([0.5]))
        (tensor([4.]), tensor([8.]))
    """
    precision = scale.square().reciprocal()
    return precision, 2 * precision


def squashed_normal_entropy(loc: Tensor, scale: Tensor, log_half_width: Tensor, noise: Tensor) -> Tensor:
    r"""An unbiased one-sample estimate of the entropy of a normal squashed by tanh into an interval.

    .. math:: -\log \mathcal N(z; μ, σ) + \sum_d \log(1 - \tanh^2 z_d) + \log\frac{high_d - low_d}{2}, \qquad
        z = μ + σ \, noise

    The entropy has no closed form. The estimate is differentiable in loc and scale (reparameterised).

    Args:
        loc (Tensor): means before squashing, [*, D].
        scale (Tensor): standard deviations before squashing, [*, D].
        log_half_width (Tensor): log((high - low)/2) of the interval, broadcasting against [D].
        noise (Tensor): standard normal, [*, D].

    Returns: [*], in nats.

    Examples:
        >>> squashed_normal_entropy(torch.zeros(1), torch.ones(1), torch.zeros(1), torch.zeros(1)).round(decimals=4)
        tensor(0.9189)
    """
    sample = loc + scale * noise
    # log(1 - tanh² z) without its cancellation for large |z|
    log_slope = 2 * (math.log(2) - sample - torch.nn.functional.softplus(-2 * sample))
    return (log_slope + log_half_width).sum(-1) - normal_log_prob(loc, scale, sample)


def categorical_log_probs(logits: Tensor, action_mask: Tensor | None = None) -> Tensor:
    """Normalised log-probabilities; -inf for actions that the mask forbids.

    Args:
        logits (Tensor): [*, K].
        action_mask (Tensor, optional): boolean, [*, K], True where allowed. A row that allows nothing (an absent
            agent's) is taken as allowing everything, so that it gives no NaN.

    Returns: [*, K].

    Examples:
        >>> categorical_log_probs(torch.zeros(3), torch.tensor([True, False, True])).exp()
        tensor([0.5000, 0.0000, 0.5000])
    """
    if action_mask is not None:
        logits = logits.masked_fill(~(action_mask | ~action_mask.any(-1, keepdim=True)), -torch.inf)
    return logits.log_softmax(-1)


def categorical_log_prob(log_probs: Tensor, action: Tensor) -> Tensor:
    """Log-probability of an action.

    Args:
        log_probs (Tensor): [*, K].
        action (Tensor): integer, [*].

    Returns: [*], in nats.

    Examples:
        >>> categorical_log_prob(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([1])).exp()
        tensor([0.7500])
    """
    return log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)


def categorical_entropy(log_probs: Tensor) -> Tensor:
    r"""Entropy :math:`-\sum_a p_a \log p_a`; forbidden actions count 0.

    Args:
        log_probs (Tensor): [*, K].

    Returns: [*], in nats.

    Examples:
        >>> categorical_entropy(torch.full((4,), 0.25).log())
        tensor(1.3863)
    """
    return -(log_probs.exp() * _finite(log_probs)).sum(-1)


def categorical_kl(old_log_probs: Tensor, log_probs: Tensor) -> Tensor:
    r"""KL(old ‖ new) :math:`= \sum_a π_{old} (\log π_{old} - \log π)` over the allowed actions.

    Args:
        old_log_probs (Tensor): [*, K].
        log_probs (Tensor): [*, K], with the same mask.

    Returns: [*], in nats.

    Examples:
        >>> categorical_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log())
        tensor(0.1438)
    """
    return (old_log_probs.exp() * (_finite(old_log_probs) - _finite(log_probs))).sum(-1)


def categorical_kl_product(probs: Tensor, vector: Tensor) -> Tensor:
    r"""The Hessian of KL(old ‖ ·) in the logits at the old logits themselves, times a vector.

    .. math:: H v = p ⊙ (v - \textstyle\sum_a p_a v_a), \qquad H = \mathrm{diag}(p) - p p^T

    Forbidden actions have p = 0, so their logits have no part in it.

    Args:
        probs (Tensor): p, [*, K].
        vector (Tensor): v, finite, [*, K].

    Returns: H v, [*, K].

    Examples:
        >>> categorical_kl_product(torch.tensor([0.25, 0.75]), torch.tensor([1.0, 0.0]))
        tensor([ 0.1875, -0.1875])
    """
    return probs * (vector - (probs * vector).sum(-1, keepdim=True))


def _finite(log_probs: Tensor) -> Tensor:
    """Forbidden actions have probability 0 and log-probability -inf: their product counts 0, not NaN."""
    return log_probs.masked_fill(log_probs == -torch.inf, 0)
