"""Settings and the number of records go in, a calibrated `Mechanism` comes out; steps taken go in, epsilon comes out."""

from hf_dp.accounting import selection
from hf_dp.accounting.calibration import round_up
from hf_dp.accounting.epsilon import (
    MAX_SIGMA,
    Epsilon,
    delta_problems,
    deltas,
    segment_problems,
    spent,
    target_problems,
)
from hf_dp.accounting.picture import draw_epsilon
from hf_dp.accounting.planned import Derived, affordable_steps, derivation, epoch_length, plan
from hf_dp.accounting.selection import Selection, draw_number
from hf_dp.accounting.tradeoffs import PAIRS, RATES, Tradeoff, tradeoff, tradeoff_below

__all__ = [
    "MAX_SIGMA",
    "PAIRS",
    "RATES",
    "Derived",
    "Epsilon",
    "Selection",
    "Tradeoff",
    "affordable_steps",
    "delta_problems",
    "deltas",
    "derivation",
    "draw_epsilon",
    "draw_number",
    "epoch_length",
    "plan",
    "round_up",
    "segment_problems",
    "selection",
    "spent",
    "target_problems",
    "tradeoff",
    "tradeoff_below",
]
