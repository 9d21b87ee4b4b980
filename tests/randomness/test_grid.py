"""Whole numbers of bounded norm from any floats; the proof's inequalities; epsilon of discrete noise twice."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch

from hf_dp import accounting
from hf_dp.accounting.epsilon import DISCRETE_MOST, _step_rdp, deltas, spent
from hf_dp.config import PrivacyConfig
from hf_dp.errors import ConfigError
from hf_dp.mechanism import Segment
from hf_dp.randomness.grid import MIN_SIGMA, STD, Grid, grid_for, integer_sensitivity
from hf_dp.step.integers import squared_norm, to_integers

DIMENSION = 5000
SIGMAS = (MIN_SIGMA, 0.7, 1.0, 3.3, 1000.0, 20_000.0)


def norm_squared(integers: list[torch.Tensor]) -> int:
    return sum(int(n) ** 2 for z in integers for n in z.flatten().tolist())


def adversarial() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(DIMENSION, generator=generator)
    spike = torch.zeros(DIMENSION)
    spike[17] = 1.0
    return {
        "ordinary": g,
        "double": g.double(),
        "bfloat16": g.bfloat16(),
        "huge": g * 3e37,
        "beyond float32": torch.full((DIMENSION,), 3e38),
        "beyond float64": torch.full((DIMENSION,), 1e308, dtype=torch.float64),
        "denormal": g * 1e-41,
        "zero": torch.zeros(DIMENSION),
        "one coordinate": spike * 1e20,
        "small": g * 1e-9,
        "infinite": torch.where(spike > 0, math.inf, g),
        "minus infinite": torch.where(spike > 0, -math.inf, g),
        "nan": torch.where(spike > 0, math.nan, g),
        "all nan": torch.full((DIMENSION,), math.nan),
        "all alike": torch.ones(DIMENSION),
        "signs": torch.where(g > 0, 1.0, -1.0),
    }


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("name", adversarial())
@pytest.mark.parametrize("clip_norm", [1e-20, 0.1, 1e20])
def test_whatever_the_floats_the_integers_are_bounded(name: str, sigma: float, clip_norm: float) -> None:
    g, grid = adversarial()[name], grid_for(sigma, clip_norm, DIMENSION)
    integers = to_integers([g[:123].view(3, 41), g[123:]], grid)
    assert [z.shape for z in integers] == [(3, 41), (DIMENSION - 123,)]
    assert all(z.dtype == torch.int64 for z in integers)
    found = norm_squared(integers)
    assert found <= grid.sensitivity**2
    norm = float(g.double().norm())  # infinite where squares leave float64
    if not math.isfinite(norm):
        assert found == 0
    elif norm > clip_norm:  # clipped to R and rounded, not lost
        assert found >= (grid.radius * (1 - 1e-9) - math.sqrt(DIMENSION) / 2) ** 2 > 0


@pytest.mark.parametrize("offset", [0.0, 0.499, 0.5, 0.501])
def test_rounding_all_coordinates_upwards_stays_within(offset: float) -> None:
    """A gradient of norm R with each coordinate as far from a whole number as can be."""
    size = 1_000_000
    grid = grid_for(2.0, 1.0, size)
    whole = math.floor(grid.radius / math.sqrt(size) - offset)
    g = torch.full((size,), (whole + offset) * grid.step, dtype=torch.float64)
    integers = to_integers([g], grid)
    assert norm_squared([z.unique() for z in integers]) > 0
    assert 0 < squared_norm(integers, grid.sensitivity) <= grid.sensitivity**2


def test_a_norm_that_floats_got_wrong_counts_as_zero() -> None:
    """A grid that clips too late stands for arithmetic gone astray: the exact sum is what decides."""
    grid = grid_for(1.0, 1.0, DIMENSION)
    g = torch.full((DIMENSION,), 1.0)
    for radius, kept in ((grid.radius, True), (grid.sensitivity * 1.001, False), (grid.sensitivity * 1e12, False)):
        (z,) = to_integers([g], Grid(1e-30, grid.sensitivity, radius))
        assert bool((z != 0).all()) == kept
        assert bool((z == 0).all()) != kept


def test_the_sum_of_squares_is_exact() -> None:
    generator = torch.Generator().manual_seed(1)
    for bound in (1, 1000, 1 << 24):
        z = torch.randint(-bound, bound + 1, (40_000,), generator=generator)
        z[:36_000] = bound  # 36,000 squares of 2**48 would leave int64, were they added at once
        assert squared_norm([z[:11], z[11:].view(-1, 1), z[:0]], bound) == norm_squared([z])


def test_the_grid() -> None:
    for sigma in SIGMAS:
        grid, most = grid_for(sigma, 0.3, 10_000), integer_sensitivity(sigma)
        assert Fraction(STD, most) >= Fraction(sigma)  # never less noise than is accounted
        assert Fraction(STD, most + 1) < Fraction(sigma)
        assert grid.sensitivity == most <= 1 << 24
        assert (
            most / 2 < grid.radius <= most - math.sqrt(10_000) / 2 - 1
        )  # room for rounding, and for the floats before it
        assert grid.step * STD == pytest.approx(sigma * 0.3, rel=1e-15)
        assert grid.step * most <= 0.3 * (1 + 1e-15)


@pytest.mark.parametrize("sigma", [0.0, 0.2499, math.nan, math.inf, -1.0])
def test_too_little_noise_is_refused(sigma: float) -> None:
    with pytest.raises(ConfigError, match=r"noise='discrete' needs a noise_multiplier of at least 0\.25"):
        grid_for(sigma, 1.0, 10)
    if math.isfinite(sigma) and sigma >= 0:
        with pytest.raises(ConfigError, match=r"at least 0\.25 \(got"):
            accounting.plan_mechanism(PrivacyConfig(noise_multiplier=sigma, noise="discrete"), 1000, num_train_epochs=1)


def test_a_target_that_takes_too_little_noise_is_refused() -> None:
    privacy = PrivacyConfig(target_epsilon=60.0, noise="discrete", expected_batch_size=10)
    with pytest.raises(ConfigError, match=r"at least 0\.25 \(got 0\."):
        accounting.plan_mechanism(privacy, 1000, num_train_epochs=0, max_steps=1)


def test_rounding_may_not_take_half_of_the_clip_norm() -> None:
    sigma = 10_000.0  # D = 419
    grid_for(sigma, 1.0, 415**2)
    with pytest.raises(ConfigError, match=r"no room for 176,400 coordinates at noise_multiplier 10000"):
        grid_for(sigma, 1.0, 420**2)


def test_metrics_have_no_place_on_the_grid() -> None:
    with pytest.raises(ConfigError, match="log_loss_up_to has no place on the grid"):
        PrivacyConfig(noise_multiplier=1.0, noise="discrete", log_loss_up_to=3.0)


# ---- the proof, computed ---------------------------------------------------------------------------------------------


def divergences(std: float, shift: tuple[int, ...], q: float, order: float) -> tuple[float, float]:
    """Rényi divergences of M = (1-q) P + q Q from P, and of P from M, for P = N_Z(0, std²)^d: sums over the lattice."""
    reach = 30 * math.ceil(std) + math.ceil(order) * max(
        map(abs, shift)
    )  # Q's j-th moment sits around j times the shift
    axes = [np.arange(-reach, reach + 1, dtype=np.float64) for _ in shift]
    places = np.meshgrid(*axes, indexing="ij")
    log_p = -sum(x**2 for x in places) / (2 * std**2)
    log_p -= np.logaddexp.reduce(log_p, axis=None)
    log_l = sum((2 * x * z - z**2) / (2 * std**2) for x, z in zip(places, shift, strict=True))
    log_m = np.logaddexp(np.log1p(-q) if q < 1 else -np.inf, np.log(q) + log_l)  # of M / P
    moments = (np.logaddexp.reduce(log_p + a * log_m, axis=None) for a in (order, 1 - order))
    forward, backward = (float(m) / (order - 1) for m in moments)
    return forward, backward


@pytest.mark.parametrize("q", [0.01, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("std", "shift"), [(1, (1,)), (2, (3,)), (8, (8,)), (2, (1, 2)), (3, (-3, 0)), (0.7, (1,))])
def test_the_divergence_is_at_most_the_continuous_ones(q: float, std: float, shift: tuple[int, ...]) -> None:
    """At whole orders, both directions are within dp-accounting's number; the first equals it where |z| = S / sigma."""
    sigma = std / math.hypot(*shift)
    orders = [*range(2, 12), 16, 20]
    accounted = dict(zip(_default_orders(), _step_rdp(q, sigma), strict=True))
    for order in orders:
        forward, backward = divergences(std, shift, q, order)
        assert forward == pytest.approx(accounted[order], rel=1e-9, abs=2e-13)
        assert backward <= forward * (1 + 1e-9) + 1e-13
        assert backward < forward * 0.999 or q > 0.4  # and not by a slip the same number
        less, _ = divergences(std * 1.1, shift, q, order)
        assert less < accounted[order]


