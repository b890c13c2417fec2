"""What a policy's network outputs mean: log-probs, entropy and KL of one agent's actions, as functions of tensors."""

import math

import torch
from tensordict.nn import ProbabilisticTensorDictModule
from torch import Tensor
from torch.distributions import Categorical
from torchrl.modules import IndependentNormal, MaskedCategorical, TanhNormal

from benchmarl_trust import functional as F


class NormalHead:
    """Independent normals, squashed (TanhNormal) or not.

    Actions are those of the base normal: :meth:`base_action` undoes the squashing, once per iteration. Ratios and KL
    are those of the squashed distribution all the same, since a bijection leaves them unchanged; log-probs are not.
    """

    def __init__(self, module: ProbabilisticTensorDictModule):
        self.module = module
        self.keys = module.in_keys
        self.squashed = module.distribution_class is TanhNormal
        low, high = (module.distribution_kwargs.get(key, bound) for key, bound in (("low", -1.0), ("high", 1.0)))
        self.log_half_width = torch.as_tensor((high - low) / 2).log()

    def base_action(self, action: Tensor) -> Tensor:
        """The action before squashing, [*, N, D]; by TorchRL's own inverse, so with its treatment of the bounds."""
        if not self.squashed:
            return action
        any_loc, any_scale = torch.zeros_like(action), torch.ones_like(action)
        for transform in reversed(TanhNormal(any_loc, any_scale, **self.module.distribution_kwargs).transforms):
            action = transform.inv(action)
        return action

    def log_prob(self, parameters: tuple[Tensor, ...], action: Tensor) -> Tensor:
        """Log-density of base actions, [*]."""
        return F.normal_log_prob(*parameters, action)

    def kl(self, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> Tensor:
        """KL(old ‖ new), [*]."""
        return F.normal_kl(*old, *new)

    def entropy(self, parameters: tuple[Tensor, ...], agent: int) -> Tensor:
        """Entropy, [*]: a squashed normal has no closed form and gets a one-sample estimate, as in TorchRL."""
        loc, scale = parameters
        if not self.squashed:
            return scale.log().sum(-1) + 0.5 * (1 + math.log(2 * math.pi)) * scale.shape[-1]
        width = self.log_half_width[agent] if self.log_half_width.ndim > 1 else self.log_half_width
        return F.squashed_normal_entropy(loc, scale, width.to(loc), torch.randn_like(loc))


class CategoricalHead:
    """Discrete actions, with or without an action mask. The parameters are normalised log-probabilities."""

    def __init__(self, module: ProbabilisticTensorDictModule):
        self.keys = module.in_keys

    def base_action(self, action: Tensor) -> Tensor:
        """The action itself, [*, N]."""
        return action

    def log_prob(self, parameters: tuple[Tensor, ...], action: Tensor) -> Tensor:
        """Log-probability of actions, [*]."""
        return F.categorical_log_prob(F.categorical_log_probs(*parameters), action)

    def kl(self, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> Tensor:
        """KL(old ‖ new), [*]."""
        return F.categorical_kl(F.categorical_log_probs(*old), F.categorical_log_probs(*new))

    def entropy(self, parameters: tuple[Tensor, ...], agent: int) -> Tensor:
        """Entropy, [*]."""
        return F.categorical_entropy(F.categorical_log_probs(*parameters))


Head = NormalHead | CategoricalHead

_HEADS = {
    TanhNormal: NormalHead,
    IndependentNormal: NormalHead,
    Categorical: CategoricalHead,
    MaskedCategorical: CategoricalHead,
}


def head_of(module: ProbabilisticTensorDictModule) -> Head:
    """The head for the distribution of a policy's last module.

    Raises:
        ValueError: for a distribution whose KL is not known here, or with ``tanh_loc``.
    """
    if module.distribution_kwargs.get("tanh_loc"):
        raise ValueError("Sequential updates do not know tanh_loc=True: leave it out of the distribution_kwargs.")
    try:
        return _HEADS[module.distribution_class](module)
    except KeyError:
        names = ", ".join(kind.__name__ for kind in _HEADS)
        raise ValueError(
            f"Sequential updates know the distributions {names}; the policy has {module.distribution_class.__name__}."
        ) from None
