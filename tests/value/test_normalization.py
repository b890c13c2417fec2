"""The normalised critic: units, gradients, and that rewards of another scale make no other problem."""

import pytest
import torch
from teams import make_batch, make_team
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.objectives.value import GAE

from benchmarl_trust.functional import Moments
from benchmarl_trust.value import GPAE, NormalizedCritic

GAMMA, SCALE, SHIFT = 0.9, 250.0, -30.0
KEYS = ("state_value", "normalized_value")
CUT = ((0, 2, False), (0, 4, False), (1, 0, False), (1, 5, False), (1, 6, False))
OVER = tuple((env, step, True) for env, step, _ in CUT)


def with_statistics(network, mean, std, shape=()):
    critic = NormalizedCritic(network, *KEYS, shape)
    moments = Moments(mean, mean**2 + std**2, 1.0)
    for buffer, moment in zip(critic.moments, moments, strict=True):
        buffer.copy_(3e-5 * torch.as_tensor(moment, dtype=torch.float64))
    return critic


def linear():
    torch.manual_seed(0)
    return TensorDictModule(torch.nn.Linear(4, 1).double(), ["observation"], ["state_value"])


def test_values_are_in_units_of_rewards_and_the_gradient_is_the_normalised_ones():
    network = linear()
    critic = with_statistics(network, 100.0, 20.0)
    batch = TensorDict(observation=torch.randn(5, 3, 4, dtype=torch.float64), batch_size=(5, 3))
    raw = network(batch.copy())["state_value"]
    critic(batch)
    torch.testing.assert_close(batch["normalized_value"], raw)
    torch.testing.assert_close(batch["state_value"], 100 + 20 * raw)
    assert batch["normalized_value"].requires_grad
    assert not batch["state_value"].requires_grad
    torch.testing.assert_close(critic.normalize(batch["state_value"]), raw)
    assert critic.normalize(batch["state_value"].float()).dtype == torch.float32
    assert len(list(critic.parameters())) == 2


def test_statistics_of_each_agent():
    critic = NormalizedCritic(linear(), *KEYS, (3, 1))
    value = torch.tensor([1.0, 10.0, 100.0]).reshape(3, 1) * torch.randn(500, 3, 1)
    mask = torch.ones(500, 3, dtype=torch.bool)
    mask[:400, 2] = False
    critic.update(value, mask)
    std = torch.stack([value[:, 0].std(correction=0), value[:, 1].std(correction=0), value[400:, 2].std(correction=0)])
    torch.testing.assert_close(critic.mean_and_std()[1].flatten().float(), std)


def gae(network, lmbda=0.8):
    estimator = GAE(gamma=torch.tensor(GAMMA, dtype=torch.float64), lmbda=lmbda, value_network=network)
    return estimator.double()


def estimators(team):
    """name -> (network, statistics' shape, estimator over a critic)"""
    mean = TensorDictModule(lambda x: x.mean(-1, keepdim=True), ["observation"], ["state_value"])
    gpae = {"gamma": GAMMA, "lmbda": 0.8, "actor_network": team.policy}
    older = {**gpae, "off_policy": True, "truncation": "dt", "eta": 1.1}
    return {
        "gae": (mean, (), gae),
        "gae, separate": (mean, (3, 1), gae),
        "gpae": (team.critic, (), lambda critic: GPAE(value_network=critic, **gpae)),
        "gpae, older data": (team.critic, (), lambda critic: GPAE(value_network=critic, **older)),
    }


@pytest.mark.parametrize(("shift", "ends"), [(SHIFT, CUT), (0.0, OVER)], ids=["scaled and shifted", "scaled"])
@pytest.mark.parametrize("name", ["gae", "gae, separate", "gpae", "gpae, older data"])
def test_rewards_of_another_scale_scale_advantages_and_change_nothing_else(name, shift, ends):
    """With statistics that correspond and the same network. A shift b of all rewards is b / (1 - γ) in every return
    where no trajectory terminates. What the network regresses on next is the same, so it goes on so.
    """
    team = make_team("categorical")
    network, shape, make = estimators(team)[name]
    results = []
    for scale, add in ((1.0, 0.0), (SCALE, shift)):
        critic = with_statistics(network, 2.0 * scale + add / (1 - GAMMA), 3.0 * scale, shape)
        for seed in (0, 1):
            batch = make_batch(team, ends, seed=seed)
            if name == "gpae, older data":
                batch["log_prob"] += 0.5 * torch.randn_like(batch["log_prob"])
            batch["next", "reward"] = scale * batch["next", "reward"] + add
            if name.startswith("gae"):
                for key in ("done", "terminated"):
                    batch["next", key] = batch["next", key].unsqueeze(-2).expand_as(batch["next", "reward"])
            estimator = make(critic)
            estimator.set_keys(value="state_value", **({"sample_log_prob": "log_prob"} if "gpae" in name else {}))
            torch.manual_seed(5)  # of actions at the ends
            with torch.no_grad():
                estimator(batch)
            critic.update(batch["value_target"])
            results.append((scale, batch["advantage"], critic.normalize(batch["value_target"])))
    for (_, advantage, target), (scale, other, other_target) in zip(results[:2], results[2:], strict=True):
        assert advantage.abs().max() > 1
        torch.testing.assert_close(other, scale * advantage, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(other_target, target, rtol=1e-8, atol=1e-8)


def test_from_nothing_it_settles_there():
    """Twenty states with two actions, and a network that regresses perfectly on the mean target of a state, from
    statistics without data: in the end only the scale is left.
    """
    torch.manual_seed(0)
    reward, after = torch.randn(20, 2, dtype=torch.float64), torch.randint(20, (20, 2))
    start, results = torch.randn(20, dtype=torch.float64), []
    for scale, shift in ((1.0, 0.0), (SCALE, SHIFT)):
        critic, output, advantages = NormalizedCritic(linear(), *KEYS), start, []
        for _ in range(300):
            value = critic.denormalize(output)
            target = scale * reward + shift + GAMMA * value[after]
            advantages.append((target - value.unsqueeze(-1)) / scale)
            critic.update(target)
            output = critic.normalize(target.mean(-1))
        results.append(advantages)
    assert results[0][-1].abs().max() > 1
    assert (results[1][0] - results[0][0]).abs().max() > 0.01
    torch.testing.assert_close(results[1][-1], results[0][-1], rtol=1e-6, atol=1e-6)
