"""The gains: closed-form values, their trust regions, their behaviour far outside."""

import math

import pytest
import torch

from benchmarl_trust.functional import SURROGATES, check_surrogate, log_ratio
from benchmarl_trust.functional.surrogate import LINEAR_BEYOND

ALL = sorted(SURROGATES)
PENALTIES = ["log", "quadratic", "reciprocal"]


def force(name, x, advantage, epsilon=0.2):
    """The slope of the gain in the log-ratio, r dL/dr, by autograd."""
    x = torch.as_tensor(x, dtype=torch.float64).requires_grad_()
    advantage = torch.full_like(x, advantage)
    return torch.autograd.grad(SURROGATES[name].gain(x, advantage, epsilon).sum(), x)[0]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("advantage", [-3.0, 0.5])
def test_slope_at_ratio_one_is_the_advantage(name, advantage):
    torch.testing.assert_close(force(name, [0.0], advantage), torch.tensor([advantage], dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "epsilon", "optimum_up", "optimum_down"),
    [
        ("quadratic", 0.2, 1.2, 0.8),
        ("reciprocal", 0.2, 1 / math.sqrt(0.6), 1 / math.sqrt(1.4)),
        ("reciprocal", 0.2, 1.2910, 0.8452),
        ("reciprocal", 0.1, 1.118, 0.913),
        ("log", 0.2, math.exp(0.2), math.exp(-0.2)),
    ],
)
def test_stationary_points(name, epsilon, optimum_up, optimum_down):
    low, high = SURROGATES[name].log_bounds(epsilon, epsilon)
    assert math.exp(high) == pytest.approx(optimum_up, abs=5e-4)
    assert math.exp(low) == pytest.approx(optimum_down, abs=5e-4)
    assert force(name, [high], 2.0, epsilon).abs() < 1e-12
    assert force(name, [low], -2.0, epsilon).abs() < 1e-12
    # The force points back to the optimum from both of its sides.
    for bound, advantage in ((high, 2.0), (low, -2.0)):
        below, above = force(name, [bound - 0.05, bound + 0.05], advantage, epsilon)
        assert below > 0 > above


def test_logit_force_of_collapsed_and_exploded_ratios():
    log = math.log
    assert force("clip", [log(0.001)], -1.0) == 0
    assert force("quadratic", [log(0.001)], -1.0).item() == pytest.approx(0.004, abs=1e-4)
    assert force("reciprocal", [log(0.001)], -1.0).item() == pytest.approx(2500, rel=1e-3)
    assert force("reciprocal", [log(0.1)], -1.0).item() == pytest.approx(24.65, abs=0.05)
    for name in PENALTIES:
        assert force(name, [log(100.0)], 1.0) < 0


