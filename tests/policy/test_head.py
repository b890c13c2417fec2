"""What is known of the distributions."""

import pytest
import torch
from problems import make_agents, make_problem

from benchmarl_trust.policy import forward, kl_of, kl_product_of


@pytest.mark.parametrize("absent", [False, True], ids=["all present", "some absent"])
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("distribution", ["tanh", "normal", "categorical", "masked"])
def test_the_hessian_of_the_kl_in_closed_form_is_the_second_derivative(distribution, shared, absent):
    agent = make_agents(make_problem(distribution=distribution, shared=shared, rows=8))[1]
    if absent:
        agent.data["mask"] = torch.arange(8) % 3 > 0
    here = forward(agent, agent.data)
    floats = tuple(x for x in here if x.is_floating_point())  # an action mask is none

    def kl(*now):
        return kl_of(agent.policy, here, now + here[len(floats) :], agent.data)

    hessian = torch.autograd.functional.hessian(kl, floats)
    vectors = [torch.randn_like(x) for x in floats]
    product = kl_product_of(agent.policy, here, agent.data)([*vectors, *[None] * (len(here) - len(floats))])
    for row, got in zip(hessian, product, strict=False):
        expected = sum(torch.tensordot(h, v, v.ndim) for h, v in zip(row, vectors, strict=True))
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
