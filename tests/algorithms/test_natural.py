"""HATRPO, clip-HATRPO, W and G inside BenchMARL: identities, budgets, logs, what is refused."""

import pytest
import torch
from benchmarl.environments import VmasTask
from conftest import policy_parameters, scalars
from environments import StandInTask

from benchmarl_trust import (
    ALGORITHMS,
    ClipHatrpoConfig,
    HatrpoConfig,
    HatrpoGConfig,
    HatrpoWConfig,
)
from benchmarl_trust.updates import NaturalGradient, remember_old_policy

NATURAL = ["hatrpo", "cliphatrpo", "hatrpow", "hatrpog"]
JOINT = [HatrpoWConfig, HatrpoGConfig]


def configured(config, **settings):
    config = config.get_from_yaml()
    for key, value in settings.items():
        assert hasattr(config, key), key
        setattr(config, key, value)
    return config


def speaker_listener():
    task = VmasTask.SIMPLE_SPEAKER_LISTENER.get_from_yaml()
    task.config.update(max_steps=5)
    return task


def agent_values(logged, key, n=3, group="agents"):
    """[iterations][agents] of what is logged per agent."""
    return list(zip(*(logged[f"train_{group}_policy_{key}_agent_{i}"] for i in range(n)), strict=True))


@pytest.mark.parametrize("kl_total", [None, 0.03])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
def test_uniform_w_is_bitwise_hatrpo(kl_total, share, run):
    hatrpo = run(configured(HatrpoConfig), share_policy_params=share)
    start = policy_parameters(hatrpo)
    w = run(configured(HatrpoWConfig, allocation="uniform", kl_total=kl_total), share_policy_params=share)
    for p, q in zip(hatrpo.losses["agents"].parameters(), w.losses["agents"].parameters(), strict=True):
        assert torch.equal(p, q)
    assert start.keys() == policy_parameters(w).keys()


@pytest.mark.parametrize("clip", [False, True])
def test_one_agent_is_trpo(clip, make_experiment):
    """With one agent there is no factor: a step is dense TRPO's, and clip-HATRPO is HATRPO."""
    config = configured(ClipHatrpoConfig if clip else HatrpoConfig, cg_iters=60)
    experiment = make_experiment(
        config, task=StandInTask(n_agents=1), prefer_continuous_actions=False, share_policy_params=False
    )
    batch = next(iter(experiment.collector))
    algorithm = experiment.algorithm
    algorithm.process_batch("agents", batch.clone())  # builds the critic's loss
    algorithm._batches["agents"] = batch = super(type(algorithm).__mro__[2], algorithm).process_batch("agents", batch)
    (agent,) = algorithm._agents(["agents"])
    remember_old_policy(agent)
    leaves = agent.policy.parameters
    before = torch.cat([p.detach().reshape(-1).clone() for p in leaves])

    def flat(value, **kwargs):
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, leaves, **kwargs)])

    (logits,) = agent.policy.forward(agent.data["inputs"].copy())
    log_probs = logits.log_softmax(-1)
    ratio = (log_probs - log_probs.detach()).gather(-1, agent.data["action"].unsqueeze(-1)).squeeze(-1).exp()
    gradient = flat((ratio * agent.data["advantage"]).mean(), retain_graph=True)
    kl = (log_probs.detach().exp() * (log_probs.detach() - log_probs)).sum(-1).mean()
    slope = flat(kl, create_graph=True)
    fisher = torch.stack([flat(entry, retain_graph=True) for entry in slope]).double()
    direction = torch.linalg.solve(fisher + 0.1 * torch.eye(len(fisher)), gradient.double())
    full = (2 * 0.01 / (gradient.double() @ direction)).sqrt() * direction

    (info,) = algorithm._sweep(["agents"], [agent], [0])
    after = torch.cat([p.detach().reshape(-1) for p in leaves])
    assert info.step.accepted_fraction > 0
    expected = info.step.accepted_fraction * full
    torch.testing.assert_close((after - before).double(), expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NATURAL)
def test_logs_are_consistent(name, run):
    logged = scalars(run(ALGORITHMS[name].get_from_yaml(), max_n_iters=6, evaluation=False))
    columns = ("kl_bound", "kl_spent", "kl", "accepted_fraction", "gain_predicted", "gain_realised", "rejected")
    values = {key: agent_values(logged, key) for key in columns}
    accepted = 0
    for row in zip(*values.values(), strict=True):
        for bound, spent, kl, fraction, predicted, realised, rejected in zip(*row, strict=True):
            assert spent <= bound * (1 + 1e-5)
            assert kl == pytest.approx(spent, abs=1e-6)
            assert 0 <= fraction <= 1
            assert (fraction == 0) == (spent == 0) == (realised == 0)
            assert rejected == 0 or fraction == 0
            assert realised == 0 or realised > 0.5 * predicted * (1 - 1e-6) > 0
            accepted += fraction > 0
    assert accepted > 6
    for bounds, spent in zip(values["kl_bound"], values["kl_spent"], strict=True):
        if name == "hatrpow":
            assert sum(bounds) == pytest.approx(0.03, rel=1e-5)
            assert all(0.0025 * (1 - 1e-6) <= bound <= 0.03 for bound in bounds)
        if name in ("hatrpow", "hatrpog"):
            assert sum(spent) <= 0.03 * (1 + 1e-4)
        else:
            assert bounds == pytest.approx([0.01] * 3)
    means = logged["train_agents_policy_kl_spent"]
    assert means == pytest.approx([sum(row) / 3 for row in values["kl_spent"]], rel=1e-5)


