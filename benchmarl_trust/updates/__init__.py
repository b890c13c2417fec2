"""Stateful procedures over one batch. They know TensorDicts and policies, but not BenchMARL."""

from benchmarl_trust.updates.allocation import SCORES, GreedyAllocation, KktAllocation, UniformAllocation
from benchmarl_trust.updates.compiled import CompiledGradient
from benchmarl_trust.updates.gradient import (
    EpochsInfo,
    GradientStep,
    MinibatchEpochs,
    exceeds_kl,
    shuffles,
    with_epochs,
)
from benchmarl_trust.updates.natural import Allocation, NaturalGradient, NaturalInfo, NaturalStep, Turn
from benchmarl_trust.updates.order import advantage_score, semi_greedy
from benchmarl_trust.updates.sweep import Advantage, PositionInfo, StepInfo, sweep

__all__ = [
    "SCORES",
    "Advantage",
    "Allocation",
    "CompiledGradient",
    "EpochsInfo",
    "GradientStep",
    "GreedyAllocation",
    "KktAllocation",
    "MinibatchEpochs",
    "NaturalGradient",
    "NaturalInfo",
    "NaturalStep",
    "PositionInfo",
    "StepInfo",
    "Turn",
    "UniformAllocation",
    "advantage_score",
    "exceeds_kl",
    "semi_greedy",
    "shuffles",
    "sweep",
    "with_epochs",
]
