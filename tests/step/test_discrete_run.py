"""Whole runs with noise="discrete": one example a pass, the step that brute force gives, and a card that verifies."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_dp import PrivateLoop
from hf_dp.accounting.epsilon import spent
from hf_dp.card.schema import PRIVACY_JSON
from hf_dp.errors import CaptureError, ConfigError, ReleaseError
from hf_dp.ledger.ledger import LEDGER_NAME, Ledger, LedgerHeader, read_ledger
from hf_dp.randomness.grid import STD, grid_for
from hf_dp.randomness.noise import NoiseSource
from hf_dp.randomness.streams import ChaChaKey
from hf_dp.step import PrivateStep
from hf_dp.step.integers import add_integer_gradient
from hf_dp.step.release import Releaser
from hf_dp.step.run import PrivateRun
from tests.support import models as M
from tests.support import reference, runs
from tests.support.folders import failures
from tests.support.noise_checks import std_is
from tests.training.test_loop import DATA, losses, mechanism

PRIVACY: dict[str, Any] = {"noise_multiplier": 1.0, "target_delta": 1e-3, "noise": "discrete"}


class Gradients(TrainerCallback):
    """What the optimizer is given."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **k: Any) -> None:
        self.flat = torch.cat([p.grad.flatten() for p in reference.trainable(model).values()])


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """(sum, what was released) of each step."""
    release, seen = PrivateRun.release, []

    def noted(self: PrivateRun, clipped_sum: Tensor, draw_number: int) -> Tensor:
        noisy = release(self, clipped_sum, draw_number)
        seen.append((clipped_sum.clone(), noisy.clone()))
        return noisy

    monkeypatch.setattr(PrivateRun, "release", noted)
    return seen


