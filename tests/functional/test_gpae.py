"""GPAE's traces, advantages and targets: against loops, TorchRL's estimators, and a game small enough to solve."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrl.objectives.value.functional import generalized_advantage_estimate, vtrace_advantage_estimate

from benchmarl_trust.functional import (
    TRACES,
    check_gpae,
    per_agent_advantage,
    per_agent_value_target,
    trace_coefficient,
)

ALL = sorted(TRACES)
DONE = {
    "never": lambda t: torch.zeros(len(t), dtype=torch.bool),
    "last": lambda t: t == len(t) - 1,
    "middle": lambda t: t == len(t) // 2,
    "often": lambda t: t % 3 == 1,
    "always": lambda t: torch.ones(len(t), dtype=torch.bool),
}


def data(batch=2, steps=7, agents=3, seed=0):
    torch.manual_seed(seed)
    return torch.randn(3, batch, steps, agents, dtype=torch.float64)


def flags(batch, steps, done="never", terminated="never"):
    done, terminated = (
        DONE[name](torch.arange(steps)).expand(batch, steps).unsqueeze(-1) for name in (done, terminated)
    )
    return done | terminated, terminated


def naive_trace(log_ratio, lmbda, truncation, eta):
    c = torch.empty_like(log_ratio)
    for index in itertools.product(*map(range, log_ratio.shape)):
        own = log_ratio[index].exp()
        others = math.prod(float(x.exp()) for j, x in enumerate(log_ratio[index[:-1]]) if j != index[-1])
        c[index] = (
            lmbda
            * {
                "dt": min(1, own * min(eta, others)),
                "st": min(1, own * others),
                "it": min(1, own),
                "none": 1,
            }[truncation]
        )
    return c


def naive_advantage(reward, value, next_value, c, gamma, done, terminated):
    advantage = torch.empty_like(value)
    batch, steps, agents = value.shape
    for b, i in itertools.product(range(batch), range(agents)):
        later = 0.0
        for t in reversed(range(steps)):
            bootstrap = 0.0 if terminated[b, t, 0] else gamma * next_value[b, t, i]
            later = 0.0 if done[b, t, 0] or t == steps - 1 else gamma * c[b, t + 1, i] * later
            later = later + reward[b, t, i] + bootstrap - value[b, t, i]
            advantage[b, t, i] = later
    return advantage


@pytest.mark.parametrize("truncation", ALL)
@pytest.mark.parametrize("agents", [1, 3])
@pytest.mark.parametrize(("gamma", "lmbda"), itertools.product([0.0, 0.9, 1.0], repeat=2))
@pytest.mark.parametrize("done", DONE)
@pytest.mark.parametrize("terminated", ["never", "middle"])
def test_against_a_loop(truncation, agents, gamma, lmbda, done, terminated):
    reward, value, next_value = data(agents=agents)
    log_ratio = 0.5 * torch.randn_like(value)
    done, terminated = flags(2, 7, done, terminated)
    trace = trace_coefficient(log_ratio, lmbda, truncation, eta=1.1)
    torch.testing.assert_close(trace, naive_trace(log_ratio, lmbda, truncation, 1.1), rtol=1e-12, atol=1e-12)
    advantage = per_agent_advantage(reward, value, next_value, trace, gamma, done, terminated)
    expected = naive_advantage(reward, value, next_value, trace, gamma, done, terminated)
    torch.testing.assert_close(advantage, expected, rtol=1e-12, atol=1e-12)
    target = per_agent_value_target(value, advantage, log_ratio)
    expected = value + log_ratio.exp().clamp(max=1) * expected
    torch.testing.assert_close(target, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 9, 100])
def test_every_length(steps):
    reward, value, next_value = data(steps=steps)
    done, terminated = flags(2, steps)
    expected = naive_advantage(reward, value, next_value, 0.9 * torch.ones_like(value), 0.99, done, terminated)
    actual = per_agent_advantage(reward, value, next_value, 0.9, 0.99, done, terminated)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("truncation", ALL)
def test_on_policy_it_is_gae_of_each_agents_value(truncation):
    reward, value, next_value = data(steps=50)
    done, terminated = flags(2, 50, "often", "middle")
    trace = trace_coefficient(torch.zeros_like(value), 0.9, truncation)
    torch.testing.assert_close(trace, torch.full_like(trace, 0.9))
    gamma, lmbda = torch.tensor([0.99, 0.9], dtype=torch.float64)  # floats become float32 there
    expected, target = generalized_advantage_estimate(
        gamma, lmbda, value, next_value, reward, done.expand_as(value), terminated.expand_as(value)
    )
    for c in (trace, 0.9):
        advantage = per_agent_advantage(reward, value, next_value, c, 0.99, done, terminated)
        torch.testing.assert_close(advantage, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(per_agent_value_target(value, advantage), target, rtol=1e-12, atol=1e-12)


def test_one_agent_off_policy_is_vtrace():
    reward, value, _ = data(agents=1)
    next_value = torch.cat([value[:, 1:], torch.randn(2, 1, 1, dtype=torch.float64)], 1)
    log_pi, log_mu = torch.randn(2, *value.shape, dtype=torch.float64)
    done, terminated = flags(2, 7, terminated="middle")
    gamma = torch.tensor(0.9, dtype=torch.float64)
    _, expected = vtrace_advantage_estimate(gamma, log_pi, log_mu, value, next_value, reward, done, terminated)
    for truncation in ("dt", "st", "it"):
        trace = trace_coefficient(log_pi - log_mu, 1.0, truncation, eta=1.05)
        advantage = per_agent_advantage(reward, value, next_value, trace, 0.9, done, terminated)
        target = per_agent_value_target(value, advantage, log_pi - log_mu)
        torch.testing.assert_close(target, expected, rtol=1e-10, atol=1e-10)


def test_lambda_one_is_the_return_and_lambda_zero_the_error():
    reward, value, _ = data(steps=5)
    next_value = torch.cat([value[:, 1:], torch.randn(2, 1, 3, dtype=torch.float64)], 1)
    done, terminated = flags(2, 5)
    returns = next_value[:, -1]
    for t in reversed(range(5)):
        returns = reward[:, t] + 0.9 * returns
        if t == 0:
            one = per_agent_advantage(reward, value, next_value, 1.0, 0.9, done, terminated)
            torch.testing.assert_close(one[:, 0], returns - value[:, 0])
    zero = per_agent_advantage(reward, value, next_value, 0.0, 0.9, done, terminated)
    torch.testing.assert_close(zero, reward + 0.9 * next_value - value)


def test_time_may_be_any_dimension():
    reward, value, next_value = data()
    done, terminated = flags(2, 7, "often")
    expected = per_agent_advantage(reward, value, next_value, 0.9, 0.9, done, terminated)
    first = (x.transpose(0, 1) for x in (reward, value, next_value))
    actual = per_agent_advantage(*first, 0.9, 0.9, done.transpose(0, 1), terminated.transpose(0, 1), time_dim=0)
    torch.testing.assert_close(actual.transpose(0, 1), expected)


log_ratios = st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=1, max_size=5)


@settings(deadline=None, max_examples=100)
@given(rows=log_ratios, eta=st.floats(1, 3), lmbda=st.floats(0, 1))
def test_bounds_and_order_of_the_traces(rows, eta, lmbda):
    x = torch.tensor(rows, dtype=torch.float64)
    c = {name: trace_coefficient(x, lmbda, name, eta) for name in ALL}
    slack = 1e-9
    for name in ALL:
        assert (c[name] >= 0).all()
        assert (c[name] <= lmbda + slack).all()
    assert (c["dt"] <= c["st"] + slack).all()
    assert (c["dt"] <= eta * c["it"] + slack).all()
    torch.testing.assert_close(trace_coefficient(x, lmbda, "dt", 1.0), torch.minimum(c["st"], c["it"]))
    torch.testing.assert_close(trace_coefficient(x, lmbda, "dt", 1e40), c["st"])
    torch.testing.assert_close(trace_coefficient(x, lmbda, "dt", math.inf), c["st"])
    bounded = x.clamp(-20, 20)  # past it a ratio counts as at it
    joint = bounded.sum(-1, keepdim=True).exp()
    formula = lmbda * torch.minimum(eta * bounded.exp(), joint.expand_as(x)).clamp(max=1)
    torch.testing.assert_close(c["dt"], formula, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(rows=log_ratios, order=st.permutations(range(3)), name=st.sampled_from(ALL))
def test_traces_follow_the_agents(rows, order, name):
    x = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(trace_coefficient(x[:, order], 0.9, name), trace_coefficient(x, 0.9, name)[:, order])


def test_the_example_of_a_rare_action_that_teammates_make_up_for():
    x = torch.tensor([[0.2, 5.0]], dtype=torch.float64).log()
    for name, expected in (("st", 1.0), ("it", 0.2), ("dt", 0.21)):
        assert trace_coefficient(x, 1.0, name, eta=1.05)[0, 0].item() == pytest.approx(expected)


@settings(deadline=None, max_examples=50)
@given(k=st.integers(0, 8), seed=st.integers(0, 9), junk=st.sampled_from([1e6, math.nan, math.inf]))
def test_nothing_after_the_end_reaches_back(k, seed, junk):
    reward, value, next_value = data(steps=9, seed=seed)
    log_ratio = torch.randn_like(value)
    done = (torch.arange(9) == k).expand(2, 9).unsqueeze(-1)
    terminated = done & (torch.arange(2) == 0).view(2, 1, 1)

    def advantage():
        trace = trace_coefficient(log_ratio, 0.9)
        return per_agent_advantage(reward, value, next_value, trace, 0.9, done, terminated)[:, : k + 1]

    before = advantage()
    for x in (reward, value, next_value, log_ratio):
        x[:, k + 1 :] = junk
    next_value[terminated.expand_as(value)] = junk
    torch.testing.assert_close(advantage(), before, rtol=0, atol=0)


@pytest.mark.parametrize("truncation", ALL)
@pytest.mark.parametrize("junk", [-math.inf, math.inf, math.nan])
def test_an_absent_agent_changes_nothing(truncation, junk):
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[..., 2] = False
    present = trace_coefficient(x[..., :2], 0.9, truncation)
    x[..., 2] = junk
    torch.testing.assert_close(trace_coefficient(x, 0.9, truncation, mask=mask)[..., :2], present)
    target = per_agent_value_target(torch.ones_like(x), torch.ones_like(x), x, mask)
    torch.testing.assert_close(target[..., 2], torch.full((2, 7), 2.0, dtype=torch.float64))


def test_infinite_ratios_of_present_agents_are_capped():
    x = torch.tensor([[-math.inf, math.inf, 0.0]])
    for name in ALL:
        assert trace_coefficient(x, 0.9, name).isfinite().all()
    assert per_agent_value_target(torch.zeros(1, 3), torch.ones(1, 3), x).isfinite().all()


def test_targets_are_detached():
    value = torch.randn(2, 7, 3, requires_grad=True)
    done, terminated = flags(2, 7)
    trace = trace_coefficient(value, 0.9)
    advantage = per_agent_advantage(value, value, value, trace, 0.9, done, terminated)
    target = per_agent_value_target(value, advantage, value)
    assert not any(x.requires_grad for x in (trace, advantage, target, per_agent_value_target(value, value)))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("eta", 0.99), ("eta", math.nan), ("lmbda", 1.1), ("lmbda", -0.1), ("gamma", 2.0), ("truncation", "double")],
)
def test_bad_settings_are_named(setting, value):
    good = {"truncation": "dt", "eta": 1.02, "lmbda": 0.95, "gamma": 0.99}
    check_gpae(**good)
    with pytest.raises(ValueError, match=rf"algorithm\.{setting}="):
        check_gpae(**good | {setting: value}, prefix="algorithm.")
    if setting != "gamma":
        with pytest.raises(ValueError, match=f"{setting}="):
            trace_coefficient(torch.zeros(2, 3), **{k: v for k, v in (good | {setting: value}).items() if k != "gamma"})


def test_shapes_that_would_broadcast_are_refused():
    reward, value, next_value = data()
    done, terminated = flags(2, 7)
    good = (reward, value, next_value, 0.9, 0.9, done, terminated)

    def with_(position, x):
        return (*good[:position], x, *good[position + 1 :])

    for position, bad, match in (
        (0, reward[..., :1], "Shapes differ"),
        (2, next_value.unsqueeze(-1), "Shapes differ"),
        (3, value[..., 0], "Shapes differ"),
        (5, done[..., 0], "done has shape"),
        (6, terminated.expand(2, 7, 2), "terminated has shape"),
        (5, done.float(), "must be boolean"),
    ):
        with pytest.raises(ValueError, match=match):
            per_agent_advantage(*with_(position, bad))
    with pytest.raises(ValueError, match="Shapes differ"):
        trace_coefficient(value, 0.9, mask=done)
    with pytest.raises(ValueError, match="Shapes differ"):
        per_agent_value_target(value, value, value[..., :1])


# A game small enough to solve: s, a1, a2 in {0, 1}, reward s if a1 = a2, next state a1 and a2, γ = 1/2.

GAMMA = 0.5
S, A1, A2 = torch.meshgrid(*[torch.arange(2)] * 3, indexing="ij")
REWARD = S * (A1 == A2).double()
NEXT = A1 & A2


def probabilities(*ones):
    """[agent, action] from each agent's probability of action 1."""
    return torch.tensor([[1 - p, p] for p in ones], dtype=torch.float64)