@pytest.mark.parametrize("name", ["hatrpow", "hatrpog"])
def test_a_team_over_groups_shares_one_budget(name, run):
    config = configured(ALGORITHMS[name], teams=[["speaker", "listener"]])
    logged = scalars(run(config, task=speaker_listener(), max_n_iters=4, evaluation=False))
    bounds = zip(*(logged[f"train_{group}_policy_kl_bound_agent_0"] for group in ("speaker", "listener")), strict=True)
    spent = zip(*(logged[f"train_{group}_policy_kl_spent_agent_0"] for group in ("speaker", "listener")), strict=True)
    for pair, kl in zip(bounds, spent, strict=True):
        assert sum(kl) <= 0.02 * (1 + 1e-5)
        assert max(pair) > 0.011
        if name == "hatrpow":
            assert sum(pair) == pytest.approx(0.02, rel=1e-5)


def test_greed_orders_by_score_and_w_can(run):
    for config in (configured(HatrpoGConfig), configured(HatrpoWConfig, order="score")):
        logged = scalars(run(config, max_n_iters=4, evaluation=False))
        first = logged["train_agents_policy_order_position_0"]
        for scores, agent in zip(agent_values(logged, "score"), first, strict=True):
            # the scores of later agents are under another factor in G, which is near 1 here
            assert scores[int(agent)] >= max(scores) * (0.5 if isinstance(config, HatrpoGConfig) else 1 - 1e-9)


def test_fixed_orders_in_w_and_g(run):
    for config in (
        configured(HatrpoWConfig, fixed_order=[2, 0, 1]),
        configured(HatrpoGConfig, order="random", fixed_order=[2, 0, 1]),
    ):
        logged = scalars(run(config))
        assert [logged[f"train_agents_policy_order_position_{k}"] for k in range(3)] == [[2, 2], [0, 0], [1, 1]]


def test_a_cap_bounds_each_agent(run):
    logged = scalars(run(configured(HatrpoGConfig, bound="cap", kappa=1.5)))
    for bounds in agent_values(logged, "kl_bound"):
        assert max(bounds) == pytest.approx(0.015, rel=1e-6)
        assert sum(bounds) <= 0.045


def test_the_settings_reach_the_solver(make_experiment):
    settings = {"cg_iters": 7, "cg_damping": 0.3, "ls_step": 4, "accept_ratio": 0.2, "backtrack_coeff": 0.6}
    algorithm = make_experiment(configured(HatrpoConfig, **settings)).algorithm
    assert algorithm.solver == NaturalGradient(7, 0.3)
    assert algorithm.search == {"ls_step": 4, "accept_ratio": 0.2, "backtrack_coeff": 0.6}


@pytest.mark.parametrize(
    ("config", "settings", "cure"),
    [
        (HatrpoConfig, {"kl_threshold": 0.0}, "above 0"),
        (HatrpoConfig, {"kl_threshold": -0.01}, "above 0"),
        (HatrpoConfig, {"kl_threshold": float("nan")}, "above 0"),
        (HatrpoConfig, {"kl_threshold": float("inf")}, "above 0"),
        (ClipHatrpoConfig, {"kl_threshold": None}, "above 0"),
        (HatrpoConfig, {"cg_iters": 0}, "above 0"),
        (HatrpoConfig, {"cg_damping": 0.0}, "above 0"),
        (HatrpoConfig, {"ls_step": 0}, "above 0"),
        (HatrpoConfig, {"accept_ratio": 1.0}, "above 0 and below 1"),
        (HatrpoConfig, {"backtrack_coeff": 1.0}, "above 0 and below 1"),
        (HatrpoConfig, {"entropy_coef": 0.01}, "Leave it at 0"),
        (HatrpoConfig, {"advantage": "joint"}, "per_agent, team"),
        (HatrpoConfig, {"fixed_order": [0, 1]}, "a permutation of 0 ... 2"),
        *((config, {"kl_total": 0.0}, "above 0") for config in JOINT),
        *((config, {"kl_max": 0.0}, "above 0") for config in JOINT),
        *((config, {"kl_min": -0.1}, "at least 0") for config in JOINT),
        *((config, {"kl_min": 0.011}, "give kl_min at most 0.01") for config in JOINT),
        *((config, {"kl_max": 0.001}, "exchange them") for config in JOINT),
        *((config, {"s_estimator": "exact"}, "plugin, split") for config in JOINT),
        (HatrpoWConfig, {"allocation": "greedy"}, "kkt, uniform"),
        (HatrpoWConfig, {"order": "greedy"}, "random, score"),
        (HatrpoWConfig, {"order": "score", "allocation": "uniform"}, "allocation=kkt"),
        (HatrpoWConfig, {"order": "score", "fixed_order": True}, "fixed_order=False"),
        (HatrpoGConfig, {"order": "score"}, "greedy, random"),
        (HatrpoGConfig, {"fixed_order": True}, "order=random"),
        (HatrpoGConfig, {"bound": "kkt"}, "share, cap"),
        (HatrpoGConfig, {"kappa": 0.0}, "above 0"),
    ],
)
def test_bad_values_are_refused_before_collection(config, settings, cure, make_experiment):
    with pytest.raises(ValueError, match=f"algorithm.{next(iter(settings))}") as error:
        make_experiment(configured(config, **settings))
    assert cure in str(error.value)


def test_a_shared_policy_is_named(make_experiment):
    with pytest.warns(UserWarning, match="each step bounds the KL of the whole group"):
        make_experiment(configured(HatrpoConfig), share_policy_params=True)
