"""Tasks that the package brings: small cooperative games whose optima are known, ``trust_games/<name>``, and suites."""

from benchmarl_trust.environments.smax import Smax, SmaxClass, SmaxConfig, SmaxTask
from benchmarl_trust.environments.task import PackagedTask
from benchmarl_trust.environments.trust_games import (
    DifferentialConfig,
    DifferentialGame,
    MatrixConfig,
    MatrixGame,
    TrustGamesClass,
    TrustGamesTask,
    differential_reward,
    matrix_reward,
)

# What the package registers; a suite's own packages are imported when an environment of it is built.
TASKS: tuple[type[PackagedTask], ...] = (TrustGamesTask, SmaxTask)

__all__ = [
    "TASKS",
    "DifferentialConfig",
    "DifferentialGame",
    "MatrixConfig",
    "MatrixGame",
    "PackagedTask",
    "Smax",
    "SmaxClass",
    "SmaxConfig",
    "SmaxTask",
    "TrustGamesClass",
    "TrustGamesTask",
    "differential_reward",
    "matrix_reward",
]
