"""A private model's folder and a folder of texts that it wrote -> the data set's card, with the model's own guarantee.

What is made from a private model without another look at its records is as private as the model (post-processing). So
record, picture and ledger are the model's, and the card says so.
"""

from collections.abc import Mapping
from pathlib import Path

import yaml

from hf_dp import durable
from hf_dp.card.description import table
from hf_dp.card.readme import read_readme, yaml_of
from hf_dp.card.record import Record
from hf_dp.card.schema import read_record
from hf_dp.card.writing import write_card
from hf_dp.ledger import LEDGER_NAME


def carry_to_texts(source: Path, target: Path, rows: Mapping[str, str], *, name: str) -> None:
    """Writes README.md, privacy.json, picture and ledger beside the texts in `target`, which the model in `source`
    wrote.

    Args:
        source: the model's folder.
        target: that of the texts.
        rows: name -> value, for the card's table: how many there are, and how they were drawn.
        name: of the data set.

    Raises:
        ConfigError: the model's record or card cannot be read.
    """
    if (source / LEDGER_NAME).is_file():
        durable.replace(target / LEDGER_NAME, (source / LEDGER_NAME).read_bytes())
    record = Record.of(read_record(source))
    license_ = yaml_of(read_readme(source / "README.md")).get("license")
    front = {"license": license_} if license_ else {}
    front |= {"task_categories": ["text-generation"], "tags": ["synthetic"]}
    text = f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{_words(record, name, source.resolve().name, rows)}"
    durable.replace(target / "README.md", text.encode())
    write_card(target, record)


def _words(record: Record, name: str, model: str, rows: Mapping[str, str]) -> str:
    promise = (
        "It was made without another look at the training records, so all that is said below of the model holds of "
        "these texts too (post-processing), however many there are."
        if record.private
        else "**NOT PRIVATE**: the model carries no privacy guarantee, so these texts carry none."
    )
    return f"""# {name}

Synthetic texts: each was drawn from the model `{model}`, which was trained on private records. {promise}

{table("about", {"written by": f"`{model}`", **rows})}

Each line has a `prompt`, as somebody chose it, and the `text` that the model wrote after it. The prompts are not
covered: they must hold nothing of the training records. Texts may be wrong, and no person in them need exist.
"""
