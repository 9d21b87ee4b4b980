"""`PrivacyConfig` and N go in, the calibrated `Mechanism` comes out; segments of steps go in, epsilon(delta) comes out.

Every number is dp-accounting's: privacy loss distributions (PLD, Koskela et al. 2020; connect-the-dots discretisation,
Doroshenko et al. 2022) and Rényi DP (Mironov et al. 2019), each an upper bound, of which the smaller is reported.
Accountants fail open (a NaN gives epsilon 0), so inputs are checked before and answers after.

Symbols: q sample rate, T number of steps, sigma noise multiplier, h width of the PLD grid,
mu = q sqrt(exp(1/sigma²) - 1), the standard deviation of one step's likelihood ratio.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from numbers import Integral
from typing import Any, NamedTuple

from hf_dp.config import MIN_DELTA, PrivacyConfig, is_number
from hf_dp.errors import AccountingError, ConfigError
from hf_dp.mechanism import Mechanism, Segment, default_delta, steps_per_epoch

MIN_SIGMA, MAX_SIGMA = 0.01, 1e6  # under the first one step costs epsilon 5,000; over the second no grid resolves mu
MAX_STEPS = 1_000_000  # dp-accounting computes size**T as an integer: seconds at a million, minutes beyond
GRID_FINEST, GRID_COARSEST = 1e-7, 1e-3
PLD_ROUNDING = 2.0**-51  # a step: the FFT's T-th power moves the tail's mass by up to T x 2**-53 (measured; x 4 here)
RDP_ROUNDING = (
    1e-13  # a step: log A sums up to 1,024 rounded terms; without it a lost divergence passes for none at all
)
UNUSED = 1e-3  # calibration may leave this part of the target unused


class Epsilon(NamedTuple):
    """Upper bounds on epsilon for one delta. `epsilon` is the smaller of the two and is what is claimed."""

    epsilon: float
    pld: float
    rdp: float


class Derived(NamedTuple):
    """One number of the plan, as text, and the rule that it came from."""

    name: str
    value: str
    rule: str


# --- epsilon spent --------------------------------------------------------------------------------------------------


def spent(segments: Sequence[Segment], delta: float) -> Epsilon:
    """Epsilon of all steps of `segments` together, under the zero-out relation (REPLACE_SPECIAL, N public).

    Order does not matter and equal segments may come in pieces: they are merged by (q, sigma) first. No steps cost 0,
    and a step without noise costs infinity. What is costly about a (q, sigma) is remembered, so a further call with
    another number of steps takes a few hundredths of a second: cheap enough for every logging step.

    Raises:
        AccountingError: q outside (0, 1], sigma neither 0 nor within [MIN_SIGMA, MAX_SIGMA], a number of steps that is
            not whole, negative or above MAX_STEPS, delta outside [MIN_DELTA, 1), or an answer that cannot be true.
    """
    wrong = [*_delta_problems(delta), *(p for s in segments for p in _segment_problems(s))]
    counts: Counter[tuple[float, float]] = Counter()
    if not wrong:
        for q, sigma, steps in segments:
            counts[float(q), float(sigma)] += int(steps)
        if counts.total() > MAX_STEPS:
            wrong.append(f"steps must be at most {MAX_STEPS:,} in all (got {counts.total():,})")
    if wrong:
        raise AccountingError("Cannot account for these steps: " + "; ".join(wrong) + ".")
    return _spent(tuple(Segment(q, sigma, t) for (q, sigma), t in sorted(counts.items()) if t), float(delta))


@lru_cache(maxsize=4096)
def _spent(merged: tuple[Segment, ...], delta: float) -> Epsilon:
    """The same for segments that are valid, merged, sorted and none of them without steps."""
    if not merged:
        return Epsilon(0.0, 0.0, 0.0)
    if any(s.noise_multiplier == 0 for s in merged):
        return Epsilon(math.inf, math.inf, math.inf)
    pld, rdp = _pld_epsilon(merged, delta), _rdp_epsilon(merged, delta)
    floor = max(_single_step_epsilon(s, delta) for s in merged)
    for name, value in (("PLD", pld), ("RDP", rdp)):
        if not value >= floor * (1 - 1e-6) - 1e-9:  # written so that NaN fails too; the slack is the root finder's
            raise AccountingError(
                f"The {name} accountant answered epsilon = {value} for {merged} at delta = {delta}; a single one of "
                f"these steps already costs {floor:.6g}. Do not use this answer; change sigma, q or delta."
            )
    if math.isinf(min(pld, rdp)):
        raise AccountingError(f"No finite epsilon was found for {merged} at delta = {delta}. Use more noise.")
    return Epsilon(min(pld, rdp), pld, rdp)


def _segment_problems(segment: Segment) -> Iterator[str]:
    q, sigma, steps = segment
    if not (is_number(q) and 0 < q <= 1):
        yield f"sample_rate must be above 0 and at most 1 (got {q!r})"
    if not (is_number(sigma) and (sigma == 0 or MIN_SIGMA <= sigma <= MAX_SIGMA)):
        yield f"noise_multiplier must be 0 (no privacy) or from {MIN_SIGMA} to {MAX_SIGMA:,.0f} (got {sigma!r})"
    if not (_is_whole(steps) and 0 <= steps <= MAX_STEPS):
        yield f"num_steps must be a whole number from 0 to {MAX_STEPS:,} (got {steps!r})"


def _delta_problems(delta: float) -> Iterator[str]:
    if not (is_number(delta) and MIN_DELTA <= delta < 1):
        yield f"delta must be at least {MIN_DELTA} and below 1 (got {delta!r})"


def _is_whole(x: object) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


# --- the two accountants --------------------------------------------------------------------------------------------


def _pld_epsilon(merged: tuple[Segment, ...], delta: float, coarser: float = 1.0) -> float:
    """By privacy loss distributions on one grid, or in closed form where no step subsamples. May be infinite."""
    import dp_accounting as da

    if all(s.sample_rate == 1 for s in merged):  # full batches compose to one Gaussian of precision sum T / sigma²
        sigma = sum(s.num_steps / s.noise_multiplier**2 for s in merged) ** -0.5
        return float(da.get_epsilon_gaussian(sigma, delta, tol=1e-15)) * (1 + 1e-9)  # 1e-9: the root finder's rounding
    left = delta - PLD_ROUNDING * (sum(s.num_steps for s in merged) + 64 * len(merged))
    if left <= 0:  # delta drowns in rounding, and the answer might be too small: leave it to RDP
        return math.inf
    h = coarser * grid(merged)
    try:
        parts = [_step_loss(s.sample_rate, s.noise_multiplier, h).self_compose(s.num_steps) for s in merged]
        total = parts[0]
        for part in parts[1:]:
            total = total.compose(part)
        return float(total.get_epsilon_for_delta(left))
    except OverflowError:  # grid cells so wide that exp(h) overflows: epsilon is above a billion
        return math.inf


@lru_cache(maxsize=16)
def _step_loss(q: float, sigma: float, h: float) -> Any:
    """Privacy loss distribution of one step, both directions of the neighbouring relation."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma,
        sampling_prob=q,
        value_discretization_interval=h,
        neighboring_relation=NeighboringRelation.REPLACE_SPECIAL,
    )


