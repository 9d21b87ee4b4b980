"""Poisson sampling, measured: frequencies, sizes, independence of records and of draws; slices of processes."""

import pickle
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats

from hf_dp.errors import ConfigError, HfDpError
from hf_dp.sampling.poisson import Draw, PoissonSampler

N, T = 2000, 2000
Q = 0.05
FALSE_ALARM = 1e-6


def inclusion(draws: Iterator[np.ndarray]) -> np.ndarray:
    """[T, N] of 0 and 1: record i is in draw t."""
    table = np.zeros((T, N), dtype=np.float32)
    for t, kept in enumerate(draws):
        table[t, kept] = 1
    return table


@pytest.fixture(scope="module")
def poisson() -> np.ndarray:
    sampler = PoissonSampler(N, Q, T)
    return inclusion(sampler.draw(t) for t in range(T))


# Each of these gates passes for the sampler and is failed by at least one of the impostors further down.


def frequencies_are_q(table: np.ndarray) -> bool:
    """Chi-square of the N inclusion counts, each Bin(T, q): both too uneven and too even fail."""
    statistic = (np.square(table.sum(0) - T * Q) / (T * Q * (1 - Q))).sum()
    low, high = stats.chi2.ppf([FALSE_ALARM, 1 - FALSE_ALARM], N)
    return bool(low < statistic < high)


def size_is_binomial(table: np.ndarray) -> bool:
    """Mean and variance of the batch size within 5 standard errors of N q and N q (1 - q)."""
    sizes, variance = table.sum(1), N * Q * (1 - Q)
    mean_right = abs(sizes.mean() - N * Q) < 5 * np.sqrt(variance / T)
    return bool(mean_right and abs(sizes.var(ddof=1) - variance) < 5 * variance * np.sqrt(2 / (T - 1)))


def neighbours_are_independent(table: np.ndarray) -> bool:
    """Correlation of records a fixed distance apart, over all draws, within 5 standard errors of 0."""
    centred = (table - Q) / np.sqrt(Q * (1 - Q))
    return all(
        abs((centred[:, :-lag] * centred[:, lag:]).mean()) < 5 / np.sqrt(T * (N - lag)) for lag in (1, 2, 4, 7, 100)
    )


def draws_are_independent(table: np.ndarray) -> bool:
    """Correlation of a record with one a few places on in a later draw: sees overlapping counters and epochs."""
    centred = (table - Q) / np.sqrt(Q * (1 - Q))
    for later in (1, 2, 19):
        for lag in (0, 1, 4, 8):
            product = centred[:-later, lag:] * centred[later:, : N - lag]
            if abs(product.mean()) > 5 / np.sqrt(product.size):
                return False
    return True


