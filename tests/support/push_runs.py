"""Trains a tiny model and pushes it, once for each KIND-STRATEGY.

    python -m tests.support.push_runs FOLDER lora-end full-every_save ...

Run by `tests/cli/test_hub.py` in a process of its own, against the server that HF_ENDPOINT names.
"""

import sys
from pathlib import Path

import torch

from tests.support import models as M
from tests.support import runs

STRAY = "what lay in the folder before"
STRAYS = (".env", "id_rsa", "train.jsonl", "wandb/run.log", "notes/config.json")


def push(folder: Path, kind: str, strategy: str) -> None:
    torch.manual_seed(0)
    for name in STRAYS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(STRAY)
    (folder / "vocab.txt").symlink_to(folder / ".env")
    base = M.llama()
    base.save_pretrained(folder.parent / "base")
    base.name_or_path = base.config._name_or_path = str(folder.parent / "base")
    trainer = runs.trainer(
        folder,
        M.with_lora(lambda: base) if kind == "lora" else base,
        {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 8},
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        push_to_hub=True,
        hub_strategy=strategy,
        hub_model_id=f"me/{folder.name}",
        optim="adamw_torch",
        learning_rate=1e-3,
    )
    trainer.train()
    trainer.push_to_hub()


if __name__ == "__main__":
    for name in sys.argv[2:]:
        push(Path(sys.argv[1]) / name, *name.split("-"))
