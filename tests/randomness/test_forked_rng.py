"""Forward randomness is secret, fresh at every step, and leaves no trace in the global generators."""

import random

import numpy as np
import pytest
import torch

from hf_dp.randomness.forked_rng import WORDS, _cpu_state, fork_forward_rng
from hf_dp.randomness.streams import Role, stream


def draws() -> tuple[torch.Tensor, np.ndarray, list[float]]:
    return torch.rand(8), np.random.rand(8), [random.random() for _ in range(8)]


def same(a, b) -> list[bool]:
    return [torch.equal(a[0], b[0]), bool((a[1] == b[1]).all()), a[2] == b[2]]


def seed_everything(seed: int = 42) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.mark.parametrize("drawn", [0, 1, 1000])
def test_global_generators_stand_where_they_stood_however_much_was_drawn(drawn):
    seed_everything()
    expected = draws()
    seed_everything()
    with fork_forward_rng(["cpu"]):
        torch.rand(drawn), torch.randn(drawn), np.random.randn(drawn), random.gauss(0, 1)
    assert same(draws(), expected) == [True, True, True]


def test_global_generators_are_put_back_after_an_exception():
    seed_everything()
    expected = draws()
    seed_everything()
    with pytest.raises(ZeroDivisionError), fork_forward_rng():
        draws()[2].append(1 / 0)
    assert same(draws(), expected) == [True, True, True]


def test_masks_differ_between_steps_and_from_those_of_the_public_seed():
    seed_everything()
    public = draws()
    inside = []
    for _ in range(3):
        seed_everything()
        with fork_forward_rng():
            inside.append(draws())
    for a, b in ((public, inside[0]), (inside[0], inside[1]), (inside[1], inside[2])):
        assert same(a, b) == [False, False, False]


def test_a_debug_seed_repeats_and_another_differs():
    def inside(seed: int):
        with fork_forward_rng(seed=seed):
            return draws()

    assert same(inside(7), inside(7)) == [True, True, True]
    assert same(inside(7), inside(8)) == [False, False, False]


def test_all_words_of_torchs_cpu_state_are_taken():
    words = stream(1, Role.FORWARD, 0).integers(1 << 32, size=WORDS, dtype=np.uint32)
    twin = np.random.MT19937()
    twin.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": WORDS}}
    generator = torch.Generator()
    generator.set_state(_cpu_state(words))
    ours = torch.randint(0, 1 << 32, (2000,), generator=generator, dtype=torch.int64)
    np.testing.assert_array_equal(
        ours.numpy(), twin.random_raw(4000)[1::2]
    )  # torch takes two words, and keeps the second


def test_dropout_keeps_its_rate():
    with fork_forward_rng():
        kept = torch.nn.functional.dropout(torch.ones(100_000), 0.1).ne(0).float().mean()
    assert abs(kept - 0.9) < 5 * (0.09 / 100_000) ** 0.5  # 5 standard errors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_generators_are_forked_too():
    torch.cuda.manual_seed(42)
    expected = torch.rand(8, device="cuda")
    inside = []
    for _ in range(2):
        torch.cuda.manual_seed(42)
        with fork_forward_rng([torch.device("cuda")]):
            inside.append(torch.rand(8, device="cuda"))
        assert torch.equal(torch.rand(8, device="cuda"), expected)
    assert not torch.equal(inside[0], inside[1])
    assert not torch.equal(inside[0], expected)
