import math

import pytest
import torch

from benchmarl_trust.functional import (
    effective_sample_size,
    factor_weight,
    log_ratio,
    masked_mean,
    normalize_advantage,
    team_advantage,
)

MASK = torch.tensor([[True, True], [True, False], [True, True], [True, False]])


def test_absent_agents_have_log_ratio_zero_and_count_nowhere():
    log_prob = torch.where(MASK, torch.tensor(-1.0), -torch.inf)
    x = log_ratio(log_prob, log_prob - 1, MASK)
    assert x.tolist() == [[1, 1], [1, 0], [1, 1], [1, 0]]
    assert masked_mean(x, MASK) == 1
    assert masked_mean(torch.where(MASK, x, torch.nan), MASK) == 1
    assert masked_mean(x, torch.zeros_like(MASK)) == 0


def test_effective_sample_size():
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    weight = x.exp().reshape(-1, 3)
    expected = weight.sum(0).square() / weight.square().sum(0) / 20
    torch.testing.assert_close(effective_sample_size(x), expected)
    one_takes_all = torch.zeros(10, 1).index_fill(0, torch.tensor(3), 60.0)
    assert effective_sample_size(one_takes_all).item() == pytest.approx(0.1)
    torch.testing.assert_close(effective_sample_size(x[0, :, :2], MASK)[1], effective_sample_size(x[0, ::2, 1:2])[0])


def test_effective_sample_size_of_one_agent_without_a_dimension_of_agents():
    x, present = torch.randn(40, dtype=torch.float64), torch.arange(40) % 3 > 0
    weight = x.exp()
    size = effective_sample_size(x)
    torch.testing.assert_close(size, weight.sum().square() / weight.square().sum() / 40)
    assert size < 0.9
    weight = weight[present]
    torch.testing.assert_close(
        effective_sample_size(x, present), weight.sum().square() / weight.square().sum() / len(weight)
    )
    assert effective_sample_size(x, torch.zeros(40, dtype=torch.bool)) == 0


@pytest.mark.parametrize("over", ["batch", "per_agent"])
@pytest.mark.parametrize("shape", [(50, 3, 1), (10, 5, 3, 1)])
def test_normalized_advantages_have_mean_zero_and_deviation_one(over, shape):
    scale = torch.tensor([1.0, 10.0, 100.0]).unsqueeze(-1)
    advantage = (torch.randn(shape, dtype=torch.float64) + 3) * scale
    out = normalize_advantage(advantage, over).flatten(0, -3)
    dims = (0, 1, 2) if over == "batch" else 0
    torch.testing.assert_close(out.mean(dims), torch.zeros_like(out.mean(dims)), atol=1e-12, rtol=0)
    torch.testing.assert_close(out.std(dims, correction=0), torch.ones_like(out.mean(dims)))
    if over == "batch":  # the agents stay comparable
        assert out[:, 2].std() > 5 * out[:, 0].std()


@pytest.mark.parametrize("over", ["batch", "per_agent"])
def test_absent_agents_change_no_statistic(over):
    advantage = torch.tensor([[1.0, 2.0], [3.0, torch.nan], [5.0, 6.0], [7.0, 1e9]]).unsqueeze(-1)
    out = normalize_advantage(advantage, over, MASK).squeeze(-1)
    assert out[~MASK].tolist() == [0, 0]
    groups = [out[MASK]] if over == "batch" else [out[:, 0], out[::2, 1]]
    for group in groups:
        assert group.mean().abs() < 1e-6
        assert group.std(correction=0).item() == pytest.approx(1)


@pytest.mark.parametrize("over", ["batch", "per_agent"])
@pytest.mark.parametrize("value", [3.0, 0.1, 12345.678, -1e20])
def test_equal_advantages_become_zero(value, over):
    """Also where float32 rounds their mean: its error must not be blown up to deviation 1."""
    assert normalize_advantage(torch.full((6001, 4, 1), value), over).abs().max() < 1e-3


def test_huge_advantages_keep_their_differences():
    out = normalize_advantage(torch.tensor([1e20, 3e20]).reshape(2, 1, 1), "batch")
    assert out.flatten().tolist() == [-1, 1]


def test_team_advantage_is_the_mean_of_those_present():
    advantage = torch.tensor([[1.0, 2.0], [3.0, torch.nan], [5.0, 6.0], [7.0, 1e9]]).unsqueeze(-1)
    out = team_advantage(advantage, MASK).squeeze(-1)
    assert out.tolist() == [[1.5, 1.5], [3, 3], [5.5, 5.5], [7, 7]]


def test_factor_weight():
    log_factor = torch.tensor([-1.0, 0.0, 2.0, 19.0, 21.0, 500.0])
    expected = torch.tensor([-1.0, 0.0, 2.0, 19.0, 20.0, 20.0]).exp()
    torch.testing.assert_close(factor_weight(log_factor, "full").weight, expected)
    torch.testing.assert_close(factor_weight(log_factor, "capped").weight, torch.tensor([math.exp(-1), 1, 1, 1, 1, 1]))


def test_no_normalization_changes_nothing():
    advantage = torch.randn(4, 2, 1)
    assert normalize_advantage(advantage, "none") is advantage


def test_unknown_normalization():
    with pytest.raises(ValueError, match="none, batch, per_agent"):
        normalize_advantage(torch.zeros(2, 2, 1), "agents")
