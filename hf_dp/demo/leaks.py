"""A finished model, the base and who was trained on -> what it gives away: planted secrets, and who was in the data."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_dp.audit import Floats, are_given_away, measured
from hf_dp.demo import secrets
from hf_dp.demo.scoring import row_losses
from hf_dp.demo.secrets import Secret
from hf_dp.recipe import Example


class Leaks(NamedTuple):
    """What one model gives away.

    Attributes:
        extracted: how many of the planted codes are the likeliest of all codes to it.
        guesses: of each secret, the code that is the likeliest to it.
        bits: exposure in bits, on average over the secrets.
        exposed: whether unseen secrets would be so exposed with a probability of at most 1 %.
        membership: area under the curve of telling members from others; 0.5 is guessing.
        membership_low: the lower end of its 95 % interval.
    """

    extracted: int
    guesses: list[int]
    bits: float
    exposed: bool
    membership: float
    membership_low: float

    @property
    def has_power(self) -> bool:
        """Whether any of the three attacks finds something."""
        return self.extracted > 0 or self.exposed or self.membership_low > 0.5


class Records(NamedTuple):
    """Token rows of records that were trained on, of others that were not, and of the secrets."""

    members: Sequence[Example]
    others: Sequence[Example]
    secrets: Sequence[Secret]


def leaks(model: Any, base_losses: Floats, tokenizer: PreTrainedTokenizerBase, records: Records) -> Leaks:
    """Attacks a model. A record counts as a member the more, the more its loss fell below the base model's.

    Args:
        model: the model.
        base_losses: the base model's loss on the members, then on the others.
        tokenizer: theirs.
        records: what is attacked.
    """
    tables = [secrets.code_losses(model, tokenizer, secret) for secret in records.secrets]
    bits = secrets.exposure(tables, records.secrets)
    scores = base_losses - losses_of_people(model, tokenizer, records)
    area = measured(scores[None], _is_member(records)).area
    return Leaks(
        extracted=int((bits > secrets.GUESSING - 0.5).sum()),  # a rank of 1
        guesses=[int(table.argmin()) for table in tables],
        bits=float(bits.mean()),
        exposed=are_given_away(bits),
        membership=area.estimate,
        membership_low=area.low,
    )


def losses_of_people(model: Any, tokenizer: PreTrainedTokenizerBase, records: Records) -> Floats:
    """The loss on the members, then on the others."""
    return row_losses(model, tokenizer, [*records.members, *records.others])


def _is_member(records: Records) -> Any:
    return np.repeat([True, False], [len(records.members), len(records.others)])[None]


def in_words(private: Leaks, plain: Leaks) -> str:
    """What the numbers say, and whether they can say anything."""
    n = secrets.NUM_SECRETS
    said = (
        f"{n} codes stood in one private record each. Of all {secrets.NUM_CODES:,} codes, the planted one is the\n"
        f"likeliest to the non-private model for {plain.extracted} of them, to the private one for {private.extracted}."
    )
    if not plain.has_power:
        return (
            f"{said}\nNo power: even without privacy nothing is given away, so nothing follows for the private model."
        )
    if 2 * plain.extracted < n:
        said += "\nThis time even the non-private model knew fewer than half of them; another run may find more."
    if private.extracted:
        said += "\nThat the private model knows any is unusual: a guess is right once in 10,000."
    return said
