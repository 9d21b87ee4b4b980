"""Calibrated noise never overshoots its target, wastes next to none of it, and is found in a few evaluations."""

import math

import dp_accounting as da
import pytest

from hf_dp.accounting import calibration
from hf_dp.accounting.calibration import calibrate, round_up
from hf_dp.accounting.epsilon import spent
from hf_dp.accounting.plan import plan_mechanism
from hf_dp.config import PrivacyConfig
from hf_dp.errors import AccountingError
from hf_dp.mechanism import Segment
from tests.support.marks import quick

E2E = {"sample_rate": 1024 / 42_061, "num_steps": 410, "delta": 8e-6}
TARGETS = {  # target epsilon, then the run
    "e2e, epsilon 8": (8.0, E2E),
    "e2e, epsilon 3": (3.0, E2E),
    "e2e, epsilon 1": (1.0, E2E),
    "e2e, epsilon 0.001": (0.001, E2E),
    "e2e, epsilon 50": (50.0, E2E),
    "small q": (0.1, {"sample_rate": 5e-4, "num_steps": 3000, "delta": 1e-7}),
    "large q": (2.0, {"sample_rate": 0.3, "num_steps": 60, "delta": 1e-5}),
    "full batch": (1.5, {"sample_rate": 1.0, "num_steps": 25, "delta": 1e-5}),
    "one step": (4.0, {"sample_rate": 0.05, "num_steps": 1, "delta": 1e-6}),
    "one full step": (0.7, {"sample_rate": 1.0, "num_steps": 1, "delta": 1e-3}),
    "long": (6.0, {"sample_rate": 0.004, "num_steps": 30_000, "delta": 1e-6}),
    "tiny delta": (4.0, {"sample_rate": 0.02, "num_steps": 300, "delta": 1e-11}),
}
UNUSED = 3e-3


def evaluated_directly(sigma: float, run: dict[str, float], width: float) -> float:
    """dp-accounting's own PLD accountant on a grid of this width, with nothing of ours in between."""
    accountant = da.pld.PLDAccountant(da.NeighboringRelation.REPLACE_SPECIAL, value_discretization_interval=width)
    accountant.compose(da.PoissonSampledDpEvent(run["sample_rate"], da.GaussianDpEvent(sigma)), run["num_steps"])
    return float(accountant.get_epsilon(run["delta"]))


@pytest.mark.parametrize("name", quick({*[*TARGETS][::3]}, TARGETS))
def test_no_target_is_overshot_and_little_of_it_is_left(name: str) -> None:
    target, run = TARGETS[name]
    sigma = calibrate(target, **run)
    found = spent([Segment(run["sample_rate"], sigma, run["num_steps"])], run["delta"]).epsilon
    assert target * (1 - UNUSED) <= found <= target
    assert sigma == round_up(sigma)  # what is printed is what is used


@pytest.mark.parametrize("name", ["e2e, epsilon 8", "e2e, epsilon 3", "large q", "one step"])
def test_the_librarys_own_accountant_agrees_on_a_fine_grid(name: str) -> None:
    target, run = TARGETS[name]
    found = evaluated_directly(calibrate(target, **run), run, width=1e-4)
    assert target * 0.995 <= found <= target


def test_published_settings_get_the_noise_that_is_known_for_them() -> None:
    config = PrivacyConfig(target_epsilon=8.0, target_delta=8e-6, expected_batch_size=1024)
    assert plan_mechanism(config, 42_061, num_train_epochs=10).noise_multiplier == pytest.approx(0.6826, abs=1e-3)
    known = {8.0: 0.6785, 3.0: 1.0178}  # by bisection on the accountant, at q = .0243, T = 410, delta = 1e-5
    for target, sigma in known.items():
        found = calibrate(target, sample_rate=0.0243, num_steps=410, delta=1e-5)
        assert found == pytest.approx(sigma, rel=3e-3)


def test_mechanism_and_plan_hold_the_very_float_that_was_evaluated() -> None:
    config = PrivacyConfig(target_epsilon=2.0, expected_batch_size=64)
    mechanism = plan_mechanism(config, 3000, num_train_epochs=3)
    assert spent(mechanism.segments(), mechanism.delta).epsilon <= 2.0
    assert mechanism.segments()[0][:3] == (64 / 3000, mechanism.noise_multiplier, mechanism.num_steps)