def fixed_point(pi, mu, truncation="dt", eta=1.05, lmbda=0.95, rounds=300):
    """EQ [s, a1, a2, agent] (constant in the agent's own action) at which the expected target is EQ itself.

    ``expected[s, a1, a2]`` holds the expected advantages of all agents. Each round does one step of the recursion,
    by the functions under test on all (s, a, a') with weights: a second step whose whole return is the reward stands
    for the rest of the trajectory.
    """
    value, expected = torch.zeros(2, 2, 2, 2, 2, dtype=torch.float64)
    ratio = torch.where(pi == mu, 1, pi / mu)  # 0 / 0 for what is never done
    log_ratio = torch.stack([ratio[i].log()[a] for i, a in enumerate((A1, A2))], -1)  # [s, a1, a2, agent]
    weight = mu[0][:, None] * mu[1]

    def steps(x):  # [(s, a), a', time, agent]
        return torch.stack([x.reshape(8, 1, 2).expand(8, 4, 2), x[NEXT].reshape(8, 4, 2)], 2)

    end = torch.tensor([False, True]).view(1, 1, 2, 1).expand(8, 4, 2, 1)
    for _ in range(rounds):
        trace = trace_coefficient(steps(log_ratio), lmbda, truncation, eta)
        reward = steps(REWARD.unsqueeze(-1).expand_as(value)).clone()
        reward[:, :, 1] = steps(expected + value)[:, :, 1]
        next_value = steps(value).roll(-1, 2)
        advantage = per_agent_advantage(reward, steps(value), next_value, trace, GAMMA, end, end)
        target = per_agent_value_target(steps(value), advantage, steps(log_ratio))

        def over_next(x):
            return (x[:, :, 0] * weight.reshape(1, 4, 1)).sum(1).reshape(2, 2, 2, 2)

        expected = over_next(advantage)
        target = over_next(target)
        first = torch.einsum("a,sab->sb", mu[0], target[..., 0])
        second = torch.einsum("b,sab->sa", mu[1], target[..., 1])
        value = torch.stack([first.unsqueeze(1).expand(2, 2, 2), second.unsqueeze(2).expand(2, 2, 2)], -1)
    return value, expected


