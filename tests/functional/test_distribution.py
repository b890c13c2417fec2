"""Derivatives that are computed by hand."""

import torch

from benchmarl_trust import functional as F


def test_derivatives_of_the_normal_log_prob_of_all_orders():
    torch.manual_seed(0)
    loc, value = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = (torch.rand(3, dtype=torch.float64) + 0.5).requires_grad_()  # one for all samples
    assert torch.autograd.gradcheck(F.normal_log_prob, (loc, scale, value))
    assert torch.autograd.gradgradcheck(F.normal_log_prob, (loc, scale, value))
    by_row = torch.func.vmap(torch.func.grad(F.normal_log_prob), (0, None, 0))(loc, scale, value)
    torch.testing.assert_close(by_row, torch.autograd.grad(F.normal_log_prob(loc, scale, value).sum(), loc)[0])
