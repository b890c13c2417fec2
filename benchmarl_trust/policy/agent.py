"""One agent: its policy, its data, and the policy as it was at the start of the iteration.

π_old is written here (:func:`remember_old_policy`) and read here (:func:`old_outputs`, :func:`log_ratio_of`,
:func:`kl_of`, :func:`surrogate_of`); nobody else knows under which keys it lies.

Shapes: [*] is [B], or [B, T] for recurrent policies; N the agents of the group. A *row* is an entry of the first
dimension: a step, or a sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from benchmarl_trust import functional as F
from benchmarl_trust.policy.head import Head, Product


@dataclass(eq=False)  # two policies are the same if they are one object, so that they can be keys
class AgentPolicy:
    """One agent's policy: what to run, and what of it to optimise.

    Attributes:
        body (TensorDictModuleBase): writes the distribution's parameters; of this agent alone (a one-agent twin) or of
            the whole group.
        slot (int): the agent's place in what ``body`` reads and writes.
        index (int): the agent's place in the group.
        width (int): the number of agents that ``body`` runs.
        head (Head): the distribution.
        parameters (list of nn.Parameter): the leaves to optimise. They share memory with the group's policy: an
            in-place step on them is a step of the policy.
        sources (list of (nn.Parameter, int or None), optional): where autograd leaves each leaf's gradient, if not in
            the leaf itself: a parameter of the group and the row of it.
        stack (StackedPolicy, optional): the whole group's, if its parameters are stacked by agent.
    """

    body: TensorDictModuleBase
    slot: int
    index: int
    width: int
    head: Head
    parameters: list[nn.Parameter]
    sources: list[tuple[nn.Parameter, int | None]] | None = None
    stack: "StackedPolicy | None" = None

    @property
    def alone(self) -> bool:
        """Whether ``body`` runs this agent and no other, and its own parameters are the leaves."""
        return self.width == 1 and self.sources is None

    def inputs(self, batch: TensorDictBase) -> TensorDict:
        """What ``body`` reads, of the agents that it runs."""
        keys = [*self.body.in_keys, *(key for key in self.head.keys if key not in self.body.out_keys)]
        if self.width > 1:
            return batch.select(*keys, strict=False).detach()
        inputs = TensorDict({}, batch_size=batch.batch_size, device=batch.device)
        for key in keys:
            value = batch.get(key, None)
            if value is None:
                continue  # a recurrent state, which training starts from zero
            if self.is_of_agents(key):  # others (is_init) have no agent dimension
                value = value.narrow(batch.ndim, self.index, 1).contiguous()
            inputs[key] = value.detach()
        return inputs

    def is_of_agents(self, key: NestedKey) -> bool:
        """Whether the entry is the agents', however deep: (agents, observation, RGB) beside (agents, loc)."""
        group = _path(self.head.keys[0])[:-1]
        return _path(key)[: len(group)] == group if group else key != "is_init"

    def forward(self, inputs: TensorDictBase) -> tuple[Tensor, ...]:
        """The distribution's parameters for this agent, each [*, ...]."""
        outputs = self.body(inputs)
        return tuple(outputs.get(key).select(inputs.ndim, self.slot) for key in self.head.keys)

    def log_prob(self, parameters: tuple[Tensor, ...], action: Tensor) -> Tensor:
        """Log-prob of base actions (see the head), [*]."""
        return self.head.log_prob(parameters, action)

    def kl(self, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> Tensor:
        """KL(old ‖ new), [*]."""
        return self.head.kl(old, new)

    def entropy(self, parameters: tuple[Tensor, ...]) -> Tensor:
        """Entropy, [*]."""
        return self.head.entropy(parameters, self.index)

    def draw(self, action: Tensor) -> tuple[Tensor, ...]:
        """What the head estimates this agent's entropy with, beside the distribution's parameters."""
        return self.head.draw(action, self.index)

    def backward(self, loss: Tensor) -> None:
        """Leave the gradient of ``loss`` in ``grad`` of the agent's leaves, and nowhere else."""
        for leaf, gradient in zip(self.parameters, self._gradients(loss), strict=True):
            set_gradient(leaf, gradient)

    def gradient(self, values: Tensor | tuple[Tensor, ...], weights: tuple | None = None, **kwargs) -> Tensor:
        """The gradient of ``values``, times ``weights`` and summed, with respect to all leaves in one vector, [P].

        ``kwargs`` are those of :func:`torch.autograd.grad`.
        """
        gradients = zip(self.parameters, self._gradients(values, grad_outputs=weights, **kwargs), strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in gradients])

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """A vector [P], or a longer one that is padded at its end, as tensors of the leaves' shapes and types."""
        sizes = [p.numel() for p in self.parameters]
        parts = vector[: sum(sizes)].split(sizes)
        return [part.reshape(p.shape).to(p.dtype) for part, p in zip(parts, self.parameters, strict=True)]

    def _gradients(self, values: Tensor | tuple[Tensor, ...], **kwargs) -> list[Tensor | None]:
        sources = self.parameters if self.sources is None else [source for source, _ in self.sources]
        gradients = torch.autograd.grad(values, sources, allow_unused=True, **kwargs)
        rows = [None] * len(gradients) if self.sources is None else [row for _, row in self.sources]
        return [g if row is None or g is None else g[row] for g, row in zip(gradients, rows, strict=True)]


