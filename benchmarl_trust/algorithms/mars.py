"""MARS: MAPPO with a penalty on the ratio that is symmetric under r → 1/r."""

from dataclasses import MISSING, dataclass

from benchmarl.algorithms.common import Algorithm

from benchmarl_trust.algorithms.common import Simultaneous, TrustRegionConfig

PENALTIES = ("reciprocal", "log")


class Mars(Simultaneous):
    r"""Multi-agent policy optimisation with a ratio-symmetric penalty (arXiv 2605.09212).

    .. math:: L_i = r_i A - \frac{|A|}{2ε} \left(r_i + \frac1{r_i} - 2\right)

    The formula is reconstructed from the paper's abstract; :func:`benchmarl_trust.functional.reciprocal_gain` has
    the derivation. All agents of a group move at once, in BenchMARL's own loop.

    Args:
        epsilon (float): ε in (0, 0.5): the optimal ratios are 1/√(1 - 2ε) for A > 0, 1/√(1 + 2ε) for A < 0.
        penalty (str): ``reciprocal``, or ``log`` for the ablation A x - \|A\|/(2ε) x² in the log-ratio x.
        **kwargs: those of :class:`~benchmarl_trust.algorithms.common.TrustRegion`.
    """

    def __init__(self, penalty: str, **kwargs):
        if penalty not in PENALTIES:
            raise ValueError(f"algorithm.penalty={penalty} is unknown: choose one of {', '.join(PENALTIES)}.")
        super().__init__(surrogate=penalty, **kwargs)


@dataclass
class MarsConfig(TrustRegionConfig):
    """Configuration dataclass for :class:`Mars`."""

    epsilon: float = MISSING
    penalty: str = MISSING

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`Mars`."""
        return Mars
