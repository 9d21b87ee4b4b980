"""Whether one example's loss can depend on another: shown for a model by following every operation of a pass, and why
it is not.
"""

from hf_dp.per_example.proof.labels import SIZE
from hf_dp.per_example.proof.prove import Proof, prove
from hf_dp.per_example.proof.state import State, state_put_back, untouched

__all__ = ["SIZE", "Proof", "State", "prove", "state_put_back", "untouched"]
