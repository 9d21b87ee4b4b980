"""Scores and coins of an audited run -> what privacy.json says of its audit; the same numbers computed again, by whoever doubts them.

Two tests at half the error each, so that together they are wrong with a probability of 1 - CONFIDENCE at most: the general lower
bound on epsilon, and whether the run's own trade-off function is refuted.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

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
    """What an audit saw: (guesses, right ones) for each of `SHARES`; the area under the curve, and the positive control's, if any."""

    kind: str
    num_canaries: int
    guesses: tuple[tuple[int, int], ...]
    area_under_curve: float
    control_area_under_curve: float | None


def counted(
    kind: str, scores: Floats, included: NDArray[np.bool_], control_area_under_curve: float | None = None
) -> Counts:
    """Counts of right guesses from scores of canaries that fair coins put in or left out.

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


def audit_record(counts: Counts, segments: Sequence[Segment], delta: float, epsilon: float) -> dict[str, Any]:
    """The field `audit` of privacy.json: counts, and what follows from them for a run that claims `epsilon` at `delta`."""
    return {
        "kind": counts.kind,
        "num_canaries": counts.num_canaries,
        "method": METHOD,
        "confidence": CONFIDENCE,
        "guesses": [list(pair) for pair in counts.guesses],
        "area_under_curve": counts.area_under_curve,
        "control_area_under_curve": counts.control_area_under_curve,
        **_figures(counts.num_canaries, counts.guesses, tuple(segments), delta, epsilon),
    }


def computed_again(
    audit: Mapping[str, Any], segments: Sequence[Segment], delta: float, epsilon: float
) -> dict[str, Any]:
    """The figures that follow from the counts in a record.

    Raises:
        AuditError: counts that cannot be.
    """
    pairs = tuple((r, v) for r, v in audit["guesses"])
    m = audit["num_canaries"]
    expected = [2 * max(1, int(m * share / 2)) for share in SHARES]
    if [r for r, _ in pairs] != expected:
        raise AuditError(f"expected {expected} guesses about {m} canaries, got {[r for r, _ in pairs]}")
    return _figures(m, pairs, tuple(segments), delta, epsilon)


def power(audit: Mapping[str, Any]) -> str:
    """What the positive control says of an audit: whether one that finds nothing could have found something."""
    area = audit["control_area_under_curve"]
    if area is None:
        return "power not known: no positive control was run"
    if area > POWER:
        return f"positive control: area under the curve {area:.3f} without noise, on the canaries alone"
    return f"no power: even without noise, on the canaries alone, the area under the curve is {area:.3f}"


@cache
def _figures(
    num_canaries: int, pairs: tuple[tuple[int, int], ...], segments: tuple[Segment, ...], delta: float, epsilon: float
) -> dict[str, Any]:
    guesses = [Guesses(num_canaries, r, v) for r, v in pairs]
    found = [bounds(g, delta, EACH) for g in guesses]
    most = ceiling(num_canaries, delta, EACH)
    best = max(b.epsilon for b in found)
    refuted = False
    if math.isfinite(epsilon):
        blow_up = _claimed(segments, delta)
        refuted = best > epsilon or any(refutes(g, blow_up, EACH) for g in guesses)
    return {
        "epsilon_at_least": best,
        "epsilon_at_least_if_gaussian": max(b.epsilon_gaussian for b in found),
        "ceiling": most.epsilon,
        "ceiling_if_gaussian": most.epsilon_gaussian,
        "refuted": refuted,
    }


@cache
def _claimed(segments: tuple[Segment, ...], delta: float) -> InverseBlowUp:
    return claims_inverse_blow_up(segments, delta)
