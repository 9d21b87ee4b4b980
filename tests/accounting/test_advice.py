"""Noise against signal: the ratios by simulation, the same epsilon at other batch sizes, and remedies that help."""

import dataclasses
import re

import numpy as np
import pytest

from hf_dp import accounting
from hf_dp.accounting import advice
from hf_dp.config import PrivacyConfig
from hf_dp.mechanism import Mechanism
from hf_dp.schedule import Level

PLANNED = Mechanism(
    num_examples=1000,
    expected_batch_size=50,
    num_steps=40,
    noise_multiplier=1.0,
    clip_norm=0.1,
    delta=5e-4,
    target_epsilon=3.0,
)
LEVELS = (Level(20, 1.0, 0.1, 50), Level(20, 0.5, 0.2, 100))
D = 4000


def epsilon(m):
    return accounting.spent(m.segments(), m.delta).epsilon


@pytest.mark.parametrize("levels", [(), LEVELS])
def test_the_ratios_are_those_of_noise_that_is_drawn(levels):
    plan = dataclasses.replace(PLANNED, levels=levels)
    draw = np.random.default_rng(0)
    steps = [level for level in advice.levels_of(plan) for _ in range(level.num_steps)]
    noises = [draw.normal(0, s.noise_multiplier * s.clip_norm / s.expected_batch_size, D) for s in steps]
    found = advice.loudness(plan, D)
    assert np.linalg.norm(noises[0]) / steps[0].clip_norm == pytest.approx(found.of_a_step, rel=0.1)
    together = np.linalg.norm(np.sum(noises, axis=0)) / sum(s.clip_norm for s in steps)
    assert together == pytest.approx(found.of_all_steps, rel=0.1)
    assert together != pytest.approx(found.of_a_step, rel=0.5)


SLOW = pytest.mark.slow
OTHERS = [(100, None, 40), pytest.param(100, 2.0, 20, marks=SLOW), pytest.param(25, 2.0, 80, marks=SLOW)]


@pytest.mark.parametrize("levels", [(), LEVELS])
@pytest.mark.parametrize(("batch", "epochs", "steps"), OTHERS)
def test_another_batch_has_the_epsilon_of_the_plan(levels, batch, epochs, steps):
    plan = dataclasses.replace(PLANNED, levels=levels)
    other = advice.at_batch(plan, batch, epochs)
    assert (other.expected_batch_size, other.num_steps) == (batch, steps)
    assert epsilon(plan) * 0.99 <= epsilon(other) <= epsilon(plan)
    assert (other.noise_multiplier > plan.noise_multiplier) == (batch > 50)
    for old, new in zip(plan.levels, other.levels, strict=True):
        assert new.noise_multiplier / other.noise_multiplier == pytest.approx(old.noise_multiplier)


def test_what_the_warning_advises_helps():
    privacy = PrivacyConfig(target_epsilon=8, expected_batch_size=64, clip_norm=0.1)
    plan = accounting.plan_mechanism(privacy, 3000, num_train_epochs=3)
    d = 1_000_000
    told = advice.warning(plan, d)
    batch, steps, ratio = re.search(r"expected_batch_size=([\d,]+) with max_steps=(\d+).*?to ([\d.]+)", told).groups()
    larger = dataclasses.replace(privacy, expected_batch_size=int(batch.replace(",", "")))
    then = accounting.plan_mechanism(larger, 3000, num_train_epochs=0, max_steps=int(steps))
    assert advice.loudness(then, d).of_all_steps == pytest.approx(float(ratio), rel=0.02)
    assert not advice.loudness(then, d).drowns
    assert advice.warning(then, d) == ""
    fewer = int(re.search(r"at most ([\d,]+) parameters", told)[1].replace(",", ""))
    assert advice.loudness(plan, fewer).of_all_steps == pytest.approx(advice.DROWNS, rel=1e-3)
    assert advice.warning(plan, fewer) == ""


def test_there_is_no_warning_where_the_signal_is_louder_or_there_is_no_noise():
    assert advice.warning(PLANNED, 2_000) == ""  # 0.9 a step
    assert advice.warning(PLANNED, 20_000) == ""  # 2.8 a step, which 40 steps average out
    assert advice.warning(PLANNED, 200_000).startswith("The signal drowns")
    assert advice.warning(dataclasses.replace(PLANNED, noise_multiplier=0.0, target_epsilon=None), 200_000) == ""
