"""Segments of steps and delta go in, an upper bound on epsilon comes out, by two accountants.

Every number is dp-accounting's: privacy loss distributions (PLD, Koskela et al. 2020; connect-the-dots discretisation,
Doroshenko et al. 2022) and Rényi DP (RDP, Mironov et al. 2019). Each is an upper bound; the smaller one is reported.
Discrete noise (`randomness/grid.py`) is accounted by Rényi DP at whole orders alone, and so is whatever it is composed
with. Accountants fail open (given a NaN they answer epsilon 0), so inputs are checked before and answers after.

Symbols: q sample rate, T number of steps, sigma joint noise multiplier, h width of the PLD grid, G contribution bound:
`mixtures.py` has the law of a step with G > 1.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from numbers import Integral
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hf_dp.accounting import mixtures
from hf_dp.accounting.cells import grid
from hf_dp.config import MIN_DELTA, MOST_CONTRIBUTED, is_number
from hf_dp.errors import AccountingError
from hf_dp.mechanism import DISCRETE, Segment

MIN_SIGMA, MAX_SIGMA = 0.01, 1e6  # under the first one step costs epsilon 5,000; over the second no grid resolves mu
MAX_STEPS = 1_000_000  # dp-accounting computes size**T as an integer: seconds at a million, minutes beyond
PLD_ROUNDING = 2.0**-51  # a step: the FFT's T-th power moves the tail's mass by up to T x 2**-53 (measured; x 4 here)
RDP_ROUNDING = 1e-13  # a step: log A sums 1,024 rounded terms; without it a lost divergence would pass for none
# The sampler of discrete noise is within 2**-400 a coordinate of the exact law (`discrete.py`): with 2**60 of them in
# all and epsilon up to 100 that costs (1 + e**100) 2**-340 < 2**-195 of delta, less than the last bit of any delta that
# is accounted. Beyond 100 nothing is claimed.
DISCRETE_MOST = 100.0


Floats = NDArray[np.float64]


class _PrivacyLoss(Protocol):
    """What dp-accounting's privacy loss distribution offers."""

    def compose(self, other: "_PrivacyLoss") -> "_PrivacyLoss": ...
    def self_compose(self, num_times: int) -> "_PrivacyLoss": ...
    def get_epsilon_for_delta(self, delta: float) -> float: ...
    def get_delta_for_epsilon(self, epsilon: Sequence[float]) -> Sequence[float]: ...


class Epsilon(NamedTuple):
    """Upper bounds on epsilon at one delta. `epsilon` is the smaller of the other two, and is what is claimed.

    With discrete noise among the steps `pld` is infinite, and with a contribution bound `rdp` is. All three are
    infinite where epsilon would exceed DISCRETE_MOST.
    """

    epsilon: float
    pld: float
    rdp: float


def spent(segments: Sequence[Segment], delta: float) -> Epsilon:
    """Epsilon of all steps of `segments` together, under the zero-out relation (REPLACE_SPECIAL, N public).

    Order does not matter, and equal segments may come in pieces: they are merged by (q, sigma) first. No steps cost 0,
    and a step without noise costs infinity. The costly part for each (q, sigma) is cached, so a further call with
    another number of steps takes a few hundredths of a second and can be made at every logging step.

    Raises:
        AccountingError: q outside (0, 1], sigma neither 0 nor within [MIN_SIGMA, MAX_SIGMA], a number of steps that is
            not whole, negative or above MAX_STEPS, delta outside [MIN_DELTA, 1), or an answer that cannot be true.
    """
    return _spent(_merged(segments, delta_problems(delta)), float(delta))


def deltas(segments: Sequence[Segment], epsilons: Sequence[float]) -> list[float]:
    """An upper bound on delta at each of `epsilons`, at most 1, by privacy loss distributions; with discrete noise by
    Rényi DP.

    No steps give 0. A step without noise, or losses too large for any grid, give 1.

    Raises:
        AccountingError: as in `spent`.
    """
    merged = _merged(segments, ())
    if not merged:
        return [0.0] * len(epsilons)
    if any(s.joint_noise_multiplier == 0 for s in merged):
        return [1.0] * len(epsilons)
    if _is_discrete(merged):
        return [_discrete_delta(merged, e) for e in epsilons]
    if all(s.sample_rate == 1 for s in merged):
        return [_gaussian_delta(_one_gaussian(merged), e) for e in epsilons]
    try:
        found = _composed(merged, grid(merged)).get_delta_for_epsilon(epsilons)
    except OverflowError:
        return [1.0] * len(epsilons)
    return [min(1.0, float(d) + _rounding(merged)) for d in found]


