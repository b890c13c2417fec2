"""The gradient of an agent's loss on a minibatch by one compiled function, which serves all agents of a group."""

from collections.abc import Callable, Mapping

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarl_trust import functional as F
from benchmarl_trust.policy import AgentPolicy, Head, set_gradient

#: What a loss reads of an agent's data beside the policy's inputs, where it is there.
COLUMNS = ("action", "advantage", "old_log_prob", "mask", "shift")
#: What ``torch.compile`` generates code by.
BACKEND = "inductor"
#: ``loss_of(head, outputs, data, weight, epsilon, draw)``, a scalar.
LossOf = Callable[[Head, tuple[Tensor, ...], Mapping, Tensor, F.Epsilon, tuple[Tensor, ...]], Tensor]


class CompiledGradient:
    """Loss and gradient of a minibatch, forward and backward in one function of ``torch.compile``.

    The function gets the parameters and buffers of the agent as arguments, and its radius as a tensor, so that it is
    compiled once for all agents of the group, whose policies differ in nothing else. It is made for minibatches of one
    size with the same entries. The noise of the entropy is drawn outside: it is that of the eager step.

    Args:
        policy (AgentPolicy): of any agent of the group, a body of its own (a twin).
        data (Mapping): one of its minibatches.
        loss_of (callable): the loss from the distribution's parameters, as :class:`GradientStep` has it.

    Raises:
        ValueError: if the policy's body runs other agents too.
    """

    def __init__(self, policy: AgentPolicy, data: Mapping, loss_of: LossOf):
        if not policy.alone:
            raise ValueError("A compiled step needs policies of single agents: give GroupPolicy a make_twin.")
        self.rows, self._names = len(data["advantage"]), set(_columns(data))
        self._radius: dict[F.Epsilon, tuple[Tensor, Tensor]] = {}
        body, head, slot = policy.body, policy.head, policy.slot
        self._reached = _reached(policy, data)
        name_of = {id(p): name for name, p in body.named_parameters()}
        self._leaves = names = [name_of[id(leaf)] for leaf in self._reached_of(policy)]

        def gradient(leaves, fixed, inputs, data, weight, radius, draw):
            def loss(leaves):
                state = {**dict(zip(names, leaves, strict=True)), **fixed}
                parts = TensorDict(inputs, batch_size=weight.shape)
                outputs = torch.func.functional_call(body, state, (parts,))
                own = tuple(outputs.get(key).select(weight.ndim, slot) for key in head.keys)
                epsilon = torch.where(data["advantage"] >= 0, radius[1], radius[0])
                return loss_of(head, own, data, weight, epsilon, draw)

            gradients, value = torch.func.grad_and_value(loss)(leaves)
            return [value, *gradients]

        # torch.compile keeps what it has compiled with the code, and counts it: with code of its own the function is
        # freed with this object, and those of other groups and experiments are no recompilations of it.
        gradient.__code__ = gradient.__code__.replace()
        # Each call would look at hundreds of attributes that could have changed what was traced. None of them does:
        # what tensors are is enough.
        options: dict = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
        if policy.parameters[0].is_cuda:
            options["triton.cudagraphs"] = True  # mode="reduce-overhead", which takes no other option
        self._function = torch.compile(gradient, backend=BACKEND, fullgraph=True, dynamic=False, options=options)

    def __call__(
        self, policy: AgentPolicy, data: Mapping, weight: Tensor, epsilon: F.Epsilon, draw: tuple[Tensor, ...]
    ) -> Tensor:
        """Leave the gradient in ``grad`` of the policy's leaves.

        Args:
            policy (AgentPolicy): an agent of the group.
            data (Mapping): its minibatch.
            weight (Tensor): w, [*].
            epsilon (float, pair or Tensor): the radius.
            draw (tuple of Tensor): what its entropy is estimated with, see :meth:`AgentPolicy.draw`.

        Returns: the loss.

        Raises:
            ValueError: if the minibatch has other entries than the first one.
            RuntimeError: if the function cannot be compiled.
        """
        inputs = dict(data["inputs"].items(include_nested=True, leaves_only=True))
        columns = _columns(data)
        if columns.keys() != self._names:
            raise ValueError(
                f"A compiled step was made for minibatches with {', '.join(sorted(self._names))}, and this one has "
                f"{', '.join(sorted(columns))}: give GradientStep another dictionary, compiled={{}}."
            )
        own = self._reached_of(policy)
        leaves = [leaf.detach() for leaf in own]
        radius = self._as_tensors(epsilon, data["advantage"])
        try:
            with torch.enable_grad():
                values = self._function(leaves, self._fixed_of(policy), inputs, columns, weight, radius, draw)
        except (torch._dynamo.exc.TorchDynamoException, OSError) as error:  # pyright: ignore[reportAttributeAccessIssue]
            raise RuntimeError(
                f"algorithm.compile=True: torch.compile cannot compile this step ({type(error).__name__}, see above). "
                "Run with algorithm.compile=False."
            ) from error
        if weight.is_cuda:  # the next run of a CUDA graph writes to the same memory
            values = torch._foreach_clone(values)  # pyright: ignore[reportPrivateImportUsage] has no public name
        loss, *gradients = values
        for leaf, gradient in zip(own, gradients, strict=True):
            set_gradient(leaf, gradient)
        return loss

    def _reached_of(self, policy: AgentPolicy) -> list[nn.Parameter]:
        return [leaf for leaf, reached in zip(policy.parameters, self._reached, strict=True) if reached]

    def _fixed_of(self, policy: AgentPolicy) -> dict[str, Tensor]:
        """What of the body has no gradient, as it is now."""
        others = {name: p.detach() for name, p in policy.body.named_parameters() if name not in self._leaves}
        return others | dict(policy.body.named_buffers())

    def _as_tensors(self, epsilon: F.Epsilon, like: Tensor) -> tuple[Tensor, Tensor]:
        """The radius where A < 0 and where A ≥ 0: as numbers they would be part of what is compiled."""
        if isinstance(epsilon, Tensor):
            return epsilon, epsilon
        if epsilon not in self._radius:
            negative, positive = epsilon if isinstance(epsilon, tuple) else (epsilon, epsilon)
            if len(self._radius) > 100:  # of a schedule, in which none comes again
                self._radius.clear()
            self._radius[epsilon] = like.new_full((), negative), like.new_full((), positive)
        return self._radius[epsilon]


@torch.enable_grad()
def _reached(policy: AgentPolicy, data: Mapping) -> list[bool]:
    """Which leaves the outputs depend on. Others have no gradient: by one of 0 a weight decay would move them."""
    outputs = policy.forward(data["inputs"][:1].copy())
    total = torch.stack([output.sum() for output in outputs if output.requires_grad]).sum()
    return [gradient is not None for gradient in torch.autograd.grad(total, policy.parameters, allow_unused=True)]


def _columns(data: Mapping) -> dict[str, Tensor]:
    return {name: data[name] for name in COLUMNS if name in data.keys()}
