"""Stateful procedures over one batch. They know TensorDicts and policies, but not BenchMARL."""

from benchmarl_trust.updates.adam import GradientStep, MinibatchEpochs, mean_info, minibatches
from benchmarl_trust.updates.policy import AgentPolicy, GroupPolicy
from benchmarl_trust.updates.sweep import (
    Agent,
    PositionInfo,
    StepInfo,
    current_log_ratio,
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
    "current_log_ratio",
    "mean_info",
    "minibatches",
    "remember_old_policy",
    "sweep",
]
