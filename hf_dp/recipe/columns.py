"""Records -> which of their columns a recipe should take, as far as their names and lengths tell. A person decides."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import datasets

PROMPTS = ("prompt", "instruction", "question", "query", "input", "source", "context", "article", "document")
ANSWERS = ("completion", "response", "answer", "output", "target", "reply", "summary", "highlights")
CLASSES = ("label", "labels", "class", "category", "intent", "sentiment", "topic")
PERSON = re.compile(
    r"(user|author|patient|customer|client|person|speaker|employee|member|student|people|writer)s?[ _-]?"
    r"(id|name|no|nr|number|key)?",
    re.IGNORECASE,
)
LOOKED_AT = 200  # records whose lengths are looked at


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
    if {"chosen", "rejected"} <= {*texts} and "prompt" in texts:
        keys = ("prompt", "chosen", "rejected")
        return Guess("preference", {key: f"{{{key}}}" for key in keys}, label, person)
    prompt, answer = _named(texts, PROMPTS), _named(texts, ANSWERS)
    if prompt and answer:
        return Guess("causal_lm", {"prompt": f"{{{prompt}}}\n", "target": f"{{{answer}}}"}, label, person)
    longest = _longest(records, texts)
    return Guess("causal_lm", {"target": f"{{{longest}}}"} if longest else {}, label, person)


def _named(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first of `wanted` that is a column, whatever its case."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in wanted if name in lower), None)


def _longest(records: datasets.Dataset, texts: Sequence[str]) -> str | None:
    some = records[:LOOKED_AT]
    return max(texts, key=lambda name: sum(len(value or "") for value in some[name]), default=None)


def _is_text(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "string_view")