def set_gradient(leaf: nn.Parameter, gradient: Tensor | None) -> None:
    """Leave it in ``grad``, in the leaf's own layout in memory, as ``backward`` does: PyTorch's fused Adam goes through
    both memories alike, and a convolution's gradient comes with other strides.
    """
    if gradient is not None and gradient.stride() != leaf.stride():
        gradient = torch.empty_like(leaf).copy_(gradient)
    leaf.grad = gradient


@dataclass(eq=False)
class StackedPolicy:
    """All agents of a group at once: row i of each parameter is agent i's, and no other agent's.

    Attributes:
        body (TensorDictModuleBase): writes the distributions' parameters.
        head (Head): the distribution.
        parameters (list of nn.Parameter): each [N, ...].
    """

    body: TensorDictModuleBase
    head: Head
    parameters: list[nn.Parameter]

    def columns(self, agents: Sequence["Agent"]) -> TensorDict:
        """:func:`columns_of` all its agents, and under ``inputs`` what ``body`` reads."""
        columns, first = columns_of(agents), agents[0]
        columns["inputs"] = first.data["inputs"].empty()
        for key, value in first.data["inputs"].items(include_nested=True, leaves_only=True):
            if first.policy.width == 1 and first.policy.is_of_agents(key):
                value = torch.cat([agent.data["inputs"][key] for agent in agents], first.data.ndim)
            columns[("inputs", *_path(key))] = value
        return columns

    def forward(self, inputs: TensorDictBase) -> tuple[Tensor, ...]:
        """The distributions' parameters, each [*, N, ...]."""
        outputs = self.body(inputs)
        return tuple(outputs.get(key) for key in self.head.keys)

    def gradient(self, values: tuple[Tensor, ...], weights: tuple | None = None, **kwargs) -> Tensor:
        """As :meth:`AgentPolicy.gradient`, [N, P]."""
        gradients = torch.autograd.grad(values, self.parameters, weights, materialize_grads=True, **kwargs)
        return torch.cat([gradient.flatten(1) for gradient in gradients], -1)


class Agent(NamedTuple):
    """An agent of the team, with what an update of it needs.

    ``data`` has batch size [*] and the entries ``inputs`` (of the policy), ``action`` (before squashing),
    ``advantage`` [*] and, once :func:`remember_old_policy` has run, ``old_log_prob`` [*] and ``old_0``, ``old_1``,
    the old distribution's parameters. Optional: ``mask`` [*], True where the agent takes part; ``log_importance`` [*],
    log π_old/μ where the data is of an older policy μ. A natural step needs no optimizer.
    """

    policy: AgentPolicy
    optimizer: torch.optim.Optimizer | None
    data: TensorDict


def columns_of(agents: Sequence[Agent]) -> TensorDict:
    """The data of agents of one group, [*]: each entry but ``inputs`` as columns, [*, N]."""
    first = agents[0].data
    names = [name for name in first.keys() if name != "inputs"]
    columns = {name: torch.stack([agent.data[name] for agent in agents], first.ndim) for name in names}
    return TensorDict(columns, batch_size=first.batch_size)


