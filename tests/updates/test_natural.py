"""The natural step against dense float64 oracles: explicit Hessians, torch.linalg.solve, distribution objects."""

import itertools
import math

import pytest
import torch
from problems import N, make_agents, make_problem
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn
from torch.distributions import Categorical, Independent, Normal, kl_divergence
from torchrl.modules import IndependentNormal, MaskedCategorical

from benchmarl_trust.policy import GroupPolicy, remember_old_policy
from benchmarl_trust.updates import (
    GreedyAllocation,
    KktAllocation,
    NaturalGradient,
    NaturalStep,
    UniformAllocation,
    sweep,
)
from benchmarl_trust.updates import allocation as allocation_module
from benchmarl_trust.updates.natural import LocalModel, StackedModel, gradients_of

DAMPING, DELTA = 0.1, 0.01
EXACT = NaturalGradient(cg_iters=60, cg_damping=DAMPING, cg_tolerance=1e-26)
CASES = [
    ("mlp", "tanh"),
    ("mlp", "normal"),
    ("mlp", "categorical"),
    ("mlp", "masked"),
    ("gru", "tanh"),
    ("lstm", "categorical"),
    ("cnn", "masked"),
    ("gnn", "normal"),
]


@pytest.fixture(autouse=True)
def _float64_recurrent_state(monkeypatch):
    """BenchMARL's recurrent models start from a zero state of dtype torch.float, whatever their parameters are."""
    monkeypatch.setattr(torch, "float", torch.float64)


def remembered(problem, absent=False):
    agents = make_agents(problem)
    for agent in agents:
        if absent:
            agent.data["mask"] = torch.arange(agent.data.numel()).reshape(agent.data.shape) % 3 > 0
        remember_old_policy(agent)
    return agents


class Dense:
    """One agent's KL and surrogate as functions of all its parameters in one vector.

    They go through the whole group's network, TensorDicts and distribution objects; second derivatives are explicit.
    """

    def __init__(self, problem, i, weight, present=None):
        self.problem, self.i, self.weight = problem, i, weight
        self.present = torch.ones_like(weight, dtype=torch.bool) if present is None else present
        self.sources = problem.group.agents[i].sources
        self.vector = torch.cat([self._slice(p.data, row).reshape(-1) for p, row in self.sources])
        self.old = self._dist(detach=True)

    @staticmethod
    def _slice(tensor, row):
        return tensor if row is None else tensor[row]

    def set(self, vector):
        parts = vector.split([self._slice(p.data, row).numel() for p, row in self.sources])
        for part, (p, row) in zip(parts, self.sources, strict=True):
            self._slice(p.data, row).copy_(part.reshape(self._slice(p.data, row).shape))

    def at(self, vector, function):
        """The value of one of the functions below somewhere else."""
        self.set(vector)
        value = function().detach()
        self.set(self.vector)
        return value

    def _dist(self, detach=False):
        batch = self.problem.batch.exclude(("agents", "log_prob"), ("agents", "logits"))
        out = self.problem.group.body(batch.clone())
        out = out.detach() if detach else out
        if ("agents", "loc") in out.keys(True):
            loc, scale = out["agents", "loc"], out["agents", "scale"]
            return Independent(Normal(loc[..., self.i, :], scale[..., self.i, :]), 1)
        logits = out["agents", "logits"][..., self.i, :]
        if self.masked:
            logits = logits.masked_fill(~batch["agents", "action_mask"][..., self.i, :], -1e3)
        return Categorical(logits=logits)

    @property
    def masked(self):
        return self.problem.policy.module[-1].distribution_class is MaskedCategorical

    def kl(self):
        return kl_divergence(self.old, self._dist())[self.present].mean()

    def log_prob(self):
        batch = self.problem.batch
        action = self.problem.group.head.base_action(batch["agents", "action"]).select(batch.ndim, self.i)
        return self._dist().log_prob(action) - self.old.log_prob(action)

    def surrogate(self):
        value = self.weight * self.log_prob().exp() * self.problem.batch["advantage"][..., self.i]
        return value[self.present].mean()

    def _derivative(self, value, **kwargs):
        gradients = torch.autograd.grad(value, [p for p, _ in self.sources], materialize_grads=True, **kwargs)
        rows = zip(gradients, self.sources, strict=True)
        return torch.cat([self._slice(gradient, row).reshape(-1) for gradient, (_, row) in rows])

    def gradient(self):
        return self._derivative(self.surrogate())

    def fisher(self):
        slope = self._derivative(self.kl(), create_graph=True)
        gradients = torch.autograd.grad(
            slope,
            [p for p, _ in self.sources],
            torch.eye(len(slope), dtype=torch.float64),
            is_grads_batched=True,
            materialize_grads=True,
        )
        rows = zip(gradients, self.sources, strict=True)
        return torch.cat([(g if row is None else g[:, row]).flatten(1) for g, (_, row) in rows], 1)


