"""A model, a batch and a loss go in; each example's gradient norm and the clipped sum come out, exactly, in one backward pass."""

from hf_dp.per_example import factors, losses
from hf_dp.per_example.batches import Batch, num_examples, rows, unambiguous
from hf_dp.per_example.capture import Pass, clipped_gradient_sum, per_example_factors, views
from hf_dp.per_example.compiled import CompiledBlocks
from hf_dp.per_example.cost import materialise_is_cheaper
from hf_dp.per_example.head import OVER_VOCABULARY, decoder_inputs
from hf_dp.per_example.inventory import Row, take_inventory
from hf_dp.per_example.losses import IGNORED, public_sizes
from hf_dp.per_example.self_check import Report, self_check
from hf_dp.per_example.synthetic import LENGTHS, records_of_the_same_shape, synthetic_records, together_and_alone

__all__ = [
    "IGNORED",
    "LENGTHS",
    "OVER_VOCABULARY",
    "Batch",
    "CompiledBlocks",
    "Pass",
    "Report",
    "Row",
    "clipped_gradient_sum",
    "decoder_inputs",
    "factors",
    "losses",
    "materialise_is_cheaper",
    "num_examples",
    "per_example_factors",
    "public_sizes",
    "records_of_the_same_shape",
    "rows",
    "self_check",
    "synthetic_records",
    "take_inventory",
    "together_and_alone",
    "unambiguous",
    "views",
]
