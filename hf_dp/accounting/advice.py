"""A plan and the number of trained parameters -> how loud its noise is against its signal, and what would help.

Each step adds noise of norm sigma x C x sqrt(d) / B to a mean of clipped gradients, whose norm is at most C. Over T
steps signals add up to at most T x C, and independent noises to sqrt(T) times one of them. Both ratios follow from
public settings alone.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from hf_dp.accounting.calibration import calibrate_course
from hf_dp.accounting.derivation import Derived
from hf_dp.accounting.epsilon import spent
from hf_dp.errors import AccountingError
from hf_dp.mechanism import Mechanism, steps_per_epoch
from hf_dp.schedule import Level

DROWNS = 0.5  # noise of all steps over their signal, from which on a warning is due


class Loudness(NamedTuple):
    """Noise over signal, were all clipped gradients of norm C and of one direction: in the first step, and in all."""

    of_a_step: float
    of_all_steps: float

    @property
    def drowns(self) -> bool:
        """Whether the noise hides the signal, in a step and in the whole training."""
        return self.of_a_step > 1 and self.of_all_steps > DROWNS


def loudness(m: Mechanism, num_parameters: int) -> Loudness:
    """Noise over signal of a plan in which `num_parameters` numbers are trained."""
    levels = levels_of(m)
    squares = sum(x.num_steps * (x.noise_multiplier * x.clip_norm / x.expected_batch_size) ** 2 for x in levels)
    signal = sum(x.num_steps * x.clip_norm for x in levels)
    root = math.sqrt(num_parameters)
    return Loudness(m.noise_multiplier * root / m.expected_batch_size, math.sqrt(squares) * root / signal)


def loudness_rows(m: Mechanism, num_parameters: int) -> list[Derived]:
    """Both ratios with their rules."""
    found = loudness(m, num_parameters)
    step = f"in units of C: sigma x sqrt(d) / B, d = {num_parameters:,}; the signal is 1 at most"
    return [
        Derived("noise : signal, a step", f"{found.of_a_step:.3g}", step),
        Derived(
            "noise : signal, all steps",
            f"{found.of_all_steps:.3g}",
            "the same over sqrt(T), because noises average out",
        ),
    ]


def warning(m: Mechanism, num_parameters: int) -> str:
    """What to change where the signal drowns, with the ratio that each change gives at the same epsilon; else ""."""
    found = loudness(m, num_parameters)
    if not (m.is_private and found.drowns):
        return ""
    return (
        f"The signal drowns: in a step the noise has up to {found.of_a_step:.2g} times the norm of the signal, and in "
        f"all {m.num_steps:,} steps together {found.of_all_steps:.2g} times. At the same epsilon: "
        f"{'; '.join(_remedies(m, num_parameters, found.of_all_steps))}; more records, or a larger epsilon."
    )


def _remedies(m: Mechanism, num_parameters: int, now: float) -> Iterator[str]:
    larger, then = m, now
    for factor in (2, 4, 8, 16):
        if then <= DROWNS or m.expected_batch_size * factor > m.num_examples / 2:
            break
        with suppress(AccountingError):
            larger = at_batch(m, m.expected_batch_size * factor, None)
            then = loudness(larger, num_parameters).of_all_steps
    if then < 0.9 * now:
        yield (
            f"expected_batch_size={larger.expected_batch_size:,} with max_steps={larger.num_steps}, as many steps as "
            f"now, brings that to {then:.2g}"
        )
    fewer = math.floor(num_parameters * (DROWNS / now) ** 2)
    yield (
        f"training at most {fewer:,} parameters in place of {num_parameters:,} (LoRA of a smaller rank or on fewer "
        f"modules) brings it to {DROWNS:g}"
    )


def at_batch(m: Mechanism, batch: int, epochs: float | None) -> Mechanism:
    """The plan with another first expected batch size, its sigma calibrated anew to the epsilon of the plan.

    Args:
        m: the plan; it has noise.
        batch: at least 1. Later sizes of a schedule change in proportion, up to N.
        epochs: passes over the data, so that the number of steps changes; None keeps the steps.

    Raises:
        AccountingError: no sigma gives that epsilon.
    """
    factor = batch / m.expected_batch_size
    levels = [
        x._replace(expected_batch_size=min(m.num_examples, round(x.expected_batch_size * factor))) for x in m.levels
    ]
    if epochs is None:
        steps = m.num_steps
    elif levels:
        levels = [x._replace(num_steps=max(1, round(x.num_steps / factor))) for x in levels]
        steps = sum(x.num_steps for x in levels)
    else:
        steps = math.ceil(epochs * steps_per_epoch(m.num_examples, batch))
    other = replace(m, expected_batch_size=batch, num_steps=steps, levels=tuple(levels))
    target = spent(m.segments(), m.delta).epsilon
    return _with_sigma(other, calibrate_course(target, lambda sigma: _with_sigma(other, sigma).segments(), m.delta))


def _with_sigma(m: Mechanism, sigma: float) -> Mechanism:
    """With another first sigma; the later ones of a schedule change in proportion."""
    factor = sigma / m.noise_multiplier
    levels = tuple(x._replace(noise_multiplier=x.noise_multiplier * factor) for x in m.levels)
    return replace(m, noise_multiplier=sigma, levels=levels)


def levels_of(m: Mechanism) -> tuple[Level, ...]:
    """The schedule's levels, or one of all steps."""
    return m.levels or (Level(m.num_steps, m.noise_multiplier, m.clip_norm, m.expected_batch_size),)
