"""The counterfactual critic: no path from an agent's action to its own value, and the right one from the others'."""

import pytest
import torch
from teams import DIMS, KINDS, OBS, POLICIES, make_batch, make_critic, make_team
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule
from torch import nn

from benchmarl_trust.policy import policy_features
from benchmarl_trust.value import CounterfactualCritic, counterfactual_table

N = 3


def ready(kind="categorical", recurrent=False, **kwargs):
    """A critic and a batch that it can be run on."""
    team = make_team(kind, N, recurrent)
    batch = make_batch(team, **kwargs)
    team.estimator()(batch)
    return team.critic, batch


def values(critic, batch):
    with torch.no_grad():
        return critic(batch.clone())["state_value"]


@pytest.mark.parametrize("recurrent", [False, True], ids=["mlp", "gru"])
@pytest.mark.parametrize("kind", POLICIES)
def test_no_agent_sees_its_own_action_and_every_other_does(kind, recurrent):
    critic, batch = ready(kind, recurrent)
    before = values(critic, batch)
    for i in range(N):
        changed = batch.clone()
        own = changed["action"].select(2, i)
        own.copy_((own + 1) % KINDS if own.dtype == torch.long else own + 0.3)
        change = (values(critic, changed) - before).abs().squeeze(-1)
        assert (change[..., i] == 0).all()
        others = [j for j in range(N) if j != i]
        assert (change[..., others] > 0).all()


@pytest.mark.parametrize("kind", ["normal", "tanh"])
def test_the_jacobian_in_the_actions_has_a_zero_diagonal(kind):
    critic, batch = ready(kind)
    action = batch["action"].requires_grad_()
    value = critic(batch)["state_value"]
    for i in range(N):
        (slope,) = torch.autograd.grad(value[..., i, 0].sum(), action, retain_graph=True)
        assert (slope[:, :, i] == 0).all()
        assert (slope[:, :, [j for j in range(N) if j != i]] != 0).all()


def test_against_copies_made_by_hand():
    critic, batch = ready("categorical")
    value = values(critic, batch)
    for b, t, i in ((0, 0, 0), (1, 3, 1), (1, 6, 2)):
        step = batch[b, t]
        rows = []
        for j in range(N):
            code = step["policy_features"][j] if i == j else nn.functional.one_hot(step["action"][j], KINDS)
            flag = torch.tensor([float(i == j)])
            rows.append(torch.cat([step["observation"][j], code.double(), flag.double()]))
        expected = critic.network.module[1].module(torch.cat(rows))
        torch.testing.assert_close(value[b, t, i], expected)


def test_the_table_of_continuous_actions():
    action, features = torch.rand(4, N, DIMS), torch.randn(4, N, 2 * DIMS)
    table = counterfactual_table(action, features)
    assert table.shape == (4, N, N, 2 * DIMS + 1)
    for i in range(N):
        for j in range(N):
            row = table[:, i, j]
            expected = features[:, j] if i == j else torch.cat([action[:, j], torch.zeros(4, DIMS)], -1)
            torch.testing.assert_close(row[:, :-1], expected)
            assert (row[:, -1] == float(i == j)).all()


def test_one_hot_actions_are_those_of_their_numbers():
    action, features = torch.randint(KINDS, (4, N)), torch.rand(4, N, KINDS)
    hot = nn.functional.one_hot(action, KINDS)
    torch.testing.assert_close(counterfactual_table(hot, features), counterfactual_table(action, features))


@pytest.mark.parametrize("recurrent", [False, True], ids=["mlp", "gru"])
def test_permuted_environments_give_permuted_values(recurrent):
    critic, batch = ready("categorical", recurrent, batch=5, steps=5)  # as many steps as environments
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(values(critic, batch[order]), values(critic, batch)[order], rtol=1e-12, atol=1e-12)


def test_any_batch_dimensions():
    critic, batch = ready("categorical")
    expected = values(critic, batch)
    torch.testing.assert_close(values(critic, batch.reshape(-1)), expected.reshape(-1, N, 1))
    torch.testing.assert_close(values(critic, batch.reshape(2, 7, 1)), expected.unsqueeze(2))
    torch.testing.assert_close(values(critic, batch[1, 2:3]), expected[1, 2:3])


def test_values_of_a_recurrent_critic_follow_time():
    critic, batch = ready("categorical", recurrent=True)
    before = values(critic, batch)
    later = batch.clone()
    later["observation"][:, 4:] = 0
    change = (values(critic, later) - before).abs()
    assert (change[:, :4] == 0).all()
    assert (change[:, 4:] > 0).all()


def test_an_absent_agents_action_and_policy_are_not_there():
    critic, batch = ready("normal")
    batch["mask"] = torch.ones(2, 7, N, dtype=torch.bool)
    batch["mask"][..., 2] = False
    before = values(critic, batch)
    batch["action"][..., 2, :] = torch.nan
    batch["policy_features"][..., 2, :] = torch.nan
    torch.testing.assert_close(values(critic, batch), before)


def test_gradients_reach_the_network_and_nothing_else():
    critic, batch = ready("categorical")
    batch["policy_features"].requires_grad_()
    critic(batch)["state_value"].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in critic.parameters())


def test_masked_actions_have_no_probability():
    head = make_team("masked").policy[-1]
    params = TensorDict(logits=torch.randn(4, KINDS), action_mask=torch.rand(4, KINDS) < 0.5, batch_size=4)
    params["action_mask"][:, 1] = True
    features = policy_features(head, params)
    assert (features[~params["action_mask"]] == 0).all()
    torch.testing.assert_close(features.sum(-1), torch.ones(4))


def test_continuous_features_are_mean_and_log_deviation():
    head = make_team("tanh").policy[-1]
    params = TensorDict(loc=torch.randn(4, DIMS), scale=torch.rand(4, DIMS) + 0.1, batch_size=4)
    torch.testing.assert_close(policy_features(head, params), torch.cat([params["loc"], params["scale"].log()], -1))


def test_unknown_distributions_are_refused():
    head = ProbabilisticTensorDictModule(["rate"], ["action"], distribution_class=torch.distributions.Poisson)
    with pytest.raises(ValueError, match="Poisson of parameters rate"):
        policy_features(head, TensorDict(rate=torch.ones(4, 1), batch_size=4))


def test_what_does_not_fit_is_refused():
    critic, batch = ready("normal")
    with pytest.raises(ValueError, match="do not belong to policy features"):
        critic(batch.clone().set("action", batch["action"][..., :1]))
    with pytest.raises(ValueError, match="do not belong to policy features"):
        critic(batch.clone().set("action", batch["action"][:, :, :2]))
    with pytest.raises(ValueError, match="batch dimension"):
        critic(batch[0, 0])
    with pytest.raises(ValueError, match="specification must follow"):
        make_critic(N, KINDS)(batch)
    with pytest.raises(ValueError, match="does not read 'table'"):
        CounterfactualCritic(
            TensorDictModule(nn.Linear(OBS, 1), ["observation"], ["v"]), (N, 5), "table", "a", "f", "v"
        )
    table = TensorDictModule(lambda x: x[..., :1], ["table"], ["value"])  # one number per agent, not one
    critic = CounterfactualCritic(table, (N, 2 * DIMS + 1), "table", "action", "policy_features", "state_value")
    with pytest.raises(ValueError, match="centralised with shared parameters"):
        critic(batch)
