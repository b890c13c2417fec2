"""Division of a KL budget: numbers computed by hand, edges, and optimality on random instances."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarl_trust.functional import greedy_bound, kkt_budget, uniform_budget

DOUBLE = torch.float64


def vector(*values):
    return torch.tensor(values, dtype=DOUBLE)


def near(got, expected, tolerance=1e-10):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * 1e-2)


def value(score, budget):
    """What the team gains, to first order."""
    return (2 * score * budget).sqrt().sum()


def by_bisection(score, total, low, high):
    """The same problem by its dual, a price on KL: each agent buys until its marginal gain is the price."""
    if low.sum() >= total:
        return low * total / low.sum()

    def bought(price):
        return (score / (2 * price**2)).clamp(low, high)

    cheap, dear = vector(1e-30), vector(1e30)  # in logarithms, so that prices of any scale are found
    for _ in range(300):
        price = (cheap * dear).sqrt()
        cheap, dear = (price, dear) if bought(price).sum() > total else (cheap, price)
    return bought(dear)


@st.composite
def problems(draw):
    """Scores, a budget, and bounds for each agent."""
    n = draw(st.integers(1, 8))
    numbers = st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.sampled_from([1.0, 2.0]))
    score = vector(*draw(st.lists(numbers, min_size=n, max_size=n)))
    total = draw(st.floats(1e-4, 10.0))
    low = total / n * vector(*draw(st.lists(st.sampled_from([0.0, 0.25, 0.9, 1.0]), min_size=n, max_size=n)))
    room = total / n * vector(*draw(st.lists(st.sampled_from([0.0, 0.5, 2.0, 100.0]), min_size=n, max_size=n)))
    return score, total, low, low + room


##########
# By hand
##########


def test_uniform():
    near(uniform_budget(vector(9, 16), 0.02), vector(0.01, 0.01))
    assert uniform_budget(torch.ones(3), 0.03).dtype == torch.float32


def test_two_agents_without_bounds():
    budget = kkt_budget(vector(9, 16), 0.02, 0.0, 1.0)
    near(budget, vector(0.0072, 0.0128))
    near(value(vector(9, 16), budget), vector(1.0).squeeze())
    near(value(vector(9, 16), uniform_budget(vector(9, 16), 0.02)), vector(0.989949493661).squeeze())


def test_both_bounds_hold_somebody():
    near(kkt_budget(vector(16, 4, 1), 0.03, 0.002, 0.015), vector(0.015, 0.012, 0.003))
    expected = vector(0.02545454545454, 0.00254545454545, 0.002)
    near(kkt_budget(vector(100, 10, 0), 0.03, 0.002, 1.0), expected)


def test_solving_again_for_those_left_changes_nothing():
    score, expected = (
        vector(5, 1, 3, 0.2),
        vector(0.0217391304348, 0.00434782608696, 0.0130434782609, 0.000869565217391),
    )
    near(kkt_budget(score, 0.04, 0.0, 1.0), expected)
    for order in ([0, 2, 1, 3], [3, 1, 2, 0]):
        remaining = 0.04
        for place, i in enumerate(order):
            left = order[place:]
            near(kkt_budget(score[left], remaining, 0.0, 1.0)[0], expected[i])
            near(greedy_bound(score[left], 0, remaining, 0.0, 1.0), expected[i])
            remaining -= expected[i].item()


def test_clipping_first_and_rescaling_then_is_another_thing():
    score, total, low, high = vector(16, 4, 1), 0.03, 0.002, 0.015
    clipped = (total * score / score.sum()).clamp(low, high)
    rescaled = clipped * total / clipped.sum()
    assert rescaled.max() > high * 1.3
    budget = kkt_budget(score, total, low, high)
    near(budget.sum(), vector(total).squeeze())
    assert value(score, budget) > value(score, rescaled.clamp(low, high)) * 1.01


########
# Edges
########


def test_more_than_everybody_can_have():
    near(kkt_budget(vector(9, 16), 0.5, 0.0, vector(0.1, 0.2)), vector(0.1, 0.2))
    near(kkt_budget(vector(9, 16), 0.3, 0.0, vector(0.1, 0.2)), vector(0.1, 0.2))


def test_less_than_the_lower_bounds():
    near(kkt_budget(vector(9, 16), 0.01, vector(0.02, 0.03), 1.0), vector(0.004, 0.006))
    near(kkt_budget(vector(9, 16), 0.05, vector(0.02, 0.03), 1.0), vector(0.02, 0.03))
    near(kkt_budget(vector(0, 0), 0.01, vector(0.02, 0.03), 1.0), vector(0.004, 0.006))


def test_what_nobody_can_use_stays_unspent():
    near(kkt_budget(vector(5, 0, 3, 0), 1.0, 0.01, 0.1), vector(0.1, 0.01, 0.1, 0.01))


def test_no_scores_at_all():
    near(kkt_budget(vector(0, 0, 0), 0.03, 0.0, 1.0), vector(0.01, 0.01, 0.01))
    near(kkt_budget(vector(0, 0), 0.03, 0.0, 0.01), vector(0.01, 0.01))
    budget = kkt_budget(vector(0, 0), 0.03, vector(0.02, 0.0), 1.0)  # an equal share would break the budget
    near(budget, vector(0.02, 0.01))


@pytest.mark.parametrize("score", [0.0, 1e-200, 3.0, 1e200])
def test_one_agent(score):
    near(kkt_budget(vector(score), 0.02, 0.0, 1.0), vector(0.02))
    near(kkt_budget(vector(score), 0.02, 0.0, 0.01), vector(0.01))
    near(kkt_budget(vector(score), 0.02, 0.03, 0.1), vector(0.02))


def test_an_upper_bound_above_the_budget_does_nothing():
    score = vector(1, 2, 3)
    near(kkt_budget(score, 0.06, 0.0, 1e9), vector(0.01, 0.02, 0.03))
    near(kkt_budget(score, 0.06, 0.0, torch.inf), vector(0.01, 0.02, 0.03))
    near(kkt_budget(vector(1, 0), 0.06, 0.0, 1e9), vector(0.06, 0))


def test_equal_bounds_leave_no_choice():
    near(kkt_budget(vector(1, 100), 0.03, 0.01, 0.01), vector(0.01, 0.01))


def test_nothing_to_divide():
    assert kkt_budget(vector(1, 2), 0.0, 0.0, 1.0).tolist() == [0, 0]
    assert kkt_budget(vector(0, 0), 0.0, 0.0, 1.0).tolist() == [0, 0]


def test_scores_that_lie_far_apart():
    near(kkt_budget(vector(1e-30, 1e30), 0.02, 0.0, 1.0), vector(2e-62, 0.02))
    near(kkt_budget(vector(1e-30, 1e30, 1), 0.03, 0.001, 0.02), vector(0.001, 0.02, 0.009))
    near(kkt_budget(vector(1e-30, 1, 1e30), 0.03, 0.0, 0.01), vector(0.01, 0.01, 0.01))
    near(kkt_budget(vector(1e-30, 3e-30, 1e30), 0.05, 0.0, vector(1, 1, 0.01)), vector(0.01, 0.03, 0.01))
    for scale in (1e-300, 1e-150, 1e300):
        near(kkt_budget(scale * vector(1, 3), 0.04, 0.0, 1.0), vector(0.01, 0.03))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_score_that_is_no_number_breaks_nothing(bad):
    budget = kkt_budget(vector(1, bad, 2), 0.03, 0.002, 0.02)
    near(budget, vector(0.01, 0.01, 0.01))


def test_scores_are_a_vector():
    with pytest.raises(ValueError, match="one per agent"):
        kkt_budget(torch.ones(2, 3), 0.02, 0.0, 1.0)
    with pytest.raises(ValueError, match="one per agent"):
        kkt_budget(torch.tensor(1.0), 0.02, 0.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types(dtype):
    budget = kkt_budget(torch.tensor([16, 4, 1], dtype=dtype), torch.tensor(0.03), 0.002, torch.tensor(0.015))
    assert budget.dtype == dtype
    torch.testing.assert_close(budget.double(), vector(0.015, 0.012, 0.003), rtol=1e-6, atol=1e-8)
    bound = greedy_bound(torch.tensor([1, 3], dtype=dtype), 1, 0.02, 0.0, 1.0)
    assert bound.dtype == dtype
    torch.testing.assert_close(bound.double(), vector(0.015).squeeze(), rtol=1e-6, atol=1e-8)


#############
# Properties
#############


@given(problems())
def test_budget_and_bounds_are_kept(problem):
    score, total, low, high = problem
    budget = kkt_budget(*problem)
    assert budget.sum() <= total * (1 + 1e-12)
    if low.sum() < total:
        assert (budget >= low * (1 - 1e-12)).all()
        assert (budget <= high * (1 + 1e-12)).all()
    usable = high if not score.any() else torch.where(score > 0, high, low)
    near(budget.sum(), usable.sum().clamp(max=total), 1e-9)  # and all that can be used is given out


@given(problems(), st.randoms())
def test_the_agents_order_does_not_matter(problem, random):
    score, total, low, high = problem
    order = list(range(len(score)))
    random.shuffle(order)
    near(kkt_budget(score[order], total, low[order], high[order]), kkt_budget(*problem)[order], 1e-9)


@given(problems())
def test_a_numeric_solver_finds_the_same(problem):
    if problem[0].any():
        near(kkt_budget(*problem), by_bisection(*problem), 1e-9)


@given(problems())
def test_no_feasible_budget_gains_more(problem):
    """The objective is concave: its linearisation at δ, maximised over all feasible budgets, bounds every gain."""
    score, total, low, high = problem
    budget = kkt_budget(*problem)
    if low.sum() >= total:
        return
    slope = torch.where(score > 0, (score / (2 * budget.clamp(min=1e-300))).sqrt(), 0)
    best, left = low.clone(), total - low.sum()
    for i in slope.argsort(descending=True).tolist():  # fill the steepest first
        best[i] = best[i] + left.clamp(max=high[i] - low[i])
        left = total - best.sum()
    assert slope @ (best - budget) <= 1e-7 * value(score, budget) + 1e-12


@given(problems(), st.floats(1e-12, 1e12), st.floats(1e-6, 1e6))
def test_only_the_proportions_of_scores_count_and_the_rest_scales(problem, score_scale, budget_scale):
    score, total, low, high = problem
    budget = kkt_budget(*problem)
    near(kkt_budget(score_scale * score, total, low, high), budget, 1e-9)
    scaled = kkt_budget(score, budget_scale * total, budget_scale * low, budget_scale * high)
    near(scaled / budget_scale, budget, 1e-9)


@given(problems())
def test_a_higher_score_never_gets_less(problem):
    score, total, *_ = problem
    n = len(score)
    budget = kkt_budget(score, total, 0.25 * total / n, 3 * total / n)
    assert (budget[score.argsort()].diff() >= -1e-12 * total).all()


@given(problems())
def test_solving_again_for_those_left_with_bounds(problem):
    score, total, low, high = problem
    budget = kkt_budget(*problem)
    if score[1:].any() and low.sum() < total:
        near(kkt_budget(score[1:], total - budget[0], low[1:], high[1:]), budget[1:], 1e-6)


###########
# Greedy
###########


def test_greedy_share_and_its_bounds():
    score = vector(1, 3)
    near(greedy_bound(score, 1, 0.02, 0.0, 1.0), vector(0.015).squeeze())
    near(greedy_bound(score, torch.tensor(0), 0.02, 0.0, 1.0), vector(0.005).squeeze())
    near(greedy_bound(score, 1, 0.02, 0.0, 0.01), vector(0.01).squeeze())
    near(greedy_bound(score, 0, 0.02, 0.008, 1.0), vector(0.008).squeeze())
    near(greedy_bound(score, 0, vector(0.02)[0], vector(0.008)[0], vector(1)[0]), vector(0.008).squeeze())


def test_what_is_left_wins_over_the_lower_bound():
    score = vector(1, 3)
    near(greedy_bound(score, 0, 0.004, 0.01, 0.03), vector(0.004).squeeze())
    assert greedy_bound(score, 0, 0.0, 0.01, 0.03) == 0
    assert greedy_bound(score, 0, -1e-9, 0.01, 0.03) == 0  # a step may exceed its bound by rounding
    assert greedy_bound(score, 0, -1e-9, 0.0, 0.03) == 0


def test_greedy_extremes():
    assert greedy_bound(vector(0, 0), 0, 0.02, 0.0, 1.0) == 0
    near(greedy_bound(vector(0, 0), 0, 0.02, 0.004, 1.0), vector(0.004).squeeze())
    near(greedy_bound(vector(1e-30, 1e30), 1, 0.02, 0.0, 1.0), vector(0.02).squeeze())
    near(greedy_bound(vector(1e-30, 1e30), 0, 0.02, 0.0, 1.0), vector(2e-62).squeeze())
    near(greedy_bound(vector(7), 0, 0.02, 0.0, 1.0), vector(0.02).squeeze())
    for scale in (1e-300, 1e300):
        near(greedy_bound(scale * vector(1, 3), 1, 0.02, 0.0, 1.0), vector(0.015).squeeze())


@given(problems(), st.lists(st.floats(0.0, 1.0), min_size=8, max_size=8))
def test_greedy_never_spends_more_than_there_is(problem, shares):
    """The largest score first, each spending some share of its bound."""
    score, total, low, high = problem
    low, high = low.max(), high.max()
    remaining, left = torch.tensor(total, dtype=DOUBLE), list(range(len(score)))
    for share in shares[: len(score)]:
        place = int(score[left].argmax())
        bound = greedy_bound(score[left], place, remaining, low, high)
        assert 0 <= bound <= min(high, remaining) * (1 + 1e-12)
        assert bound >= min(low, high, remaining) * (1 - 1e-12)
        remaining = remaining - share * bound
        left.pop(place)
    assert remaining >= -1e-12 * total


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.floats(1e-4, 10.0))
def test_greedy_without_bounds_is_kkt(scores, total):
    score, remaining, left = vector(*scores), total, list(range(len(scores)))
    expected = kkt_budget(score, total, 0.0, total)
    while left:
        place = int(score[left].argmax())
        bound = greedy_bound(score[left], place, remaining, 0.0, total)
        near(bound, expected[left.pop(place)], 1e-6)
        remaining -= bound.item()