def grid(segments: Sequence[Segment]) -> float:
    """Width h of the PLD grid: clip(mu / 10, 1e-7, 1e-3), the finest that any segment needs.

    A step's loss must spread over several cells, or rounding it up inflates epsilon: a fixed 1e-3 is 15 % loose at
    small q. Where losses reach so far that the arrays would pass some millions of cells (weak noise over many steps),
    h grows with them. Any h gives an upper bound.
    """
    finest = min(min(max(_mu(s) / 10, GRID_FINEST), GRID_COARSEST) for s in segments)
    step_reach = max(_step_reach(s) for s in segments)
    total_reach = sum(_total_reach(s) for s in segments)
    return max(finest, step_reach / 400_000, total_reach / 2**20)


def _mu(s: Segment) -> float:
    return s.sample_rate * math.sqrt(math.expm1(min(s.noise_multiplier**-2, 700.0)))  # exp(710) overflows


def _step_reach(s: Segment) -> float:
    """About the range of one step's loss, log(1 - q + q e^x), over ten standard deviations of x. Sizes arrays only."""
    x = 0.5 * s.noise_multiplier**-2 + 10 / s.noise_multiplier
    up = math.log1p(s.sample_rate * math.expm1(x)) if x < 700 else x
    return up - math.log1p(s.sample_rate * math.expm1(-min(x, 30.0)))


