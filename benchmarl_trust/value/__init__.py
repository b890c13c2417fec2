"""TorchRL value estimation with a value per agent: the counterfactual critic and the estimator over it."""

from benchmarl_trust.value.critic import CounterfactualCritic, counterfactual_table
from benchmarl_trust.value.gpae import GPAE
from benchmarl_trust.value.normalization import NormalizedCritic

__all__ = ["GPAE", "CounterfactualCritic", "NormalizedCritic", "counterfactual_table"]
