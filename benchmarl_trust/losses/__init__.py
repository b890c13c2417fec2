"""TorchRL loss modules: they read TensorDict keys and call :mod:`benchmarl_trust.functional`."""

from benchmarl_trust.losses.surrogate import CriticPhaseLoss, SurrogateLoss
from benchmarl_trust.losses.trust_region import TrustRegionLoss

__all__ = ["CriticPhaseLoss", "SurrogateLoss", "TrustRegionLoss"]