def _total_reach(s: Segment) -> float:
    """About the range of T steps' loss: the normal limit, or a participation count's tail. Sizes arrays only."""
    q, sigma, steps = s
    taken = min(steps, q * steps + 8 * math.sqrt(q * steps) + 12)
    by_count = 0.5 * taken / sigma**2 + 8 * math.sqrt(taken) / sigma
    by_normal = 0.5 * steps * _mu(s) ** 2 + 10 * _mu(s) * math.sqrt(steps) + 2 * _step_reach(s)
    return min(by_count, by_normal)


def _rdp_epsilon(merged: tuple[Segment, ...], delta: float) -> float:
    """By Rényi DP at dp-accounting's default orders, rounding charged to every step."""
    from dp_accounting import rdp

    orders = rdp.RdpAccountant().orders
    total = sum(s.num_steps * _step_rdp(s.sample_rate, s.noise_multiplier) for s in merged)
    return float(rdp.compute_epsilon(orders, total, delta)[0])


@lru_cache(maxsize=512)
def _step_rdp(q: float, sigma: float) -> Any:
    """Rényi divergence of one step at each default order, rounded up. Infinite where the series did not converge."""
    import dp_accounting as da

    accountant = da.rdp.RdpAccountant(neighboring_relation=da.NeighboringRelation.REPLACE_SPECIAL)
    with _without_convergence_warnings():
        accountant.compose(da.PoissonSampledDpEvent(q, da.GaussianDpEvent(sigma)))
    if not (accountant.rdp >= -RDP_ROUNDING).all():  # NaN fails too
        raise AccountingError(f"RDP gave no valid divergence for q = {q}, sigma = {sigma}: {accountant.rdp}.")
    return accountant.rdp.clip(min=0) + RDP_ROUNDING


