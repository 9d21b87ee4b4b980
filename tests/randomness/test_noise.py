"""The noise is Gaussian with the right standard deviation, from a key of its own, and never twice the same."""

import copy
import multiprocessing
import os
import pickle
import random
import re

import numpy as np
import pytest
import torch

from hf_dp.errors import ConfigError, HfDpError
from hf_dp.randomness.forked_rng import fork_forward_rng
from hf_dp.randomness.noise import BLOCK, NoiseSource
from hf_dp.randomness.streams import ChaChaKey, fresh_key
from tests.support.noise_checks import assert_gaussian, assert_uncorrelated

D = 100_000


@pytest.mark.parametrize("std", [0.05, 0.7, 849.5])
def test_std_mean_and_shape_from_both_sides(std):
    noise = NoiseSource().gaussian(D, std=std)
    assert (noise.dtype, noise.shape) == (torch.float32, (D,))
    assert_gaussian(noise.numpy(), std)


def test_twenty_calls_together_are_one_gaussian_and_pairwise_uncorrelated():
    source = NoiseSource()
    calls = [source.gaussian(D // 10, std=2.0).numpy() for _ in range(20)]
    assert_gaussian(np.concatenate(calls), 2.0)
    for i, a in enumerate(calls):
        for b in calls[:i]:
            assert_uncorrelated(a, b)


def test_blocks_and_threads_do_not_share_or_shift_anything():
    noise = NoiseSource().gaussian(2 * BLOCK + 3, std=1.0).numpy()
    assert_uncorrelated(noise[:BLOCK], noise[BLOCK : 2 * BLOCK])
    for lag in (1, 2, 4, 8):
        assert_uncorrelated(noise[:-lag], noise[lag:])
    assert len(noise) == 2 * BLOCK + 3


@pytest.mark.parametrize("key", [5, ChaChaKey(5)], ids=["philox", "chacha20"])
def test_noise_at_coordinates_is_that_of_the_whole(key):
    size = 2 * BLOCK + 1001
    ranges = [range(3, 10), range(BLOCK - 4, 2 * BLOCK + 5), range(17, 17), range(2 * BLOCK + 5, size), range(3)]
    whole, parts = NoiseSource(key=key), NoiseSource(key=key)
    for std in (0.7, 0.0, 1.3):
        expected = whole.gaussian(size, std=std)
        assert torch.equal(parts.gaussian_at(ranges, size, std=std), torch.cat([expected[list(r)] for r in ranges]))


@pytest.mark.parametrize("wrong", [range(0, 8, 2), range(5, 101), range(-2, 3)])
def test_coordinates_outside_of_the_whole_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"within range\(100\)"):
        NoiseSource(key=5).gaussian_at([wrong], 100, std=1.0)


def test_the_result_does_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(NoiseSource(key=5).gaussian(3 * BLOCK + 7, std=1.0))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_two_sources_differ_and_no_public_seed_matters():
    def noise():
        torch.manual_seed(42)
        np.random.seed(42)
        random.seed(42)
        return NoiseSource().gaussian(D, std=1.0).numpy()

    a, b = noise(), noise()
    assert_uncorrelated(a, b)
    torch.manual_seed(42)
    assert_uncorrelated(a, torch.randn(D).numpy())


def test_drawing_noise_leaves_the_global_generators_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(1)
    np.random.seed(1)
    NoiseSource().gaussian(1000, std=1.0)
    assert torch.equal(torch.rand(3), expected[0])
    np.testing.assert_array_equal(np.random.rand(3), expected[1])


def test_a_fixed_key_repeats_call_by_call():
    a, b = NoiseSource(key=3), NoiseSource(key=3)
    first = a.gaussian(100, std=1.0)
    assert torch.equal(first, b.gaussian(100, std=1.0))
    assert torch.equal(a.gaussian(100, std=1.0), b.gaussian(100, std=1.0))
    assert not torch.equal(first, NoiseSource(key=4).gaussian(100, std=1.0))


def test_every_call_takes_a_new_stream_whatever_its_std_and_size():
    a, b = NoiseSource(key=3), NoiseSource(key=3)
    a.gaussian(100, std=0.0)
    a.gaussian(0, std=1.0)
    b.gaussian(7, std=2.0)
    b.gaussian(7, std=2.0)
    assert torch.equal(a.gaussian(100, std=1.0), b.gaussian(100, std=1.0))


def test_as_many_distinct_values_as_float32_gives():
    noise = NoiseSource().gaussian(D, std=0.001)
    assert len(noise.unique()) > 0.99 * D  # bfloat16 gives 2,705


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_float32_whatever_the_default_dtype(default):
    torch.set_default_dtype(default)
    try:
        assert NoiseSource().gaussian(10, std=1.0).dtype == torch.float32
        assert NoiseSource().gaussian(10, std=0.0).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_zero_std_gives_zeros_and_zero_coordinates_nothing():
    assert torch.equal(NoiseSource().gaussian(5, std=0.0), torch.zeros(5))
    assert NoiseSource().gaussian(0, std=1.0).shape == (0,)


@pytest.mark.parametrize("std", [-1.0, float("nan"), float("inf"), 1e-39, 1e38])
def test_a_std_that_float32_cannot_carry_is_refused(std):
    with pytest.raises(ConfigError, match="std"):
        NoiseSource().gaussian(5, std=std)


def test_the_smallest_and_largest_std_still_give_noise():
    for std in (1e-30, 1e30):
        noise = NoiseSource().gaussian(D, std=std)
        assert noise.isfinite().all()
        assert_gaussian((noise.double() / std).float().numpy(), 1.0)


def test_the_key_is_not_shown_pickled_or_copied():
    key = fresh_key()
    source = NoiseSource(key=key)
    for refused in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(HfDpError, match="secret") as caught:
            refused(source)
        assert str(key) not in str(caught.value)
    assert repr(source) == str(source) == "NoiseSource(key=<secret>)"
    with pytest.raises(ConfigError) as caught:
        NoiseSource(key=1 << 200)
    assert not re.search(r"\d{20}", str(caught.value))


def _draw_in_child(source, queue):
    try:
        source.gaussian(5, std=1.0)
        queue.put("noise")
    except HfDpError as error:
        queue.put(str(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_copy_refuses_to_repeat_its_parents_noise():
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_draw_in_child, args=(NoiseSource(), queue))
    child.start()
    child.join(30)
    assert "parent" in queue.get()


def test_dropout_inside_the_fork_differs_from_step_to_step():
    masks = []
    for _ in range(2):
        with fork_forward_rng(["cpu"]):
            masks.append(torch.nn.functional.dropout(torch.ones(1000), 0.5))
    assert not torch.equal(*masks)
