"""The sequential algorithms whose agents take one natural-gradient step each, under a bound on the KL divergence."""

from dataclasses import dataclass
from typing import cast

from tensordict.nn import ProbabilisticTensorDictSequential
from torchrl.objectives import LossModule

from benchmarl_trust import functional as F
from benchmarl_trust.algorithms.checks import refuse
from benchmarl_trust.algorithms.common import GAINS
from benchmarl_trust.algorithms.keys import Choice, Number, Only, setting
from benchmarl_trust.algorithms.sequential import Sequential, SequentialConfig
from benchmarl_trust.policy import Agent
from benchmarl_trust.updates import (
    SCORES,
    Allocation,
    GreedyAllocation,
    KktAllocation,
    NaturalGradient,
    NaturalStep,
    PositionInfo,
    UniformAllocation,
    sweep,
)

ALLOCATIONS = ("uniform", "kkt", "greedy")
BOUNDS = ("share", "cap")
HAS_KL_BOUND = (
    "a natural step bounds the KL, so its gain is linear, r A; a trust region on the ratio beside it has no meaning. "
    "Leave it at linear, or take algorithm=happo, whose steps are gradient steps."
)
HAS_NO_CLIP = "a natural step has no clip for it to be inside of. Take full or capped."
HAS_NO_ENTROPY_BONUS = (
    "natural-gradient steps have no entropy bonus; their KL bound keeps the policy from collapsing. Leave it at 0."
)
HAS_ITS_OWN_RADIUS = (
    "natural steps have no epsilon, their radius is the KL bound algorithm.kl_threshold. Leave it at constant, or take "
    "algorithm=happo, whose steps are gradient steps."
)
HAS_NO_EPOCHS = (
    "a natural step is one step under a bound on the KL, algorithm.kl_threshold: there are no epochs to end. Leave it "
    "at null and set that one, or take algorithm=happo, whose steps are gradient steps."
)


