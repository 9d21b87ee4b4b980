"""Canaries' scores and coins -> guesses on a fixed list of numbers, and the best bound that they allow; how to score canaries.

A higher score says that the canary was in. The k highest are guessed in and the k lowest out, for k fixed in advance; each k is given its
share of the error, so that the best of them may be reported (Bonferroni).
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from hf_dp.audit.one_run import Bounds, Guesses, bounds, ceiling
from hf_dp.errors import AuditError

SHARES = (0.1, 0.3, 1.0)  # of the canaries that are guessed about: fixed, or the confidence would not be what it says
Floats = NDArray[np.float64]
_ceiling = cache(ceiling)


class AuditResult(NamedTuple):
    """What one audit shows, with a probability of `confidence` or more that the bound holds, each of the two by itself.

    Attributes:
        bound: lower bounds on epsilon at `delta`.
        ceiling: what as many canaries could show at most.
        area_under_curve: of the scores: 0.5 is guessing. No bound follows from it.
        guesses: those behind the larger of the bounds on epsilon.
    """

    bound: Bounds
    ceiling: Bounds
    area_under_curve: float
    guesses: Guesses
    delta: float
    confidence: float


def audit(scores: Floats, included: NDArray[np.bool_], delta: float, confidence: float = 0.95) -> AuditResult:
    """Lower bounds on epsilon from the scores of canaries that independent fair coins put in, or left out.

    Raises:
        AuditError: scores that are not finite or not one a coin, or no canary on one of the sides.
    """
    scores, included = np.asarray(scores, dtype=float), np.asarray(included, dtype=bool)
    if scores.shape != included.shape or scores.ndim != 1 or not np.isfinite(scores).all():
        raise AuditError(f"expected a finite score for each of {included.size} coins, got scores {scores.shape}")
    if included.all() or not included.any():
        raise AuditError(f"all {included.size} coins fell on one side: toss anew, with more canaries")
    share_of_error = 1 - (1 - confidence) / len(SHARES)
    candidates = [(g, bounds(g, delta, share_of_error)) for g in guess(scores, included)]
    best = Bounds(*(max(b[i] for _, b in candidates) for i in range(2)))
    highest = _ceiling(len(scores), delta, share_of_error)
    return AuditResult(
        best, highest, area_under_curve(scores, included), max(candidates, key=lambda c: c[1])[0], delta, confidence
    )


def guess(scores: Floats, included: NDArray[np.bool_]) -> list[Guesses]:
    """One set of guesses for each of `SHARES`: half of them the highest scores, guessed in, half the lowest, guessed out."""
    order = np.argsort(scores, kind="stable")
    found = []
    for share in SHARES:
        half = max(1, int(len(scores) * share / 2))
        right = int((~included[order[:half]]).sum() + included[order[-half:]].sum())
        found.append(Guesses(len(scores), 2 * half, right))
    return found


def area_under_curve(scores: Floats, included: NDArray[np.bool_]) -> float:
    """The probability that a canary that is in scores higher than one that is out, ties counted half."""
    ranks = stats.rankdata(scores)
    inside, outside = int(included.sum()), int((~included).sum())
    return float((ranks[included].sum() - inside * (inside + 1) / 2) / (inside * outside))


def log_likelihood_ratio(projections: Floats, sample_rate: float, noise_multiplier: float) -> Floats:
    """White-box scores, [m]: sum over steps of log((1 - q) + q exp((2 x - 1) / (2 sigma²))).

    The best that can be said of a canary whose clipped gradient is the whole clip norm along a direction of its own.

    Args:
        projections: x, [T, m]: each step's noisy sum along the canary's direction, over C. 1 + noise where it was drawn, else noise.
        sample_rate: q.
        noise_multiplier: sigma, above 0.
    """
    exponent = (2 * projections - 1) / (2 * noise_multiplier**2)
    if sample_rate == 1:
        return np.asarray(exponent.sum(0))
    present, absent = exponent + np.log(sample_rate), np.log1p(-sample_rate)
    return np.asarray(np.logaddexp(present, absent).sum(0))