@contextmanager
def _without_convergence_warnings() -> Iterator[None]:
    """An order whose series does not converge is left out, which is safe; dp-accounting prints a line for each."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _single_step_epsilon(s: Segment, delta: float) -> float:
    """Exact epsilon of one step, in one direction: a lower bound for any number of them.

    The hockey-stick divergence of (1-q) N(0) + q N(1) from N(0) at e^eps is q times the Gaussian's at e^eps', where
    e^eps' = 1 + (e^eps - 1) / q (Balle et al. 2018, theorem 2).
    """
    import dp_accounting as da

    q = s.sample_rate
    if delta >= q:
        return 0.0
    gaussian = float(da.get_epsilon_gaussian(s.noise_multiplier, delta / q))
    return math.log1p(q * math.expm1(gaussian)) if gaussian < 700 else gaussian + math.log(q)


# --- calibration ----------------------------------------------------------------------------------------------------


def calibrate(target_epsilon: float, *, sample_rate: float, num_steps: int, delta: float) -> float:
    """The smallest sigma, to 0.1 % of epsilon and five digits, whose epsilon is within the target.

    Brackets and bisects on log sigma, and returns only a sigma that was itself evaluated, as the float it is, and found
    within the target: it never overshoots.

    Raises:
        AccountingError: an invalid argument, or a target that no sigma in [MIN_SIGMA, MAX_SIGMA] meets.
    """
    asked = Segment(sample_rate, 1.0, num_steps)
    wrong = [*_delta_problems(delta), *_segment_problems(asked), *_target_problems(target_epsilon)]
    if not wrong and num_steps == 0:
        wrong.append("num_steps must be at least 1: without a step there is nothing to calibrate (got 0)")
    if wrong:
        raise AccountingError("Cannot calibrate the noise: " + "; ".join(wrong) + ".")

    def epsilon_of(sigma: float) -> float:
        return spent([asked._replace(noise_multiplier=sigma)], delta).epsilon

    guess = _first_guess(float(target_epsilon), asked._replace(sample_rate=float(sample_rate)), float(delta))
    return _smallest_within(float(target_epsilon), epsilon_of, guess)


def _smallest_within(
    target: float, epsilon_of: Callable[[float], float], guess: float, unused: float = UNUSED
) -> float:
    """The search behind `calibrate`; `epsilon_of` falls as sigma rises."""
    points: list[_Point] = []
    best, x = math.nan, math.log(guess)
    for turn in range(200):
        sigma = _round_up(min(max(math.exp(x), MIN_SIGMA), MAX_SIGMA))
        epsilon = epsilon_of(sigma)
        points.append(_Point(math.log(sigma), math.log(max(epsilon, 1e-300) / target)))
        if epsilon <= target and not sigma >= best:
            best = sigma
        if target * (1 - unused) <= epsilon <= target:
            return sigma
        if epsilon > target and sigma >= MAX_SIGMA:
            raise _out_of_reach(target, f"at least {epsilon:.3g}, which sigma = {sigma:,.0f} gives", "raise it")
        if epsilon <= target and sigma <= MIN_SIGMA:
            raise _out_of_reach(target, f"at most {epsilon:.3g}, which sigma = {sigma} gives", "lower it")
        low, high = _bracket(points)
        if high - low < 5e-4:  # rounding may keep epsilon from falling evenly: 0.2 % of it is near enough
            return best
        x = _next_guess(points, -unused / 2, low, high, bisect=turn % 8 == 7)
    raise AssertionError(f"no convergence towards {target}: {points}")


class _Point(NamedTuple):
    log_sigma: float
    log_ratio: float  # of epsilon to the target: above 0 is too much


def _bracket(points: list[_Point]) -> tuple[float, float]:
    """The nearest log sigma above the target and within it, infinite where there is none."""
    low = max((p.log_sigma for p in points if p.log_ratio > 0), default=-math.inf)
    return low, min((p.log_sigma for p in points if p.log_ratio <= 0), default=math.inf)


def _next_guess(points: list[_Point], aim: float, low: float, high: float, *, bisect: bool) -> float:
    """Secant through the two points nearest to the target, inside the bracket; else bisection, or a step outwards."""
    one, two = sorted(points, key=lambda p: abs(p.log_ratio - aim))[:2] if len(points) > 1 else (points[0], None)
    slope = -2.0  # epsilon falls about as sigma**-2
    if two is not None and one.log_ratio != two.log_ratio:
        slope = min((one.log_ratio - two.log_ratio) / (one.log_sigma - two.log_sigma), -0.5)
    step = (aim - one.log_ratio) / slope
    x = one.log_sigma + min(max(step, -math.log(4)), math.log(4))
    if math.isinf(high - low):
        return x
    return (low + high) / 2 if bisect or not low < x < high else x


def _first_guess(target_epsilon: float, s: Segment, delta: float) -> float:
    """A place to start, on either side: sigma in the normal limit (mu sqrt(T) is one Gaussian's mu).

    Where a step's loss fills many grid cells the limit is far off and evaluations are slow (seconds), so the guess is
    bettered on a coarse grid first.
    """
    import dp_accounting as da

    total_mu = 1 / da.get_sigma_gaussian(min(max(target_epsilon, 1e-9), 1e4), delta)
    guess = math.log1p((total_mu / s.sample_rate) ** 2 / s.num_steps) ** -0.5
    guess = float(min(max(guess, MIN_SIGMA), MAX_SIGMA))
    likely = s._replace(noise_multiplier=guess)
    if _step_reach(likely) / grid([likely]) < 20_000:
        return guess

    def roughly(sigma: float) -> float:
        trial = (s._replace(noise_multiplier=sigma),)
        pld = _pld_epsilon(trial, delta, coarser=16)
        return pld if math.isfinite(pld) else _rdp_epsilon(trial, delta)

    return _smallest_within(target_epsilon, roughly, guess, unused=0.02)


def _round_up(x: float, digits: int = 5) -> float:
    """Up to so many significant digits, so that the number that is printed is the number that is used."""
    if x == 0 or not math.isfinite(x):
        return x
    unit = 10.0 ** (math.floor(math.log10(x)) - digits + 1)
    rounded = float(f"{x:.{digits - 1}e}")
    return rounded if rounded >= x else float(f"{x + unit / 2:.{digits - 1}e}")


def _target_problems(target_epsilon: float) -> Iterator[str]:
    if not (is_number(target_epsilon) and target_epsilon > 0):
        yield f"target_epsilon must be a finite number above 0 (got {target_epsilon!r})"


def _out_of_reach(target: float, expected: str, remedy: str) -> AccountingError:
    return AccountingError(
        f"target_epsilon is out of reach: expected {expected} (got {target:g}). What to do: {remedy}, or change "
        "expected_batch_size, the number of steps or target_delta."
    )


# --- the plan -------------------------------------------------------------------------------------------------------


def plan(privacy: PrivacyConfig, num_examples: int, *, num_train_epochs: float, max_steps: int = -1) -> Mechanism:
    """The mechanism that gives `privacy` on `num_examples` records, its noise calibrated where a target is given.

    Counts steps as `Trainer` does: `max_steps` wins where it is positive, else T = ceil(epochs x round(N / B)).

    Raises:
        ConfigError: N, epochs or steps that are no such numbers, B > N, or delta >= 1 / N. Names all of them.
        AccountingError: the target epsilon is out of reach.
    """
    wrong = list(_plan_problems(privacy, num_examples, num_train_epochs, max_steps))
    if wrong:
        raise ConfigError("Cannot plan this run: " + "; ".join(wrong) + ".")
    batch = int(privacy.expected_batch_size)
    steps = max_steps if max_steps > 0 else math.ceil(num_train_epochs * steps_per_epoch(num_examples, batch))
    delta = default_delta(num_examples) if privacy.target_delta is None else float(privacy.target_delta)
    sigma = privacy.noise_multiplier
    if privacy.target_epsilon is not None:
        sigma = calibrate(privacy.target_epsilon, sample_rate=batch / num_examples, num_steps=steps, delta=delta)
    assert sigma is not None  # PrivacyConfig holds exactly one of the two
    return Mechanism(
        num_examples=int(num_examples),
        expected_batch_size=batch,
        num_steps=int(steps),
        noise_multiplier=float(sigma),
        clip_norm=float(privacy.clip_norm),
        delta=delta,
        target_epsilon=None if privacy.target_epsilon is None else float(privacy.target_epsilon),
        debug=privacy.debug_seed is not None,
    )


def _plan_problems(privacy: PrivacyConfig, n: int, epochs: float, max_steps: int) -> Iterator[str]:
    if not (_is_whole(n) and n >= 1):
        yield f"the number of examples must be a whole number, 1 or more (got {n!r})"
        return
    if not (_is_whole(max_steps) and max_steps <= MAX_STEPS):
        yield f"max_steps must be a whole number up to {MAX_STEPS:,}, or -1 to go by epochs (got {max_steps!r})"
    elif max_steps <= 0 and not (is_number(epochs) and 0 < epochs * n <= MAX_STEPS * privacy.expected_batch_size / 2):
        yield f"num_train_epochs must be above 0 and give at most {MAX_STEPS // 2:,} steps (got {epochs!r})"
    if privacy.expected_batch_size > n:
        yield (
            f"expected_batch_size must be at most the number of examples, {n:,}, because a record joins a step with "
            f"probability q = B / N <= 1 (got {privacy.expected_batch_size:,})"
        )
    if privacy.target_delta is not None and privacy.target_delta >= 1 / n:
        yield (
            f"target_delta must be below 1 / N = {1 / n:.3g}, or publishing one record outright would satisfy it "
            f"(got {privacy.target_delta:g}); leave it out for {default_delta(n):g}"
        )
    sigma = privacy.noise_multiplier
    if sigma and not MIN_SIGMA <= sigma <= MAX_SIGMA:
        yield f"noise_multiplier must be 0 (no privacy) or from {MIN_SIGMA} to {MAX_SIGMA:,.0f} (got {sigma:g})"


def affordable_steps(
    spent_so_far: Sequence[Segment], step: Segment, *, target_epsilon: float, delta: float, at_most: int
) -> int:
    """How many more steps like `step` keep epsilon within the target: the largest such number up to `at_most`.

    `step.num_steps` is not read. 0 where the target is already passed, or where the step has no noise.

    Raises:
        AccountingError: an invalid argument, as in `spent`.
    """
    wrong = list(_target_problems(target_epsilon))
    if not (_is_whole(at_most) and at_most >= 0):
        wrong.append(f"at_most must be a whole number, 0 or more (got {at_most!r})")
    if wrong:
        raise AccountingError("Cannot tell how many steps are affordable: " + "; ".join(wrong) + ".")

    def is_within(more: int) -> bool:
        return spent([*spent_so_far, step._replace(num_steps=more)], delta).epsilon <= target_epsilon

    if is_within(at_most):
        return int(at_most)
    low, high = 0, int(at_most)  # high is too many; low is within the target, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_within(middle) else (low, middle)
    return low


def derivation(
    privacy: PrivacyConfig, mechanism: Mechanism, *, num_train_epochs: float, max_steps: int = -1
) -> list[Derived]:
    """Every number of the plan with the rule that it came from, in the order in which they follow from one another.

    Epsilon is rounded up to five digits. Costs one evaluation of each accountant.
    """
    m = mechanism
    per_epoch = steps_per_epoch(m.num_examples, m.expected_batch_size)
    by_epochs = f"ceil({num_train_epochs:g} x {per_epoch}): {num_train_epochs:g} epochs of round(N / B) steps"
    of_sigma = "given" if m.target_epsilon is None else f"least that keeps epsilon within {m.target_epsilon:g}"
    epsilon = spent([m.planned], m.delta)
    e, pld, rdp = (f"{_round_up(x):g}" if math.isinf(x) else f"{_round_up(x):.5g}" for x in epsilon)
    rows = [
        ("examples N", f"{m.num_examples:,}", f"given; public; unit: one {m.unit}; neighbours: {m.relation}"),
        ("expected batch B", f"{m.expected_batch_size:,}", "given; mean logical batch, over all processes"),
        ("sample rate q", f"{m.sample_rate:.6g}", "B / N; every record joins a step with probability q"),
        ("steps T", f"{m.num_steps:,}", "given" if max_steps > 0 else by_epochs),
        ("delta", f"{m.delta:g}", "1 / N**1.1, rounded down" if privacy.target_delta is None else "given"),
        ("clip norm C", f"{m.clip_norm:g}", "given; no record moves the sum by more"),
        ("noise multiplier sigma", f"{m.noise_multiplier:.10g}", of_sigma),
        ("noise on the sum", f"{m.noise_std:.5g}", "sigma x C, standard deviation of each coordinate"),
        ("noise on the mean", f"{m.noise_std / m.expected_batch_size:.5g}", "sigma x C / B"),
        ("epsilon by PLD", pld, "privacy loss distributions, dp-accounting"),
        ("epsilon by RDP", rdp, "Rényi DP, dp-accounting; a looser cross-check"),
        ("epsilon", e, f"the smaller of the two, after all {m.num_steps:,} steps, at delta"),
    ]
    return [Derived(*row) for row in rows]
