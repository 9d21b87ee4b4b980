"""ChaCha20 by torch's operations: the cipher's own words, the CPU's normals, and only where it was compared with them.

There is no GPU here: operations run on CPU tensors, and their shapes on "meta"."""

import numpy as np
import pytest
import torch

from hf_dp.errors import HfDpError
from hf_dp.randomness import on_device
from hf_dp.randomness.chacha import ChaCha20Stream
from hf_dp.randomness.noise import BLOCK, NoiseSource
from hf_dp.randomness.streams import ChaChaKey, Role
from tests.support.noise_checks import assert_gaussian, assert_uncorrelated

CPU = torch.device("cpu")
SECRET = (1 << 127) + 12345


@pytest.fixture
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs count as accelerators."""
    monkeypatch.setattr(on_device, "DEVICES", ("cpu", "meta"))
    monkeypatch.setattr(on_device, "_checked", set())


@pytest.mark.parametrize("number", [0, 7, (1 << 24) - 1, 1 << 24, (1 << 48) - 1])
def test_words_are_the_ciphers_at_every_address(number: int) -> None:
    for first in (0, 255, 256, (1 << 40) - 2):
        made = on_device.words(SECRET, Role.NOISE, number, range(first, first + 2), 3, CPU).numpy().view("<u8")
        for i in range(2):
            expected = ChaCha20Stream(SECRET, Role.NOISE, number, first + i).words(24)
            assert np.array_equal(made[i].flatten(), expected)


@pytest.mark.parametrize("numel", [1, 6, 2 * BLOCK, 2 * BLOCK + 7])
def test_the_noise_is_the_cpus_but_for_a_last_bit(on_cpus: None, numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = NoiseSource(key=ChaChaKey(SECRET)).gaussian(numel, std=0.3, device="cpu")
    monkeypatch.setattr(on_device, "DEVICES", ())
    expected = NoiseSource(key=ChaChaKey(SECRET)).gaussian(numel, std=0.3)
    assert made.dtype == torch.float32
    apart = (made.view(torch.int32) - expected.view(torch.int32)).abs()  # in units of the last place
    assert int(apart.max()) <= 2  # a bit of log, of cos, of std
    assert int((apart > 0).sum()) <= numel // 1000


@pytest.mark.parametrize("std", [0.05, 849.5])
def test_the_noise_is_gaussian_and_fresh_at_every_call(on_cpus: None, std: float) -> None:
    source = NoiseSource(key=ChaChaKey(11))
    a, b = (source.gaussian(100_000, std=std, device="cpu").numpy() for _ in range(2))
    assert_gaussian(a, std)
    assert_uncorrelated(a, b)


def test_streams_at_once_are_a_matter_of_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for at_once in (1, 2, 8):
        monkeypatch.setattr(on_device, "AT_ONCE", at_once)
        drawn.append(on_device.gaussian(5, Role.NOISE, 0, 5 * 1000 + 3, 1000, CPU))
    assert all(torch.equal(drawn[0], other) for other in drawn)
    assert len(drawn[0].unique()) > 4990


def test_it_runs_on_shapes_alone() -> None:
    made = NoiseSource(key=ChaChaKey(5)).gaussian(BLOCK + 5, std=1.0, device="meta")
    assert (made.shape, made.device.type, made.dtype) == ((BLOCK + 5,), "meta", torch.float32)


def test_philox_and_cpus_draw_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "gaussian", None)  # not called
    assert NoiseSource(key=ChaChaKey(5)).gaussian(3, std=1.0, device="cpu").shape == (3,)
    assert NoiseSource(key=5).gaussian(3, std=1.0, device="meta").shape == (3,)


def wrong_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "TURNS", (16, 12, 8, 9))


def too_little_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    made = on_device.standard_normal
    monkeypatch.setattr(on_device, "standard_normal", lambda *address: made(*address) * 0.999)


def half_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "LOW", 0x7FFFFFFF)


@pytest.mark.parametrize("bug", [wrong_turn, too_little_noise, half_a_word])
def test_a_device_that_computes_something_else_draws_no_noise(
    on_cpus: None, bug: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(bug)
    bug(monkeypatch)
    with pytest.raises(HfDpError, match=r"does not give what it gives on the CPU.*set noise='gaussian'"):
        NoiseSource(key=ChaChaKey(SECRET)).gaussian(10, std=1.0, device="cpu")
