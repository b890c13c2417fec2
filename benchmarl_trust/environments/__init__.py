"""Tasks that the package brings: small games whose optima are known, and the suites of the papers."""

from benchmarl_trust.environments.mamujoco import MamujocoClass, MamujocoConfig, MamujocoEnv, MamujocoTask
from benchmarl_trust.environments.padded import PaddedEnv
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
TASKS: tuple[type[PackagedTask], ...] = (TrustGamesTask, MamujocoTask, SmaxTask)

__all__ = [
    "TASKS",
    "DifferentialConfig",
    "DifferentialGame",
    "MamujocoClass",
    "MamujocoConfig",
    "MamujocoEnv",
    "MamujocoTask",
    "MatrixConfig",
    "MatrixGame",
    "PackagedTask",
    "PaddedEnv",
    "Smax",
    "SmaxClass",
    "SmaxConfig",
    "SmaxTask",
    "TrustGamesClass",
    "TrustGamesTask",
    "differential_reward",
    "matrix_reward",
]
