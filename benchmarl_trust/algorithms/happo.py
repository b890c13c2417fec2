"""HAPPO and clip-HAPPO: PPO's clipped objective, one agent after another."""

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
