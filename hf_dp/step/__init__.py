"""Micro-batches of one draw go in; the released sum comes out: charged, noised, and the same on every process."""

from hf_dp.step import sharding
from hf_dp.step.arithmetic import COARSE, coarse_products
from hf_dp.step.dry_run import largest_micro_batch
from hf_dp.step.opening import Place, Session
from hf_dp.step.private_step import Passes, PrivateStep
from hf_dp.step.run import PrivateRun
from hf_dp.step.sharding import is_sharded
from hf_dp.step.signal import SIGNAL_TO_NOISE, ReleasedFigures
from hf_dp.step.spending import PrivacySpent, Spending
from hf_dp.step.weight_guard import WeightGuard, foreign_parameters, refuse_foreign_parameters

__all__ = [
    "COARSE",
    "SIGNAL_TO_NOISE",
    "Passes",
    "Place",
    "PrivacySpent",
    "PrivateRun",
    "PrivateStep",
    "ReleasedFigures",
    "Session",
    "Spending",
    "WeightGuard",
    "coarse_products",
    "foreign_parameters",
    "is_sharded",
    "largest_micro_batch",
    "refuse_foreign_parameters",
    "sharding",
]
