r"""One step in which each of a unit's records is drawn by itself -> its privacy loss distribution; sizes of its grid.

At most G records of each unit are kept, whichever they are as long as the choice looks at that unit alone. Each joins a
step by itself with probability q and is clipped to C (example-level sampling: Charles et al. 2024, "Fine-Tuning Large
Language Models with User-Level Differential Privacy", DP-SGD-ELS). With the unit, the number of its records in a step
is I ~ Bin(G, q), and they move the sum by at most I C; without it, by nothing. So, in units of C, a step is dominated
by a mixture of Gaussians, in both directions (theorem 1 there; Choquette-Choo et al. 2024, "Privacy Amplification for
Matrix Mechanisms", corollary 4.7):

    N(0, sigma²)   against   sum_i P(I = i) N(i, sigma²),

and T steps by T of them, however each depends on those before. A unit with fewer records has fewer in each step: its
mixture is dominated by the one of G.

Symbols: q sample rate of a record, sigma joint noise multiplier, G contribution bound, h width of the grid.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CELLS = 20_000  # of one step's loss, at most: each takes about a tenth of a millisecond
NEGLIGIBLE = 1e-25  # probabilities that only size the grid


class Shape(NamedTuple):
    """Of one step's privacy loss.

    Attributes:
        mean: with the unit.
        spread: standard deviation with the unit.
        reach: about its range, over ten standard deviations of the noise.
    """

    mean: float
    spread: float
    reach: float


def step_loss(q: float, sigma: float, most: int, h: float) -> Any:
    """dp-accounting's privacy loss distribution of one step, in both directions; rounded up to a grid of width h.

    Args:
        q: below 1.
        sigma: above 0.
        most: G, above 1.
        h: width of the grid.
    """
    from dp_accounting.pld import privacy_loss_distribution

    counts, chances = _counts(q, most)
    return privacy_loss_distribution.from_mixture_gaussian_mechanism(
        sigma, counts.tolist(), chances.tolist(), value_discretization_interval=h
    )


@lru_cache(maxsize=256)
def shape(q: float, sigma: float, most: int) -> Shape:
    """How the loss of one step lies; it only sizes arrays."""
    counts, chances = _counts(q, most)
    likely = counts[chances > NEGLIGIBLE].max()
    x = np.linspace(-10 * sigma, likely + 10 * sigma, 4001)
    log_ratio = np.logaddexp.reduce((np.outer(x, counts) - counts**2 / 2) / sigma**2 + np.log(chances), axis=1)
    log_density = log_ratio - x**2 / (2 * sigma**2)
    weights = np.exp(log_density - log_density.max())
    weights /= weights.sum()
    mean = float(weights @ log_ratio)
    spread = math.sqrt(max(float(weights @ (log_ratio - mean) ** 2), 0.0))
    return Shape(mean, spread, float(log_ratio[-1] - log_ratio[0]))


def _counts(q: float, most: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How many of G records are in a step, and how probable each number is; those of no probability are left out."""
    from scipy import stats

    counts = np.arange(most + 1)
    chances = stats.binom.pmf(counts, most, q)
    kept = chances > 0
    return counts[kept].astype(np.float64), chances[kept] / chances[kept].sum()
