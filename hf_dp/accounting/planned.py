"""`PrivacyConfig` and N go in, the calibrated `Mechanism` comes out; steps taken go in, epsilon(delta) comes out.

The front door of the accounting: `spent` and `calibrate` come from the two modules below it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from hf_dp.accounting.calibration import calibrate, calibrate_course, round_up
from hf_dp.accounting.epsilon import MAX_SIGMA, MAX_STEPS, MIN_SIGMA, Epsilon, is_whole, spent, target_problems
from hf_dp.config import PrivacyConfig, is_number
from hf_dp.errors import AccountingError, ConfigError
from hf_dp.mechanism import (
    METRIC_NOISE,
    Mechanism,
    Segment,
    default_delta,
    first_steps,
    release_norm,
    steps_per_epoch,
    unit_of,
)
from hf_dp.randomness import STD, integer_sensitivity, sigma_problem
from hf_dp.schedule import MOST_LEVELS, Level, levels, mean_batch

__all__ = ["Derived", "Epsilon", "affordable_steps", "calibrate", "derivation", "plan", "spent"]


class Derived(NamedTuple):
    """One number of the plan, as text, and the rule that it came from."""

    name: str
    value: str
    rule: str


def plan(privacy: PrivacyConfig, num_examples: int, *, num_train_epochs: float, max_steps: int = -1) -> Mechanism:
    """The mechanism that gives `privacy` on `num_examples` records, its noise calibrated where a target is given.

    With a `unit_column` the examples are groups of records: N is their number.
    Counts steps as `Trainer` does: `max_steps` wins where it is positive, else T = ceil(epochs x round(N / B)), with B's mean over the
    levels of a schedule.

    Raises:
        ConfigError: N, epochs or steps that are no such numbers, B > N, or delta >= 1 / N. Names all of them.
        AccountingError: the target epsilon is out of reach.
    """
    wrong = list(_plan_problems(privacy, num_examples, num_train_epochs, max_steps))
    if wrong:
        raise ConfigError("Cannot plan this run: " + "; ".join(wrong) + ".")
    per_epoch = epoch_length(privacy, num_examples)
    unscaled = Mechanism(
        num_examples=int(num_examples),
        expected_batch_size=int(privacy.expected_batch_size),
        num_steps=int(max_steps if max_steps > 0 else math.ceil(num_train_epochs * per_epoch)),
        noise_multiplier=1.0 if privacy.noise_multiplier is None else float(privacy.noise_multiplier),
        clip_norm=float(privacy.clip_norm),
        delta=default_delta(num_examples) if privacy.target_delta is None else float(privacy.target_delta),
        target_epsilon=None if privacy.target_epsilon is None else float(privacy.target_epsilon),
        loss_bound=None if privacy.log_loss_up_to is None else float(privacy.log_loss_up_to),
        unit=unit_of(privacy.unit_column),
        debug=privacy.debug_seed is not None,
        noise=privacy.noise,
    )
    planned = _with_noise(privacy, unscaled, unscaled.noise_multiplier)
    if privacy.target_epsilon is not None:
        planned = _with_noise(privacy, unscaled, _calibrated(privacy, planned))
    problem = sigma_problem(planned.noise_multiplier) if planned.is_discrete else None
    if problem:
        raise ConfigError(f"Cannot plan this run: {problem}.")
    return planned


def epoch_length(privacy: PrivacyConfig, num_examples: int) -> int:
    """Steps that count as one pass over the data: round(N / B), with B's mean over the levels of a schedule."""
    return steps_per_epoch(num_examples, mean_batch(int(privacy.expected_batch_size), privacy.batch_schedule))


def _with_noise(privacy: PrivacyConfig, m: Mechanism, sigma: float) -> Mechanism:
    """`m` with this sigma, first of those of the schedule's levels where there is one."""
    if not any(privacy.schedules):
        return replace(m, noise_multiplier=sigma)
    course = levels(Level(m.num_steps, sigma, m.clip_norm, m.expected_batch_size), privacy.schedules)
    return replace(m, noise_multiplier=sigma, levels=course if len(course) > 1 else ())


def _calibrated(privacy: PrivacyConfig, m: Mechanism) -> float:
    assert m.target_epsilon is not None  # or there is nothing to calibrate to
    if m.levels:
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
        yield f"noise_multiplier must be 0 (no privacy) or from {lowest:.5g} to {MAX_SIGMA:,.0f} (got {', '.join(f'{x:g}' for x in wrong)})"


