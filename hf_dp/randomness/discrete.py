"""A stream of random words and a count -> draws from the discrete Gaussian N_Z(0, S**2), S = 2**22, without floats.

**The method** (after Karney 2016, who takes j = 0, 1, ... standard deviations). A proposal is |X| = j W + U, where

    W = S / 32                  the width of a bin
    j                           from a table, with probability proportional to exp(-(j / 32)**2 / 2)
    U                           uniform on 0 .. W - 1

and it is kept with probability exp(-gamma), where gamma = U (2 j W + U) / 2 S**2 = N / 2**45 < 1 with a whole number N.
The coin of probability exp(-gamma) is von Neumann's (Canonne, Kamath, Steinke 2020, algorithm 1): toss coins of
probability gamma / 1, gamma / 2, gamma / 3, ... up to the first failure; the number of tosses is odd with probability
exp(-gamma). Each of these coins compares one random whole number with another. At last a random sign is given, and one
of the two zeros, +0 and -0, is rejected (algorithm 2).

**Distance from N_Z(0, S**2).** The table compares 512 random bits (64 at first, the rest where they decide) with
probabilities cut to 512 bits, and it ends at j = 767, so |X| < 24 S; beyond that lies a mass below
2 exp(-288) < 2**-414. Both errors together stay below 2**-400 in total variation a coordinate; `accounting.epsilon`
pays for them out of delta. The time that draws take depends on the values drawn.
"""

from bisect import bisect_right
from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hf_dp.randomness.grid import STD

Words: TypeAlias = Callable[[int], NDArray[np.uint64]]  # a count -> so many independent words of 64 random bits

BINS, PER_STD = 768, 32  # j < BINS; bins in a standard deviation
WIDTH = STD // PER_STD  # 2**17
U_BITS, GAMMA_BITS = WIDTH.bit_length() - 1, 2 * STD.bit_length() - 1  # of U: 17; of 2 S**2: 45
TABLE_BITS = 512
SPARE = 64 - GAMMA_BITS  # bits of a word that are left for the coin of probability 1 / k


def discrete_gaussian(words: Words, count: int) -> NDArray[np.int64]:
    """`count` independent draws from N_Z(0, STD**2), at most 24 STD in size."""
    values = np.empty(count, dtype=np.int64)
    have = 0
    while have < count:
        kept = _attempts(words, count - have + (count - have) // 32 + 16)[: count - have]  # about 1 of 60 is rejected
        values[have : have + len(kept)] = kept
        have += len(kept)
    return values


def _attempts(words: Words, count: int) -> NDArray[np.int64]:
    """Those of `count` proposals that are kept, in their order."""
    j = _bins(words, count)
    bits = words(count)
    u = (bits >> np.uint64(64 - U_BITS)).astype(np.int64)
    negative = ((bits >> np.uint64(64 - U_BITS - 1)) & np.uint64(1)).astype(bool)
    numerators = u * (j * (2 * WIDTH) + u)
    kept = _exp_coins(words, numerators, first=(bits & np.uint64((1 << GAMMA_BITS) - 1)).astype(np.int64))
    size = j * WIDTH + u
    kept &= ~(negative & (size == 0))
    return np.where(negative, -size, size)[kept]


@lru_cache(maxsize=1)
def _table() -> tuple[list[int], NDArray[np.uint64]]:
    """For each j but the last, P(bin <= j) cut to TABLE_BITS bits, and the first 64 of them."""
    with localcontext() as context:
        context.prec = 200
        weights = [(-Decimal(j * j) / (2 * PER_STD**2)).exp() for j in range(BINS)]
        total, running, table = sum(weights), Decimal(0), []
        for weight in weights[:-1]:
            running += weight
            table.append(int(running / total * 2**TABLE_BITS))
    return table, np.array([t >> (TABLE_BITS - 64) for t in table], dtype=np.uint64)


def _bins(words: Words, count: int) -> NDArray[np.int64]:
    """j by inversion: how many table entries are <= a random number of 512 bits. 64 bits are drawn first, the rest on a
    tie.
    """
    table, tops = _table()
    first = words(count)
    j = np.searchsorted(tops, first, side="right").astype(np.int64)
    tied = np.flatnonzero((j > 0) & (tops[np.maximum(j - 1, 0)] == first))
    for i in tied.tolist():  # about one in 2**54
        rest = int.from_bytes(words(TABLE_BITS // 64 - 1).tobytes(), "little")
        j[i] = bisect_right(table, int(first[i]) << (TABLE_BITS - 64) | rest)
    return j


def _exp_coins(words: Words, numerators: NDArray[np.int64], first: NDArray[np.int64]) -> NDArray[np.bool_]:
    """For each N: true with probability exp(-N / 2**45). `first` holds 45 fresh bits for the first coin of each N."""
    result = np.ones(len(numerators), dtype=bool)
    running = np.flatnonzero(first < numerators)  # the first coin, of probability gamma / 1, did not fail
    k = 2
    while len(running):  # k - 1 coins did not fail so far
        won = _coins(words, numerators[running], k)
        result[running[~won]] = k % 2 == 1
        running = running[won]
        k += 1
    return result


def _coins(words: Words, numerators: NDArray[np.int64], k: int) -> NDArray[np.bool_]:
    """For each N: true with probability N / (2**45 k). Of a word, 45 bits are compared with N; 19 bits give 1 / k."""
    won = np.empty(len(numerators), dtype=bool)
    left = np.arange(len(numerators))
    fair = (1 << SPARE) // k * k
    while len(left):
        bits = words(len(left))
        divisor = (bits & np.uint64((1 << SPARE) - 1)).astype(np.int64)
        usable = divisor < fair  # from `fair` on, small remainders mod k would be too likely: draw again
        win = ((bits >> np.uint64(SPARE)).astype(np.int64) < numerators[left]) & (divisor % k == 0)
        won[left[usable]] = win[usable]
        left = left[~usable]
    return won
