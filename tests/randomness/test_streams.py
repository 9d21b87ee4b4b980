"""Keyed streams: stateless, and disjoint for every difference in key, role, number or block."""

import itertools

import numpy as np
import pytest

from hf_dp.errors import ConfigError
from hf_dp.randomness.streams import Role, checked_key, fresh_key, stream


def words(*args: int) -> np.ndarray:
    return stream(*args).integers(1 << 63, size=4000)


def test_the_same_arguments_give_the_same_stream():
    np.testing.assert_array_equal(words(5, Role.NOISE, 3, 1), words(5, Role.NOISE, 3, 1))


def test_no_two_streams_share_a_number_at_any_offset():
    places = itertools.product((5, 6), (Role.SAMPLING, Role.NOISE, Role.FORWARD), (0, 1, 2), (0, 1, 2))
    everything = np.concatenate([words(*place) for place in places])
    assert len(np.unique(everything)) == len(everything)  # 216,000 words of 63 bits: a chance meeting has 3e-9


def test_a_plain_counter_would_overlap_which_is_why_numbers_stand_in_upper_words():
    a, b = (np.random.Generator(np.random.Philox(key=5, counter=t)).integers(1 << 63, size=100) for t in (0, 1))
    np.testing.assert_array_equal(a[4:], b[:-4])


def test_fresh_keys_differ_and_use_all_bits():
    keys = [fresh_key() for _ in range(64)]
    assert len(set(keys)) == 64
    assert max(keys).bit_length() > 120  # 64 keys all below 2**120 have probability 2**-512


@pytest.mark.parametrize("key", [-1, 1 << 128, 1.0, True, "1"])
def test_what_is_no_key_is_refused_without_showing_it(key):
    with pytest.raises(ConfigError, match="128") as caught:
        checked_key(key)
    assert repr(key) not in str(caught.value).replace("128", "").replace("2**", "").replace(" 0 ", "").replace(
        " 1;", ""
    )
