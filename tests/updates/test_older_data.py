r"""Data of an older policy in a sweep, by enumeration: two agents, two actions, joint actions as often as μ has them.

Agent 1 plays its first action with probability .8 under μ, which collected the data, .5 under π_old, at the start of
the iteration, and .6 once it has moved. Agent 2 plays each with probability ½. A is 1 where both play their first
action, -1 where agent 2 alone does, and 0 elsewhere. With θ agent 2's logit, p(1 - p) = ¼, and for agent 1's action a
D(a) = A(a, 0) - A(a, 1), which is 1 and -1,

    ∂/∂θ E_{π_1, π_2}[A] = ¼ Σ_a π_1(a) D(a) = ¼ (.6 - .4) = .05.

On the data each a has the weight w: ¼ Σ_a μ(a) w(a) D(a). With w = π_1/μ that is the same number. With w = π_1/π_old it
is ¼ (.8 · 1.2 - .2 · .8) = .20, and E_μ[w] = .8 · 1.2 + .2 · .8 = 1.12, no expectation of a ratio.
"""

import itertools

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn

from benchmarl_trust.functional import FACTORS, SURROGATES
from benchmarl_trust.policy import GroupPolicy, remember_old_policy
from benchmarl_trust.updates import GradientStep, StepInfo, sweep

MU, OLD, NEW = 0.8, 0.5, 0.6
ADVANTAGE = torch.tensor([[1, 0], [-1, 0]], dtype=torch.float64)  # by agent 1's and agent 2's action


def logit(p):
    return torch.tensor(p, dtype=torch.float64).logit()


class Separate(nn.Module):
    """A logit per agent, in a row of its own."""

    def __init__(self):
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))

    def forward(self, hot):
        return torch.cat([self.logit, torch.zeros_like(self.logit)], -1).expand(*hot.shape[:-1], 2)


class Shared(nn.Module):
    """One linear layer for both, which is shown who asks."""

    def __init__(self):
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(1, 2, dtype=torch.float64))

    def forward(self, hot):
        first = hot @ self.logit.T
        return torch.cat([first, torch.zeros_like(first)], -1)


def make_agents(other=(1, 1), shared=False):
    """The agents at π_old, with the data of μ; ``other`` are agent 2's two actions' shares in it."""
    body = Shared() if shared else Separate()
    head = ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=torch.distributions.Categorical)
    policy = ProbabilisticTensorDictSequential(TensorDictModule(body, ["hot"], ["logits"]), head)
    counts = {(a, b): (4, 1)[a] * other[b] for a, b in itertools.product((0, 1), (0, 1))}
    action = torch.tensor([joint for joint, count in counts.items() for _ in range(count)])
    hot = torch.eye(2, dtype=torch.float64).expand(len(action), 2, 2)
    batch = TensorDict(hot=hot, action=action, batch_size=len(action))
    group = GroupPolicy(policy, 2, batch)
    assert group.shared is shared
    mu = torch.tensor([[MU, 1 - MU], [share / sum(other) for share in other]], dtype=torch.float64)
    advantage = ADVANTAGE[action[:, 0], action[:, 1]]
    columns = {"log_importance": (OLD / mu[torch.arange(2), action]).log()}
    agents = group.make_agents(batch, advantage.unsqueeze(-1).expand(-1, 2), **columns)
    body.logit.data.flatten()[0] = logit(OLD)
    for agent in agents:
        remember_old_policy(agent)
    return body, agents


def gradient_of_the_second(body, agents, surrogate="clip", factor="full", rows=None):
    """Agent 2's ascent direction once agent 1 has moved, and what was logged at its position."""
    found = []

    def step(agent, data, weight, place):
        if agent.policy.index == 0:
            body.logit.data.flatten()[0] = logit(NEW)
        else:
            found.append(-agent.policy.gradient(GradientStep(surrogate, 0.2).loss(agent, data, weight, place)))
        return StepInfo(torch.zeros(()), torch.zeros(()))

    infos = sweep(agents, [0, 1], step, factor, rows, epsilon=0.2)
    (gradient,) = found
    return gradient[-1].item(), infos[1]


layouts = pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])


@layouts
@pytest.mark.parametrize("other", [(1, 1), (2, 3)], ids=["agent 2 on-policy", "agent 2 off-policy"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_gradient_is_that_of_the_policies_as_they_are(surrogate, other, shared):
    body, agents = make_agents(other, shared)
    rows = torch.randperm(len(agents[0].data)) if shared else None  # a shared policy's sweep is of one minibatch
    gradient, info = gradient_of_the_second(body, agents, surrogate, rows=rows)
    assert gradient == pytest.approx(0.05, abs=1e-12)
    assert info.factor_mean.item() == pytest.approx(1, abs=1e-12)

    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    first, second = theta.new_tensor([NEW, 1 - NEW]), torch.stack([theta.sigmoid(), 1 - theta.sigmoid()])
    expected = first @ ADVANTAGE @ second
    assert gradient == pytest.approx(torch.autograd.grad(expected, theta)[0].item(), abs=1e-12)


@layouts
def test_a_chain_that_starts_at_the_old_policy_is_wrong(shared):
    body, agents = make_agents(shared=shared)
    del agents[0].data["log_importance"]
    gradient, info = gradient_of_the_second(body, agents, rows=torch.arange(10) if shared else None)
    assert gradient == pytest.approx(0.20, abs=1e-12)
    assert info.factor_mean.item() == pytest.approx(1.12, abs=1e-12)


@layouts
@pytest.mark.parametrize("factor", FACTORS)
def test_what_bounds_the_factor_bounds_the_whole_chain(factor, shared):
    """π_1/μ is .75 and 2: the cap makes that .75 and 1, inside the clip it is .9 and 1.1 (ε = .2)."""
    body, agents = make_agents(shared=shared)
    weights = {"full": (0.75, 2), "capped": (0.75, 1), "inside_clip": (0.9, 1.1)}[factor]
    expected = (MU * weights[0] - (1 - MU) * weights[1]) / 4
    gradient, info = gradient_of_the_second(body, agents, factor=factor, rows=torch.arange(10) if shared else None)
    assert gradient == pytest.approx(expected, abs=1e-12)
    assert info.factor_max.item() == pytest.approx(2), "the chain itself is not bounded"