def table(value):
    """EQ_1(s, a2) and EQ_2(s, a1) in sixteenths, by (s, other's action)."""
    return 16 * value[:, 0, :, 0].flatten(), 16 * value[:, :, 0, 1].flatten()


def linear_solution(pi, mu, truncation, eta, lmbda, agent):
    """The same fixed point as one linear system in EQ (4 numbers) and the expected advantages (8 numbers)."""
    pairs = list(itertools.product(range(2), repeat=3))
    index = {pair: k for k, pair in enumerate(pairs)}
    matrix, vector = torch.zeros(12, 12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)

    def other(s, *a):
        return 8 + 2 * s + a[1 - agent]

    for s, *a in pairs:  # A(s, a) - γ Σ μ(a') [EQ(s', a') + c(a') A(s', a')] + EQ(s, a) = r
        row = index[(s, *a)]
        matrix[row, row] += 1
        matrix[row, other(s, *a)] += 1
        vector[row] = s * float(a[0] == a[1])
        for b in itertools.product(range(2), repeat=2):
            step = a[0] & a[1]
            weight = GAMMA * mu[0, b[0]] * mu[1, b[1]]
            x = torch.stack([pi[i, b[i]] / mu[i, b[i]] for i in range(2)]).log()
            matrix[row, other(step, *b)] -= weight
            matrix[row, index[(step, *b)]] -= weight * naive_trace(x, lmbda, truncation, eta)[agent]
    for s, a_other in itertools.product(range(2), repeat=2):  # Σ μ(a_i) min(1, ρ_i) A(s, a) = 0
        for own in range(2):
            a = (own, a_other) if agent == 0 else (a_other, own)
            matrix[8 + 2 * s + a_other, index[(s, *a)]] = torch.minimum(mu[agent, own], pi[agent, own])
    return 16 * torch.linalg.solve(matrix, vector)[8:]


