"""Losses of many models on the same records, and which records each was trained on -> how well members can be told.

The attack is LiRA (Carlini et al. 2022, online; each model in turn is the target, and the others are its shadows),
adapted to few models. A record's confidence is taken as normal. Its mean without the record and the record's effect on
it are estimated from all shadows; the effect is shrunk towards its mean over records, and so is the variance. A fair
coin for each record and model decides whether the record is in the model's data. So a target's coins are independent of
everything that its scores are made of, except the target itself.

Legend: M models, n records.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from hf_dp.accounting import spent
from hf_dp.audit.claim import claim_is_refuted, claims_inverse_blow_up
from hf_dp.audit.scores import SHARES, Floats, guess
from hf_dp.errors import AuditError
from hf_dp.mechanism import Segment

Coins = NDArray[np.bool_]
FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)
FEWEST_MODELS = 4
FEWEST_FALSE_POSITIVES = 10  # a rate is stated only at thresholds with at least so many
CONFIDENCE = 0.95  # of each interval by itself
RESAMPLES = 200
PRIOR = 8.0  # weight, in shadows, of the prior that a record's variance is the mean over all records
LEAST_LOSS = 1e-7  # smaller losses cannot be told apart in float32


class Interval(NamedTuple):
    """An estimate, and the interval that contains the truth with probability `CONFIDENCE`."""

    estimate: float
    low: float
    high: float


class Attack(NamedTuple):
    """How well an attack's scores separate members from others, at all thresholds.

    Attributes:
        area: area under the curve; 0.5 is guessing.
        rates: (rate of false positives, rate of true ones), for those of `FALSE_POSITIVE_RATES` that have enough
            non-members.
        false_positives: rates along the curve, from 0 to 1, for the picture.
        true_positives: the true-positive rates that belong to them.
    """

    area: Interval
    rates: tuple[tuple[float, Interval], ...]
    false_positives: Floats
    true_positives: Floats

    @property
    def has_power(self) -> bool:
        """Whether the attack is better than guessing, beyond chance."""
        return self.area.low > 0.5


def lira_scores(losses: Floats, included: Coins) -> Floats:
    """Log likelihood ratios of "was a member" to "was not", [M, n]; each row comes from the other rows' losses and its
    own.

    Args:
        losses: each model's loss on each record, 0 or more, [M, n].
        included: whether the record was in the model's training set, [M, n].

    Raises:
        AuditError: other shapes, fewer than `FEWEST_MODELS`, losses that are not finite or below 0, or coins all on one
            side.
    """
    wrong = []
    if losses.ndim != 2 or losses.shape != included.shape or len(losses) < FEWEST_MODELS or losses.shape[1] < 2:
        wrong.append(
            f"expected a loss and a coin of at least {FEWEST_MODELS} models on 2 records, got {losses.shape} and "
            f"{included.shape}"
        )
    if not np.isfinite(losses).all() or (losses < 0).any():
        wrong.append("expected finite losses from 0: did a training diverge?")
    if included.all() or not included.any():
        wrong.append(f"all {included.size} coins fell on one side: toss anew")
    if wrong:
        raise AuditError("; ".join(wrong))
    found = _confidences(losses)
    shadows = [np.arange(len(found)) != target for target in range(len(found))]
    return np.stack([_ratio(found[t], found[s], included[s]) for t, s in enumerate(shadows)])


def measured(scores: Floats, included: Coins) -> Attack:
    """Curve, area and rates of scores [M, n], which are higher for members; one threshold holds for all models.

    Intervals are normal. Their standard deviation is that over records resampled with replacement, each with the scores
    of all its models. The interval of a rate is widened to Clopper and Pearson's.
    """
    order = np.argsort(-scores, axis=None, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores.ravel()[order])), order.size - 1)  # the last of each run of ties
    record, member = order % scores.shape[1], included.ravel()[order]
    curve = _curve(member, ends, np.ones(order.size))
    inside, outside = int(member.sum()), int((~member).sum())
    stated = [a for a in FALSE_POSITIVE_RATES if a * outside >= FEWEST_FALSE_POSITIVES]
    generator, n, drawn = np.random.default_rng(0), scores.shape[1], []
    for _ in range(RESAMPLES):
        anew = _curve(member, ends, generator.multinomial(n, np.full(n, 1 / n)).astype(float)[record])
        drawn.append([_area(*anew), *np.interp(stated, *anew)])
    area, *found = [_area(*curve), *np.interp(stated, *curve)]
    margin = stats.norm.ppf((1 + CONFIDENCE) / 2) * np.std(drawn, axis=0)
    rates = []
    for a, rate, by in zip(stated, found, margin[1:], strict=True):
        exact = stats.binomtest(round(rate * inside), inside).proportion_ci(CONFIDENCE)
        low, high = max(0.0, min(rate - by, exact.low)), min(1.0, max(rate + by, exact.high))
        rates.append((a, Interval(float(rate), float(low), float(high))))
    return Attack(Interval(area, float(area - margin[0]), float(area + margin[0])), tuple(rates), *curve)


def ceilings(segments: Sequence[Segment], delta: float, false_positives: Sequence[float]) -> list[float]:
    """The largest true-positive rate that the guarantee of these steps allows any attacker, at each false-positive
    rate.
    """
    if np.isinf(spent(segments, delta).epsilon):
        return [1.0] * len(false_positives)
    below = claims_inverse_blow_up(segments, delta)
    return [min(1.0, 1 - below(1 - a)) for a in false_positives]


def is_refuted(scores: Floats, included: Coins, segments: Sequence[Segment], delta: float) -> bool:
    """Whether the first model's members are told too well for the guarantee of these steps.

    The answer is wrong with a probability of at most 1 - `CONFIDENCE`. The model's records are canaries of an audit in
    one run (`one_run.py`): their coins are fair and independent, and the guarantee holds for each.
    """
    each = 1 - (1 - CONFIDENCE) / len(SHARES)
    return any(claim_is_refuted(g, segments, delta, each) for g in guess(scores[0], included[0]))


def _confidences(losses: Floats) -> Floats:
    """log p / (1 - p) for p = e^-loss, nearly normal (Carlini et al., section V.C), minus each model's median."""
    found = -np.log(np.expm1(np.clip(losses, LEAST_LOSS, 700.0)))
    return np.asarray(found - np.median(found, axis=1, keepdims=True))


