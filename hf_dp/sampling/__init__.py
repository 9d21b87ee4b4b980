"""Records go in; Poisson draws come out, this process's share of them, cut into micro-batches."""

from hf_dp.sampling.collation import Collation
from hf_dp.sampling.loader import logical_batches
from hf_dp.sampling.microbatch import (
    DRAW_NUMBER,
    FAILURE,
    DrawnRecords,
    LogicalBatchCollator,
    Reader,
    feature_length,
    micro_batches,
    read_records,
    tokens_of_a_pass,
)
from hf_dp.sampling.poisson import Draw, PoissonSampler
from hf_dp.sampling.privacy_unit import Groups, groups_by

__all__ = [
    "DRAW_NUMBER",
    "FAILURE",
    "Collation",
    "Draw",
    "DrawnRecords",
    "Groups",
    "LogicalBatchCollator",
    "PoissonSampler",
    "Reader",
    "feature_length",
    "groups_by",
    "logical_batches",
    "micro_batches",
    "read_records",
    "tokens_of_a_pass",
]
