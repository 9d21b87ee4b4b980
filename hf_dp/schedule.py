"""A schedule as text ("exponential:0.5") and a number of steps -> levels: runs of steps with the same sigma, C and B.

A schedule is a staircase: the values are constant within a level. So the steps that are executed are exactly those that
are charged, because each level is one segment of the ledger and one (q, sigma) of the accounting. Legend: x goes from 0
(first level) to 1 (last); r is the last value over the first.

    linear       1 + (r - 1) x
    exponential  r^x
    cosine       r + (1 - r) (1 + cos(pi x)) / 2
    step         as exponential, but in two levels, or in as many as the text says ("step:0.25:3" is 1, 1/2, 1/4)
"""

import math
from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import NamedTuple

MOST_LEVELS = 8  # levels of one schedule; each adds about a tenth of a second to an evaluation of epsilon
LEAST_RATIO, MOST_RATIO = 0.01, 100.0
SHAPES = ("linear", "exponential", "cosine", "step")
EXPECTED = (
    f"SHAPE:RATIO, the shape one of {', '.join(SHAPES)}, the ratio of last to first value from {LEAST_RATIO:g} to "
    f"{MOST_RATIO:g}, such as exponential:0.5; or step:RATIO:LEVELS, with 2 to {MOST_LEVELS} levels"
)


class Level(NamedTuple):
    """`num_steps` consecutive steps with the same noise multiplier (the gradient's sigma), clip norm and batch size."""

    num_steps: int
    noise_multiplier: float
    clip_norm: float
    expected_batch_size: int


class Schedules(NamedTuple):
    """How sigma, C and B change from their first values: schedules as text, None where the value is constant."""

    noise: str | None = None
    clip: str | None = None
    batch: str | None = None


def is_schedule(text: object) -> bool:
    """Whether `text` is a valid schedule, or None."""
    try:
        factors(text if isinstance(text, str) or text is None else "")
    except ValueError:
        return False
    return True


def factors(text: str | None, most: int = MOST_LEVELS) -> list[float]:
    """Each level's value over the first level's; there are at most `most` levels, the number of steps.

    Raises:
        ValueError: `text` is not a schedule, or its ratio or number of levels is out of range.
    """
    if text is None or most < 2:
        return [1.0]
    shape, ratio, *rest = text.split(":")
    r, count = float(ratio), int(rest[0]) if rest else 2 if shape == "step" else MOST_LEVELS
    if shape not in SHAPES or not LEAST_RATIO <= r <= MOST_RATIO or len(rest) > (shape == "step"):
        raise ValueError(text)
    if not 2 <= count <= MOST_LEVELS:
        raise ValueError(text)
    count = min(count, most)
    return [_factor(shape, r, i / (count - 1)) for i in range(count)]


def _factor(shape: str, r: float, x: float) -> float:
    if shape == "linear":
        return 1 + (r - 1) * x
    if shape == "cosine":
        return r + (1 - r) * (1 + math.cos(math.pi * x)) / 2
    return float(r**x)


def mean_batch(expected_batch_size: int, text: str | None) -> float:
    """Mean of B over levels of equal length, which decides how many steps count as one epoch."""
    sizes = [_size(expected_batch_size * f) for f in factors(text)]
    return sum(sizes) / len(sizes)


def levels(first: Level, schedules: Schedules) -> tuple[Level, ...]:
    """All levels of a run of T = `first.num_steps` steps; equal neighbours become one.

    Step t is in level floor(t L / T) of a schedule with L levels. Sigma and C are rounded to five significant digits,
    and B to a whole number of at least 1, before anything is computed with them.

    Args:
        first: T, and the values of the first level.
        schedules: how the values change.
    """
    total = first.num_steps
    noise, clip, batch = (factors(text, total) for text in schedules)
    starts = sorted({-(-i * total // len(f)) for f in (noise, clip, batch) for i in range(len(f))})

    def of_step(t: int) -> tuple[float, float, int]:
        sigma, c, size = (f[t * len(f) // total] for f in (noise, clip, batch))
        return (
            _digits(first.noise_multiplier * sigma) if sigma != 1 else first.noise_multiplier,
            _digits(first.clip_norm * c) if c != 1 else first.clip_norm,
            _size(first.expected_batch_size * size),
        )

    runs: Iterator[tuple[int, tuple[float, float, int]]] = (
        (end - start, of_step(start)) for start, end in pairwise([*starts, total]) if end > start
    )
    return tuple(Level(sum(n for n, _ in run), *values) for values, run in groupby(runs, key=lambda run: run[1]))


def _digits(x: float) -> float:
    return float(f"{x:.5g}")


def _size(x: float) -> int:
    return max(1, round(x))
