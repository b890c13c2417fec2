"""HATRPO: natural-gradient steps, one agent after another."""

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

    def __init__(self, **kwargs):
        super().__init__(clip_factor=False, **kwargs)


@dataclass
class HatrpoConfig(SequentialNaturalConfig):
    """Configuration dataclass for :class:`Hatrpo`."""

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`Hatrpo`."""
        return Hatrpo
