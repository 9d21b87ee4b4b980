"""A plan for groups of records, such as people's, and how many each has -> which way to draw their records has the
least noise at the same epsilon and the same compute.

Either groups are drawn, and of each the mean gradient of at most k records is clipped; or records are drawn, of each
group at most G (Charles et al. 2024, "Fine-Tuning Large Language Models with User-Level Differential Privacy", section
3). Both release a mean of vectors that are clipped to C: of B groups with noise sigma C / B, of R records with noise
sigma C / R. A step takes as many records in all ways, and there are as many steps. So the noise on the mean, in units
of C, is what differs. Where the gradients of a group's records agree, it tells which way serves better; where they
don't, their mean is shorter than each, a smaller C does for groups, and drawing groups is better than it seems.

Where records have several owners, no owner can be drawn by themselves, and what is left to choose is G.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from hf_dp.accounting.calibration import calibrate_course
from hf_dp.errors import AccountingError
from hf_dp.mechanism import Mechanism, Segment

MOST_OF_EACH = (1, 4, 16)  # k and G that are looked at


class Way(NamedTuple):
    """One way to draw.

    Attributes:
        setting: of `PrivacyConfig`.
        expected_batch_size: B, of what is drawn, for as many records a step as all ways have.
        kept: how many records are ever used.
        sigma: noise multiplier for the plan's epsilon and delta, at most 2 % of epsilon too large.
        noise: standard deviation of the noise on the mean of what is drawn, in units of C.
    """

    setting: str
    expected_batch_size: float
    kept: int
    sigma: float
    noise: float


def ways_to_draw(m: Mechanism, sizes: Sequence[int]) -> list[Way]:
    """The ways with the plan's epsilon, least noise first. Those with q above 1 or out of reach are left out.

    Args:
        m: a private plan for groups, with a target epsilon; its steps, delta, and records a step are kept.
        sizes: how many records each group has, before any are left out.
    """
    of_each = np.asarray(sizes)
    taken = float(np.minimum(of_each, m.records_per_unit).mean())
    records = m.expected_batch_size * (1.0 if m.contribution_bound else taken)
    asked = {m.contribution_bound or m.records_per_unit, *MOST_OF_EACH}
    drawn = []
    for most in sorted(most for most in asked if most <= of_each.max()):
        kept = np.minimum(of_each, most)
        groups = records / float(kept.mean())
        drawn.append(_Drawn(f"records_per_unit={most}", groups, len(of_each), 1, int(of_each.sum())))
        if most > 1:
            number = int(kept.sum())
            drawn.append(_Drawn(f"contribution_bound={most}", records, number, most, number))
    return _ways(m, drawn)


def ways_to_keep(m: Mechanism, kept: Callable[[int], int]) -> list[Way]:
    """As `ways_to_draw`, where records have several owners. A G that keeps no more records than a smaller one is left
    out.

    Args:
        m: a private plan for owners, with a target epsilon and a contribution bound.
        kept: G -> how many records are kept.
    """
    drawn: list[_Drawn] = []
    for most in sorted({m.contribution_bound or 1, *MOST_OF_EACH}):
        number = kept(most)
        if not drawn or number > drawn[-1].used:
            drawn.append(_Drawn(f"contribution_bound={most}", m.expected_batch_size, number, most, number))
    return _ways(m, drawn)


class _Drawn(NamedTuple):
    """What may be drawn: the setting, B, N, G, and how many records are ever used."""

    setting: str
    batch: float
    units: int
    bound: int
    used: int


def _ways(m: Mechanism, drawn: Iterable[_Drawn]) -> list[Way]:
    ways = []
    for d in drawn:
        with suppress(AccountingError):
            if d.batch <= d.units:
                sigma = _sigma(m, d.batch / d.units, d.bound)
                ways.append(Way(d.setting, d.batch, d.used, sigma, sigma / d.batch))
    return sorted(ways, key=lambda way: way.noise)


def _sigma(m: Mechanism, rate: float, bound: int) -> float:
    assert m.target_epsilon is not None
    course = lambda sigma: [Segment(rate, sigma, m.num_steps, "gaussian", bound)]  # noqa: E731
    return calibrate_course(m.target_epsilon, course, m.delta, roughly=True)
