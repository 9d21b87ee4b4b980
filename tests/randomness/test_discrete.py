"""The sampler of N_Z(0, S²) against the exact law, at its own S and at a small one; its coins counted word by word."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from hf_dp.errors import ConfigError, HfDpError
from hf_dp.randomness import discrete
from hf_dp.randomness.discrete import Words, discrete_gaussian
from hf_dp.randomness.grid import STD
from hf_dp.randomness.noise import BLOCK, NoiseSource
from hf_dp.randomness.streams import ChaChaKey, Role, keyed_stream
from tests.support.noise_checks import FALSE_ALARM, assert_uncorrelated, std_is


def words(key: int) -> Words:
    return keyed_stream(ChaChaKey(key), Role.NOISE, 0).words


def at(std: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler for another power of two, by its own formulas."""
    monkeypatch.setattr(discrete, "WIDTH", std // discrete.PER_STD)
    monkeypatch.setattr(discrete, "U_BITS", (std // discrete.PER_STD).bit_length() - 1)
    monkeypatch.setattr(discrete, "GAMMA_BITS", 2 * std.bit_length() - 1)
    monkeypatch.setattr(discrete, "SPARE", 64 - discrete.GAMMA_BITS)


def agrees(counts: NDArray[np.int64], chances: NDArray[np.float64]) -> bool:
    """Chi-square, two-sided: neither too far from the law nor too near."""
    expected = chances * counts.sum()
    assert expected.min() > 5
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], len(counts) - 1)
    return bool(low < ((counts - expected) ** 2 / expected).sum() < high)


def test_the_constants_fit_each_other() -> None:
    assert (1 << discrete.U_BITS) * discrete.PER_STD == STD
    assert 1 << discrete.GAMMA_BITS == 2 * STD**2
    u, j = (1 << discrete.U_BITS) - 1, discrete.BINS - 1
    assert u * (2 * j * discrete.WIDTH + u) < 1 << discrete.GAMMA_BITS  # gamma < 1
    assert discrete.U_BITS + 1 + discrete.GAMMA_BITS <= 64  # U, sign and first coin share a word without overlap


@pytest.mark.parametrize("std", [64, 256])
def test_every_value_has_its_probability(std: int, monkeypatch: pytest.MonkeyPatch) -> None:
    at(std, monkeypatch)
    draws, reach = discrete_gaussian(words(1), 2_000_000), 3 * std
    weights = np.array([math.exp(-0.5 * (k / std) ** 2) for k in range(-24 * std, 24 * std + 1)])
    chances = weights / weights.sum()
    inside = np.bincount(draws[abs(draws) <= reach] + reach, minlength=2 * reach + 1)
    counts = np.append(inside, (abs(draws) > reach).sum())
    expected = chances[21 * std : 27 * std + 1]
    assert agrees(counts, np.append(expected, 1 - expected.sum()))
    broader = np.array([math.exp(-0.5 * (k / std / 1.01) ** 2) for k in range(-24 * std, 24 * std + 1)])
    other = (broader / broader.sum())[21 * std : 27 * std + 1]
    assert not agrees(counts, np.append(other, 1 - other.sum()))  # 1 % more is seen


def test_at_its_own_size_it_is_the_discrete_gaussian() -> None:
    """Bins of equal probability; at S = 2**22 the sum over a bin is the Gaussian's integral, half to half, to 1e-13."""
    draws = discrete_gaussian(words(2), 1_000_000)
    edges = np.round(stats.norm.ppf(np.arange(1, 400) / 400) * STD).astype(np.int64)
    chances = np.diff(stats.norm.cdf((edges - 0.5) / STD), prepend=0, append=1)
    assert agrees(np.bincount(np.searchsorted(edges, draws, side="right"), minlength=400), chances)
    within = draws & (discrete.WIDTH - 1)  # the low bits are uniform, all of them
    assert agrees(np.bincount(within >> 8, minlength=512), np.full(512, 1 / 512))
    assert agrees(np.bincount(within & 255, minlength=256), np.full(256, 1 / 256))


def test_moments() -> None:
    draws = discrete_gaussian(words(3), 1_000_000) / STD
    n = len(draws)
    assert std_is(draws, 1.0)
    assert not std_is(draws, 1.005)
    for power, moment in enumerate((0, 1, 0, 3, 0, 15), start=1):  # of N(0, 1), and of N_Z / S to 1e-13
        error = math.sqrt((stats.norm.moment(2 * power) - moment**2) / n)
        assert abs((draws**power).mean() - moment) < 5 * error
    assert_uncorrelated(draws[:-1], draws[1:])


def counted(values: NDArray[np.uint64], filler: int) -> tuple[Words, Callable[[], int]]:
    """A stream of these words once, then of fillers, and how many fillers were taken."""
    left, taken = [values], [0]

    def take(count: int) -> NDArray[np.uint64]:
        if left:
            assert count == len(values)
            return left.pop()
        taken[0] += count
        return np.full(count, filler, dtype=np.uint64)

    return take, lambda: taken[0]


@pytest.mark.parametrize("k", [2, 3, 5, 7, 16])
@pytest.mark.parametrize("numerator", [1, 5, 15])
def test_a_coin_is_exact(k: int, numerator: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All words of 4 + 4 bits once each: of those in use exactly one in 16 / N, times one in k, wins."""
    monkeypatch.setattr(discrete, "SPARE", 4)
    every = np.arange(256, dtype=np.uint64)
    stream, again = counted(every, filler=0)  # the word 0 wins
    wins = discrete._coins(stream, np.full(256, numerator, dtype=np.int64), k).sum()
    usable = 256 - again()
    assert usable == 16 * (16 // k * k)
    assert (wins - again()) * 16 * k == usable * numerator


def test_a_run_of_coins_is_exp_of_minus_gamma() -> None:
    stream, scale = words(4), 1 << discrete.GAMMA_BITS
    for gamma in (0.0, 1e-3, 0.3, 0.9, 1 - 2.0**-45):
        n = 400_000
        numerators = np.full(n, int(gamma * scale), dtype=np.int64)
        first = (stream(n) & np.uint64(scale - 1)).astype(np.int64)
        wins = int(discrete._exp_coins(stream, numerators, first).sum())
        chance = math.exp(-gamma)
        assert abs(wins - n * chance) <= 5 * math.sqrt(n * chance * (1 - chance))
        assert gamma or wins == n


def test_the_table_is_the_distribution_function() -> None:
    table, tops = discrete._table()
    weights = [math.exp(-((j / 32) ** 2) / 2) for j in range(discrete.BINS)]
    total = math.fsum(weights)
    for j in (0, 1, 31, 100, 200):
        assert table[j] / 2**512 == pytest.approx(math.fsum(weights[: j + 1]) / total, rel=1e-14)
    assert all(a < b for a, b in itertools.pairwise(table))
    assert 0 < 2**512 - table[-1] < 2**512 * math.exp(-280)  # the last bin, and nothing behind it
    assert [t >> 448 for t in table] == tops.tolist()


@pytest.mark.parametrize("j", [0, 7, 100])
def test_a_tie_is_decided_by_the_bits_behind(j: int) -> None:
    table, tops = discrete._table()
    rest = table[j] & ((1 << 448) - 1)
    for behind, expected in ((rest - 1, j), (rest, j + 1), (rest + 1, j + 1)):
        tail = np.frombuffer(behind.to_bytes(56, "little"), dtype=np.uint64)
        answers = [tops[j : j + 1], tail]
        assert discrete._bins(lambda count, answers=answers: answers.pop(0), 1).tolist() == [expected]


# ---- from a key of its own -------------------------------------------------------------------------------------------


def test_a_source_draws_it_in_blocks_that_share_nothing() -> None:
    source = NoiseSource(key=ChaChaKey(5))
    first, second = source.discrete(BLOCK + 7).numpy(), source.discrete(BLOCK + 7).numpy()
    assert first.dtype == np.int64
    assert std_is(first.astype(np.float64), STD)
    assert len({*first.tolist()} & {*second.tolist()}) < 0.05 * BLOCK  # birthdays: 2**36 pairs, 2**23 likely values
    assert_uncorrelated(first, second)
    assert not np.array_equal(first[:7], first[BLOCK:])
    np.testing.assert_array_equal(first, NoiseSource(key=ChaChaKey(5)).discrete(BLOCK + 7).numpy())
    assert not np.array_equal(first, NoiseSource(key=ChaChaKey(6)).discrete(BLOCK + 7).numpy())


def test_it_takes_chacha20_and_a_process_of_its_own() -> None:
    with pytest.raises(ConfigError, match="give a ChaChaKey"):
        NoiseSource(key=5).discrete(3)
    source = NoiseSource(key=ChaChaKey(5))
    source._process += 1
    with pytest.raises(HfDpError, match="parent process"):
        source.discrete(3)
    assert NoiseSource(key=ChaChaKey(5)).discrete(0).tolist() == []
