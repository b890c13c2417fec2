"""Running moments against a loop in Python's floats, and what must not move them."""

import math

import pytest
import torch

from benchmarl_trust.functional import Moments, mean_and_std, update_moments


def zeros(*shape):
    return Moments(*torch.zeros(3, *shape, dtype=torch.float64))


def naive(batches, beta=0.99999):
    """Mean and deviation of a list of lists of numbers, each list one update."""
    mean = square = weight = 0.0
    for batch in batches:
        if batch:
            mean = beta * mean + (1 - beta) * sum(batch) / len(batch)
            square = beta * square + (1 - beta) * sum(x * x for x in batch) / len(batch)
            weight = beta * weight + (1 - beta)
    mean, square = (x / max(weight, 1e-5) for x in (mean, square))
    return mean, math.sqrt(max(square - mean * mean, 1e-2))


@pytest.mark.parametrize("beta", [0.99999, 0.5])
@pytest.mark.parametrize("per_agent", [False, True])
def test_against_a_loop(beta, per_agent):
    torch.manual_seed(0)
    value = 1000 + 300 * torch.randn(6, 2, 4, 3, 1, dtype=torch.float64)
    mask = torch.rand(6, 2, 4, 3, 1) < 0.6
    mask[2, ..., 1, :] = False  # absent in a whole batch
    mask[3] = False  # nobody is there
    moments = zeros(3, 1) if per_agent else zeros()
    for batch, present in zip(value, mask, strict=True):
        moments = update_moments(moments, batch, present, beta)
    mean, std = mean_and_std(moments)
    parts = [(value[..., i, :], mask[..., i, :]) for i in range(3)] if per_agent else [(value, mask)]
    expected = [naive([b[p].tolist() for b, p in zip(*part, strict=True)], beta) for part in parts]
    for got, wanted in zip((mean, std), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(got.flatten(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_after_one_update_the_statistics_are_the_batchs():
    value = 5 + 3 * torch.randn(50, 3, 1)
    mean, std = mean_and_std(update_moments(zeros(), value))
    torch.testing.assert_close(mean, value.double().mean())
    torch.testing.assert_close(std, value.double().std(correction=0))


def test_at_first_all_updates_count_alike():
    value = torch.randn(100, 20, dtype=torch.float64)
    moments = zeros()
    for batch in value:
        moments = update_moments(moments, batch)
    torch.testing.assert_close(mean_and_std(moments)[0], value.mean(), rtol=0, atol=1e-3)


def test_before_any_data_and_of_equal_returns():
    assert [x.item() for x in mean_and_std(zeros())] == pytest.approx([0, 0.1])
    assert [x.item() for x in mean_and_std(update_moments(zeros(), torch.full((5,), 7.0)))] == pytest.approx([7, 0.1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_what_is_not_finite_changes_nothing(bad):
    moments = update_moments(zeros(2, 1), torch.randn(5, 2, 1))
    value = torch.ones(5, 2, 1, dtype=torch.float64)
    value[3, 0] = bad
    after = update_moments(moments, value)
    for old, new in zip(moments, after, strict=True):
        assert torch.equal(old[0], new[0])
        assert not torch.equal(old[1], new[1])


def test_absent_agents_may_be_anything():
    value, mask = torch.randn(2, 5, 1), torch.ones(2, 5, 1, dtype=torch.bool)
    value[0, 2], mask[0, 2] = math.nan, False
    moments = update_moments(zeros(), value, mask)
    torch.testing.assert_close(mean_and_std(moments)[0], value[mask].double().mean())


def test_small_deviations_of_large_returns_survive():
    """In float32 E[x²] - E[x]² of these would be 0 or worse."""
    value = 1e5 + torch.randn(10_000)
    moments = zeros()
    for batch in value.split(1000):
        moments = update_moments(moments, batch)
    assert mean_and_std(moments)[1].item() == pytest.approx(1, rel=0.05)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="shape"):
        update_moments(zeros(), torch.ones(5, 3, 1), torch.ones(5, 3, dtype=torch.bool))
