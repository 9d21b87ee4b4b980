"""Epsilon against golden values, closed forms and an independent convolution; the plan, the budget, the refusals."""

import math
import random
from pathlib import Path

import dp_accounting as da
import numpy as np
import pytest
from scipy.stats import norm

from hf_dp import accounting
from hf_dp.accounting import cells, epsilon
from hf_dp.accounting.derivation import derivation
from hf_dp.accounting.epsilon import spent
from hf_dp.accounting.plan import affordable_steps, plan_mechanism
from hf_dp.config import PrivacyConfig
from hf_dp.errors import AccountingError, ConfigError, HfDpError
from hf_dp.mechanism import Segment, default_delta, steps_per_epoch
from tests.support import fft_accountant
from tests.support.marks import quick

PACKAGE = Path(accounting.__file__).parent

# name: (segment, delta, certified lower bound, best estimate). Bounds: optimistic privacy buckets at 1e-5. Estimates:
# prv-accountant at eps_error 0.01 and PLD on the finest grid, which agree to four digits or more.
GOLDEN = {
    "e2e, 10 epochs": (Segment(0.0243, 0.8, 410), 1e-5, 5.1945, 5.1966),
    "generic": (Segment(0.01, 1.0, 1000), 1e-5, 1.8232, 1.8282),
    "weak noise": (Segment(0.024, 0.5, 410), 1e-5, 18.7112, 18.7133),
    "sigma 0.4": (Segment(0.01, 0.4, 1000), 1e-5, 27.7137, 27.7186),
    "small q, long": (Segment(0.001, 1.5, 10_000), 1e-6, 0.2863, 0.29633),
    "large q": (Segment(0.1, 2.0, 300), 1e-5, 4.1818, 4.1833),
    "full batch": (Segment(1.0, 20.0, 100), 1e-5, 1.9926, 1.9931),
    "tiny epsilon": (Segment(0.01, 20.0, 100), 1e-5, 0.0121, 0.01261),
    "mnist": (Segment(256 / 60_000, 1.1, 14_062), 1e-5, 2.3715, 2.3816),
    "epsilon 0.15": (Segment(0.01, 8.0, 1000), 1e-6, 0.1439, 0.14898),
}


# ---- A1, A4, A5: the value -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values_are_met_from_above_and_within_half_a_percent(name: str) -> None:
    segment, delta, lower_bound, estimate = GOLDEN[name]
    found = spent([segment], delta)
    assert found.epsilon == min(found.pld, found.rdp)
    assert found.epsilon >= lower_bound
    assert (
        estimate * (1 - 5e-5) <= found.epsilon <= estimate * 1.005
    )  # the estimates are rounded to four or five digits


@pytest.mark.parametrize("name", GOLDEN)
def test_an_independent_convolution_agrees(name: str) -> None:
    segment, delta, lower_bound, _ = GOLDEN[name]
    twin = fft_accountant.epsilon([segment[:3]], delta)
    assert twin >= lower_bound
    assert twin * (1 - 1e-4) <= spent([segment], delta).epsilon <= twin * 1.005  # 1e-4: the twin's own grid


@pytest.mark.parametrize(
    "segments",
    [
        [Segment(0.0243, 0.8, 300), Segment(0.05, 1.5, 60)],
        [Segment(0.01, 2.0, 500), Segment(0.02, 1.0, 100), Segment(1.0, 30.0, 3)],
    ],
)
def test_different_segments_compose_as_the_independent_convolution_says(segments: list[Segment]) -> None:
    twin = fft_accountant.epsilon([s[:3] for s in segments], 1e-5)
    found = spent(segments, 1e-5).epsilon
    assert twin * (1 - 1e-4) <= found <= twin * 1.005
    assert found > max(spent([s], 1e-5).epsilon for s in segments) * 1.001


@pytest.mark.parametrize(("sigma", "steps"), [(20.0, 100), (1.0, 1), (0.5, 3), (300.0, 1000)])
def test_full_batches_are_one_gaussian(sigma: float, steps: int) -> None:
    exact = da.get_epsilon_gaussian(sigma / math.sqrt(steps), 1e-5)
    assert spent([Segment(1.0, sigma, steps)], 1e-5).pld == pytest.approx(exact, rel=1e-6)
    mu = math.sqrt(steps) / sigma  # and back again, by the closed form of delta (Balle and Wang 2018, theorem 8)
    delta = norm.cdf(mu / 2 - exact / mu) - math.exp(exact) * norm.cdf(-mu / 2 - exact / mu)
    assert delta == pytest.approx(1e-5, rel=1e-4)


