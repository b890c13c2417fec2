"""Small cooperative games whose optima are known, as BenchMARL tasks ``trust_games/<name>``."""

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

__all__ = [
    "DifferentialConfig",
    "DifferentialGame",
    "MatrixConfig",
    "MatrixGame",
    "TrustGamesClass",
    "TrustGamesTask",
    "differential_reward",
    "matrix_reward",
]
