"""clip-HAPPO: HAPPO whose factor is capped, so that its variance is bounded whatever the number of agents."""

from dataclasses import dataclass

from benchmarl.algorithms.common import Algorithm

from benchmarl_trust.algorithms.sequential_clip import SequentialClip, SequentialClipConfig


class ClipHappo(SequentialClip):
    r"""HAPPO with a capped compound ratio (Le & Ta, arXiv 2606.25526).

    .. math:: L_i = \min(M, 1) \min(r_i A, \mathrm{clip}(r_i, 1 ± ε) A), \qquad M = \prod_{j \text{ before } i} r_j

    The variance of M A can grow exponentially with the agent's position in the order (it does where large advantages
    are positive, see ``examples/advantage_variance.py``); that of min(M, 1) A is at most E[A²], always. The chain M
    itself is never clipped. The formula is the authors'.

    Args:
        **kwargs: those of :class:`~benchmarl_trust.algorithms.sequential_clip.SequentialClip`.
    """

    def __init__(self, **kwargs):
        super().__init__(clip_factor=True, **kwargs)


@dataclass
class ClipHappoConfig(SequentialClipConfig):
    """Configuration dataclass for :class:`ClipHappo`."""

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`ClipHappo`."""
        return ClipHappo
