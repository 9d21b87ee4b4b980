"""A target epsilon and the steps planned go in, the smallest noise multiplier within the target comes out."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from hf_dp.accounting.cells import step_cells
from hf_dp.accounting.epsilon import (
    MAX_SIGMA,
    MIN_SIGMA,
    delta_problems,
    quick_epsilon,
    segment_problems,
    spent,
    target_problems,
)
from hf_dp.errors import AccountingError
from hf_dp.mechanism import Segment

UNUSED = 1e-3  # the part of the target epsilon that may stay unused


def calibrate(
    target_epsilon: float,
    *,
    sample_rate: float,
    num_steps: int,
    delta: float,
    sensitivity: float = 1.0,
    noise: str = "gaussian",
) -> float:
    """The smallest sigma, to 0.1 % of epsilon and five digits, whose epsilon is within the target.

    The search runs on log sigma inside a bracket. It returns only a sigma that was evaluated itself and found within
    the target, so it never overshoots.

    Args:
        target_epsilon: above 0.
        sample_rate: q.
        num_steps: T, at least 1.
        delta: of (epsilon, delta).
        sensitivity: sensitivity of what a step releases, in units of C; above 1 where a step releases more than the
            gradient. Epsilon is then that of sigma / sensitivity.
        noise: kind of noise.

    Raises:
        AccountingError: an invalid argument, or a target that no sigma in [MIN_SIGMA, MAX_SIGMA] meets.
    """
    asked = Segment(sample_rate, 1.0, num_steps, noise)
    wrong = [*delta_problems(delta), *segment_problems(asked), *target_problems(target_epsilon)]
    if not wrong and num_steps == 0:
        wrong.append("num_steps must be at least 1: without a step there is nothing to calibrate (got 0)")
    if wrong:
        raise AccountingError("Cannot calibrate the noise: " + "; ".join(wrong) + ".")

    def steps(sigma: float) -> list[Segment]:
        return [asked._replace(joint_noise_multiplier=sigma / sensitivity)]

    guess = _first_guess(float(target_epsilon), asked._replace(sample_rate=float(sample_rate)), float(delta))
    guess *= sensitivity
    return _smallest_spent(float(target_epsilon), steps, delta, guess)


def calibrate_course(
    target_epsilon: float, course: Callable[[float], Sequence[Segment]], delta: float, *, roughly: bool = False
) -> float:
    """The smallest first sigma with which a schedule stays within the target; see `calibrate`.

    Args:
        target_epsilon: above 0.
        course: first sigma -> the segments of all steps. Every sigma in them is proportional to the first.
        delta: of (epsilon, delta).
        roughly: to 2 % of epsilon, from below, by privacy loss distributions alone: for comparisons.

    Raises:
        AccountingError: an invalid argument, or a target that no sigma in [MIN_SIGMA, MAX_SIGMA] meets.
    """
    wrong = [*delta_problems(delta), *target_problems(target_epsilon)]
    if wrong:
        raise AccountingError("Cannot calibrate the noise: " + "; ".join(wrong) + ".")
    unit, steps = course(1.0), sum(s.num_steps for s in course(1.0))
    # a constant course that costs as much in the normal limit: the mean of q²/sigma² is the same, of G records G² times
    q = math.sqrt(sum(s.num_steps * s.sample_rate**2 for s in unit) / steps)
    scale = math.sqrt(sum(s.num_steps * (_mean_of(s) / s.joint_noise_multiplier) ** 2 for s in unit) / steps) / q
    guess = _first_guess(float(target_epsilon), Segment(q, 1.0, steps), float(delta)) * scale
    with suppress(AccountingError):  # quickly, on a coarse grid; one that only the fine grid may reach: as it stands
        guess = _smallest_within(target_epsilon, lambda sigma: quick_epsilon(course(sigma), delta, 16), guess, 0.02)
    if roughly:
        return _smallest_within(target_epsilon, lambda sigma: quick_epsilon(course(sigma), delta), guess, 0.02)
    return _smallest_spent(float(target_epsilon), course, delta, guess)


def _mean_of(s: Segment) -> float:
    """How many records of a unit are in a step on average, at most."""
    return s.sample_rate * s.contribution_bound


def _smallest_spent(target: float, course: Callable[[float], Sequence[Segment]], delta: float, guess: float) -> float:
    """The search of `calibrate`, by the quick bound. `spent` has the last word on what it finds, and searches itself
    where that is not the smallest.
    """
    with suppress(AccountingError):  # what only Rényi DP reaches
        guess = _smallest_within(target, lambda sigma: quick_epsilon(course(sigma), delta), guess)
        if target * (1 - UNUSED) <= spent(course(guess), delta).epsilon <= target:
            return guess
    return _smallest_within(target, lambda sigma: spent(course(sigma), delta).epsilon, guess)


def _smallest_within(
    target: float, epsilon_of: Callable[[float], float], guess: float, unused: float = UNUSED
) -> float:
    """The search of `calibrate`. `epsilon_of` falls as sigma rises; at most the part `unused` of the target stays
    unused.
    """
    points: list[_Point] = []
    best, x = math.inf, math.log(guess)
    for turn in range(200):
        sigma = round_up(min(max(math.exp(x), MIN_SIGMA), MAX_SIGMA))
        epsilon = min(epsilon_of(sigma), 1e300)
        points.append(_Point(math.log(sigma), math.log(max(epsilon, 1e-300) / target)))
        if epsilon <= target:
            best = min(best, sigma)
        if target * (1 - unused) <= epsilon <= target:
            return sigma
        if epsilon > target and sigma >= MAX_SIGMA:
            raise _out_of_reach(target, f"at least {epsilon:.3g}, which sigma = {sigma:,.0f} gives", "raise the target")
        if epsilon <= target and sigma <= MIN_SIGMA:
            raise _out_of_reach(target, f"at most {epsilon:.3g}, which sigma = {sigma} gives", "lower the target")
        low, high = _bracket(points)
        if high - low < 5e-4:  # rounding may keep epsilon from falling evenly: 0.2 % of it is near enough
            return best
        x = _next_guess(points, -unused / 2, low, high, bisect=turn % 8 == 7)
    raise AssertionError(f"no convergence towards {target}: {points}")


class _Point(NamedTuple):
    log_sigma: float
    log_ratio: float  # of epsilon to the target: above 0 is too much


def _bracket(points: list[_Point]) -> tuple[float, float]:
    """The nearest log sigma that exceeds the target and the nearest within it; infinite where there is none."""
    low = max((p.log_sigma for p in points if p.log_ratio > 0), default=-math.inf)
    return low, min((p.log_sigma for p in points if p.log_ratio <= 0), default=math.inf)


def _next_guess(points: list[_Point], aim: float, low: float, high: float, *, bisect: bool) -> float:
    """The secant through the two points nearest to the target, if it lies in the bracket; else bisection, or a step
    outwards.
    """
    one, two = sorted(points, key=lambda p: abs(p.log_ratio - aim))[:2] if len(points) > 1 else (points[0], None)
    slope = -2.0  # epsilon falls about as sigma**-2
    if two is not None and one.log_ratio != two.log_ratio:
        slope = min((one.log_ratio - two.log_ratio) / (one.log_sigma - two.log_sigma), -0.5)
    step = min(max((aim - one.log_ratio) / slope, -math.log(4)), math.log(4))
    if math.isinf(high - low):  # outwards from the outermost point; on a plateau, where no slope is to be seen, far
        step = math.copysign(math.log(4), step) if two is not None and two.log_ratio == one.log_ratio else step
        return step + (low if math.isinf(high) else high)
    x = one.log_sigma + step
    return (low + high) / 2 if bisect or not low < x < high else x


def _first_guess(target_epsilon: float, s: Segment, delta: float) -> float:
    """A sigma to start from; it may be too large or too small.

    It is sigma in the normal limit, where T steps with one step's mu are one Gaussian of mu sqrt(T). Where a step's
    loss fills many grid cells, that limit is far off and an evaluation takes seconds, so the guess is first improved on
    a coarse grid.
    """
    import dp_accounting as da

    total_mu = 1 / da.get_sigma_gaussian(min(max(target_epsilon, 1e-9), 1e4), delta)
    guess = math.log1p((total_mu / s.sample_rate) ** 2 / s.num_steps) ** -0.5
    guess = float(min(max(guess, MIN_SIGMA), MAX_SIGMA))
    if step_cells(s._replace(joint_noise_multiplier=guess)) < 20_000:
        return guess
    with suppress(AccountingError):  # a target that only the fine grid may reach: start from the limit after all
        return _smallest_within(
            target_epsilon,
            lambda sigma: quick_epsilon([s._replace(joint_noise_multiplier=sigma)], delta, 16),
            guess,
            unused=0.02,
        )
    return guess


def _out_of_reach(target: float, expected: str, remedy: str) -> AccountingError:
    return AccountingError(
        f"target_epsilon is out of reach: expected {expected} (got {target:g}). What to do: {remedy}, or change "
        "expected_batch_size, the number of steps or delta."
    )


def round_up(x: float, digits: int = 5) -> float:
    """Rounds up to `digits` significant digits, so that the number that is printed is the number that is used."""
    if x == 0 or not math.isfinite(x):
        return x
    unit = 10.0 ** (math.floor(math.log10(x)) - digits + 1)
    rounded = float(f"{x:.{digits - 1}e}")
    return rounded if rounded >= x else float(f"{x + unit / 2:.{digits - 1}e}")
