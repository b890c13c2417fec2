"""A2PO: corrected advantages, the factor inside the clip, radius and order by position; HAPPO and PPO as its limits."""

import math
from collections import Counter

import pytest
import torch
from benchmarl.algorithms import MappoConfig
from benchmarl.environments import VmasTask
from cases import configured
from conftest import policy_parameters, scalars
from environments import StandInTask
from problems import make_agents, make_problem
from tensordict import TensorDict

from benchmarl_trust import A2poConfig, HappoConfig, HatrpoConfig, MarsConfig
from benchmarl_trust.algorithms import sequential_gradient as sequential_module
from benchmarl_trust.functional import factor_weight, surrogate_objective, temporal_difference
from benchmarl_trust.policy import remember_old_policy
from benchmarl_trust.updates import GradientStep, advantage_score, semi_greedy, sweep

GAMMA, LMBDA = 0.8, 0.7
#: A2PO's keys as HAPPO has them.
AS_HAPPO = {"estimator": "gae", "factor": "full", "epsilon_by_position": False, "order": None}
AS_HAPPO |= {"normalize_advantage": "none", "share_param_critic": True}


def a2po(config=A2poConfig, **settings):
    return configured(config, **settings)


class TestLimits:
    def test_with_happos_keys_it_is_happo_bit_for_bit(self, run, make_experiment):
        start = policy_parameters(make_experiment(a2po(HappoConfig)))
        one, other = run(a2po(HappoConfig)), run(a2po(**AS_HAPPO))
        for p, q in zip(one.losses["agents"].parameters(), other.losses["agents"].parameters(), strict=True):
            assert torch.equal(p, q)
        assert not any(torch.equal(p, start[name]) for name, p in policy_parameters(other).items())

    @pytest.mark.parametrize("key", sorted(set(AS_HAPPO) - {"share_param_critic"}))
    def test_each_of_its_keys_matters(self, key, run):
        own = getattr(A2poConfig.get_from_yaml(), key)
        one, other = (run(a2po(**AS_HAPPO | change), lr=0.02) for change in ({}, {key: own}))
        one, other = policy_parameters(one), policy_parameters(other)
        assert any(not torch.equal(one[name], other[name]) for name in one)

    @pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
    def test_one_agent_is_ppo(self, share, run):
        """Parameter for parameter, the critic's too: one agent has nobody before it."""
        settings = {"on_policy_minibatch_size": 40, "on_policy_n_minibatch_iters": 4, "share_policy_params": share}
        settings |= {"prefer_continuous_actions": False, "max_n_iters": 3}
        ours = a2po(normalize_advantage="none", share_param_critic=True)
        mappo, one = (
            run(algorithm, task=StandInTask(n_agents=1), **settings)
            for algorithm in (MappoConfig.get_from_yaml(), ours)
        )
        for p, q in zip(one.losses["agents"].parameters(), mappo.losses["agents"].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def made_batch(steps=7, envs=3, n=2):
    """Two agents, trajectories that end in the middle and ones that do not, GAE by a loop."""
    torch.manual_seed(1)
    value, following, reward = torch.randn(3, envs, steps, n, dtype=torch.float64)
    done, terminated = torch.zeros(2, envs, steps, n, dtype=torch.bool)
    done[0, 3] = done[1, 1] = terminated[1, 1] = done[1, 4] = True
    delta = reward + GAMMA * torch.where(terminated, 0, following) - value
    advantage = torch.zeros_like(delta)
    for t in reversed(range(steps)):
        carried = advantage[:, t + 1] if t + 1 < steps else torch.zeros_like(delta[:, 0])
        advantage[:, t] = delta[:, t] + GAMMA * LMBDA * torch.where(done[:, t], 0, carried)
    batch = TensorDict(batch_size=(envs, steps))
    batch["agents", "advantage"], batch["agents", "state_value"] = advantage.unsqueeze(-1), value.unsqueeze(-1)
    batch["agents", "value_target"] = (value + advantage).unsqueeze(-1)
    batch["next", "agents", "done"], batch["next", "agents", "terminated"] = (
        done.unsqueeze(-1),
        terminated.unsqueeze(-1),
    )
    return batch, delta, done


class TestCorrection:
    @pytest.fixture
    def estimator(self, make_experiment):
        return make_experiment(a2po(lmbda=LMBDA), gamma=GAMMA).algorithm.estimator

    def test_against_a_naive_double_loop(self, estimator):
        batch, delta, done = made_batch()
        log_factor = 0.5 * torch.randn(3, 7, dtype=torch.float64)
        trace = LMBDA * log_factor.exp().clamp(max=1)
        expected = torch.zeros_like(delta)
        for env in range(3):
            for t in range(7):
                product = 1.0
                for k in range(t, 7):
                    product = product if k == t else product * GAMMA * trace[env, k]
                    expected[env, t] += product * delta[env, k]
                    if done[env, k, 0]:
                        break
        untouched = batch["agents", "value_target"][..., 0, :].clone()
        correct = estimator.correction("agents", batch, lambda advantage, mask: advantage)
        torch.testing.assert_close(correct(1, log_factor.flatten()), expected[..., 1].flatten(), rtol=1e-12, atol=1e-12)
        target = batch["agents", "state_value"][..., 1, 0] + expected[..., 1]
        torch.testing.assert_close(batch["agents", "value_target"][..., 1, 0], target)
        assert torch.equal(batch["agents", "value_target"][..., 0, :], untouched)

    def test_a_factor_of_one_gives_gae(self, estimator):
        batch, delta, done = made_batch()
        gae, target = batch["agents", "advantage"].clone(), batch["agents", "value_target"].clone()
        torch.testing.assert_close(temporal_difference(gae.squeeze(-1), GAMMA * LMBDA, done), delta)
        correct = estimator.correction("agents", batch, lambda advantage, mask: advantage)
        for log_factor in (torch.zeros(3, 7, dtype=torch.float64), torch.full((3, 7), 0.3, dtype=torch.float64)):
            for i in range(2):
                torch.testing.assert_close(correct(i, log_factor), gae[..., i, 0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(batch["agents", "value_target"], target)

    def test_it_is_normalised_over_all_agents_after_each_correction(self, make_experiment):
        algorithm = make_experiment(a2po(lmbda=LMBDA), gamma=GAMMA).algorithm
        batch, _, _ = made_batch()
        log_factor = -torch.rand(3, 7, dtype=torch.float64)
        correct = algorithm.estimator.correction("agents", batch, algorithm._as_used)
        raw = algorithm.estimator.correction("agents", batch, lambda advantage, mask: advantage)
        both = torch.stack([raw(i, log_factor) for i in range(2)], -1)
        expected = (both - both.mean()) / both.std(correction=0)
        torch.testing.assert_close(torch.stack([correct(i, log_factor) for i in range(2)], -1), expected)

    def test_each_turn_meets_the_advantages_of_its_position(self, make_experiment, monkeypatch):
        """And the critic is given the corrected returns."""
        experiment = make_experiment(a2po(lmbda=0.9), max_n_iters=1, lr=0.05)
        algorithm, seen = experiment.algorithm, []
        original = sequential_module.sweep

        def watched(*args, advantage, **kwargs):
            def asked(i, log_factor):
                seen.append((i, log_factor.clone(), advantage(i, log_factor)))
                return seen[-1][2]

            return original(*args, advantage=asked, **kwargs)

        monkeypatch.setattr(sequential_module, "sweep", watched)
        batch = next(iter(experiment.collector))
        processed = algorithm.process_batch("agents", batch)
        (_, first, _), (second_agent, second, _), _ = seen
        assert first.abs().max() == 0
        assert second.abs().max() > 1e-3
        value, target = processed["agents", "state_value"], processed["agents", "value_target"]
        gae = processed["agents", "advantage"]
        gap = (target - value - gae)[..., 0].abs().amax((0, 1))
        assert gap[seen[0][0]] < 1e-5
        assert gap[second_agent] > 1e-4

    def test_shared_policies_are_corrected_once_per_epoch_from_the_second_on(self, make_experiment):
        experiment = make_experiment(a2po(), share_policy_params=True, max_n_iters=1, lr=0.01)
        algorithm, calls = experiment.algorithm, []
        original = algorithm.estimator.correction

        def correction(*args):
            inner = original(*args)

            def asked(i, log_factor):
                calls.append((i, float(log_factor.abs().max())))
                return inner(i, log_factor)

            return asked

        algorithm.estimator.correction = correction
        experiment.run()
        assert [i for i, _ in calls] == [0, 1, 2]  # two epochs, the first of which has nothing to correct
        assert all(distance > 0 for _, distance in calls)


class TestFactor:
    @pytest.mark.parametrize("advantage", [1.0, -1.0])
    def test_the_gain_with_the_factor_inside_is_the_formula(self, advantage):
        x, log_m = 0.4 * torch.randn(2, 500, dtype=torch.float64)
        a = torch.full_like(x, advantage)
        weight, shift = factor_weight(log_m, "inside_clip", epsilon=0.2)
        got = surrogate_objective("clip", x, a, weight, 0.15, shift=shift)
        g = log_m.exp().clamp(0.9, 1.1)
        ratio = x.exp() * g
        expected = torch.minimum(ratio * a, ratio.clamp(0.85, 1.15) * a).mean()
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)

    def test_radius_by_position(self):
        step = GradientStep("clip", (0.1, 0.2), by_position=True)
        positive = [step.radius(k / 4)[1] for k in (1, 2, 3, 4)]
        assert positive == pytest.approx([0.125, 0.15, 0.175, 0.2])
        assert [step.radius(k / 4)[0] for k in (1, 4)] == pytest.approx([0.0625, 0.1])

    def test_a_sweep_tells_each_step_its_place(self):
        agents = make_agents(make_problem())
        for agent in agents:
            remember_old_policy(agent)
        one, seen = GradientStep("clip", 0.2), []

        def step(agent, data, weight, place):
            seen.append((agent.policy.index, place, data["shift"].clone(), weight))
            return one(agent, data, weight, place)

        infos = sweep(agents, [2, 0, 1], step, factor="inside_clip", epsilon=0.2)
        assert [(i, place) for i, place, *_ in seen] == [(2, 1 / 3), (0, 2 / 3), (1, 1)]
        log_m = torch.zeros(24, dtype=torch.float64)
        for info, (_, _, shift, weight) in zip(infos, seen, strict=True):
            torch.testing.assert_close(shift, log_m.clamp(math.log(0.9), math.log(1.1)))
            assert (weight == 1).all()
            log_m = log_m + info.log_ratio


class TestOrder:
    def test_positions_alternate_between_the_largest_left_and_a_random_one(self):
        score, generator = torch.tensor([0.3, 0.9, 0.1, 0.5]), torch.Generator().manual_seed(0)
        orders = [semi_greedy(score, generator) for _ in range(400)]
        for order in orders:
            assert sorted(order) == [0, 1, 2, 3]
            assert order[0] == 1
            left = [i for i in range(4) if i not in order[:2]]
            assert order[2] == max(left, key=lambda i: score[i])
        second = Counter(order[1] for order in orders)
        assert set(second) == {0, 2, 3}
        assert all(95 < count < 175 for count in second.values())  # 133 each, four standard deviations are 38

    def test_ties_break_at_random(self):
        generator = torch.Generator().manual_seed(0)
        first = Counter(semi_greedy(torch.ones(3), generator)[0] for _ in range(300))
        assert set(first) == {0, 1, 2}
        assert all(60 < count < 140 for count in first.values())

    def test_the_score_is_the_mean_of_the_quotient(self):
        advantage, value = torch.randn(50, 3, dtype=torch.float64), torch.rand(50, 3, dtype=torch.float64) + 0.5
        torch.testing.assert_close(advantage_score(advantage, value), (advantage / value).abs().mean(0))
        mask = torch.rand(50, 3) < 0.5
        spoiled = torch.where(mask, advantage, torch.nan), torch.where(mask, value, torch.nan)
        by_hand = torch.stack([(advantage / value)[mask[:, i], i].abs().mean() for i in range(3)])
        torch.testing.assert_close(advantage_score(*spoiled, mask), by_hand)
        value[0, 1] = 0.0  # counts as a hundredth of the mean
        assert advantage_score(advantage, value)[1] < 100 * advantage.abs().max() / value.mean()

    def test_the_largest_score_moves_first(self, make_experiment):
        experiment = make_experiment(a2po(), max_n_iters=4)
        algorithm, scores = experiment.algorithm, []
        original = algorithm._order

        def order(agents):
            columns = [torch.stack([agent.data[key] for agent in agents], -1) for key in ("advantage", "value")]
            scores.append(advantage_score(*columns).tolist())
            return original(agents)

        algorithm._order = order
        experiment.run()
        first = scalars(experiment)["train_agents_policy_order_position_0"]
        assert [int(i) for i in first] == [score.index(max(score)) for score in scores]


@pytest.mark.parametrize(
    ("config", "settings", "cure"),
    [
        (MarsConfig, {"estimator": "preopc"}, "algorithm=a2po"),
        (HatrpoConfig, {"estimator": "preopc"}, "algorithm=a2po"),
        (A2poConfig, {"n_rollouts": 2}, "n_rollouts=1"),
        (A2poConfig, {"surrogate": "reciprocal", "epsilon": 0.2}, "surrogate=clip"),
        (A2poConfig, {"epsilon_by_position": 1}, "True or False"),
    ],
)
def test_combinations_without_meaning_are_refused(config, settings, cure, make_experiment):
    with pytest.raises(ValueError, match=r"^algorithm\.") as error:
        make_experiment(configured(config, **settings))
    assert cure in str(error.value)


def test_a_team_over_groups_is_refused(make_experiment):
    task = VmasTask.SIMPLE_SPEAKER_LISTENER.get_from_yaml()
    with pytest.raises(ValueError, match=r"algorithm\.estimator=preopc.*algorithm\.teams"):
        make_experiment(a2po(teams=[["speaker", "listener"]]), task=task)
