"""`PrivacyConfig` and N go in, the calibrated `Mechanism` comes out; steps taken go in, epsilon(delta) comes out.

The front door of the accounting: `spent` and `calibrate` come from the two modules below it.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hf_dp.calibration import calibrate, round_up
from hf_dp.config import PrivacyConfig, is_number
from hf_dp.epsilon import MAX_SIGMA, MAX_STEPS, MIN_SIGMA, Epsilon, is_whole, spent, target_problems
from hf_dp.errors import AccountingError, ConfigError
from hf_dp.grid import STD, integer_sensitivity, sigma_problem
from hf_dp.mechanism import (
    DISCRETE,
    METRIC_NOISE,
    Mechanism,
    Segment,
    default_delta,
    release_norm,
    steps_per_epoch,
    unit_of,
)

__all__ = ["Derived", "Epsilon", "affordable_steps", "calibrate", "derivation", "plan", "spent"]


class Derived(NamedTuple):
    """One number of the plan, as text, and the rule that it came from."""

    name: str
    value: str
    rule: str


def plan(privacy: PrivacyConfig, num_examples: int, *, num_train_epochs: float, max_steps: int = -1) -> Mechanism:
    """The mechanism that gives `privacy` on `num_examples` records, its noise calibrated where a target is given.

    With a `unit_column` the examples are groups of records: N is their number.
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
        sigma = calibrate(
            privacy.target_epsilon,
            sample_rate=batch / num_examples,
            num_steps=steps,
            delta=delta,
            sensitivity=release_norm(privacy.log_loss_up_to),
            noise=privacy.noise,
        )
    problem = sigma_problem(float(sigma or 0)) if privacy.noise == DISCRETE else None
    if problem:
        raise ConfigError(f"Cannot plan this run: {problem}.")
    assert sigma is not None  # PrivacyConfig holds exactly one of the two
    return Mechanism(
        num_examples=int(num_examples),
        expected_batch_size=batch,
        num_steps=int(steps),
        noise_multiplier=float(sigma),
        clip_norm=float(privacy.clip_norm),
        delta=delta,
        target_epsilon=None if privacy.target_epsilon is None else float(privacy.target_epsilon),
        loss_bound=None if privacy.log_loss_up_to is None else float(privacy.log_loss_up_to),
        unit=unit_of(privacy.unit_column),
        debug=privacy.debug_seed is not None,
        noise=privacy.noise,
    )


def _plan_problems(privacy: PrivacyConfig, n: int, epochs: float, max_steps: int) -> Iterator[str]:
    if not (is_whole(n) and n >= 1):
        yield f"the number of examples must be a whole number, 1 or more (got {n!r})"
        return
    if not (is_whole(max_steps) and max_steps <= MAX_STEPS):
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
    lowest = MIN_SIGMA * release_norm(privacy.log_loss_up_to)
    if sigma and not lowest <= sigma <= MAX_SIGMA:
        yield f"noise_multiplier must be 0 (no privacy) or from {lowest:.5g} to {MAX_SIGMA:,.0f} (got {sigma:g})"


def affordable_steps(
    spent_so_far: Sequence[Segment], step: Segment, *, target_epsilon: float, delta: float, at_most: int
) -> int:
    """How many more steps like `step` keep epsilon within the target: the largest such number up to `at_most`.

    `step.num_steps` is not read. 0 where the target is already passed, or where the step has no noise.

    Raises:
        AccountingError: an invalid argument, as in `spent`.
    """
    wrong = list(target_problems(target_epsilon))
    if not (is_whole(at_most) and at_most >= 0):
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
    if m.is_discrete:
        rows[9:11] = _of_grid(m, rdp)
    if m.loss_bound is not None:
        rows[9:9] = _of_metrics(m, m.loss_bound)
    return [Derived(*row) for row in rows]


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
