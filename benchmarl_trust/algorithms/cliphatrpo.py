"""clip-HATRPO: HATRPO whose factor is capped, so that its variance is bounded whatever the number of agents."""

from dataclasses import dataclass

from benchmarl.algorithms.common import Algorithm

from benchmarl_trust.algorithms.sequential_natural import SequentialNatural, SequentialNaturalConfig


class ClipHatrpo(SequentialNatural):
    r"""HATRPO with a capped compound ratio (Le & Ta, arXiv 2606.25526).

    .. math:: \max_{θ_i} \operatorname{mean}(\min(M, 1) r_i A) \quad \text{subject to} \quad KL_i ≤ δ, \qquad
        M = \prod_{j \text{ before } i} r_j

    The chain M itself is never clipped. The formula is the authors'.

    Args:
        **kwargs: those of :class:`~benchmarl_trust.algorithms.sequential_natural.SequentialNatural`.
    """

    def __init__(self, **kwargs):
        super().__init__(clip_factor=True, **kwargs)


@dataclass
class ClipHatrpoConfig(SequentialNaturalConfig):
    """Configuration dataclass for :class:`ClipHatrpo`."""

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`ClipHatrpo`."""
        return ClipHatrpo