def has_no_epochs(table: np.ndarray) -> bool:
    """Variance of a record's count in 1/q draws within 5 standard errors of its binomial's: 0 under shuffling."""
    epoch = round(1 / Q)
    counts = table.reshape(T // epoch, epoch, N).sum(1)
    variance = epoch * Q * (1 - Q)
    kurtosis_room = 2 + (1 - 6 * Q * (1 - Q)) / variance  # of a binomial's sample variance
    return bool(abs(counts.var() - variance) < 5 * variance * np.sqrt(kurtosis_room / counts.size))


GATES = (frequencies_are_q, size_is_binomial, neighbours_are_independent, draws_are_independent, has_no_epochs)


@pytest.mark.parametrize("gate", GATES)
def test_poisson(poisson, gate):
    assert gate(poisson)


def test_one_pair_of_records_is_as_independent_as_any(poisson):
    some = poisson[:, :60] - poisson[:, :60].mean(0)
    correlation = some.T @ some / np.sqrt(np.outer(np.square(some).sum(0), np.square(some).sum(0)))
    worst = np.abs(correlation[np.triu_indices(60, 1)]).max()
    assert worst < stats.norm.isf(FALSE_ALARM / 1770 / 2) / np.sqrt(T)  # Bonferroni over 1,770 pairs


def shuffled(rng):
    order = np.concatenate([rng.permutation(N) for _ in range(int(T * Q))])
    return iter(order.reshape(T, int(N * Q)))


def fixed_size(rng):
    return (rng.choice(N, int(N * Q), replace=False) for _ in range(T))


def overlapping_counters(rng):
    return (np.flatnonzero(np.random.Generator(np.random.Philox(key=7, counter=t)).random(N) < Q) for t in range(T))


def wrong_rate(rng):
    return (np.flatnonzero(rng.random(N) < 1.03 * Q) for _ in range(T))


def same_batch_twice(rng):
    halves = [np.flatnonzero(rng.random(N) < Q) for _ in range(T // 2)]
    return (halves[t // 2] for t in range(T))


def blocks_together(rng):
    return (np.flatnonzero(np.repeat(rng.random(N // 2), 2) < Q) for _ in range(T))


@pytest.mark.parametrize(
    "impostor", [shuffled, fixed_size, overlapping_counters, wrong_rate, same_batch_twice, blocks_together]
)
def test_impostors_fail_at_least_one_gate(impostor):
    table = inclusion(impostor(np.random.default_rng(0)))
    assert not all(gate(table) for gate in GATES)


def test_a_draw_is_a_function_of_key_and_number():
    a, b = PoissonSampler(N, Q, 5, key=3), PoissonSampler(N, Q, 5, key=3)
    np.testing.assert_array_equal(a.draw(4), b.draw(4))
    assert not np.array_equal(a.draw(4), a.draw(5))
    assert not np.array_equal(a.draw(4), PoissonSampler(N, Q, 5, key=4).draw(4))
    assert not np.array_equal(PoissonSampler(N, Q, 5).draw(0), PoissonSampler(N, Q, 5).draw(0))  # keys from the system


def test_a_draw_does_not_depend_on_how_its_uniforms_are_blocked(monkeypatch):
    expected = PoissonSampler(N, Q, 1, key=3).draw(0)
    monkeypatch.setattr("hf_dp.sampling.poisson.BLOCK", 137)
    np.testing.assert_array_equal(PoissonSampler(N, Q, 1, key=3).draw(0), expected)


def test_every_iteration_goes_on_with_fresh_draws_even_when_one_was_left_early():
    sampler = PoissonSampler(N, Q, 4, key=3)
    first = list(sampler)
    next(iter(sampler))
    second = list(sampler)
    assert [d.number for d in (*first, *second)] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert second[0] == sampler.draw(5).tolist()
    assert len(sampler) == len(first) == len(second) == 4


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("rate", [1.0, 0.3, 0.02])
def test_the_slices_of_all_processes_are_the_draw_each_record_once(world, rate):
    samplers = [PoissonSampler(50, rate, 40, key=9, process_index=r, num_processes=world) for r in range(world)]
    for slices in zip(*samplers, strict=True):
        numbers = {s.number for s in slices}
        assert len(numbers) == 1
        expected = samplers[0].draw(numbers.pop()).tolist()
        assert sorted(i for one in slices for i in one) == expected
        assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_rate_one_keeps_everything_and_a_tiny_rate_yields_empty_lists():
    assert list(PoissonSampler(7, 1.0, 2)) == [list(range(7))] * 2
    batches = list(PoissonSampler(64, 0.002, 400, key=1))
    assert sum(b == [] for b in batches) > 300  # (1 - .002)^64 = .88 of 400
    assert any(batches)


def test_it_offers_nothing_that_would_let_accelerate_or_trainer_replace_it():
    names = set(dir(PoissonSampler(5, 0.5, 1)))
    assert not names & {"batch_size", "sampler", "generator", "drop_last", "set_epoch"}


def test_a_draw_survives_the_way_to_a_worker():
    sent = pickle.loads(pickle.dumps(Draw([3, 5], 17)))
    assert (type(sent), sent, sent.number) == (Draw, [3, 5], 17)


def test_the_key_is_neither_shown_nor_pickled():
    sampler = PoissonSampler(5, 0.5, 1)
    assert str(sampler.key) not in repr(sampler)
    with pytest.raises(HfDpError, match="secret") as caught:
        pickle.dumps(sampler)
    assert str(sampler.key) not in str(caught.value)


def test_everything_out_of_range_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        PoissonSampler(0, float("nan"), 0, process_index=2, num_processes=2)
    for name in ("num_examples", "sample_rate", "num_batches", "process_index"):
        assert name in str(caught.value)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0000001, float("inf")])
def test_rates_that_are_none_are_refused(rate):
    with pytest.raises(ConfigError, match="sample_rate"):
        PoissonSampler(10, rate, 1)
