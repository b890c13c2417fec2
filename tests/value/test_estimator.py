"""The estimator against a loop over trajectories, and everything that must not cross their ends."""

import pytest
import torch
from teams import KINDS, OBS, POLICIES, make_batch, make_team
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch.distributions import Categorical
from torchrl.objectives.value import GAE

from benchmarl_trust.functional import trace_coefficient
from benchmarl_trust.losses import SurrogateLoss
from benchmarl_trust.policy import policy_features
from benchmarl_trust.value import GPAE

N = 3
ENDS = ((0, 2, False), (0, 4, True), (1, 0, True), (1, 5, False), (1, 6, True))
SHARED = TensorDictModule(lambda x: x.mean((-1, -2)).unsqueeze(-1), ["observation"], ["state_value"])
recurrence = pytest.mark.parametrize("recurrent", [False, True], ids=["mlp", "gru"])


@pytest.fixture(autouse=True)
def _most_likely_action(monkeypatch):
    """Sampled discrete actions are the most likely ones, so that a loop by hand samples the same."""
    monkeypatch.setattr(Categorical, "sample", lambda self, shape=(): self.logits.argmax(-1))


def naive(team, batch, gamma=0.9, lmbda=0.8, trace=None):
    """Trajectory by trajectory: the policy and the critic on its steps and one more, then the recursion."""
    advantage = torch.zeros_like(batch["next", "reward"]).squeeze(-1)
    value = torch.zeros_like(advantage)
    for b in range(len(batch)):
        start = 0
        for t in range(batch.shape[1]):
            if not batch["next", "done"][b, t] and t < batch.shape[1] - 1:
                continue
            steps = batch[b : b + 1, start : t + 1]
            last = steps[:, -1:]["next"].select("observation", "action_mask")
            keys = ("observation", "action_mask")
            path = TensorDict({key: torch.cat([steps[key], last[key]], 1) for key in keys}, (1, len(steps[0]) + 1))
            path["is_init"] = torch.zeros(*path.shape, 1, dtype=torch.bool)
            with torch.no_grad():
                params = team.policy.get_dist_params(path.copy())
                sampled = team.policy[-1].get_dist(params).sample()
                path["policy_features"] = policy_features(team.policy[-1], params)
                path["action"] = torch.cat([steps["action"], sampled[:, -1:]], 1)
                eq = team.critic(path)["state_value"][0, ..., 0]
            later = 0
            for k in range(t, start - 1, -1):
                bootstrap = 0 if batch["next", "terminated"][b, k] else eq[k - start + 1]
                delta = batch["next", "reward"][b, k, :, 0] + gamma * bootstrap - eq[k - start]
                c = lmbda if trace is None or k == t else trace[b, k + 1]
                later = delta + gamma * c * later
                advantage[b, k], value[b, k] = later, eq[k - start]
            start = t + 1
    return advantage.unsqueeze(-1), value.unsqueeze(-1)


