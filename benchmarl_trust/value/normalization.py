"""A critic that works in units of its targets' running mean and standard deviation."""

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data.utils import DEVICE_TYPING

from benchmarl_trust import functional as F


class NormalizedCritic(TensorDictModuleBase):
    r"""A critic whose network's output is normalised, and whose values are in the units of the rewards.

    .. math:: V = σ v + μ, \qquad \text{the network's } v \text{ regresses on } (\text{target} - μ) / σ

    Whoever estimates advantages reads V and needs to know nothing of this. Whoever trains the network compares v with
    normalised targets (:meth:`normalize`), after the statistics have seen them (:meth:`update`). Statistics that
    change move V too, until the network has followed, as in the source.

    Source: ``ValueNorm`` of the HARL authors' code. There the statistics see the targets of each minibatch of each
    epoch; a caller that updates once per iteration has the same average, since until about 1/(1 - β) = 100,000 updates
    all count almost equally, and targets that stay as they are during the epochs (ours).

    Args:
        network (TensorDictModuleBase): writes ``value_key``, [*, N, 1].
        value_key (NestedKey): where V is written, without a gradient.
        normalized_key (NestedKey): where v is written, with its gradient.
        shape (sequence of int): of the statistics: () for one of all agents, (N, 1) for one of each agent.
        device (torch.device or str, optional): theirs.

    Returns, from ``forward``: the tensordict with both, [*, N, 1].

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> critic = NormalizedCritic(Mod(torch.nn.Linear(4, 1), ["obs"], ["state_value"]), "state_value", "normalized")
        >>> critic.update(torch.tensor([[90.0], [110.0]]))
        >>> critic.normalize(torch.tensor([[120.0]]))
        tensor([[2.]])
        >>> batch = critic(TensorDict(obs=torch.randn(5, 2, 4), batch_size=(5, 2)))
        >>> torch.allclose(batch["state_value"], 100 + 10 * batch["normalized"])
        True
    """

    def __init__(
        self,
        network: TensorDictModuleBase,
        value_key: NestedKey,
        normalized_key: NestedKey,
        shape: Sequence[int] = (),
        device: DEVICE_TYPING | None = None,
    ):
        super().__init__()
        self.network = network
        self.value_key, self.normalized_key = value_key, normalized_key
        self.in_keys: list[NestedKey] = list(network.in_keys)
        self.out_keys: list[NestedKey] = [value_key, normalized_key]
        for name in F.Moments._fields:
            self.register_buffer(f"running_{name}", torch.zeros(tuple(shape), dtype=torch.float64, device=device))

    @property
    def moments(self) -> F.Moments:
        """The running moments, the buffers themselves."""
        return F.Moments(*(getattr(self, f"running_{name}") for name in F.Moments._fields))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run the network and write v and V."""
        tensordict = self.network(tensordict)
        output = tensordict.get(self.value_key)
        tensordict.set(self.normalized_key, output)
        return tensordict.set(self.value_key, self.denormalize(output.detach()))

    def normalize(self, value: Tensor) -> Tensor:
        """(x - μ) / σ, in the type of x, [*, N, 1]."""
        mean, std = self.mean_and_std()
        return ((value - mean) / std).to(value.dtype)

    def denormalize(self, value: Tensor) -> Tensor:
        """σ x + μ, in the type of x, [*, N, 1]."""
        mean, std = self.mean_and_std()
        return (value * std + mean).to(value.dtype)

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """μ and σ, in float64, see :func:`benchmarl_trust.functional.mean_and_std`."""
        return F.mean_and_std(self.moments)

    @torch.no_grad()
    def update(self, value: Tensor, mask: Tensor | None = None) -> None:
        """Let the statistics see values, see :func:`benchmarl_trust.functional.update_moments`.

        Args:
            value (Tensor): [*, N, 1].
            mask (Tensor, optional): boolean, [*, N]; absent agents do not count.
        """
        new = F.update_moments(self.moments, value, None if mask is None else mask.unsqueeze(-1))
        for buffer, moment in zip(self.moments, new, strict=True):
            buffer.copy_(moment)
