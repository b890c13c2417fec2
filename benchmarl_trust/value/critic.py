"""What a critic must see to know an agent's value without knowing that agent's action.

Shapes: [*] stands for the batch of a TensorDict, N for the agents, F for a policy's features: the number of actions, or
twice the dimensions of a continuous action.
"""

from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from benchmarl_trust import functional as F


def counterfactual_table(action: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""N copies of the table of joint actions, each with one agent's action replaced by its policy.

    Row j of copy i is

    .. math:: (\mathrm{enc}(a_j), 0) \text{ for } j ≠ i, \qquad (\text{features of } π_i, 1) \text{ for } j = i

    Discrete actions are encoded one-hot, continuous ones as they are, with zeros up to the width of the features. An
    absent agent's action and features are 0.

    Args:
        action (Tensor): executed actions: integers [*, N], one-hot [*, N, F] or continuous [*, N, F/2].
        features (Tensor): those of :func:`~benchmarl_trust.policy.policy_features`, [*, N, F].
        mask (Tensor, optional): boolean, [*, N], True where an agent takes part.

    Returns: [*, N (copies), N (rows), F + 1].

    Raises:
        ValueError: if the shapes of actions and features do not belong together.

    Examples:
        >>> features = torch.full((2, 3), 0.33)
        >>> counterfactual_table(torch.tensor([0, 2]), features)[0]  # agent 0 does not see that it chose 0
        tensor([[0.3300, 0.3300, 0.3300, 1.0000],
                [0.0000, 0.0000, 1.0000, 0.0000]])
    """
    code = _encode(action, features)
    if mask is not None:
        F.check_same_shape(mask=mask, agents=features[..., 0])
        code, features = (torch.where(mask.unsqueeze(-1), x, 0) for x in (code, features))
    own = torch.eye(features.shape[-2], dtype=torch.bool, device=features.device).unsqueeze(-1)
    rows = torch.where(own, features.unsqueeze(-3), code.unsqueeze(-3))
    return torch.cat([rows, own.to(rows.dtype).expand(*rows.shape[:-1], 1)], -1)


class CounterfactualCritic(TensorDictModuleBase):
    r"""A centralised network made into a critic :math:`EQ_i(s, a_{-i})` for each agent, that does not see a_i.

    The network is run on N copies of its input that differ in the table of joint actions
    (:func:`counterfactual_table`): copy i has agent i's policy in place of its action, and gives agent i's value. Since
    a copy holds a_i nowhere, no network can carry it back to agent i, whatever it mixes. The copies are folded into
    the batch, before the last dimension, which for recurrent networks is time: each copy is a sequence of its own.

    Every network that maps observations (or a global state) of all agents to one number fits, if it takes one more
    input. Images are not changed: their network gets the table beside them. That an image network then runs N times
    over the same images is the price of not looking into networks.

    Args:
        network (TensorDictModuleBase): reads ``table_key`` among its inputs, writes one number, [*, 1].
        table_shape (sequence of int): the shape of the table that the network reads behind its batch dimensions:
            (N, F + 1) for a network with an agent dimension, (N (F + 1),) for one without.
        table_key (NestedKey): where the network reads the table.
        action_key (NestedKey): executed actions, see :func:`counterfactual_table`.
        features_key (NestedKey): :func:`~benchmarl_trust.policy.policy_features`, as the estimator wrote them. They
            are data like the observations, the same for the target and the regression on it.
        value_key (NestedKey): where the values are written.
        mask_key (NestedKey, optional): boolean, [*, N], read where it is there.

    Returns, from ``forward``: the tensordict with ``value_key``, [*, N, 1].

    Raises:
        ValueError: if the network does not read the table or does not write one number; on a batch, if shapes do not
            fit.

    Examples:
        >>> from tensordict.nn import TensorDictModule as Mod, TensorDictSequential as Seq
        >>> flat = Mod(lambda x, table: torch.cat([x.flatten(-2), table], -1), ["obs", "table"], ["input"])
        >>> network = Seq(flat, Mod(torch.nn.Linear(2 * (4 + 3 + 1), 1), ["input"], ["value"]))
        >>> critic = CounterfactualCritic(network, (2 * 4,), "table", "action", "features", "state_value")
        >>> batch = TensorDict(obs=torch.randn(5, 2, 4), action=torch.zeros(5, 2, dtype=torch.long), batch_size=5)
        >>> batch["features"] = torch.full((5, 2, 3), 1 / 3)
        >>> critic(batch)["state_value"].shape
        torch.Size([5, 2, 1])
    """

    def __init__(
        self,
        network: TensorDictModuleBase,
        table_shape: Sequence[int],
        table_key: NestedKey,
        action_key: NestedKey,
        features_key: NestedKey,
        value_key: NestedKey,
        mask_key: NestedKey | None = None,
    ):
        super().__init__()
        if table_key not in network.in_keys:
            raise ValueError(f"The network does not read {table_key!r}: its inputs are {network.in_keys}.")
        self.network = network
        self.table_shape = tuple(table_shape)
        self.table_key, self.action_key, self.features_key = table_key, action_key, features_key
        self.value_key, self.mask_key = value_key, mask_key
        self.observation_keys = [key for key in network.in_keys if key != table_key]
        self.in_keys: list[NestedKey] = [*self.observation_keys, action_key, features_key]
        self.out_keys: list[NestedKey] = [value_key]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run the network on all copies and write one value per agent."""
        if not tensordict.ndim:
            raise ValueError("The counterfactual critic needs a batch dimension: unsqueeze the tensordict.")
        batch = tensordict.ndim
        mask = tensordict.get(self.mask_key, None) if self.mask_key is not None else None
        action, features = tensordict.get(self.action_key), tensordict.get(self.features_key)
        table = counterfactual_table(action, features, mask)
        copies = table.shape[batch]
        folded = {self.table_key: self._fold_table(table.movedim(batch, batch - 1), batch)}
        for key in self.observation_keys:
            value = tensordict.get(key, None)
            if value is not None:  # a recurrent network's state is not there: it starts at zero
                shape = (*value.shape[: batch - 1], copies, *value.shape[batch - 1 :])
                folded[key] = _fold(value.unsqueeze(batch - 1).expand(shape), batch)
        value = self._run(folded)
        value = value.reshape(*tensordict.shape[:-1], copies, tensordict.shape[-1], 1)
        return tensordict.set(self.value_key, value.movedim(batch - 1, batch))

    def _run(self, inputs: dict[NestedKey, Tensor]) -> Tensor:
        batch_size = inputs[self.table_key].shape[:2]
        folded = TensorDict(batch_size=batch_size)
        for key, value in inputs.items():
            folded.set(key, value)
        value = self.network(folded).get(self.network.out_keys[-1])
        if value.shape != (*batch_size, 1):
            raise ValueError(
                f"The network wrote {tuple(value.shape)} where one number per entry of {tuple(batch_size)} was "
                "expected: it must be centralised with shared parameters, so that its output has no agent dimension."
            )
        return value

    def _fold_table(self, table: Tensor, batch: int) -> Tensor:
        if table.shape[batch + 1 :].numel() != torch.Size(self.table_shape).numel():
            raise ValueError(
                f"The table of joint actions has shape {tuple(table.shape[batch + 1 :])} (agents, features and a "
                f"flag), the network reads {self.table_shape}: its specification must follow the policy's features."
            )
        table = _fold(table, batch)
        return table.reshape(*table.shape[:2], *self.table_shape)


def _encode(action: Tensor, features: Tensor) -> Tensor:
    """Actions in the width of the features."""
    if action.ndim == features.ndim - 1 and action.shape == features.shape[:-1]:
        return torch.nn.functional.one_hot(action.long(), features.shape[-1]).to(features.dtype)
    missing = features.shape[-1] - action.shape[-1]
    if action.shape[:-1] != features.shape[:-1] or missing not in (0, action.shape[-1]):
        raise ValueError(
            f"Actions of shape {tuple(action.shape)} do not belong to policy features of shape "
            f"{tuple(features.shape)}: expected integers {tuple(features.shape[:-1])}, the same shape one-hot, or "
            "continuous actions with half as many dimensions (mean and log-deviation of each)."
        )
    return torch.nn.functional.pad(action.to(features.dtype), (0, missing))


def _fold(value: Tensor, batch: int) -> Tensor:
    """[*B, copies, T, ...] to [*B copies, T, ...], B all batch dimensions but the last."""
    return value.flatten(0, batch - 1)