class SequentialNatural(Sequential):
    r"""One natural-gradient step per agent and iteration, on the whole batch, under one KL budget of the team.

    .. math:: (F + λI) d = ∇ \operatorname{mean}(w(M)\, r_i A), \qquad
        Δ = \sqrt{\frac{2δ_i}{d^T (F + λI) d}}\; d, \qquad θ ← θ + c^k Δ, \qquad \sum_i δ_i ≤ D

    with the first k for which KL(old ‖ new) ≤ δ_i and at least a share of the predicted gain is realised; if there is
    none the agent stays as it was, bit for bit. There is no entropy bonus. For a policy that factorises over agents the
    joint KL is the sum, so D is a trust region on the joint policy.

    ``allocation`` says who gets how much of D: ``uniform``, δ_i = D/N (HATRPO with δ = D/N); ``kkt``, by scores before
    anybody moves (HATRPO-W); ``greedy``, by scores compared anew before each turn (HATRPO-G); see
    :mod:`benchmarl_trust.functional.kl_budget`.

    Source: the HATRPO authors' code, for the procedure and the constants. See
    :mod:`benchmarl_trust.updates.natural` for what is computed otherwise there. The formulas of ``kkt`` and ``greedy``
    are reconstructed.

    Args:
        surrogate (str): ``linear``, r A: a natural step has no other gain.
        kl_threshold (float): an agent's share of D in nats, if ``kl_total`` is None.
        cg_iters (int): iterations of conjugate gradients.
        cg_damping (float): λ.
        ls_step (int): fractions that the line search tries.
        accept_ratio (float): share of the predicted gain that must be realised.
        backtrack_coeff (float): c, from one fraction to the next.
        allocation (str): ``uniform``, ``kkt`` or ``greedy``.
        kl_total (float, optional): D; None: N · ``kl_threshold``, with N the agents of the team.
        kl_min (float, optional): the least that ``kkt`` or ``greedy`` gives an agent; None: a quarter of D/N.
        kl_max (float, optional): the most that they give; None: three times D/N.
        s_estimator (str): of the scores, ``plugin`` or ``split``, see
            :func:`benchmarl_trust.updates.allocation.scores`.
        bound (str): of ``greedy``: ``share``, by score of what is left; or ``cap``, δ = min(κ D/N, what is left).
        kappa (float): κ.
        **kwargs: those of :class:`~benchmarl_trust.algorithms.sequential.Sequential`. ``order`` may also be ``score``,
            the largest score first, with ``kkt``; and ``greedy``, with ``greedy``, whose own it is.

    Raises:
        ValueError: on a bad setting, before anything is collected.
    """

    orders = ("random", "fixed", "semi_greedy", "score", "greedy")
    shared_policy_note = (
        "One agent's data after another's will step on the one network, and each step bounds what it adds to the KL of "
        "the whole group."
    )

    def __init__(
        self,
        surrogate: str,
        kl_threshold: float,
        cg_iters: int,
        cg_damping: float,
        ls_step: int,
        accept_ratio: float,
        backtrack_coeff: float,
        allocation: str,
        kl_total: float | None,
        kl_min: float | None,
        kl_max: float | None,
        s_estimator: str,
        bound: str,
        kappa: float,
        **kwargs,
    ):
        super().__init__(surrogate=surrogate, epsilon=1.0, epsilon_negative=None, **kwargs)  # linear has no ε
        self.kl_threshold, self.kl_total, self.kl_min, self.kl_max = kl_threshold, kl_total, kl_min, kl_max
        self.allocation, self.s_estimator, self.bound, self.kappa = allocation, s_estimator, bound, kappa
        self.solver = NaturalGradient(cg_iters, cg_damping)
        self.search = {"ls_step": ls_step, "accept_ratio": accept_ratio, "backtrack_coeff": backtrack_coeff}
        self._check_meaning()

    def _check_meaning(self) -> None:
        """Refuse what has no meaning together."""
        if self.estimator.off_policy:
            refuse(
                "n_rollouts",
                self.estimator.n_rollouts,
                "a natural step bounds the KL on the states of the present policy, and older batches have other "
                "states. Use n_rollouts=1, or gradient steps such as algorithm=happo.",
            )
        if self.order == "score" and self.allocation != "kkt":
            refuse("order", "score", "only algorithm.allocation=kkt has scores before anybody moves. Take that one.")
        if self.order == "greedy" and self.allocation != "greedy":
            refuse("order", "greedy", "only algorithm.allocation=greedy compares scores before each turn. Take that.")
        if self.allocation != "uniform" and self.normalize_advantage == "per_agent":
            refuse(
                "normalize_advantage",
                "per_agent",
                f"algorithm.allocation={self.allocation} compares the agents' scores, which are in units of squared "
                "advantage; with statistics of their own these units differ. Use batch or none.",
            )
        if self.allocation == "uniform" and (self.kl_min, self.kl_max) != (None, None):
            key = "kl_max" if self.kl_min is None else "kl_min"
            refuse(key, getattr(self, key), "algorithm.allocation=uniform gives equal shares. Leave it at null.")

    def _get_loss(
        self, group: str, policy_for_loss: ProbabilisticTensorDictSequential, continuous: bool
    ) -> tuple[LossModule, bool]:
        """As the base, once the group's team is known to have a valid budget. (In an ensemble others are not ours.)"""
        team = self.teams.of(group)
        self._check_budget("+".join(team), self.teams.size(team))
        environments = self.experiment_config.n_envs_per_worker(self.on_policy)
        if self.s_estimator == "split" and self.has_rnn and environments < 2:
            raise ValueError(
                "algorithm.s_estimator=split halves the batch by environments, which recurrent policies keep whole: "
                "give experiment.on_policy_n_envs_per_worker at least 2, or take s_estimator=plugin."
            )
        return super()._get_loss(group, policy_for_loss, continuous)

    def _budget(self, n_agents: int) -> tuple[float, float, float]:
        """D and the least and most that an agent of a team of this size gets."""
        total = n_agents * self.kl_threshold if self.kl_total is None else self.kl_total
        low = 0.25 * total / n_agents if self.kl_min is None else self.kl_min
        high = 3.0 * total / n_agents if self.kl_max is None else self.kl_max
        return total, low, high

    def _check_budget(self, team: str, n_agents: int) -> None:
        total, low, high = self._budget(n_agents)
        if low * n_agents > total * (1 + 1e-9):
            raise ValueError(
                f"algorithm.kl_min={low} for each of the {n_agents} agents of the team {team} is more than the budget "
                f"algorithm.kl_total={total}: give kl_min at most {total / n_agents:g}, or leave it at null."
            )
        if high < low:
            raise ValueError(
                f"algorithm.kl_max={high} is below the least bound of an agent of the team {team}, "
                f"algorithm.kl_min={low} (a quarter of an equal share, if null): raise kl_max or lower kl_min."
            )

    def _order(self, agents: list[Agent]) -> list[int] | None:
        own = self.order == "score" or (self.allocation == "greedy" and self.order in (None, "greedy"))
        return None if own else super()._order(agents)

    def _sweep(self, team: list[str], agents: list[Agent], order: list[int] | None) -> list[PositionInfo]:
        step = NaturalStep(agents, self._allocation(agents, order), **self.search)
        return sweep(agents, step.choose, step, self.factor)

    def _allocation(self, agents: list[Agent], order: list[int] | None) -> Allocation:
        total, low, high = self._budget(len(agents))
        if self.allocation == "uniform":
            return UniformAllocation(agents, total, self.solver, cast(list[int], order))
        if self.allocation == "kkt":
            return KktAllocation(agents, total, low, high, self.solver, order, self.s_estimator)
        cap = self.kappa * total / len(agents) if self.bound == "cap" else None
        return GreedyAllocation(agents, total, low, high, self.solver, order, self.s_estimator, cap)


