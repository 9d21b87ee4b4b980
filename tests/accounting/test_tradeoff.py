"""The best attacker's rates: published numbers, the Gaussian's closed form, and what must hold for any mechanism."""

import math
import statistics
from itertools import pairwise

import pytest

from hf_dp.accounting.epsilon import deltas, spent
from hf_dp.accounting.tradeoffs import RATES, tradeoff
from hf_dp.errors import AccountingError
from hf_dp.mechanism import Segment

NORMAL = statistics.NormalDist()


def at(segments, rate, delta=1e-5):
    return tradeoff(segments, delta).true_positive_rates[RATES.index(rate)]


@pytest.mark.parametrize(
    ("sigma", "advantage", "rates"),
    [
        (0.678, 0.43, (0.043, 0.152, 0.467)),
        pytest.param(1.018, 0.24, (0.008, 0.047, 0.256), marks=pytest.mark.slow),
        pytest.param(2.0, 0.10, (0.002, 0.020, 0.155), marks=pytest.mark.slow),
    ],
)
def test_rates_at_q_0243_and_410_steps_are_those_of_an_independent_computation(sigma, advantage, rates):
    """By riskcal on the same privacy loss distribution, to the digits given (half a unit of the last is rounding)."""
    segment = [Segment(0.0243, sigma, 410)]
    assert tradeoff(segment, 1e-5).advantage == pytest.approx(advantage, abs=0.005)
    assert [at(segment, rate) for rate in (0.001, 0.01, 0.1)] == pytest.approx(rates, abs=5.1e-4)


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (20.0, 100), (5.0, 3)])
def test_full_batches_have_the_gaussians_own_curve(sigma, steps):
    """TPR = Phi(Phi^-1(FPR) + mu) with mu = sqrt(T) / sigma (Dong, Roth, Su 2022, equation 6). The hull of finitely
    many pairs lies above it: by less than 0.002 where FPR is 0.001 or more."""
    mu = math.sqrt(steps) / sigma
    curve = tradeoff([Segment(1.0, sigma, steps)], 1e-5)
    for rate, found in zip(RATES[1:-1], curve.true_positive_rates[1:-1], strict=True):
        exact = NORMAL.cdf(NORMAL.inv_cdf(rate) + mu)
        assert exact - 1e-12 <= found <= exact + 2e-3
    assert curve.advantage == pytest.approx(2 * NORMAL.cdf(mu / 2) - 1, abs=1e-9)


@pytest.mark.parametrize("segments", [[Segment(0.05, 0.8, 50)], [Segment(0.2, 2.0, 20), Segment(0.01, 0.6, 100)]])
def test_any_curve_is_concave_above_guessing_and_below_what_epsilon_allows(segments):
    curve, delta = tradeoff(segments, 1e-6), 1e-6
    epsilon = spent(segments, delta).epsilon
    points = list(zip(RATES, curve.true_positive_rates, strict=True))
    slopes = [(d - b) / (c - a) for (a, b), (c, d) in pairwise(points)]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(slopes))
    for rate, found in points:
        assert rate <= found <= min(1.0, delta + math.exp(epsilon) * rate) + 1e-12
    assert 0 < max(b - a for a, b in points) <= curve.advantage + 1e-9


def test_more_steps_help_the_attacker_and_none_leave_guessing():
    few, many = at([Segment(0.05, 1.0, 10)], 0.01), at([Segment(0.05, 1.0, 40)], 0.01)
    assert 0.01 < few < many
    assert tradeoff([], 1e-5).true_positive_rates == pytest.approx(RATES)
    assert tradeoff([], 1e-5).advantage == 0


def test_without_noise_the_attacker_knows():
    assert tradeoff([Segment(0.05, 0.0, 1)], 1e-5).advantage == 1
    assert deltas([Segment(0.05, 0.0, 1)], [1.0]) == [1.0]


def test_invalid_segments_are_refused():
    with pytest.raises(AccountingError, match="noise_multiplier"):
        tradeoff([Segment(0.05, math.nan, 1)], 1e-5)
