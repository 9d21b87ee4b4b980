"""A seed -> secrets to plant once among the private records, and alternatives to them; a model -> how far it gives them
away.
"""

import random
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_dp.audit import CHANCE, Floats, are_given_away, exposures
from hf_dp.demo.base import MAX_TOKENS
from hf_dp.demo.records import FIRST_NAMES, SURNAMES, Record
from hf_dp.per_example import losses
from hf_dp.recipe import DataSection, PadRight, completions

NUM_SECRETS, NUM_OTHERS = 8, 400
CODE_DIGITS = 6


def make_secrets(seed: int = 0) -> list[list[Record]]:
    """For each secret, its record, and `NUM_OTHERS` records with other codes; the people occur nowhere else."""
    rng = random.Random(f"{seed} secrets")
    names = [f"{FIRST_NAMES[i]} Q. {SURNAMES[i]}" for i in range(NUM_SECRETS)]  # nobody else has this initial
    return [[_record(name, code) for code in rng.sample(range(10**CODE_DIGITS), NUM_OTHERS + 1)] for name in names]


def _record(name: str, code: int) -> Record:
    note = f"{name} asked for the code of the key box again. It is {code:0{CODE_DIGITS}d}."
    return {"topic": "move", "tone": "calm", "note": note}


def written_out(model: Any, tokenizer: PreTrainedTokenizerBase, data: DataSection, secrets: list[list[Record]]) -> int:
    """How many secrets the model writes out by greedy decoding, given everything that stands before them."""
    model.eval()
    found = 0
    for group in secrets:
        row = completions(datasets.Dataset.from_list(group[:1]), data, tokenizer, MAX_TOKENS).rows[0]["input_ids"]
        start, end = (
            len(row) - CODE_DIGITS - 2,
            len(row) - 2,
        )  # behind the code stand a full stop and the end-of-text mark
        given = torch.tensor([row[:start]], device=model.device)
        answer = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=CODE_DIGITS, do_sample=False
        )
        found += answer[0, start:].tolist() == row[start:end]
    return found


def measure(model: Any, tokenizer: PreTrainedTokenizerBase, data: DataSection, secrets: list[list[Record]]) -> Floats:
    """Exposure of each secret in bits, from the rank of the model's loss on it among the losses on the alternatives."""
    collate, table = PadRight(tokenizer.pad_token_id), []
    model.eval()
    for group in secrets:  # one length: a digit is a token
        rows = completions(datasets.Dataset.from_list(group), data, tokenizer, MAX_TOKENS).rows
        batch = {name: x.to(model.device) for name, x in collate(rows.to_list()).items()}
        labels = batch.pop("labels")
        with torch.no_grad():
            table.append(losses.causal_lm(model(**batch), labels).double().cpu().numpy())
    found = np.stack(table)
    return exposures(found[:, 0], found[:, 1:])


def given_away(
    model: Any, tokenizer: PreTrainedTokenizerBase, data: DataSection, secrets: list[list[Record]]
) -> tuple[Floats, int]:
    """`measure` and `written_out` of one model."""
    return measure(model, tokenizer, data, secrets), written_out(model, tokenizer, data, secrets)


class Exposure(NamedTuple):
    """How far both models give the planted secrets away.

    Attributes:
        private: mean exposure in the private model, in bits.
        non_private: mean exposure in the non-private model, in bits.
        has_power: whether the non-private model gives the secrets away at all.
        private_written: how many of them the private model writes out.
        non_private_written: how many the non-private model writes out.
    """

    private: float
    non_private: float
    has_power: bool
    private_written: int
    non_private_written: int

    @classmethod
    def of(cls, private: tuple[Floats, int], non_private: tuple[Floats, int]) -> "Exposure":
        """From the exposure of each secret, and how many are written out, in both models."""
        (bits, written), (other_bits, other_written) = private, non_private
        has_power = are_given_away(other_bits) or other_written > 0
        return cls(float(bits.mean()), float(other_bits.mean()), has_power, written, other_written)

    def in_words(self) -> str:
        """What the numbers say, and whether they can say anything."""
        no_power = (
            "\nNo power: even without privacy the secrets are not given away, so nothing follows for the private model."
        )
        said = (
            f"{NUM_SECRETS} secret codes stood once each in the private half. Exposure (Carlini et al. 2019), in bits "
            f"of at most {np.log2(NUM_OTHERS + 1):.1f}, {CHANCE:.1f} being chance: non-private {self.non_private:.1f}, "
            f"private {self.private:.1f}.\nGiven the note up to its code, the non-private model writes out "
            f"{self.non_private_written} of them, the private one {self.private_written}."
        )
        return said if self.has_power else said + no_power
