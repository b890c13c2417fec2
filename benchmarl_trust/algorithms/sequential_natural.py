"""The sequential algorithms whose agents take one natural-gradient step each, under a bound on the KL divergence."""

from dataclasses import MISSING, dataclass

from tensordict.nn import TensorDictModule
from torchrl.objectives import LossModule

from benchmarl_trust.algorithms.sequential import Sequential, SequentialConfig
from benchmarl_trust.updates import (
    ESTIMATORS,
    Agent,
    NaturalGradient,
    NaturalStep,
    PositionInfo,
    UniformAllocation,
    sweep,
)


class SequentialNatural(Sequential):
    r"""One natural-gradient step per agent and iteration, on the whole batch.

    .. math:: (F + λI) d = ∇ \operatorname{mean}(w(M)\, r_i A), \qquad
        Δ = \sqrt{\frac{2δ}{d^T (F + λI) d}}\; d, \qquad θ ← θ + c^k Δ

    with the first k for which KL(old ‖ new) ≤ δ and at least a share of the predicted gain is realised; if there is
    none the agent stays as it was, bit for bit. There is no entropy bonus.

    Source: the HATRPO authors' code, for the procedure and the constants. See
    :mod:`benchmarl_trust.updates.natural` for what is computed otherwise there.

    Args:
        kl_threshold (float): δ, in nats.
        cg_iters (int): iterations of conjugate gradients.
        cg_damping (float): λ.
        ls_step (int): fractions that the line search tries.
        accept_ratio (float): share of the predicted gain that must be realised.
        backtrack_coeff (float): c, from one fraction to the next.
        **kwargs: those of :class:`~benchmarl_trust.algorithms.sequential.Sequential`.

    Raises:
        ValueError: on a bad setting, before anything is collected.
    """

    shared_policy_note = (
        "One agent's data after another's will step on the one network, and each step bounds what it adds to the KL of "
        "the whole group."
    )

    def __init__(
        self,
        kl_threshold: float,
        cg_iters: int,
        cg_damping: float,
        ls_step: int,
        accept_ratio: float,
        backtrack_coeff: float,
        **kwargs,
    ):
        check_number("kl_threshold", kl_threshold, above=0.0, usual=0.01)
        check_number("cg_iters", cg_iters, above=0, usual=10, whole=True)
        check_number("cg_damping", cg_damping, above=0.0, usual=0.1)
        check_number("ls_step", ls_step, above=0, usual=10, whole=True)
        check_number("accept_ratio", accept_ratio, above=0.0, below=1.0, usual=0.5)
        check_number("backtrack_coeff", backtrack_coeff, above=0.0, below=1.0, usual=0.8)
        super().__init__(surrogate="linear", epsilon=1.0, **kwargs)  # a linear surrogate has no ε
        if self.entropy_coef:
            raise ValueError(
                f"algorithm.entropy_coef={self.entropy_coef}: natural-gradient steps have no entropy bonus; their KL "
                "bound keeps the policy from collapsing. Leave it at 0."
            )
        self.kl_threshold = kl_threshold
        self.solver = NaturalGradient(cg_iters, cg_damping)
        self.search = {"ls_step": ls_step, "accept_ratio": accept_ratio, "backtrack_coeff": backtrack_coeff}

    def _sweep(self, team: list[str], agents: list[Agent], order: list[int]) -> list[PositionInfo]:
        total = len(agents) * self.kl_threshold
        return self._natural_sweep(agents, order, UniformAllocation(agents, total, self.solver))

    def _natural_sweep(self, agents: list[Agent], order, allocation) -> list[PositionInfo]:
        return sweep(agents, order, NaturalStep(agents, allocation, **self.search), self.clip_factor)


class JointBudget(SequentialNatural):
    r"""One budget D for the team, :math:`\sum_i KL_i ≤ D`, in place of a bound for each agent.

    For a policy that factorises over agents the joint KL is the sum, so this is a trust region on the joint policy.

    Args:
        kl_total (float, optional): D; None: N · ``kl_threshold``, with N the agents of the team.
        kl_min (float, optional): the least that an agent is given; None: a quarter of D/N.
        kl_max (float, optional): the most that an agent is given; None: three times D/N.
        order (str): one of the subclass's :attr:`orders`.
        s_estimator (str): ``plugin`` or ``split``, see :func:`benchmarl_trust.updates.allocation.scores`.
        **kwargs: those of :class:`SequentialNatural`.

    Raises:
        ValueError: on a bad setting, before anything is collected.
    """

    orders: tuple[str, ...]

    def __init__(
        self,
        kl_total: float | None,
        kl_min: float | None,
        kl_max: float | None,
        order: str,
        s_estimator: str,
        **kwargs,
    ):
        check_choice("order", order, self.orders)
        check_choice("s_estimator", s_estimator, ESTIMATORS)
        for key, value in (("kl_total", kl_total), ("kl_max", kl_max)):
            if value is not None:
                check_number(key, value, above=0.0, usual="null")
        if kl_min is not None:
            check_number("kl_min", kl_min, least=0.0, usual="null")
        super().__init__(clip_factor=False, **kwargs)
        self.kl_total, self.kl_min, self.kl_max = kl_total, kl_min, kl_max
        self.order = order
        self.s_estimator = s_estimator

    def _get_loss(self, group: str, policy_for_loss: TensorDictModule, continuous: bool) -> tuple[LossModule, bool]:
        """As the base, once the group's team is known to have a valid budget. (In an ensemble others are not ours.)"""
        team = self._team_of(group)
        self._check_budget("+".join(team), sum(len(self.group_map[name]) for name in team))
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


def check_number(key: str, value, usual, above=None, least=None, below=None, whole=False) -> None:
    """Refuse what is no number in the given interval.

    Raises:
        ValueError: naming the key, the interval and the usual value.
    """
    number = (
        isinstance(value, int if whole else int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    )
    good = number and (above is None or value > above) and (below is None or value < below)
    good = good and (least is None or value >= least)
    if not good:
        parts = ((above, "above"), (least, "at least"), (below, "below"))
        wanted = " and ".join(f"{word} {bound:g}" for bound, word in parts if bound is not None)
        kind = "whole number" if whole else "number"
        raise ValueError(f"algorithm.{key}={value} must be a {kind} {wanted}. The usual value is {usual}.")


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse an unknown choice.

    Raises:
        ValueError: naming the key and the choices.
    """
    if value not in choices:
        raise ValueError(f"algorithm.{key}={value} is unknown: choose one of {', '.join(choices)}.")


@dataclass
class SequentialNaturalConfig(SequentialConfig):
    """What the configurations of these algorithms have; :class:`SequentialNatural` says what the keys mean."""

    kl_threshold: float = MISSING
    cg_iters: int = MISSING
    cg_damping: float = MISSING
    ls_step: int = MISSING
    accept_ratio: float = MISSING
    backtrack_coeff: float = MISSING


@dataclass
class JointBudgetConfig(SequentialNaturalConfig):
    """What W and G have beside; :class:`JointBudget` says what the keys mean."""

    kl_total: float | None = MISSING
    kl_min: float | None = MISSING
    kl_max: float | None = MISSING
    order: str = MISSING
    s_estimator: str = MISSING
