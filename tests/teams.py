"""Small teams in plain TorchRL, in float64: a policy, a counterfactual critic, and batches of several trajectories."""

from typing import NamedTuple

import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from tensordict.nn.distributions import NormalParamExtractor
from torch import nn
from torchrl.modules import IndependentNormal, MaskedCategorical, TanhNormal

from benchmarl_trust.value import GPAE, CounterfactualCritic

OBS, DIMS, KINDS = 4, 2, 5
POLICIES = ("categorical", "masked", "normal", "tanh")


class Recurrent(nn.Module):
    """A GRU over time [*, T, ...] that starts anew where ``is_init`` says."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.cell, self.out = nn.GRUCell(inputs, 6), nn.Linear(6, outputs)

    def forward(self, x, is_init):  # [B, T, inputs], [B, T, 1]
        hidden, out = x.new_zeros(len(x), 6), []
        for t in range(x.shape[1]):
            hidden = self.cell(x[:, t], torch.where(is_init[:, t], 0, hidden))
            out.append(self.out(hidden))
        return torch.stack(out, 1)


class PerAgent(Recurrent):
    """The same for each agent by itself: [B, T, N, inputs]."""

    def forward(self, x, is_init):
        agents = [super(PerAgent, self).forward(x[..., i, :], is_init) for i in range(x.shape[-2])]
        return torch.stack(agents, -2)


class Team(NamedTuple):
    policy: ProbabilisticTensorDictSequential
    critic: CounterfactualCritic

    def estimator(self, gamma=0.9, lmbda=0.8, **kwargs) -> GPAE:
        estimator = GPAE(gamma=gamma, lmbda=lmbda, actor_network=self.policy, value_network=self.critic, **kwargs)
        estimator.set_keys(sample_log_prob="log_prob")
        return estimator


def make_team(kind="categorical", n_agents=3, recurrent=False) -> Team:
    torch.manual_seed(0)
    discrete = kind in ("categorical", "masked")
    outputs = KINDS if discrete else 2 * DIMS
    keys = {"logits": "logits", "mask": "action_mask"} if kind == "masked" else ["logits"]
    body = PerAgent(OBS, outputs) if recurrent else nn.Linear(OBS, outputs)
    modules = [TensorDictModule(body, ["observation", "is_init"] if recurrent else ["observation"], ["logits"])]
    if not discrete:
        modules.append(TensorDictModule(NormalParamExtractor(), ["logits"], ["loc", "scale"]))
        keys = ["loc", "scale"]
    head = ProbabilisticTensorDictModule(
        keys,
        ["action"],
        distribution_class={
            "categorical": torch.distributions.Categorical,
            "masked": MaskedCategorical,
            "normal": IndependentNormal,
            "tanh": TanhNormal,
        }[kind],
        return_log_prob=True,
        log_prob_key="log_prob",
    )
    policy = ProbabilisticTensorDictSequential(*modules, head).double()
    return Team(policy, make_critic(n_agents, outputs, recurrent))


def make_critic(n_agents, features, recurrent=False) -> CounterfactualCritic:
    inputs = n_agents * (OBS + features + 1)
    join = TensorDictModule(lambda x, table: torch.cat([x, table], -1).flatten(-2), ["observation", "table"], ["input"])
    if recurrent:
        value = TensorDictModule(Recurrent(inputs, 1), ["input", "is_init"], ["value"])
    else:
        value = TensorDictModule(nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, 1)), ["input"], ["value"])
    network = TensorDictSequential(join, value)
    return CounterfactualCritic(
        network, (n_agents, features + 1), "table", "action", "policy_features", "state_value", "mask"
    ).double()


def make_batch(team, ends=(), batch=2, steps=7, n_agents=3, seed=0) -> TensorDict:
    """Trajectories that end at ``ends``: (environment, step, terminated). Observations after an end are of a reset."""
    torch.manual_seed(seed)
    td = TensorDict(batch_size=(batch, steps))
    observation = torch.randn(batch, steps + 1, n_agents, OBS, dtype=torch.float64)
    mask = torch.rand(batch, steps + 1, n_agents, KINDS) < 0.6
    mask[..., 0] = True
    done, terminated, is_init = torch.zeros(3, batch, steps, 1, dtype=torch.bool)
    following, next_mask = observation[:, 1:].clone(), mask[:, 1:].clone()
    for env, step, final in ends:
        done[env, step], terminated[env, step] = True, final
        following[env, step] = torch.randn(n_agents, OBS, dtype=torch.float64)
        if step + 1 < steps:
            is_init[env, step + 1] = True
    td["observation"], td["action_mask"], td["is_init"] = observation[:, :-1], mask[:, :-1], is_init
    td["next", "observation"], td["next", "action_mask"] = following, next_mask
    td["next", "reward"] = torch.randn(batch, steps, n_agents, 1, dtype=torch.float64)
    td["next", "done"], td["next", "terminated"] = done, terminated
    with torch.no_grad():
        team.policy(td)
    return td.exclude("logits", "loc", "scale")
