"""Every preset's loss module is its objective: in each turn of a sweep the module and the step agree, in float64."""

import pytest
import torch
from problems import N, make_agents, make_problem
from torchrl.envs.utils import ExplorationType, set_exploration_type

from benchmarl_trust import ALGORITHMS
from benchmarl_trust.algorithms.sequential import Sequential
from benchmarl_trust.algorithms.sequential_natural import SequentialNatural
from benchmarl_trust.losses import SurrogateLoss, TrustRegionLoss
from benchmarl_trust.policy import remember_old_policy
from benchmarl_trust.updates import (
    GradientStep,
    GreedyAllocation,
    KktAllocation,
    NaturalGradient,
    NaturalStep,
    StepInfo,
    UniformAllocation,
    sweep,
)
from benchmarl_trust.updates.natural import LocalModel

ORDER = [2, 0, 1]


def presets(*, sequential, natural):
    kinds = {name: config.associated_class() for name, config in ALGORITHMS.items()}
    return {
        name: ALGORITHMS[name].get_from_yaml()
        for name, kind in kinds.items()
        if (issubclass(kind, Sequential), issubclass(kind, SequentialNatural)) == (sequential, natural)
    }


SIMULTANEOUS = presets(sequential=False, natural=False)
GRADIENT = presets(sequential=True, natural=False)
NATURAL = presets(sequential=True, natural=True)
#: name -> keys; the last two are of no preset.
OBJECTIVES = {name: vars(config) for name, config in GRADIENT.items()}
OBJECTIVES["inside the clip"] = OBJECTIVES["happo"] | {"factor": "inside_clip"}
OBJECTIVES["two radii"] = OBJECTIVES["cliphappo"] | {"surrogate": "reciprocal", "epsilon": 0.3, "epsilon_negative": 0.1}
distributions = pytest.mark.parametrize("distribution", ["tanh", "normal", "categorical", "masked"])


@pytest.fixture
def team(distribution):
    """A problem whose policy is where it was when its batch was collected, and its agents; not all are always there."""
    problem = make_problem("mlp", distribution)
    with set_exploration_type(ExplorationType.RANDOM), torch.no_grad():
        problem.policy(problem.batch)
    agents = make_agents(problem)
    mask = torch.ones(24, N, dtype=torch.bool)
    mask[::3, 1] = False
    problem.batch["agents", "mask"] = mask
    for agent in agents:
        agent.data["mask"] = mask[:, agent.policy.index]
        remember_old_policy(agent)
    return problem, agents


def current_log_prob(problem):
    with torch.no_grad():
        dist = problem.policy.get_dist(problem.batch.exclude(("agents", "log_prob")))
    return dist.log_prob(problem.batch["agents", "action"])


def surrogate_loss(problem, surrogate, epsilon, factor, entropy_coef=0.0, factor_epsilon=None):
    """The module, as it is used in plain TorchRL."""
    loss = SurrogateLoss(
        problem.policy,
        surrogate=surrogate,
        epsilon=epsilon,
        factor=factor,
        factor_epsilon=factor_epsilon,
        entropy_bonus=entropy_coef > 0,
        entropy_coeff=entropy_coef,
        critic_coeff=None,
    )
    names = {
        "action": "action",
        "sample_log_prob": "log_prob",
        "mask": "mask",
        "importance_weight": "importance_weight",
    }
    loss.set_keys(**{key: ("agents", name) for key, name in names.items()}, advantage="advantages")
    return loss


def batch_of(problem, agent=None, factor=None, importance=None):
    """What the module reads, of one agent alone or of all."""
    batch = problem.batch.copy()
    batch["advantages"] = batch["advantage"].unsqueeze(-1)
    if agent is not None:
        own = torch.arange(N) == agent
        batch["agents", "mask"] = batch["agents", "mask"] & own
    if factor is not None:
        batch["factor"] = factor.unsqueeze(-1)
    if importance is not None:
        batch["agents", "importance_weight"] = importance
    return batch


