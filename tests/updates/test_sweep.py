"""The sequential sweep against loops written by hand, in float64: no twin, no vmap, no shared code."""

import math

import pytest
import torch
from conftest import waits_are_errors
from problems import MODELS, RECURRENT, N, make_agents, make_problem
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarl_trust.policy import GroupPolicy, forward, remember_old_policy
from benchmarl_trust.runtime import fused
from benchmarl_trust.updates import GradientStep, MinibatchEpochs, exceeds_kl, shuffles, sweep

CASES = [
    ("mlp", "tanh"),
    ("mlp", "normal"),
    ("mlp", "categorical"),
    ("mlp", "masked"),
    ("gru", "tanh"),
    ("gnn", "tanh"),
]
EPSILON, NORM, EPOCHS, SIZE = 0.2, 0.05, 3, 7


@pytest.fixture(autouse=True)
def _float64_recurrent_state(monkeypatch):
    """BenchMARL's recurrent models start from a zero state of dtype torch.float, whatever their parameters are."""
    monkeypatch.setattr(torch, "float", torch.float64)


def log_prob(problem, rows=slice(None)):
    """Log-probs of all agents [*, N] by the policy itself, through TensorDicts and distribution objects."""
    batch = problem.batch[rows]
    return problem.policy.get_dist(batch.exclude(("agents", "log_prob"))).log_prob(batch["agents", "action"])


def naive_loss(problem, old, factor, agent, rows, kind, entropy_coef=0.0, present=None):
    batch = problem.batch[rows]
    dist = problem.policy.get_dist(batch.exclude(("agents", "log_prob")))
    ratio = (dist.log_prob(batch["agents", "action"]) - old[rows]).exp()[..., agent]
    advantage = batch["advantage"][..., agent]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)
    weight = factor.clamp(max=1) if kind == "capped" else factor
    value = weight * gain
    if entropy_coef:
        value = value + entropy_coef * dist.entropy()[..., agent]
    return -value.mean() if present is None else -value[present[rows]].mean()


def naive_adam(problem, moments, loss, agent, shared):
    """One Adam step (lr 1e-2, eps 1e-8) of the agent's slices, the gradient clipped to norm NORM."""
    named = dict(problem.policy.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))
    mine = {}
    for name, p in named.items():
        if gradients[name] is None or not gradients[name].any():
            continue
        row = slice(None) if shared or p.shape[0] != problem.group.n_agents else agent
        mine[name] = (p.data[row], gradients[name][row])
    norm = torch.stack([g.norm() for _, g in mine.values()]).norm()
    for name, (p, gradient) in mine.items():
        gradient = gradient * min(1.0, NORM / (float(norm) + 1e-6))
        m, v, t = moments.get((agent if not shared else 0, name), (0, 0, 0))
        m, v, t = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2, t + 1
        moments[agent if not shared else 0, name] = (m, v, t)
        p -= 1e-2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


def generator():
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("kind", ["full", "capped"], ids=["happo", "cliphappo"])
@pytest.mark.parametrize(("model", "distribution"), CASES)
def test_separate_policies_equal_a_naive_loop(model, distribution, kind):
    ours, theirs = (make_problem(model, distribution) for _ in range(2))
    assert not ours.group.shared
    assert ours.group.fast is (model != "gnn")
    agents, order = make_agents(ours), [2, 0, 1]
    for agent in agents:
        remember_old_policy(agent, chunk=5)
    step = MinibatchEpochs(GradientStep("clip", EPSILON, max_grad_norm=NORM), EPOCHS, SIZE, generator())
    infos = sweep(agents, order, step, kind, chunk=5)

    random, moments = generator(), {}
    old = log_prob(theirs).detach()
    factor = torch.ones_like(old[..., 0])
    for info, i in zip(infos, order, strict=True):
        torch.testing.assert_close(info.factor_mean, factor.mean(), rtol=1e-9, atol=0)
        torch.testing.assert_close(info.factor_max, factor.max(), rtol=1e-9, atol=0)
        weighted = (factor.clamp(max=1) if kind == "capped" else factor) * theirs.batch["advantage"][..., i]
        torch.testing.assert_close(info.advantage_variance, weighted.var(correction=0), rtol=1e-9, atol=0)
        for permutation in shuffles(len(old), EPOCHS, random):
            for rows in permutation.split(SIZE):
                loss = naive_loss(theirs, old, factor[rows], i, rows, kind)
                naive_adam(theirs, moments, loss, i, shared=False)
        factor = factor * (log_prob(theirs) - old).detach().exp()[..., i]
    for p, q in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    assert (factor.max() - factor.min()) > 0.01, "the policies must have moved"