def test_smaller_targets_longer_runs_and_smaller_deltas_need_more_noise() -> None:
    run = {"sample_rate": 0.02, "num_steps": 200, "delta": 1e-5}
    sigma = calibrate(2.0, **run)
    assert calibrate(1.0, **run) > sigma
    assert calibrate(2.0, **{**run, "num_steps": 400}) > sigma
    assert calibrate(2.0, **{**run, "sample_rate": 0.04}) > sigma
    assert calibrate(2.0, **{**run, "delta": 1e-7}) > sigma


@pytest.mark.parametrize("name", [n for n in TARGETS if n != "long"])
def test_a_target_is_found_in_a_few_evaluations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it costs, in evaluations of the accountant: at some tenths of a second each, under ten seconds in all."""
    counted: list[float] = []
    evaluate = calibration.spent

    def counting(segments: list[Segment], delta: float) -> object:
        counted.append(segments[0].joint_noise_multiplier)
        return evaluate(segments, delta)

    monkeypatch.setattr(calibration, "spent", counting)
    target, run = TARGETS[name]
    assert calibrate(target, **run) in counted  # only a sigma that was itself evaluated is returned
    assert len(counted) <= 12


@pytest.mark.slow
@pytest.mark.parametrize("steps", [10_000, 100_000])
def test_calibration_takes_seconds(steps: int) -> None:
    import time

    start = time.perf_counter()
    calibrate(5.0, sample_rate=0.003, num_steps=steps, delta=1e-6)
    assert time.perf_counter() - start < 30  # three times the ten seconds it should take: machines are shared


def test_noise_beyond_need_is_not_returned_where_delta_covers_everything() -> None:
    """delta above the total variation distance: epsilon is 0 over a wide range of sigma, and the search still ends."""
    sigma = calibrate(1e-4, sample_rate=0.02, num_steps=2, delta=0.018)
    assert spent([Segment(0.02, sigma, 2)], 0.018).epsilon <= 1e-4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target_epsilon": 0}, "target_epsilon must be"),
        ({"target_epsilon": math.nan}, "target_epsilon must be"),
        ({"target_epsilon": math.inf}, "target_epsilon must be"),
        ({"target_epsilon": "8"}, "target_epsilon must be"),
        ({"sample_rate": 1.1}, "sample_rate must be"),
        ({"num_steps": 0}, "nothing to calibrate"),
        ({"num_steps": -3}, "num_steps must be"),
        ({"delta": 2}, "delta must be"),
        ({"delta": 0}, "delta must be"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(changed: dict[str, object], message: str) -> None:
    asked = {"target_epsilon": 8.0, **E2E, **changed}
    with pytest.raises(AccountingError, match=message):
        calibrate(asked.pop("target_epsilon"), **asked)


def test_an_accountant_that_jumps_or_wavers_does_not_make_the_search_overshoot() -> None:
    """Rounding makes epsilon fall unevenly: only what was evaluated within the target is returned."""

    def steps(sigma: float) -> float:
        return 4.0 if sigma < 2.5 else 1.0  # two plateaus, from either of which the search has to get away

    def wavering(sigma: float) -> float:
        return 4.0 / sigma**2 * (1 + 1e-3 * math.sin(1e5 * sigma))

    for epsilon_of in (steps, wavering):
        for target in (1.5, 2.0, 3.9):
            for guess in (0.02, 1.0, 300.0):
                sigma = calibration._smallest_within(target, epsilon_of, guess)
                assert epsilon_of(sigma) <= target
                if epsilon_of is steps:
                    assert sigma == pytest.approx(2.5, rel=1e-3)


@pytest.mark.parametrize("x", [0.68512345, 1.0, 9.99999, 0.010000001, 849.4999, 123456.7])
def test_rounding_goes_up_to_five_digits(x: float) -> None:
    rounded = round_up(x)
    assert x <= rounded <= x * (1 + 1.0001e-4)
    assert rounded == float(f"{rounded:.4e}")
    assert round_up(rounded) == rounded
