"""Random neighbours: one record moves the released sum by at most C, whatever the other records and the batches."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import models as M
from tests.support import runs

LONGEST = 60
SLACK = {"float32": 1e-5, "bfloat16": 1e-3}  # clipping itself is in float32; padding another way rounds otherwise


def records(generator: random.Random) -> list[dict[str, Any]]:
    """Of any length up to the longest, one-token ones, one without a target, and the same one many times."""
    lengths = [1, 2, LONGEST, LONGEST, *(generator.randint(1, LONGEST) for _ in range(16))]
    rows = []
    for length in lengths:
        ids = [generator.randrange(3, M.VOCAB) for _ in range(length)]
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": ids})
    rows += [{**rows[4], "labels": [-100] * lengths[4]}, *[rows[5]] * 5]
    return rows


class Replay:
    """The clipped sum of any records, by the trainer's own way, before noise."""

    def __init__(self, folder: Path, precision: str) -> None:
        model = M.with_lora(M.llama)
        with torch.no_grad():
            model.get_base_model().lm_head.weight *= 30  # losses, and so norms, of very different sizes
        rows = runs.Dataset.from_list(records(random.Random(0)))
        privacy = {**runs.NOISELESS, "expected_batch_size": len(rows)}
        self.trainer = runs.trainer(folder, model, privacy, train_dataset=rows, bf16=precision == "bfloat16")

    def sum_of(self, rows: list[dict[str, Any]], clip_norm: float, micro_batch: int) -> Tensor:
        return runs.clipped_sum(self.trainer, runs.collated(rows, micro_batch), clip_norm=clip_norm)


@pytest.mark.parametrize(
    ("pairs", "precision"),
    [(8, "float32"), *(pytest.param(200, precision, marks=pytest.mark.slow) for precision in SLACK)],
)
def test_one_record_moves_the_sum_by_at_most_c(pairs: int, precision: str, tmp_path: Path) -> None:
    """C far below all norms, among them, and far above: coupling would hide where all or none are clipped."""
    generator = random.Random(pairs)
    rows, replay = records(random.Random(0)), Replay(tmp_path, precision)
    norms = torch.stack([replay.sum_of([row], 1e9, 1).norm() for row in rows])
    median = float(norms.median())
    assert 1e-3 < float(norms[norms > 0].min()) < median / 2 < 2 * median < float(norms.max()) < 1e3
    greatest = dict.fromkeys((1e-3, median, 1e3), 0.0)
    for _ in range(pairs):
        others, one = generator.sample(rows, generator.randint(0, 8)), generator.choice(rows)
        with_it = generator.sample([*others, one], len(others) + 1)
        for clip_norm in greatest:
            sums = [replay.sum_of(part, clip_norm, generator.choice([2, 5, 16])) for part in (others, with_it)]
            greatest[clip_norm] = max(greatest[clip_norm], float((sums[1] - sums[0]).norm()) / clip_norm)
    assert all(move <= 1 + SLACK[precision] for move in greatest.values()), greatest
    assert greatest[1e-3] > 0.999  # a clipped record takes all that it may
    assert greatest[median] > 0.999
