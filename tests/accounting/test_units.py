"""Ways to draw the records of groups are compared at equal epsilon, steps and records a step."""

import pytest

from hf_dp import PrivacyConfig
from hf_dp.accounting import plan_mechanism, spent, ways_to_draw, ways_to_keep
from hf_dp.mechanism import Mechanism, Segment

SIZES = [*[1] * 300, *[2] * 100, *[5] * 100]


def planned(**k: object) -> Mechanism:
    settings = {"target_epsilon": 8.0, "target_delta": 1e-4, "unit_column": "user", "expected_batch_size": 40, **k}
    return plan_mechanism(PrivacyConfig(**settings), len(SIZES), num_train_epochs=0, max_steps=30)


def test_each_way_has_the_plans_epsilon_and_as_many_records_a_step() -> None:
    plan = planned(records_per_unit=4)
    records_a_step = 40 * (300 + 2 * 100 + 4 * 100) / 500
    ways = ways_to_draw(plan, SIZES)
    assert [way.noise for way in ways] == sorted(way.noise for way in ways)
    by_name = {way.setting: way for way in ways}
    assert set(by_name) == {"records_per_unit=1", "records_per_unit=4", "contribution_bound=4"}
    for name, way in by_name.items():
        setting, most = name.split("=")
        kept = sum(min(size, int(most)) for size in SIZES)
        of_groups = setting == "records_per_unit"
        assert way.kept == (sum(SIZES) if of_groups else kept)
        assert way.expected_batch_size * (kept / len(SIZES) if of_groups else 1) == pytest.approx(records_a_step)
        rate = way.expected_batch_size / (len(SIZES) if of_groups else kept)
        segment = Segment(rate, way.sigma, 30, "gaussian", 1 if of_groups else int(most))
        assert 7.8 < spent([segment], 1e-4).epsilon <= 8
        assert way.noise == way.sigma / way.expected_batch_size
    own = by_name["records_per_unit=4"]  # the plan's
    assert own.sigma == pytest.approx(plan.noise_multiplier, rel=0.02)
    assert own.expected_batch_size == pytest.approx(40)


def test_where_each_has_one_record_there_is_one_way() -> None:
    assert [way.setting for way in ways_to_draw(planned(), [1] * 500)] == ["records_per_unit=1"]


def test_ways_that_would_draw_more_than_there_are_are_left_out() -> None:
    """At 300 groups of 2 records a step, one record of each of 500 groups cannot be as many."""
    settings = [w.setting for w in ways_to_draw(planned(records_per_unit=2, expected_batch_size=300), [2] * 500)]
    assert sorted(settings) == ["contribution_bound=2", "records_per_unit=2"]


def test_of_records_with_several_owners_only_the_bound_is_to_be_chosen() -> None:
    """Each way has the plan's epsilon; a G that keeps no more than a smaller one is no way."""
    kept = {1: 300, 3: 500, 4: 600, 16: 600}
    ways = ways_to_keep(planned(contribution_bound=3), kept.__getitem__)
    assert {way.setting: way.kept for way in ways} == {f"contribution_bound={g}": kept[g] for g in (1, 3, 4)}
    assert [way.noise for way in ways] == sorted(way.noise for way in ways)
    for way in ways:
        bound = int(way.setting.split("=")[1])
        segment = Segment(40 / way.kept, way.sigma, 30, "gaussian", bound)
        assert 7.8 < spent([segment], 1e-4).epsilon <= 8
        assert way.noise == way.sigma / 40