def test_one_subsampled_step_has_a_closed_form() -> None:
    """Balle et al. 2018: delta of the mixture is q times the Gaussian's at the shifted epsilon."""
    q, sigma, delta = 0.05, 0.9, 1e-5
    exact = math.log1p(q * math.expm1(da.get_epsilon_gaussian(sigma, delta / q)))
    assert exact <= spent([Segment(q, sigma, 1)], delta).epsilon <= exact * 1.005


def test_no_steps_cost_nothing_no_noise_costs_everything_and_much_noise_almost_nothing() -> None:
    assert spent([], 1e-5) == (0.0, 0.0, 0.0)
    assert spent([Segment(0.1, 1.0, 0)], 1e-5) == (0.0, 0.0, 0.0)
    assert spent([Segment(0.1, 0.0, 0)], 1e-5).epsilon == 0.0
    assert spent([Segment(0.1, 1.0, 5), Segment(0.1, 0.0, 1)], 1e-5).epsilon == math.inf
    assert spent([Segment(0.01, 1e6, 10)], 1e-5).epsilon < 1e-4


# ---- A3: properties --------------------------------------------------------------------------------------------------

TOLERANCE = 1e-6  # of the root finders and of grids that change with the setting


def random_setting(seed: int) -> tuple[Segment, float]:
    r = random.Random(seed)
    q = 10 ** r.uniform(-3, -0.5)
    return Segment(q, r.uniform(0.8, 4.0), r.randrange(20, 400)), 10 ** r.uniform(-8, -4)


@pytest.mark.parametrize("seed", quick(range(6), range(25)))
def test_monotone_additive_and_below_renyi(seed: int) -> None:
    s, delta = random_setting(seed)
    here = spent([s], delta)
    assert here.pld <= here.rdp * (1 + TOLERANCE)
    # a grid follows q and sigma and its rounding, under 0.1 %, with it: changes are larger than that
    assert spent([s._replace(num_steps=s.num_steps * 2)], delta).epsilon > here.epsilon
    assert spent([s._replace(joint_noise_multiplier=s.joint_noise_multiplier * 1.2)], delta).epsilon < here.epsilon
    assert spent([s._replace(sample_rate=s.sample_rate * 1.2)], delta).epsilon > here.epsilon
    assert spent([s], delta * 2).epsilon < here.epsilon
    cut = 1 + s.num_steps // 3
    parts = [s._replace(num_steps=cut), s._replace(num_steps=s.num_steps - cut)]
    assert spent(parts, delta) == here
    assert spent(parts[::-1], delta) == here


