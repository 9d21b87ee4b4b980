"""Memory that runs out in a micro-batch: the same sum in smaller parts, charged once; or, for one example, an error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_dp.errors import ConfigError
from hf_dp.ledger.ledger import LEDGER_NAME, read_ledger
from hf_dp.per_example import capture
from hf_dp.per_example.batches import MicroBatch
from hf_dp.step import PrivateStep
from hf_dp.step.memory import MemoryLimit
from tests.support import models as M
from tests.support import runs
from tests.support.marks import quick

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 1"
)


class ScarceStep(PrivateStep):
    """Tells its trainer which passes are made, and which of them are too large."""

    trainer: "Scarce"

    def add(self, batch: dict[str, Tensor]) -> None:
        self.trainer.passes.append(batch["input_ids"].shape)
        self.trainer.short = batch["input_ids"].numel() > self.trainer.room
        super().add(batch)

    def prepare(self) -> None:
        super().prepare()
        self.trainer.begin()


class Scarce(runs.DPTrainer):
    """Runs out of memory `where` a micro-batch has more padded tokens than `room`."""

    step_class = ScarceStep
    room, where, error, short = 0, "forward", CUDA, False

    def __init__(self, **k: Any) -> None:
        super().__init__(**k)
        ScarceStep.trainer = self  # of whichever step: what a loss reads is examined anew once it changes

    def begin(self) -> None:
        self.passes: list[torch.Size] = []

    def example_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        losses = super().example_losses(model, inputs)
        if not self.short:
            return losses
        if self.where == "forward":
            raise self.error
        if self.where == "backward":
            losses.register_hook(self.fail)
        return losses

    def fail(self, gradient: Tensor) -> Tensor:
        raise self.error


def fail_in_the_sum(monkeypatch: pytest.MonkeyPatch, trainer: Scarce) -> None:
    """After some parameters' sums have been added: what is in the buffer then must not stay there."""
    original, calls = capture.add_weighted_sums, [0]

    def failing(block: Any, weights: Tensor, into: dict[str, Tensor]) -> None:
        calls[0] += 1
        if trainer.short and calls[0] % 4 == 0:
            raise trainer.error
        original(block, weights, into)

    monkeypatch.setattr(capture, "add_weighted_sums", failing)


def sums_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, build: Callable[[], nn.Module] | None = None, **scarcity: Any
) -> tuple[list[Tensor], Scarce]:
    """The clipped sums of two steps before noise."""
    torch.manual_seed(0)
    privacy = {**runs.NOISELESS, "expected_batch_size": 16}
    settings = {"per_device_train_batch_size": 8, "max_steps": 2, **scarcity.pop("settings", {})}
    with monkeypatch.context() as patch:
        sums = runs.record_sums(patch)
        trainer = Scarce(
            model=(build or (lambda: M.with_lora(M.llama)))(),
            args=runs.arguments(folder, **settings),
            privacy=runs.PrivacyConfig(clip_norm=0.1, **privacy),
            train_dataset=runs.text_rows(),
            data_collator=runs.collate,
        )
        trainer.room, trainer.where, trainer.error = (
            scarcity.get("room", 10**9),
            scarcity.get("where", "forward"),
            scarcity.get("error", CUDA),
        )
        if trainer.where == "sum":
            fail_in_the_sum(patch, trainer)
        trainer.train()
    return sums, trainer


@pytest.mark.parametrize("error", [CUDA, pytest.param(CPU, marks=pytest.mark.slow)], ids=["accelerator", "CPU"])
@pytest.mark.parametrize("where", quick(("sum",), ["forward", "backward", "sum"]))
def test_a_step_that_runs_out_of_memory_has_the_same_sum(
    where: str, error: RuntimeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty, _ = sums_of(tmp_path / "plenty", monkeypatch)
    scarce, trainer = sums_of(tmp_path / "scarce", monkeypatch, room=31, where=where, error=error)
    assert len(scarce) == len(plenty) == 2
    for a, b in zip(scarce, plenty, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5  # float32 sums in another order
    assert read_ledger(tmp_path / "scarce" / LEDGER_NAME).num_steps == 2  # once a step
    assert max(shape.numel() for shape in trainer.passes) <= 31  # learnt in the first step: the second tries no more


def test_one_example_that_does_not_fit_is_an_error_with_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match=r"truncate .*gradient_checkpointing.*The step is charged, nothing was rel"
    ) as e:
        sums_of(tmp_path, monkeypatch, room=5)
    assert "GiB" not in str(e.value)  # how much was asked for tells a length
    assert read_ledger(tmp_path / LEDGER_NAME).num_steps == 1


def test_what_has_nothing_to_do_with_a_batch_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("a shape is wrong"), ValueError("out of memory.")):
        with pytest.raises(type(error), match=str(error)):
            MemoryLimit().until_it_fits(lambda error=error: (_ for _ in ()).throw(error))  # type: ignore[misc]
    with pytest.raises(torch.OutOfMemoryError):  # no batch was tried: nothing to halve
        MemoryLimit().until_it_fits(lambda: (_ for _ in ()).throw(CUDA))


def test_parts_are_the_batch_whatever_fits() -> None:
    """Every example once and in order; at most half as many tokens after each failure."""
    for size, width in ((1, 4), (2, 7), (7, 3), (12, 5), (16, 16)):
        ids = torch.arange(size * width).view(size, width)
        batch = MicroBatch({"input_ids": ids, "labels": torch.arange(size)}, size)
        room, largest = MemoryLimit(), size
        while True:
            parts = list(room.parts([batch]))
            assert torch.equal(torch.cat([p["labels"] for p in parts]), batch["labels"])
            assert max(p.size for p in parts) <= largest
            if largest == 1:
                break
            room._part = (largest, width)
            room._halve()
            largest = -(-largest // 2)


def test_a_limit_learnt_on_long_records_leaves_short_ones_together() -> None:
    room = MemoryLimit()
    room._part = (8, 100)
    room._halve()
    long, short = (MicroBatch({"input_ids": torch.zeros(8, n), "labels": torch.zeros(8)}, 8) for n in (100, 50))
    assert [len(p["labels"]) for p in room.parts([long])] == [4, 4]
    assert len([*room.parts([short])]) == 1


@pytest.mark.slow
def test_nothing_about_memory_is_left_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs that differ in what fits leave files of the same names, logs of the same keys and the same numbers."""
    settings = {"save_strategy": "steps", "save_steps": 1}
    plenty = sums_of(tmp_path / "plenty", monkeypatch, settings=settings)[1]
    scarce = sums_of(tmp_path / "scarce", monkeypatch, room=31, settings=settings)[1]
    names = [
        sorted(str(p.relative_to(t.args.output_dir)) for p in Path(t.args.output_dir).rglob("*"))
        for t in (plenty, scarce)
    ]
    assert names[0] == names[1]
    own = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "epoch"}
    logs = [
        [{k: v for k, v in entry.items() if k not in own} for entry in t.state.log_history] for t in (plenty, scarce)
    ]
    assert len(logs[0]) == len(logs[1])
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-6)  # float32 sums in another order
