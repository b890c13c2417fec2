"""One agent's gradient steps on a surrogate gain, by the optimizer that it is given."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarl_trust import functional as F
from benchmarl_trust.updates.sweep import Agent, StepInfo


@dataclass
class GradientStep:
    r"""One optimizer step of one agent.

    .. math:: L_i = - \operatorname{mean}(w · \mathrm{gain}(x_i, A)) - c_H \operatorname{mean}(H_i), \qquad
        x_i = \log π_i - \log π_i^{old}

    Args:
        surrogate (str): a key of :data:`benchmarl_trust.functional.SURROGATES`.
        epsilon (float): radius of its trust region.
        entropy_coef (float): c_H.
        max_grad_norm (float, optional): clip the gradient's norm to this.
        max_grad_value (float, optional): clip the gradient's entries to this.
    """

    surrogate: str
    epsilon: float
    entropy_coef: float = 0.0
    max_grad_norm: float | None = None
    max_grad_value: float | None = None

    def __call__(self, agent: Agent, data: Mapping, weight: Tensor) -> StepInfo:
        """Step on all rows of ``data``, weighted by ``weight`` [*]."""
        loss = self.loss(agent, data, weight)
        agent.policy.backward(loss)
        grad_norm = self._clip(agent.policy.parameters)
        agent.optimizer.step()
        return StepInfo(loss.detach(), grad_norm)

    def loss(self, agent: Agent, data: Mapping, weight: Tensor) -> Tensor:
        """L_i, with the graph to the agent's parameters."""
        mask = data.get("mask", None)
        outputs = agent.policy.forward(data["inputs"])
        log_prob = agent.policy.log_prob(outputs, data["action"])
        log_ratio = F.log_ratio(log_prob, data["old_log_prob"], mask)
        loss = -F.surrogate_objective(self.surrogate, log_ratio, data["advantage"], weight, self.epsilon, mask)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * F.masked_mean(agent.policy.entropy(outputs), mask)
        return loss

    def _clip(self, parameters: list[nn.Parameter]) -> Tensor:
        norm = nn.utils.clip_grad_norm_(parameters, float("inf") if self.max_grad_norm is None else self.max_grad_norm)
        if self.max_grad_value is not None:
            nn.utils.clip_grad_value_(parameters, self.max_grad_value)
        return norm


@dataclass
class MinibatchEpochs:
    """All of one agent's steps in an iteration: several epochs of shuffled minibatches.

    Args:
        step (GradientStep): a single step.
        epochs (int): passes over the rows.
        minibatch (int): rows per step; the last minibatch of an epoch may be smaller.
        generator (torch.Generator): draws the permutations, on the data's device.
    """

    step: GradientStep
    epochs: int
    minibatch: int
    generator: torch.Generator

    def __call__(self, agent: Agent, data: TensorDict, weight: Tensor) -> StepInfo:
        """Take the steps; the loss and the gradient norm of the result are means over them."""
        # One gather per epoch and a plain dictionary per minibatch: TensorDicts would cost as much as the network.
        columns = {key: data[key] for key in ("inputs", "action", "advantage", "old_log_prob")} | {"weight": weight}
        if "mask" in data.keys():
            columns["mask"] = data["mask"]
        infos = []
        for rows in shuffles(len(data), self.epochs, self.generator):
            parts = zip(*(column[rows].split(self.minibatch) for column in columns.values()), strict=True)
            for part in parts:
                minibatch = dict(zip(columns, part, strict=True))
                infos.append(self.step(agent, minibatch, minibatch.pop("weight")))
        return StepInfo(*(torch.stack(values).mean() for values in zip(*infos, strict=True)))


def shuffles(rows: int, epochs: int, generator: torch.Generator):
    """Yield a permutation of the rows for each epoch.

    Examples:
        >>> [len(permutation) for permutation in shuffles(5, 2, torch.Generator())]
        [5, 5]
    """
    for _ in range(epochs):
        yield torch.randperm(rows, generator=generator, device=generator.device)


def fused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same Adam with PyTorch's fused step, unless its user chose an implementation or it has stepped before.

    BenchMARL leaves the choice to PyTorch, which on a CPU loops over the parameters one operation at a time. On a GPU
    the fused step keeps its counter there; another choice keeps it on the host, at one synchronisation per turn.
    """
    for group in optimizer.param_groups:
        chosen = group["foreach"] is not None or group["fused"] is not None
        chosen = chosen or group["capturable"] or group["differentiable"]
        if not optimizer.state and not chosen and all(p.is_floating_point() for p in group["params"]):
            group["fused"] = True
    return optimizer
