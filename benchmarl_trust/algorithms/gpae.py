"""GPAE: each agent its own advantage, from a critic that knows the others' actions and not the agent's own."""

from dataclasses import dataclass

from benchmarl.algorithms.common import Algorithm

from benchmarl_trust.algorithms.simultaneous import Simultaneous, SimultaneousConfig


class Gpae(Simultaneous):
    r"""Generalized per-agent advantage estimation (Kim et al., arXiv 2603.02654).

    .. math::
        A_{i,t} = δ_{i,t} + γ c_{i,t+1} A_{i,t+1}, \qquad
        δ_{i,t} = r_t + γ EQ_i(s_{t+1}, a_{-i,t+1}) - EQ_i(s_t, a_{-i,t})

    MAPPO with these advantages: all agents of a group move at once, on PPO's clip. The formulas are those of the
    authors' code; see :class:`benchmarl_trust.algorithms.estimators.GpaeEstimator`, which any algorithm takes by
    ``estimator="gpae"``, for the critic and for the data of older policies.

    Args:
        **kwargs: those of :class:`~benchmarl_trust.algorithms.simultaneous.Simultaneous`.
    """


@dataclass
class GpaeConfig(SimultaneousConfig):
    """Configuration dataclass for :class:`Gpae`."""

    @staticmethod
    def associated_class() -> type[Algorithm]:
        """:class:`Gpae`."""
        return Gpae
