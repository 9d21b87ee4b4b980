"""Records go in; Poisson draws come out, this process's share of them, cut into micro-batches."""

from hf_dp.sampling.collation import Collate, Collation, OfUnits, of_lengths, taken_by_the_model
from hf_dp.sampling.loader import logical_batches
from hf_dp.sampling.microbatch import (
    DRAW_NUMBER,
    FAILURE,
    Container,
    LogicalBatchCollator,
    feature_length,
    micro_batches,
    tokens_of_a_pass,
)
from hf_dp.sampling.own_generators import REMEDY, own_generators
from hf_dp.sampling.owners import Owners
from hf_dp.sampling.poisson import Draw, PoissonSampler
from hf_dp.sampling.privacy_unit import Groups, groups_by, owners_in
from hf_dp.sampling.reading import INPUTS, DrawnRecords, Failure, Reader, Records, read_records
from hf_dp.sampling.repeats import code_of, refuse_data_that_remember, refuse_what_remembers
from hf_dp.sampling.seals import Seals, sealed_micro_batches

__all__ = [
    "DRAW_NUMBER",
    "FAILURE",
    "INPUTS",
    "REMEDY",
    "Collate",
    "Collation",
    "Container",
    "Draw",
    "DrawnRecords",
    "Failure",
    "Groups",
    "LogicalBatchCollator",
    "OfUnits",
    "Owners",
    "PoissonSampler",
    "Reader",
    "Records",
    "Seals",
    "code_of",
    "feature_length",
    "groups_by",
    "logical_batches",
    "micro_batches",
    "of_lengths",
    "own_generators",
    "owners_in",
    "read_records",
    "refuse_data_that_remember",
    "refuse_what_remembers",
    "sealed_micro_batches",
    "taken_by_the_model",
    "tokens_of_a_pass",
]