def _default_orders() -> list[float]:
    from dp_accounting import rdp

    return list(rdp.RdpAccountant().orders)


def by_hand(q: float, sigma: float, steps: int, delta: float) -> float:
    """Epsilon from the sum in the proof, in 60 decimal digits, at whole orders up to 63.

    Canonne, Kamath, Steinke 2020, proposition 12.
    """
    with localcontext() as context:
        context.prec = 60
        p, s, found = Decimal(q), Decimal(sigma), []
        for a in range(2, 64):
            terms = (
                Decimal(math.comb(a, j)) * (1 - p) ** (a - j) * p**j * (Decimal(j * (j - 1)) / (2 * s * s)).exp()
                for j in range(a + 1)
            )
            divergence = steps * sum(terms, Decimal(0)).ln() / (a - 1)
            found.append(divergence + (1 - 1 / Decimal(a)).ln() - (Decimal(delta) * a).ln() / (a - 1))
        return float(min(found))


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta", "golden"),
    [
        (1024 / 42061, 0.7, 410, 8e-6, 8.607350448),
        (0.01, 1.0, 1000, 1e-5, 2.107753076),
        (0.1, 4.0, 100, 1e-6, 1.228298730),
    ],
)
def test_epsilon_is_that_of_the_proof(q: float, sigma: float, steps: int, delta: float, golden: float) -> None:
    segment = Segment(q, sigma, steps, "discrete")
    found, exact = spent([segment], delta), by_hand(q, sigma, steps, delta)
    assert found.epsilon == found.rdp == pytest.approx(golden, rel=1e-8)
    assert math.isinf(found.pld)
    assert exact <= found.epsilon <= exact * (1 + 1e-6)  # rounding is charged, and little of it
    continuous = spent([segment._replace(noise="gaussian")], delta)
    assert continuous.rdp <= found.rdp < continuous.rdp * 1.02  # fractional orders gain that little
    assert continuous.epsilon < found.epsilon


