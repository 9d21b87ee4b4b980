"""Micro-batches of one draw go in; the released sum comes out, charged, noised and the same on every process."""

from hf_dp.step import sharding
from hf_dp.step.dry_run import largest_micro_batch
from hf_dp.step.metrics import ReleasedMetrics
from hf_dp.step.private_step import Passes, PrivateStep
from hf_dp.step.run import PrivacySpent, PrivateRun, checkpoint_to_resume
from hf_dp.step.sharding import is_sharded

__all__ = [
    "Passes",
    "PrivacySpent",
    "PrivateRun",
    "PrivateStep",
    "ReleasedMetrics",
    "checkpoint_to_resume",
    "is_sharded",
    "largest_micro_batch",
    "sharding",
]