def _first_level(privacy: PrivacyConfig) -> Level:
    """Of as many steps as any schedule has levels, to see all of their values."""
    first = privacy.noise_multiplier or 1.0, privacy.clip_norm, int(privacy.expected_batch_size)
    return Level(math.lcm(*range(1, MOST_LEVELS + 1)), *first)


def affordable_steps(
    spent_so_far: Sequence[Segment], upcoming: Sequence[Segment], *, target_epsilon: float, delta: float
) -> int:
    """How many of the `upcoming` steps, in their order, keep epsilon within the target: the largest such number.

    0 where the target is already passed, or where the first step has no noise.

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


def derivation(
    privacy: PrivacyConfig, mechanism: Mechanism, *, num_train_epochs: float, max_steps: int = -1
) -> list[Derived]:
    """Every number of the plan with the rule that it came from, in the order in which they follow from one another.

    Epsilon is rounded up to five digits. Costs one evaluation of each accountant.
    """
    m = mechanism
    per_epoch = epoch_length(privacy, m.num_examples)
    mean = ", B's mean over its levels" if privacy.batch_schedule else ""
    by_epochs = f"ceil({num_train_epochs:g} x {per_epoch}): {num_train_epochs:g} epochs of round(N / B) steps{mean}"
    of_sigma = "given" if m.target_epsilon is None else f"least that keeps epsilon within {m.target_epsilon:g}"
    epsilon = spent(m.segments(), m.delta)
    e, pld, rdp = (f"{round_up(x):g}" if math.isinf(x) else f"{round_up(x):.5g}" for x in epsilon)
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
        (
            "epsilon",
            e,
            f"{'that' if m.is_discrete else 'the smaller of the two'}, after all {m.num_steps:,} steps, at delta",
        ),
    ]
    rows[9:9] = _of_levels(privacy, m)
    if m.is_discrete:
        rows[9:11] = _of_grid(m, rdp)
    if m.loss_bound is not None:
        rows[9:9] = _of_metrics(m, m.loss_bound)
    return [Derived(*row) for row in rows]


def _of_levels(privacy: PrivacyConfig, m: Mechanism) -> list[tuple[str, str, str]]:
    """A row for each of sigma, C and B that goes on from the value above."""
    found, names = [], ("noise_multiplier", "clip_norm", "expected_batch_size")
    for symbol, name, text in zip(("sigma", "C", "B"), names, privacy.schedules, strict=True):
        values = [f"{getattr(x, name):.5g}" for x in m.levels]
        if text and values:
            runs = [value for value, _ in groupby(values)]
            rule = f"{text}, in levels of T / {len(runs)} steps each; a level's steps are charged with its values"
            found.append((f"{symbol}, level by level", ", ".join(runs), rule))
    return found


def _of_grid(m: Mechanism, rdp: str) -> list[tuple[str, str, str]]:
    most = integer_sensitivity(m.noise_multiplier)
    return [
        (
            "step of the grid",
            f"{m.noise_std / STD:.5g}",
            f"sigma x C / S; noise N_Z(0, S²), S = {STD:,}; one example a pass",
        ),
        ("integer sensitivity D", f"{most:,}", "floor(S / sigma): the most, in steps, by which a record moves the sum"),
        ("epsilon by RDP", rdp, "Rényi DP at whole orders, dp-accounting; PLD is not claimed of discrete noise"),
    ]


def _of_metrics(m: Mechanism, loss_bound: float) -> list[tuple[str, str, str]]:
    std, mean = METRIC_NOISE * m.noise_multiplier, "standard deviation of one step's; of a mean over k steps, / sqrt(k)"
    return [
        (
            "joint noise multiplier",
            f"{m.joint_noise_multiplier:.10g}",
            f"sigma / sqrt(1 + 2 / {METRIC_NOISE:g}²): gradient, loss and batch size are one release; epsilon is of this",
        ),
        (
            "noise on a logged loss",
            f"{std * loss_bound / m.expected_batch_size:.5g}",
            f"{METRIC_NOISE:g} x sigma x L / B: {mean}",
        ),
        ("noise on a logged batch size", f"{std:.5g}", f"{METRIC_NOISE:g} x sigma: {mean}"),
    ]
