"""MASPO: MAPPO with a quadratic penalty on the ratio in place of the clip."""

from dataclasses import MISSING, dataclass

from benchmarl.algorithms.common import Algorithm

from benchmarl_trust.algorithms.common import Simultaneous, TrustRegionConfig


class Maspo(Simultaneous):
    r"""Multi-agent simple policy optimisation (SPO, arXiv 2401.16025, with per-agent ratios; arXiv 2605.09212).

    .. math:: L_i = r_i A - \frac{|A|}{2ε} (r_i - 1)^2

    All agents of a group move at once, in BenchMARL's own loop. See
    :func:`benchmarl_trust.functional.quadratic_gain` for source and properties.

    Args:
        epsilon (float): ε in (0, 1): the optimal ratios are 1 ± ε.
        epsilon_negative (float, optional): ε where A < 0; None takes ``epsilon``. With .1548 beside
            ``epsilon=.2910`` the optima are those of MARS at ε = .2, the control of its ablation.
        **kwargs: those of :class:`~benchmarl_trust.algorithms.common.TrustRegion`.
    """

    def __init__(self, epsilon: float, epsilon_negative: float | None, **kwargs):
        pair = (epsilon if epsilon_negative is None else epsilon_negative, epsilon)
        super().__init__(epsilon=pair, surrogate="quadratic", **kwargs)


@dataclass
class MaspoConfig(TrustRegionConfig):
    """Configuration dataclass for :class:`Maspo`."""

    epsilon: float = MISSING
    epsilon_negative: float | None = MISSING

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`Maspo`."""
        return Maspo
