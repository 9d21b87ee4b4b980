"""A model and token rows -> the loss of each row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_dp.audit import Floats
from hf_dp.per_example import losses
from hf_dp.recipe import Example, PadRight

BATCH = 128


def row_losses(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]) -> Floats:
    """The mean loss of each row over its labels, in nats a token, [rows]."""
    collate, found = PadRight(tokenizer.pad_token_id), []
    model.eval()
    for start in range(0, len(rows), BATCH):
        batch = {name: x.to(model.device) for name, x in collate(rows[start : start + BATCH]).items()}
        labels = batch.pop("labels")
        with torch.no_grad():
            found.append(losses.causal_lm(model(**batch), labels).double().cpu().numpy())
    return np.concatenate(found)
