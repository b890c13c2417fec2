"""What is logged: a quantity of each agent and its mean, in one transfer to the host."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarl_trust import functional as F
from benchmarl_trust.updates import PositionInfo

#: What an agent met at its position, and how it is summed up over the minibatches of a shared policy.
AT_POSITION = {"factor_mean": Tensor.mean, "factor_max": Tensor.amax, "factor_ess": Tensor.mean}
AT_POSITION |= {"advantage_variance": Tensor.mean}


def each_and_mean(name: str, values: Tensor) -> dict[str, Tensor]:
    """A quantity of each agent, [N], and its mean over agents.

    Examples:
        >>> each_and_mean("kl", torch.tensor([1.0, 3.0]))
        {'kl_agent_0': tensor(1.), 'kl_agent_1': tensor(3.), 'kl': tensor(2., dtype=torch.float64)}
    """
    return {f"{name}_agent_{i}": value for i, value in enumerate(values.unbind())} | {
        name: values.mean(dtype=torch.float64)
    }


def to_host(metrics: Mapping[str, Tensor], prefix: str = "") -> dict[str, float]:
    """The same as numbers, under names with a prefix. The host waits once, whatever their number."""
    if not metrics:
        return {}
    values = torch.stack(list(metrics.values())).tolist()
    return {f"{prefix}{name}": value for name, value in zip(metrics, values, strict=True)}


def variance_of_each(value: Tensor) -> Tensor:
    """Each agent's variance over the samples [*, N], [N]."""
    return value.flatten(0, -2).var(0, correction=0)


def advantage_metrics(advantage: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Mean and spread of each agent's advantages [*, N], and the mean correlation between two agents'."""
    n_agents = advantage.shape[-1]
    flat = advantage.reshape(-1, n_agents).double()
    present = torch.ones_like(flat) if mask is None else mask.reshape(-1, n_agents).double()
    mean = F.mean_of_each(flat, mask)
    centred = (flat - mean) * present
    std = (centred.square().sum(0) / present.sum(0).clamp(min=1)).sqrt()
    metrics = each_and_mean("advantage_mean", mean) | each_and_mean("advantage_std", std)
    if n_agents > 1:
        both = present.T @ present
        scale = ((centred.square().T @ present) * (present.T @ centred.square())).sqrt()
        correlation = (centred.T @ centred) / scale.clamp(min=1e-12)
        pairs = ~torch.eye(n_agents, dtype=torch.bool, device=flat.device) & (both > 0)
        metrics["advantage_correlation"] = F.masked_mean(correlation, pairs)
    return metrics


def position_metrics(team: str, n_agents: int, infos: Sequence[PositionInfo]) -> dict[str, Tensor]:
    """Of M and what it weighs, by position in the order; for a shared policy over its minibatches."""
    metrics, prefix = {}, f"{team}/policy/"
    for name, over in AT_POSITION.items():
        values = torch.stack([getattr(info, name) for info in infos]).reshape(-1, n_agents)
        metrics[name] = over(values, 0)  # over one turn for separate policies, one per minibatch for shared ones
    each = {f"{prefix}{name}_position_{k}": x[k] for k in range(n_agents) for name, x in metrics.items()}
    return each | {f"{prefix}advantage_variance": metrics["advantage_variance"].mean()}


def step_means(turns: Sequence[Sequence[PositionInfo]]) -> dict[str, Tensor]:
    """Of all that the agents' steps have left behind, the mean over each agent's turns, [N]."""
    values = torch.stack([value for own in turns for info in own for value in info.step])
    names = turns[0][0].step._fields
    return dict(zip(names, values.reshape(len(turns), -1, len(names)).mean(1).unbind(-1), strict=True))
