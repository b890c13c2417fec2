"""Policies of single agents, built as BenchMARL builds those of a group."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from benchmarl.models import Deepsets, Gnn
from benchmarl.models.common import Model
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase, TensorDictSequential
from torchrl.data import Composite

from benchmarl_trust.policy import GroupPolicy, PaddedNormal, fork_rng, normal_extractor

if TYPE_CHECKING:
    from benchmarl_trust.algorithms.common import TrustRegion


def group_policy(
    algorithm: "TrustRegion", group: str, policy: ProbabilisticTensorDictSequential, continuous: bool
) -> GroupPolicy:
    """The group's policy by agent."""
    return GroupPolicy(
        policy,
        n_agents=len(algorithm.group_map[group]),
        example=_example(algorithm, group),
        make_twin=_twin_maker(algorithm, group, policy, continuous),
    )


def _example(algorithm: "TrustRegion", group: str) -> TensorDict:
    """A random input of the group's policy, to probe it with."""
    shape = (2, 3) if algorithm.has_rnn else (4,)
    example = TensorDict({}, batch_size=shape, device=algorithm.device)
    with fork_rng(algorithm.device):  # the run's random numbers stay as they are
        agents = algorithm.observation_spec[group].rand(shape).to(algorithm.device)
    masks = algorithm.action_mask_spec
    if masks is not None and group in masks.keys():
        agents.update(masks[group].to(algorithm.device).one(shape))
    example[group] = agents.apply(lambda x: x if x.dtype == torch.bool else x.float())
    example["is_init"] = torch.zeros(*shape, 1, dtype=torch.bool, device=algorithm.device)
    return example


def _twin_maker(
    algorithm: "TrustRegion", group: str, policy: ProbabilisticTensorDictSequential, continuous: bool
) -> Callable[[], TensorDictModuleBase] | None:
    """A function that makes the policy of one agent, without its distribution; None for graph networks.

    Those keep one module per agent and look at all of them.
    """
    model = next(module for module in policy.modules() if isinstance(module, Model))
    if any(isinstance(module, Gnn | Deepsets) for module in model.modules()):
        return None

    def of_one_agent(spec: Composite) -> Composite:
        return Composite({group: spec[group][:1]})

    def make_twin() -> TensorDictModuleBase:
        twin = algorithm.model_config.get_model(
            input_spec=of_one_agent(model.input_spec),
            output_spec=of_one_agent(model.output_spec),
            agent_group=group,
            input_has_agent_dim=True,
            n_agents=1,
            centralised=False,
            share_params=True,
            device=algorithm.device,
            action_spec=algorithm.action_spec,
        )
        if not continuous:
            return TensorDictSequential(twin)
        padding = [module.executed for module in policy.modules() if isinstance(module, PaddedNormal)]
        executed = padding[0][0] if padding else None  # GroupPolicy gives each twin its agent's row
        extractor = normal_extractor(algorithm.scale_mapping, group, executed)
        # TensorDictSequential annotates each of its modules as a list of them.
        return TensorDictSequential(twin, extractor)  # pyright: ignore[reportArgumentType]

    return make_twin
