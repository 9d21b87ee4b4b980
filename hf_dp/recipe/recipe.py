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
from hf_dp.recipe.tasks import TASKS, Task
from hf_dp.recipe.template import Template
from hf_dp.recipe.yaml_text import Section, nested

SECTIONS = ("model", "lora", "peft", "data", "training", "privacy")
DOCUMENT = "document"  # the unit of records that are split, if the recipe names no other
DTYPES = ("auto", "float32", "bfloat16")
BITS = ("4bit", "8bit")
TEMPLATES, COLUMNS = ("prompt", "target", "text", "chosen", "rejected"), ("messages", "words", "label")  # of `data`
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
    load_in: str | None = field(
        default=None,
        metadata={"help": f"the base's weights in few bits (QLoRA): {' or '.join(BITS)}; needs an adapter"},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "how attention is computed, such as sdpa or flash_attention_2"}
    )


@dataclass(frozen=True)
class DataSection:
    """The records, and how a record becomes an example.

    `train` and `validation` are files (.jsonl, .json, .csv, .parquet) or names on the Hub; `name`, `revision` and the
    splits are only for the Hub. What a task needs of the templates (`prompt`, `target`, `text`, `chosen`, `rejected`)
    and columns (`messages`, `words`, `label`) stands in `tasks.TASKS`.
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
    target: str | None = field(default=None, metadata={"help": 'what is learnt to write, such as "{text}"'})
    messages: str | None = field(
        default=None, metadata={"help": "chat: the column of conversations, lists of {role, content}"}
    )
    chosen: str | None = field(default=None, metadata={"help": "preference, reward: the better answer, a template"})
    rejected: str | None = field(default=None, metadata={"help": "preference, reward: the worse answer, a template"})
    text: str | None = field(
        default=None, metadata={"help": "sequence_classification, masked_lm: what is read, a template"}
    )
    words: str | None = field(default=None, metadata={"help": "token_classification: the column of lists of words"})
    label: str | None = field(
        default=None, metadata={"help": "the column of the class, or of lists of classes, one a word"}
    )
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
    """One run. `training` holds keywords of `TrainingArguments` (of trl's own where trl trains the task), always with
    `output_dir`; `lora` those of peft's `LoraConfig`, or `peft` those of another adapter, and its `type`.
    """

    name: str
    model: ModelSection
    data: DataSection
    training: Keywords
    privacy: PrivacyConfig
    lora: Keywords | None = None
    peft: Keywords | None = None
    micro_batch_tokens: int | None = None
    class_weights: tuple[float, ...] | None = None

    @property
    def output_dir(self) -> Path:
        """Where the model, its card and its ledger go."""
        return Path(self.training["output_dir"])

    @property
    def adapter(self) -> tuple[str, Keywords] | None:
        """Its type, as peft names it, and its keywords; None where all weights are trained."""
        if self.lora is not None:
            return "LORA", self.lora
        if self.peft is None:
            return None
        return str(self.peft["type"]).upper(), {k: v for k, v in self.peft.items() if k != "type"}


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
            *_adapter_problems(*(cast(Section | None, sections.get(name)) for name in ("lora", "peft"))),
            *_model_problems(given["model"], adapted=any(sections.get(s) is not None for s in ("lora", "peft"))),
            *_data_problems(given["data"], given["model"]),
        ]
        wrong += [*_training_problems(training), *_privacy_problems(given["privacy"])]
    if wrong:
        raise RecipeError("\n".join(f"  - {problem}" for problem in wrong))
    lora, other = (cast(Section | None, sections.get(name)) for name in ("lora", "peft"))
    micro_batch_tokens, weights = training.pop("micro_batch_tokens", None), training.pop("class_weights", None)
    return Recipe(
        name=name,
        model=ModelSection(**given["model"]),
        data=DataSection(**given["data"]),
        training=MappingProxyType(training),
        privacy=PrivacyConfig(**given["privacy"]),
        lora=None if lora is None else MappingProxyType(dict(lora)),
        peft=None if other is None else MappingProxyType(dict(other)),
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


def _type_problems(given: Mapping[str, Section]) -> Iterator[str]:
    """Unknown names and wrong types in every section, from the classes that the sections fill."""
    from peft import LoraConfig

    yield from problems("model", given["model"], ModelSection)
    yield from problems("lora", given["lora"], LoraConfig)
    yield from problems("data", given["data"], DataSection)
    training = {k: v for k, v in given["training"].items() if (k, v) != ("resume_from_checkpoint", True)}
    yield from problems("training", training, _task(given["model"]).arguments, extra=OF_THE_TRAINER)
    known = [name for name in given["privacy"] if name in PrivacyConfig.__dataclass_fields__]
    yield from problems("privacy", {k: v for k, v in given["privacy"].items() if k not in known}, PrivacyConfig)


def _adapter_problems(lora: Section | None, other: Section | None) -> Iterator[str]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if other is None:
        return
    if lora is not None:
        yield "peft: the section lora is given too; give one of them"
    kinds = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    asked = str(other.get("type", "")).upper()
    if asked in kinds:
        yield from problems("peft", {k: v for k, v in other.items() if k != "type"}, kinds[asked])
    elif not asked:
        yield f"peft.type: missing; one of {', '.join(sorted(kinds))}"
    else:
        yield f"peft.type: there is no adapter {asked!r}{nearest(asked, kinds) or f'; one of {sorted(kinds)}'}"


def _task(model: Section) -> Task:
    """The task that is asked for; the first of all where there is none of this name, which is told elsewhere."""
    return TASKS.get(str(model.get("task")), TASKS["causal_lm"])


def _model_problems(model: Section, adapted: bool) -> Iterator[str]:
    if model.get("load_in") is not None and not adapted:
        yield "model.load_in: weights of few bits are not trained themselves; add the section lora"
    for key, choices in (("task", tuple(TASKS)), ("dtype", DTYPES), ("load_in", BITS)):
        value = model.get(key)
        if isinstance(value, str) and value not in choices:
            yield f"model.{key}: expected {' or '.join(choices)}, got {value!r}{nearest(value, choices)}"
    name = model.get("name")
    if isinstance(name, str) and is_folder(name) and not (Path(name) / "config.json").is_file():
        there = "holds no config.json, so it is no model" if Path(name).is_dir() else "does not exist"
        yield f"model.name: the folder {name} {there}"


def _data_problems(data: Section, model: Section) -> Iterator[str]:
    if model.get("task", "causal_lm") in TASKS:
        yield from _task_problems(data, str(model.get("task", "causal_lm")))
    for key in TEMPLATES:
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


def _task_problems(data: Section, name: str) -> Iterator[str]:
    task, given = TASKS[name], {key for key in data if data[key] is not None}
    meant = min(task.needed, key=lambda group: len({*group} - given))
    for key in meant:
        if key not in given:
            others = "".join(f", or {' and '.join(group)}" for group in task.needed if group is not meant)
            yield f"data.{key}: missing; the task {name} needs it{others}"
    of_tasks = {key for each in TASKS.values() for key in each.names}
    for key in data:
        if key in given & of_tasks - {*meant, *task.more, "max_length"}:
            beside = f" beside {' and '.join(meant)}" if key in task.names else ""
            yield f"data.{key}: not for the task {name}{beside}; drop it"


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
