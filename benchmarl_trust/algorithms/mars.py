"""MARS and MASPO: MAPPO with a penalty on the ratio in place of the clip."""

from dataclasses import dataclass

from benchmarl.algorithms.common import Algorithm

from benchmarl_trust.algorithms.simultaneous import Simultaneous, SimultaneousConfig


class Mars(Simultaneous):
    r"""Multi-agent policy optimisation with a ratio-symmetric penalty (arXiv 2605.09212).

    .. math:: L_i = r_i A - \frac{|A|}{2ε} \left(r_i + \frac1{r_i} - 2\right)

    The formula is reconstructed from the paper's abstract; :func:`benchmarl_trust.functional.reciprocal_gain` has
    the derivation: ε in (0, 0.5), the optimal ratios are 1/√(1 - 2ε) for A > 0, 1/√(1 + 2ε) for A < 0. All agents of a
    group move at once, in BenchMARL's own loop. ``surrogate="log"`` is the ablation A x - \|A\|/(2ε) x² in the
    log-ratio x.

    At equal ε MARS's steps are far smaller than PPO's: where the advantage's correlation with the score in the
    direction moved is R, its step is about ε R σ_A / E\|A\| in standard deviations, while the clip's hardly depends on
    R. The KL per iteration at ε = .2 in the population limit (derived here, for a Gaussian policy):

    ==== ====== ======
    R    clip   MARS
    ==== ====== ======
    .1   .0071  .00031
    .3   .016   .0024
    .5   .031   .0049
    ==== ====== ======

    So a comparison at equal ε compares step sizes. No ε < .5 gives MARS the KL of the clip at .2. Each run logs
    ``policy/kl``, exact and once per iteration: compare at equal KL, or with ε tuned alike for every method.

    Args:
        **kwargs: those of :class:`~benchmarl_trust.algorithms.simultaneous.Simultaneous`.
    """


@dataclass
class MarsConfig(SimultaneousConfig):
    """Configuration dataclass for :class:`Mars`."""

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`Mars`."""
        return Mars


class Maspo(Simultaneous):
    r"""Multi-agent simple policy optimisation (SPO, arXiv 2401.16025, with per-agent ratios; arXiv 2605.09212).

    .. math:: L_i = r_i A - \frac{|A|}{2ε} (r_i - 1)^2

    ε in (0, 1); the optimal ratios are 1 ± ε. All agents of a group move at once, in BenchMARL's own loop. See
    :func:`benchmarl_trust.functional.quadratic_gain` for source and properties. With ``epsilon_negative=.1548`` beside
    ``epsilon=.2910`` the optima are those of MARS at ε = .2, the control of its ablation.

    At equal ε its steps are as small as MARS's, see :class:`Mars`: the KL per iteration at ε = .2 is .00031, .0024 and
    .0049 where the clip's is .0071, .016 and .031. The ε that gives the clip's: .97, .55, .54.

    Args:
        **kwargs: those of :class:`~benchmarl_trust.algorithms.simultaneous.Simultaneous`.
    """


@dataclass
class MaspoConfig(SimultaneousConfig):
    """Configuration dataclass for :class:`Maspo`."""

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`Maspo`."""
        return Maspo
