"""Small policies in float64 with a batch each, to check the sequential update against loops written by hand."""

from typing import NamedTuple

import torch
from benchmarl.models import CnnConfig, GnnConfig, GruConfig, LstmConfig, MlpConfig
from benchmarl.models.common import SequenceModelConfig
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from tensordict.nn.distributions import NormalParamExtractor
from torch import nn
from torchrl.data import Composite, Unbounded
from torchrl.modules import IndependentNormal, MaskedCategorical, TanhNormal

from benchmarl_trust.policy import GroupPolicy

N, FEATURES, ACTIONS, KINDS = 3, 4, 2, 5
LAYERS = {"activation_class": nn.Tanh, "layer_class": nn.Linear}
RNN = {"hidden_size": 6, "n_layers": 1, "bias": True, "dropout": 0, "compile": False}
RNN |= {"mlp_num_cells": [5], "mlp_activation_class": nn.Tanh, "mlp_layer_class": nn.Linear}
CNN = {"cnn_num_cells": [3], "cnn_kernel_sizes": 3, "cnn_strides": 1, "cnn_paddings": 0}
CNN |= {"cnn_activation_class": nn.Tanh, "mlp_num_cells": [4], "mlp_activation_class": nn.Tanh}
CNN |= {"mlp_layer_class": nn.Linear}


SETS = {"aggr": "sum", "out_features_local_nn": 6, "local_nn_num_cells": [5], "global_nn_num_cells": [5]}
SETS |= {"local_nn_activation_class": nn.Tanh, "global_nn_activation_class": nn.Tanh}


def mlp(*cells, **kwargs):
    return MlpConfig(num_cells=list(cells), **LAYERS, **kwargs)


def gnn():
    from torch_geometric.nn.conv import GATv2Conv

    return GnnConfig(topology="full", self_loops=True, gnn_class=GATv2Conv)


def sequence(*configs):
    return SequenceModelConfig(list(configs), [6] * (len(configs) - 1))


MODELS = {
    "mlp": lambda: mlp(8, 8),
    "gru": lambda: GruConfig(**RNN),
    "lstm": lambda: LstmConfig(**RNN),
    "cnn": lambda: CnnConfig(**CNN),
    "gru-mlp": lambda: SequenceModelConfig([GruConfig(**RNN), mlp(4)], [5]),
    "gnn": gnn,
    "gnn-mlp": lambda: SequenceModelConfig([gnn(), mlp(4)], [5]),
    "mlp-gnn-mlp": lambda: SequenceModelConfig([mlp(8), gnn(), mlp(4)], [5, 3]),
}
RECURRENT = ("gru", "lstm", "gru-mlp")


class Problem(NamedTuple):
    """A group's policy, its view by agent, and a batch collected by a policy nearby."""

    policy: ProbabilisticTensorDictSequential
    group: GroupPolicy
    batch: TensorDict


def make_problem(
    model="mlp", distribution="tanh", n_agents=N, shared=False, twin=True, rows=24, dtype=torch.float64, device="cpu"
):
    torch.manual_seed(0)
    shape = (rows // 4, 4) if model in RECURRENT else (rows,)
    features = (8, 8, 3) if model == "cnn" else (FEATURES,)
    config = MODELS[model]()

    def body(n, share, device=device):
        outputs = 2 * ACTIONS if distribution in ("tanh", "normal") else KINDS
        spec = Composite(agents=Composite(observation=Unbounded((n, *features)), shape=(n,)))
        network = config.get_model(
            input_spec=spec,
            output_spec=Composite(agents=Composite(logits=Unbounded((n, outputs)), shape=(n,))),
            agent_group="agents",
            input_has_agent_dim=True,
            n_agents=n,
            centralised=False,
            share_params=share,
            device=device,
            action_spec=None,
        )
        if distribution in ("categorical", "masked"):
            return TensorDictSequential(network).to(device, dtype)
        keys = [("agents", "loc"), ("agents", "scale")]
        return TensorDictSequential(
            network, TensorDictModule(NormalParamExtractor("biased_softplus_1.0"), [("agents", "logits")], keys)
        ).to(device, dtype)

    head = _head(distribution, n_agents, dtype)
    policy = ProbabilisticTensorDictSequential(body(n_agents, shared, "cpu"), head)
    if device != "cpu":  # the same initial values there
        values = policy.state_dict()
        with torch.random.fork_rng(devices=[]):
            policy = ProbabilisticTensorDictSequential(body(n_agents, shared), head)
        policy.load_state_dict(values)
    batch = TensorDict(batch_size=shape)
    batch["agents", "observation"] = torch.randn(*shape, n_agents, *features, dtype=dtype)
    batch["agents", "action_mask"] = torch.rand(*shape, n_agents, KINDS) < 0.6
    batch["agents", "action_mask"][..., 0] = True
    batch["is_init"] = torch.zeros(*shape, 1, dtype=torch.bool)
    if model in RECURRENT:
        batch["is_init"][:, 0] = True
        batch["is_init"][1, 2] = True
    batch = batch.to(device)
    group = GroupPolicy(policy, n_agents, batch[:2], (lambda: body(1, True)) if twin else None)
    with torch.no_grad():
        policy(batch)
    batch["advantage"] = torch.randn(*shape, n_agents, dtype=dtype).to(device)
    return Problem(policy, group, batch)


def _head(distribution, n_agents, dtype):
    kinds = {
        "tanh": TanhNormal,
        "normal": IndependentNormal,
        "categorical": torch.distributions.Categorical,
        "masked": MaskedCategorical,
    }
    keys, kwargs = [("agents", "loc"), ("agents", "scale")], {}
    if distribution == "tanh":
        low = -torch.arange(1.0, n_agents * ACTIONS + 1, dtype=dtype).reshape(n_agents, ACTIONS)
        kwargs = {"low": low, "high": -2 * low}
    elif distribution == "categorical":
        keys = [("agents", "logits")]
    elif distribution == "masked":
        keys = {"logits": ("agents", "logits"), "mask": ("agents", "action_mask")}
    return ProbabilisticTensorDictModule(
        keys,
        [("agents", "action")],
        distribution_class=kinds[distribution],
        distribution_kwargs=kwargs,
        return_log_prob=True,
        log_prob_key=("agents", "log_prob"),
    )


def make_agents(problem, lr=1e-2, **adam):
    """Agents with data and optimizers, as an algorithm would make them."""
    group = problem.group
    shared = torch.optim.Adam(group.agents[0].parameters, lr=lr, **adam) if group.shared else None
    optimizers = [shared or torch.optim.Adam(agent.parameters, lr=lr, **adam) for agent in group.agents]
    return group.make_agents(problem.batch, problem.batch["advantage"], optimizers=optimizers)