@pytest.mark.parametrize(
    ("twin", "absent"), [(True, False), (False, True)], ids=["twin-all present", "whole-some absent"]
)
@pytest.mark.parametrize(("model", "distribution"), CASES)
def test_product_solution_and_step_equal_the_dense_ones(model, distribution, twin, absent):
    problem, oracle = (make_problem(model, distribution, twin=kind, rows=8) for kind in (twin, False))
    agents = remembered(problem, absent)
    weight = torch.rand(problem.batch.shape, dtype=torch.float64) + 0.5
    agent = agents[1]
    dense = Dense(oracle, 1, weight, agent.data.get("mask", None))
    fisher, gradient = dense.fisher(), dense.gradient()
    assert fisher.abs().max() > 1e-3
    assert gradient.abs().max() > 1e-3

    local = LocalModel(agent, agent.data)
    objective, found = local.gradient(weight)
    torch.testing.assert_close(objective, dense.surrogate().detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-10)
    vector = torch.randn_like(gradient)
    torch.testing.assert_close(local.fisher_product(vector), fisher @ vector, rtol=1e-8, atol=1e-9)

    damped = fisher + DAMPING * torch.eye(len(fisher), dtype=torch.float64)
    direction = torch.linalg.solve(damped, gradient)
    proposal = EXACT([local], [found])
    torch.testing.assert_close(proposal.direction[0], direction, rtol=1e-6, atol=1e-6 * float(direction.abs().max()))
    torch.testing.assert_close(proposal.score[0], gradient @ direction, rtol=1e-6, atol=0)

    step = NaturalStep(agents, UniformAllocation(agents, len(agents) * DELTA, EXACT, [1, 0, 2]))
    assert step.choose(weight, []) == 1
    info = step(agent, agent.data, weight)
    full = math.sqrt(2 * DELTA / float(gradient @ direction)) * direction
    after = dense.vector + info.accepted_fraction * full
    now = torch.cat([p.detach().reshape(-1) for p in agent.policy.parameters])
    torch.testing.assert_close(now, after, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(info.kl_spent, dense.at(after, dense.kl), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(info.gain_realised, dense.at(after, dense.surrogate) - objective, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(info.gain_predicted, info.accepted_fraction * (gradient @ full), rtol=1e-6, atol=0)
    assert 0 < info.kl_spent <= DELTA * (1 + 1e-6)


@pytest.mark.parametrize("order", [[2, 0, 1], [0]], ids=["three agents", "one agent: TRPO"])
@pytest.mark.parametrize("kind", ["full", "capped"])
def test_the_sweep_equals_a_dense_loop(kind, order):
    settings = {"rows": 16, "n_agents": len(order)}
    ours, theirs = make_problem("mlp", "normal", **settings), make_problem("mlp", "normal", twin=False, **settings)
    agents = remembered(ours)
    infos = moved(agents, UniformAllocation(agents, len(agents) * DELTA, EXACT, order), kind)
    factor = torch.ones(16, dtype=torch.float64)
    for i, info in zip(order, infos, strict=True):
        dense = Dense(theirs, i, factor.clamp(max=1) if kind == "capped" else factor)
        damped = dense.fisher() + DAMPING * torch.eye(len(dense.vector), dtype=torch.float64)
        direction = torch.linalg.solve(damped, dense.gradient())
        full = (2 * DELTA / (dense.gradient() @ direction)).sqrt() * direction
        for k in range(10):
            after = dense.vector + 0.8**k * full
            gain = dense.at(after, dense.surrogate) - dense.surrogate().detach()
            if dense.at(after, dense.kl) <= DELTA * (1 + 1e-6) and gain > 0.5 * 0.8**k * (dense.gradient() @ full):
                break
        torch.testing.assert_close(info.step.accepted_fraction, torch.tensor(0.8**k, dtype=torch.float64))
        assert info.step.backtracks == k
        dense.set(after)
        factor = factor * dense.log_prob().detach().exp()
    for p, q in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert (factor.max() - factor.min()) > 0.01


@pytest.mark.parametrize("distribution", ["tanh", "normal", "categorical", "masked"])
@pytest.mark.parametrize("kl_bound", [1e-4, 0.01, 0.3])
def test_realised_kl_never_exceeds_the_bound(distribution, kl_bound):
    problem = make_problem("mlp", distribution, rows=32)
    agents = remembered(problem)
    for seed in range(5):
        for agent in agents:
            agent.data["advantage"] = torch.randn(32, dtype=torch.float64, generator=torch.manual_seed(seed))
            remember_old_policy(agent)
        for info in moved(agents, UniformAllocation(agents, N * kl_bound, NaturalGradient(), [0, 1, 2])):
            old = tuple(agents[info.agent].data[f"old_{k}"] for k in range(len(info.outputs)))
            kl = agents[info.agent].policy.kl(old, info.outputs).mean()
            assert kl <= kl_bound * (1 + 1e-6)
            torch.testing.assert_close(info.step.kl_spent, kl, rtol=1e-9, atol=1e-15)
            assert (info.step.kl_spent > 0) == (info.step.accepted_fraction > 0)


def parameters_of(problem):
    return [p.detach().clone() for p in problem.policy.parameters()]


def unchanged(problem, before):
    return all(torch.equal(p, q) for p, q in zip(problem.policy.parameters(), before, strict=True))


def make_allocation(agents, kind, stacked=None):
    """The uniform one; kkt and greedy; both with split scores."""
    solver = NaturalGradient(stacked=stacked)
    if kind == 0:
        return UniformAllocation(agents, N * DELTA, solver, [0, 1, 2])
    make, order = (KktAllocation, [0, 1, 2]) if kind % 2 else (GreedyAllocation, None)
    return make(agents, 3 * DELTA, 0.001, 1.0, solver, order, "plugin" if kind < 3 else "split")


def moved(agents, allocation, factor="full", **search):
    step = NaturalStep(agents, allocation, **search)
    return sweep(agents, step.choose, step, factor)


@pytest.mark.parametrize("kind", range(5), ids=["uniform", "kkt", "greedy", "kkt split", "greedy split"])
def test_zero_gradient_is_no_step(kind):
    problem = make_problem()
    agents = remembered(problem)
    for agent in agents:
        agent.data["advantage"].zero_()
    before = parameters_of(problem)
    allocation = make_allocation(agents, kind)
    infos = moved(agents, allocation)
    assert unchanged(problem, before)
    for info in infos:
        assert info.finite
        assert all(value.isfinite() for value in info.step)
        assert info.step.accepted_fraction == info.step.kl_spent == info.step.rejected == info.step.gain_realised == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", range(5), ids=["uniform", "kkt", "greedy", "kkt split", "greedy split"])
def test_one_agents_bad_gradient_leaves_the_others(kind, bad):
    problem = make_problem()
    agents = remembered(problem)
    agents[1].data["advantage"][3] = bad
    before = parameters_of(problem)
    allocation = make_allocation(agents, kind)
    infos = moved(agents, allocation)
    assert sorted(info.agent for info in infos) == [0, 1, 2]
    assert {info.agent for info in infos if not info.finite} == {1}
    scores = {info.agent: info.step.score for info in infos}  # which a split estimate may find to be 0
    for p, q in zip(problem.policy.parameters(), before, strict=True):
        changed = [not torch.equal(p[i], q[i]) for i in range(N)]
        assert changed == [True, False, bool(scores[2] > 0) or not isinstance(allocation, GreedyAllocation)]
    assert all(p.isfinite().all() for p in problem.policy.parameters())


@pytest.mark.parametrize("good", [0, 3])
@pytest.mark.parametrize("kind", range(5), ids=["uniform", "kkt", "greedy", "kkt split", "greedy split"])
def test_broken_curvature_is_no_step(kind, good, monkeypatch):
    """Also if some products were good before: nothing moves, nothing is spent, nothing is reported as gained."""
    problem = make_problem()
    agents = remembered(problem)
    before = parameters_of(problem)
    original, calls = LocalModel.fisher_product, {}

    def broken(self, vector):
        calls[id(self)] = calls.get(id(self), 0) + 1
        return original(self, vector) if calls[id(self)] <= good else vector * math.nan

    monkeypatch.setattr(LocalModel, "fisher_product", broken)
    allocation = make_allocation(agents, kind)
    infos = moved(agents, allocation)
    assert not any(info.finite for info in infos)
    assert unchanged(problem, before)
    for info in infos:
        assert info.step.accepted_fraction == info.step.kl_spent == info.step.gain_realised == 0
    if isinstance(allocation, GreedyAllocation):
        assert allocation.remaining == 3 * DELTA


def test_greed_stops_when_no_candidate_improves(monkeypatch):
    problem = make_problem()
    agents = remembered(problem)
    before = parameters_of(problem)
    monkeypatch.setattr(allocation_module, "scores", lambda *args: torch.zeros(len(args[1]), dtype=torch.float64))
    for cap in (None, DELTA):
        allocation = GreedyAllocation(agents, 3 * DELTA, 0.001, 1.0, NaturalGradient(), cap=cap)
        infos = moved(agents, allocation)
        assert all(info.step.kl_bound == 0 for info in infos)
        assert unchanged(problem, before)


def test_a_rejected_step_reports_zeros_and_restores():
    problem = make_problem()
    agents = remembered(problem)
    before = parameters_of(problem)
    allocation = UniformAllocation(agents, N * DELTA, NaturalGradient(), [0, 1, 2])
    for info in moved(agents, allocation, accept_ratio=50.0):  # no step keeps fifty times its promise
        assert info.finite
        assert info.step.rejected == 1
        assert info.step.backtracks == 10
        for name in ("accepted_fraction", "kl_spent", "gain_predicted", "gain_realised"):
            assert getattr(info.step, name) == 0
        assert info.log_ratio.abs().max() == 0
    assert unchanged(problem, before)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("model", ["mlp", "gru", "gnn"])
def test_shared_policies_bound_the_joint_kl_from_the_old_policies(model, aligned):
    """Even if all agents want the same, which makes steps on one network add up."""
    for kind in range(5) if model == "mlp" else (0, 2):
        problem = make_problem(model, "normal", shared=True)
        assert problem.group.shared
        agents = remembered(problem)
        for agent in agents:
            if aligned:
                agent.data["advantage"] = agent.data["action"].sum(-1)
        allocation = make_allocation(agents, kind)
        infos = moved(agents, allocation)
        assert sorted(info.agent for info in infos) == [0, 1, 2]
        assert any(info.step.accepted_fraction > 0 for info in infos)
        joint = torch.zeros((), dtype=torch.float64)
        for agent in agents:
            old = tuple(agent.data[f"old_{k}"] for k in range(2))
            joint += agent.policy.kl(old, agent.policy.forward(agent.data["inputs"].copy())).mean().detach()
        spent = torch.stack([info.step.kl_spent for info in infos]).sum()
        torch.testing.assert_close(joint, spent, rtol=1e-9, atol=1e-12)
        assert all(info.step.kl_spent <= info.step.kl_bound * (1 + 1e-6) for info in infos)
        assert joint <= 3 * DELTA * (1 + 1e-5)


@pytest.mark.parametrize("kind", [1, 2, 3, 4], ids=["kkt", "greedy", "kkt split", "greedy split"])
def test_joint_budgets_are_kept(kind):
    problem = make_problem("mlp", "tanh", rows=64)
    agents = remembered(problem)
    allocation = make_allocation(agents, kind)
    infos = moved(agents, allocation)
    assert sum(info.step.kl_spent for info in infos) <= 3 * DELTA * (1 + 1e-5)
    bounds = torch.stack([info.step.kl_bound for info in infos])
    assert (bounds.max() - bounds.min()) > 1e-4
    if kind in (1, 3):
        torch.testing.assert_close(bounds.sum(), torch.tensor(3 * DELTA, dtype=torch.float64))


def test_greed_follows_the_scores_under_the_present_factor():
    """The chosen agent has the largest score of a fresh solve, and gets its share of what is left."""
    problem = make_problem("mlp", "normal", rows=32)
    agents = remembered(problem)
    allocation = GreedyAllocation(agents, 3 * DELTA, 0.002, 0.02, EXACT)
    left, seen = 3 * DELTA, []

    def choose(weight, moved):
        nonlocal left
        rest = [i for i in range(N) if i not in moved]
        models = [LocalModel(agents[i], agents[i].data) for i in rest]
        score = EXACT(models, [model.gradient(weight)[1] for model in models]).score
        i = natural.choose(weight, moved)
        assert i == rest[int(score.argmax())]
        torch.testing.assert_close(allocation.remaining.item(), left, rtol=1e-6, atol=0)
        expected = min(max(left * float(score.max() / score.sum()), 0.002), 0.02, left)
        seen.append((natural._turn.kl_bound.item(), expected))
        return i

    def step(agent, data, weight, place):
        nonlocal left
        info = natural(agent, data, weight, place)
        left -= float(info.kl_spent)
        return info

    natural = NaturalStep(agents, allocation)
    sweep(agents, choose, step, factor="full")
    for bound, expected in seen:
        assert bound == pytest.approx(expected, rel=0.02)  # directions are brought up to date by a few iterations
    assert len(seen) == N


def test_greed_with_a_cap_and_with_a_given_order():
    problem = make_problem("mlp", "normal", rows=32)
    agents = remembered(problem)
    allocation = GreedyAllocation(agents, 3 * DELTA, 0.0, 1.0, NaturalGradient(), cap=2 * DELTA, order=[1, 2, 0])
    infos = moved(agents, allocation)
    assert [info.agent for info in infos] == [1, 2, 0]
    left = 3 * DELTA
    for info in infos:
        assert float(info.step.kl_bound) == pytest.approx(min(2 * DELTA, left))
        left -= float(info.step.kl_spent)


def test_a_warm_start_solves_the_new_system():
    """Under weights near 1 a few iterations from the direction at M = 1 leave a small residual."""
    problem = make_problem("mlp", "tanh", rows=64)
    agents = remembered(problem)
    kkt = KktAllocation(agents, 3 * DELTA, 0.0, 1.0, NaturalGradient())
    weight = (0.1 * torch.randn(64, dtype=torch.float64)).exp()  # an effective sample size of .99
    fresh_solves = UniformAllocation(agents, N * DELTA, NaturalGradient(), kkt.order)
    for k in range(N):
        warm, fresh = (allocation.next(weight, kkt.order[:k]).proposal for allocation in (kkt, fresh_solves))
        torch.testing.assert_close(warm.gradient, fresh.gradient)
        assert warm.residual.norm() < 0.1 * warm.gradient.norm()


@pytest.mark.parametrize(
    ("twin", "absent"), [(True, False), (False, True)], ids=["twin-all present", "whole-some absent"]
)
@pytest.mark.parametrize(("model", "distribution"), [case for case in CASES if case[0] != "gnn"])
def test_all_agents_at_once_are_the_agents_one_by_one(model, distribution, twin, absent):
    agents = remembered(make_problem(model, distribution, twin=twin, rows=8), absent)
    assert NaturalGradient(stacked=True).stacks(agents)
    assert not NaturalGradient().stacks(agents)  # on a CPU
    weight = torch.rand(agents[0].data.shape, dtype=torch.float64) + 0.5
    stack, single = StackedModel(agents), [LocalModel(agent, agent.data) for agent in agents]
    for present in (N, N - 1):
        for rows in (slice(None), slice(4)):
            for got, expected in zip(
                gradients_of(stack, weight, rows), gradients_of(single, weight, rows), strict=True
            ):
                torch.testing.assert_close(got, torch.stack(expected), rtol=1e-10, atol=1e-12)
        vectors = torch.randn_like(got)
        products = torch.stack([one.fisher_product(v) for one, v in zip(single, vectors, strict=True)])
        assert products.abs().amax(1).min() > 1e-3
        torch.testing.assert_close(stack.fisher_product(vectors), products, rtol=1e-10, atol=1e-12)
        assert len(stack) == len(single) == present
        for models in (stack, single):
            models.pop(1)


@pytest.mark.parametrize("kind", [1, 2, 3, 4], ids=["kkt", "greedy", "kkt split", "greedy split"])
@pytest.mark.parametrize("distribution", ["tanh", "masked"])
def test_a_sweep_that_solves_for_all_at_once_moves_the_agents_alike(distribution, kind):
    after = []
    for stacked in (False, True):
        problem = make_problem(distribution=distribution, rows=32)
        allocation = make_allocation(remembered(problem), kind, stacked)
        infos = moved(allocation.agents, allocation)
        after.append(([info.agent for info in infos], [p.detach() for p in problem.policy.parameters()]))
    assert after[0][0] == after[1][0]
    for one_by_one, at_once in zip(after[0][1], after[1][1], strict=True):
        torch.testing.assert_close(at_once, one_by_one, rtol=1e-7, atol=1e-9)  # a solve amplifies rounding


def test_what_is_not_stacked_by_agent_is_solved_for_one_by_one():
    solver = NaturalGradient(stacked=True)
    assert not solver.stacks(remembered(make_problem("gnn", "normal")))
    assert not solver.stacks(remembered(make_problem(shared=True)))
    agents = remembered(make_problem())
    assert not solver.stacks(agents[:2])
    assert not solver.stacks([*agents, *remembered(make_problem())])  # a team of two groups


def gaussian_team(c, sigma, dtype=torch.float64):
    """N agents with a one-dimensional Gaussian of fixed deviation each; the batch is all corners of μ ± σ."""
    n = len(c)
    sigma = torch.tensor(sigma, dtype=dtype)

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(n, 1, dtype=dtype))

        def forward(self, observation):
            shape = observation.shape[:-1]
            return self.loc.expand(*shape, 1), sigma.unsqueeze(-1).expand(*shape, 1)

    keys = [("agents", "loc"), ("agents", "scale")]
    head = ProbabilisticTensorDictModule(keys, [("agents", "action")], distribution_class=IndependentNormal)
    policy = ProbabilisticTensorDictSequential(TensorDictModule(Mean(), [("agents", "obs")], keys), head)
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=n)), dtype=dtype) * sigma
    batch = TensorDict(batch_size=2**n)
    batch["agents", "obs"] = torch.zeros(2**n, n, 1, dtype=dtype)
    group = GroupPolicy(policy, n, batch)
    reward = (corners * torch.tensor(c, dtype=dtype)).sum(-1)
    advantage = (reward - reward.mean()) / reward.std(correction=0)
    batch["agents", "action"] = corners.unsqueeze(-1)
    agents = group.make_agents(batch, advantage.unsqueeze(-1).expand(-1, n))
    for agent in agents:
        remember_old_policy(agent)
    return policy, agents


