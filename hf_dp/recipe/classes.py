"""Records and the classes of their texts, or of their words -> examples with the classes' numbers."""

from collections.abc import Sequence
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from hf_dp.errors import RecipeError
from hf_dp.per_example import IGNORED
from hf_dp.recipe.examples import Examples, dataset_of
from hf_dp.recipe.recipe import DataSection
from hf_dp.recipe.records import chunks, column_of, template_of

MAX_LABELS = 20  # a column with more classes, and more than half as many as records, must hold text


def label_names(data: DataSection, train: datasets.Dataset, validation: datasets.Dataset | None) -> list[str | int]:
    """The classes in the order of their numbers.

    They are `data.labels`; else those in the schema of the data set; else those that occur in `validation`. They become
    part of the published model, so they are never read off the private records.

    Raises:
        RecipeError: none of the three is there, there are fewer than two classes, or so many that the column must hold
            text.
    """
    column = column_of(data, "label", train, "train")
    if data.labels is not None:
        names = list(data.labels)
    elif isinstance(inner(train.features[column]), datasets.ClassLabel):
        names = list(inner(train.features[column]).names)
    elif validation is not None:
        values = validation[column_of(data, "label", validation, "validation")]
        found = {tag for value in values for tag in (value if isinstance(value, list) else [value])} - {None}
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
    text = template_of(data, "text", records, which)
    column = column_of(data, "label", records, which)
    numbers = _numbers(records[column], records.features[column], names, which)
    rows: list[list[int]] = []
    for chunk in chunks(records):
        texts = [text.render(r) for r in chunk]
        rows += tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    return Examples(dataset_of({"input_ids": rows, "labels": numbers}, {"labels": datasets.Value("int64")}))


def tagged(
    records: datasets.Dataset,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    sizes: tuple[int, Sequence[str | int]],
    which: str,
) -> Examples:
    """The words of every record, and a class number at the first token of each word; labels are -100 elsewhere. What
    does not fit in `max_length` tokens loses its end.

    Args:
        records: the data.
        data: names the column of the words, and the column of their labels.
        tokenizer: a fast one, which tells of which word a token is.
        sizes: (max_length, names of the classes in the order of their numbers).
        which: train or validation, for messages.

    Raises:
        RecipeError: an unknown column or one without lists, a label that is none of the classes, or records with
            another number of labels than words.
    """
    max_length, names = sizes
    words, column = column_of(data, "words", records, which), column_of(data, "label", records, which)
    for key, name in (("words", words), ("label", column)):
        if not _is_list(records.features[name]):
            raise RecipeError(f"data.{key} on data.{which}: expected lists, one entry a word, in the column {name!r}")
    if not tokenizer.is_fast:
        raise RecipeError("model.name: its tokenizer does not tell of which word a token is; take a fast tokenizer")
    texts, tags = ([row or [] for row in records[name]] for name in (words, column))
    uneven = [number for number, pair in enumerate(zip(texts, tags, strict=True)) if len(pair[0]) != len(pair[1])]
    if uneven:
        raise RecipeError(
            f"data.label on data.{which}: {len(uneven):,} records have another number of labels than of words, the "
            f"first of them in row {uneven[0]:,}"
        )
    numbers = iter(_numbers([tag for row in tags for tag in row], inner(records.features[column]), names, which))
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for text in texts:
        of_word = [next(numbers) for _ in text]
        encoded = tokenizer(
            [str(word) for word in text], is_split_into_words=True, truncation=True, max_length=max_length
        )
        places = encoded.word_ids() if text else [None] * len(encoded["input_ids"])
        first = [place is not None and (at == 0 or places[at - 1] != place) for at, place in enumerate(places)]
        rows["input_ids"].append(list(encoded["input_ids"]))
        rows["labels"].append([of_word[p] if new else IGNORED for p, new in zip(places, first, strict=True)])
    return Examples(dataset_of(rows, {"labels": datasets.Sequence(datasets.Value("int64"))}))


def inner(feature: Any) -> Any:
    """What a column of lists holds in them; of another column, what it holds."""
    if not _is_list(feature):
        return feature
    return feature[0] if isinstance(feature, list) else feature.feature


def _is_list(feature: Any) -> bool:
    return isinstance(feature, list) or getattr(feature, "feature", None) is not None


def _numbers(values: Sequence[Any], feature: Any, names: Sequence[str | int], which: str) -> list[int]:
    number: dict[Any, int] = {name: i for i, name in enumerate(names)}
    by_text = {str(name): i for i, name in enumerate(names)}
    if len(by_text) == len(names):  # a table of text has "0" for 0
        number |= {v: by_text[str(v)] for v in set(values) - number.keys() if str(v) in by_text}
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
