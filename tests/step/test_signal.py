"""How loud the gradient is in what was released: found where it is there, and not where it is not."""

import math

import pytest
import torch

from hf_dp.mechanism import Mechanism
from hf_dp.step.metrics import METRICS
from hf_dp.step.signal import MARGIN, ReleasedFigures

D, STEPS = 5_000, 40


def mechanism(**changes) -> Mechanism:
    settings = {
        "num_examples": 1000,
        "expected_batch_size": 50,
        "num_steps": STEPS,
        "noise_multiplier": 0.8,
        "clip_norm": 0.1,
        "delta": 1e-5,
    }
    return Mechanism(**(settings | changes))


def released(m: Mechanism, ratio: float, seed: int = 0) -> ReleasedFigures:
    """The figures of STEPS releases whose signal has `ratio` times the noise's norm."""
    generator = torch.Generator().manual_seed(seed)
    figures = ReleasedFigures(m)
    direction = torch.randn(D, generator=generator)
    signal = direction / direction.norm() * ratio * m.noise_std * math.sqrt(D)
    for step in range(STEPS):
        noise = torch.randn(D, generator=generator) * m.noise_std
        extra = torch.zeros(len(METRICS) if m.loss_bound else 0)
        figures.add(torch.cat([signal + noise, extra]), m.at(step))
    return figures


@pytest.mark.parametrize("loss_bound", [None, 4.0])
@pytest.mark.parametrize("ratio", [0.3, 1.0, 4.0])
def test_the_ratio_is_found_whatever_else_is_released(ratio, loss_bound):
    figures = released(mechanism(loss_bound=loss_bound), ratio)
    steps, limit = figures.at_most()
    taken = figures.take()
    assert taken["signal_to_noise"] == pytest.approx(ratio, rel=0.05)
    assert ("loss" in taken) == (loss_bound is not None)
    assert steps == STEPS
    assert ratio * 0.99 < limit < ratio * 1.2
    assert figures.take() == {}


def test_noise_alone_has_no_signal_beyond_what_its_own_spread_allows():
    margins = [released(mechanism(), 0.0, seed).at_most()[1] for seed in range(20)]
    spread = math.sqrt(2 / (STEPS * D))
    assert max(margins) < math.sqrt(2 * MARGIN * spread)
    assert min(margins) > 0


def test_without_noise_there_is_no_ratio():
    assert released(mechanism(noise_multiplier=0.0), 1.0).take() == {}