UNIFORM = probabilities(0.5, 0.5)
OFF_POLICY = {
    "dt": ([0.7674, 3.3015, 5.3389, 14.7301], [1.3578, 2.7985, 11.3578, 8.7985]),
    "st": ([0.8897, 3.5517, 5.4611, 14.9803], [1.3931, 2.8711, 11.3931, 8.8711]),
    "it": ([0.7102, 3.0776, 5.2816, 14.5061], [1.0200, 2.2950, 11.0200, 8.2950]),
    "none": ([0.7290, 2.9102, 5.3004, 14.3388], [0.7431, 1.8898, 10.7431, 7.8898]),
}


@pytest.mark.parametrize("truncation", ALL)
@pytest.mark.parametrize("lmbda", [0.0, 0.95, 1.0])
def test_tabular_fixed_point_on_policy(truncation, lmbda):
    value, expected = fixed_point(UNIFORM, UNIFORM, truncation, lmbda=lmbda)
    for eq in table(value):
        torch.testing.assert_close(eq, torch.tensor([1.0, 3, 9, 11], dtype=torch.float64), rtol=0, atol=1e-6)
    first = 16 * expected[1, ..., 0]
    torch.testing.assert_close(first, torch.tensor([[8.0, -10], [-8, 10]], dtype=torch.float64), rtol=0, atol=1e-6)
    state_value = 16 * (value[..., 0].mean((1, 2)))
    torch.testing.assert_close(state_value, torch.tensor([2.0, 10], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("truncation", ALL)
def test_tabular_fixed_point_off_policy(truncation):
    mu = probabilities(0.8, 0.3)
    value, _ = fixed_point(UNIFORM, mu, truncation)
    for agent, (eq, expected) in enumerate(zip(table(value), OFF_POLICY[truncation], strict=True)):
        torch.testing.assert_close(eq, linear_solution(UNIFORM, mu, truncation, 1.05, 0.95, agent), rtol=0, atol=1e-6)
        torch.testing.assert_close(eq, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5.1e-5)


def test_tabular_fixed_point_with_one_policy_changed():
    mu = probabilities(0.8, 0.5)
    expected = torch.tensor([10.0, 30.0, 42.0, 110.0], dtype=torch.float64) / 7
    for truncation in ("dt", "st", "it"):
        first, _ = table(fixed_point(UNIFORM, mu, truncation)[0])
        torch.testing.assert_close(first, expected, rtol=0, atol=1e-6)


def test_advantage_gap_at_the_optimum():
    """Both play 1; agent 1 is made to play 0 at s = 1: its own advantage pays for it, its teammate's does not."""
    value, _ = fixed_point(probabilities(1, 1), probabilities(1, 1))
    states, first, second = torch.tensor([1, 0, 1]), torch.tensor([0, 1, 1]), torch.tensor([1, 1, 1])
    path = value[states, first, second].unsqueeze(0)
    reward = torch.tensor([0.0, 0.0], dtype=torch.float64).view(1, 2, 1).expand(1, 2, 2)
    no = torch.zeros(1, 2, 1, dtype=torch.bool)
    for lmbda in (0.0, 0.95, 1.0):
        own, other = per_agent_advantage(reward, path[:, :2], path[:, 1:], lmbda, GAMMA, no, no)[0, 0]
        assert (other - own).item() == pytest.approx(1.5, abs=1e-6)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_one_shot_xor(p):
    """r = 1 iff a1 ≠ a2, else -1: the regression of EQ_1 on its targets at a2 = 0 finds 2p - 1."""
    reward = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(2, 1, 1)  # a1 = 0, 1 against a2 = 0
    value, end = torch.full_like(reward, 0.3), torch.ones(2, 1, 1, dtype=torch.bool)
    advantage = per_agent_advantage(reward, value, value * math.nan, 0.95, 0.99, end, end)
    target = per_agent_value_target(value, advantage).flatten()
    assert (probabilities(p)[0] @ target).item() == pytest.approx(2 * p - 1)