def divergences(segments: Sequence[Segment]) -> tuple[Floats, Floats]:
    """Rényi orders, and at each an upper bound on the divergence of all steps together; with discrete noise whole
    orders only.

    Raises:
        AccountingError: as in `spent`, or there are no steps, or one without noise, or one in which several records of
            a unit were drawn, of which no divergence is known here.
    """
    from dp_accounting import rdp

    merged = _merged(segments, ())
    if not merged or any(s.joint_noise_multiplier == 0 for s in merged):
        raise AccountingError(f"Divergences are of steps with noise (got {tuple(segments)!r}).")
    if _is_mixture(merged):
        raise AccountingError(
            "Rényi divergences are not known here of steps that draw several records of a unit: leave "
            "contribution_bound out, and draw the units"
        )
    if _is_discrete(merged):
        return _at_whole_orders(merged)
    orders = rdp.RdpAccountant().orders
    return orders, _summed_rdp(merged)


def _merged(segments: Sequence[Segment], problems: Iterable[str]) -> tuple[Segment, ...]:
    """`segments` with equal (q, sigma) merged, discrete noise kept apart, sorted; none without steps. Where q is 1, all
    G records of a unit are in each step, which is a Gaussian of sigma / G.

    Raises:
        AccountingError: one of `problems`, or an invalid segment.
    """
    wrong = [*problems, *(p for s in segments for p in segment_problems(s))]
    counts: Counter[tuple[float, float, str, int]] = Counter()
    if not wrong:
        for q, sigma, steps, noise, bound in segments:
            kind, of_one = DISCRETE if noise == DISCRETE else "gaussian", q == 1 or bound == 1
            counts[float(q), float(sigma / bound if of_one else sigma), kind, 1 if of_one else int(bound)] += int(steps)
        if counts.total() > MAX_STEPS:
            wrong.append(f"steps must be at most {MAX_STEPS:,} in all (got {counts.total():,})")
    if wrong:
        raise AccountingError("Cannot account for these steps: " + "; ".join(wrong) + ".")
    return tuple(Segment(q, sigma, t, noise, g) for (q, sigma, noise, g), t in sorted(counts.items()) if t)


@lru_cache(maxsize=4096)
def _spent(merged: tuple[Segment, ...], delta: float) -> Epsilon:
    """`spent` for segments that are valid, merged and sorted, none of them without steps."""
    if not merged:
        return Epsilon(0.0, 0.0, 0.0)
    if any(s.joint_noise_multiplier == 0 for s in merged):
        return Epsilon(math.inf, math.inf, math.inf)
    discrete = _is_discrete(merged)
    pld, rdp = math.inf if discrete else _pld_epsilon(merged, delta), _rdp_epsilon(merged, delta)
    floor = max(_single_step_epsilon(s, delta) for s in merged)
    for name, value in (("PLD", pld), ("RDP", rdp)):
        if not value >= floor * (1 - 1e-6) - 1e-9:  # written so that NaN fails too; the slack is the root finder's
            raise AccountingError(
                f"The {name} accountant answered epsilon = {value} for {merged} at delta = {delta}; a single one of "
                f"these steps already costs {floor:.6g}. Do not use this answer; change sigma, q or delta."
            )
    if discrete and rdp > DISCRETE_MOST:
        return Epsilon(math.inf, math.inf, math.inf)
    if math.isinf(min(pld, rdp)):
        raise AccountingError(f"No finite epsilon was found for {merged} at delta = {delta}. Use more noise.")
    return Epsilon(min(pld, rdp), pld, rdp)


def segment_problems(segment: Segment) -> Iterator[str]:
    """What is wrong with a segment: a clause for each field, with what is expected and what it is."""
    q, sigma, steps, noise, bound = segment
    if not (is_number(q) and 0 < q <= 1):
        yield f"sample_rate must be above 0 and at most 1 (got {q!r})"
    if not (is_number(sigma) and (sigma == 0 or MIN_SIGMA <= sigma <= MAX_SIGMA)):
        yield f"noise_multiplier must be 0 (no privacy) or from {MIN_SIGMA} to {MAX_SIGMA:,.0f} (got {sigma!r})"
    if not (is_whole(steps) and 0 <= steps <= MAX_STEPS):
        yield f"num_steps must be a whole number from 0 to {MAX_STEPS:,} (got {steps!r})"
    if not (is_whole(bound) and 1 <= bound <= MOST_CONTRIBUTED):
        yield f"contribution_bound must be a whole number from 1 to {MOST_CONTRIBUTED} (got {bound!r})"
    elif bound > 1 and noise == DISCRETE:
        yield f"contribution_bound must be 1 with discrete noise, of which no law is known here (got {bound})"


