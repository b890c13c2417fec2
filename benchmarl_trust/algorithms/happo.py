"""HAPPO: PPO's clipped objective, one agent after another."""

from dataclasses import MISSING, dataclass

from benchmarl.algorithms.common import Algorithm

from benchmarl_trust.algorithms.sequential import Sequential, SequentialConfig


class Happo(Sequential):
    r"""Heterogeneous-agent PPO (Kuba et al. 2022, arXiv 2109.11251).

    .. math:: L_i = M \min(r_i A, \mathrm{clip}(r_i, 1 ± ε) A), \qquad M = \prod_{j \text{ before } i} r_j

    The agents of a team move one after another in a random order, each weighted by the compound ratio M of those
    before it. Then the critic is trained. The formula is the authors'.

    Args:
        clip_epsilon (float): ε in (0, 1).
        **kwargs: those of :class:`~benchmarl_trust.algorithms.sequential.Sequential`.
    """

    def __init__(self, clip_epsilon: float, **kwargs):
        super().__init__(surrogate="clip", epsilon=clip_epsilon, clip_factor=False, **kwargs)


@dataclass
class HappoConfig(SequentialConfig):
    """Configuration dataclass for :class:`Happo`."""

    clip_epsilon: float = MISSING

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`Happo`."""
        return Happo
