"""HAPPO, clip-HAPPO and A2PO: PPO's clipped objective, one agent after another."""

from dataclasses import dataclass

from benchmarl.algorithms.common import Algorithm

from benchmarl_trust.algorithms.sequential_gradient import SequentialGradient, SequentialGradientConfig


class Happo(SequentialGradient):
    r"""Heterogeneous-agent PPO (Kuba et al. 2022, arXiv 2109.11251).

    .. math:: L_i = M \min(r_i A, \mathrm{clip}(r_i, 1 ± ε) A), \qquad M = \prod_{j \text{ before } i} r_j

    The agents of a team move one after another in a random order, each weighted by the compound ratio M of those
    before it. Then the critic is trained. The formula is the authors'. ``surrogate="reciprocal"`` makes it a sequential
    MARS.

    Args:
        **kwargs: those of :class:`~benchmarl_trust.algorithms.sequential_gradient.SequentialGradient`.
    """


@dataclass
class HappoConfig(SequentialGradientConfig):
    """Configuration dataclass for :class:`Happo`."""

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`Happo`."""
        return Happo


class ClipHappo(SequentialGradient):
    r"""HAPPO with a capped compound ratio (Le & Ta, arXiv 2606.25526).

    .. math:: L_i = \min(M, 1) \min(r_i A, \mathrm{clip}(r_i, 1 ± ε) A), \qquad M = \prod_{j \text{ before } i} r_j

    The variance of M A can grow exponentially with the agent's position in the order (it does where large advantages
    are positive, see ``examples/advantage_variance.py``); that of min(M, 1) A is at most E[A²], always. The chain M
    itself is never clipped. The formula is the authors'.

    Args:
        **kwargs: those of :class:`~benchmarl_trust.algorithms.sequential_gradient.SequentialGradient`.
    """


@dataclass
class ClipHappoConfig(SequentialGradientConfig):
    """Configuration dataclass for :class:`ClipHappo`."""

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`ClipHappo`."""
        return ClipHappo


class A2po(SequentialGradient):
    r"""Agent-by-agent policy optimisation (Wang et al. 2023, arXiv 2302.06205).

    .. math:: L_i = \min(r_i g A_i, \mathrm{clip}(r_i g, 1 ± ε_k) A_i), \qquad
        g = \mathrm{clip}\Big(\prod_{j \text{ before } i} r_j, 1 ± \frac ε2\Big), \qquad
        ε_k = \fracε2 \Big(1 + \frac kN\Big)

    HAPPO's sweep with four changes: advantages corrected for the agents that moved before
    (:class:`benchmarl_trust.algorithms.estimators.PreopcEstimator`); the factor inside the clip; a radius that grows
    with the position k of N; an order that alternates the agent with the largest mean \|A / V\| of those left with a
    random one (:func:`benchmarl_trust.updates.semi_greedy`). The formulas are the authors'; what is done otherwise is
    said where each of them is.

    Args:
        **kwargs: those of :class:`~benchmarl_trust.algorithms.sequential_gradient.SequentialGradient`.
    """


@dataclass
class A2poConfig(SequentialGradientConfig):
    """Configuration dataclass for :class:`A2po`."""

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`A2po`."""
        return A2po
