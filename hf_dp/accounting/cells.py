"""Segments of steps -> how wide a cell of the grid is on which their privacy losses are composed.

Symbols: q sample rate, T number of steps, sigma joint noise multiplier, h width of the grid, mu = q
sqrt(exp(1/sigma²) - 1), the standard deviation of one step's likelihood ratio.
"""

import math
from collections.abc import Sequence

from hf_dp.accounting.mixtures import CELLS, shape
from hf_dp.mechanism import Segment

FINEST, COARSEST = 1e-7, 1e-3


def grid(segments: Sequence[Segment]) -> float:
    """Width h of the PLD grid: clip(mu / 10, 1e-7, 1e-3), the finest that any segment needs.

    One step's loss must spread over several cells, or rounding it up inflates epsilon: a fixed h of 1e-3 is 15 % loose
    at small q. Where losses reach so far that arrays would exceed some millions of cells (weak noise over many steps),
    h grows with them. Where several records of a unit are drawn, h is a tenth of the spread of one step's loss, or
    more, since a cell takes much longer. Every h gives an upper bound.
    """
    finest = min(_finest(s) for s in segments)
    step_reach = max(_step_reach(s) / (400_000 if s.contribution_bound == 1 else CELLS) for s in segments)
    return max(finest, step_reach, sum(total_reach(s) for s in segments) / 2**20)


def step_cells(s: Segment) -> float:
    """About how many grid cells the loss of one step fills. An evaluation takes about 10 microseconds for each."""
    return _step_reach(s) / grid([s])


def total_reach(s: Segment) -> float:
    """About the range of T steps' loss: the normal limit, or a participation count's tail. Only sizes arrays."""
    q, sigma, steps, _, most = s
    if most > 1:
        one = shape(q, sigma, most)
        return steps * abs(one.mean) + 10 * one.spread * math.sqrt(steps) + 2 * one.reach
    taken = min(steps, q * steps + 8 * math.sqrt(q * steps) + 12)
    by_count = 0.5 * taken / sigma**2 + 8 * math.sqrt(taken) / sigma
    by_normal = 0.5 * steps * _mu(s) ** 2 + 10 * _mu(s) * math.sqrt(steps) + 2 * _step_reach(s)
    return min(by_count, by_normal)


def _finest(s: Segment) -> float:
    if s.contribution_bound > 1:
        return max(shape(s.sample_rate, s.joint_noise_multiplier, s.contribution_bound).spread / 10, FINEST)
    return min(max(_mu(s) / 10, FINEST), COARSEST)


def _mu(s: Segment) -> float:
    return s.sample_rate * math.sqrt(math.expm1(min(s.joint_noise_multiplier**-2, 700.0)))  # exp(710) overflows


def _step_reach(s: Segment) -> float:
    """About the range of one step's loss, log(1 - q + q e^x), over ten standard deviations of x. Only sizes arrays."""
    if s.contribution_bound > 1:
        return shape(s.sample_rate, s.joint_noise_multiplier, s.contribution_bound).reach
    x = 0.5 * s.joint_noise_multiplier**-2 + 10 / s.joint_noise_multiplier
    up = math.log1p(s.sample_rate * math.expm1(x)) if x < 700 else x
    return up - math.log1p(s.sample_rate * math.expm1(-min(x, 30.0)))
