"""HAPPO: PPO's clipped objective, one agent after another."""

from dataclasses import dataclass

from benchmarl.algorithms.common import Algorithm

from benchmarl_trust.algorithms.sequential_clip import SequentialClip, SequentialClipConfig


class Happo(SequentialClip):
    r"""Heterogeneous-agent PPO (Kuba et al. 2022, arXiv 2109.11251).

    .. math:: L_i = M \min(r_i A, \mathrm{clip}(r_i, 1 ± ε) A), \qquad M = \prod_{j \text{ before } i} r_j

    The agents of a team move one after another in a random order, each weighted by the compound ratio M of those
    before it. Then the critic is trained. The formula is the authors'.

    Args:
        **kwargs: those of :class:`~benchmarl_trust.algorithms.sequential_clip.SequentialClip`.
    """

    def __init__(self, **kwargs):
        super().__init__(clip_factor=False, **kwargs)


@dataclass
class HappoConfig(SequentialClipConfig):
    """Configuration dataclass for :class:`Happo`."""

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`Happo`."""
        return Happo
