"""What a step of one agent raises, and what bounds it."""

from typing import Any

from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import LossModule

from benchmarl_trust import functional as F


class TrustRegionLoss(LossModule):
    r"""The surrogate objective of one agent and the KL divergence from its old policy.

    .. math:: J_i = \operatorname{mean}(w(M)\, \mathrm{gain}(x_i, A)), \qquad
        KL_i = \operatorname{mean}_b KL(π_i^{old}(·|o_b) \| π_i(·|o_b))

    Both are functions of the distribution's parameters, which :meth:`outputs` computes once: gradient, Fisher product
    and line search of a natural step call :meth:`objective` and :meth:`kl` on them. The KL is exact. Steps in which the
    agent is absent are left out of both means.

    Source: the surrogate and the direction of the KL as in the HATRPO authors' code (Kuba et al. 2022); the KL of
    discrete actions is the exact one, :func:`~benchmarl_trust.functional.categorical_kl`, where theirs lacks the
    weight π_old and the mask.

    Args:
        policy (benchmarl_trust.updates.AgentPolicy): the agent's policy.
        surrogate (str): a key of :data:`benchmarl_trust.functional.SURROGATES`; ``linear`` is r A.
        epsilon (float): for gains that have one.

    Keys: those of :class:`benchmarl_trust.updates.Agent`'s data, ``inputs``, ``action``, ``advantage`` [*],
    ``old_log_prob`` [*], ``old_0``, ``old_1``, optionally ``mask`` [*] and ``weight`` [*], the w(M) (1 without it).

    Returns, from ``forward``: ``loss_objective``, -J, and ``kl`` in nats, scalars.

    Raises:
        ValueError: if log-probs, advantages and weights differ in shape.

    Examples:
        >>> import torch
        >>> from torchrl.modules import MultiAgentMLP
        >>> from tensordict.nn import TensorDictModule as Mod, ProbabilisticTensorDictSequential as Seq
        >>> from tensordict.nn import ProbabilisticTensorDictModule as Prob
        >>> from benchmarl_trust.updates import Agent, GroupPolicy, remember_old_policy
        >>> net = Mod(MultiAgentMLP(4, 3, 2, centralized=False, share_params=False, depth=1), ["obs"], ["logits"])
        >>> head = Prob(["logits"], ["action"], distribution_class=torch.distributions.Categorical)
        >>> batch = TensorDict(obs=torch.randn(8, 2, 4), batch_size=8)
        >>> policy = GroupPolicy(Seq(net, head), 2, batch).agents[0]
        >>> data = TensorDict(inputs=policy.inputs(batch), action=torch.zeros(8, dtype=torch.long),
        ...                   advantage=torch.ones(8), batch_size=8)
        >>> remember_old_policy(Agent(policy, None, data))
        >>> TrustRegionLoss(policy)(data)["loss_objective"].round(decimals=4)
        tensor(-1., grad_fn=<RoundBackward1>)
    """

    in_keys = ("inputs", "action", "advantage", "old_log_prob", "old_0")
    out_keys = ("loss_objective", "kl")
    functional = False

    def __init__(self, policy: Any, surrogate: str = "linear", epsilon: float = 0.2):
        F.check_surrogate(surrogate, epsilon)
        super().__init__()
        self.policy = policy
        self.body = policy.body
        self.surrogate = surrogate
        self.epsilon = epsilon

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Both, at the policy as it is now."""
        outputs = self.outputs(tensordict)
        return TensorDict(
            {
                "loss_objective": -self.objective(outputs, tensordict),
                "kl": self.kl(old_outputs(tensordict), outputs, tensordict),
            }
        )

    def outputs(self, tensordict: TensorDictBase) -> tuple[Tensor, ...]:
        """The distribution's parameters, each [*, ...]."""
        return self.policy.forward(tensordict["inputs"].copy())

    def objective(self, outputs: tuple[Tensor, ...], tensordict: TensorDictBase) -> Tensor:
        """J, to be maximised."""
        mask = tensordict.get("mask", None)
        log_prob = self.policy.log_prob(outputs, tensordict["action"])
        log_ratio = F.log_ratio(log_prob, tensordict["old_log_prob"], mask)
        weight = tensordict.get("weight", None)
        weight = log_ratio.new_ones(log_ratio.shape) if weight is None else weight
        return F.surrogate_objective(self.surrogate, log_ratio, tensordict["advantage"], weight, self.epsilon, mask)

    def kl(self, old: tuple[Tensor, ...], new: tuple[Tensor, ...], tensordict: TensorDictBase) -> Tensor:
        """Mean KL(old ‖ new) of two distributions given by their parameters."""
        return F.masked_mean(self.policy.kl(old, new), tensordict.get("mask", None))

    def _forward_value_estimator_keys(self, **kwargs) -> None:
        """There is no value estimator."""


def old_outputs(data: TensorDictBase) -> tuple[Tensor, ...]:
    """The old distribution's parameters that :func:`benchmarl_trust.updates.remember_old_policy` stored."""
    return tuple(data[key] for key in ("old_0", "old_1") if key in data.keys())
