"""A run leaves behind no text, loss, norm, length or key of the data, and nothing that tells its noise apart."""

import functools
import io
import json
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_dp.ledger.fingerprints import KEY_NAME
from hf_dp.ledger.ledger import LEDGER_NAME
from hf_dp.randomness import noise as noise_module
from hf_dp.randomness.streams import Role, fresh_key, stream
from hf_dp.step import opening as opening_module
from hf_dp.step.run import PrivateRun
from tests.support import models as M
from tests.support import runs
from tests.support.marks import quick

SECRET = "Margarethe Quittenbaum-4711"
LENGTH = 1913  # of the planted record: no other number in the run is this one
STEPS = 3
BATCH = 50  # of 60: the planted record is missing from all three draws once in 200 runs


class Witness:
    """Everything private that a run computed, seen from inside."""

    def __init__(self) -> None:
        self.numbers: list[float] = []
        self.keys: list[int] = []
        self.noise: list[np.ndarray] = []
        self.released_norms: list[float] = []
        self.batch_sizes: list[int] = []
        self.files: dict[str, bytes] = {}
        self.printed = ""
        self.history: list[dict[str, Any]] = []


class WitnessedTrainer(runs.DPTrainer):
    """Notes the loss of each example, the norm of each sum, and the noise."""

    witness: Witness

    def example_losses(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        losses = super().example_losses(model, inputs)
        self.witness.numbers += [*losses.tolist(), float(losses.detach().mean()), float(losses.detach().sum())]
        return losses


def planted_rows() -> Any:
    rows = runs.text_rows(60).to_list()
    long = [3 + i % 90 for i in range(LENGTH)]
    rows[7] = {"input_ids": long, "attention_mask": [1] * LENGTH, "labels": [-100, *long[1:]]}
    data = runs.Dataset.from_list(rows)
    return data.add_column("customer", [SECRET if i == 7 else f"customer {i}" for i in range(60)])


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Witness:
    return witnessed(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def witness_of_metrics(tmp_path_factory: pytest.TempPathFactory) -> Witness:
    """The same with noised loss and batch size in the logs."""
    return witnessed(tmp_path_factory.mktemp("run"), **RUNS["witness_of_metrics"])


RUNS: dict[str, dict[str, Any]] = {"witness": {}, "witness_of_metrics": {"log_loss_up_to": 8.0}}


def witnessed(folder: Path, **privacy: Any) -> Witness:
    """A run with every kind of output: checkpoints, TensorBoard, card, progress bar, printed summary."""
    seen = Witness()
    patch = pytest.MonkeyPatch()

    def noted_key() -> int:
        seen.keys.append(fresh_key())
        return seen.keys[-1]

    def noted_release(self: PrivateRun, clipped_sum: Tensor, draw_number: int) -> Tensor:
        part = clipped_sum.clone()
        noisy = release(self, clipped_sum, draw_number)
        seen.noise.append((noisy - part).numpy().copy())
        seen.released_norms.append(float(noisy[: -2 if privacy else None].norm()) / BATCH)
        # no means over coordinates: they are as small as the optimizer's moments, and now and then one of 1e5 floats
        # equals such a mean by chance
        seen.numbers.extend([float(part.norm()), float(part.norm()) / BATCH, float(part.sum())])
        if privacy:  # the exact metrics, as a log would have them
            loss, size = (part[-2:] * 100).tolist()  # METRIC_NOISE / C
            seen.numbers.extend([loss, loss * 8 / BATCH, loss * 8 / size])
            seen.batch_sizes.append(round(size))
        return noisy

    release = PrivateRun.release
    for module, name, value in (
        (opening_module, "fresh_key", noted_key),
        (noise_module, "checked_key", lambda key: noted_key() if key is None else key),
        (PrivateRun, "release", noted_release),
    ):
        patch.setattr(module, name, value)
    patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "board"))
    printed = io.StringIO()
    patch.setattr("sys.stdout", printed)
    patch.setattr("sys.stderr", printed)
    try:
        WitnessedTrainer.witness = seen
        args = runs.arguments(
            folder / "out",
            max_steps=STEPS,
            learning_rate=0.01,
            save_strategy="steps",
            save_steps=1,
            report_to="tensorboard",
            disable_tqdm=False,
            optim="adamw_torch",
            seed=42,
            data_seed=43,
            logging_first_step=True,
        )
        torch.manual_seed(0)
        model = M.with_lora(lambda: M.llama(max_position_embeddings=2048))
        settings = {"noise_multiplier": 1.0, "expected_batch_size": BATCH, "target_delta": 1e-3, "clip_norm": 0.1}
        config = runs.PrivacyConfig(**settings, **privacy)
        trainer = WitnessedTrainer(
            model, args, train_dataset=planted_rows(), data_collator=runs.collate, privacy=config
        )
        output = trainer.train()
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", output.metrics)
        trainer.save_metrics("train", output.metrics)
        trainer.create_model_card()
    finally:
        patch.undo()
    seen.files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    seen.printed, seen.history = printed.getvalue(), trainer.state.log_history
    return seen


