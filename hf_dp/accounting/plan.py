"""`PrivacyConfig` and N go in, the calibrated `Mechanism` comes out; also which steps a run claims, and how many it can
afford.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from hf_dp.accounting.calibration import calibrate, calibrate_course
from hf_dp.accounting.epsilon import MAX_SIGMA, MAX_STEPS, MIN_SIGMA, is_whole, spent, target_problems
from hf_dp.config import PrivacyConfig, is_number
from hf_dp.errors import AccountingError, ConfigError
from hf_dp.mechanism import (
    UNIT,
    Mechanism,
    Segment,
    default_delta,
    first_steps,
    relation_of,
    release_norm,
    steps_per_epoch,
    unit_of,
)
from hf_dp.randomness import sigma_problem
from hf_dp.schedule import MOST_LEVELS, Level, levels, mean_batch


def plan_mechanism(
    privacy: PrivacyConfig, num_examples: int, *, num_train_epochs: float, max_steps: int = -1, row: str = UNIT
) -> Mechanism:
    """The mechanism that gives `privacy` on `num_examples` records, with its noise calibrated where a target is given.

    Args:
        privacy: what is asked for.
        num_examples: N; with a `unit_column`, the number of groups, or with a `contribution_bound` of their records
            that are kept.
        num_train_epochs: passes over the data: T = ceil(epochs x round(N / B)), with B's mean over a schedule's levels.
        max_steps: T, where it is positive; `num_train_epochs` is then ignored, as `Trainer` does.
        row: what a row of the training set is; `mechanism.SHARED` where the `unit_column` has lists of owners.

    Raises:
        ConfigError: an invalid N, number of epochs or of steps, B > N, or delta >= 1 / N. Names everything wrong at
            once.
        AccountingError: the target epsilon is out of reach.
    """
    wrong = list(_plan_problems(privacy, num_examples, num_train_epochs, max_steps))
    if wrong:
        raise ConfigError("Cannot plan this run: " + "; ".join(wrong) + ".")
    per_epoch = epoch_length(privacy, num_examples)
    unit = unit_of(privacy.unit_column, row, privacy.contribution_bound)
    unscaled = Mechanism(
        num_examples=int(num_examples),
        expected_batch_size=int(privacy.expected_batch_size),
        num_steps=int(max_steps if max_steps > 0 else math.ceil(num_train_epochs * per_epoch)),
        noise_multiplier=1.0 if privacy.noise_multiplier is None else float(privacy.noise_multiplier),
        clip_norm=float(privacy.clip_norm),
        delta=default_delta(num_examples) if privacy.target_delta is None else float(privacy.target_delta),
        target_epsilon=None if privacy.target_epsilon is None else float(privacy.target_epsilon),
        loss_bound=None if privacy.log_loss_up_to is None else float(privacy.log_loss_up_to),
        unit=unit,
        relation=relation_of(unit),
        debug=privacy.debug_seed is not None,
        noise=privacy.noise,
        records_per_unit=privacy.records_per_unit,
        contribution_bound=privacy.contribution_bound,
    )
    planned = _with_noise(privacy, unscaled, unscaled.noise_multiplier)
    if privacy.target_epsilon is not None:
        planned = _with_noise(privacy, unscaled, _calibrated(privacy, planned))
    problem = sigma_problem(planned.noise_multiplier) if planned.is_discrete else None
    if problem:
        raise ConfigError(f"Cannot plan this run: {problem}.")
    return planned


def epoch_length(privacy: PrivacyConfig, num_examples: int) -> int:
    """Steps that count as one pass over the data: round(N / B), with B's mean over a schedule's levels."""
    return steps_per_epoch(num_examples, mean_batch(int(privacy.expected_batch_size), privacy.batch_schedule))


def _with_noise(privacy: PrivacyConfig, m: Mechanism, sigma: float) -> Mechanism:
    """`m` with this sigma; where there is a schedule, it is the first level's."""
    if not any(privacy.schedules):
        return replace(m, noise_multiplier=sigma)
    course = levels(Level(m.num_steps, sigma, m.clip_norm, m.expected_batch_size), privacy.schedules)
    return replace(m, noise_multiplier=sigma, levels=course if len(course) > 1 else ())


