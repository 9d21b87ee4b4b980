"""Records -> which of their columns a recipe should take, as far as their names and lengths tell; and what speaks
against protecting each by itself. A person decides.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import datasets

from hf_dp.sampling import owners_in

PROMPTS = ("prompt", "instruction", "question", "query", "input", "source", "context", "article", "document")
ANSWERS = ("completion", "response", "answer", "output", "target", "reply", "summary", "highlights")
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue")
CLASSES = ("label", "labels", "class", "category", "intent", "sentiment", "topic")
PERSON = re.compile(
    r"(user|author|patient|customer|client|person|speaker|employee|member|student|people|writer)s?[ _-]?"
    r"(id|name|no|nr|number|key)?",
    re.IGNORECASE,
)
LOOKED_AT = 200  # records whose lengths are looked at
OF_EACH = 4  # records of an owner that are kept at most, where a recipe has to begin somewhere
FEWEST_WORDS = 5  # of a text that is looked for again: many people write the same few words
WORD = re.compile(r"[^\W\d_]+")


class Guess(NamedTuple):
    """What a recipe might take.

    Attributes:
        task: a task of recipes.
        templates: keys of the section `data` with their templates.
        label: a column that seems to hold classes, or None.
        person: a column that seems to say whose a record is, or None.
    """

    task: str
    templates: dict[str, str]
    label: str | None
    person: str | None


def guessed(records: datasets.Dataset) -> Guess:
    """Reads the columns' names, and the length of texts in the first records. There are no templates without a column
    of text.
    """
    texts = [name for name, feature in records.features.items() if _is_text(feature)]
    label = _named(records.column_names, CLASSES)
    person = next((name for name in records.column_names if PERSON.fullmatch(name)), None)
    if {"chosen", "rejected"} <= {*texts}:
        keys = [key for key in ("prompt", "chosen", "rejected") if key in texts]
        kind = "preference" if "prompt" in keys else "reward"
        return Guess(kind, {key: f"{{{key}}}" for key in keys}, label, person)
    talk = _named(records.column_names, CONVERSATIONS)
    if talk and talk not in texts:
        return Guess("chat", {"messages": talk}, label, person)
    prompt, answer = _named(texts, PROMPTS), _named(texts, ANSWERS)
    if prompt and answer:
        return Guess("causal_lm", {"prompt": f"{{{prompt}}}\n", "target": f"{{{answer}}}"}, label, person)
    longest = _longest(records, texts)
    return Guess("causal_lm", {"target": f"{{{longest}}}"} if longest else {}, label, person)


def warnings(records: datasets.Dataset, unit_column: str | None) -> list[str]:
    """What to look at before these records are protected one by one, or as `unit_column` says. The figures are of
    private records: they are to be shown to their owner, and kept nowhere.
    """
    found, person = [], guessed(records).person
    if unit_column is None and person is not None:
        repeated, bounded = _repeated(records[person])
        if repeated:
            found.append(
                f"{person} looks like a person's name or number, and {repeated:,} of {len(records):,} records have one "
                "that stood before, but each record is protected by itself: whoever is in many is protected less. To "
                f"protect all of a person's as one: privacy.unit_column={person}{bounded}"
            )
    alike = near_duplicates(records, unit_column)
    if alike:
        remedy = (
            "remove all but one, or name the column that tells whose they are as privacy.unit_column"
            if unit_column is None
            else "remove all but one"
        )
        found.append(
            f"{alike:,} of {len(records):,} records have the words of another "
            f"{unit_column or 'record'}'s, whatever case, numbers and punctuation: what "
            f"they say is protected less, the more there are. If it is private, {remedy}"
        )
    return found


def near_duplicates(records: datasets.Dataset, unit_column: str | None) -> int:
    """How many records have the same words, in the same order, as a record of another unit.

    Case, numbers, punctuation and spaces do not count, nor do records of fewer than `FEWEST_WORDS` words. All columns
    of text are read, but for `unit_column`. Where records have several owners, their unit is all of these.

    Raises:
        ConfigError: the column does not say whose each record is.
    """
    texts = [name for name, kind in records.features.items() if _is_text(kind) and name not in (unit_column, "")]
    owners: Sequence[object] = range(len(records))
    if unit_column is not None and unit_column in records.column_names:
        owners = owners_in(records, unit_column).sets()
    of_words: dict[bytes, list[object]] = {}  # a hash of the words -> the unit of each record that has them
    columns = [records[name] for name in texts]
    for owner, *values in zip(owners, *columns, strict=True):
        words = WORD.findall(" ".join(value or "" for value in values).lower())
        if len(words) >= FEWEST_WORDS:
            of_words.setdefault(hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest(), []).append(owner)
    return sum(len(found) for found in of_words.values() if len(set(found)) > 1)


def _repeated(values: Sequence[object]) -> tuple[int, str]:
    """How many records have a value, or in their list one, that stood in a record before; and the setting that lists
    need besides their column.
    """
    seen: set[str] = set()
    repeated = 0
    for value in values:
        names = set(map(str, value if isinstance(value, list) else [value]))
        repeated += not seen.isdisjoint(names)
        seen |= names
    in_lists = any(isinstance(value, list) for value in values)
    return repeated, f" privacy.contribution_bound={OF_EACH}" if in_lists else ""


def _named(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first of `wanted` that is a column, whatever its case."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in wanted if name in lower), None)


def _longest(records: datasets.Dataset, texts: Sequence[str]) -> str | None:
    some = records[:LOOKED_AT]
    return max(texts, key=lambda name: sum(len(value or "") for value in some[name]), default=None)


def _is_text(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "string_view")