@torch.no_grad()
def remember_old_policy(agent: Agent, chunk: int | None = None) -> None:
    """Store the log-probs and distribution of the policy as it is now: π_old of this iteration.

    They are computed on the batch rather than taken from collection: a recurrent policy, which training runs from a
    zero state, has other log-probs there, and its ratios would not start at 1.

    Args:
        agent (Agent): its ``data`` gets ``old_log_prob`` and ``old_0``, ``old_1``.
        chunk (int, optional): rows per forward pass, which bounds the memory.
    """
    outputs = forward(agent, agent.data, chunk)
    agent.data["old_log_prob"] = agent.policy.log_prob(outputs, agent.data["action"])
    for i, output in enumerate(outputs):
        agent.data[f"old_{i}"] = output.clone()  # it may be a parameter itself, such as a standard deviation


def old_outputs(data: Mapping) -> tuple[Tensor, ...]:
    """The old distribution's parameters that :func:`remember_old_policy` stored."""
    return tuple(data[key] for key in ("old_0", "old_1") if key in data.keys())


@torch.no_grad()
def forward(agent: Agent, data: TensorDict, chunk: int | None = None) -> tuple[Tensor, ...]:
    """The distribution's parameters for this agent as its policy is now, each [*, ...]."""
    inputs = cast(TensorDictBase, data["inputs"])
    if chunk is None or chunk >= len(data):
        return agent.policy.forward(inputs.copy())
    parts = [agent.policy.forward(part) for part in inputs.split(chunk)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def log_ratio_of(policy: AgentPolicy | Head, outputs: tuple[Tensor, ...], data: Mapping) -> Tensor:
    """The log-ratio x = log π - log π_old of the executed actions, [*]; 0 where the agent is absent. Or that of several
    agents, [*, N], from their head and :func:`columns_of` them.
    """
    log_prob = policy.log_prob(outputs, data["action"])
    return F.log_ratio(log_prob, data["old_log_prob"], data.get("mask", None))


def surrogate_of(
    policy: AgentPolicy | Head,
    outputs: tuple[Tensor, ...],
    data: Mapping,
    weight: Tensor,
    surrogate: str,
    epsilon: F.Epsilon,
) -> Tensor:
    r"""One agent's objective :math:`J_i = \operatorname{mean}(w · \mathrm{gain}(x_i + \log g, A))`, a scalar.

    Gradient steps, natural steps, their line search and the loss modules of single agents all call this.

    Args:
        policy (AgentPolicy or Head): the agent's.
        outputs (tuple of Tensor): its distribution's parameters, each [*, ...].
        data (Mapping): see :class:`Agent`; log g, if the factor is inside the gain, is its ``shift`` [*].
        weight (Tensor): w, [*].
        surrogate (str): a key of :data:`benchmarl_trust.functional.SURROGATES`.
        epsilon (float or pair): radius of its trust region.
    """
    x = log_ratio_of(policy, outputs, data)
    mask, shift = data.get("mask", None), data.get("shift", None)
    return F.surrogate_objective(surrogate, x, data["advantage"], weight, epsilon, mask, shift)


def kl_of(policy: AgentPolicy, old: tuple[Tensor, ...], new: tuple[Tensor, ...], data: Mapping) -> Tensor:
    """Mean KL(old ‖ new) of one agent over the steps in which it is present, exact, in nats; a scalar."""
    return F.masked_mean(policy.kl(old, new), data.get("mask", None))


def kl_product_of(policy: AgentPolicy | StackedPolicy, here: tuple[Tensor, ...], data: TensorDict) -> Product:
    """The Hessian of :func:`kl_of` in the distribution's parameters, where they are, in closed form; of a stack that of
    the sum over agents.
    """
    mask = data.get("mask", None)
    if mask is None:
        weight = torch.full_like(here[0][..., 0], 1 / data.numel())
    else:
        weight = mask.to(here[0].dtype) / mask.sum(tuple(range(data.ndim)), keepdim=True).clamp(min=1)
    return policy.head.kl_product(here, weight)


def _path(key: NestedKey) -> tuple[NestedKey, ...]:
    return key if isinstance(key, tuple) else (key,)