def _calibrated(privacy: PrivacyConfig, m: Mechanism) -> float:
    assert m.target_epsilon is not None  # or there is nothing to calibrate to
    if m.levels or m.contribution_bound is not None:
        return calibrate_course(m.target_epsilon, lambda sigma: _with_noise(privacy, m, sigma).segments(), m.delta)
    return calibrate(
        m.target_epsilon,
        sample_rate=m.sample_rate,
        num_steps=m.num_steps,
        delta=m.delta,
        sensitivity=release_norm(m.loss_bound),
        noise=m.noise,
    )


def _plan_problems(privacy: PrivacyConfig, n: int, epochs: float, max_steps: int) -> Iterator[str]:
    if not (is_whole(n) and n >= 1):
        yield f"the number of examples must be a whole number, 1 or more (got {n!r})"
        return
    if not (is_whole(max_steps) and max_steps <= MAX_STEPS):
        yield f"max_steps must be a whole number up to {MAX_STEPS:,}, or -1 to go by epochs (got {max_steps!r})"
    elif max_steps <= 0 and not (is_number(epochs) and 0 < epochs * n <= MAX_STEPS * privacy.expected_batch_size / 2):
        yield f"num_train_epochs must be above 0 and give at most {MAX_STEPS // 2:,} steps (got {epochs!r})"
    largest = max(x.expected_batch_size for x in levels(_first_level(privacy), privacy.schedules))
    if largest > n:
        yield (
            f"expected_batch_size must be at most the number of examples, {n:,}, because a record joins a step with "
            f"probability q = B / N <= 1 (got {largest:,}{', at its greatest' if privacy.batch_schedule else ''})"
        )
    if privacy.target_delta is not None and privacy.target_delta >= 1 / n:
        yield (
            f"target_delta must be below 1 / N = {1 / n:.3g}, or publishing one record outright would satisfy it "
            f"(got {privacy.target_delta:g}); leave it out for {default_delta(n):g}"
        )
    lowest = MIN_SIGMA * release_norm(privacy.log_loss_up_to)
    course = levels(_first_level(privacy), privacy.schedules)
    sigmas = {x.noise_multiplier for x in course} if privacy.noise_multiplier else set()
    wrong = sorted(sigma for sigma in sigmas if not lowest <= sigma <= MAX_SIGMA)
    if wrong:
        got = ", ".join(f"{x:g}" for x in wrong)
        yield f"noise_multiplier must be 0 (no privacy) or from {lowest:.5g} to {MAX_SIGMA:,.0f} (got {got})"


def _first_level(privacy: PrivacyConfig) -> Level:
    """A first level with so many steps that every level of every schedule occurs."""
    first = privacy.noise_multiplier or 1.0, privacy.clip_norm, int(privacy.expected_batch_size)
    return Level(math.lcm(*range(1, MOST_LEVELS + 1)), *first)


def claimed(charged: Sequence[Segment], plans: Iterable[Sequence[Segment]], delta: float) -> tuple[Segment, ...]:
    """The steps whose epsilon a run claims: the costliest of what was charged and of its plans. None before the first
    step.

    Noise and sampling of a plan's steps do not depend on what they release. So a run that ends early is its whole plan
    with the rest discarded, and the plan's epsilon holds whenever it ends (a privacy filter; Rogers et al. 2016). The
    epsilon of the charged steps alone would hold only if their number had been fixed beforehand.

    Args:
        charged: the steps taken so far.
        plans: all steps of each plan under which a step was taken.
        delta: of (epsilon, delta).

    Raises:
        AccountingError: as in `spent`.
    """
    if not any(s.num_steps for s in charged):
        return ()
    return max((tuple(charged), *map(tuple, plans)), key=lambda segments: spent(segments, delta).epsilon)


def affordable_steps(
    spent_so_far: Sequence[Segment], upcoming: Sequence[Segment], *, target_epsilon: float, delta: float
) -> int:
    """The largest number of the `upcoming` steps, taken in their order, that keeps epsilon within the target.

    It is 0 where the target is already exceeded, or where the first step has no noise.

    Raises:
        AccountingError: an invalid argument, as in `spent`.
    """
    wrong = list(target_problems(target_epsilon))
    if wrong:
        raise AccountingError("Cannot tell how many steps are affordable: " + "; ".join(wrong) + ".")

    def is_within(more: int) -> bool:
        return spent([*spent_so_far, *first_steps(upcoming, more)], delta).epsilon <= target_epsilon

    at_most = sum(s.num_steps for s in upcoming)
    if is_within(at_most):
        return at_most
    low, high = 0, at_most  # high is too many; low is within the target, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_within(middle) else (low, middle)
    return low