def _ratio(target: Floats, shadows: Floats, included: Coins) -> Floats:
    """Scores [n] of one model, from the confidences of the others, [S, n]."""
    num_in, num_out = included.sum(0), (~included).sum(0)
    mean_in = (shadows * included).sum(0) / np.maximum(1, num_in)
    mean_out = (shadows * ~included).sum(0) / np.maximum(1, num_out)
    squares_in = ((shadows - mean_in) ** 2 * included).sum(0)
    squares_out = ((shadows - mean_out) ** 2 * ~included).sum(0)
    freedom_in, freedom_out = np.maximum(0, num_in - 1), np.maximum(0, num_out - 1)
    var_in = max(1e-12, squares_in.sum() / max(1, freedom_in.sum()))
    var_out = max(1e-12, squares_out.sum() / max(1, freedom_out.sum()))
    # what the record adds: x_in - x_out where both were seen, shrunk towards its mean as far as it is noise (James and
    # Stein)
    both = (num_in > 0) & (num_out > 0)
    error = var_in / np.maximum(1, num_in) + var_out / np.maximum(1, num_out)
    difference = mean_in - mean_out
    mean = difference[both].mean() if both.any() else 0.0
    spread = max(0.0, difference[both].var() - error[both].mean()) if both.any() else 0.0
    kept = np.where(both, spread / (spread + error), 0.0)
    added = mean + kept * (difference - mean)
    without = (num_out * mean_out + num_in * (mean_in - added)) / len(shadows)
    # one factor a record on both variances, shrunk towards 1
    wider = (PRIOR + squares_in / var_in + squares_out / var_out) / (PRIOR + freedom_in + freedom_out)
    as_member, as_other = wider * var_in, wider * var_out
    return np.asarray(
        (target - without) ** 2 / (2 * as_other)
        - (target - without - added) ** 2 / (2 * as_member)
        + np.log(as_other / as_member) / 2
    )


def _curve(member: Coins, ends: NDArray[np.int_], weights: Floats) -> tuple[Floats, Floats]:
    """Rates of false and of true positives, with a threshold after each of `ends`, from (0, 0) to (1, 1)."""
    all_, true = np.cumsum(weights)[ends], np.cumsum(weights * member)[ends]
    false = all_ - true
    return np.append(0.0, false / false[-1]), np.append(0.0, true / true[-1])


def _area(false_positives: Floats, true_positives: Floats) -> float:
    """By the trapezoid rule, so that ties count half."""
    return float((np.diff(false_positives) * (true_positives[1:] + true_positives[:-1])).sum() / 2)