@pytest.mark.parametrize("seed", range(100, 106))
def test_order_and_interleaving_do_not_matter(seed: int) -> None:
    (a, delta), (b, _) = random_setting(seed), random_setting(seed + 50)
    together = spent([a, b], delta).epsilon
    halves = [s._replace(num_steps=n) for s in (a, b) for n in (s.num_steps // 2, s.num_steps - s.num_steps // 2)]
    assert spent([halves[i] for i in (0, 2, 1, 3)], delta).epsilon == together
    one = spent([a], delta / 2).epsilon + spent([b], delta / 2).epsilon  # basic composition
    assert max(spent([a], delta).epsilon, spent([b], delta).epsilon) - 1e-9 <= together <= one * 1.002


@pytest.mark.parametrize("factor", [2.0, 8.0, 32.0])
def test_a_coarser_grid_only_ever_rounds_up(factor: float) -> None:
    for name in ("generic", "large q", "epsilon 0.15"):
        segment, delta, *_ = GOLDEN[name]
        fine, coarse = (epsilon._pld_epsilon((segment,), delta, coarser=c) for c in (1.0, factor))
        assert fine <= coarse * (1 + TOLERANCE)


def test_the_reported_value_is_the_zero_out_relations() -> None:
    """Replacing one record by another costs more: 6.94 for 5.20 on the first golden row."""
    s = GOLDEN["e2e, 10 epochs"][0]
    event = da.PoissonSampledDpEvent(s.sample_rate, da.GaussianDpEvent(s.joint_noise_multiplier))
    ours = spent([s], 1e-5).pld
    for relation, expected in (
        (da.NeighboringRelation.REPLACE_SPECIAL, ours),
        (da.NeighboringRelation.ADD_OR_REMOVE_ONE, ours),
    ):
        accountant = da.pld.PLDAccountant(relation, value_discretization_interval=1e-3).compose(event, s.num_steps)
        assert accountant.get_epsilon(1e-5) == pytest.approx(expected, rel=1e-4)
    replace = da.pld.PLDAccountant(da.NeighboringRelation.REPLACE_ONE).compose(event, s.num_steps)
    assert replace.get_epsilon(1e-5) > 1.2 * ours


# ---- fail closed -----------------------------------------------------------------------------------------------------

NO_NUMBERS = [math.nan, math.inf, -math.inf, "1.0", None, True, [1.0], 1j]


@pytest.mark.parametrize("bad", [*NO_NUMBERS, -1.0, 1e-3, 2e6], ids=repr)
def test_what_is_no_noise_multiplier_is_refused(bad: object) -> None:
    with pytest.raises(AccountingError, match="noise_multiplier must be"):
        spent([Segment(0.1, bad, 5)], 1e-5)


@pytest.mark.parametrize("bad", [*NO_NUMBERS, 0.0, -0.1, 1.0000001, 5], ids=repr)
def test_what_is_no_sample_rate_is_refused(bad: object) -> None:
    with pytest.raises(AccountingError, match="sample_rate must be"):
        spent([Segment(bad, 1.0, 5)], 1e-5)


@pytest.mark.parametrize("bad", [*NO_NUMBERS, -1, 1.5, 10.0, 10**9], ids=repr)
def test_what_is_no_number_of_steps_is_refused(bad: object) -> None:
    with pytest.raises(AccountingError, match="num_steps must be"):
        spent([Segment(0.1, 1.0, bad)], 1e-5)


@pytest.mark.parametrize("bad", [*NO_NUMBERS, 0.0, -1e-5, 1.0, 2.0, 1e-13], ids=repr)
def test_what_is_no_delta_is_refused(bad: object) -> None:
    with pytest.raises(AccountingError, match="delta must be"):
        spent([Segment(0.1, 1.0, 5)], bad)


def test_everything_wrong_is_named_at_once() -> None:
    with pytest.raises(AccountingError) as refusal:
        spent([Segment(2.0, math.nan, -1), Segment(0.1, 1.0, 1)], 2.0)
    assert all(word in str(refusal.value) for word in ("delta", "sample_rate", "noise_multiplier", "num_steps"))


def test_a_negative_count_cannot_hide_behind_a_positive_one() -> None:
    with pytest.raises(AccountingError):
        spent([Segment(0.1, 1.0, 1000), Segment(0.1, 1.0, -900)], 1e-5)
    with pytest.raises(AccountingError, match="at most 1,000,000 in all"):
        spent([Segment(0.1, 1.0, 600_000), Segment(0.1, 2.0, 600_000)], 1e-5)


@pytest.mark.parametrize("accountant", ["_pld_epsilon", "_rdp_epsilon"])
@pytest.mark.parametrize("answer", [math.nan, 0.0, -1.0, 0.01])
def test_an_answer_that_cannot_be_true_is_not_passed_on(
    accountant: str, answer: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    epsilon._spent.cache_clear()
    monkeypatch.setattr(epsilon, accountant, lambda *a, **k: answer)
    with pytest.raises(AccountingError, match="Do not use this answer"):
        spent([Segment(0.1, 1.0, 7)], 1e-5)


def test_two_infinite_answers_are_an_error_and_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    epsilon._spent.cache_clear()
    monkeypatch.setattr(epsilon, "_pld_epsilon", lambda *a, **k: math.inf)
    found = spent([Segment(0.1, 1.0, 9)], 1e-5)
    assert (found.pld, found.epsilon) == (math.inf, found.rdp)
    epsilon._spent.cache_clear()
    monkeypatch.setattr(epsilon, "_rdp_epsilon", lambda *a, **k: math.inf)
    with pytest.raises(AccountingError, match="No finite epsilon"):
        spent([Segment(0.1, 1.0, 9)], 1e-5)


def test_the_library_itself_would_have_answered_zero() -> None:
    """Why inputs are checked: Rényi accounting turns NaN, and a delta of 2, into perfect privacy."""
    step = da.PoissonSampledDpEvent(0.1, da.GaussianDpEvent(1.0))
    assert da.rdp.RdpAccountant().compose(step, 10).get_epsilon(2.0) == 0.0


# ---- A9: which accountants exist -------------------------------------------------------------------------------------


def test_the_central_limit_accountant_is_nowhere_and_could_not_be_claimed() -> None:
    """It is no bound: on this row it gives 4.15 for a true 5.1966, under a certified 5.1945."""
    s, delta, lower_bound, _ = GOLDEN["e2e, 10 epochs"]
    mu = s.sample_rate * math.sqrt(s.num_steps * math.expm1(s.joint_noise_multiplier**-2))
    assert da.get_epsilon_gaussian(1 / mu, delta) < lower_bound
    assert accounting.Epsilon._fields == ("epsilon", "pld", "rdp")
    claiming = [
        p for p in PACKAGE.rglob("*.py") if "audit" not in p.parts
    ]  # an audit bounds from below, and claims nothing
    sources = "\n".join(p.read_text().lower() for p in claiming)
    assert "gdp" not in sources


# ---- A10: what it costs, counted in work and not in seconds ----------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_the_grid_has_at_most_some_millions_of_cells(name: str) -> None:
    segment, *_ = GOLDEN[name]
    h = cells.grid([segment])
    assert 1e-7 <= h <= 1e-3
    assert cells.step_cells(segment) <= 400_000
    assert cells.total_reach(segment) / h <= 2**20


def test_epsilon_at_every_logging_step_computes_a_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    epsilon._step_loss.cache_clear()
    epsilon._step_rdp.cache_clear()
    values = [spent([Segment(0.013, 0.97, t)], 1e-5).epsilon for t in (1, 10, 100, 1000)]
    assert values == sorted(values)
    assert epsilon._step_loss.cache_info().misses == 1
    assert epsilon._step_rdp.cache_info().misses == 1


@pytest.mark.slow
def test_a_run_of_1000_steps_is_accounted_for_in_a_second() -> None:
    import time

    spent([Segment(0.02, 0.9, 1000)], 1e-5)
    start = time.perf_counter()
    spent([Segment(0.021, 0.9, 1000)], 1e-5)
    assert time.perf_counter() - start < 10  # ten times the second it should take: machines are shared


# ---- affordable steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [[], [Segment(0.02, 0.9, 150)], [Segment(0.02, 0.9, 50), Segment(0.04, 1.2, 50)]])
def test_affordable_steps_are_the_most_that_fit(before: list[Segment]) -> None:
    step, target, delta = Segment(0.03, 1.0, 1), 3.0, 1e-5
    n = affordable_steps(before, [step._replace(num_steps=2000)], target_epsilon=target, delta=delta)
    assert 0 < n < 2000
    within, beyond = (spent([*before, step._replace(num_steps=m)], delta).epsilon for m in (n, n + 1))
    assert within <= target < beyond


def test_affordable_steps_at_the_ends() -> None:
    step = Segment(0.03, 1.0, 1)
    options = {"target_epsilon": 3.0, "delta": 1e-5}
    few = step._replace(num_steps=7)
    assert affordable_steps([], [], **options) == 0
    assert affordable_steps([], [few], **options) == 7
    assert affordable_steps([step._replace(num_steps=5000)], [few], **options) == 0
    assert affordable_steps([], [few._replace(joint_noise_multiplier=0.0)], **options) == 0
    assert affordable_steps([], [few, few._replace(joint_noise_multiplier=0.0), few], **options) == 7


@pytest.mark.parametrize("changed", [{"target_epsilon": math.nan}, {"target_epsilon": 0}, {"delta": 2.0}])
def test_affordable_steps_refuses_nonsense(changed: dict[str, float]) -> None:
    options = {"target_epsilon": 3.0, "delta": 1e-5, **changed}
    with pytest.raises(AccountingError):
        affordable_steps([], [Segment(0.03, 1.0, 1)], **options)


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_a_plan_counts_steps_as_trainer_does() -> None:
    config = PrivacyConfig(noise_multiplier=1.0, expected_batch_size=1024)
    by_epochs = plan_mechanism(config, 42_061, num_train_epochs=10)
    assert by_epochs.num_steps == 10 * round(42_061 / 1024) == 410
    assert plan_mechanism(config, 42_061, num_train_epochs=0.5).num_steps == math.ceil(0.5 * 41)
    assert plan_mechanism(config, 42_061, num_train_epochs=10, max_steps=7).num_steps == 7
    assert by_epochs.sample_rate == 1024 / 42_061
    assert by_epochs.delta == default_delta(42_061) == 8.1e-06
    assert (by_epochs.target_epsilon, by_epochs.debug) == (None, False)
    assert steps_per_epoch(10, 4096) == 1
    assert plan_mechanism(PrivacyConfig(noise_multiplier=1.0, debug_seed=0), 1000, num_train_epochs=1).debug


@pytest.mark.parametrize("n", [0, -5, 1.5, "100", math.nan, True])
def test_a_plan_needs_a_number_of_examples(n: object) -> None:
    with pytest.raises(ConfigError, match="number of examples"):
        plan_mechanism(PrivacyConfig(noise_multiplier=1.0, expected_batch_size=1), n, num_train_epochs=1)


@pytest.mark.parametrize(
    ("settings", "how_long", "message"),
    [
        ({"noise_multiplier": 1.0, "expected_batch_size": 101}, {"num_train_epochs": 1}, "expected_batch_size"),
        ({"noise_multiplier": 1.0, "target_delta": 0.01}, {"num_train_epochs": 1}, "below 1 / N = 0.01"),
        ({"noise_multiplier": 1e-3}, {"num_train_epochs": 1}, "noise_multiplier"),
        ({"noise_multiplier": 1.0}, {"num_train_epochs": 0}, "num_train_epochs"),
        ({"noise_multiplier": 1.0}, {"num_train_epochs": math.nan}, "num_train_epochs"),
        ({"noise_multiplier": 1.0}, {"num_train_epochs": 1e12}, "num_train_epochs"),
        ({"noise_multiplier": 1.0}, {"num_train_epochs": 1, "max_steps": 10**8}, "max_steps"),
        ({"noise_multiplier": 1.0}, {"num_train_epochs": 1, "max_steps": 2.5}, "max_steps"),
    ],
)
def test_impossible_plans_are_refused(settings: dict, how_long: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_mechanism(PrivacyConfig(**{"expected_batch_size": 10, **settings}), 100, **how_long)


def test_all_that_is_wrong_with_a_plan_is_named_at_once() -> None:
    config = PrivacyConfig(noise_multiplier=1e-3, expected_batch_size=101, target_delta=0.5)
    with pytest.raises(ConfigError) as refusal:
        plan_mechanism(config, 100, num_train_epochs=-1)
    for word in ("expected_batch_size", "target_delta", "noise_multiplier", "num_train_epochs"):
        assert word in str(refusal.value)


@pytest.mark.parametrize(("target", "batch"), [(1e-12, 10), (1e9, 1000)])
def test_a_target_out_of_reach_says_what_is_in_reach(target: float, batch: int) -> None:
    config = PrivacyConfig(target_epsilon=target, expected_batch_size=batch, target_delta=1e-9)
    with pytest.raises(
        AccountingError, match=r"out of reach: expected at (least|most) .*What to do: (raise|lower)"
    ) as e:
        plan_mechanism(config, 1000, num_train_epochs=1, max_steps=2)
    assert isinstance(e.value, HfDpError)


def test_the_derivation_has_every_number_with_its_rule_and_rounds_epsilon_up() -> None:
    config = PrivacyConfig(target_epsilon=3.0, expected_batch_size=100, clip_norm=0.5)
    mechanism = plan_mechanism(config, 5000, num_train_epochs=2)
    rows = {row.name: row for row in derivation(config, mechanism, num_train_epochs=2)}
    exact = spent(mechanism.segments(), mechanism.delta)
    assert rows["examples N"].value == "5,000"
    assert float(rows["sample rate q"].value) == pytest.approx(0.02)
    assert (rows["steps T"].value, rows["steps T"].rule[:4]) == ("100", "ceil")
    assert float(rows["noise multiplier sigma"].value) == mechanism.noise_multiplier
    assert rows["noise multiplier sigma"].rule == "least that keeps epsilon within 3"
    assert float(rows["noise on the sum"].value) == pytest.approx(mechanism.noise_multiplier * 0.5, rel=1e-4)
    assert float(rows["noise on the mean"].value) == pytest.approx(mechanism.noise_multiplier * 0.5 / 100, rel=1e-4)
    for name, value in zip(("epsilon", "epsilon by PLD", "epsilon by RDP"), exact, strict=True):
        assert value <= float(rows[name].value) <= value * 1.0002
    assert rows["delta"].rule.startswith("1 / N**1.1")
    assert all(row.rule for row in rows.values())


def test_the_derivation_of_given_values_says_given() -> None:
    config = PrivacyConfig(noise_multiplier=0.0, expected_batch_size=100, target_delta=1e-6)
    mechanism = plan_mechanism(config, 5000, num_train_epochs=2, max_steps=3)
    rows = {r.name: r for r in derivation(config, mechanism, num_train_epochs=2, max_steps=3)}
    assert [rows[n].rule for n in ("steps T", "delta", "noise multiplier sigma")] == ["given"] * 3
    assert rows["epsilon"].value == "inf"


def test_numpy_numbers_are_numbers() -> None:
    assert spent([Segment(np.float64(0.01), np.float32(1.0), np.int64(1000))], 1e-5) == spent(
        [Segment(0.01, 1.0, 1000)], 1e-5
    )
