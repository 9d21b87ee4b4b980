"""Segments of steps go in, an upper bound on every attacker comes out: true positives against false positives.

The attacker sees the model, knows every other record, and must say whether one record was trained on. If (epsilon,
delta)-DP holds for each pair on a curve, a test with false-positive rate a has a true-positive rate of at most

    min over the pairs of  min(delta + e^epsilon a,  1 - e^-epsilon (1 - delta - a))

(Wasserman and Zhou 2010; as a trade-off function: Dong, Roth, Su 2022). The pairs are dp-accounting's upper bounds, so
every subset of them gives an upper bound too.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hf_dp.accounting.epsilon import deltas, spent
from hf_dp.mechanism import Segment

RATES = (
    *(0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45),
    *(0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0),
)
PAIRS = 2_000  # (epsilon, delta) pairs, evenly spaced from 0; twice as many change no rate by 1e-4


class Tradeoff(NamedTuple):
    """Upper bounds on any attacker.

    `true_positive_rates[i]` belongs to the false-positive rate `RATES[i]`. `advantage` is the largest difference of the
    two rates at any threshold; (1 + advantage) / 2 is the best guesser's chance of being right about a fair coin.
    """

    advantage: float
    true_positive_rates: tuple[float, ...]


def tradeoff(segments: Sequence[Segment], delta: float) -> Tradeoff:
    """The trade-off curve of all steps together, at the false-positive rates `RATES`.

    Raises:
        AccountingError: as in `epsilon.spent`.
    """
    return tradeoff_below(spent(segments, delta).epsilon, delta, lambda epsilons: deltas(segments, epsilons))


def tradeoff_below(top: float, delta: float, deltas_at: Callable[[Sequence[float]], Sequence[float]]) -> Tradeoff:
    """The trade-off curve of any mechanism that is (top, delta)-DP, and (e, deltas_at([e]))-DP for each e below top."""
    if math.isinf(top):
        return Tradeoff(1.0, (1.0,) * len(RATES))
    epsilons = [top * i / PAIRS for i in range(PAIRS)]
    pairs = [*zip(epsilons, deltas_at(epsilons), strict=True), (top, delta if top else 0.0)]
    return Tradeoff(pairs[0][1], tuple(min(_bound(a, e, d) for e, d in pairs) for a in RATES))


def _bound(false_positives: float, epsilon: float, delta: float) -> float:
    by_presence = delta + false_positives * math.exp(min(epsilon, 700.0))
    by_absence = 1 - math.exp(-epsilon) * (1 - delta - false_positives)
    return min(1.0, by_presence, by_absence)
