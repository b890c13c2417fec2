"""Numbers of the public reference implementations of HAPPO and HATRPO and their clip- variants, in float64.

The files in tests/data were made by running HARL's HAPPO and HATRPO and Le & Ta's clip-HAPPO and clip-HATRPO on a tiny
problem: 3 agents, 64 frames, one full batch (HAPPO: 3 epochs), agent order [2, 0, 1].
"""

import json
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from tensordict.nn.distributions import NormalParamExtractor
from torchrl.modules import IndependentNormal, MultiAgentMLP

from benchmarl_trust.policy import Agent, GroupPolicy, remember_old_policy
from benchmarl_trust.updates import (
    GradientStep,
    NaturalGradient,
    NaturalStep,
    StepInfo,
    UniformAllocation,
    sweep,
)
from benchmarl_trust.updates.natural import LocalModel

DATA = Path(__file__).parents[1] / "data"
LAYERS = {"0.weight": "W1", "0.bias": "b1", "2.weight": "W2", "2.bias": "b2", "4.weight": "W3", "4.bias": "b3"}


@pytest.fixture(autouse=True)
def _default_dtype():
    """The bias of the scale mapping is computed in the default dtype; the numbers were made with float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def close(got, expected):
    """To 1e-10 of the largest entry."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


def flat(named, names):
    """A dictionary of parameter-shaped lists as one vector, in the order of the policy's parameters."""
    return torch.cat([torch.tensor(named[name], dtype=torch.float64).flatten() for name in names])


def network(n_agents, outputs, share):
    return MultiAgentMLP(4, outputs, n_agents, centralized=False, share_params=share, num_cells=[8, 8]).double()


def policy_of(case):
    """The reference's networks as one TorchRL policy of the group."""
    discrete = case["action_space"] == "discrete"
    outputs = 3 if discrete else 4

    def body(n, share):
        net = TensorDictModule(network(n, outputs, share), [("agents", "obs")], [("agents", "logits")])
        if discrete:
            return [net]
        keys = [("agents", "loc"), ("agents", "scale")]
        return [net, TensorDictModule(NormalParamExtractor("biased_softplus_1.0"), [("agents", "logits")], keys)]

    head = ProbabilisticTensorDictModule(
        [("agents", "logits")] if discrete else [("agents", "loc"), ("agents", "scale")],
        [("agents", "action")],
        distribution_class=torch.distributions.Categorical if discrete else IndependentNormal,
    )
    policy = ProbabilisticTensorDictSequential(*body(3, False), head)
    for name, p in policy.named_parameters():
        key = LAYERS[".".join(name.split(".")[-2:])]
        values = [case["params_init"][i][key] for i in range(3)]
        p.data.copy_(torch.tensor(values, dtype=torch.float64).reshape(p.shape))
    return policy, lambda: ProbabilisticTensorDictSequential(*body(1, True), head)[:-1]


def agents_of(case, twin):
    """The policy, and its agents with the case's data."""
    policy, make_twin = policy_of(case)
    discrete = case["action_space"] == "discrete"
    obs = torch.tensor(case["obs"], dtype=torch.float64).transpose(0, 1)
    action = torch.tensor(case["actions"], dtype=torch.int64 if discrete else torch.float64).transpose(0, 1)
    batch = TensorDict(agents=TensorDict(obs=obs, batch_size=(64, 3)), batch_size=64)
    group = GroupPolicy(policy, 3, batch[:4], make_twin if twin else None)
    assert group.fast is twin
    agents = []
    for agent in group.agents:
        data = TensorDict(
            {
                "inputs": agent.inputs(batch),
                "action": action[:, agent.index],
                "advantage": torch.tensor(case["advantage"][agent.index], dtype=torch.float64).flatten(),
            },
            batch_size=64,
        )
        config = case["config"]
        optimizer = torch.optim.Adam(agent.parameters, lr=config["lr"], eps=config["opti_eps"])
        agents.append(Agent(agent, optimizer, data))
        remember_old_policy(agents[-1])
        close(agents[-1].data["old_log_prob"], case["old_log_prob"][agent.index])
    return policy, agents