def test_a_gradient_step_without_an_optimizer_is_refused():
    agent = make_agents(make_problem("mlp", "normal"))[0]._replace(optimizer=None)
    with pytest.raises(ValueError, match=r"give GroupPolicy\.make_agents one for each agent"):
        GradientStep("clip", EPSILON)(agent, agent.data, torch.ones(agent.data.shape))


@pytest.mark.parametrize("distribution", ["normal", "categorical", "masked"])
def test_entropy_bonus_and_absent_agents_equal_a_naive_loop(distribution):
    """Agent 2 is absent on every third row: M stands still there, and no mean counts it."""
    ours, theirs = (make_problem("mlp", distribution) for _ in range(2))
    agents, order = make_agents(ours), [2, 0, 1]
    present = [torch.arange(24) % 3 > 0 if i == 2 else torch.ones(24, dtype=torch.bool) for i in range(N)]
    for i, agent in enumerate(agents):
        agent.data["mask"] = present[i]
        remember_old_policy(agent)
    one = GradientStep("clip", EPSILON, entropy_coef=0.1, max_grad_norm=NORM)
    step = MinibatchEpochs(one, EPOCHS, SIZE, generator())
    infos = sweep(agents, order, step, factor="full")
    random, moments = generator(), {}
    old = log_prob(theirs).detach()
    factor = torch.ones(24, dtype=torch.float64)
    for info, i in zip(infos, order, strict=True):
        torch.testing.assert_close(info.factor_mean, factor[present[i]].mean(), rtol=1e-9, atol=0)
        for permutation in shuffles(24, EPOCHS, random):
            for rows in permutation.split(SIZE):
                loss = naive_loss(theirs, old, factor[rows], i, rows, "full", entropy_coef=0.1, present=present[i])
                naive_adam(theirs, moments, loss, i, shared=False)
        ratio = (log_prob(theirs) - old).detach().exp()[..., i]
        factor = factor * torch.where(present[i], ratio, 1)
    for p, q in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def test_gradients_are_clipped_by_value_too():
    problem = make_problem()
    agent = make_remembered(problem)[0]
    norm = GradientStep("clip", EPSILON, max_grad_value=1e-3)(agent, agent.data, torch.ones(24)).grad_norm
    assert norm > 1e-3
    assert max(p.grad.abs().max() for p in agent.policy.parameters) == 1e-3


@pytest.mark.parametrize("kind", ["full", "capped"], ids=["happo", "cliphappo"])
@pytest.mark.parametrize(("model", "distribution"), CASES)
def test_shared_policy_equals_a_naive_loop(model, distribution, kind):
    ours, theirs = (make_problem(model, distribution, shared=True) for _ in range(2))
    assert ours.group.shared
    agents, order = make_agents(ours), [2, 0, 1]
    for agent in agents:
        remember_old_policy(agent)
    step = GradientStep("clip", EPSILON, max_grad_norm=NORM)
    random, moments = generator(), {}
    old = log_prob(theirs).detach()
    for permutation in shuffles(len(old), EPOCHS, random):
        for rows in permutation.split(SIZE):
            infos = sweep(agents, order, step, kind, rows)
            factor = torch.ones_like(old[rows][..., 0])
            for info, i in zip(infos, order, strict=True):
                torch.testing.assert_close(info.factor_mean, factor.mean(), rtol=1e-9, atol=0)
                naive_adam(theirs, moments, naive_loss(theirs, old, factor, i, rows, kind), i, shared=True)
                factor = factor * (log_prob(theirs, rows) - old[rows]).detach().exp()[..., i]
    for p, q in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("twin", [True, False], ids=["twin", "whole"])
