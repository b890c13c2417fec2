"""One loss module for every objective of the form weight x gain."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import PPOLoss

from benchmarl_trust import functional as F


class SurrogateLoss(PPOLoss):
    r"""The policy loss of a surrogate gain, with TorchRL's PPO critic loss beside it.

    .. math::
        L_{objective} = -\operatorname{mean}_{b,i}\, w_b\, \mathrm{gain}(x_{b,i}, A_{b,i}), \qquad
        x = \log π_θ(a|o) - \log π_{old}(a|o)

    With ``surrogate="clip"`` this is :class:`torchrl.objectives.ClipPPOLoss` (up to a log-ratio of 10); with
    ``"quadratic"`` it is MASPO, with ``"reciprocal"`` MARS (see :mod:`benchmarl_trust.functional.surrogate` for the
    formulas and for which of them are reconstructed). Everything else is inherited: advantages by
    ``make_value_estimator``, critic loss, entropy, ``set_keys``, functional parameters.

    Shapes, with [*] the batch of the tensordict and N the agents of the group: ``sample_log_prob`` [*, N],
    ``advantage`` and ``value_target`` [*, N, 1], ``mask`` [*, N]. Without an agent dimension drop the N.

    Args:
        actor_network (ProbabilisticTensorDictSequential): the policy; all agents of a group at once.
        critic_network (TensorDictModuleBase, optional): the value network. Without it only the policy is trained.
        surrogate (str): ``clip``, ``quadratic``, ``reciprocal``, ``log``, or ``linear``, which has no trust region.
        epsilon (float or tuple of two floats): the radius of the trust region; a pair gives the radii for A < 0 and
            for A ≥ 0.
        factor (str): how a factor M in the batch weighs: ``full`` (HAPPO), ``capped`` (clip-HAPPO) or ``inside_clip``
            (A2PO), see :func:`benchmarl_trust.functional.factor_weight`.
        factor_epsilon (float, optional): the ε by which ``inside_clip`` bounds M; None: that of the trust region, for
            A ≥ 0. For A2PO give the radius of the position as ``epsilon``, and here the one that all positions share.
        critic_on_absent (bool): regress the values of absent agents too, for an estimator that bootstraps from them.
        **kwargs: passed to :class:`torchrl.objectives.PPOLoss` (``entropy_coeff``, ``critic_coeff``,
            ``loss_critic_type``, ``reduction``, ...). With ``entropy_coeff=0`` the entropy is only logged: it gets no
            gradient, whatever is made of the coefficient later.

    Keys (``set_keys``): those of PPOLoss; ``mask`` [*, N], True where an agent takes part; ``factor`` [*, 1], the
    compound ratio M of the agents already updated in a sequential update; ``importance_weight`` [*, N], each agent's
    π_old/μ where the data is of an older policy μ. All are optional. Absent agents have ratio 1 and are left out of
    every mean; w is the product of w(M) and the importance weight, 1 for what is not there.

    Returns, from ``forward``: ``loss_objective``, ``loss_entropy``, ``loss_critic`` to minimise; ``kl_approx``
    (nats), ``clip_fraction`` (share of ratios outside 1 ± ε, as PPO logs it), ``outside_fraction`` (share beyond the
    optima of this surrogate, its own trust region), ``ratio_min``, ``ratio_max``, ``ESS`` (share of the samples),
    ``entropy`` (nats), ``explained_variance`` to log.

    Raises:
        ValueError: unknown surrogate or bad ε at construction; on a batch, log-probs and advantages that do not
            have one entry per agent each.
        KeyError: from ``forward``, if the batch lacks a log-prob or a value target.

    Examples:
        >>> from tensordict.nn import TensorDictModule as Mod, ProbabilisticTensorDictSequential as Seq
        >>> from tensordict.nn import ProbabilisticTensorDictModule as Prob
        >>> net = Mod(torch.nn.Linear(4, 3), in_keys=["obs"], out_keys=["logits"])
        >>> sample = Prob(["logits"], ["action"], distribution_class=torch.distributions.Categorical,
        ...               return_log_prob=True, log_prob_key="log_prob")
        >>> policy = Seq(net, sample)
        >>> loss = SurrogateLoss(policy, Mod(torch.nn.Linear(4, 1), ["obs"], ["state_value"]),
        ...                      surrogate="reciprocal", epsilon=0.2)
        >>> batch = policy(TensorDict(obs=torch.randn(8, 2, 4), batch_size=8)).detach()
        >>> batch["advantage"] = batch["value_target"] = torch.ones(8, 2, 1)
        >>> round(loss(batch)["loss_objective"].item(), 4)  # all ratios are 1, all advantages are 1
        -1.0
    """

    @dataclass
    class _AcceptedKeys(PPOLoss._AcceptedKeys):
        """PPO's keys; ``mask``, True where an agent takes part; ``factor``, a sequential update's M;
        ``importance_weight``, π_old/μ.
        """

        mask: NestedKey = "mask"
        factor: NestedKey = "factor"
        importance_weight: NestedKey = "importance_weight"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys

    # LossModule wants the names it sets declared in this very class.
    actor_network: ProbabilisticTensorDictSequential
    critic_network: TensorDictModuleBase | None
    actor_network_params: TensorDictParams
    critic_network_params: TensorDictParams | None
    target_actor_network_params: TensorDictParams
    target_critic_network_params: TensorDictParams | None

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModuleBase | None = None,
        *,
        surrogate: str,
        epsilon: float | Sequence[float] = 0.2,
        factor: str = "full",
        factor_epsilon: float | None = None,
        critic_on_absent: bool = False,
        **kwargs,
    ):
        pair = cast(tuple[float, float], (epsilon,) * 2 if isinstance(epsilon, int | float) else tuple(epsilon))
        F.check_surrogate(surrogate, pair)
        F.check_choice("factor", factor, F.FACTORS)
        if factor == "inside_clip" and surrogate != "clip":
            raise ValueError(f"factor=inside_clip: surrogate={surrogate} has no clip for it to be inside of. Use clip.")
        if kwargs.get("normalize_advantage"):
            raise ValueError(
                "normalize_advantage normalises each minibatch apart in TorchRL, which this loss does not do: "
                "normalise the whole batch once with benchmarl_trust.functional.normalize_advantage."
            )
        # PPOLoss takes any module as its critic; its annotation is narrower.
        super().__init__(actor_network, critic_network, **kwargs)  # pyright: ignore[reportArgumentType]
        self._entropy_counts = kwargs.get("entropy_coeff") != 0  # or else it is only logged
        self.surrogate = surrogate
        self.epsilon = pair
        self.factor = factor
        if factor_epsilon is not None:
            F.check_number("factor_epsilon", factor_epsilon, usual=0.2, above=0, below=2)
        self.factor_epsilon = pair[1] if factor_epsilon is None else factor_epsilon
        self.critic_on_absent = critic_on_absent

    @property
    def out_keys(self):
        """The keys of the tensordict that ``forward`` returns."""
        if self._out_keys is None:
            keys = ["loss_objective", "kl_approx", "clip_fraction", "outside_fraction"]
            keys += ["ratio_min", "ratio_max", "ESS"]
            if self.entropy_bonus:
                keys += ["entropy", "loss_entropy"]
            if self._has_critic:
                keys += ["loss_critic"]
            self._out_keys = keys
        return self._out_keys

    @out_keys.setter
    def out_keys(self, values):
        self._out_keys = values

    @dispatch()
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Both losses: :meth:`actor_loss` and, where there is a critic, :meth:`critic_loss`."""
        tensordict = tensordict.clone(False)
        if tensordict.get(self.tensor_keys.advantage, None) is None:
            self.value_estimator(
                tensordict,
                params=self._cached_critic_network_params_detached,
                target_params=self.target_critic_network_params,
            )
        out = self.actor_loss(tensordict)
        return out.update(self.critic_loss(tensordict)) if self._has_critic else out

    def actor_loss(self, tensordict: TensorDictBase) -> TensorDict:
        """The objective and the entropy bonus, and what is logged of them. Its gradient is the policy's alone."""
        advantage = tensordict.get(self.tensor_keys.advantage, None)
        if advantage is None:
            raise KeyError(
                f"The batch has no {self.tensor_keys.advantage!r}: compute it first, with make_value_estimator() and "
                "value_estimator(batch), or call the loss itself, which does so."
            )
        mask = tensordict.get(self.tensor_keys.mask, None)
        self._check_shape(tensordict.get(self.tensor_keys.sample_log_prob, None), advantage)
        log_ratio, dist, _ = self._log_weight(tensordict, adv_shape=advantage.shape[:-1])
        self._check_shape(log_ratio.squeeze(-1), advantage)
        log_ratio = log_ratio if mask is None else torch.where(mask.unsqueeze(-1), log_ratio, 0)
        weight, shift = self._factor(tensordict, advantage)
        weight = weight * self._importance(tensordict, advantage, mask)
        gain = F.weighted_gain(self.surrogate, log_ratio, advantage, weight, self.epsilon, shift)

        out = TensorDict({"loss_objective": self._reduce(-gain, mask)})
        has_agents = advantage.ndim > tensordict.ndim + 1
        out.update(self._ratio_statistics(log_ratio.detach().squeeze(-1), mask, has_agents))
        if self.entropy_bonus:
            with torch.set_grad_enabled(self._entropy_counts and torch.is_grad_enabled()):
                entropy = self._get_entropy(dist, adv_shape=advantage.shape[:-1])
            out["entropy"] = F.masked_mean(entropy.detach().squeeze(-1), mask)
            out["loss_entropy"] = self._reduce(self._weighted_loss_entropy(entropy), mask)
        return out

    def critic_loss(self, tensordict: TensorDictBase) -> TensorDict:
        """The value loss as TorchRL's PPO computes it. Its gradient is the critic's alone."""
        loss, clip_fraction, explained_variance = self.loss_critic(tensordict)
        mask = None if self.critic_on_absent else tensordict.get(self.tensor_keys.mask, None)
        out = TensorDict({"loss_critic": self._reduce(loss, mask)})
        if clip_fraction is not None:
            out["value_clip_fraction"] = clip_fraction
        if explained_variance is not None:
            out["explained_variance"] = explained_variance
        return out

    @torch.no_grad()
    def current_log_prob(self, tensordict: TensorDictBase) -> Tensor:
        """The log-prob of the batch's actions under the policy as it is now, [*, N]."""
        return self._get_cur_log_prob(tensordict.clone(False))[0]

    def _importance(self, tensordict: TensorDictBase, advantage: Tensor, mask: Tensor | None) -> float | Tensor:
        importance = tensordict.get(self.tensor_keys.importance_weight, None)
        if importance is None:
            return 1.0
        if (*importance.shape, 1) != advantage.shape:
            raise ValueError(
                f"The weight of key {self.tensor_keys.importance_weight!r} has shape {tuple(importance.shape)}; it "
                f"must be one number per agent, {tuple(advantage.shape[:-1])}."
            )
        importance = importance if mask is None else torch.where(mask, importance, 0)
        return importance.unsqueeze(-1)

    def _factor(self, tensordict: TensorDictBase, advantage: Tensor) -> tuple[float | Tensor, Tensor | None]:
        """What M is outside the gain, and its logarithm inside; each broadcasts against the advantage."""
        factor = tensordict.get(self.tensor_keys.factor, None)
        if factor is None:
            return 1.0, None
        if factor.shape != (*tensordict.batch_size, 1):
            raise ValueError(
                f"The factor of key {self.tensor_keys.factor!r} has shape {tuple(factor.shape)}; it must be one number "
                f"per step, {(*tensordict.batch_size, 1)}, the same for all agents."
            )
        shape = (*tensordict.batch_size, *[1] * (advantage.ndim - tensordict.ndim))
        weight, shift = F.factor_weight(factor.log(), self.factor, self.factor_epsilon)
        return weight.reshape(shape), None if shift is None else shift.reshape(shape)

    def _check_shape(self, log_prob: Tensor | None, advantage: Tensor) -> None:
        if log_prob is None:
            raise KeyError(
                f"The batch has no {self.tensor_keys.sample_log_prob!r}, the log-prob of the policy that collected "
                "it, without which there is no ratio: collect with return_log_prob=True."
            )
        if (*log_prob.shape, 1) != advantage.shape:
            raise ValueError(
                f"The log-prob of key {self.tensor_keys.sample_log_prob!r} has shape {tuple(log_prob.shape)}, the "
                f"advantage of key {self.tensor_keys.advantage!r} has shape {tuple(advantage.shape)}: they would "
                "broadcast and mix agents. The log-prob must be summed over action dimensions, [*, N], and the "
                "advantage be [*, N, 1]."
            )

    def _reduce(self, value: Tensor, mask: Tensor | None) -> Tensor:
        value = value.squeeze(-1)
        if self.reduction == "mean":
            return F.masked_mean(value, mask)
        value = value if mask is None else torch.where(mask, value, 0)
        return value.sum() if self.reduction == "sum" else value

    @torch.no_grad()
    def _ratio_statistics(self, log_ratio: Tensor, mask: Tensor | None, has_agents: bool) -> TensorDict:
        if not has_agents:  # then the last dimension is not theirs
            log_ratio, mask = log_ratio.reshape(-1, 1), None if mask is None else mask.reshape(-1, 1)
        size = F.effective_sample_size(log_ratio, mask)
        if mask is None:
            smallest, largest, present = *log_ratio.aminmax(), None
        else:
            smallest = log_ratio.masked_fill(~mask, torch.inf).min()
            largest = log_ratio.masked_fill(~mask, -torch.inf).max()
            present = mask.reshape(-1, mask.shape[-1]).any(0)
        return TensorDict(
            {
                "kl_approx": F.masked_mean(-log_ratio, mask),
                "clip_fraction": F.share_outside("clip", log_ratio, self.epsilon, mask),
                "outside_fraction": F.share_outside(self.surrogate, log_ratio, self.epsilon, mask),
                "ratio_min": smallest.exp(),
                "ratio_max": largest.exp(),
                "ESS": F.masked_mean(size, present),
            }
        )


class CriticPhaseLoss(SurrogateLoss):
    """What a training loop is given once the policies have been updated elsewhere: ``forward`` is the critic's loss.

    It owns the policy's parameters all the same, so that checkpoints have them.
    """

    __annotations__ = SurrogateLoss.__annotations__

    @property
    def out_keys(self):
        """The keys of the tensordict that ``forward`` returns."""
        return ["loss_critic"]

    @out_keys.setter
    def out_keys(self, values):
        self._out_keys = values

    @dispatch()
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """:meth:`critic_loss`."""
        return self.critic_loss(tensordict.clone(False))