@recurrence
@pytest.mark.parametrize("kind", ["categorical", "masked"])
@pytest.mark.parametrize("ends", [(), ENDS], ids=["one", "several"])
def test_against_a_loop_over_trajectories(kind, recurrent, ends):
    team = make_team(kind, N, recurrent)
    batch = make_batch(team, ends)
    advantage, value = naive(team, batch)
    team.estimator()(batch)
    torch.testing.assert_close(batch["state_value"], value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(batch["advantage"], advantage, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(batch["value_target"], value + advantage, rtol=1e-10, atol=1e-10)


@recurrence
@pytest.mark.parametrize("truncation", ["dt", "st", "it", "none"])
def test_off_policy_against_a_loop(truncation, recurrent):
    team = make_team("categorical", N, recurrent)
    batch = make_batch(team, ENDS)
    with torch.no_grad():
        collected = team.policy.get_dist(batch.clone()).log_prob(batch["action"])
    batch["log_prob"] = collected + 0.5 * torch.randn_like(collected)
    ratio = collected - batch["log_prob"]
    trace = trace_coefficient(ratio, 0.8, truncation, eta=1.1)
    advantage, value = naive(team, batch, trace=trace)
    team.estimator(truncation=truncation, eta=1.1, off_policy=True)(batch)
    torch.testing.assert_close(batch["old_log_prob"], collected)
    torch.testing.assert_close(batch["advantage"], advantage, rtol=1e-10, atol=1e-10)
    target = value + ratio.exp().clamp(max=1).unsqueeze(-1) * advantage
    torch.testing.assert_close(batch["value_target"], target, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", POLICIES)
def test_on_policy_data_gives_the_same_with_ratios_and_without(kind):
    team = make_team(kind)
    batch, other = make_batch(team, ENDS), make_batch(team, ENDS)
    for off_policy, td in ((False, batch), (True, other)):
        torch.manual_seed(0)
        team.estimator(off_policy=off_policy)(td)
    for key in ("advantage", "value_target", "state_value", "policy_features"):
        torch.testing.assert_close(batch[key], other[key])
    assert "old_log_prob" not in batch.keys()


@recurrence
def test_one_agent_is_gae(recurrent):
    """Alone, the value does not depend on actions, and the estimator is TorchRL's."""
    team = make_team("tanh", 1, recurrent)
    batch = make_batch(team, ENDS, n_agents=1)
    team.estimator()(batch)
    gamma, lmbda = torch.tensor([0.9, 0.8], dtype=torch.float64)
    gae = GAE(gamma=gamma, lmbda=lmbda, value_network=None)
    expected = batch.clone()
    expected["next", "state_value"] = next_values(team, batch)
    for key in ("done", "terminated"):
        expected["next", key] = batch["next", key].unsqueeze(-2)
    gae(expected, time_dim=1)
    torch.testing.assert_close(batch["advantage"], expected["advantage"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(batch["value_target"], expected["value_target"], rtol=1e-10, atol=1e-10)


def next_values(team, batch):
    """EQ at each next observation of a single agent, for which no action matters, one prefix of the data at a time."""
    out = torch.zeros_like(batch["next", "reward"])
    for b in range(batch.shape[0]):
        for t in range(batch.shape[1]):
            start = max((e[1] + 1 for e in ENDS if e[0] == b and e[1] < t), default=0)
            path = torch.cat([batch[b : b + 1, start : t + 1], batch[b : b + 1, t : t + 1]], 1)
            path = path.select("observation", "is_init", "action").clone()
            path["observation"][:, -1], path["is_init"][:, -1] = batch["next", "observation"][b, t], False
            with torch.no_grad():
                params = team.policy.get_dist_params(path.copy())
                path["policy_features"] = policy_features(team.policy[-1], params)
                out[b, t] = team.critic(path)["state_value"][0, -1]
    return out


def test_a_batch_of_trajectories_is_its_trajectories():
    """TorchRL #4209: at a truncation inside a batch the value of the next trajectory must not come in."""
    team = make_team("categorical")
    batch = make_batch(team, [(0, 3, False)], batch=1, steps=8)
    batch["observation"][:, 4:] *= 100  # the second trajectory's values are far from the first's
    together = team.estimator(gamma=1.0)(batch.clone())
    first, second = (team.estimator(gamma=1.0)(part.clone()) for part in (batch[:, :4], batch[:, 4:]))
    for key in ("advantage", "value_target", "state_value"):
        torch.testing.assert_close(together[key], torch.cat([first[key], second[key]], 1))


@recurrence
def test_nothing_crosses_a_reset(recurrent):
    team = make_team("categorical", N, recurrent)
    batch = make_batch(team, [(0, 3, False), (1, 3, True)])
    before = team.estimator()(batch.clone())
    changed = batch.clone()
    changed["observation"][:, 4:] += 1
    changed["action"][:, 4:] = (changed["action"][:, 4:] + 1) % KINDS
    changed["next", "reward"][:, 4:] += 1
    after = team.estimator()(changed)
    for key in ("advantage", "value_target", "state_value"):
        torch.testing.assert_close(after[key][:, :4], before[key][:, :4], rtol=0, atol=0)
        assert (after[key][:, 4:] != before[key][:, 4:]).any()


@recurrence
def test_truncation_bootstraps_from_the_true_next_observation_and_termination_does_not(recurrent):
    team = make_team("categorical", N, recurrent)
    batch = make_batch(team, [(0, 3, False), (1, 3, True)])
    before = team.estimator()(batch.clone())["advantage"]
    changed = batch.clone()
    changed["next", "observation"][:, 3] += 1
    after = team.estimator()(changed)["advantage"]
    assert (after[0, :4] != before[0, :4]).all()
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)
    torch.testing.assert_close(after[0, 4:], before[0, 4:], rtol=0, atol=0)
    # Inside a trajectory the next observation is that of the next step: ("next", ...) is not read a second time.
    changed = batch.clone()
    changed["next", "observation"][:, 1] = torch.nan
    torch.testing.assert_close(team.estimator()(changed)["advantage"], before, rtol=0, atol=0)


def test_termination_by_hand():
    team = make_team("categorical")
    batch = make_batch(team, [(0, 0, True), (1, 0, False)], steps=1)
    team.estimator()(batch)
    delta = batch["next", "reward"] - batch["state_value"]
    torch.testing.assert_close(batch["advantage"][0], delta[0])
    assert (batch["advantage"][1] != delta[1]).all()


def test_inside_a_trajectory_the_executed_next_actions_count():
    team = make_team("categorical")
    batch = make_batch(team, [(0, 3, False)])
    before = team.estimator(lmbda=0.0)(batch.clone())["advantage"]
    changed = batch.clone()
    changed["action"][:, 2, 0] = (changed["action"][:, 2, 0] + 1) % KINDS
    change = (team.estimator(lmbda=0.0)(changed)["advantage"] - before).abs()
    # Agent 0 changed its action at step 2: the others' values at 2 move, and with them their errors at 1 and 2.
    assert (change[:, 1:3, 1:] > 0).all()
    assert (change[:, :, 0] == 0).all()
    assert (change[:, [0, 3, 4, 5, 6]] == 0).all()


def test_at_an_end_actions_are_sampled_from_the_policy(monkeypatch):
    team = make_team("categorical")
    batch = make_batch(team, [(0, 3, False)])
    before = team.estimator()(batch.clone())["advantage"]
    monkeypatch.setattr(Categorical, "sample", lambda self, shape=(): self.logits.argmin(-1))
    after = team.estimator()(batch)["advantage"]
    assert (after[0] != before[0]).all()  # the truncation at 3 and the end of the batch reach all steps


def test_permuted_environments_give_permuted_advantages():
    team = make_team("tanh")
    batch = make_batch(team, [(1, 3, False)], batch=4, steps=4)
    order = torch.tensor([2, 0, 3, 1])

    def noiseless(td):  # the samples at the ends do not permute
        td["next", "terminated"][:, -1] = td["next", "done"][:, -1] = True
        td["next", "terminated"] |= td["next", "done"]
        return team.estimator()(td)["advantage"]

    expected = noiseless(batch.clone())[order]
    torch.testing.assert_close(noiseless(batch[order].clone()), expected)


@recurrence
def test_the_critic_on_a_few_environments_at_a_time(recurrent, monkeypatch):
    team = make_team("categorical", N, recurrent)
    batch = make_batch(team, ENDS, batch=5)
    expected = team.estimator()(batch.clone())["advantage"]
    calls, forward = [], team.critic.forward
    monkeypatch.setattr(team.critic, "forward", lambda td: calls.append(td.shape) or forward(td))
    for chunk in (1, 2 * 12 * N * N * OBS):
        monkeypatch.setattr("benchmarl_trust.value.gpae.CHUNK", chunk)
        torch.testing.assert_close(team.estimator()(batch.clone())["advantage"], expected)
    assert [shape[0] for shape in calls[:5]] == [1] * 5
    assert len(calls) > 5


def test_any_leading_dimensions():
    team = make_team("categorical")
    batch = make_batch(team, ENDS)
    expected = team.estimator()(batch.clone())
    nested = team.estimator()(batch.reshape(2, 1, 7).clone())
    single = team.estimator()(batch[1].clone())
    for key in ("advantage", "value_target", "state_value", "policy_features"):
        torch.testing.assert_close(nested[key][:, 0], expected[key])
        torch.testing.assert_close(single[key], expected[key][1])


def test_parameters_may_be_given():
    team = make_team("categorical")
    batch = make_batch(team, ENDS)
    params = TensorDict.from_module(team.critic).data.clone()
    expected = team.estimator()(batch.clone())["advantage"]
    for p in team.critic.parameters():
        p.data.zero_()
    torch.testing.assert_close(team.estimator()(batch, params=params)["advantage"], expected)
    torch.testing.assert_close(team.estimator().value_estimate(batch, params=params), batch["value_target"])


def test_one_reward_for_the_team_is_everyones():
    team = make_team("categorical")
    batch = make_batch(team, ENDS)
    batch["next", "reward"] = batch["next", "reward"].mean(-2, keepdim=True).expand(2, 7, N, 1).clone()
    shared = batch.clone()
    shared["next", "reward"] = batch["next", "reward"][..., 0, :]
    torch.testing.assert_close(team.estimator()(shared)["advantage"], team.estimator()(batch)["advantage"])


def test_an_absent_agent_changes_nothing():
    team = make_team("tanh")
    batch = make_batch(team, ENDS)
    batch["mask"] = torch.ones(2, 7, N, dtype=torch.bool)
    batch["mask"][:, 3:, 2] = False
    batch["next", "mask"] = torch.cat([batch["mask"][:, 1:], batch["mask"][:, -1:]], 1)
    batch["log_prob"] = batch["log_prob"] + 0.3 * torch.randn_like(batch["log_prob"])

    def run(td):
        torch.manual_seed(0)
        return team.estimator(off_policy=True)(td)

    before = run(batch.clone())
    changed = batch.clone()
    absent = ~changed["mask"]
    changed["log_prob"][absent] = -torch.inf
    changed["next", "reward"][absent] = torch.nan
    changed["action"][absent] = 0.99
    after = run(changed)
    torch.testing.assert_close(after["advantage"][..., :2, :], before["advantage"][..., :2, :])
    assert (after["advantage"][absent] == 0).all()
    assert all(after[key].isfinite().all() for key in ("advantage", "value_target"))


def test_ratios_that_are_no_numbers_are_left_out():
    team = make_team("categorical")
    batch = make_batch(team)
    batch["log_prob"][0, 2, 1] = torch.nan
    batch["log_prob"][1, 2, 1] = -torch.inf
    team.estimator(off_policy=True)(batch)
    assert batch["advantage"].isfinite().all()
    assert batch["value_target"].isfinite().all()
    assert batch["advantage"][0, 2, 1] == 0
    assert (~batch["valid"]).nonzero().tolist() == [[0, 2, 1], [1, 2, 1]]
    assert batch["importance_weight"][~batch["valid"]].tolist() == [0, 0]


def test_the_loss_reads_the_ratios_that_the_estimator_writes():
    """min(r A, clip(r, ρ(1-ε), ρ(1+ε)) A) with r = π_θ/μ, by the default keys."""
    team = make_team("categorical")
    batch = make_batch(team)
    batch["log_prob"] += 0.3 * torch.randn(batch["log_prob"].shape, dtype=torch.float64)  # of an older policy
    team.estimator(off_policy=True)(batch)
    loss = SurrogateLoss(team.policy, team.critic, surrogate="clip", epsilon=0.1)
    loss.set_keys(sample_log_prob="old_log_prob", mask="valid")
    with torch.no_grad():
        loss.actor_network_params.apply_(lambda x: x + 0.1 * torch.randn_like(x))
        ratio = (loss.current_log_prob(batch) - batch["log_prob"]).exp()
        old, advantage = batch["importance_weight"], batch["advantage"].squeeze(-1)
        gain = torch.minimum(ratio * advantage, torch.clamp(ratio, old * 0.9, old * 1.1) * advantage)
        torch.testing.assert_close(loss.actor_loss(batch)["loss_objective"], -gain.mean())
    assert (ratio / old - 1).abs().max() > 0.1


def test_a_last_observation_that_allows_no_action():
    team = make_team("masked")
    batch = make_batch(team, ENDS)
    expected = team.estimator()(batch.clone())["advantage"]
    batch["next", "action_mask"][batch["next", "terminated"].squeeze(-1)] = False
    torch.testing.assert_close(team.estimator()(batch)["advantage"], expected)


def test_nothing_written_has_a_gradient_and_the_loss_reaches_the_critic_alone():
    team = make_team("categorical")
    batch = make_batch(team, ENDS)
    with torch.enable_grad():
        team.estimator(off_policy=True)(batch)
    assert not any(value.requires_grad for value in batch.values(True, True))
    loss = SurrogateLoss(team.policy, team.critic, surrogate="clip")
    loss.set_keys(sample_log_prob="log_prob")
    loss.critic_loss(batch)["loss_critic"].backward()
    named = dict(loss.named_parameters())
    assert all((p.grad is not None) == name.startswith("critic") for name, p in named.items())


def test_a_loss_computes_its_advantages_with_it():
    team = make_team("categorical")
    batch = make_batch(team, ENDS)
    loss = SurrogateLoss(team.policy, team.critic, surrogate="clip")
    loss.set_keys(sample_log_prob="log_prob")
    loss.make_value_estimator(team.estimator())
    expected = team.estimator()(batch.clone())["advantage"]
    out = loss(batch)
    torch.testing.assert_close(out["loss_objective"], -expected.mean())
    assert sum(p.numel() for p in loss.value_estimator.parameters()) == 0


def test_names():
    team = make_team("masked", recurrent=True)
    estimator = team.estimator(off_policy=True)
    batch = make_batch(team).select(*estimator.in_keys, strict=True)
    estimator(batch).select(*estimator.out_keys, strict=True)
    nested = {"action": ("agents", "action"), "advantage": ("agents", "advantage"), "mask": ("agents", "mask")}
    estimator.set_keys(**nested)
    assert ("agents", "action") in estimator.in_keys
    assert ("agents", "advantage") in estimator.out_keys


@pytest.mark.parametrize(("setting", "value"), [("eta", 0.5), ("lmbda", 2), ("gamma", -1), ("truncation", "double")])
def test_bad_settings(setting, value):
    with pytest.raises(ValueError, match=f"{setting}={value}"):
        make_team().estimator(**{setting: value})


def test_what_is_missing_is_named():
    team = make_team("categorical")
    batch = make_batch(team)
    with pytest.raises(KeyError, match=r"'log_prob'.*older policies"):
        team.estimator(off_policy=True)(batch.exclude("log_prob"))
    for key in ("action", ("next", "reward"), ("next", "done"), ("next", "observation")):
        with pytest.raises(KeyError, match=str(key if isinstance(key, str) else key[1])):
            team.estimator()(batch.exclude(key))


def test_what_does_not_fit_is_refused():
    team = make_team("categorical")
    batch = make_batch(team)
    done = batch["next", "done"].unsqueeze(-1).expand(2, 7, N, 1)
    with pytest.raises(ValueError, match="whole team"):
        team.estimator()(batch.clone().set(("next", "done"), done))
    with pytest.raises(ValueError, match="one number per agent"):
        team.estimator()(batch.clone().set(("next", "reward"), batch["next", "reward"].squeeze(-1)))
    with pytest.raises(ValueError, match="Shapes differ"):
        team.estimator(off_policy=True)(batch.clone().set("log_prob", batch["log_prob"].unsqueeze(-1)))
    with pytest.raises(ValueError, match="no dimension"):
        team.estimator()(batch[0, 0])
    named = batch.clone()
    named.names = ["time", None]
    with pytest.raises(ValueError, match="last batch dimension"):
        team.estimator()(named)
    with pytest.raises(ValueError, match="computes next_value itself"):
        team.estimator().value_estimate(batch, next_value=batch["next", "reward"])
    state_value = GPAE(gamma=0.9, lmbda=0.9, actor_network=team.policy, value_network=SHARED)
    with pytest.raises(ValueError, match="one value per agent"):
        state_value(batch)
