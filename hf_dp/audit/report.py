"""Scores and coins of an audited run -> the field `audit` of privacy.json; and the same numbers computed again, for
checking.

Two tests are made, each with half of the error probability, so that with a probability of at least CONFIDENCE neither
is wrong: the general lower bound on epsilon, and whether the run's own trade-off function is refuted.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from hf_dp.audit.claim import claims_inverse_blow_up
from hf_dp.audit.one_run import Guesses, InverseBlowUp, bounds, ceiling, refutes
from hf_dp.audit.scores import SHARES, Floats, area_under_curve, guess
from hf_dp.errors import AuditError
from hf_dp.mechanism import Segment

CONFIDENCE = 0.95
EACH = 1 - (1 - CONFIDENCE) / (2 * len(SHARES))  # of one test on one share of the canaries
POWER = 0.9  # area under the positive control's curve from which an audit is said to have power
METHOD = "one run: Steinke, Nasr, Jagielski 2023; f-DP: Mahloujifar, Melis, Chaudhuri 2024"


class Counts(NamedTuple):
    """What an audit saw: for each of `SHARES`, (guesses, right ones); the area under the curve, and the positive
    control's, if there is one.
    """

    kind: str
    num_canaries: int
    guesses: tuple[tuple[int, int], ...]
    area_under_curve: float
    control_area_under_curve: float | None


def counted(
    kind: str, scores: Floats, included: NDArray[np.bool_], control_area_under_curve: float | None = None
) -> Counts:
    """Counts of right guesses, from scores of canaries that fair coins put in or left out.

    Raises:
        AuditError: scores that are not finite, or coins that all fell on one side.
    """
    if not np.isfinite(scores).all():
        raise AuditError("the canaries' scores are not all finite: did the training diverge?")
    if included.all() or not included.any():
        raise AuditError(f"all {included.size} coins fell on one side: train again, with more canaries")
    found = tuple((g.num_guesses, g.num_right) for g in guess(scores, included))
    area = area_under_curve(scores, included)
    return Counts(kind, len(scores), found, area, control_area_under_curve)


class Figures(NamedTuple):
    """What follows from an audit's counts.

    Attributes:
        epsilon_at_least: lower bound on epsilon at the run's delta, for any mechanism.
        epsilon_at_least_if_gaussian: the same, were the run's trade-off function that of a Gaussian mechanism.
        ceiling: the largest bound that so many canaries can show.
        ceiling_if_gaussian: the same, were the trade-off function Gaussian.
        refuted: whether the counts contradict the run's claim.
    """

    epsilon_at_least: float
    epsilon_at_least_if_gaussian: float
    ceiling: float
    ceiling_if_gaussian: float
    refuted: bool


@dataclass(frozen=True)
class AuditRecord:
    """The field `audit` of privacy.json: counts, and the figures that follow from them."""

    kind: str
    num_canaries: int
    method: str
    confidence: float
    guesses: tuple[tuple[int, int], ...]
    area_under_curve: float
    control_area_under_curve: float | None
    epsilon_at_least: float
    epsilon_at_least_if_gaussian: float
    ceiling: float
    ceiling_if_gaussian: float
    refuted: bool

    @classmethod
    def of(cls, stated: Mapping[str, object]) -> "AuditRecord":
        """Reads the field from a record that has the schema's form."""
        pairs = cast("list[tuple[int, int]]", stated["guesses"])
        return cls(**{**stated, "guesses": tuple((r, v) for r, v in pairs)})  # type: ignore[arg-type]

    @property
    def figures(self) -> Figures:
        """The figures as the record states them."""
        return Figures(*(getattr(self, name) for name in Figures._fields))

    def stated(self) -> dict[str, object]:
        """As JSON has it."""
        return asdict(self) | {"guesses": [list(pair) for pair in self.guesses]}


def audit_record(counts: Counts, segments: Sequence[Segment], delta: float, epsilon: float) -> AuditRecord:
    """What an audit's counts mean for a run of `segments` that claims `epsilon` at `delta`."""
    return AuditRecord(
        kind=counts.kind,
        num_canaries=counts.num_canaries,
        method=METHOD,
        confidence=CONFIDENCE,
        guesses=counts.guesses,
        area_under_curve=counts.area_under_curve,
        control_area_under_curve=counts.control_area_under_curve,
        **_figures(counts.num_canaries, counts.guesses, tuple(segments), delta, epsilon)._asdict(),
    )


def computed_again(audit: AuditRecord, segments: Sequence[Segment], delta: float, epsilon: float) -> Figures:
    """The figures that follow from the counts in a record.

    Raises:
        AuditError: impossible counts.
    """
    m = audit.num_canaries
    expected = [2 * max(1, int(m * share / 2)) for share in SHARES]
    if [r for r, _ in audit.guesses] != expected:
        raise AuditError(f"expected {expected} guesses about {m} canaries, got {[r for r, _ in audit.guesses]}")
    return _figures(m, audit.guesses, tuple(segments), delta, epsilon)


def has_power(control_area_under_curve: float | None) -> bool:
    """Whether a positive control showed that an audit can find something; unknown counts as not."""
    return control_area_under_curve is not None and control_area_under_curve > POWER


def power(control_area_under_curve: float | None) -> str:
    """What the positive control says of an audit: whether an audit that finds nothing could have found something."""
    area = control_area_under_curve
    if area is None:
        return "power not known: no positive control was run"
    if has_power(area):
        return f"positive control: area under the curve {area:.3f} without noise, on the canaries alone"
    return f"no power: even without noise, on the canaries alone, the area under the curve is {area:.3f}"


@cache
def _figures(
    num_canaries: int, pairs: tuple[tuple[int, int], ...], segments: tuple[Segment, ...], delta: float, epsilon: float
) -> Figures:
    guesses = [Guesses(num_canaries, r, v) for r, v in pairs]
    found = [bounds(g, delta, EACH) for g in guesses]
    most = ceiling(num_canaries, delta, EACH)
    best = max(b.epsilon for b in found)
    refuted = False
    if math.isfinite(epsilon):
        blow_up = _claimed(segments, delta)
        refuted = best > epsilon or any(refutes(g, blow_up, EACH) for g in guesses)
    return Figures(best, max(b.epsilon_gaussian for b in found), most.epsilon, most.epsilon_gaussian, refuted)


@cache
def _claimed(segments: tuple[Segment, ...], delta: float) -> InverseBlowUp:
    return claims_inverse_blow_up(segments, delta)
