"""Records -> examples for training: token rows whose loss is on the target alone, texts with the number of their class,
or prompts with two answers.

Every record becomes exactly one example, or, where long ones are split, one unit of several: so N, which is public,
does not depend on the content of any record.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_dp.errors import RecipeError
from hf_dp.per_example import IGNORED
from hf_dp.recipe.recipe import DataSection
from hf_dp.recipe.template import Template, missing_column, no_text

CHUNK = 1000  # records tokenised at once
MAX_LABELS = 20  # a column with more classes, and more than half as many as records, must hold text


class Examples(NamedTuple):
    """`rows` has the columns input_ids and labels; `num_characters` is the total length of the kept targets (0 for
    classes); `record_of_row` says of which record each row is, where a record may have several.
    """

    rows: datasets.Dataset
    num_characters: int = 0
    record_of_row: Sequence[int] | None = None


class Example(TypedDict):
    """One example: its tokens, and a label for each token, or the number of its class."""

    input_ids: Sequence[int]
    labels: int | Sequence[int]


@dataclass(frozen=True)
class PadRight:
    """A collator: features -> input_ids, attention_mask, labels, [B, T] each (labels [B] for classes), padded on the
    right.
    """

    pad_token_id: int

    def __call__(self, features: Sequence[Example]) -> dict[str, Tensor]:
        """The batch; T is the length of its longest row, at least 1."""
        rows = [list(f["input_ids"]) for f in features]
        width = max([1, *map(len, rows)])
        labels = [f["labels"] for f in features]
        return {
            "input_ids": torch.tensor([row + [self.pad_token_id] * (width - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
            "labels": torch.tensor(
                [
                    label if isinstance(label, int) else list(label) + [IGNORED] * (width - len(label))
                    for label in labels
                ]
            ),
        }


# ---- causal language models ----------------------------------------------------------------------------------------


def completions(
    records: datasets.Dataset,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    which: str = "train",
) -> Examples:
    """Prompt, target and end-of-text mark of every record as one row of tokens; labels are -100 on the prompt.

    Prompt and target are tokenised separately, so that a prompt alone gives the same tokens as in training. A target of
    more than `max_length` tokens loses its end (and the end-of-text mark); then a prompt that does not fit loses its
    beginning. With `data.split` a longer target loses nothing: it is cut in pieces, each a row of its own after the
    prompt, of which what half a row holds stays. A record with an empty target becomes an example without labels: its
    loss and gradient are zero, and it still counts in N.

    Raises:
        RecipeError: a template names an unknown column, or the tokenizer has no end-of-text mark.
    """
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            "the tokenizer has no eos_token, so that a model could not learn where a target ends: set one"
        )
    prompt = _resolved(data.prompt or "", records, f"data.prompt on data.{which}")
    target = _resolved(data.target or "", records, f"data.target on data.{which}")
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    num_characters, record_of_row, number = 0, [], 0
    for chunk in _chunks(records):
        prompts = _tokens(tokenizer, [prompt.render(r) for r in chunk], special=True)
        texts = [target.render(r) for r in chunk]
        for start, text, ids in zip(prompts, texts, _tokens(tokenizer, texts, special=False), strict=True):
            beginning, ended = _beginning(start, tokenizer), [*ids, tokenizer.eos_token_id] if text.strip() else []
            room = max_length - 1 if data.split is None else max_length - min(len(beginning), max_length // 2)
            pieces = [ended[at : at + room] for at in range(0, max(1, len(ended)), room)]
            pieces = pieces[:1] if data.split is None else pieces
            for piece in pieces:
                row = _joined(beginning, piece, tokenizer, max_length)
                rows["input_ids"].append(row)
                rows["labels"].append([IGNORED] * (len(row) - len(piece)) + piece)
            record_of_row += [number] * len(pieces)
            number, kept = number + 1, sum(map(len, pieces))
            num_characters += len((text if kept > len(ids) else str(tokenizer.decode(ids[:kept]))).strip())
    found = _dataset(rows, {"labels": datasets.Sequence(datasets.Value("int32"))})
    return Examples(found, num_characters, record_of_row if data.split else None)


def _beginning(prompt: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt without a closing mark that the tokenizer added; at least one token, for the target to follow."""
    if prompt[-1:] == [tokenizer.eos_token_id] and tokenizer.eos_token_id != tokenizer.bos_token_id:
        prompt = prompt[:-1]
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return prompt or [first]


