"""ChaCha20 as the source of bits: the cipher, its addresses, draws and noise made of them, and what a run states."""

import hashlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from hf_dp.accounting.epsilon import spent
from hf_dp.card.verification import verify
from hf_dp.errors import ConfigError
from hf_dp.ledger.ledger import LEDGER_NAME, read_ledger
from hf_dp.randomness.chacha import WORDS, ChaCha20Stream
from hf_dp.randomness.noise import BLOCK, NoiseSource
from hf_dp.randomness.streams import ChaChaKey, Role, checked_key, keyed_stream
from hf_dp.sampling.poisson import PoissonSampler
from tests.sampling.test_sampling import GATES, N, Q, T, inclusion
from tests.support import runs
from tests.support.noise_checks import assert_gaussian, assert_uncorrelated

D = 100_000


# ---- the cipher ------------------------------------------------------------------------------------------------------


def rotated(x: int, by: int) -> int:
    return (x << by | x >> (32 - by)) & 0xFFFFFFFF


def quarter_round(s: list[int], a: int, b: int, c: int, d: int) -> None:
    for into, plus, turned, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        s[into] = (s[into] + s[plus]) & 0xFFFFFFFF
        s[turned] = rotated(s[turned] ^ s[into], by)


def block(key: bytes, counter: int, nonce: bytes) -> bytes:
    """ChaCha20's block function as RFC 8439, section 2.3, writes it."""
    words = [int.from_bytes(x, "little") for x in (key[i : i + 4] for i in range(0, 32, 4))]
    tail = [int.from_bytes(nonce[i : i + 4], "little") for i in range(0, 12, 4)]
    start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *words, counter, *tail]
    s = list(start)
    for _ in range(10):
        for i in range(4):
            quarter_round(s, i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter_round(s, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return b"".join(((a + b) & 0xFFFFFFFF).to_bytes(4, "little") for a, b in zip(s, start, strict=True))


def test_the_twin_is_the_rfcs_own_example() -> None:
    found = block(bytes(range(32)), 1, bytes.fromhex("000000090000004a00000000"))  # RFC 8439, section 2.3.2
    assert found.hex().startswith("10f1e7e4d13b5915500fdd1fa32071c4")


def test_the_stream_is_chacha20_of_the_hashed_key_and_the_address() -> None:
    key = hashlib.sha256(b"hf_dp ChaCha20" + (77).to_bytes(16, "little")).digest()
    nonce = bytes([2]) + (5).to_bytes(6, "little") + (9).to_bytes(5, "little")
    expected = np.frombuffer(b"".join(block(key, i, nonce) for i in range(3)), dtype="<u8")
    stream = ChaCha20Stream(77, 2, 5, 9)
    np.testing.assert_array_equal(np.concatenate([stream.words(5), stream.words(19)]), expected)


def test_no_two_addresses_share_a_word_at_any_offset() -> None:
    places = itertools.product((5, 6), (Role.SAMPLING, Role.NOISE), (0, 1, 256), (0, 1, 256))
    everything = np.concatenate([ChaCha20Stream(*place).words(4000) for place in places])
    assert len(np.unique(everything)) == len(everything)  # 144,000 words of 64 bits: a chance meeting has 6e-10


@pytest.mark.parametrize("address", [(1, 1 << 48, 0), (1, 0, 1 << 40), (1, -1, 0), (256, 0, 0)])
def test_an_address_beyond_its_bits_is_refused(address: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="2\\*\\*48"):
        ChaCha20Stream(5, *address)


def test_a_stream_ends_before_the_ciphers_counter_starts_again() -> None:
    stream = ChaCha20Stream(5, 1, 0)
    stream.words(3)
    with pytest.raises(ConfigError, match=f"{WORDS - 3} words left"):
        stream.words(WORDS - 2)


def test_a_key_says_which_generator_and_does_not_show_itself() -> None:
    assert isinstance(keyed_stream(3, Role.NOISE, 0), np.random.Generator)
    assert isinstance(keyed_stream(ChaChaKey(3), Role.NOISE, 0), ChaCha20Stream)
    assert "98765" not in f"{ChaChaKey(98765)} {ChaChaKey(98765)!r}"
    with pytest.raises(ConfigError, match="128"):
        checked_key(ChaChaKey(1 << 128))


# ---- what is made of its bits ----------------------------------------------------------------------------------------


def test_uniforms_are_uniform() -> None:
    uniforms = ChaCha20Stream(1, 1, 0).random(D)
    assert 0 <= uniforms.min() < 1e-3 < 1 - 1e-3 < uniforms.max() < 1
    assert stats.kstest(uniforms, "uniform").pvalue > 1e-6
    assert len(np.unique(uniforms)) == D
    np.testing.assert_array_equal(uniforms * 2.0**53 % 1, 0)


@pytest.mark.parametrize("count", [D, D + 1])
def test_normals_are_gaussian_and_their_halves_independent(count: int) -> None:
    out = np.empty(count, dtype=np.float32)
    ChaCha20Stream(1, 2, 0).standard_normal(dtype=np.float32, out=out)
    assert_gaussian(out, 1.0)
    half = count // 2
    assert_uncorrelated(out[:half], out[-half:])  # cosine and sine of the same pair
    assert_uncorrelated(np.square(out[:half]), np.square(out[-half:]))


def test_the_smallest_words_give_the_farthest_normals_and_none_is_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, farthest in ((0, 9.4193), ((1 << 64) - 1, 0.0)):
        monkeypatch.setattr(ChaCha20Stream, "words", lambda self, n, word=word: np.full(n, word, dtype=np.uint64))
        out = np.empty(8, dtype=np.float32)
        ChaCha20Stream(1, 2, 0).standard_normal(dtype=np.float32, out=out)
        assert abs(out).max() == pytest.approx(farthest, abs=1e-4)  # sqrt(2 log 2**64)


@pytest.mark.parametrize("std", [0.05, 849.5])
def test_the_noise_is_gaussian_fresh_at_every_call_and_the_same_in_any_number_of_threads(std: float) -> None:
    source = NoiseSource(key=ChaChaKey(11))
    a, b = (source.gaussian(D, std=std).numpy() for _ in range(2))
    assert_gaussian(a, std)
    assert_uncorrelated(a, b)
    assert_uncorrelated(a, NoiseSource(key=11).gaussian(D, std=std).numpy())
    before, drawn = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        drawn.append(NoiseSource(key=ChaChaKey(5)).gaussian(2 * BLOCK + 7, std=1.0))
    torch.set_num_threads(before)
    assert torch.equal(*drawn)
    assert_uncorrelated(drawn[0][:BLOCK].numpy(), drawn[0][BLOCK : 2 * BLOCK].numpy())


def test_draws_are_poisson_and_another_generators() -> None:
    sampler = PoissonSampler(N, Q, T, key=ChaChaKey(3))
    table = inclusion(sampler.draw(t) for t in range(T))
    assert all(gate(table) for gate in GATES)
    assert not np.array_equal(sampler.draw(0), PoissonSampler(N, Q, T, key=3).draw(0))
    slices = [PoissonSampler(N, Q, T, key=ChaChaKey(3), process_index=r, num_processes=2) for r in range(2)]
    whole = [i for part in slices for i in next(iter(part))]
    assert sorted(whole) == sampler.draw(0).tolist()


# ---- a run -----------------------------------------------------------------------------------------------------------

PRIVACY = {"noise_multiplier": 1.0, "target_delta": 1e-3, "noise": "gaussian-chacha20"}


def test_ledger_card_and_privacy_json_say_which_generator_was_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    start = ChaCha20Stream.__init__
    monkeypatch.setattr(
        ChaCha20Stream, "__init__", lambda self, key, role, *a: (made.append(role), start(self, key, role, *a))[1]
    )
    trainer = runs.trainer(tmp_path, privacy=PRIVACY, max_steps=2)
    trainer.train()
    trainer.save_model()
    assert {Role.SAMPLING, Role.NOISE} == set(made)
    assert made.count(Role.NOISE) == 2
    assert read_ledger(tmp_path / LEDGER_NAME).executed[0].noise == "gaussian-chacha20"
    record = json.loads((tmp_path / "privacy.json").read_text())
    assert record["mechanism"]["generator"] == "chacha20"
    assert record["segments"][0]["noise"] == "gaussian-chacha20"
    assert "the cipher ChaCha20" in (tmp_path / "README.md").read_text()
    assert [c for c in verify(tmp_path) if not c.holds] == []
    record["mechanism"]["generator"] = "philox"
    (tmp_path / "privacy.json").write_text(json.dumps(record))
    assert "the noise" in " ".join(c.name for c in verify(tmp_path) if not c.holds)


def test_without_the_library_the_trainer_is_not_even_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(ConfigError, match=r"pip install 'hf_dp\[chacha20\]'"):
        runs.trainer(tmp_path, privacy=PRIVACY)
    runs.trainer(tmp_path, privacy=PRIVACY | {"noise": "gaussian"})


@pytest.mark.slow
def test_a_change_of_generator_begins_a_segment_that_costs_the_same(tmp_path: Path) -> None:
    runs.trainer(tmp_path, privacy=PRIVACY | {"noise": "gaussian"}, save_strategy="steps", save_steps=1).train()
    resumed = runs.trainer(tmp_path, privacy=PRIVACY, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    record = read_ledger(tmp_path / LEDGER_NAME)
    assert [(s.noise, s.num_steps) for s in record.executed] == [("gaussian", 1), ("gaussian-chacha20", 1)]
    resumed.save_model()
    assert "Philox4x64, which is no cipher, then the cipher ChaCha20" in (tmp_path / "README.md").read_text()
    one = spent([record.segments[0]._replace(num_steps=2)], 1e-3)
    assert resumed.privacy_spent().epsilon == one.epsilon
