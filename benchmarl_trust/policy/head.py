"""All that is known of a policy's distribution: log-prob, entropy and KL of actions, its features for a critic, and the
module that makes its parameters of a network's outputs.

Shapes: [*] stands for any dimensions, those of agents included, D for the dimensions of an action.
"""

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule
from tensordict.nn.distributions import NormalParamExtractor
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.distributions import Categorical, Transform
from torchrl.modules import IndependentNormal, MaskedCategorical, TanhNormal

from benchmarl_trust import functional as F

#: Of a vector for each of a distribution's parameters, None for one that does not move, its product with a Hessian.
Product = Callable[[Sequence[Tensor | None]], list[Tensor | None]]


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
        self._inverse: dict[torch.device, list[Transform]] = {}
        self._log_half_width: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def base_action(self, action: Tensor) -> Tensor:
        """The action before squashing, [*, N, D]; by TorchRL's own inverse, so with its treatment of the bounds."""
        if not self.squashed:
            return action
        if action.device not in self._inverse:  # made once, since TorchRL looks at the bounds and so waits for a GPU
            any_loc, any_scale = torch.zeros_like(action), torch.ones_like(action)
            transforms = TanhNormal(any_loc, any_scale, **self.module.distribution_kwargs).transforms
            self._inverse[action.device] = list(reversed(transforms))
        for transform in self._inverse[action.device]:
            action = cast(Tensor, transform.inv(action))
        return action

    def log_prob(self, parameters: tuple[Tensor, ...], action: Tensor) -> Tensor:
        """Log-density of base actions, [*]."""
        loc, scale = parameters
        return F.normal_log_prob(loc, scale, action)

    def kl(self, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> Tensor:
        """KL(old ‖ new), [*]."""
        return F.normal_kl(*old, *new)

    def kl_product(self, parameters: tuple[Tensor, ...], weight: Tensor) -> Product:
        """The Hessian of Σ weight · KL(here ‖ ·) in the parameters, where they are; ``weight`` is [*]."""
        curvatures = [weight.unsqueeze(-1) * curvature for curvature in F.normal_kl_curvature(parameters[1])]
        return lambda vectors: [None if v is None else h * v for h, v in zip(curvatures, vectors, strict=True)]

    def entropy(
        self, parameters: tuple[Tensor, ...], agent: int | None = None, draw: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        """Entropy of one agent of the group, [*], or of all, [*, N]: a squashed normal has no closed form and gets a
        one-sample estimate, as in TorchRL. It is made with ``draw``, or with a new :meth:`draw`.
        """
        loc, scale = parameters
        if not self.squashed:
            return scale.log().sum(-1) + 0.5 * (1 + math.log(2 * math.pi)) * scale.shape[-1]
        return F.squashed_normal_entropy(loc, scale, *(self.draw(loc, agent) if draw is None else draw))

    def draw(self, like: Tensor, agent: int | None = None) -> tuple[Tensor, ...]:
        """What an estimate of the entropy is made with beside the distribution's parameters, in the shape of ``like``
        (base actions, or their means): the log of the interval's half width, and noise. A closed form needs nothing.
        """
        if not self.squashed:
            return ()
        place = like.device, like.dtype
        if place not in self._log_half_width:  # the bounds are where actions are sampled: copied once
            self._log_half_width[place] = self.log_half_width.to(like)
        width = self._log_half_width[place]
        width = width[agent] if agent is not None and width.ndim > 1 else width
        if agent is None:  # agent by agent, so that one by one they would have the same
            return width, torch.stack([torch.randn_like(x) for x in like.unbind(-2)], -2)
        return width, torch.randn_like(like)


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

    def kl_product(self, parameters: tuple[Tensor, ...], weight: Tensor) -> Product:
        """The Hessian of Σ weight · KL(here ‖ ·) in the parameters, where they are; ``weight`` is [*]."""
        probs, weight = F.categorical_log_probs(*parameters).exp(), weight.unsqueeze(-1)

        def product(vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
            logits, *masks = vectors
            return [None if logits is None else weight * F.categorical_kl_product(probs, logits), *masks]

        return product

    def entropy(
        self, parameters: tuple[Tensor, ...], agent: int | None = None, draw: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        """Entropy, [*]."""
        return F.categorical_entropy(F.categorical_log_probs(*parameters))

    def draw(self, like: Tensor, agent: int | None = None) -> tuple[Tensor, ...]:
        """Nothing: the entropy has a closed form."""
        return ()


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
        raise ValueError("tanh_loc=True is not known here: leave it out of the distribution_kwargs.")
    try:
        return _HEADS[module.distribution_class](module)
    except KeyError:
        names = ", ".join(kind.__name__ for kind in _HEADS)
        raise ValueError(
            f"The KL is known of the distributions {names}; the policy has {module.distribution_class.__name__}."
        ) from None


class PaddedNormal(nn.Module):
    """Means and standard deviations, with 0 and 1 for entries of an action that no agent executes.

    There the policy is a standard normal whatever its network says: in the ratio and in KL(old ‖ new) these entries
    cancel, and they have no gradient.

    Args:
        extractor (nn.Module): makes the means and standard deviations, each [*, N, D].
        executed (Tensor): boolean, [N, D]; of a policy of one agent [D].

    Examples:
        >>> executed = torch.tensor([[True, True], [True, False]])
        >>> loc, scale = PaddedNormal(NormalParamExtractor("exp"), executed)(torch.full((2, 4), 2.0))
        >>> loc
        tensor([[2., 2.],
                [2., 0.]])
    """

    executed: Tensor

    def __init__(self, extractor: nn.Module, executed: Tensor):
        super().__init__()
        self.extractor = extractor
        self.register_buffer("executed", executed)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """From [*, N, 2 D]."""
        loc, scale = self.extractor(logits)
        return torch.where(self.executed, loc, 0.0), torch.where(self.executed, scale, 1.0)


def normal_extractor(scale_mapping: str, group: str, executed: Tensor | None = None) -> TensorDictModule:
    """The module that makes means and standard deviations of a network's outputs, as BenchMARL's MAPPO has it.

    Args:
        scale_mapping (str): how outputs become standard deviations, see TorchRL's ``NormalParamExtractor``.
        group (str): the group whose ``logits`` it reads and whose ``loc`` and ``scale`` it writes.
        executed (Tensor, optional): where actions are padded, see :class:`PaddedNormal`.

    Examples:
        >>> normal_extractor("exp", "agents").out_keys
        [('agents', 'loc'), ('agents', 'scale')]
    """
    keys: list[NestedKey] = [(group, "loc"), (group, "scale")]
    extractor = NormalParamExtractor(scale_mapping=scale_mapping)
    if executed is not None:
        extractor = PaddedNormal(extractor, executed)
    return TensorDictModule(extractor, [(group, "logits")], keys)


def parameter_keys(head: ProbabilisticTensorDictModule) -> dict[str, NestedKey]:
    """Where a policy's last module reads its distribution's parameters, by their names in the distribution."""
    names = (key[-1] if isinstance(key, tuple) else key for key in head.dist_keys)
    return {str(name): key for name, key in zip(names, head.in_keys, strict=True)}


def policy_features(head: ProbabilisticTensorDictModule, params: TensorDictBase) -> Tensor:
    r"""A policy's distribution as numbers, to stand in a critic's input where an action would.

    .. math:: (π(1|o), …, π(K|o)) \quad\text{for discrete actions,}\qquad (μ, \log σ) \quad\text{for continuous ones}

    Masked actions have probability 0. μ and σ are those of the normal before any squashing: the ``loc`` and ``scale``
    that the policy writes.

    Source: probabilities as in the authors' code (Kim et al., arXiv 2603.02654); mean and log-deviation are this
    package's choice.

    Args:
        head (ProbabilisticTensorDictModule): the last module of a policy.
        params (TensorDictBase): what the modules before it wrote, [*].

    Returns: [*, N, F].

    Raises:
        ValueError: for a distribution with parameters other than ``loc`` and ``scale``, or ``logits``.

    Examples:
        >>> head = ProbabilisticTensorDictModule(
        ...     ["logits"], ["action"], distribution_class=torch.distributions.Categorical
        ... )
        >>> from tensordict import TensorDict
        >>> policy_features(head, TensorDict(logits=torch.zeros(1, 4), batch_size=1))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    keys = parameter_keys(head)
    if keys.keys() == {"loc", "scale"}:
        return torch.cat([params.get(keys["loc"]), params.get(keys["scale"]).log()], -1)
    if keys.keys() <= {"logits", "mask"}:
        mask = params.get(keys["mask"]) if "mask" in keys else None
        return F.categorical_log_probs(params.get(keys["logits"]), mask).exp()
    raise ValueError(
        f"A policy with a {head.distribution_class.__name__} of parameters {', '.join(keys)} "
        "cannot be shown to the critic: the distributions known here have loc and scale, or logits."
    )