def _joined(prompt: list[int], ended: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    """The row of a prompt, of which at least one token stays, and what it ends with: a target, or a piece of one."""
    room = max_length - len(ended)
    if len(prompt) > room:
        mark = prompt[:1] if prompt[0] == tokenizer.bos_token_id and room > 1 else []
        prompt = mark + prompt[len(prompt) - room + len(mark) :]
    return prompt + ended


# ---- classification ------------------------------------------------------------------------------------------------


def label_names(data: DataSection, train: datasets.Dataset, validation: datasets.Dataset | None) -> list[str | int]:
    """The classes in the order of their numbers.

    They are `data.labels`; else those in the schema of the data set; else those that occur in `validation`. They become
    part of the published model, so they are never read off the private records.

    Raises:
        RecipeError: none of the three is there, there are fewer than two classes, or so many that the column must hold
            text.
    """
    column = _label_column(data, train, "train")
    if data.labels is not None:
        names = list(data.labels)
    elif isinstance(train.features[column], datasets.ClassLabel):
        names = list(train.features[column].names)
    elif validation is not None:
        found = set(validation[_label_column(data, validation, "validation")]) - {None}
        if len(found) > max(MAX_LABELS, len(validation) / 2):
            raise RecipeError(
                f"data.label: expected a column of classes, got {column!r} with {len(found):,} different values in "
                f"{len(validation):,} records of data.validation; is it text? Name another column, or list data.labels"
            )
        names = sorted(found, key=lambda name: (isinstance(name, str), name))
    else:
        raise RecipeError(
            "data.labels: missing. Class names become part of the published model, so they are not read off private "
            "records: list them (data.labels=[yes, no]), or give data.validation, whose classes are taken"
        )
    if len(names) < 2 or len(set(names)) < len(names):
        raise RecipeError(f"data.labels: expected two different classes or more, got {names}")
    return names


def classified(
    records: datasets.Dataset,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    sizes: tuple[int, Sequence[str | int]],
    which: str,
) -> Examples:
    """Text and class number of every record; a text of more than `max_length` tokens loses its end.

    Args:
        records: the data.
        data: names the template of the text, and the column of the label.
        tokenizer: adds its special tokens.
        sizes: (max_length, names of the classes in the order of their numbers).
        which: train or validation, for messages.

    Raises:
        RecipeError: an unknown column, or a label that is none of the classes.
    """
    max_length, names = sizes
    text = _resolved(data.text or "", records, f"data.text on data.{which}")
    column = _label_column(data, records, which)
    numbers = _numbers(records[column], records.features[column], names, which)
    rows: list[list[int]] = []
    for chunk in _chunks(records):
        texts = [text.render(r) for r in chunk]
        rows += tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    return Examples(_dataset({"input_ids": rows, "labels": numbers}, {"labels": datasets.Value("int64")}))


def _numbers(values: Sequence[Any], feature: Any, names: Sequence[str | int], which: str) -> list[int]:
    number = {name: i for i, name in enumerate(names)}
    if isinstance(feature, datasets.ClassLabel):  # such columns hold numbers of the schema's own names
        values = [None if v is None or v < 0 else feature.names[v] for v in values]
    unknown = sorted({repr(v) for v in values if v not in number})
    if unknown:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise RecipeError(
            f"data.label on data.{which}: expected one of {len(names)} classes "
            f"({', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else ''}), got {len(unknown)} other "
            f"value(s): {shown}. Name another column, or list all classes under data.labels"
        )
    return [number[v] for v in values]


def _label_column(data: DataSection, records: datasets.Dataset, which: str) -> str:
    alternatives = [name.strip() for name in str(data.label).split("|")]
    found = [name for name in alternatives if name in records.column_names]
    if not found:
        raise RecipeError(f"data.label on data.{which}: {missing_column(alternatives, records.column_names)}")
    return found[0]


# ---- preferences ---------------------------------------------------------------------------------------------------


def pairs(records: datasets.Dataset, data: DataSection, which: str) -> Examples:
    """Prompt and two answers of every record, as text: columns prompt, chosen and rejected, which trl tokenises.

    Raises:
        RecipeError: a template names an unknown column.
    """
    templates = {
        name: _resolved(getattr(data, name) or "", records, f"data.{name} on data.{which}")
        for name in ("prompt", "chosen", "rejected")
    }
    rows = {
        name: [template.render(r) for chunk in _chunks(records) for r in chunk] for name, template in templates.items()
    }
    return Examples(datasets.Dataset.from_dict(rows))


# ---- both ----------------------------------------------------------------------------------------------------------


def check_columns(data: DataSection, records: datasets.Dataset, which: str = "train") -> None:
    """Refuses templates and labels that the records don't suit, before a model is loaded for them.

    Raises:
        RecipeError: a column that they name is missing or holds no text; names all of one template.
    """
    for key in ("prompt", "target", "text"):
        if getattr(data, key):
            _resolved(getattr(data, key), records, f"data.{key} on data.{which}")
    if data.label:
        _label_column(data, records, which)


def columns_in_words(records: datasets.Dataset) -> str:
    """The columns with what they hold: `text (text), age (int64)`. Everything in a CSV file is text."""
    return ", ".join(f"{name} ({_held(feature)})" for name, feature in records.features.items())


def _held(feature: object) -> str:
    if isinstance(feature, datasets.ClassLabel):
        return f"one of {feature.num_classes} classes"
    if isinstance(feature, datasets.Value):
        return "text" if feature.dtype in ("string", "large_string", "string_view") else feature.dtype
    return _kind(feature)


def _resolved(text: str, records: datasets.Dataset, where: str) -> Template:
    try:
        template = Template.parse(text).resolve(records.column_names)
        wrong = [no_text(name, _kind(f)) for name in template.columns() if _kind(f := records.features[name])]
        if wrong:
            raise RecipeError("; ".join(wrong))
        return template
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _kind(feature: object) -> str:
    """What a column holds, if that is neither text nor a number; otherwise ""."""
    if isinstance(feature, datasets.ClassLabel):
        return ""
    if isinstance(feature, datasets.Value):
        text = feature.dtype in ("string", "large_string", "string_view", "bool", "null")
        return "" if text or feature.dtype.startswith(("int", "uint", "float")) else f"values of type {feature.dtype}"
    return "objects" if isinstance(feature, dict) else f"values of type {type(feature).__name__}"


def _chunks(records: datasets.Dataset) -> Iterator[list[dict[str, object]]]:
    for start in range(0, len(records), CHUNK):
        columns = records[start : start + CHUNK]
        yield [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> list[list[int]]:
    return [
        list(ids) for ids in tokenizer(texts, add_special_tokens=special, truncation=False, verbose=False)["input_ids"]
    ]


def _dataset(rows: Mapping[str, Sequence[object]], features: dict[str, object]) -> datasets.Dataset:
    schema = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32")), **features})
    return datasets.Dataset.from_dict(rows, features=schema)