@dataclass
class SequentialNaturalConfig(SequentialConfig):
    """What the configurations of these algorithms have; :class:`SequentialNatural` says what the keys mean."""

    surrogate: str = setting(Choice(among=("linear",), elsewhere=dict.fromkeys(GAINS, HAS_KL_BOUND), usual="linear"))
    factor: str | None = setting(Choice(among=F.FACTORS, elsewhere={"inside_clip": HAS_NO_CLIP}, usual="full"))
    entropy_coef: float = setting(Only(usual=0.0, why=HAS_NO_ENTROPY_BONUS))
    epsilon_schedule: str = setting(Only(usual="constant", why=HAS_ITS_OWN_RADIUS))
    target_kl: float | None = setting(Only(usual=None, why=HAS_NO_EPOCHS))

    kl_threshold: float = setting(Number(above=0, usual=0.01))
    # Each is a product with the Fisher matrix over the whole batch. A solve that has converged or stagnated changes
    # nothing more, but a GPU, which is not waited for, computes all of them.
    cg_iters: int = setting(Number(above=0, most=1000, whole=True, usual=10))
    cg_damping: float = setting(Number(above=0, usual=0.1))
    ls_step: int = setting(Number(above=0, most=1000, whole=True, usual=10))
    accept_ratio: float = setting(Number(above=0, below=1, usual=0.5))
    backtrack_coeff: float = setting(Number(above=0, below=1, usual=0.8))
    allocation: str = setting(Choice(among=ALLOCATIONS, usual="uniform"))
    kl_total: float | None = setting(Number(above=0, null=True, usual=None))
    kl_min: float | None = setting(Number(least=0, null=True, usual=None))
    kl_max: float | None = setting(Number(above=0, null=True, usual=None))
    s_estimator: str = setting(Choice(among=SCORES, usual="plugin"))
    bound: str = setting(Choice(among=BOUNDS, usual="share"))
    kappa: float = setting(Number(above=0, usual=2.0))