def values(infos, name):
    by_agent = sorted(infos, key=lambda info: info.agent)
    return torch.stack([getattr(info.step, name) for info in by_agent])


def near(got, expected, tolerance=1e-8):
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def run_gaussians(make_allocation, c=(3.0, 4.0), sigma=(1.0, 1.0)):
    policy, agents = gaussian_team(c, sigma)
    infos = moved(agents, make_allocation(agents))
    return next(policy.parameters()).detach().squeeze(-1), infos


def test_closed_form_uniform():
    means, infos = run_gaussians(lambda agents: UniformAllocation(agents, 0.02, NaturalGradient(10, 0.0), [0, 1]))
    near(means, [0.14142136, 0.14142136])
    near(values(infos, "kl_spent"), [0.01, 0.01])
    near(values(infos, "gain_realised").sum(), 0.19666740)


def test_closed_form_w():
    means, infos = run_gaussians(lambda agents: KktAllocation(agents, 0.02, 0.0, 1.0, NaturalGradient(10, 0.0), [0, 1]))
    near(values(infos, "score"), [9 / 25, 16 / 25])
    near(values(infos, "kl_bound"), [0.0072, 0.0128])
    near(values(infos, "kl_spent"), [0.0072, 0.0128])
    near(means, [0.12, 0.16])
    near(values(infos, "gain_realised"), [0.07165515, 0.12690585])
    near(values(infos, "gain_realised").sum(), 0.19856099)


