"""A model, a batch and a loss go in; exact per-example norms and the clipped sum come out, in one backward pass."""

from hf_dp.per_example import factors, losses, preferences
from hf_dp.per_example.batches import (
    LEFT,
    RIGHT,
    Batch,
    Leaf,
    MicroBatch,
    Owned,
    Padding,
    Path,
    Record,
    Untied,
    is_tied,
    leaves,
    pad_and_join,
    same,
    stacked,
)
from hf_dp.per_example.borrowing import Places, places_kept
from hf_dp.per_example.capture import (
    Pass,
    PerExample,
    clipped_gradient_sum,
    clipped_gradients,
    per_example_factors,
    views,
)
from hf_dp.per_example.checksums import checksums
from hf_dp.per_example.compiled import CompiledBlocks
from hf_dp.per_example.cost import LAUNCHES, materialise_is_cheaper
from hf_dp.per_example.gathering import let_go, trains_shards
from hf_dp.per_example.head import OVER_VOCABULARY, decoder_inputs
from hf_dp.per_example.inventory import Inventory, Row, inventory_of_one, take_inventory
from hf_dp.per_example.lengths import ComparedLengths, sizes_of
from hf_dp.per_example.losses import IGNORED, public_sizes
from hf_dp.per_example.one_at_a_time import each_alone, tied_members
from hf_dp.per_example.outside import hooks_in, refuse_hooks
from hf_dp.per_example.owned import UnitUnderWay, of_units
from hf_dp.per_example.proof import (
    SIZE,
    Proof,
    State,
    is_sharded,
    note_beside,
    note_losses,
    prove,
    state_put_back,
    untouched,
)
from hf_dp.per_example.reads import Reads, has_changed, names_in, reads_of_code, used_by
from hf_dp.per_example.self_check import Report, is_coupled, precision, self_check, undisturbed
from hf_dp.per_example.synthetic import LENGTHS, MANY, longest_taken, records_of_the_same_shape, synthetic_records
from hf_dp.per_example.trace import Trace, trace_of
from hf_dp.per_example.units import as_rows, as_units

__all__ = [
    "IGNORED",
    "LAUNCHES",
    "LEFT",
    "LENGTHS",
    "MANY",
    "OVER_VOCABULARY",
    "RIGHT",
    "SIZE",
    "Batch",
    "ComparedLengths",
    "CompiledBlocks",
    "Inventory",
    "Leaf",
    "MicroBatch",
    "Owned",
    "Padding",
    "Pass",
    "Path",
    "PerExample",
    "Places",
    "Proof",
    "Reads",
    "Record",
    "Report",
    "Row",
    "State",
    "Trace",
    "UnitUnderWay",
    "Untied",
    "as_rows",
    "as_units",
    "checksums",
    "clipped_gradient_sum",
    "clipped_gradients",
    "decoder_inputs",
    "each_alone",
    "factors",
    "has_changed",
    "hooks_in",
    "inventory_of_one",
    "is_coupled",
    "is_sharded",
    "is_tied",
    "leaves",
    "let_go",
    "longest_taken",
    "losses",
    "materialise_is_cheaper",
    "names_in",
    "note_beside",
    "note_losses",
    "of_units",
    "pad_and_join",
    "per_example_factors",
    "places_kept",
    "precision",
    "preferences",
    "prove",
    "public_sizes",
    "reads_of_code",
    "records_of_the_same_shape",
    "refuse_hooks",
    "same",
    "self_check",
    "sizes_of",
    "stacked",
    "state_put_back",
    "synthetic_records",
    "take_inventory",
    "tied_members",
    "trace_of",
    "trains_shards",
    "undisturbed",
    "untouched",
    "used_by",
    "views",
]
