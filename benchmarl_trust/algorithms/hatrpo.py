"""HATRPO and its relatives: natural-gradient steps, one agent after another."""

from dataclasses import dataclass

from benchmarl.algorithms.common import Algorithm

from benchmarl_trust.algorithms.sequential_natural import SequentialNatural, SequentialNaturalConfig


class Hatrpo(SequentialNatural):
    r"""Heterogeneous-agent TRPO (Kuba et al. 2022, arXiv 2109.11251).

    .. math:: \max_{θ_i} \operatorname{mean}(M r_i A) \quad \text{subject to} \quad KL_i ≤ δ, \qquad
        M = \prod_{j \text{ before } i} r_j

    The agents of a team move one after another in a random order, each by one natural-gradient step, weighted by the
    compound ratio M of those before it. Then the critic is trained. The formula is the authors'.

    Args:
        **kwargs: those of :class:`~benchmarl_trust.algorithms.sequential_natural.SequentialNatural`.
    """


@dataclass
class HatrpoConfig(SequentialNaturalConfig):
    """Configuration dataclass for :class:`Hatrpo`."""

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`Hatrpo`."""
        return Hatrpo


class ClipHatrpo(SequentialNatural):
    r"""HATRPO with a capped compound ratio (Le & Ta, arXiv 2606.25526).

    .. math:: \max_{θ_i} \operatorname{mean}(\min(M, 1) r_i A) \quad \text{subject to} \quad KL_i ≤ δ, \qquad
        M = \prod_{j \text{ before } i} r_j

    The chain M itself is never clipped. The formula is the authors'.

    Args:
        **kwargs: those of :class:`~benchmarl_trust.algorithms.sequential_natural.SequentialNatural`.
    """


@dataclass
class ClipHatrpoConfig(SequentialNaturalConfig):
    """Configuration dataclass for :class:`ClipHatrpo`."""

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`ClipHatrpo`."""
        return ClipHatrpo


class HatrpoW(SequentialNatural):
    r"""HATRPO under a joint constraint (Shek, Shi & Tokekar, arXiv 2508.10340).

    .. math:: \max_δ \sum_i \sqrt{2 s_i δ_i} \quad \text{subject to} \quad \sum_i δ_i ≤ D, \quad l ≤ δ_i ≤ h
        \quad ⟹ \quad δ_i = \mathrm{clip}(k s_i, l, h)

    before anybody moves; then HATRPO's sweep, each agent under its own δ_i. s_i is what agent i can gain per root of
    KL, see :mod:`benchmarl_trust.functional.kl_budget`. That a joint budget is divided by KKT is known from the
    abstract; the formula is reconstructed.

    Args:
        **kwargs: those of :class:`~benchmarl_trust.algorithms.sequential_natural.SequentialNatural`.
    """


@dataclass
class HatrpoWConfig(SequentialNaturalConfig):
    """Configuration dataclass for :class:`HatrpoW`."""

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`HatrpoW`."""
        return HatrpoW


class HatrpoG(SequentialNatural):
    r"""HATRPO with a greedy order and allocation (Shek, Shi & Tokekar, arXiv 2508.10340).

    .. math:: j = \arg\max_{i \text{ not moved}} s_i(M), \qquad
        δ_j = \mathrm{clip}\Big(D_{rem} \frac{s_j}{\sum_{i \text{ not moved}} s_i}, l, \min(h, D_{rem})\Big), \qquad
        D_{rem} ← D_{rem} - KL_j

    Before each turn all agents that have not moved are compared under the present M; what the chosen one really spends
    leaves the budget. That the agent with the largest improvement per KL goes first is known from a reader's published
    note on the paper; the formulas are reconstructed, see :mod:`benchmarl_trust.functional.kl_budget`.

    Args:
        **kwargs: those of :class:`~benchmarl_trust.algorithms.sequential_natural.SequentialNatural`.
    """


@dataclass
class HatrpoGConfig(SequentialNaturalConfig):
    """Configuration dataclass for :class:`HatrpoG`."""

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`HatrpoG`."""
        return HatrpoG
