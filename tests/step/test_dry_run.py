"""The dry run at the greatest length: halves before the first draw, changes no bit of a result, tells nothing."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from hf_dp.ledger.ledger import LEDGER_NAME, read_ledger
from hf_dp.step import memory
from hf_dp.step.dry_run import greatest_lengths, largest_micro_batch
from hf_dp.step.memory import MemoryLimit
from tests.step import test_memory
from tests.support import models as M
from tests.support import runs
from tests.support.marks import quick


@pytest.fixture(autouse=True)
def _as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "refuses_memory", lambda model: True)


class Watched(test_memory.Scarce):
    """Notes the passes of the dry run and those of the steps apart."""

    def begin(self) -> None:
        self.of_all = [*getattr(self, "of_all", []), *getattr(self, "passes", [])]
        super().begin()


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryLimit, "try_out", lambda *_: None)


def made(lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    return [{"input_ids": [3] * n, "labels": [3] * n} for n in lengths]


def test_what_does_not_fit_is_halved_before_the_first_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 records of 15 tokens in 31: the step itself never runs out again."""
    monkeypatch.setattr(test_memory, "Scarce", Watched)
    tries = []
    plain = MemoryLimit.until_it_fits

    def noted(room: MemoryLimit, sum_all: Any) -> None:
        tries.append(room._tokens)
        plain(room, sum_all)
        tries.append(room._tokens)

    monkeypatch.setattr(MemoryLimit, "until_it_fits", noted)
    _, trainer = test_memory.sums_of(tmp_path, monkeypatch, room=31, settings={"max_steps": 1})
    longest = max(map(len, trainer.train_dataset["input_ids"]))
    assert trainer.passes[0] == (8, longest)  # the largest micro-batch that there may be, in one piece
    assert tries[0] == tries[1] <= 31
    assert read_ledger(tmp_path / LEDGER_NAME).num_steps == 1


@pytest.mark.slow
@pytest.mark.parametrize("room", quick((31,), [10**9, 31]))
def test_results_and_files_are_those_of_a_run_without_it(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums bit for bit where all fits; where it does not, float32 sums are added in another order."""
    settings = {"save_strategy": "steps", "save_steps": 1}
    tried, a = test_memory.sums_of(tmp_path / "tried", monkeypatch, room=room, settings=settings)
    without(monkeypatch)
    plain, b = test_memory.sums_of(tmp_path / "plain", monkeypatch, room=room, settings=settings)
    for x, y in zip(tried, plain, strict=True):
        assert torch.equal(x, y) if room > 31 else float((x - y).norm() / y.norm()) < 1e-5
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (tmp_path / "tried", tmp_path / "plain")]
    assert names[0] == names[1]
    own = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    logs = [[{k: v for k, v in entry.items() if k not in own} for entry in t.state.log_history] for t in (a, b)]
    for x, y in zip(*logs, strict=True):
        assert x == (y if room > 31 else pytest.approx(y, rel=1e-5))
    for name in ("README.md", "privacy.json", "trainer_state.json"):
        for path in (tmp_path / "tried").rglob(name):
            assert "dry" not in path.read_text().lower()


def test_generators_and_buffers_stand_as_before() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("seen", torch.zeros(3))
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())

    def writes(batches: list[dict[str, Tensor]]) -> None:
        model.get_buffer("seen").add_(1)

    MemoryLimit().try_out(model, lambda: {"labels": torch.zeros(2)}, writes)
    assert torch.equal(model.get_buffer("seen"), torch.zeros(3))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), str(np.random.get_state()))


def test_a_collator_that_draws_leaves_the_generators_alone(tmp_path: Path) -> None:
    def drawing(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        torch.rand(3), np.random.random(), random.random()
        return runs.collate(features)

    trainer = runs.trainer(tmp_path, data_collator=drawing)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    assert trainer._largest_batch()["labels"].shape[0] == 4
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), str(np.random.get_state()))


def test_one_record_too_long_stops_no_run_that_does_not_draw_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error before any draw would tell that the record is there."""
    rows = runs.text_rows(longest=6)
    long = {"input_ids": [5] * 40, "attention_mask": [1] * 40, "labels": [5] * 40}
    data = Dataset.from_list([*rows, long])
    trainer = test_memory.Scarce(
        model=M.with_lora(M.llama),
        args=runs.arguments(tmp_path),
        privacy=runs.PrivacyConfig(clip_norm=0.1, expected_batch_size=1, **runs.NOISELESS),
        train_dataset=data,
        data_collator=runs.collate,
    )
    trainer.room = 39
    trainer.train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_steps == 1


def test_a_cpu_would_not_fail_and_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    tried: list[Any] = []
    for device in ("cpu", "meta"):
        MemoryLimit().try_out(nn.Linear(1, 1, device=device), lambda: {"labels": torch.zeros(2)}, tried.append)
        assert len(tried) == (device != "cpu")


def test_another_failure_is_left_to_the_step() -> None:
    room = MemoryLimit()
    room.try_out(nn.Linear(1, 1), lambda: {"labels": torch.zeros(2)}, lambda _: (_ for _ in ()).throw(IndexError("x")))
    assert room._tokens == float("inf")


def test_lengths_are_the_greatest_of_each_column() -> None:
    data = Dataset.from_list(made((4, 9, 30, 2)))
    assert greatest_lengths(data) == {"input_ids": 30, "labels": 30}
    assert greatest_lengths(data.select([0, 1, 3])) == {"input_ids": 9, "labels": 9}
    short = data.map(lambda r: {"labels": r["labels"][:3]})
    assert greatest_lengths(short) == {"input_ids": 30, "labels": 3}
    assert greatest_lengths(made((4, 9, 2))) == {"input_ids": 9}
    assert greatest_lengths([(torch.zeros(3), 1)] * 2) == {}
    assert greatest_lengths(data.with_transform(lambda r: r)) == {}
    assert [len(r["labels"]) for r in largest_micro_batch(short, made, (2, None), nn.Linear(1, 1))] == [3, 3]


def test_size_and_length_keep_to_every_bound() -> None:
    data = Dataset.from_list(made((4, 9, 30, 2)))
    model = M.llama()
    sizes = {
        (2, None): (2, 30),
        (50, None): (4, 30),
        (4, 60): (2, 30),
        (4, 7): (1, 30),
    }
    for bounds, (size, length) in sizes.items():
        assert [len(r["input_ids"]) for r in largest_micro_batch(data, made, bounds, model)] == [length] * size
    model.config.max_position_embeddings = 16
    assert {len(r["input_ids"]) for r in largest_micro_batch(data, made, (4, None), model)} == {16}