def delta_problems(delta: float) -> Iterator[str]:
    """What is wrong with a delta. Below MIN_DELTA the accountants' rounding errors are as large as delta."""
    if not (is_number(delta) and MIN_DELTA <= delta < 1):
        yield f"delta must be at least {MIN_DELTA} and below 1 (got {delta!r})"


def target_problems(target_epsilon: float) -> Iterator[str]:
    """What is wrong with a target epsilon."""
    if not (is_number(target_epsilon) and target_epsilon > 0):
        yield f"target_epsilon must be a finite number above 0 (got {target_epsilon!r})"


def is_whole(x: object) -> bool:
    """Whether `x` is a whole number, of Python or NumPy, and not a truth value."""
    return isinstance(x, Integral) and not isinstance(x, bool)


def _pld_epsilon(merged: tuple[Segment, ...], delta: float, coarser: float = 1.0) -> float:
    """By privacy loss distributions on one grid, or in closed form where q is 1 in every step. It may be infinite."""
    import dp_accounting as da

    if all(s.sample_rate == 1 for s in merged):  # full batches compose to one Gaussian of precision sum T / sigma²
        # 1e-9: the root finder's rounding
        return float(da.get_epsilon_gaussian(_one_gaussian(merged), delta, tol=1e-15)) * (1 + 1e-9)
    left = delta - _rounding(merged)
    if left <= 0:  # delta drowns in rounding, and the answer might be too small: leave it to RDP
        return math.inf
    try:
        return float(_composed(merged, coarser * grid(merged)).get_epsilon_for_delta(left))
    except OverflowError:  # grid cells so wide that exp(h) overflows: epsilon is above a billion
        return math.inf


def _one_gaussian(merged: tuple[Segment, ...]) -> float:
    """Sigma of the one Gaussian mechanism that steps with q = 1 compose to."""
    return float(sum(s.num_steps / s.joint_noise_multiplier**2 for s in merged) ** -0.5)


def _gaussian_delta(sigma: float, epsilon: float) -> float:
    """Delta of one Gaussian mechanism (Balle and Wang 2018, theorem 8), rounded up."""
    from scipy.special import log_ndtr

    present = math.exp(log_ndtr(0.5 / sigma - epsilon * sigma))
    return min(1.0, present - math.exp(epsilon + log_ndtr(-0.5 / sigma - epsilon * sigma)) + 1e-14)


def _rounding(merged: tuple[Segment, ...]) -> float:
    """The most that rounding errors in the composition may take from delta."""
    return PLD_ROUNDING * (sum(s.num_steps for s in merged) + 64 * len(merged))


@lru_cache(maxsize=2)
def _composed(merged: tuple[Segment, ...], h: float) -> "_PrivacyLoss":
    """The privacy loss distribution of all steps. The latest two are cached: a card asks for several deltas."""
    first, *others = (_part(s, h) for s in merged)
    for part in others:
        first = first.compose(part)
    return first


@lru_cache(maxsize=16)
def _part(s: Segment, h: float) -> "_PrivacyLoss":
    """The privacy loss distribution of one segment. Cached, since of a schedule only the current level grows."""
    if s.contribution_bound == 1:
        return _step_loss(s.sample_rate, s.joint_noise_multiplier, h).self_compose(s.num_steps)
    return _mixture_loss(s.sample_rate, s.joint_noise_multiplier, s.contribution_bound, h).self_compose(s.num_steps)


def quick_epsilon(segments: Sequence[Segment], delta: float, coarser: float = 1.0) -> float:
    """An upper bound on what `spent` finds, for searches: by privacy loss distributions alone, which are the tighter of
    the two almost always, and by Rényi DP where they give no answer.

    Args:
        segments: the steps, each with noise.
        delta: of (epsilon, delta).
        coarser: how many times as wide as usual the grid is: quicker, and only good enough to find a start.
    """
    merged = _merged(segments, delta_problems(delta))
    pld = math.inf if _is_discrete(merged) else _pld_epsilon(merged, delta, coarser)
    return pld if math.isfinite(pld) else _rdp_epsilon(merged, delta)


