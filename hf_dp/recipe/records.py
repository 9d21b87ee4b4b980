"""Records and the section `data` of a recipe -> columns, templates and texts; what does not fit is refused."""

from collections.abc import Iterator

import datasets

from hf_dp.errors import RecipeError
from hf_dp.recipe.recipe import COLUMNS, TEMPLATES, DataSection
from hf_dp.recipe.template import Template, missing_column, no_text

CHUNK = 1000  # records read at once


def check_columns(data: DataSection, records: datasets.Dataset, which: str = "train") -> None:
    """Refuses templates and labels that the records don't suit, before a model is loaded for them.

    Raises:
        RecipeError: a column that they name is missing or holds no text; names all of one template.
    """
    for key in TEMPLATES:
        if getattr(data, key):
            template_of(data, key, records, which)
    for key in COLUMNS:
        if getattr(data, key):
            column_of(data, key, records, which)


def columns_in_words(records: datasets.Dataset) -> str:
    """The columns with what they hold: `text (text), age (int64)`. Everything in a CSV file is text."""
    return ", ".join(f"{name} ({_held(feature)})" for name, feature in records.features.items())


def _held(feature: object) -> str:
    if isinstance(feature, datasets.ClassLabel):
        return f"one of {feature.num_classes} classes"
    if isinstance(feature, datasets.Value):
        return "text" if feature.dtype in ("string", "large_string", "string_view") else feature.dtype
    return kind_of(feature)


def template_of(data: DataSection, key: str, records: datasets.Dataset, which: str) -> Template:
    """The template that `data` has under this key, with the records' columns in its places.

    Args:
        data: the section; a template that is missing is empty.
        key: such as prompt.
        records: the data.
        which: train or validation, for messages.

    Raises:
        RecipeError: a column that it names is missing, or holds no text.
    """
    try:
        template = Template.parse(getattr(data, key) or "").resolve(records.column_names)
        wrong = [no_text(name, kind_of(f)) for name in template.columns() if kind_of(f := records.features[name])]
        if wrong:
            raise RecipeError("; ".join(wrong))
        return template
    except RecipeError as error:
        raise RecipeError(f"data.{key} on data.{which}: {error}") from None


def column_of(data: DataSection, key: str, records: datasets.Dataset, which: str) -> str:
    """The column that `data` names under this key, or the first that is there of several, as `label|class`.

    Raises:
        RecipeError: none of them is there.
    """
    alternatives = [name.strip() for name in str(getattr(data, key)).split("|")]
    found = [name for name in alternatives if name in records.column_names]
    if not found:
        raise RecipeError(f"data.{key} on data.{which}: {missing_column(alternatives, records.column_names)}")
    return found[0]


def kind_of(feature: object) -> str:
    """What a column holds, if that is neither text nor a number; otherwise ""."""
    if isinstance(feature, datasets.ClassLabel):
        return ""
    if isinstance(feature, datasets.Value):
        text = feature.dtype in ("string", "large_string", "string_view", "bool", "null")
        return "" if text or feature.dtype.startswith(("int", "uint", "float")) else f"values of type {feature.dtype}"
    return "objects" if isinstance(feature, dict) else f"values of type {type(feature).__name__}"


def chunks(records: datasets.Dataset) -> Iterator[list[dict[str, object]]]:
    """The records, some at a time."""
    for start in range(0, len(records), CHUNK):
        columns = records[start : start + CHUNK]
        yield [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