@pytest.mark.parametrize("sigma", [1.0, 5000.0])
def test_a_step_is_the_float_step_within_the_grid(
    sigma: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brute force in float64, clipped to R steps: off by half a step a coordinate and example; the noise is exact."""
    model, seen, gradients = M.with_lora(M.llama).double(), watched(monkeypatch), Gradients()
    parameters = reference.trainable(model)
    grid = grid_for(sigma, 0.1, sum(p.numel() for p in parameters.values()))
    rows = runs.text_rows()
    batch = [runs.collate([row]) for row in rows]
    parts = [reference.clipped_sum(model, b, reference.causal_lm_loss, grid.radius * grid.step) for b in batch]
    expected = sum(torch.cat([part[name].flatten() for name in parameters]) for part in parts)
    trainer = runs.trainer(tmp_path, model, {**PRIVACY, "noise_multiplier": sigma}, callbacks=[gradients])
    trainer.train()
    (total, released), *_ = seen
    assert total.dtype == torch.int64
    assert released.dtype == torch.float32
    off = (total * grid.step - expected).abs().max()
    assert off <= len(rows) * (grid.step / 2 + 1e-9)  # float64 gradients, each clipped
    assert off > 0.5 * grid.step or sigma == 1.0  # a step is what rounding costs, no less
    noise = released.double() / grid.step - total
    assert float(noise.std()) == pytest.approx(STD, rel=0.1)
    assert (
        float((noise - noise.round()).abs().max()) < 3 * STD * 2.0**-22
    )  # released is whole steps, rounded to float32
    assert torch.allclose(gradients.flat.float(), released / 24, rtol=1e-6, atol=0)


def test_the_sum_has_no_order(tmp_path: Path) -> None:
    """Whatever comes before or after, alone, together or in two sums: the same whole numbers."""
    rows = list(runs.text_rows(8))
    trainer = runs.trainer(tmp_path, privacy=PRIVACY)

    def total(kept: list[Any]) -> Tensor:
        return runs.clipped_sum(trainer, [runs.micro_batch([row]) for row in kept])

    whole = total(rows)
    for seed in range(2):
        shuffled = random.Random(seed).sample(rows, len(rows))
        assert torch.equal(total(shuffled), whole)
        assert torch.equal(total(shuffled[:3]) + total(shuffled[3:]), whole)
    most = grid_for(1.0, 0.1, len(whole)).sensitivity
    for i in range(len(rows)):
        moved = whole - total(rows[:i] + rows[i + 1 :])
        assert 0 < sum(int(n) ** 2 for n in moved.tolist()) <= most**2


def test_an_example_has_a_pass_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = runs.trainer(tmp_path, privacy=PRIVACY, per_device_train_batch_size=8)
    shapes: list[tuple[int, ...]] = []
    add = PrivateStep.add

    def noted(self: PrivateStep, batch: Any) -> None:
        shapes.append(tuple(batch["input_ids"].shape))
        add(self, batch)

    monkeypatch.setattr(PrivateStep, "add", noted)
    trainer.train()
    lengths = [len(row["input_ids"]) for row in runs.text_rows()]
    assert shapes[0] == (1, max(lengths))  # the longest first
    assert sorted(shapes) == sorted((1, length) for length in lengths)  # nobody else's padding
    grid = grid_for(1.0, 0.1, 10)
    with pytest.raises(CaptureError, match="one example a pass, got 2"):
        add_integer_gradient(nn.Linear(2, 1), lambda: torch.zeros(2), 2, grid, {})


def test_card_record_and_ledger_say_it_and_verify(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, privacy={**PRIVACY, "expected_batch_size": 8}, max_steps=3)
    trainer.train()
    trainer.save_model()
    assert failures(tmp_path) == ""
    record, card = json.loads((tmp_path / PRIVACY_JSON).read_text()), (tmp_path / "README.md").read_text()
    assert record["segments"][0]["noise"] == "discrete"
    assert record["mechanism"]["noise_precision"] == "whole numbers"
    assert record["mechanism"]["generator"] == "chacha20"
    assert (record["epsilon_pld"], record["epsilon"]) == ("infinite", trainer.privacy_spent().epsilon)
    assert record["epsilon"] == spent(read_ledger(tmp_path / LEDGER_NAME).segments, 1e-3).rdp
    for words in (
        "discrete Gaussian",
        "whole numbers whose norm is bounded exactly",
        "on no other example",
        "no other bound is claimed",
    ):
        assert words in card
    assert "Arithmetic is idealized" not in card
    assert "secure" not in card.lower()


def test_a_change_of_noise_begins_a_segment_and_all_is_accounted_at_whole_orders(tmp_path: Path) -> None:
    runs.trainer(tmp_path, privacy={**PRIVACY, "noise": "gaussian"}, save_strategy="steps", save_steps=1).train()
    resumed = runs.trainer(tmp_path, privacy=PRIVACY, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    record = read_ledger(tmp_path / LEDGER_NAME)
    assert [(s.noise, s.num_steps) for s in record.executed] == [("gaussian", 1), ("discrete", 1)]
    both = spent([record.segments[1]._replace(num_steps=2)], 1e-3)
    assert resumed.privacy_spent().epsilon == both.epsilon
    assert failures(tmp_path) == ""
    card = (tmp_path / "README.md").read_text()
    assert "Arithmetic is idealized" in card  # for one of the two it is
    assert "bounded exactly" not in card


def test_a_grid_without_room_is_refused_before_there_is_a_folder(tmp_path: Path) -> None:
    for sigma, message in ((0.1, "at least 0.25"), (2e5, "has no room for")):
        with pytest.raises(ConfigError, match=message):
            runs.trainer(tmp_path / "run", privacy={**PRIVACY, "noise_multiplier": sigma})
        assert not (tmp_path / "run" / LEDGER_NAME).exists()


def test_a_loop_takes_it_too(tmp_path: Path) -> None:
    model, optimizer = (net := nn.Linear(4, 3)), torch.optim.SGD(net.parameters(), lr=0.1)
    loop = PrivateLoop(model, optimizer, losses, mechanism(noise="discrete"), tmp_path)
    step = loop.mechanism.noise_std / STD
    for draw in loop.draws(DATA):
        assert all(len(rows) == 1 for batch in draw for rows in batch.values())
        loop.backward(draw)
        whole = torch.cat([p.grad.flatten() for p in model.parameters()]).double() * 20 / step
        assert float((whole - whole.round()).abs().max()) <= float(whole.abs().max()) * 2.0**-22  # rounded twice
        optimizer.step()
    assert loop.privacy_spent().num_steps == 3
    loop.write_card(tmp_path)
    assert failures(tmp_path) == ""


# ---- the exit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "dtype"), [("discrete", torch.float32), ("gaussian", torch.int64)])
def test_a_sum_of_another_kind_than_is_charged_is_refused(noise: str, dtype: torch.dtype, tmp_path: Path) -> None:
    with Ledger.open(tmp_path / LEDGER_NAME, LedgerHeader(100, "record", "zero-out", 1e-3)) as ledger:
        ledger.begin(0.1, 1.0, 0.5, 10, noise)
        releaser = Releaser(ledger, NoiseSource(key=ChaChaKey(3)))
        with pytest.raises(ReleaseError, match=f"would charge noise '{noise}', the sum is {dtype}"):
            releaser(torch.zeros(4, dtype=dtype), sensitivity=0.5, noise_multiplier=1.0)
        assert ledger.record().num_steps == 0


def test_what_is_released_is_the_sum_and_discrete_noise_once(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / LEDGER_NAME, LedgerHeader(100, "record", "zero-out", 1e-3)) as ledger:
        ledger.begin(0.1, 1.0, 0.5, 10, "discrete")
        releaser = Releaser(ledger, NoiseSource(key=ChaChaKey(3)))
        total = torch.arange(100_000) * 10**10  # far beyond what floats hold
        noisy = releaser(total, sensitivity=0.5, noise_multiplier=1.0)
        assert noisy.dtype == torch.int64
        assert std_is((noisy - total).double().numpy(), STD)
        assert not torch.equal(noisy, releaser(total, sensitivity=0.5, noise_multiplier=1.0))
        assert ledger.record().num_steps == 2
