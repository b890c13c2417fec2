"""HATRPO-G: one KL budget for the team, spent greedily."""

from dataclasses import MISSING, dataclass

from benchmarl.algorithms.common import Algorithm

from benchmarl_trust.algorithms.sequential_natural import (
    JointBudget,
    JointBudgetConfig,
    check_choice,
    check_number,
)
from benchmarl_trust.updates import Agent, GreedyAllocation, PositionInfo

BOUNDS = ("share", "cap")


class HatrpoG(JointBudget):
    r"""HATRPO with a greedy order and allocation (Shek, Shi & Tokekar, arXiv 2508.10340).

    .. math:: j = \arg\max_{i \text{ not moved}} s_i(M), \qquad
        δ_j = \mathrm{clip}\Big(D_{rem} \frac{s_j}{\sum_{i \text{ not moved}} s_i}, l, \min(h, D_{rem})\Big), \qquad
        D_{rem} ← D_{rem} - KL_j

    Before each turn all agents that have not moved are compared under the present M; what the chosen one really spends
    leaves the budget. That the agent with the largest improvement per KL goes first is known from a reader's published
    note on the paper; the formulas are reconstructed, see :mod:`benchmarl_trust.functional.kl_budget`.

    Args:
        bound (str): ``share``, as above; or ``cap``, δ = min(κ D/N, D_rem).
        kappa (float): κ.
        order (str): ``greedy``; or ``random``, as ``fixed_order`` says, with the same bounds.
        **kwargs: those of :class:`~benchmarl_trust.algorithms.sequential_natural.JointBudget`.
    """

    orders = ("greedy", "random")

    def __init__(self, bound: str, kappa: float, **kwargs):
        check_choice("bound", bound, BOUNDS)
        check_number("kappa", kappa, above=0.0, usual=2)
        super().__init__(**kwargs)
        if self.order == "greedy" and self.fixed_order is not False:
            raise ValueError("algorithm.fixed_order needs algorithm.order=random: a greedy order is not a fixed one.")
        self.bound = bound
        self.kappa = kappa

    def _sweep(self, team: list[str], agents: list[Agent], order: list[int]) -> list[PositionInfo]:
        total, low, high = self._budget(len(agents))
        allocation = GreedyAllocation(
            agents,
            total,
            low,
            high,
            self.solver,
            self.s_estimator,
            cap=self.kappa * total / len(agents) if self.bound == "cap" else None,
            order=None if self.order == "greedy" else order,
        )
        return self._natural_sweep(agents, allocation.choose, allocation)


@dataclass
class HatrpoGConfig(JointBudgetConfig):
    """Configuration dataclass for :class:`HatrpoG`."""

    bound: str = MISSING
    kappa: float = MISSING

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`HatrpoG`."""
        return HatrpoG
