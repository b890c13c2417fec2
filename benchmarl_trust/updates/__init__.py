"""Stateful procedures over one batch. They know TensorDicts and policies, but not BenchMARL."""

from benchmarl_trust.updates.adam import GradientStep, MinibatchEpochs, fused, shuffles
from benchmarl_trust.updates.allocation import ESTIMATORS, GreedyAllocation, KktAllocation, UniformAllocation
from benchmarl_trust.updates.natural import NaturalGradient, NaturalInfo, NaturalStep
from benchmarl_trust.updates.policy import AgentPolicy, GroupPolicy, fork_rng
from benchmarl_trust.updates.sweep import (
    Agent,
    PositionInfo,
    StepInfo,
    forward,
    log_ratio_of,
    remember_old_policy,
    sweep,
)

__all__ = [
    "ESTIMATORS",
    "Agent",
    "AgentPolicy",
    "GradientStep",
    "GreedyAllocation",
    "GroupPolicy",
    "KktAllocation",
    "MinibatchEpochs",
    "NaturalGradient",
    "NaturalInfo",
    "NaturalStep",
    "PositionInfo",
    "StepInfo",
    "UniformAllocation",
    "fork_rng",
    "forward",
    "fused",
    "log_ratio_of",
    "remember_old_policy",
    "shuffles",
    "sweep",
]