def test_what_is_composed_with_discrete_noise_is_accounted_as_it_is() -> None:
    discrete, continuous = Segment(0.02, 0.8, 100, "discrete"), Segment(0.02, 0.8, 50)
    both, other = spent([discrete, continuous], 1e-5), spent([continuous, discrete], 1e-5)
    assert both == other == spent([discrete._replace(num_steps=150)], 1e-5)
    assert math.isinf(both.pld)
    assert both.epsilon > spent([continuous._replace(num_steps=150)], 1e-5).epsilon


def test_no_epsilon_above_a_hundred_is_claimed() -> None:
    """Where e**epsilon times the sampler's distance might show in delta."""
    assert 50 < spent([Segment(1.0, 1.0, 80, "discrete")], 1e-6).epsilon < DISCRETE_MOST
    assert spent([Segment(1.0, 1.0, 150, "discrete")], 1e-6) == (math.inf,) * 3
    assert math.isfinite(spent([Segment(1.0, 1.0, 150)], 1e-6).epsilon)


def test_deltas_are_those_of_the_same_account() -> None:
    segment = Segment(0.02, 0.8, 300, "discrete")
    epsilon = spent([segment], 1e-6).epsilon
    curve = deltas([segment], [0.0, 0.5, epsilon, epsilon + 1, 1000.0])
    assert curve == sorted(curve, reverse=True)
    assert curve[2] == pytest.approx(1e-6, rel=1e-6)
    assert 0 < curve[-1] <= 2e-30
    assert all(
        a > b for a, b in zip(curve, deltas([segment._replace(noise="gaussian")], [0.0, 0.5, epsilon]), strict=False)
    )


def test_a_target_is_met_and_not_wasted() -> None:
    size = {"target_epsilon": 8.0, "target_delta": 8e-6, "expected_batch_size": 1024}
    sigmas = {}
    for noise in ("gaussian", "discrete"):
        m = accounting.plan_mechanism(PrivacyConfig(**size, noise=noise), 42061, num_train_epochs=10)
        sigmas[noise] = m.noise_multiplier
        assert 7.99 < spent(m.segments(), m.delta).epsilon <= 8
    assert sigmas == {"gaussian": 0.68264, "discrete": 0.71815}
    rows = {r.name: r for r in accounting.derivation(PrivacyConfig(**size, noise="discrete"), m, num_train_epochs=10)}
    assert rows["integer sensitivity D"].value == f"{integer_sensitivity(0.71815):,}"
    assert rows["epsilon"].value == rows["epsilon by RDP"].value
    assert "epsilon by PLD" not in rows
    step = accounting.affordable_steps([], m.segments(0, 1000), target_epsilon=8.0, delta=8e-6)
    assert 410 <= step <= 412