def check_factor_and_parameters(policy, agents, info, log_factor, expected):
    """M handed over before and after the turn, and the agent's parameters after it."""
    close(log_factor.exp(), expected["factor_before"])
    log_factor = log_factor + info.log_ratio
    close(log_factor.exp(), expected["factor_after"])
    close(agents[info.agent].data["old_log_prob"] + info.log_ratio, expected["new_log_prob"])
    for name, p in policy.named_parameters():
        key = LAYERS[".".join(name.split(".")[-2:])]
        close(p.data[info.agent], expected["params_after"][key])
    return log_factor


@pytest.mark.parametrize("twin", [True, False], ids=["one-agent twin", "whole group"])
@pytest.mark.parametrize("case_name", ["box_softplus", "disc_joint_adv"])
@pytest.mark.parametrize("file", ["happo", "clip_happo"])
def test_happo_reference_numbers(file, case_name, twin):
    case = json.loads((DATA / f"{file}.json").read_text())[case_name]
    config = case["config"]
    policy, agents = agents_of(case, twin)
    one = GradientStep("clip", config["clip_param"], config["entropy_coef"], config["max_grad_norm"])
    seen = []

    def step(agent, data, weight, place):
        infos = [one(agent, data, weight) for _ in range(config["ppo_epoch"])]
        seen.append((weight, infos))
        return StepInfo(*(torch.stack(values).mean() for values in zip(*infos, strict=True)))

    infos = sweep(agents, [2, 0, 1], step, factor="capped" if file.startswith("clip") else "full")
    log_factor = torch.zeros(64, dtype=torch.float64)
    for info, (weight, epochs), expected in zip(infos, seen, case["steps"], strict=True):
        assert info.agent == expected["agent"]
        close(weight, expected["factor_used"])
        for epoch, numbers in zip(epochs, expected["epochs"], strict=True):
            close(epoch.loss, numbers["loss"])
            close(epoch.grad_norm, numbers["grad_norm_before_clip"])
        log_factor = check_factor_and_parameters(policy, agents, info, log_factor, expected)


@pytest.mark.parametrize("twin", [True, False], ids=["one-agent twin", "whole group"])
@pytest.mark.parametrize("case_name", ["box_softplus", "disc_true_kl"])
@pytest.mark.parametrize("file", ["hatrpo", "clip_hatrpo"])
def test_hatrpo_reference_numbers(file, case_name, twin):
    case = json.loads((DATA / f"{file}.json").read_text())[case_name]
    config = case["config"]
    policy, agents = agents_of(case, twin)
    names = [LAYERS[".".join(name.split(".")[-2:])] for name, _ in policy.named_parameters()]
    turns = []

    class Allocation(UniformAllocation):
        def next(self, weight, moved):
            agent = self.agents[self.order[len(moved)]]
            given = case["steps"][len(turns)]["fvp_on_given_vector"]
            product = LocalModel(agent, agent.data).fisher_product(flat(given["v"], names))
            close(product + 0.1 * flat(given["v"], names), flat(given["fvp"], names))
            turns.append((weight, super().next(weight, moved)))
            return turns[-1][1]

    allocation = Allocation(agents, 3 * config["kl_threshold"], NaturalGradient(10, 0.1), [2, 0, 1])
    search = {key: config[key] for key in ("ls_step", "accept_ratio", "backtrack_coeff")}
    step = NaturalStep(agents, allocation, **search)
    infos = sweep(agents, step.choose, step, factor="capped" if file.startswith("clip") else "full")

    log_factor = torch.zeros(64, dtype=torch.float64)
    for info, (weight, turn), expected in zip(infos, turns, case["steps"], strict=True):
        assert info.agent == expected["agent"]
        close(weight, expected["factor_used"])
        close(turn.objective, expected["surrogate_before"])
        close(turn.proposal.gradient[0], flat(expected["gradient"], names))
        close(turn.proposal.direction[0], flat(expected["cg_direction"], names))
        close(info.step.step_size, expected["step_size"])
        (trial,) = expected["line_search"]
        assert trial["accepted"]
        assert info.step.accepted_fraction == 1
        close(info.step.kl_spent, trial["kl"])
        close(info.step.gain_realised, trial["loss_improve"])
        close(info.step.gain_predicted, trial["expected_improve"])
        log_factor = check_factor_and_parameters(policy, agents, info, log_factor, expected)
