"""Nothing goes in -> every key that a recipe may have, with its default and meaning, from the settings' definitions."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hf_dp.config import PrivacyConfig
from hf_dp.recipe.recipe import OF_THE_TRAINER, SECTIONS, DataSection, ModelSection, default_output
from hf_dp.recipe.tasks import TASKS
from hf_dp.training import REFUSED


class Key(NamedTuple):
    """One key.

    Attributes:
        name: `section.key`.
        default: as it is written in a recipe; None where it must be given.
        meaning: in one line.
    """

    name: str
    default: str | None
    meaning: str


def all_keys(task: str = "causal_lm") -> Iterator[Key]:
    """All keys, section by section, in the order of the classes that the sections fill.

    Args:
        task: of `model.task`; those that trl trains have further keys of `training`.

    Raises:
        RecipeError: trl, whose keys they are, is not installed.
    """
    from peft import LoraConfig

    classes: dict[str, Any] = {
        "model": ModelSection,
        "lora": LoraConfig,
        "data": DataSection,
        "training": TASKS[task].arguments,
        "privacy": PrivacyConfig,
    }
    for section in SECTIONS:
        if section == "peft":
            yield Key(
                "peft.type", None, "An adapter other than LoRA, as peft names it; its keys are those of its config."
            )
            continue
        yield from _of(section, classes[section])
        if section == "training":
            yield from (Key(f"training.{name}", "null", meaning) for name, meaning in OF_THE_TRAINER.items())


def _of(section: str, filled: Any) -> Iterator[Key]:
    for field in dataclasses.fields(filled):
        if field.init and not field.name.startswith("_"):
            meaning = _in_one_line(str(field.metadata.get("help", "")))
            if section == "training" and field.name in REFUSED:
                meaning += f" [With privacy, not every value: {REFUSED[field.name][1]}]"
            default = default_output("RECIPE") if field.name == "output_dir" else _default(field)
            yield Key(f"{section}.{field.name}", default, meaning)


def _default(field: "dataclasses.Field[Any]") -> str | None:
    if field.default is not dataclasses.MISSING:
        return _written(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return _written(field.default_factory())
    return None


def _written(value: object) -> str:
    """As a recipe has it; an object that a class makes for itself is left to it."""
    value = getattr(value, "value", value)  # of an enum
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{}" if not value else str(dict(value))
    if value == "":
        return '""'
    return str(value) if isinstance(value, str | int | float | list) else "null"


def _in_one_line(text: str) -> str:
    return " ".join(text.split())