@lru_cache(maxsize=16)
def _mixture_loss(q: float, sigma: float, bound: int, h: float) -> "_PrivacyLoss":
    """The same where several records of a unit may be in a step."""
    return mixtures.step_loss(q, sigma, bound, h)


@lru_cache(maxsize=16)
def _step_loss(q: float, sigma: float, h: float) -> "_PrivacyLoss":
    """The privacy loss distribution of one step, in both directions of the neighbouring relation."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma,
        sampling_prob=q,
        value_discretization_interval=h,
        neighboring_relation=NeighboringRelation.REPLACE_SPECIAL,
    )


def _rdp_epsilon(merged: tuple[Segment, ...], delta: float) -> float:
    """By Rényi DP at dp-accounting's default orders, rounding charged to every step; with discrete noise at whole
    orders. Infinite where several records of a unit are drawn, of which no divergence is known here.
    """
    from dp_accounting import rdp

    if _is_mixture(merged):
        return math.inf
    if _is_discrete(merged):
        return float(rdp.compute_epsilon(*_at_whole_orders(merged), math.nextafter(delta, 0))[0])
    orders = rdp.RdpAccountant().orders
    total = _summed_rdp(merged)
    return float(rdp.compute_epsilon(orders, total, delta)[0])


@lru_cache(maxsize=8192)
def _discrete_delta(merged: tuple[Segment, ...], epsilon: float) -> float:
    """Delta at an epsilon by Rényi DP at whole orders; its last bit accounts for the sampler's distance from the exact
    law.
    """
    from dp_accounting.rdp.rdp_privacy_accountant import compute_delta

    delta = compute_delta(*_at_whole_orders(merged), min(epsilon, DISCRETE_MOST))[0]
    return min(1.0, math.nextafter(max(float(delta), 2.0**-100), 1))


def _is_discrete(merged: tuple[Segment, ...]) -> bool:
    return any(s.noise == DISCRETE for s in merged)


def _is_mixture(merged: tuple[Segment, ...]) -> bool:
    return any(s.contribution_bound > 1 for s in merged)


@lru_cache(maxsize=8)
def _at_whole_orders(merged: tuple[Segment, ...]) -> tuple[Floats, Floats]:
    """dp-accounting's orders that are whole, all at least 2, and the divergence of all steps at each."""
    from dp_accounting import rdp

    orders = rdp.RdpAccountant().orders
    whole = orders == orders.round()
    total = _summed_rdp(merged)
    return orders[whole], total[whole]


def _summed_rdp(merged: tuple[Segment, ...]) -> Floats:
    """The divergence of all steps at each default order."""
    parts = [s.num_steps * _step_rdp(s.sample_rate, s.joint_noise_multiplier) for s in merged]
    return np.asarray(sum(parts))


@lru_cache(maxsize=512)
def _step_rdp(q: float, sigma: float) -> Floats:
    """Rényi divergence of one step at each default order, rounded up; infinite where the series did not converge."""
    import dp_accounting as da

    accountant = da.rdp.RdpAccountant(neighboring_relation=da.NeighboringRelation.REPLACE_SPECIAL)
    with _without_convergence_warnings():
        accountant.compose(da.PoissonSampledDpEvent(q, da.GaussianDpEvent(sigma)))
    if not (accountant.rdp >= -RDP_ROUNDING).all():  # NaN fails too
        raise AccountingError(f"RDP gave no valid divergence for q = {q}, sigma = {sigma}: {accountant.rdp}.")
    return accountant.rdp.clip(min=0) * (1 + RDP_ROUNDING) + RDP_ROUNDING


@contextmanager
def _without_convergence_warnings() -> Iterator[None]:
    """Silences dp-accounting, which prints a line for each order whose series does not converge. Such orders are left
    out, which is safe.
    """
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _single_step_epsilon(s: Segment, delta: float) -> float:
    """Exact epsilon of one step, in one direction: a lower bound for any number of steps.

    The hockey-stick divergence of (1-q) N(0) + q N(1) from N(0) at e^eps is q times the Gaussian's at e^eps', where
    e^eps' = 1 + (e^eps - 1) / q (Balle et al. 2018, theorem 2).
    """
    import dp_accounting as da

    q = s.sample_rate
    if delta >= q:
        return 0.0
    gaussian = float(da.get_epsilon_gaussian(s.joint_noise_multiplier, delta / q))
    return math.log1p(q * math.expm1(gaussian)) if gaussian < 700 else gaussian + math.log(q)
