"""One agent's gradient steps on a surrogate gain, by the optimizer that it is given."""

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

    def __call__(self, agent: Agent, data: TensorDict, weight: Tensor) -> StepInfo:
        """Step on all rows of ``data``, weighted by ``weight`` [*]."""
        loss = self.loss(agent, data, weight)
        agent.policy.backward(loss)
        grad_norm = self._clip(agent.policy.parameters)
        agent.optimizer.step()
        loss = loss.detach()
        return StepInfo(loss, grad_norm, loss.isfinite() & grad_norm.isfinite())

    def loss(self, agent: Agent, data: TensorDict, weight: Tensor) -> Tensor:
        """L_i, with the graph to the agent's parameters."""
        mask = data.get("mask", None)
        outputs = agent.policy.forward(data["inputs"])
        log_prob = agent.policy.log_prob(outputs, data["action"])
        log_ratio = F.log_ratio(log_prob, data["old_log_prob"], mask)
        F.check_same_shape(log_ratio=log_ratio, advantage=data["advantage"], weight=weight)
        gain = F.SURROGATES[self.surrogate].gain(log_ratio, data["advantage"], self.epsilon)
        loss = -F.masked_mean(weight * gain, mask)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * F.masked_mean(agent.policy.entropy(outputs), mask)
        return loss

    def _clip(self, parameters: list[nn.Parameter]) -> Tensor:
        norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or float("inf"))
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
        """Take the steps; the losses and gradient norms of the result are means over them."""
        needed = ("inputs", "action", "advantage", "old_log_prob", "mask")
        data = data.select(*needed, strict=False).set("weight", weight)
        infos = []
        for rows in minibatches(len(data), self.epochs, self.minibatch, self.generator):
            part = data[rows]
            infos.append(self.step(agent, part, part["weight"]))
        return mean_info(infos)


def minibatches(rows: int, epochs: int, size: int, generator: torch.Generator):
    """Yield the indices of each minibatch of each epoch.

    Examples:
        >>> [len(rows) for rows in minibatches(5, 2, 2, torch.Generator())]
        [2, 2, 1, 2, 2, 1]
    """
    for _ in range(epochs):
        yield from torch.randperm(rows, generator=generator, device=generator.device).split(size)


def mean_info(infos: list[StepInfo]) -> StepInfo:
    """Means of losses and gradient norms; finite if all are."""
    loss, grad_norm, finite = (torch.stack(column) for column in zip(*infos, strict=True))
    return StepInfo(loss.mean(), grad_norm.mean(), finite.all())
