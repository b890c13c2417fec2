"""Properties of the gains over random inputs."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarl_trust.functional import SURROGATES, reciprocal_gain

ratios = st.floats(-9.0, 9.0)
advantages = st.floats(-100.0, 100.0).filter(lambda a: abs(a) > 1e-3)
epsilons = st.floats(0.01, 0.49)
names = st.sampled_from(sorted(SURROGATES))
bounded = st.sampled_from(sorted(set(SURROGATES) - {"linear"}))  # a linear gain has no trust region of its own


def tensor(x):
    return torch.tensor([x], dtype=torch.float64)


@given(ratios, advantages, epsilons)
def test_the_penalty_of_mars_is_symmetric(x, advantage, epsilon):
    def penalty(x):
        return math.exp(x) * advantage - reciprocal_gain(tensor(x), tensor(advantage), epsilon).item()

    scale = abs(advantage) / epsilon * math.exp(abs(x))
    assert abs(penalty(x) - penalty(-x)) <= 1e-9 * scale
    assert penalty(x) >= -1e-9 * scale


@given(bounded, advantages, epsilons, st.floats(0.01, 60.0))
def test_outside_the_trust_region_nothing_pushes_further_out(name, advantage, epsilon, distance):
    low, high = SURROGATES[name].log_bounds(epsilon, epsilon)
    bound, side = (high, 1) if advantage > 0 else (low, -1)
    x = tensor(bound + side * distance).requires_grad_()
    SURROGATES[name].gain(x, tensor(advantage), epsilon).sum().backward()
    assert x.grad.item() * side <= 0


@given(bounded, ratios, advantages, epsilons)
def test_no_gain_exceeds_that_at_its_optimum(name, x, advantage, epsilon):
    low, high = SURROGATES[name].log_bounds(epsilon, epsilon)
    gain = SURROGATES[name].gain(tensor(x), tensor(advantage), epsilon).item()
    best = SURROGATES[name].gain(tensor(high if advantage > 0 else low), tensor(advantage), epsilon).item()
    assert gain <= best + 1e-9 * abs(advantage) * math.exp(abs(x)) / epsilon


@given(names, ratios, advantages, epsilons, st.floats(0.1, 10.0))
def test_gains_scale_with_the_advantage(name, x, advantage, epsilon, factor):
    gain = SURROGATES[name].gain
    scaled = gain(tensor(x), tensor(factor * advantage), epsilon)
    torch.testing.assert_close(scaled, factor * gain(tensor(x), tensor(advantage), epsilon), rtol=1e-9, atol=1e-9)
