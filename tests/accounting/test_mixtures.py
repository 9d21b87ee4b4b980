"""Drawing records of units that own several: its epsilon against a direct simulation, and against what is known."""

import math

import numpy as np
import pytest
from scipy import stats

from hf_dp.accounting import deltas, plan_mechanism
from hf_dp.accounting.epsilon import divergences, quick_epsilon, spent
from hf_dp.config import PrivacyConfig
from hf_dp.errors import AccountingError, ConfigError
from hf_dp.mechanism import Segment

SIMULATED = 400_000


def drawing(q: float, sigma: float, num_steps: int, most: int) -> list[Segment]:
    return [Segment(q, sigma, num_steps, contribution_bound=most)]


def simulated_delta(q: float, sigma: float, num_steps: int, most: int, epsilon: float, *, present: bool) -> float:
    """Delta at this epsilon by drawing what T steps release, in one direction: E max(0, 1 - exp(epsilon - loss))."""
    generator = np.random.default_rng(int(present))
    counts = np.arange(most + 1)
    chances = stats.binom.pmf(counts, most, q)
    loss = np.zeros(SIMULATED)
    for _ in range(num_steps):
        x = generator.normal(0.0, sigma, SIMULATED)
        if present:
            x += generator.binomial(most, q, SIMULATED)
        ratio = sum(p * np.exp((i * x - i * i / 2) / sigma**2) for i, p in zip(counts, chances, strict=True))
        loss += np.log(ratio) * (1 if present else -1)
    return float(np.maximum(0.0, -np.expm1(epsilon - loss)).mean())


@pytest.mark.parametrize(("q", "sigma", "num_steps", "most"), [(0.1, 2.0, 8, 4), (0.3, 3.0, 5, 8)])
def test_delta_is_that_of_the_simulated_mixture(q: float, sigma: float, num_steps: int, most: int) -> None:
    epsilon = spent(drawing(q, sigma, num_steps, most), 0.01).epsilon
    worst = max(simulated_delta(q, sigma, num_steps, most, epsilon, present=present) for present in (True, False))
    assert 0.96 * 0.01 < worst < 1.03 * 0.01  # a standard error of the simulation is 1 %
    (found,) = deltas(drawing(q, sigma, num_steps, most), [epsilon])
    assert found == pytest.approx(0.01, rel=1e-3)
    for wrong in (1.1, 1 / 1.1):  # of sigma
        other = spent(drawing(q, sigma * wrong, num_steps, most), 0.01).epsilon
        delta = simulated_delta(q, sigma, num_steps, most, other, present=True)
        assert (delta > 1.15 * 0.01) if wrong > 1 else (delta < 0.01 / 1.15)


def test_one_step_has_the_delta_of_the_dearer_direction() -> None:
    from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, MixtureGaussianPrivacyLoss

    counts = np.arange(5.0)
    for q in (0.1, 0.9):
        both = [
            MixtureGaussianPrivacyLoss(2.0, counts, stats.binom.pmf(counts, 4, q), adjacency_type=way)
            for way in (AdjacencyType.ADD, AdjacencyType.REMOVE)
        ]
        worst = max(float(loss.get_delta_for_epsilon([1.0])[0]) for loss in both)
        assert deltas(drawing(q, 2.0, 1, 4), [1.0])[0] == pytest.approx(worst, rel=1e-2)


def test_one_record_a_unit_and_all_records_in_each_step_are_known_mechanisms() -> None:
    for ours, known in (((0.1, 2.0, 30, 1), (0.1, 2.0, 30)), ((1.0, 12.0, 5, 4), (1.0, 3.0, 5))):
        assert spent(drawing(*ours), 1e-3) == spent([Segment(*known)], 1e-3)
    nearly = spent(drawing(1 - 1e-9, 12.0, 5, 4), 1e-3).epsilon
    assert nearly == pytest.approx(spent([Segment(1.0, 3.0, 5)], 1e-3).epsilon, rel=2e-3)
    assert spent(drawing(0.1, 2.0, 0, 4), 1e-3).epsilon == 0
    assert spent(drawing(0.1, 0.0, 5, 4), 1e-3).epsilon == math.inf


def test_a_unit_costs_more_the_more_records_it_has_and_less_than_by_group_privacy() -> None:
    found = [spent(drawing(0.1, 4.0, 20, most), 1e-4).epsilon for most in (1, 2, 4)]
    assert found == sorted(found)
    assert found[2] < spent([Segment(1 - 0.9**4, 1.0, 20)], 1e-4).epsilon  # as if all four came whenever one does
    together = [*drawing(0.1, 4.0, 10, 4), Segment(0.1, 4.0, 10), *drawing(0.1, 4.0, 10, 4)]
    assert found[2] < spent(together, 1e-4).epsilon < found[2] + found[0]


@pytest.mark.parametrize(("most", "message"), [(0, "from 1 to 256"), (257, "from 1 to 256"), (2.5, "from 1 to 256")])
def test_what_is_out_of_range_is_refused(most: float, message: str) -> None:
    with pytest.raises(AccountingError, match=message):
        spent(drawing(0.1, 2.0, 3, most), 1e-3)  # type: ignore[arg-type]


def test_what_is_not_known_of_the_mixture_is_refused() -> None:
    with pytest.raises(AccountingError, match="1 with discrete noise"):
        spent([Segment(0.1, 2.0, 3, "discrete", 4)], 1e-3)
    with pytest.raises(AccountingError, match="leave contribution_bound out"):
        divergences(drawing(0.1, 2.0, 3, 4))
    assert math.isinf(spent(drawing(0.1, 2.0, 3, 4), 1e-3).rdp)


def test_the_noise_is_the_least_within_the_target() -> None:
    asked = PrivacyConfig(target_epsilon=4.0, unit_column="author", contribution_bound=4, expected_batch_size=40)
    m = plan_mechanism(asked, 800, num_train_epochs=1.0, max_steps=10)
    assert (m.sample_rate, m.contribution_bound, m.segments()[0].contribution_bound) == (0.05, 4, 4)
    assert m.unit == 'group of at most 4 records with the same "author"'
    assert 0.998 * 4 < spent(m.segments(), m.delta).epsilon <= 4
    of_records = plan_mechanism(
        PrivacyConfig(target_epsilon=4.0, expected_batch_size=40), 800, num_train_epochs=1.0, max_steps=10
    )
    assert 1.5 * of_records.noise_multiplier < m.noise_multiplier < 4 * of_records.noise_multiplier
    assert quick_epsilon(m.segments(), m.delta) == spent(m.segments(), m.delta).epsilon


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contribution_bound": 4}, "of the groups that unit_column makes"),
        ({"contribution_bound": 0, "unit_column": "author"}, "from 1 to 256, or left out"),
        ({"contribution_bound": 4, "unit_column": "author", "records_per_unit": 2}, "leave one of them out"),
        (
            {"contribution_bound": 4, "unit_column": "author", "noise": "discrete"},
            "not accounted with noise='discrete'",
        ),
    ],
)
def test_settings_that_contradict_it_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrivacyConfig(noise_multiplier=1.0, **settings)
