"""What serves any experiment: a guard against what is not finite, and an exact continuation."""

from benchmarl_trust.runtime.guard import FiniteGuard, last_checkpoint, own_callback
from benchmarl_trust.runtime.resume import LatestCheckpoint, ResumeState

__all__ = ["FiniteGuard", "LatestCheckpoint", "ResumeState", "last_checkpoint", "own_callback"]