def texts(seen: Witness) -> Iterator[tuple[str, str]]:
    """Every file and all that was printed, as text; binary files byte by byte."""
    yield from ((name, data.decode("latin-1")) for name, data in seen.files.items())
    yield "printed", seen.printed


DIGEST = re.compile(r"[0-9a-f]{32,}")
NUMBER = re.compile(r"\d+\.?\d*")


@functools.cache
def digits_in(text: str) -> set[str]:
    """Leading digits, 6 or 7 of them, of the numbers in a text; wherever the decimal point is, rounded up or down."""
    found = set()
    for word in NUMBER.findall(DIGEST.sub("", text)):
        digits = word.replace(".", "").lstrip("0")[:7]
        if len(digits) >= 6:
            found |= {str(int(digits) + i) for i in (-1, 0, 1)}
    return found


def where_number(x: float, seen: Witness) -> list[str]:
    """Files with `x` in decimal, to six digits or more, or as a float of 32 or 64 bits."""
    if x == 0 or not math.isfinite(x):
        return []
    decimal = {f"{abs(x):.{places}e}".split("e")[0].replace(".", "") for places in (5, 6)}
    packed = [struct.pack(form, x).decode("latin-1") for form in ("<f", "<d", ">f", ">d")]
    return [
        name
        for name, text in texts(seen)
        if any(p in text for p in packed) or (is_text(name) and decimal & digits_in(text))
    ]


def is_text(name: str) -> bool:
    return not name.endswith((".safetensors", ".pt", ".pth", ".bin")) and "tfevents" not in name


def left_numbers(seen: Witness) -> dict[str, list[float]]:
    """Of each file, the run's private numbers that are in it."""
    found: dict[str, list[float]] = {}
    for x in sorted(set(seen.numbers)):
        for name in where_number(x, seen):
            found.setdefault(name, []).append(x)
    return found


def where_bytes(needle: bytes, seen: Witness) -> list[str]:
    return [name for name, text in texts(seen) if needle.decode("latin-1") in text]


# ---- M7 --------------------------------------------------------------------------------------------------------------


def test_the_run_left_all_kinds_of_files(witness: Witness) -> None:
    names = "\n".join(witness.files)
    for expected in (
        "out/checkpoint-3/trainer_state.json",
        "out/checkpoint-3/rng_state.pth",
        "out/checkpoint-3/optimizer.pt",
        "out/checkpoint-3/training_args.bin",
        "out/adapter_model.safetensors",
        "out/privacy.json",
        "out/README.md",
        "out/train_results.json",
        "board/events.out.tfevents",
        f"out/{LEDGER_NAME}",
        f"out/{KEY_NAME}",
    ):
        assert expected in names
    assert "Private training" in witness.printed
    assert len(witness.noise) == STEPS
    assert len(witness.keys) >= 2  # of the draws and of the noise


def test_the_scan_would_find_what_it_looks_for(witness: Witness) -> None:
    number = witness.numbers[5]
    for data in (
        f'{{"loss": {number}}}'.encode(),
        f"loss={number:.7g}, ".encode(),
        struct.pack("<f", number),
        struct.pack("<d", number),
    ):
        planted = Witness()
        planted.files = {"x.json": b"before " + data + b" after"}
        assert where_number(number, planted) == ["x.json"]
        assert where_number(number * 1.37, planted) == []


def test_no_text_and_no_length_of_a_record_is_left(witness: Witness) -> None:
    for needle in (SECRET, SECRET.split()[1], "customer 11"):
        assert where_bytes(needle.encode(), witness) == []
    length = re.compile(rf"(?<![\w.]){LENGTH}(?![\w.])")
    assert [name for name, text in texts(witness) if length.search(text)] == []


