"""Random architectures with couplings at random places: of what is trained, one record moves the sum by at most C."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_dp import DPTrainer, PrivacyConfig
from hf_dp.errors import HfDpError
from tests.support import runs
from tests.support.couplings import COUPLINGS, Stack, random_layer

MANY = 4  # examples a pass


class Rows(DPTrainer):
    """The model returns one loss an example."""

    def example_losses(self, model: nn.Module, inputs: Any) -> Tensor:
        losses: Tensor = model(inputs["x"])
        return losses


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {"x": nn.utils.rnn.pad_sequence([row["x"] for row in rows], batch_first=True)}


def random_architecture(seed: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A stack of layers, in two cases of three with a coupling; records of one length or several, one an outlier."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    layers = [random_layer(draw) for _ in range(1 + draw(4))]
    if draw(3):
        coupling = list(COUPLINGS.values())[draw(len(COUPLINGS))]
        layers.insert(draw(len(layers) + 1), coupling)
    lengths = [2 + draw(5) if seed % 2 else 5 for _ in range(6)]
    rows = [{"x": torch.randn(length, 6, generator=generator)} for length in lengths]
    rows[3]["x"] *= 30
    torch.manual_seed(seed)
    return Stack(layers), rows


def trained(seed: int, folder: Path) -> tuple[str, float]:
    """What the trainer decides ('proved', 'one a pass', 'refused'), and the greatest move of the sum, in units of C."""
    model, rows = random_architecture(seed)
    privacy = PrivacyConfig(**{**runs.NOISELESS, "expected_batch_size": 6, "clip_norm": 1.0})
    given = {"train_dataset": rows, "data_collator": collate}
    try:
        trainer = Rows(model, runs.arguments(folder, per_device_train_batch_size=MANY), privacy=privacy, **given)
        trainer.self_check()
    except HfDpError:
        return "refused", 0.0
    size = 1 if trainer.alone_because else MANY

    def total(kept: list[dict[str, Tensor]], clip_norm: float) -> Tensor:
        parts = [kept[i : i + size] for i in range(0, len(kept), size)]
        batches = [batch for part in parts for batch in trainer._collation()(part)]
        return runs.clipped_sum(trainer, batches, clip_norm=clip_norm)

    moves = [0.0]
    for clip_norm in (1e-2, 10.0):
        whole = total(rows, clip_norm)
        without = [total(rows[:i] + rows[i + 1 :], clip_norm) for i in range(len(rows))]
        moves += [float((whole - one).norm()) / clip_norm for one in without]
    return "one a pass" if trainer.alone_because else "proved", max(moves)


def outcomes(seeds: range, folder: Path) -> dict[str, int]:
    counted = dict.fromkeys(("proved", "one a pass", "refused"), 0)
    for seed in seeds:
        decision, move = trained(seed, folder)
        assert move <= 1 + 1e-4, (seed, decision, move)  # float32 sums
        counted[decision] += 1
    return counted


def test_some_random_architectures_move_by_at_most_c(tmp_path: Path) -> None:
    counted = outcomes(range(10), tmp_path)
    assert counted["one a pass"] >= 3
    assert counted["proved"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_300_random_architectures_move_by_at_most_c(tmp_path: Path) -> None:
    counted = outcomes(range(300), tmp_path)
    assert counted["one a pass"] >= 100
    assert counted["proved"] >= 50
