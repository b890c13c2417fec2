"""What serves any experiment of BenchMARL: a guard against what is not finite, and checkpoints to go on from."""

from benchmarl_trust.runtime.adam import fused
from benchmarl_trust.runtime.before import check_video, look_before_setup
from benchmarl_trust.runtime.evaluation import EvaluationInfo
from benchmarl_trust.runtime.guard import PATIENCE, FiniteGuard, OwnCallback, last_checkpoint, own_callback
from benchmarl_trust.runtime.resume import LatestCheckpoint, ResumeState

__all__ = [
    "PATIENCE",
    "EvaluationInfo",
    "FiniteGuard",
    "LatestCheckpoint",
    "OwnCallback",
    "ResumeState",
    "check_video",
    "fused",
    "last_checkpoint",
    "look_before_setup",
    "own_callback",
]
