"""Stateful procedures over one batch. They know TensorDicts and policies, but not BenchMARL."""

from benchmarl_trust.updates.adam import GradientStep, MinibatchEpochs, fused, shuffles
from benchmarl_trust.updates.policy import AgentPolicy, GroupPolicy, fork_rng
from benchmarl_trust.updates.sweep import (
    Agent,
    PositionInfo,
    StepInfo,
    forward,
    log_ratio_of,
    old_outputs,
    remember_old_policy,
    sweep,
)

__all__ = [
    "Agent",
    "AgentPolicy",
    "GradientStep",
    "GroupPolicy",
    "MinibatchEpochs",
    "PositionInfo",
    "StepInfo",
    "fork_rng",
    "forward",
    "fused",
    "log_ratio_of",
    "old_outputs",
    "remember_old_policy",
    "shuffles",
    "sweep",
]
