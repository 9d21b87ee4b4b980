"""Canaries' scores and coins -> guesses about the coins; and how to score canaries.

A higher score says that the canary was trained on. The k highest are guessed in and the k lowest out, for several k
that are fixed in advance; each k gets its share of the error probability, so that the best of them may be reported
(Bonferroni).
"""

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from hf_dp.audit.one_run import Guesses

SHARES = (0.1, 0.3, 1.0)  # of the canaries that are guessed about; fixed in advance, as the confidence requires
Floats = NDArray[np.float64]


def guess(scores: Floats, included: NDArray[np.bool_]) -> list[Guesses]:
    """Guesses for each of `SHARES`: half of them the highest scores, guessed in, and half the lowest, guessed out."""
    order = np.argsort(scores, kind="stable")
    found = []
    for share in SHARES:
        half = max(1, int(len(scores) * share / 2))
        right = int((~included[order[:half]]).sum() + included[order[-half:]].sum())
        found.append(Guesses(len(scores), 2 * half, right))
    return found


def area_under_curve(scores: Floats, included: NDArray[np.bool_]) -> float:
    """The probability that a canary that was trained on scores higher than one that was not; ties count half."""
    ranks = stats.rankdata(scores)
    inside, outside = int(included.sum()), int((~included).sum())
    return float((ranks[included].sum() - inside * (inside + 1) / 2) / (inside * outside))


def log_likelihood_ratio(projections: Floats, sample_rate: float, noise_multiplier: float) -> Floats:
    """White-box scores, [m]: the sum over steps of log((1 - q) + q exp((2 x - 1) / (2 sigma²))).

    This is the best possible score for a canary whose clipped gradient has the clip norm and a direction of its own.

    Args:
        projections: x, [T, m]: each step's noisy sum along the canary's direction, over C; 1 + noise where the canary
            was drawn, else noise.
        sample_rate: q.
        noise_multiplier: sigma, above 0.
    """
    exponent = (2 * projections - 1) / (2 * noise_multiplier**2)
    if sample_rate == 1:
        return np.asarray(exponent.sum(0))
    present, absent = exponent + np.log(sample_rate), np.log1p(-sample_rate)
    return np.asarray(np.logaddexp(present, absent).sum(0))