def test_reciprocal_penalty_is_symmetric_and_does_not_cancel():
    x = torch.tensor([1e-6, 1e-3, 0.5, 3.0], dtype=torch.float32)
    one = torch.ones_like(x)

    def penalty(x):
        return (x.exp() * one - SURROGATES["reciprocal"].gain(x, one, 0.2)).double()

    torch.testing.assert_close(penalty(x), penalty(-x), rtol=1e-5, atol=1e-7)
    # Where r + 1/r - 2 cancels to nothing in float32, 4 sinh²(x/2) keeps its digits: the gain less r A, at A = 1e12.
    x, huge = torch.tensor([1e-5]), torch.tensor([1e12])
    lost = SURROGATES["reciprocal"].gain(x.double(), huge.double(), 0.2) - x.double().exp() * huge
    assert lost.item() == pytest.approx(-2.5e12 * 1e-10, rel=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_gradient_by_finite_differences(name):
    x = torch.linspace(-14.9, 14.9, 150, dtype=torch.float64)
    low, high = SURROGATES[name].log_bounds(0.2, 0.2)
    kinks = torch.tensor([low, high, LINEAR_BEYOND, -LINEAR_BEYOND])
    x = x[(x[:, None] - kinks).abs().min(1).values > 1e-3].requires_grad_()
    for advantage in (-2.0, 0.7):
        gain = lambda x, a=advantage: SURROGATES[name].gain(x, torch.full_like(x, a), 0.2)  # noqa: E731
        (slope,) = torch.autograd.grad(gain(x).sum(), x)
        with torch.no_grad():
            finite = (gain(x + 1e-6) - gain(x - 1e-6)) / 2e-6
        torch.testing.assert_close(slope, finite, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("advantage", [-1e6, -1.0, 0.0, 1.0, 1e6])
def test_extremes_are_finite(name, dtype, advantage):
    x = torch.tensor([-258.0, -50.0, -1.0, 0.0, 1.0, 50.0, 258.0], dtype=dtype, requires_grad=True)
    gain = SURROGATES[name].gain(x, torch.full_like(x, advantage).detach(), 0.2)
    (slope,) = torch.autograd.grad(gain.sum(), x)
    assert gain.isfinite().all()
    assert slope.isfinite().all()


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_outliers_are_always_pulled_back(name, advantage):
    far = torch.tensor([3.0, 9.9, 10.1, 11.0, 20.0, 50.0])
    assert (force(name, far, advantage) < 0).all()
    assert (force(name, -far, advantage) > 0).all()


@pytest.mark.parametrize("name", ALL)
def test_continuation_is_smooth(name):
    edge = torch.tensor([-10 - 1e-9, -10 + 1e-9, 10 - 1e-9, 10 + 1e-9], dtype=torch.float64)
    gain = SURROGATES[name].gain(edge, torch.full_like(edge, -1.0), 0.2)
    slope = force(name, edge, -1.0)
    torch.testing.assert_close(gain[::2], gain[1::2], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(slope[::2], slope[1::2], rtol=1e-6, atol=1e-9)


def test_clip_is_the_minimum_of_ppo():
    torch.manual_seed(0)
    x, advantage = torch.randn(2, 1000, dtype=torch.float64)
    ratio = x.exp()
    expected = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    torch.testing.assert_close(SURROGATES["clip"].gain(x, advantage, 0.2), expected)


@pytest.mark.parametrize("name", ALL)
def test_epsilon_by_sample(name):
    x, advantage = torch.tensor([0.5, 0.5]), torch.tensor([1.0, -1.0])
    both = SURROGATES[name].gain(x, advantage, torch.tensor([0.1, 0.3]))
    for i, epsilon in enumerate((0.1, 0.3)):
        torch.testing.assert_close(both[i], SURROGATES[name].gain(x, advantage, epsilon)[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_a_pair_of_epsilons_goes_by_the_sign_of_the_advantage(name, dtype):
    """Gain and slope are, bit for bit, those of a tensor of epsilons and, where all signs are alike, those of a number.

    Only the clip's log(1 ± ε) of a number is rounded once, and may be off by a unit.
    """
    torch.manual_seed(0)
    x, advantage = torch.randn(2, 500, dtype=dtype)
    advantage[::50] = 0
    negative = advantage < 0

    def check_equal(epsilon, other, rows=slice(None), tolerance=0.0):
        results = []
        for value in (epsilon, other):
            part = x[rows].clone().requires_grad_()
            gain = SURROGATES[name].gain(part, advantage[rows], value)
            results.append((gain.detach(), *torch.autograd.grad(gain.sum(), part)))
        torch.testing.assert_close(*results, rtol=tolerance, atol=0)

    each = torch.full_like(advantage, 0.3).masked_fill(negative, 0.1)
    check_equal((0.1, 0.3), each)
    check_equal((0.2, 0.2), 0.2)
    unit = 2 * torch.finfo(dtype).eps if name == "clip" else 0.0
    check_equal((0.1, 0.3), 0.1, negative, unit)
    check_equal((0.1, 0.3), 0.3, ~negative, unit)
    if name != "linear":
        with pytest.raises(AssertionError):
            check_equal((0.1, 0.3), 0.3, tolerance=1e-3)


@pytest.mark.parametrize("epsilon", [0.0, -0.1, float("nan")])
@pytest.mark.parametrize("name", ALL)
def test_epsilon_must_be_positive(name, epsilon):
    with pytest.raises(ValueError, match="radius"):
        check_surrogate(name, epsilon, key="radius")


@pytest.mark.parametrize(("name", "epsilon"), [("reciprocal", 0.5), ("clip", 1.0), ("quadratic", 1.5)])
def test_epsilon_must_leave_an_optimum(name, epsilon):
    with pytest.raises(ValueError, match="optimal ratio"):
        check_surrogate(name, epsilon)


def test_unknown_surrogate():
    with pytest.raises(ValueError, match="clip, quadratic, reciprocal, log"):
        check_surrogate("cubic", 0.2)


def test_log_ratio_refuses_what_would_broadcast():
    with pytest.raises(ValueError, match="Shapes differ"):
        log_ratio(torch.zeros(3), torch.zeros(3, 1))


@pytest.mark.parametrize("advantage", [-1.5, 0.0, 2.0])
@pytest.mark.parametrize("epsilon", [0.2, (0.1, 0.3)], ids=["one radius", "two radii"])
@pytest.mark.parametrize("name", ALL)
def test_slopes_are_those_of_the_values(name, epsilon, advantage):
    def gain(x):
        return SURROGATES[name].gain(x, torch.full_like(x, advantage), epsilon)

    x = torch.linspace(-14, 14, 98, dtype=torch.float64)  # none at a kink
    slope = force(name, x, advantage, epsilon)
    difference = (gain(x + 1e-6) - gain(x - 1e-6)) / 2e-6
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.func.grad(lambda x: gain(x).sum())(x), slope)
    assert torch.equal(torch.func.vmap(torch.func.grad(gain))(x), slope)


@pytest.mark.parametrize("name", [name for name in SURROGATES if name != "log"])  # log's operations are autograd's
def test_a_second_derivative_is_refused_and_not_wrong(name):
    """A gradient penalty, say: what the gain would leave out of it is silent otherwise."""
    theta = torch.tensor([0.2, -0.1], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=torch.float64) @ theta.tanh()
    gain = SURROGATES[name].gain(x, torch.tensor([1.0, -2.0], dtype=torch.float64), 0.2)
    (slope,) = torch.autograd.grad(gain.sum(), theta, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        slope.square().sum().backward()