def objective_and_gradient(loss, batch, agent):
    """The module's loss, and its gradient in the agent's parameters; nobody else has one."""
    out = loss.actor_loss(batch)
    total = sum(out[name] for name in ("loss_objective", "loss_entropy") if name in out.keys())
    leaves = list(loss.actor_network_params.flatten_keys().values())
    gradients = torch.autograd.grad(total, leaves)
    assert all(not gradient[[j for j in range(N) if j != agent]].any() for gradient in gradients)
    return total.detach(), torch.cat([gradient[agent].reshape(-1) for gradient in gradients])


def move(policy):
    """Far enough for some ratios to leave any trust region."""
    for parameter in policy.parameters:
        parameter.data += 0.1 * torch.randn_like(parameter)


def entropy_of(distribution):
    return 0.0 if distribution == "tanh" else 0.01  # whose entropy is sampled


@distributions
@pytest.mark.parametrize("older", [False, True], ids=["on-policy", "older data"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_surrogate_loss_is_what_a_turn_of_the_sweep_raises(name, older, distribution, team):
    problem, agents = team
    surrogate, factor, positive = (OBJECTIVES[name][key] for key in ("surrogate", "factor", "epsilon"))
    epsilon, entropy_coef = (OBJECTIVES[name]["epsilon_negative"] or positive, positive), entropy_of(distribution)
    step = GradientStep(surrogate, epsilon, entropy_coef, by_position=OBJECTIVES[name]["epsilon_by_position"])
    start, mask = current_log_prob(problem), problem.batch["agents", "mask"]
    log_importance = (
        torch.where(mask, 0.3 * torch.randn(24, N, dtype=torch.float64), 0) if older else torch.zeros(24, N)
    )
    if older:
        for agent in agents:
            agent.data["log_importance"] = log_importance[:, agent.policy.index]
    compared = []

    def compare(agent, data, weight, place):
        i = agent.policy.index
        chain = torch.where(mask, current_log_prob(problem) - start, 0) + log_importance
        move(agent.policy)
        got = step.loss(agent, data, weight, place)
        gradient = agent.policy.gradient(got, retain_graph=True)
        importance = log_importance.exp() if older else None
        loss = surrogate_loss(problem, surrogate, step.radius(place), factor, entropy_coef, factor_epsilon=positive)
        batch = batch_of(problem, i, chain[:, ORDER[: len(compared)]].sum(-1).exp(), importance)
        expected, expected_gradient = objective_and_gradient(loss, batch, i)
        torch.testing.assert_close(got.detach(), expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
        assert gradient.norm() > 1e-4
        compared.append(batch["factor"])
        return StepInfo(got.detach(), gradient.norm())

    infos = sweep(agents, ORDER, compare, factor, epsilon=positive)
    assert [info.agent for info in infos] == ORDER
    assert all(info.finite for info in infos)
    assert (compared[0] == 1).all()
    factors = torch.cat(compared)
    assert factors.min() < 0.9 < 1.1 < factors.max()


@distributions
@pytest.mark.parametrize("older", [False, True], ids=["on-policy", "older data"])
@pytest.mark.parametrize("name", SIMULTANEOUS)
def test_the_surrogate_loss_of_all_agents_is_the_mean_of_what_single_ones_raise(name, older, distribution, team):
    problem, agents = team
    config = SIMULTANEOUS[name]
    epsilon, entropy_coef = (config.epsilon_negative or config.epsilon, config.epsilon), entropy_of(distribution)
    step = GradientStep(config.surrogate, epsilon, entropy_coef)
    loss = surrogate_loss(problem, config.surrogate, epsilon, "full", entropy_coef)
    importance = torch.rand(24, N, dtype=torch.float64) + 0.5 if older else None
    for agent in agents:
        move(agent.policy)
    values = []
    for agent in agents:
        i = agent.policy.index
        got = step.loss(agent, agent.data, importance[:, i] if older else torch.ones(24).double())
        expected, gradient = objective_and_gradient(loss, batch_of(problem, i, importance=importance), i)
        torch.testing.assert_close(got.detach(), expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(agent.policy.gradient(got), gradient, rtol=1e-5, atol=1e-7)
        values.append(got.detach() * agent.data["mask"].sum())
    out = loss.actor_loss(batch_of(problem, importance=importance))
    together = sum(out[key] for key in ("loss_objective", "loss_entropy") if key in out.keys())
    torch.testing.assert_close(together, sum(values) / problem.batch["agents", "mask"].sum(), rtol=1e-6, atol=1e-7)


def allocation_of(config, agents):
    solver, total = NaturalGradient(config.cg_iters, config.cg_damping), N * config.kl_threshold
    if config.allocation == "uniform":
        return UniformAllocation(agents, total, solver, ORDER)
    kind = {"kkt": KktAllocation, "greedy": GreedyAllocation}[config.allocation]
    return kind(agents, total, 0.25 * total / N, total, solver, ORDER)


def parameters_of(problem):
    """Of the distributions of all agents."""
    with torch.no_grad():
        outputs = problem.group.outputs(problem.batch)
        if ("agents", "loc") in outputs.keys(True):
            return outputs["agents", "loc"], outputs["agents", "scale"]
        return (problem.policy.get_dist(problem.batch.exclude(("agents", "log_prob"))).logits.softmax(-1),)


def independent_kl(old, new, mask):
    """Of one agent, over the rows in which it is there."""
    if len(old) == 2:
        one, other = (torch.distributions.Normal(*parameters) for parameters in (old, new))
        kl = torch.distributions.kl_divergence(one, other).sum(-1)
    else:
        (p,), (q,) = old, new
        kl = torch.where(p > 0, p * (p / q.clamp(min=1e-300)).log(), 0).sum(-1)
    return kl[mask].mean()


@distributions
@pytest.mark.parametrize("name", NATURAL)
def test_the_trust_region_loss_is_what_a_natural_step_raises_and_bounds(name, distribution, team):
    problem, agents = team
    config = NATURAL[name]
    natural = NaturalStep(agents, allocation_of(config, agents))
    linear = surrogate_loss(problem, "linear", 0.2, config.factor)
    old = parameters_of(problem)
    start, mask, moved = current_log_prob(problem), problem.batch["agents", "mask"], []

    def gradient(agent, value):
        return agent.policy.gradient(value, retain_graph=True)

    def step(agent, data, weight, place):
        i = agent.policy.index
        loss = TrustRegionLoss(agent.policy, config.surrogate, factor=config.factor)
        chain = torch.where(mask, current_log_prob(problem) - start, 0)
        factor = chain[:, moved].sum(-1).exp()
        data = data.copy().set("factor", factor)
        before, model = loss(data), LocalModel(agent, data)
        objective, slope = model.gradient(weight)
        torch.testing.assert_close(-before["loss_objective"].detach(), objective, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(-gradient(agent, before["loss_objective"]), slope, rtol=1e-9, atol=1e-13)
        batch = batch_of(problem, i, factor)
        torch.testing.assert_close(objective_and_gradient(linear, batch, i), (-objective, -slope), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(before["kl"].detach(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-14)
        slopes = torch.autograd.grad(before["kl"], agent.policy.parameters, create_graph=True)
        vector = torch.randn_like(slope)
        curved = gradient(agent, torch.cat([part.reshape(-1) for part in slopes]) @ vector)
        torch.testing.assert_close(curved, model.fisher_product(vector), rtol=1e-7, atol=1e-10)

        info = natural(agent, data, weight, place)
        after = loss(data)
        assert info.accepted_fraction > 0
        torch.testing.assert_close(info.loss, before["loss_objective"].detach())
        torch.testing.assert_close(info.grad_norm, slope.norm())
        torch.testing.assert_close(info.gain_realised, (before["loss_objective"] - after["loss_objective"]).detach())
        torch.testing.assert_close(info.kl_spent, after["kl"].detach())
        own = ([parameter[:, i] for parameter in parameters] for parameters in (old, parameters_of(problem)))
        torch.testing.assert_close(after["kl"].detach(), independent_kl(*own, mask[:, i]), rtol=1e-6, atol=1e-10)
        moved.append(i)
        return info

    infos = sweep(agents, natural.choose, step, config.factor)
    assert [info.agent for info in infos] == moved == ORDER
    assert all(info.finite for info in infos)
