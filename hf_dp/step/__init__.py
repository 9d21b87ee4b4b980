"""Micro-batches of one draw go in; the released sum comes out, charged, noised and the same on every process."""

from hf_dp.step import sharding
from hf_dp.step.dry_run import largest_micro_batch
from hf_dp.step.integers import add_integer_gradient, grid_of
from hf_dp.step.memory import Room
from hf_dp.step.metrics import ReleasedMetrics, contribution
from hf_dp.step.run import PrivacySpent, PrivateRun, checkpoint_to_resume
from hf_dp.step.sharding import is_sharded

__all__ = [
    "PrivacySpent",
    "PrivateRun",
    "ReleasedMetrics",
    "Room",
    "add_integer_gradient",
    "checkpoint_to_resume",
    "contribution",
    "grid_of",
    "is_sharded",
    "largest_micro_batch",
    "sharding",
]
