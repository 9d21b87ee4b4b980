"""A recipe (YAML with the sections model, lora, data, training, privacy) and overrides -> `Recipe`, frozen and checked.

A recipe is a complete run. Paths are relative to the current directory. Reading a recipe opens no data and loads no
model.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

from hf_dp.config import PrivacyConfig, is_number, nearest
from hf_dp.errors import ConfigError, RecipeError
from hf_dp.recipe.settings import problems
from hf_dp.recipe.template import Template
from hf_dp.recipe.yaml_text import Section, nested

SECTIONS = ("model", "lora", "data", "training", "privacy")
# task -> what its data must say, and what they may say besides
OF_A_TASK: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "causal_lm": (("target",), ("prompt", "split")),
    "sequence_classification": (("text", "label"), ("labels",)),
    "preference": (("prompt", "chosen", "rejected", "max_length"), ()),
}
TASKS = tuple(OF_A_TASK)
DOCUMENT = "document"  # the unit of records that are split, if the recipe names no other
DTYPES = ("auto", "float32", "bfloat16")
FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet")
OF_THE_TRAINER = {  # keys of `training` that DPTrainer takes itself -> what they mean
    "micro_batch_tokens": "The most tokens of a micro-batch, padding included: memory and speed only.",
    "class_weights": "A classifier's: how much each class counts in the loss, in the order of data.labels.",
}
Keywords = Mapping[str, Any]  # of a class of another library, which checks their values
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ModelSection:
    """The base model. `name` is a folder or a name on the Hub."""

    name: str = field(metadata={"help": "a folder, or a name on the Hub such as openai-community/gpt2"})
    task: str = field(default="causal_lm", metadata={"help": f"one of {', '.join(TASKS)}"})
    dtype: str = field(default="auto", metadata={"help": f"of the weights: one of {', '.join(DTYPES)}"})
    revision: str | None = field(default=None, metadata={"help": "a branch, tag or commit on the Hub"})


@dataclass(frozen=True)
class DataSection:
    """The records, and how a record becomes an example.

    `train` and `validation` are files (.jsonl, .json, .csv, .parquet) or names on the Hub; `name`, `revision` and the
    splits are only for the Hub. A causal LM needs the templates `prompt` and `target`; a classifier needs the template
    `text` and the column `label`; preferences need the templates `prompt`, `chosen` and `rejected`, and `max_length`.
    """

    train: str = field(metadata={"help": "a file (.jsonl, .json, .csv, .parquet), or a data set's name on the Hub"})
    validation: str | None = field(default=None, metadata={"help": "records to evaluate on; as train"})
    name: str | None = field(default=None, metadata={"help": "which configuration of a data set on the Hub"})
    revision: str | None = field(default=None, metadata={"help": "a branch, tag or commit on the Hub"})
    train_split: str = field(default="train", metadata={"help": "which split of a data set on the Hub is trained on"})
    validation_split: str = field(default="validation", metadata={"help": "which split is evaluated on"})
    prompt: str | None = field(
        default=None, metadata={"help": 'what stands before the target, such as "{title}: "; no loss is taken on it'}
    )
    target: str | None = field(default=None, metadata={"help": 'causal_lm: what is learnt to write, such as "{text}"'})
    chosen: str | None = field(default=None, metadata={"help": "preference: the better answer, a template"})
    rejected: str | None = field(default=None, metadata={"help": "preference: the worse answer, a template"})
    text: str | None = field(default=None, metadata={"help": "sequence_classification: what is read, a template"})
    label: str | None = field(default=None, metadata={"help": "sequence_classification: the column of the class"})
    labels: list[str | int] | None = field(
        default=None, metadata={"help": "the classes' names, which are published; default: those in validation"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "the most tokens of a record; default: as many as the model takes"}
    )
    split: Literal["chunks"] | None = field(
        default=None,
        metadata={
            "help": "causal_lm: chunks, cut longer records in rows of max_length, protected as one; else cut off"
        },
    )


@dataclass(frozen=True)
class Recipe:
    """One run. `training` holds keywords of `TrainingArguments` (of trl's `DPOConfig` for preferences), always with
    `output_dir`; `lora` those of peft's `LoraConfig`.
    """

    name: str
    model: ModelSection
    data: DataSection
    training: Keywords
    privacy: PrivacyConfig
    lora: Keywords | None = None
    micro_batch_tokens: int | None = None
    class_weights: tuple[float, ...] | None = None

    @property
    def output_dir(self) -> Path:
        """Where the model, its card and its ledger go."""
        return Path(self.training["output_dir"])


def read(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies overrides `section.key=value`.

    Raises:
        RecipeError: the file does not exist or is not YAML; or it has unknown, mistyped, missing or contradictory
            settings, or names a file that does not exist. Names everything wrong at once.
        UnsupportedOptionError: options that would void the guarantee.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RecipeError(f"cannot read the recipe {path}: {reason}.") from None
    return from_mapping(nested(text, str(path), overrides), name=path.stem)


def from_mapping(sections: Mapping[str, object], *, name: str) -> Recipe:
    """The recipe in a nested mapping; `name` gives the default output folder, out/NAME.

    Raises:
        RecipeError: as `read`.
    """
    all_sections = f"; the sections are {', '.join(SECTIONS)}"
    wrong = [
        f"{s}: there is no such section{nearest(s, SECTIONS) or all_sections}" for s in sections if s not in SECTIONS
    ]
    wrong += [
        f"{s}: expected `key: value` lines, got {sections[s]!r}"
        for s in SECTIONS
        if not isinstance(sections.get(s), dict | None)
    ]
    if not wrong:
        given = {s: cast(Section, sections.get(s) or {}) for s in SECTIONS}
        training = {"output_dir": default_output(name), **given["training"]}
        if given["data"].get("split") is not None:
            given["privacy"] = {"unit_column": DOCUMENT, **given["privacy"]}
            if given["privacy"].get("contribution_bound") is not None:
                wrong.append("privacy.contribution_bound: not for split records; privacy.records_per_unit is")
        wrong += [
            *_type_problems(given),
            *_model_problems(given["model"]),
            *_data_problems(given["data"], given["model"]),
        ]
        wrong += [*_training_problems(training), *_privacy_problems(given["privacy"])]
    if wrong:
        raise RecipeError("\n".join(f"  - {problem}" for problem in wrong))
    lora = cast(Section | None, sections.get("lora"))
    micro_batch_tokens, weights = training.pop("micro_batch_tokens", None), training.pop("class_weights", None)
    return Recipe(
        name=name,
        model=ModelSection(**given["model"]),
        data=DataSection(**given["data"]),
        training=MappingProxyType(training),
        privacy=PrivacyConfig(**given["privacy"]),
        lora=None if lora is None else MappingProxyType(dict(lora)),
        micro_batch_tokens=micro_batch_tokens,
        class_weights=None if weights is None else tuple(weights),
    )


def default_output(name: str) -> str:
    """The output folder of the recipe `name`, where it names none."""
    return f"out/{name}"


def is_file(source: str) -> bool:
    """Whether a data source means a file on this machine, and not a name on the Hub."""
    return source.lower().endswith(FILE_KINDS)


def is_folder(name: str) -> bool:
    """Whether a model's name means a local folder: there is one, or only a path can be written like that."""
    return Path(name).is_dir() or not _HUB_NAME.fullmatch(name)


def arguments_class(task: object) -> Any:
    """The class whose keywords `training` holds.

    Raises:
        RecipeError: it is trl's, which is not installed.
    """
    from transformers import TrainingArguments

    if task != "preference":
        return TrainingArguments
    try:
        from hf_dp.training import DPDPOTrainer
    except ImportError as error:
        raise RecipeError(f"model.task: preference: {error}") from None
    return DPDPOTrainer.config_class


def _type_problems(given: Mapping[str, Section]) -> Iterator[str]:
    """Unknown names and wrong types in every section, from the classes that the sections fill."""
    from peft import LoraConfig

    yield from problems("model", given["model"], ModelSection)
    yield from problems("lora", given["lora"], LoraConfig)
    yield from problems("data", given["data"], DataSection)
    training = {k: v for k, v in given["training"].items() if (k, v) != ("resume_from_checkpoint", True)}
    yield from problems("training", training, arguments_class(given["model"].get("task")), extra=OF_THE_TRAINER)
    known = [name for name in given["privacy"] if name in PrivacyConfig.__dataclass_fields__]
    yield from problems("privacy", {k: v for k, v in given["privacy"].items() if k not in known}, PrivacyConfig)


def _model_problems(model: Section) -> Iterator[str]:
    for key, choices in (("task", TASKS), ("dtype", DTYPES)):
        value = model.get(key, choices[0])
        if isinstance(value, str) and value not in choices:
            yield f"model.{key}: expected {' or '.join(choices)}, got {value!r}{nearest(value, choices)}"
    name = model.get("name")
    if isinstance(name, str) and is_folder(name) and not (Path(name) / "config.json").is_file():
        there = "holds no config.json, so it is no model" if Path(name).is_dir() else "does not exist"
        yield f"model.name: the folder {name} {there}"


def _data_problems(data: Section, model: Section) -> Iterator[str]:
    task = model.get("task", TASKS[0])
    if task in TASKS:
        needed, more = OF_A_TASK[task]
        others = (name for each in OF_A_TASK.values() for names in each for name in names)
        foreign = [name for name in dict.fromkeys(others) if name not in (*needed, *more, "max_length")]
        yield from (f"data.{key}: missing; the task {task} needs it" for key in needed if data.get(key) is None)
        yield from (
            f"data.{key}: not for the task {task}; drop it" for key in foreign if data.get(key, None) is not None
        )
    for key in ("prompt", "target", "chosen", "rejected", "text"):
        try:
            if isinstance(data.get(key), str):
                Template.parse(data[key])
        except RecipeError as error:
            yield f"data.{key}: {error}"
    for key in ("train", "validation"):
        source = data.get(key)
        if not isinstance(source, str):
            continue
        if is_file(source):
            if not Path(source).is_file():
                yield f"data.{key}: the file {source} does not exist"
        elif Path(source).exists() or not _HUB_NAME.fullmatch(source):
            yield f"data.{key}: expected a file ending in {', '.join(FILE_KINDS)} or a name on the Hub, got {source!r}"
    length = data.get("max_length")
    if isinstance(length, int) and length < 2:
        yield f"data.max_length: expected 2 tokens or more, got {length}"


def _training_problems(training: Section) -> Iterator[str]:
    from hf_dp.training import REFUSED

    for name, (unsafe, remedy) in REFUSED.items():
        if name in training and unsafe(training[name]):
            yield f"training.{name}={training[name]}: cannot be combined with differential privacy: {remedy}"
    tokens = training.get("micro_batch_tokens")
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
        yield f"training.micro_batch_tokens: expected a whole number, 1 or more, got {tokens!r}"
    weights = training.get("class_weights")
    if weights is not None and not (
        isinstance(weights, list) and weights and all(is_number(w) and w >= 0 for w in weights)
    ):
        yield (
            "training.class_weights: expected a list of numbers, 0 or more, one a class in the order of data.labels, "
            f"got {weights!r}"
        )
    if not training.get("output_dir"):
        yield f"training.output_dir: expected a folder's path, got {training.get('output_dir')!r}"


def _privacy_problems(privacy: Section) -> Iterator[str]:
    known = {k: v for k, v in privacy.items() if k in PrivacyConfig.__dataclass_fields__}
    try:
        PrivacyConfig(**known)
    except ConfigError as error:
        yield "privacy: " + str(error).removeprefix("PrivacyConfig: ")