@pytest.mark.parametrize("run", quick(("witness",), ["witness", "witness_of_metrics"]))
def test_no_loss_and_no_norm_is_left(run: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """300 numbers are looked for among 1e5 floats: in one run of 60, one is found by chance. A leak is found twice."""
    witness: Witness = request.getfixturevalue(run)
    assert len(witness.numbers) > 3 * STEPS
    if found := left_numbers(witness):
        again = left_numbers(witnessed(tmp_path, **RUNS[run]))
        assert {name: (found[name], again[name]) for name in found.keys() & again.keys()} == {}


def test_logs_hold_public_quantities_alone(witness: Witness) -> None:
    public = {"epoch", "step", "learning_rate", "epsilon", "train_runtime", "train_samples_per_second"}
    public |= {"train_steps_per_second", "grad_norm", "epsilon_of_steps_taken", "signal_to_noise"}
    assert {name for entry in witness.history for name in entry} <= public
    norms = [entry["grad_norm"] for entry in witness.history if "grad_norm" in entry]
    assert norms == pytest.approx(witness.released_norms, rel=1e-5)  # of the noisy gradient: it left already
    state = json.loads(witness.files["out/checkpoint-3/trainer_state.json"])
    assert state["total_flos"] == 0  # it would count the tokens that were drawn
    assert state["num_input_tokens_seen"] == 0
    assert set(json.loads(witness.files["out/train_results.json"])) <= public


def test_logged_metrics_are_the_noisy_ones(witness_of_metrics: Witness) -> None:
    """One entry a step, at sigma 1: the exact number plus the noise on its coordinate, in the log's unit."""
    seen = witness_of_metrics
    logged = [entry for entry in seen.history if "loss" in entry]
    assert len(logged) == len(seen.noise) == STEPS
    assert not any("train_loss" in entry for entry in seen.history)
    for entry, size, noise in zip(logged, seen.batch_sizes, seen.noise, strict=True):
        assert 30 <= size <= 60
        assert entry["batch_size"] == pytest.approx(size + 100 * float(noise[-1]), rel=1e-4)
        assert entry["batch_size"] != pytest.approx(size, abs=1e-4)
        assert 0 < abs(100 * float(noise[-2])) < 70  # 10 sigma = 10: seven of it


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_no_key_of_draws_or_noise_is_left(witness: Witness) -> None:
    for key in witness.keys:
        for needle in (
            str(key).encode(),
            f"{key:x}".encode(),
            key.to_bytes(16, "little")[:8],
            key.to_bytes(16, "little")[8:],
            key.to_bytes(16, "big")[:8],
            key.to_bytes(16, "big")[8:],
        ):
            assert where_bytes(needle, witness) == []


def test_the_fingerprints_key_is_in_its_own_file_alone(witness: Witness) -> None:
    (key,) = [data for name, data in witness.files.items() if name.endswith(KEY_NAME)]
    for needle in (key, key.hex().encode()):
        assert where_bytes(needle, witness) in ([f"out/{KEY_NAME}"], [])


# ---- the noise cannot be told ----------------------------------------------------------------------------------------

LAGS = 1 << 18


def is_found(guess: np.ndarray, noise: np.ndarray) -> bool:
    """Whether the numbers `guess` contain `noise` or a part of it: a correlation above 7 standard errors somewhere.

    The greatest of 2**20 places by chance is at 5.3 standard errors, and beyond 7 once in 400,000 looks.
    """
    head = noise[: min(len(noise), len(guess))]
    head = (head - head.mean()) / head.std()
    size = 1 << (len(guess) + len(head) - 1).bit_length()
    products = np.fft.irfft(np.fft.rfft(guess, size) * np.conj(np.fft.rfft(head, size)), size)[
        : len(guess) - len(head) + 1
    ]
    return bool(np.abs(products).max() > 7 * np.sqrt(len(head)) * max(guess.std(), 1e-9))


def from_seed(seed: int, count: int) -> list[np.ndarray]:
    """What the usual generators, and our own, make of a seed."""
    return [
        torch.randn(count, generator=torch.Generator().manual_seed(seed)).numpy(),
        np.random.RandomState(seed).standard_normal(count),
        np.random.default_rng(seed).standard_normal(count, dtype=np.float32),
        *(stream(seed, Role.NOISE, number).standard_normal(count, dtype=np.float32) for number in range(STEPS)),
    ]


def correlates(seed: int, noise: np.ndarray) -> bool:
    scale = 7 * float(noise.std()) * math.sqrt(len(noise))
    return any(abs(float(guess @ noise)) > scale for guess in from_seed(seed, len(noise)))


def test_the_search_finds_noise_that_comes_from_a_seed(witness: Witness) -> None:
    noise = witness.noise[0]
    for made in from_seed(1234, len(noise)):
        assert correlates(1234, 0.1 * made)
        assert is_found(np.concatenate([np.random.default_rng(1).standard_normal(5000), made * 3.0]), made)


def test_noise_does_not_come_from_the_seeds_that_are_saved(witness: Witness) -> None:
    for seed in (*range(2000), 42, 43, 44, 42 + 1000 * 43):
        assert not correlates(seed, witness.noise[seed % STEPS])


@pytest.mark.slow
def test_noise_does_not_come_from_any_of_a_hundred_thousand_seeds(witness: Witness) -> None:
    for seed in range(100_001):
        assert not correlates(seed, witness.noise[seed % STEPS])


@pytest.mark.parametrize("number", range(1, STEPS + 1))
def test_noise_does_not_come_from_the_generators_that_are_saved(number: int, witness: Witness) -> None:
    """rng_state.pth holds Python's, NumPy's and torch's generators as they stood at each checkpoint."""
    data = witness.files[f"out/checkpoint-{number}/rng_state.pth"]
    with torch.serialization.safe_globals(
        [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.UInt32DType]
    ):
        states = torch.load(io.BytesIO(data), weights_only=True)
    generator = torch.Generator()
    generator.set_state(states["cpu"])
    legacy = np.random.RandomState()
    legacy.set_state(states["numpy"])
    for guess in (torch.randn(LAGS, generator=generator).numpy(), legacy.standard_normal(LAGS)):
        for noise in witness.noise:
            assert not is_found(guess, noise)
            assert not is_found(guess[::-1], noise)


def test_noise_is_not_in_any_file(witness: Witness) -> None:
    """The weights and the optimizer's moments are sums of noisy gradients: no file holds the noise by itself."""
    for data in witness.files.values():
        for noise in witness.noise:
            assert noise[:4].tobytes() not in data


def test_noise_of_different_steps_has_nothing_in_common(witness: Witness) -> None:
    correlation = np.corrcoef(np.stack(witness.noise)) - np.eye(STEPS)
    assert np.abs(correlation).max() < 5 / math.sqrt(len(witness.noise[0]))  # five standard errors


@pytest.mark.slow
def test_two_runs_on_different_data_with_the_same_seeds_have_independent_noise(tmp_path: Path) -> None:
    noises: list[Tensor] = []
    release = PrivateRun.release

    def noted(self: PrivateRun, clipped_sum: Tensor, draw_number: int) -> Tensor:
        part = clipped_sum.clone()
        noisy = release(self, clipped_sum, draw_number)
        noises.append(noisy - part)
        return noisy

    patch = pytest.MonkeyPatch()
    patch.setattr(PrivateRun, "release", noted)
    try:
        for name in "ab":
            torch.manual_seed(0)
            rows = runs.text_rows(24, seed=ord(name))
            privacy = {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 8}
            runs.trainer(tmp_path / name, None, privacy, train_dataset=rows, seed=42, data_seed=42).train()
    finally:
        patch.undo()
    assert abs(float(torch.corrcoef(torch.stack(noises))[0, 1])) < 5 / math.sqrt(len(noises[0]))
    assert float(noises[0].std()) == pytest.approx(0.1, rel=5 / math.sqrt(2 * len(noises[0])))  # sigma x C


def test_exceptions_of_the_privacy_code_show_no_number_of_the_data(tmp_path: Path) -> None:
    """A sum that is not finite: the message says so, and nothing of the sum."""
    from hf_dp.errors import ReleaseError

    trainer = runs.trainer(tmp_path, None, {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 8})
    original = trainer.private_step.add

    def spoiling(batch: Any) -> None:
        original(batch)
        trainer.private_step.sum.flat[3] = math.nan

    trainer.private_step.add = spoiling
    with pytest.raises(ReleaseError) as refusal:
        trainer.train()  # all but once in 17,000 runs some record is drawn
    assert re.findall(r"\d", str(refusal.value)) == []
