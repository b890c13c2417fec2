"""One agent's view of a group's policy: its distribution, its parameters, its data, and what it was before."""

from benchmarl_trust.policy.agent import (
    Agent,
    AgentPolicy,
    StackedPolicy,
    columns_of,
    forward,
    kl_of,
    kl_product_of,
    log_ratio_of,
    old_outputs,
    remember_old_policy,
    set_gradient,
    surrogate_of,
)
from benchmarl_trust.policy.group import GroupPolicy, fork_rng
from benchmarl_trust.policy.head import Head, PaddedNormal, head_of, normal_extractor, parameter_keys, policy_features

__all__ = [
    "Agent",
    "AgentPolicy",
    "GroupPolicy",
    "Head",
    "PaddedNormal",
    "StackedPolicy",
    "columns_of",
    "fork_rng",
    "forward",
    "head_of",
    "kl_of",
    "kl_product_of",
    "log_ratio_of",
    "normal_extractor",
    "old_outputs",
    "parameter_keys",
    "policy_features",
    "remember_old_policy",
    "set_gradient",
    "surrogate_of",
]
