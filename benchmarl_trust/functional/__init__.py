"""Pure tensor functions: the mathematics, with no networks and no TensorDicts. Imports torch only."""

from benchmarl_trust.functional.advantage import NORMALIZATIONS, normalize_advantage, team_advantage
from benchmarl_trust.functional.conjugate_gradient import Solution, conjugate_gradient
from benchmarl_trust.functional.distribution import (
    categorical_entropy,
    categorical_kl,
    categorical_log_prob,
    categorical_log_probs,
    normal_kl,
    normal_log_prob,
    squashed_normal_entropy,
)
from benchmarl_trust.functional.gpae import (
    TRACES,
    check_gpae,
    importance_weight,
    per_agent_advantage,
    per_agent_value_target,
    trace_coefficient,
)
from benchmarl_trust.functional.kl_budget import greedy_bound, kkt_budget, uniform_budget
from benchmarl_trust.functional.line_search import Search, line_search
from benchmarl_trust.functional.ratio import (
    FACTORS,
    Weighting,
    check_same_shape,
    effective_sample_size,
    factor_weight,
    log_ratio,
    masked_mean,
)
from benchmarl_trust.functional.surrogate import (
    SURROGATES,
    Epsilon,
    Surrogate,
    check_surrogate,
    clip_gain,
    linear_gain,
    log_gain,
    quadratic_gain,
    radius,
    reciprocal_gain,
    surrogate_objective,
)

__all__ = [
    "FACTORS",
    "NORMALIZATIONS",
    "SURROGATES",
    "TRACES",
    "Epsilon",
    "Search",
    "Solution",
    "Surrogate",
    "Weighting",
    "categorical_entropy",
    "categorical_kl",
    "categorical_log_prob",
    "categorical_log_probs",
    "check_gpae",
    "check_same_shape",
    "check_surrogate",
    "clip_gain",
    "conjugate_gradient",
    "effective_sample_size",
    "factor_weight",
    "greedy_bound",
    "importance_weight",
    "kkt_budget",
    "line_search",
    "linear_gain",
    "log_gain",
    "log_ratio",
    "masked_mean",
    "normal_kl",
    "normal_log_prob",
    "normalize_advantage",
    "per_agent_advantage",
    "per_agent_value_target",
    "quadratic_gain",
    "radius",
    "reciprocal_gain",
    "squashed_normal_entropy",
    "surrogate_objective",
    "team_advantage",
    "trace_coefficient",
    "uniform_budget",
]
