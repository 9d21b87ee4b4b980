"""Settings and the number of records go in, a calibrated `Mechanism` comes out; steps go in, epsilon comes out."""

from hf_dp.accounting import advice, selection
from hf_dp.accounting.calibration import round_up
from hf_dp.accounting.curve import plot_epsilon
from hf_dp.accounting.derivation import Derived, derivation
from hf_dp.accounting.epsilon import (
    Epsilon,
    delta_problems,
    deltas,
    segment_problems,
    spent,
    target_problems,
)
from hf_dp.accounting.plan import affordable_steps, claimed, epoch_length, plan_mechanism
from hf_dp.accounting.selection import Selection, random_number
from hf_dp.accounting.tradeoffs import PAIRS, RATES, Tradeoff, tradeoff, tradeoff_below
from hf_dp.accounting.units import ways_to_draw, ways_to_keep

__all__ = [
    "PAIRS",
    "RATES",
    "Derived",
    "Epsilon",
    "Selection",
    "Tradeoff",
    "advice",
    "affordable_steps",
    "claimed",
    "delta_problems",
    "deltas",
    "derivation",
    "epoch_length",
    "plan_mechanism",
    "plot_epsilon",
    "random_number",
    "round_up",
    "segment_problems",
    "selection",
    "spent",
    "target_problems",
    "tradeoff",
    "tradeoff_below",
    "ways_to_draw",
    "ways_to_keep",
]
