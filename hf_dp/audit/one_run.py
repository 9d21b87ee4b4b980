"""Counts of right guesses about coins -> lower bounds on epsilon from one training run, and the largest possible bound.

Each of m canaries is put into the data by a fair coin of its own. After training, the auditor names r of them as in or
out and abstains on the rest; v of the r guesses are right. If a mechanism is (epsilon, delta)-DP, or has the trade-off
function f, many right guesses are unlikely. The bound is the least privacy parameter that the counts do not refute.

`epsilon_bound`: Steinke, Nasr, Jagielski 2023, theorem for approximate differential privacy. `mu_bound`: Mahloujifar,
Melis, Chaudhuri 2024, for Gaussian trade-off functions; it is higher, but bounds a run's epsilon only as far as the
run's trade-off function is Gaussian. `refutes` takes any trade-off function, such as the run's own.

Symbols: m canaries, r guesses, v right ones, tau = 1 - confidence.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

from hf_dp.errors import AuditError

TOP = 100.0  # larger epsilons or mus are not searched: odds of e^100 to one
STEPS = 401  # points of the grid on which a bound is bracketed, before bisection
InverseBlowUp = Callable[[float], float]


class Guesses(NamedTuple):
    """`num_right` of `num_guesses` guesses about `num_canaries` independent fair coins were right."""

    num_canaries: int
    num_guesses: int
    num_right: int


def p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """The largest probability of so many right guesses under (epsilon, delta)-DP, at most 1 (Steinke et al. 2023).

    P[X >= v] + 2 m delta max_{1 <= i <= v} P[v - i <= X < v] / i with X ~ Bin(r, e^epsilon / (1 + e^epsilon)).
    """
    m, r, v = _checked(guesses, delta)
    if v == 0:
        return 1.0
    right_guess = 1.0 / (1.0 + math.exp(-epsilon))
    at_most = special.bdtr(np.arange(v), r, right_guess)  # P[X <= k] for k < v
    below = at_most[-1] - np.append(at_most[-2::-1], 0.0)  # P[v - i <= X < v] for i = 1 ... v
    extra = np.max(below / np.arange(1, v + 1))
    return float(min(1.0, special.bdtrc(v - 1, r, right_guess) + 2 * m * delta * extra))


def epsilon_bound(guesses: Guesses, delta: float, confidence: float = 0.95) -> float:
    """The least epsilon whose p-value is at least 1 - confidence: every smaller epsilon is refuted. 0 where none is.

    If the run is (epsilon, delta)-DP, the bound exceeds epsilon with a probability of at most 1 - confidence.
    """
    tau = _tau(confidence)
    return _first_not_refuted(lambda epsilon: p_value(guesses, epsilon, delta) < tau)


def refutes(guesses: Guesses, inverse_blow_up: InverseBlowUp, confidence: float = 0.95) -> bool:
    """Whether the counts refute a trade-off function f (Mahloujifar et al. 2024, algorithm 3).

    Args:
        guesses: m, r, v.
        inverse_blow_up: x -> f(1 - x) for a symmetric f: the least probability that an event of probability x has once
            a canary's coin is reversed.
        confidence: 1 - tau.
    """
    m, r, v = _checked(guesses, 0.0)
    tau = _tau(confidence)
    right, wrong = tau * v / m, tau * (r - v) / m
    for i in range(v - 1, -1, -1):
        pushed = max(wrong, inverse_blow_up(right))
        if pushed == wrong:
            break
        right = min(1.0, right + i / (r - i) * (pushed - wrong))
        wrong = pushed
    return right + wrong > r / m


def mu_bound(guesses: Guesses, confidence: float = 0.95) -> float:
    """The largest mu such that every smaller mu-GDP is refuted; 0 where none is."""
    return _first_not_refuted(
        lambda mu: refutes(guesses, lambda x: float(special.ndtr(special.ndtri(x) - mu)), confidence)
    )


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The exact epsilon of mu-GDP at delta (Balle and Wang 2018; Dong, Roth, Su 2022, corollary 2.13); 0 for mu = 0.

    Raises:
        AuditError: delta outside (0, 1), or a mu that is negative or not finite.
    """
    if not (0 < delta < 1 and 0 <= mu < math.inf):
        raise AuditError(f"expected delta above 0 and below 1 and a finite mu, 0 or more, got {delta} and {mu}")

    def excess(epsilon: float) -> float:
        second = math.exp(epsilon + float(special.log_ndtr(-epsilon / mu - mu / 2)))
        return float(special.ndtr(-epsilon / mu + mu / 2)) - second - delta

    if mu == 0 or excess(0.0) <= 0:
        return 0.0
    upper = mu * mu / 2 + mu * max(0.0, -float(special.ndtri(delta)))  # there the first term alone is delta
    return float(optimize.brentq(excess, 0.0, upper, xtol=1e-10))


class Bounds(NamedTuple):
    """Lower bounds on epsilon at the run's delta: the general one, and the one for a Gaussian trade-off function."""

    epsilon: float
    epsilon_gaussian: float


def bounds(guesses: Guesses, delta: float, confidence: float = 0.95) -> Bounds:
    """Both lower bounds; the confidence holds for each by itself."""
    return Bounds(epsilon_bound(guesses, delta, confidence), gaussian_epsilon(mu_bound(guesses, confidence), delta))


def ceiling(num_canaries: int, delta: float, confidence: float = 0.95) -> Bounds:
    """The largest bounds that an audit with so many canaries can show, however little private the run: every guess is
    right.
    """
    return bounds(Guesses(num_canaries, num_canaries, num_canaries), delta, confidence)


def _first_not_refuted(refuted: Callable[[float], bool]) -> float:
    """inf {x >= 0: not refuted(x)}: the first bracket on a grid, then bisection.

    It is the first such x and not the last, because then it is at most the true x whenever the true x is not refuted,
    whether or not `refuted` is monotone.
    """
    grid = np.linspace(0.0, TOP, STEPS)
    upper = next((i for i, x in enumerate(grid) if not refuted(float(x))), None)
    if upper is None:
        raise AuditError(
            f"everything up to {TOP:g} is refuted: no audit shows that much; are the guesses made from the coins?"
        )
    if upper == 0:
        return 0.0
    low, high = float(grid[upper - 1]), float(grid[upper])
    while high - low > 1e-8:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _checked(guesses: Guesses, delta: float) -> Guesses:
    wrong = list(_problems(guesses, delta))
    if wrong:
        raise AuditError("; ".join(wrong))
    return guesses


def _problems(guesses: Guesses, delta: float) -> Iterator[str]:
    m, r, v = guesses
    if not 0 <= v <= r <= m or m < 1:
        yield f"expected 0 <= right guesses <= guesses <= canaries, and a canary, got {guesses}"
    if not 0 <= delta < 1:
        yield f"expected a delta from 0 and below 1, got {delta}"


def _tau(confidence: float) -> float:
    if not 0.5 <= confidence < 1:
        raise AuditError(f"expected a confidence from 0.5 and below 1, got {confidence}")
    return 1.0 - confidence
