"""A trainer of one's own whose collator makes several rows of each record, which are clipped as one; without trl."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_dp
from hf_dp import ConfigError, DPTrainer, PrivacyConfig
from hf_dp.per_example import Batch, as_rows
from tests.support import models as M
from tests.support import reference, runs

ROWS, CLIP = 3, 0.1


def in_chunks(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Each record cut in `ROWS` chunks, which are rows: all first ones, then all second ones, and so on."""
    chunks = []
    for part in range(ROWS):
        for f in features:
            size = -(-len(f["input_ids"]) // ROWS)
            here = slice(part * size, (part + 1) * size)
            chunks.append({name: f[name][here] for name in ("input_ids", "attention_mask", "labels")})
    return runs.collate(chunks)


def of_chunks(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of the target losses of a record's chunks, times their mean: more than a sum over rows."""
    rows = as_rows(batch)
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten(), reduction="none")
    scores = each.view(len(logits), -1).sum(1).unflatten(0, (-1, ROWS))
    return scores.sum(1) * scores.mean(1) / 100


class OfChunks(DPTrainer):
    unit_rows = ROWS

    def example_losses(self, model: nn.Module, inputs: Batch) -> Tensor:
        return of_chunks(model, inputs)


def trainer(folder: Path, collate: Any = in_chunks) -> OfChunks:
    torch.manual_seed(0)
    return OfChunks(
        M.with_lora(M.llama).double(),
        runs.arguments(folder),
        collate,
        runs.text_rows(6),
        privacy=PrivacyConfig(**runs.NOISELESS, expected_batch_size=6, clip_norm=CLIP),
    )


def test_a_record_of_several_rows_is_clipped_as_one(tmp_path: Path) -> None:
    private = trainer(tmp_path)
    assert private.alone_because == ""
    records = list(private.train_dataset)
    batches = [b for some in (records[:4], records[4:]) for b in private._collation()(some)]
    assert [b.size for b in batches] == [4, 2]
    assert batches[0]["input_ids"].shape[:2] == (4, ROWS)
    slow: Any = 0.0
    for record in records:
        one = {name: x.unsqueeze(0) for name, x in in_chunks([record]).items()}
        found = reference.clipped_sum(private.model, one, lambda m, b: of_chunks(m, b).sum(), CLIP)
        slow = slow + torch.cat([g.flatten() for g in found.values()])
    fast = runs.clipped_sum(private, batches)
    assert float((fast - slow).norm() / slow.norm()) < 2e-6  # clipping aims a millionth below C
    private.train()


def test_another_number_of_rows_than_was_said_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{ROWS} rows of each record"):
        trainer(tmp_path, runs.collate)


def test_a_later_record_with_another_number_of_rows_is_an_error_without_its_content(tmp_path: Path) -> None:
    def two_of_the_long(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = in_chunks(features)
        odd = any(len(f["input_ids"]) == 11 for f in features)  # no made-up record is as long
        return {name: x[:-1] for name, x in batch.items()} if odd else batch

    private = trainer(tmp_path, two_of_the_long)
    marked = {"input_ids": [77] * 11, "attention_mask": [1] * 11, "labels": [77] * 11}
    with pytest.raises(hf_dp.CaptureError, match=f"did not make {ROWS} rows of each record") as refusal:
        private._collation()([marked])
    assert "77" not in str(refusal.value)


def test_a_loss_that_mixes_up_whose_rows_are_whose_is_refused(tmp_path: Path) -> None:
    class Mixed(OfChunks):
        def example_losses(self, model: nn.Module, inputs: Batch) -> Tensor:
            """Rows in another order than unit by unit."""
            turned = {name: x.transpose(0, 1).reshape(x.shape) for name, x in inputs.items()}
            return of_chunks(model, turned)

    with pytest.raises(ConfigError, match="compares the examples of a batch"):
        Mixed(
            M.with_lora(M.llama),
            runs.arguments(tmp_path),
            in_chunks,
            runs.text_rows(6),
            privacy=PrivacyConfig(**runs.NOISELESS, expected_batch_size=6, clip_norm=CLIP),
        )


def test_without_trl_its_trainers_name_the_extra_and_all_else_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    for name in [name for name in sys.modules if name.startswith("trl.") or name == "hf_dp.training.on_trl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(hf_dp.training, "on_trl", raising=False)
    for name in ("DPSFTTrainer", "DPDPOTrainer", "DPRewardTrainer"):
        with pytest.raises(ImportError, match=rf"{name} needs the package trl: pip install 'hf_dp\[trl\]'"):
            getattr(hf_dp, name)
    assert {getattr(hf_dp, name).__name__ for name in hf_dp.__all__}
