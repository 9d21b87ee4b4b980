"""A toy data set, collator and trainer for tests of whole runs."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from hf_dp import DPTrainer, PrivacyConfig
from hf_dp.per_example.batches import MicroBatch
from hf_dp.step.run import PrivateRun
from tests.support import models as M

NOISELESS = {"noise_multiplier": 0.0, "debug_seed": 7, "target_delta": 1e-3}


def text_rows(count: int = 24, *, seed: int = 0, longest: int = 15) -> Dataset:
    """Token rows of 3 to `longest` tokens; the first is no target."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [generator.randrange(3, M.VOCAB) for _ in range(generator.randint(3, longest))]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100, *ids[1:]]})
    return Dataset.from_list(rows)


def class_rows(count: int = 24) -> Dataset:
    rows = text_rows(count).remove_columns("labels")
    return rows.add_column("labels", [i % 5 for i in range(count)])


def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Right padding."""
    longest = max(len(f["input_ids"]) for f in features)

    def padded(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([f[name] + [filler] * (longest - len(f[name])) for f in features])

    batch = {"input_ids": padded("input_ids", 0), "attention_mask": padded("attention_mask", 0)}
    labels = [f["labels"] for f in features]
    batch["labels"] = torch.tensor(labels) if isinstance(labels[0], int) else padded("labels", -100)
    return batch


def micro_batch(features: list[dict[str, Any]]) -> MicroBatch:
    return MicroBatch(collate(features), len(features))


def arguments(folder: Path, **k: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
    }
    return TrainingArguments(**{**settings, **k})


def trainer(folder: Path, model: Any = None, privacy: dict[str, Any] | None = None, **k: Any) -> DPTrainer:
    """A DPTrainer on `text_rows`; keywords of `TrainingArguments` and of the trainer may be mixed."""
    own = {"train_dataset": text_rows(), "data_collator": collate}
    own.update({n: k.pop(n) for n in list(k) if n in OF_THE_TRAINER})
    config = PrivacyConfig(
        **{"expected_batch_size": 24, "clip_norm": 0.1, **(NOISELESS if privacy is None else privacy)}
    )
    return DPTrainer(
        model=M.with_lora(M.llama) if model is None else model, args=arguments(folder, **k), privacy=config, **own
    )


OF_THE_TRAINER = (
    "train_dataset data_collator eval_dataset compute_metrics callbacks compute_loss_func micro_batch_tokens "
    "check_records "
    "processing_class optimizers model_init class_weights"
).split()


def collated(rows: list[dict[str, Any]], size: int) -> list[MicroBatch]:
    """The rows in micro-batches of so many, in their order."""
    return [micro_batch(rows[start : start + size]) for start in range(0, len(rows), size)]


def clipped_sum(trainer: DPTrainer, batches: list[MicroBatch], **settings: Any) -> torch.Tensor:
    """The sum that a step over these micro-batches would release, before noise; `settings` replace the mechanism's."""
    step = trainer.private_step
    step.level = dataclasses.replace(step.level, **settings)
    step.prepare()
    step.sum_up(batches)
    return step.sum.flat.clone()


def record_sums(patch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What will be released, before its noise: a clipped sum a step, as long as `patch` lasts."""
    sums: list[torch.Tensor] = []
    release = PrivateRun.release

    def noted(self: PrivateRun, clipped_sum: torch.Tensor, draw_number: int) -> torch.Tensor:
        sums.append(clipped_sum.clone())
        return release(self, clipped_sum, draw_number)

    patch.setattr(PrivateRun, "release", noted)
    return sums
