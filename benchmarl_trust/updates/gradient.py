"""One agent's gradient steps on a surrogate gain, by the optimizer that it is given."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarl_trust import functional as F
from benchmarl_trust.policy import Agent, Head, forward, kl_of, old_outputs, surrogate_of
from benchmarl_trust.updates.compiled import COLUMNS, CompiledGradient
from benchmarl_trust.updates.sweep import StepInfo


@dataclass
class GradientStep:
    r"""One optimizer step of one agent.

    .. math:: L_i = - \operatorname{mean}(w · \mathrm{gain}(x_i + \log g, A)) - c_H \operatorname{mean}(H_i), \qquad
        x_i = \log π_i - \log π_i^{old}

    g is a factor inside the gain, 1 for all but A2PO.

    Args:
        surrogate (str): a key of :data:`benchmarl_trust.functional.SURROGATES`.
        epsilon (float or pair): radius of its trust region.
        entropy_coef (float): c_H.
        max_grad_norm (float, optional): clip the gradient's norm to this.
        max_grad_value (float, optional): clip the gradient's entries to this.
        by_position (bool): the agent at position k of N has the radius ε (1 + k/N)/2 (Wang et al. 2023, A2PO's
            ``near_linear`` schedule with weight ½, the authors').
        compiled (dict, optional): the compiled functions by the group's head and what of this step is part of them,
            which steps fill and use; to be kept over iterations. A function serves minibatches of the size that its
            group's first one had; others (an epoch's last, smaller one) are computed eagerly. None: all are.
    """

    surrogate: str
    epsilon: F.Epsilon
    entropy_coef: float = 0.0
    max_grad_norm: float | None = None
    max_grad_value: float | None = None
    by_position: bool = False
    compiled: dict[tuple[Head, str, float], CompiledGradient] | None = None

    def __call__(self, agent: Agent, data: Mapping, weight: Tensor, place: float = 1.0) -> StepInfo:
        """Step on all rows of ``data``, weighted by ``weight`` [*]; ``place`` is the agent's position k/N.

        Raises:
            ValueError: if the agent has no optimizer.
        """
        if agent.optimizer is None:
            raise ValueError("A gradient step needs an optimizer: give GroupPolicy.make_agents one for each agent.")
        loss = self._backward(agent, data, weight, place)
        grad_norm = self._clip(agent.policy.parameters)
        agent.optimizer.step()
        return StepInfo(loss, grad_norm)

    def loss(self, agent: Agent, data: Mapping, weight: Tensor, place: float = 1.0) -> Tensor:
        """L_i, with the graph to the agent's parameters."""
        outputs = agent.policy.forward(data["inputs"])
        return self._loss_of(agent.policy.head, outputs, data, weight, self.radius(place), self._draw(agent, data))

    def _loss_of(
        self,
        head: Head,
        outputs: tuple[Tensor, ...],
        data: Mapping,
        weight: Tensor,
        epsilon: F.Epsilon,
        draw: tuple[Tensor, ...],
    ) -> Tensor:
        loss = -surrogate_of(head, outputs, data, weight, self.surrogate, epsilon)
        if self.entropy_coef:
            entropy = head.entropy(outputs, draw=draw)
            loss = loss - self.entropy_coef * F.masked_mean(entropy, data.get("mask", None))
        return loss

    def _draw(self, agent: Agent, data: Mapping) -> tuple[Tensor, ...]:
        return agent.policy.draw(data["action"]) if self.entropy_coef else ()

    def _backward(self, agent: Agent, data: Mapping, weight: Tensor, place: float) -> Tensor:
        """Leave the gradient of L_i in ``grad`` of the agent's leaves; returns L_i."""
        if self.compiled is not None:
            key = agent.policy.head, self.surrogate, self.entropy_coef
            if key not in self.compiled:
                self.compiled[key] = CompiledGradient(agent.policy, data, self._loss_of)
            if self.compiled[key].rows == len(weight):
                draw = self._draw(agent, data)
                return self.compiled[key](agent.policy, data, weight, self.radius(place), draw)
        loss = self.loss(agent, data, weight, place)
        agent.policy.backward(loss)
        return loss.detach()

    def radius(self, place: float) -> F.Epsilon:
        """ε at the position k/N.

        Examples:
            >>> step = GradientStep("clip", 0.2, by_position=True)
            >>> [round(step.radius(k / 4), 3) for k in (1, 2, 3, 4)]
            [0.125, 0.15, 0.175, 0.2]
        """
        if not self.by_position:
            return self.epsilon
        share = (1 + place) / 2
        if not isinstance(self.epsilon, tuple):
            return share * self.epsilon
        negative, positive = self.epsilon
        return share * negative, share * positive

    def _clip(self, parameters: list[nn.Parameter]) -> Tensor:
        norm = nn.utils.clip_grad_norm_(parameters, float("inf") if self.max_grad_norm is None else self.max_grad_norm)
        if self.max_grad_value is not None:
            nn.utils.clip_grad_value_(parameters, self.max_grad_value)
        return norm


