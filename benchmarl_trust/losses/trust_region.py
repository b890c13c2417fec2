"""What a step of one agent raises, and what bounds it."""

from typing import cast

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.objectives import LossModule

from benchmarl_trust import functional as F
from benchmarl_trust.policy import AgentPolicy, kl_of, old_outputs, surrogate_of


class TrustRegionLoss(LossModule):
    r"""The surrogate objective of one agent and the KL divergence from its old policy.

    .. math:: J_i = \operatorname{mean}(w(M)\, \mathrm{gain}(x_i, A)), \qquad
        KL_i = \operatorname{mean}_b KL(π_i^{old}(·|o_b) \| π_i(·|o_b))

    What a natural step raises and what bounds it, as a loss: :class:`~benchmarl_trust.updates.NaturalStep` itself calls
    the same two functions, :func:`~benchmarl_trust.policy.surrogate_of` and :func:`~benchmarl_trust.policy.kl_of`. The
    KL is exact. Steps in which the agent is absent are left out of both means.

    Source: the surrogate and the direction of the KL as in the HATRPO authors' code (Kuba et al. 2022); the KL of
    discrete actions is the exact one, :func:`~benchmarl_trust.functional.categorical_kl`, where theirs lacks the
    weight π_old and the mask.

    Args:
        policy (AgentPolicy): the agent's policy.
        surrogate (str): a key of :data:`benchmarl_trust.functional.SURROGATES`; ``linear`` is r A.
        epsilon (float or pair): for gains that have one.
        factor (str): how a factor M in the data weighs, ``full`` (HATRPO) or ``capped`` (clip-HATRPO).

    Keys: those of :class:`benchmarl_trust.policy.Agent`'s data, ``inputs``, ``action``, ``advantage`` [*],
    ``old_log_prob`` [*], ``old_0``, ``old_1``, optionally ``mask`` [*] and ``factor`` [*], the M (1 without it).

    Returns, from ``forward``: ``loss_objective``, -J, and ``kl`` in nats, scalars.

    Raises:
        ValueError: if log-probs, advantages and factors differ in shape.

    Examples:
        >>> from torchrl.modules import MultiAgentMLP
        >>> from tensordict.nn import TensorDictModule as Mod, ProbabilisticTensorDictSequential as Seq
        >>> from tensordict.nn import ProbabilisticTensorDictModule as Prob
        >>> from benchmarl_trust.policy import GroupPolicy, remember_old_policy
        >>> net = Mod(MultiAgentMLP(4, 3, 2, centralized=False, share_params=False, depth=1), ["obs"], ["logits"])
        >>> head = Prob(["logits"], ["action"], distribution_class=torch.distributions.Categorical)
        >>> policy = Seq(net, head)
        >>> batch = policy(TensorDict(obs=torch.randn(8, 2, 4), batch_size=8)).detach()
        >>> agent = GroupPolicy(policy, 2, batch).make_agents(batch, advantage=torch.ones(8, 2))[0]
        >>> remember_old_policy(agent)
        >>> TrustRegionLoss(agent.policy)(agent.data)["loss_objective"].round(decimals=4)
        tensor(-1., grad_fn=<RoundBackward1>)
    """

    # Properties of LossModule that depend on its settings; here nothing does.
    in_keys = ("inputs", "action", "advantage", "old_log_prob", "old_0")  # pyright: ignore[reportAssignmentType]
    out_keys = ("loss_objective", "kl")  # pyright: ignore[reportAssignmentType]
    functional = False  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        policy: AgentPolicy,
        surrogate: str = "linear",
        epsilon: float | tuple[float, float] = 0.2,
        factor: str = "full",
    ):
        F.check_surrogate(surrogate, epsilon)
        F.check_choice("factor", factor, ("full", "capped"))
        super().__init__()
        self.policy = policy
        self.body = policy.body
        self.surrogate = surrogate
        self.epsilon = epsilon
        self.factor = factor

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Both, at the policy as it is now."""
        outputs = self.policy.forward(cast(TensorDictBase, tensordict["inputs"]).copy())
        factor = tensordict.get("factor", None)
        log_factor = torch.zeros_like(tensordict["advantage"]) if factor is None else factor.log()
        weight = F.factor_weight(log_factor, self.factor).weight
        objective = surrogate_of(self.policy, outputs, tensordict, weight, self.surrogate, self.epsilon)
        kl = kl_of(self.policy, old_outputs(tensordict), outputs, tensordict)
        return TensorDict({"loss_objective": -objective, "kl": kl})

    def _forward_value_estimator_keys(self, **kwargs) -> None:
        """There is no value estimator."""
