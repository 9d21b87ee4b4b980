"""A plan for groups of records, such as people's, and how many each has -> which way to draw their records has the
least noise at the same epsilon and the same compute.

Either groups are drawn, and of each the mean gradient of at most k records is clipped; or records are drawn, of each
group at most G (Charles et al. 2024, "Fine-Tuning Large Language Models with User-Level Differential Privacy", section
3). Both release a mean of vectors that are clipped to C: of B groups with noise sigma C / B, of R records with noise
sigma C / R. A step takes as many records in all ways, and there are as many steps. So the noise on the mean, in units
of C, is what differs. Where the gradients of a group's records agree, it tells which way serves better; where they
don't, their mean is shorter than each, a smaller C does for groups, and drawing groups is better than it seems.
"""

from collections.abc import Sequence
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
    ways = []
    for most in sorted(most for most in asked if most <= of_each.max()):
        kept = np.minimum(of_each, most)
        groups = records / float(kept.mean())
        drawn = [(f"records_per_unit={most}", groups, groups / len(of_each), 1, int(of_each.sum()))]
        if most > 1:
            drawn.append((f"contribution_bound={most}", records, records / int(kept.sum()), most, int(kept.sum())))
        for setting, batch, rate, bound, used in drawn:
            with suppress(AccountingError):
                if rate <= 1:
                    sigma = _sigma(m, rate, bound)
                    ways.append(Way(setting, batch, used, sigma, sigma / batch))
    return sorted(ways, key=lambda way: way.noise)


def _sigma(m: Mechanism, rate: float, bound: int) -> float:
    assert m.target_epsilon is not None
    course = lambda sigma: [Segment(rate, sigma, m.num_steps, "gaussian", bound)]  # noqa: E731
    return calibrate_course(m.target_epsilon, course, m.delta, roughly=True)
