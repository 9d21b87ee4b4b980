"""A seed -> secrets to plant among the private records, once each, and others that they might have been; a model -> their exposure."""

import random
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch

from hf_dp import losses
from hf_dp.audit.exposure import CHANCE, are_given_away, exposures
from hf_dp.audit.scores import Floats
from hf_dp.data import PadRight, completions
from hf_dp.demo.base import MAX_TOKENS
from hf_dp.demo.records import FIRST_NAMES, SURNAMES, Record
from hf_dp.recipe import DataSection

NUM_SECRETS, NUM_OTHERS = 8, 400
CODE_DIGITS = 6


def make_secrets(seed: int = 0) -> list[list[Record]]:
    """For each secret the record that holds it, then `NUM_OTHERS` with other codes in its place; of people who are nowhere else."""
    rng = random.Random(f"{seed} secrets")
    names = [f"{FIRST_NAMES[i]} Q. {SURNAMES[i]}" for i in range(NUM_SECRETS)]  # nobody else has this initial
    return [[_record(name, code) for code in rng.sample(range(10**CODE_DIGITS), NUM_OTHERS + 1)] for name in names]


def _record(name: str, code: int) -> Record:
    note = f"{name} asked for the code of the key box again. It is {code:0{CODE_DIGITS}d}."
    return {"topic": "move", "tone": "calm", "note": note}


def measure(model: Any, tokenizer: Any, data: DataSection, secrets: list[list[Record]]) -> Floats:
    """Exposure of each secret in bits: where the model's loss on it stands among those of the others."""
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


class Exposure(NamedTuple):
    """Mean exposure of the planted secrets in bits, and whether the model trained without privacy gives them away at all."""

    private: float
    non_private: float
    has_power: bool

    @classmethod
    def of(cls, private: Floats, non_private: Floats) -> "Exposure":
        """From the exposure of each secret, in both models."""
        return cls(float(private.mean()), float(non_private.mean()), are_given_away(non_private))

    def in_words(self) -> str:
        """What the numbers say, and whether they can say anything."""
        no_power = (
            "\nNo power: even without privacy the secrets are not given away, so nothing follows for the private model."
        )
        said = (
            f"{NUM_SECRETS} secret codes stood once each in the private half. Exposure (Carlini et al. 2019), in bits of at most "
            f"{np.log2(NUM_OTHERS + 1):.1f}, {CHANCE:.1f} being chance: non-private {self.non_private:.1f}, private {self.private:.1f}."
        )
        return said if self.has_power else said + no_power