@pytest.mark.parametrize("model", ["mlp", "gru", "gnn"])
def test_only_the_agent_whose_turn_it_is_moves(model, twin):
    problem = make_problem(model, twin=twin)
    agents = make_agents(problem)
    for agent in agents:
        remember_old_policy(agent)
    one = GradientStep("clip", EPSILON)

    def agent_slices(i):
        return [p for k, p in enumerate(problem.group.agents[i].parameters)]

    def step(agent, data, weight, place):
        before = [[p.clone() for p in agent_slices(i)] for i in range(N)]
        for _ in range(3):
            info = one(agent, data, weight)
        for i in range(N):
            moved = [not torch.equal(p, q) for p, q in zip(agent_slices(i), before[i], strict=True)]
            assert all(moved) if i == agent.policy.index else not any(moved)
        return info

    sweep(agents, [1, 2, 0], step, factor="full")
    # Leaves share their memory with the policy: what moved there has moved here.
    fresh = make_problem(model, twin=twin)
    assert all(
        not torch.equal(p, q) for p, q in zip(problem.policy.parameters(), fresh.policy.parameters(), strict=True)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("distribution", ["tanh", "normal", "categorical", "masked"])
@pytest.mark.parametrize("model", ["mlp", "gru", "lstm"])
def test_ratios_start_at_one(model, distribution, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(torch, "float", dtype)
    problem = make_problem(model, distribution, dtype=dtype)
    for agent in make_agents(problem):
        remember_old_policy(agent)
        x = agent.policy.log_prob(agent.policy.forward(agent.data["inputs"].copy()), agent.data["action"])
        assert (x - agent.data["old_log_prob"]).abs().max() < tolerance
    if distribution != "tanh":  # whose log-probs are those of the base normal
        got = torch.stack([a.data["old_log_prob"] for a in make_remembered(problem)], -1)
        torch.testing.assert_close(got, log_prob(problem).detach(), rtol=1e-4, atol=1e-5)


def test_forgetting_the_old_policy_is_named():
    with pytest.raises(ValueError, match="remember_old_policy"):
        sweep(make_agents(make_problem()), [0, 1, 2], GradientStep("clip", EPSILON), factor="full")


@pytest.mark.gpu
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
@pytest.mark.parametrize("twin", [True, False], ids=["twin", "whole"])
@pytest.mark.parametrize("distribution", ["tanh", "masked"])
def test_no_step_waits_for_the_gpu(distribution, twin, entropy_coef):
    problem = make_problem("mlp", distribution, twin=twin, dtype=torch.float32, device="cuda")
    assert problem.group.fast is twin
    agents = make_agents(problem, fused=True)
    for agent in agents:
        remember_old_policy(agent)
    one = GradientStep("clip", EPSILON, entropy_coef=entropy_coef, max_grad_norm=NORM)
    step = MinibatchEpochs(one, 2, 8, torch.Generator("cuda"))
    sweep(agents, [0, 1, 2], step, factor="capped")
    with waits_are_errors():
        infos = sweep(agents, [2, 0, 1], step, factor="capped")
    assert all(info.finite for info in infos)


class Waits(TorchDispatchMode):
    """Counts the numbers that the host takes of tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("target", "made", "waits"), [(None, 3, 0), (1e-12, 1, 1), (1e9, 3, 2)])
def test_a_target_kl_costs_one_wait_an_epoch_but_the_last(target, made, waits):
    problem = make_problem("mlp", "masked", dtype=torch.float32)
    agents = make_agents(problem, fused=True)
    for agent in agents:
        remember_old_policy(agent)
    step = MinibatchEpochs(GradientStep("clip", EPSILON, max_grad_norm=NORM), 3, SIZE, generator(), target_kl=target)
    with Waits() as mode:
        infos = sweep(agents, [2, 0, 1], step, factor="full")
    assert mode.count == 3 * waits
    assert target is None or [info.step.epochs for info in infos] == [made] * 3


@pytest.mark.parametrize(("model", "distribution"), CASES)
@pytest.mark.parametrize("rows", [None, 4])
def test_the_kl_that_is_checked_is_the_exact_one_of_the_newest_rows(model, distribution, rows):
    """Against PyTorch's own, without the rows in which an agent is absent."""
    problem = make_problem(model, distribution)
    agents = make_remembered(problem)
    means = []
    before = [forward(agent, agent.data) for agent in agents]
    with torch.no_grad():
        for p in problem.policy.parameters():
            p += 0.05 * torch.randn_like(p)
    for agent, old in zip(agents, before, strict=True):
        mask = torch.rand(agent.data.batch_size) < 0.7
        mask[-1] = True
        agent.data["mask"] = mask
        kind = torch.distributions.Normal
        if distribution in ("categorical", "masked"):
            new = forward(agent, agent.data)
            p, q = ((x[0] if len(x) == 1 else x[0].masked_fill(~x[1], -torch.inf)).softmax(-1) for x in (old, new))
            kl = torch.where(p > 0, p * (p / q.clamp(min=1e-300)).log(), 0).sum(-1)
        else:
            kl = torch.distributions.kl_divergence(kind(*old), kind(*forward(agent, agent.data))).sum(-1)
        means.append(kl[-(rows or 0) :][mask[-(rows or 0) :]].mean())
    exact = torch.stack(means).mean()
    assert exact > 1e-4
    assert exceeds_kl(float(exact) * (1 - 1e-6), agents, rows, chunk=3)
    assert not exceeds_kl(float(exact) * (1 + 1e-6), agents, rows, chunk=3)
    assert not exceeds_kl(None, agents)
    agents[0].data["old_0"][-1] = math.nan
    assert exceeds_kl(1e9, agents, rows)


def make_remembered(problem):
    agents = make_agents(problem)
    for agent in agents:
        remember_old_policy(agent)
    return agents


def test_the_cap_changes_nothing_where_no_factor_exceeds_one():
    def run(kind, advantage):
        problem = make_problem("mlp", "categorical")
        problem.batch["agents", "action"][:] = 0  # one action: a step lowers or raises its ratio on every row
        problem.batch["advantage"][:] = advantage
        infos = sweep(make_remembered(problem), [0, 1, 2], GradientStep("clip", EPSILON), kind)
        return list(problem.policy.parameters()), [info.factor_max for info in infos]

    (happo, factors), (capped, _) = run("full", -1.0), run("capped", -1.0)
    assert max(factors[1:]) < 1
    assert all(torch.equal(p, q) for p, q in zip(happo, capped, strict=True))
    (happo, factors), (capped, _) = run("full", 1.0), run("capped", 1.0)
    assert min(factors[1:]) > 1
    assert not all(torch.equal(p, q) for p, q in zip(happo, capped, strict=True))


def test_capped_variance_is_bounded_by_the_second_moment():
    problem = make_problem("mlp", "tanh", n_agents=8, rows=200)
    problem.batch["advantage"][:] = torch.randn(200, 1)
    agents = make_remembered(problem)
    step = MinibatchEpochs(GradientStep("clip", EPSILON), 5, 50, generator())
    infos = sweep(agents, list(range(8)), step, factor="capped")
    second_moment = problem.batch["advantage"][:, 0].square().mean()
    assert all(info.advantage_variance <= second_moment for info in infos)
    assert infos[-1].factor_max > 1, "the chain itself is not clipped"


@pytest.mark.parametrize("model", sorted(MODELS))
def test_which_policies_are_separate_and_which_run_alone(model):
    group = make_problem(model).group
    assert group.shared is (model == "mlp-gnn-mlp"), "an MLP before a GNN mixes the agents' parameters"
    assert group.fast is (model in ("mlp", "cnn", *RECURRENT))
    assert make_problem(model, shared=True).group.shared
    for i, agent in enumerate(group.agents):
        assert agent.index == i


@pytest.mark.parametrize("model", ["mlp", "mlp-gnn-mlp"])
def test_zero_weights_do_not_blind_the_probe(model):
    problem = make_problem(model)
    with torch.no_grad():
        for p in list(problem.policy.parameters())[-2:]:
            p.zero_()
    before = [p.clone() for p in problem.policy.parameters()]
    group = GroupPolicy(problem.policy, N, problem.batch[:2])
    assert group.shared is (model == "mlp-gnn-mlp")
    assert all(torch.equal(p, q) for p, q in zip(problem.policy.parameters(), before, strict=True))


@pytest.mark.parametrize("twin", [True, False], ids=["twin", "whole"])
def test_frozen_and_unused_parameters_stay(twin):
    problem = make_problem(twin=twin)
    frozen, *_ = problem.policy.parameters()
    frozen.requires_grad_(False)
    problem.policy.module[0].register_parameter("unused", torch.nn.Parameter(torch.ones(2).double()))
    group = GroupPolicy(problem.policy, N, problem.batch[:2])
    assert not group.shared
    before = frozen.clone()
    agents = make_remembered(problem._replace(group=group))
    infos = sweep(agents, [0, 1, 2], GradientStep("clip", EPSILON, max_grad_norm=NORM), factor="full")
    assert all(info.finite for info in infos)
    assert torch.equal(frozen, before)
    assert torch.equal(problem.policy.module[0].unused, torch.ones(2))


def test_a_squashed_location_is_refused():
    problem = make_problem()
    problem.policy.module[-1].distribution_kwargs["tanh_loc"] = True
    with pytest.raises(ValueError, match="tanh_loc"):
        GroupPolicy(problem.policy, N, problem.batch[:2])


def test_one_agent_is_never_shared():
    assert not make_problem("mlp", n_agents=1, shared=True).group.shared
    assert not make_problem("mlp", n_agents=1).group.shared


def test_building_the_view_draws_no_random_numbers():
    def draw(twin):
        make_problem("mlp", twin=twin)
        return torch.rand(3)

    assert torch.equal(draw(True), draw(False))


@pytest.mark.parametrize("broken", ["gradient", "ratio"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
def test_a_turn_that_is_not_finite_is_undone_bit_for_bit(broken, first):
    problem = make_problem()
    agents = make_remembered(problem)
    one = GradientStep("clip", EPSILON)
    if not first:
        sweep(agents, [0, 1, 2], one, factor="full")
    before = {i: [t.clone() for t in (*a.policy.parameters, *moments(a))] for i, a in enumerate(agents)}

    def step(agent, data, weight, place):
        info = one(agent, data, weight)
        if agent.policy.index == 1:
            if broken == "gradient":
                return info._replace(grad_norm=info.grad_norm * math.nan)
            agent.policy.parameters[0].data.fill_(math.nan)
        return info

    infos = sweep(agents, [0, 1, 2], step, factor="full")
    assert [bool(info.finite) for info in infos] == [True, False, True]
    after = [*agents[1].policy.parameters, *moments(agents[1])]
    old = before[1] if not first else [*before[1], *(torch.zeros_like(t) for t in moments(agents[1]))]
    assert all(torch.equal(x, y) for x, y in zip(after, old, strict=True))
    for i in (0, 2):
        assert not torch.equal(agents[i].policy.parameters[0], before[i][0])
    # The agent after it meets the factor of the first alone.
    assert infos[1].log_ratio.abs().max() == 0
    assert infos[2].factor_mean.isfinite()
    assert all(x.isfinite().all() for x in infos[1].outputs)


def moments(agent):
    return [
        value
        for leaf in agent.policy.parameters
        for value in agent.optimizer.state.get(leaf, {}).values()
        if isinstance(value, torch.Tensor)
    ]


def test_absent_agents_change_nothing():
    def run(spoiled):
        problem = make_problem("mlp", "categorical")
        agents = make_agents(problem)
        mask = torch.arange(24) % 3 > 0
        for agent in agents:
            agent.data["mask"] = mask if agent.policy.index == 1 else torch.ones_like(mask)
            if spoiled and agent.policy.index == 1:
                agent.data["advantage"] = torch.where(mask, agent.data["advantage"], math.nan)
            remember_old_policy(agent)
        step = GradientStep("clip", EPSILON, entropy_coef=0.01)
        infos = sweep(agents, [1, 0, 2], step, factor="full")
        assert all(info.finite for info in infos)
        assert infos[0].log_ratio[~mask].abs().max() == 0
        return [p.clone() for p in problem.policy.parameters()]

    assert all(torch.equal(p, q) for p, q in zip(run(False), run(True), strict=True))


def test_fused_adam_only_where_nothing_was_chosen():
    leaf = torch.nn.Parameter(torch.ones(3))
    assert fused(torch.optim.Adam([leaf])).param_groups[0]["fused"] is True
    assert fused(torch.optim.Adam([leaf], foreach=True)).param_groups[0]["fused"] is None
    used = torch.optim.Adam([leaf])
    leaf.grad = torch.ones(3)
    used.step()
    assert fused(used).param_groups[0]["fused"] is None


@pytest.mark.parametrize("distribution", ["tanh", "normal", "categorical", "masked"])
def test_heads_agree_with_torch_distributions(distribution):
    one, other = (make_problem("mlp", distribution) for _ in range(2))
    with torch.no_grad():
        for p in other.policy.parameters():
            p += 0.1 * torch.randn_like(p)
    dists = [p.policy.get_dist(one.batch.exclude(("agents", "log_prob"))) for p in (one, other)]
    actions = one.group.head.base_action(one.batch["agents", "action"])
    for i in range(N):
        outputs = [p.group.agents[i].forward(p.group.agents[i].inputs(one.batch)) for p in (one, other)]
        head = one.group.head
        difference = head.log_prob(outputs[1], actions[:, i]) - head.log_prob(outputs[0], actions[:, i])
        action = one.batch["agents", "action"]
        expected = (dists[1].log_prob(action) - dists[0].log_prob(action))[:, i]
        torch.testing.assert_close(difference, expected, rtol=1e-6, atol=1e-7)
        kl = head.kl(*outputs)
        assert (kl >= 0).all()
        assert kl.mean() > 1e-4
        if distribution == "categorical":
            pair = [torch.distributions.Categorical(logits=d.logits[:, i]) for d in dists]
            torch.testing.assert_close(kl, torch.distributions.kl_divergence(*pair))
            torch.testing.assert_close(head.entropy(outputs[0], i), pair[0].entropy())
        elif distribution == "masked":
            p, q = (d.logits[:, i].softmax(-1) for d in dists)
            expected = torch.where(p > 0, p * (p / q.clamp(min=1e-300)).log(), 0).sum(-1)
            torch.testing.assert_close(kl, expected)
            torch.testing.assert_close(head.entropy(outputs[0], i), dists[0].entropy()[:, i])
        else:
            pair = [torch.distributions.Normal(*o) for o in outputs]
            torch.testing.assert_close(kl, torch.distributions.kl_divergence(*pair).sum(-1))
            if distribution == "normal":
                torch.testing.assert_close(head.entropy(outputs[0], i), pair[0].entropy().sum(-1))


def test_entropy_of_a_squashed_normal_is_estimated():
    problem = make_problem("mlp", "tanh", rows=24)
    agent = problem.group.agents[2]
    outputs = tuple(x[:1].expand(20000, -1) for x in agent.forward(agent.inputs(problem.batch)))
    estimate = agent.entropy(outputs).mean()
    dist = problem.policy.get_dist(problem.batch[:1].exclude(("agents", "log_prob")))
    samples = dist.sample((20000,))
    torch.testing.assert_close(estimate, -dist.log_prob(samples)[:, 0, 2].mean(), rtol=0.05, atol=0.05)
