"""HATRPO-W: one KL budget for the team, divided among its agents by KKT."""

from dataclasses import MISSING, dataclass

from benchmarl.algorithms.common import Algorithm

from benchmarl_trust.algorithms.sequential_natural import JointBudget, JointBudgetConfig, check_choice
from benchmarl_trust.updates import Agent, KktAllocation, PositionInfo, UniformAllocation

ALLOCATIONS = ("kkt", "uniform")


class HatrpoW(JointBudget):
    r"""HATRPO under a joint constraint (Shek, Shi & Tokekar, arXiv 2508.10340).

    .. math:: \max_δ \sum_i \sqrt{2 s_i δ_i} \quad \text{subject to} \quad \sum_i δ_i ≤ D, \quad l ≤ δ_i ≤ h
        \quad ⟹ \quad δ_i = \mathrm{clip}(k s_i, l, h)

    before anybody moves; then HATRPO's sweep, each agent under its own δ_i. s_i is what agent i can gain per root of
    KL, see :mod:`benchmarl_trust.functional.kl_budget`. That a joint budget is divided by KKT is known from the
    abstract; the formula is reconstructed.

    Args:
        allocation (str): ``kkt``, or ``uniform``, which is HATRPO with δ = D/N.
        order (str): ``random``, as ``fixed_order`` says; or ``score``, the largest s first.
        **kwargs: those of :class:`~benchmarl_trust.algorithms.sequential_natural.JointBudget`.
    """

    orders = ("random", "score")

    def __init__(self, allocation: str, **kwargs):
        check_choice("allocation", allocation, ALLOCATIONS)
        super().__init__(**kwargs)
        if self.order == "score" and (allocation == "uniform" or self.fixed_order is not False):
            raise ValueError(
                "algorithm.order=score needs algorithm.allocation=kkt, which computes the scores, and "
                "algorithm.fixed_order=False."
            )
        self.allocation = allocation

    def _sweep(self, team: list[str], agents: list[Agent], order: list[int]) -> list[PositionInfo]:
        total, low, high = self._budget(len(agents))
        if self.allocation == "uniform":
            return self._natural_sweep(agents, order, UniformAllocation(agents, total, self.solver))
        allocation = KktAllocation(agents, total, low, high, self.solver, self.s_estimator)
        return self._natural_sweep(agents, allocation.order() if self.order == "score" else order, allocation)


@dataclass
class HatrpoWConfig(JointBudgetConfig):
    """Configuration dataclass for :class:`HatrpoW`."""

    allocation: str = MISSING

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`HatrpoW`."""
        return HatrpoW
