"""A recipe and a grid of settings go in; the best run comes out, with an epsilon that includes the choice."""

from hf_dp.sweep import folder, run
from hf_dp.sweep.folder import SELECTED
from hf_dp.sweep.grid import combinations
from hf_dp.sweep.plan import derivation
from hf_dp.sweep.results import SweepResult
from hf_dp.sweep.run import Asked, Tell

__all__ = [
    "SELECTED",
    "Asked",
    "SweepResult",
    "Tell",
    "combinations",
    "derivation",
    "folder",
    "run",
]