def test_closed_form_w_with_damping():
    means, infos = run_gaussians(lambda agents: KktAllocation(agents, 0.02, 0.0, 1.0, NaturalGradient(10, 0.1), [0, 1]))
    near(means, [0.11441551, 0.15255401])
    near(values(infos, "kl_spent"), [0.00654545, 0.01163636])


def test_closed_form_w_of_three():
    allocate = lambda agents: KktAllocation(agents, 0.03, 0.0, 1.0, NaturalGradient(10, 0.0), [0, 1, 2])  # noqa: E731
    means, infos = run_gaussians(allocate, (1.0, 3.0, 2.0), (2.0, 0.5, 1.0))
    near(values(infos, "kl_bound"), [0.01170732, 0.00658537, 0.01170732])
    expected = torch.tensor([2.0, 0.5, 1.0]).double() * (2 * values(infos, "kl_bound")).sqrt()
    torch.testing.assert_close(means, expected, rtol=1e-8, atol=0)


def test_w_gives_every_unclipped_agent_the_same_step_length():
    """At M = 1, before anybody moves: √(2 δ_i / q_i) does not depend on i."""
    _, agents = gaussian_team((1.0, 3.0, 2.0), (2.0, 0.5, 1.0))
    kkt = KktAllocation(agents, 0.03, 0.0, 1.0, NaturalGradient(10, 0.0))
    weight = torch.ones(8, dtype=torch.float64)
    turns = [kkt.next(weight, kkt.order[:k]) for k in range(3)]
    lengths = torch.stack([(2 * turn.kl_bound / turn.proposal.curvature[0]).sqrt() for turn in turns])
    torch.testing.assert_close(lengths, lengths[:1].expand(3), rtol=1e-9, atol=0)


def test_closed_form_g():
    means, infos = run_gaussians(lambda agents: GreedyAllocation(agents, 0.02, 0.0, 1.0, NaturalGradient(10, 0.0)))
    assert [info.agent for info in infos] == [1, 0]
    near(values(infos, "kl_bound"), [0.0072, 0.0128])
    near(means, [0.12, 0.16])
