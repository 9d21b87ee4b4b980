"""The audit's mathematics against published figures, naive sums, an independent implementation and simulations."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, special, stats

from hf_dp import accounting
from hf_dp.audit import one_run
from hf_dp.audit.claim import claim_is_refuted, claims_inverse_blow_up
from hf_dp.audit.one_run import Guesses, bounds, ceiling, epsilon_bound, gaussian_epsilon, mu_bound, p_value
from hf_dp.audit.report import audit_record, counted
from hf_dp.audit.scores import SHARES, area_under_curve, guess, log_likelihood_ratio
from hf_dp.errors import AuditError
from hf_dp.mechanism import Segment

E2E = Segment(1022 / 42061, 0.678, 410)  # epsilon 8.0 at delta 1e-5


def naive_p_value(m, r, v, epsilon, delta):
    """Term by term, with whole-number binomials."""
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    mass = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    extra = max([sum(mass[v - i : v]) / i for i in range(1, v + 1)], default=0.0)
    return min(1.0, sum(mass[v:]) + 2 * m * delta * extra)


GRID = [
    (m, r, v, epsilon, delta)
    for m, r in ((1, 1), (40, 10), (300, 100), (1000, 100))
    for v in sorted({0, 1, r // 2, (9 * r) // 10, r})
    for epsilon in (0.0, 0.5, 2.0)
    for delta in (0.0, 1e-6, 1e-2)
]


def test_p_values_are_the_theorems_sums():
    for m, r, v, epsilon, delta in GRID:
        assert p_value(Guesses(m, r, v), epsilon, delta) == pytest.approx(
            naive_p_value(m, r, v, epsilon, delta), rel=1e-10, abs=1e-14
        )


def test_p_values_and_bounds_are_those_of_jax_privacy():
    theirs = pytest.importorskip("jax_privacy.auditing", reason="jax_privacy is not installed")  # 2.0
    for m, r, v, epsilon, delta in GRID:
        ours = p_value(Guesses(m, r, v), epsilon, delta)
        assert ours == pytest.approx(theirs._one_run_p_value(m, r, v, epsilon, delta), rel=1e-10, abs=1e-12)
    for guesses in (Guesses(1000, 100, 95), Guesses(300, 300, 300), Guesses(400, 60, 45), Guesses(400, 60, 31)):
        one_run, gaussian = (
            bound(0.0, *guesses, 0.05, 1e-5) for bound in (theirs._epsilon_one_run, theirs._epsilon_one_run_fdp)
        )
        assert bounds(guesses, 1e-5) == pytest.approx((one_run, gaussian), abs=1e-5)


def test_bounds_are_the_figures_that_were_published_or_computed_independently():
    assert bounds(Guesses(1000, 100, 95), 1e-5) == pytest.approx((2.16518, 3.32330), abs=1e-5)
    ceilings = {10: 1.05, 50: 2.79, 100: 3.49, 200: 4.19, 500: 5.11, 1000: 5.81, 5000: 7.42, 10_000: 8.11}
    for r, expected in ceilings.items():
        assert epsilon_bound(Guesses(r, r, r), 0.0) == pytest.approx(expected, abs=0.006)  # two digits
        assert 1 / (1 + math.exp(-epsilon_bound(Guesses(r, r, r), 0.0))) ** r == pytest.approx(0.05)  # in closed form
    assert ceiling(1000, 1e-5).epsilon_gaussian == pytest.approx(12.3, abs=0.05)


def published_scores(shift):
    """20,000 canaries with the quantiles of two normals as scores: true and false positives at each threshold."""
    quantiles = special.ndtri((np.arange(10_000) + 0.5) / 10_000)
    thresholds = np.unique(np.concatenate([quantiles, quantiles + shift]))
    inside = 10_000 - np.searchsorted(quantiles + shift, thresholds)
    outside = 10_000 - np.searchsorted(quantiles, thresholds)
    return inside, outside


def hull(points):
    """The corners of the upper hull of points (false positives, true positives), from the origin on."""
    corners: list[tuple[int, int]] = []
    for x, y in sorted(points):
        while len(corners) > 1:
            (a, b), (c, d) = corners[-2:]
            if (c - a) * (y - b) - (x - a) * (d - b) < 0:
                break
            corners.pop()
        corners.append((x, y))
    return corners


@pytest.mark.parametrize(("shift", "expected"), [(1, 1.13346), (2, 2.311945), (4, 4.395568)])
def test_jax_privacys_published_bounds(shift, expected):
    inside, outside = published_scores(shift)
    corners = hull({(0, 0), *zip(outside.tolist(), inside.tolist(), strict=True)})
    tau = 0.05 / len(corners)
    refuted = []
    for epsilon in (expected * (1 - 1e-5), expected * (1 + 1e-5)):
        right_with = 1 / (1 + math.exp(-epsilon))
        possible = [(f, t) for f, t in corners if t and stats.binom.sf(t - 1, f + t, right_with) < tau]
        refuted.append(any(p_value(Guesses(20_000, f + t, t), epsilon, 1e-6) < tau for f, t in possible))
    assert refuted == [True, False]


@pytest.mark.parametrize(("shift", "expected"), [(1, 2.164749), (2, 4.7218075), (4, 9.133752)])
def test_jax_privacys_published_gaussian_bounds_to_one_per_cent(shift, expected):
    inside, outside = published_scores(shift)
    corners = hull({(0, 0), *zip(outside.tolist(), inside.tolist(), strict=True)})
    confidence = 1 - 0.05 / len(corners)
    some = [Guesses(20_000, f + t, t) for f, t in corners if f + t]
    found = []
    for mu in (mu_of(expected * 0.99), mu_of(expected * 1.01)):
        curve = lambda x, mu=mu: float(special.ndtr(special.ndtri(x) - mu))  # noqa: E731
        found.append(any(one_run.refutes(g, curve, confidence) for g in some))
    assert found == [True, False]


def mu_of(epsilon):
    return optimize.brentq(lambda mu: gaussian_epsilon(mu, 1e-6) - epsilon, 0.01, 20.0)


def test_epsilon_of_gaussian_differential_privacy():
    for mu, delta in itertools.product((0.05, 0.5, 1.67, 6.0), (1e-8, 1e-5, 0.01)):
        exact = accounting.spent([Segment(1.0, 1 / mu, 1)], delta).epsilon
        assert gaussian_epsilon(mu, delta) == pytest.approx(exact, rel=1e-3)  # an accountant's grid
        assert gaussian_epsilon(mu, delta) <= exact + 1e-9
    assert gaussian_epsilon(0.0, 1e-5) == gaussian_epsilon(1e-6, 0.01) == 0.0
    for wrong in ((1.0, 0.0), (1.0, 1.0), (-1.0, 0.1), (math.nan, 0.1), (1.0, math.nan)):
        with pytest.raises(AuditError):
            gaussian_epsilon(*wrong)


def test_bounds_grow_with_right_guesses_and_confidence_costs():
    found = [bounds(Guesses(300, 100, v), 1e-5) for v in range(50, 101, 5)]
    assert found == sorted(found)
    assert found[0] == (0.0, 0.0)
    assert all(
        a <= b
        for a, b in zip(bounds(Guesses(300, 100, 90), 1e-5, 0.99), bounds(Guesses(300, 100, 90), 1e-5), strict=True)
    )
    assert epsilon_bound(Guesses(300, 100, 90), 1e-3) < epsilon_bound(Guesses(300, 100, 90), 1e-5)


@pytest.mark.parametrize(
    "wrong", [Guesses(10, 11, 5), Guesses(10, 5, 6), Guesses(10, 5, -1), Guesses(0, 0, 0)], ids=str
)
def test_counts_that_cannot_be_are_refused(wrong):
    for function in (lambda: p_value(wrong, 1.0, 0.0), lambda: mu_bound(wrong), lambda: epsilon_bound(wrong, 0.0)):
        with pytest.raises(AuditError, match="right guesses <= guesses <= canaries"):
            function()
    with pytest.raises(AuditError, match="delta"):
        p_value(Guesses(10, 5, 5), 1.0, math.nan)
    with pytest.raises(AuditError, match="confidence"):
        epsilon_bound(Guesses(10, 5, 5), 0.0, 1.0)


def test_no_guess_refutes_nothing_and_a_bound_beyond_reason_is_an_error():
    assert bounds(Guesses(10, 0, 0), 1e-5) == (0.0, 0.0)
    with pytest.raises(AuditError, match="everything up to 100"):
        one_run._first_not_refuted(lambda epsilon: True)


def test_a_mechanism_that_says_nothing_is_refuted_only_where_fair_coins_are():
    differing = []
    for r in range(1, 40):
        for v in range(r + 1):
            coins, refuted = stats.binom.sf(v - 1, r, 0.5), one_run.refutes(Guesses(r, r, v), lambda x: x)
            assert coins < 0.05 or not refuted
            if refuted != (coins < 0.05):
                differing.append(coins)
    assert len(differing) < 20  # the bound is not exact, but nearly
    assert min(differing) > 0.04


def test_the_recursion_by_hand_for_two_right_guesses():
    """H = 0, R = 0.05. i = 1: H' = g(0.05) = 0.4, R = 0.45. i = 0: H' = g(0.45). Refuted if 0.45 + g(0.45) > 1."""
    for last, refuted in ((0.54, False), (0.56, True)):
        curve = {0.05: 0.4, 0.45: last}
        assert one_run.refutes(Guesses(2, 2, 2), lambda x, curve=curve: curve[round(x, 9)]) is refuted


def audited(scores, included):
    """What the scores show of a run that claims nothing."""
    return audit_record(counted("gradient", scores, included), (), 1e-5, math.inf)


def best_bounds(scores, included, delta):
    """The best bounds of all shares of the canaries, with 95 % confidence each."""
    found = [bounds(g, delta, 1 - 0.05 / len(SHARES)) for g in guess(scores, included)]
    return one_run.Bounds(max(b.epsilon for b in found), max(b.epsilon_gaussian for b in found))


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_guesses_are_the_highest_and_lowest_scores_on_a_fixed_list():
    included = np.array([True, False] * 50)
    scores = np.where(included, 1.0, 0.0) + np.arange(100) / 1000
    assert guess(scores, included) == [Guesses(100, n, n) for n in (10, 30, 100)]
    assert [n / 100 for n in (10, 30, 100)] == list(SHARES)
    assert guess(-scores, included) == [Guesses(100, n, 0) for n in (10, 30, 100)]
    assert area_under_curve(scores, included) == 1.0
    assert area_under_curve(np.zeros(100), included) == 0.5
    found = audited(scores, included)
    assert found.epsilon_at_least == found.ceiling
    assert found.epsilon_at_least_if_gaussian == found.ceiling_if_gaussian
    assert found.epsilon_at_least == epsilon_bound(Guesses(100, 100, 100), 1e-5, 1 - 0.05 / 6)


def test_the_likelihood_ratio_is_that_of_normals():
    x, normal = np.random.default_rng(0).standard_normal((6, 4)), stats.norm
    for q in (0.3, 1.0):
        ratio = q * normal.pdf(x, 1, 0.7) / normal.pdf(x, 0, 0.7) + 1 - q
        assert log_likelihood_ratio(x, q, 0.7) == pytest.approx(np.log(ratio).sum(0), rel=1e-10)


def test_scores_without_meaning_are_refused():
    coins = np.array([True, False, True])
    with pytest.raises(AuditError, match="not all finite"):
        audited(np.array([1.0, math.nan, 0.0]), coins)
    with pytest.raises(AuditError, match="one side"):
        audited(np.zeros(3), np.ones(3, dtype=bool))


# ---- simulated audits ------------------------------------------------------------------------------------------------


def gaussian_audit(generator, m, mu, delta):
    included = generator.random(m) < 0.5
    return best_bounds(generator.standard_normal(m) + mu * included, included, delta)


def test_of_200_correct_audits_at_most_as_many_exceed_the_claim_as_the_confidence_allows():
    """Canaries of exactly mu-GDP each, the worst that the claim allows; 5 % of 200 and 3 standard errors are 19."""
    generator = np.random.default_rng(8)  # a fixed draw: about 2 % exceed it
    mu = 0.5
    claimed = gaussian_epsilon(mu, 1e-5)
    results = [gaussian_audit(generator, 300, mu, 1e-5) for _ in range(200)]
    for which in range(2):
        assert sum(b[which] > claimed for b in results) <= 200 * (0.05 + 3 * math.sqrt(0.05 * 0.95 / 200))
    claimed = gaussian_epsilon(mu / 4, 1e-5)  # four times the noise was claimed: seen in 127 of 200 of this draw
    assert sum(b.epsilon_gaussian > claimed for b in results) > 100


def simulated_run(generator, m, segment, noise_scale=1.0):
    """Projections [T, m] of canaries with orthogonal gradients of norm C, each put in by a fair coin."""
    q, sigma, steps, *_ = segment
    included = generator.random(m) < 0.5
    drawn = (generator.random((steps, m)) < q) & included
    return drawn + noise_scale * sigma * generator.standard_normal((steps, m)), included


def test_audits_of_the_subsampled_gaussian_are_healthy_at_epsilon_8_and_see_its_noise_missing():
    generator = np.random.default_rng(1)
    claimed = accounting.spent([E2E], 1e-5).epsilon
    assert claimed == pytest.approx(8.0, abs=0.05)
    projections, included = simulated_run(generator, 1000, E2E)
    by_sum, by_ratio = (
        best_bounds(scores, included, 1e-5)
        for scores in (
            projections.sum(0),
            log_likelihood_ratio(projections, E2E.sample_rate, E2E.joint_noise_multiplier),
        )
    )
    # expected 1.1 and 1.5 of the sums, 1.7 and 2.4 of the ratios; between runs they vary by about 0.4 either way
    assert 0.4 < by_sum.epsilon < 1.8
    assert 1.0 < by_ratio.epsilon < by_ratio.epsilon_gaussian < 3.5
    right = guess(log_likelihood_ratio(projections, *E2E[:2]), included)
    assert not any(claim_is_refuted(g, [E2E], 1e-5, 1 - 0.05 / 3) for g in right)


def test_the_claims_own_trade_off_refutes_what_the_general_theorem_cannot():
    segment = Segment(0.2, 1.6, 40)
    claimed = accounting.spent([segment], 1e-5).epsilon
    generator = np.random.default_rng(2)
    projections, included = simulated_run(generator, 300, segment, noise_scale=1 / 4)
    guesses = guess(log_likelihood_ratio(projections, 0.2, 0.4), included)[-1]
    assert claim_is_refuted(guesses, [segment], 1e-5)
    assert epsilon_bound(guesses, 1e-5) < claimed
    honest, included = simulated_run(generator, 300, segment)
    guesses = guess(log_likelihood_ratio(honest, 0.2, 1.6), included)[-1]
    assert not claim_is_refuted(guesses, [segment], 1e-5)


def test_the_claims_curve_lies_below_the_gaussian_one_that_it_is():
    curve = claims_inverse_blow_up([Segment(1.0, 2.0, 1)], 1e-9)
    for x in (0.001, 0.05, 0.3, 0.8, 0.999):
        exact = float(special.ndtr(special.ndtri(x) - 0.5))
        assert exact * (1 - 0.02) - 1e-5 <= curve(x) <= exact + 1e-12
    with pytest.raises(AuditError, match="without noise"):
        claims_inverse_blow_up([Segment(0.1, 0.0, 5)], 1e-5)
