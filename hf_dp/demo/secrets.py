"""A seed -> secrets to plant once each among the private records, and others like them; a model -> how far it gives
them away.
"""

import random
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_dp.audit import Floats, exposures
from hf_dp.demo.base import MAX_TOKENS
from hf_dp.demo.records import FIRST_NAMES, SURNAMES, Record
from hf_dp.demo.scoring import Row, row_losses
from hf_dp.recipe import DataSection, completions

NUM_SECRETS, NUM_OTHERS = 10, 400
CODE_DIGITS = 6
GUESSING = float(np.log2(10**CODE_DIGITS))  # bits of a code of which nothing is known
_IGNORED = -100


def make_secrets(seed: int | str = 0) -> list[list[Record]]:
    """For each secret, its record, and `NUM_OTHERS` records with other codes; the people occur nowhere else."""
    rng = random.Random(f"{seed} secrets")
    names = [f"{FIRST_NAMES[i]} Q. {SURNAMES[i]}" for i in range(NUM_SECRETS)]  # nobody else has this initial
    return [[_record(name, code) for code in rng.sample(range(10**CODE_DIGITS), NUM_OTHERS + 1)] for name in names]


def _record(name: str, code: int) -> Record:
    return {"customer": name, "topic": "key", "note": f"The code of the key box is {code:0{CODE_DIGITS}d}."}


def code_rows(
    secrets: Sequence[Sequence[Record]], data: DataSection, tokenizer: PreTrainedTokenizerBase
) -> list[list[Row]]:
    """The same groups as token rows, with labels on the digits of the code alone."""
    tables = [completions(datasets.Dataset.from_list(list(g)), data, tokenizer, MAX_TOKENS).rows for g in secrets]
    return [[_on_the_code(ids) for ids in table["input_ids"]] for table in tables]


def _on_the_code(ids: list[int]) -> Row:
    """A digit is a token, and behind the code stand a full stop and the end-of-text mark."""
    start, end = len(ids) - CODE_DIGITS - 2, len(ids) - 2
    labels = [token if start <= i < end else _IGNORED for i, token in enumerate(ids)]
    return {"input_ids": ids, "labels": labels}


def bits_left(model: Any, tokenizer: PreTrainedTokenizerBase, groups: Sequence[Sequence[Row]]) -> float:
    """How many bits of a planted code the model does not know, on average: the negative log2 of its probability."""
    planted = [group[0] for group in groups]
    return float(row_losses(model, tokenizer, planted).mean() * CODE_DIGITS / np.log(2))


def exposure(model: Any, tokenizer: PreTrainedTokenizerBase, groups: Sequence[Sequence[Row]]) -> Floats:
    """Exposure of each secret in bits, from the rank of the model's loss on it among the losses on the others."""
    found = np.stack([row_losses(model, tokenizer, group) for group in groups])
    return exposures(found[:, 0], found[:, 1:])


def written_out(model: Any, groups: Sequence[Sequence[Row]]) -> int:
    """How many codes the model writes out by greedy decoding, given everything that stands before them."""
    model.eval()
    found = 0
    for planted, *_ in groups:
        row, labels = planted["input_ids"], planted["labels"]
        start = next(i for i, label in enumerate(labels) if label != _IGNORED)
        given = torch.tensor([row[:start]], device=model.device)
        answer = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=CODE_DIGITS, do_sample=False
        )
        found += answer[0, start:].tolist() == row[start : start + CODE_DIGITS]
    return found
