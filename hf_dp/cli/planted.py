"""A tokenizer and a model -> made-up secrets to plant among the records, and how far a model gives them away.

A secret is a beginning of random tokens and an end of random tokens, which only memory can tell from the beginning.
Exposure ranks the planted end among others, drawn like it, by the model's loss (`hf_dp/audit/exposure.py`); extracted
is an end that the model writes by itself when it is given the beginning.

Legend: k secrets, n other ends of each.
"""

from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from hf_dp.audit import Floats, exposures
from hf_dp.cli.losses import row_losses
from hf_dp.per_example import IGNORED
from hf_dp.training import DPTrainer

BEGINNING, END = 6, 4  # tokens
NUM_OTHERS = 255
MOST_BITS = float(np.log2(NUM_OTHERS + 1))


class Secrets(NamedTuple):
    """Random tokens: beginnings [k, BEGINNING], and ends [k, 1 + n, END], of which the first is planted."""

    beginnings: NDArray[np.int_]
    ends: NDArray[np.int_]


def make_secrets(tokenizer: PreTrainedTokenizerBase, num: int) -> Secrets:
    """Secrets out of all tokens that are no special ones, by the operating system's randomness."""
    rng, special = np.random.default_rng(), set(tokenizer.all_special_ids)
    ids = np.array([i for i in range(len(tokenizer)) if i not in special])
    return Secrets(rng.choice(ids, (num, BEGINNING)), rng.choice(ids, (num, 1 + NUM_OTHERS, END)))


def planted(rows: datasets.Dataset, secrets: Secrets) -> datasets.Dataset:
    """The rows, with one more for each secret behind them."""
    columns = rows.to_dict()
    for name, values in _rows(secrets.beginnings, secrets.ends[:, 0]).items():
        columns[name] = [*columns[name], *values]
    return datasets.Dataset.from_dict(columns, features=rows.features)


def exposure(trainer: DPTrainer, secrets: Secrets) -> Floats:
    """Each secret's exposure in bits, [k]: MOST_BITS where the planted end has the least loss of all."""
    num, each = secrets.ends.shape[:2]
    rows = _rows(secrets.beginnings.repeat(each, axis=0), secrets.ends.reshape(num * each, END))
    losses = row_losses(trainer, datasets.Dataset.from_dict(rows)).reshape(num, each)
    return exposures(losses[:, 0], losses[:, 1:])


def extracted(model: Any, secrets: Secrets) -> int:
    """How many planted ends the model writes, token by token the likeliest, when it is given the beginning."""
    model.eval()
    ids = torch.tensor(secrets.beginnings, device=model.device)
    with torch.no_grad():
        for _ in range(END):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    written = ids[:, BEGINNING:].cpu().numpy()
    return int((written == secrets.ends[:, 0]).all(1).sum())


def _rows(beginnings: NDArray[np.int_], ends: NDArray[np.int_]) -> dict[str, list[list[int]]]:
    whole = np.concatenate([beginnings, ends], axis=1)
    labels = np.concatenate([np.full_like(beginnings, IGNORED), ends], axis=1)
    return {"input_ids": whole.tolist(), "labels": labels.tolist()}
