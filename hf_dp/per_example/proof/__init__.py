"""Every operation of a pass is followed -> whether one example's loss can depend on another, and if so, why."""

from hf_dp.per_example.proof.labels import SIZE, Memories
from hf_dp.per_example.proof.operations import HOOKS
from hf_dp.per_example.proof.prove import Proof, has_backward_in_python, prove
from hf_dp.per_example.proof.put_back import is_sharded, state_put_back, untouched
from hf_dp.per_example.proof.state import State, note_beside, note_losses

__all__ = [
    "HOOKS",
    "SIZE",
    "Memories",
    "Proof",
    "State",
    "has_backward_in_python",
    "is_sharded",
    "note_beside",
    "note_losses",
    "prove",
    "state_put_back",
    "untouched",
]
