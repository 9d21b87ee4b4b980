"""Guesses and the segments of a run -> whether the guesses refute the run's own trade-off function.

The hypothesis is not a Gaussian curve, but the curve of the run as it was accounted: Poisson-subsampled Gaussian steps
with their q, sigma and T, by privacy loss distributions. (`accounting/tradeoffs.py` has the formula for an attacker at
false-positive rate a; here a = 1 - x.)
"""

from collections.abc import Sequence

import numpy as np

from hf_dp.accounting import PAIRS, deltas, spent
from hf_dp.audit.one_run import Guesses, InverseBlowUp, refutes
from hf_dp.errors import AuditError
from hf_dp.mechanism import Segment


def claims_inverse_blow_up(segments: Sequence[Segment], delta: float) -> InverseBlowUp:
    """x -> a lower bound on f(1 - x), for the trade-off function f of all steps together.

    Pairs of epsilon and delta bound f from below. So the claim that is tested is never stronger than the run's.

    Raises:
        AuditError: steps without noise, which claim nothing.
    """
    top = spent(segments, delta).epsilon
    if not np.isfinite(top):
        raise AuditError("a run without noise claims nothing that could be refuted")
    epsilons = np.linspace(0.0, max(top, 1e-6), PAIRS)
    known = np.asarray(deltas(segments, [float(e) for e in epsilons]))
    growth = np.exp(epsilons)

    def inverse_blow_up(x: float) -> float:
        return float(max(0.0, (1 - known - growth * (1 - x)).max(), ((x - known) / growth).max()))

    return inverse_blow_up


def claim_is_refuted(guesses: Guesses, segments: Sequence[Segment], delta: float, confidence: float = 0.95) -> bool:
    """Whether so many right guesses have a probability below 1 - confidence in a run that is as private as its ledger
    says.
    """
    return refutes(guesses, claims_inverse_blow_up(segments, delta), confidence)