class EpochsInfo(NamedTuple):
    """A :class:`~benchmarl_trust.updates.StepInfo` with the number of epochs, where that is not given."""

    loss: Tensor
    grad_norm: Tensor
    epochs: Tensor


@dataclass
class MinibatchEpochs:
    """All of one agent's steps in an iteration: several epochs of shuffled minibatches.

    Args:
        step (GradientStep): a single step.
        epochs (int): passes over the rows.
        minibatch (int): rows per step; the last minibatch of an epoch may be smaller.
        generator (torch.Generator): draws the permutations, on the data's device.
        rows (int, optional): rows of an epoch; None for all of them.
        target_kl (float, optional): no further epoch once the agent's KL exceeds this, see :func:`exceeds_kl`.
    """

    step: GradientStep
    epochs: int
    minibatch: int
    generator: torch.Generator
    rows: int | None = None
    target_kl: float | None = None

    def __call__(self, agent: Agent, data: TensorDict, weight: Tensor, place: float = 1.0) -> StepInfo | EpochsInfo:
        """Take the steps; the loss and the gradient norm of the result are means over them."""
        # One gather per epoch and a plain dictionary per minibatch: TensorDicts would cost as much as the network.
        names = [name for name in ("inputs", *COLUMNS) if name in data.keys()]
        columns = {name: data[name] for name in names} | {"weight": weight}
        infos = []
        for epoch, rows in enumerate(shuffles(len(data), self.epochs, self.generator, self.rows), 1):
            parts = zip(*(column[rows].split(self.minibatch) for column in columns.values()), strict=True)
            for part in parts:
                minibatch = dict(zip(columns, part, strict=True))
                infos.append(self.step(agent, minibatch, minibatch.pop("weight"), place))
            if epoch < self.epochs and self._exceeds_kl(agent, data):
                break
        info = StepInfo(*(torch.stack(values).mean() for values in zip(*infos, strict=True)))
        return info if self.target_kl is None else with_epochs(info, epoch)

    def _exceeds_kl(self, agent: Agent, data: TensorDict) -> bool:
        return exceeds_kl(self.target_kl, [agent._replace(data=data)], self.rows, self.minibatch)


def with_epochs(info: StepInfo, epochs: int) -> EpochsInfo:
    """The same, and how many epochs were made."""
    return EpochsInfo(*info, epochs=torch.full_like(info.loss, epochs))


@torch.no_grad()
def exceeds_kl(bound: float | None, agents: Sequence[Agent], rows: int | None = None, chunk: int | None = None) -> bool:
    """Whether the exact KL(old ‖ new), the mean over the agents of each one's mean, exceeds the bound.

    The host waits once. A KL that is not a number exceeds every bound.

    Args:
        bound (float, optional): in nats; None: none exceeds it.
        agents (sequence of Agent): those whose policies have moved.
        rows (int, optional): of the data's end, the newest; None for all.
        chunk (int, optional): rows per forward pass.
    """
    if bound is None:
        return False
    kls = []
    for agent in agents:
        newest = agent.data if rows is None else agent.data[-rows:]
        kls.append(kl_of(agent.policy, old_outputs(newest), forward(agent, newest, chunk), newest))
    return not torch.stack(kls).mean() <= bound


def shuffles(rows: int, epochs: int, generator: torch.Generator, per_epoch: int | None = None) -> Iterator[Tensor]:
    """Yield the rows of each epoch in random order.

    Args:
        rows (int): how many there are.
        epochs (int): how many times to yield.
        generator (torch.Generator): draws the order, on its device.
        per_epoch (int, optional): how many of them make an epoch; None for all. With fewer, no row comes again before
            all have been (if ``per_epoch`` divides ``rows``).

    Examples:
        >>> [len(epoch) for epoch in shuffles(5, 2, torch.Generator())]
        [5, 5]
        >>> torch.cat(list(shuffles(6, 3, torch.Generator(), per_epoch=2))).sort().values
        tensor([0, 1, 2, 3, 4, 5])
    """
    per_epoch, left = per_epoch or rows, torch.empty(0)
    for _ in range(epochs):
        if len(left) < per_epoch:
            left = torch.randperm(rows, generator=generator, device=generator.device)
        yield left[:per_epoch]
        left = left[per_epoch:]
