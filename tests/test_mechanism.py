"""The mechanism's numbers follow from one another, and none can be changed."""

import dataclasses

import pytest

from hf_dp.mechanism import Mechanism, Segment, default_delta, steps_per_epoch

MECHANISM = Mechanism(
    num_examples=1000, expected_batch_size=50, num_steps=60, noise_multiplier=1.5, clip_norm=0.2, delta=1e-4
)


def test_derived_numbers() -> None:
    assert MECHANISM.sample_rate == 0.05
    assert MECHANISM.noise_std == 1.5 * 0.2  # on the sum: B is no part of it
    assert MECHANISM.segments() == (Segment(0.05, 1.5, 60),)
    assert (MECHANISM.unit, MECHANISM.relation) == ("record", "zero-out")


def test_noise_follows_the_clip_norm_and_not_the_batch() -> None:
    assert dataclasses.replace(MECHANISM, expected_batch_size=500).noise_std == MECHANISM.noise_std
    assert dataclasses.replace(MECHANISM, clip_norm=0.4).noise_std == 2 * MECHANISM.noise_std


@pytest.mark.parametrize("changed", [{"noise_multiplier": 0.0}, {"debug": True}])
def test_without_noise_or_with_a_fixed_seed_nothing_is_private(changed: dict) -> None:
    assert MECHANISM.is_private
    assert not dataclasses.replace(MECHANISM, **changed).is_private


def test_a_mechanism_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MECHANISM.noise_multiplier = 0.1


@pytest.mark.parametrize(("n", "b", "steps"), [(42_061, 1024, 41), (100, 30, 3), (7, 100, 1), (10, 10, 1), (25, 10, 2)])
def test_steps_of_an_epoch(n: int, b: int, steps: int) -> None:
    assert steps_per_epoch(n, b) == steps


@pytest.mark.parametrize("n", [1, 2, 3, 10, 100, 1024, 42_061, 10**6, 10**9])
def test_the_default_delta_is_rounded_down_and_below_one_over_n(n: int) -> None:
    delta = default_delta(n)
    exact = 1 / max(2, n) ** 1.1
    assert exact * 0.9 <= delta <= exact
    assert delta < 1 / n
    assert float(f"{delta:.1e}") == delta
