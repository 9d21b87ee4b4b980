"""Recipe -> everything that a training needs (model with LoRA, tokenizer, data, collator, metrics), and a `DPTrainer`
with it.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets
import peft
import torch
import transformers
from jinja2 import TemplateError
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_dp import accounting
from hf_dp.config import AuditConfig
from hf_dp.errors import HfDpError, RecipeError
from hf_dp.recipe import answers, classes, data_files, examples, metrics, records
from hf_dp.recipe.metrics import Logits, Metrics
from hf_dp.recipe.recipe import DOCUMENT, DataSection, Recipe, is_file, is_folder
from hf_dp.recipe.tasks import TASKS
from hf_dp.sampling import groups_by
from hf_dp.training import DPTrainer

T = TypeVar("T")

# what classes of other libraries raise for settings that are none
REFUSALS = (ValueError, TypeError, KeyError, AttributeError, OverflowError, ImportError)


class Parts(NamedTuple):
    """What a Trainer is built from. `reduce` is its preprocess_logits_for_metrics, `metrics` its compute_metrics; trl's
    trainers have collators and metrics of their own.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    train: datasets.Dataset
    validation: datasets.Dataset | None
    collator: Callable[[Any], dict[str, Tensor]] | None
    reduce: Callable[[Logits, Tensor], Tensor] | None
    metrics: Callable[[EvalPrediction], Metrics] | None


def prepare(recipe: Recipe) -> Parts:
    """Reads the data and the model, and adapts them to each other. Every call makes a new model, the same for the same
    seed.

    Mistakes are found as early as possible: the plan is tried before the model is loaded.

    Raises:
        RecipeError: data, template, labels, model or LoRA settings that do not fit.
        ConfigError, AccountingError: a plan that is impossible, such as an epsilon out of reach.
    """
    train, validation = data_files.load(recipe.data, "train"), data_files.load(recipe.data, "validation")
    assert train is not None  # a recipe always names it
    for which, found in (("train", train), ("validation", validation)):
        if found is not None:
            records.check_columns(recipe.data, found, which)
    args, task = training_arguments(recipe), TASKS[recipe.model.task]
    column = recipe.privacy.unit_column
    is_document = column == DOCUMENT and recipe.data.split is not None and column not in train.column_names
    bound = recipe.privacy.contribution_bound
    groups = None if is_document else groups_by(train, column, bound=bound)
    num_units = len(train) if groups is None else groups.num_groups
    accounting.plan_mechanism(
        recipe.privacy, num_units, num_train_epochs=args.num_train_epochs, max_steps=args.max_steps
    )
    names = classes.label_names(recipe.data, train, validation) if task.has_classes else None
    if not 0 <= args.seed < 2**32:
        raise RecipeError(f"training.seed: expected a whole number from 0 to 2**32 - 1, got {args.seed}")
    transformers.set_seed(args.seed)  # a fresh head and LoRA's A: public randomness
    tokenizer = _tokenizer(recipe)
    model, fresh = _model(recipe, tokenizer, names)
    make = Maker(recipe.model.task, recipe.data, tokenizer, _max_length(recipe, tokenizer, model.config), names or ())
    train_rows = _with_units(make(train, "train"), range(len(train)) if is_document else train, column)
    held_out = None if validation is None else make(validation, "validation")
    return Parts(
        model=_adapted(recipe, model, fresh),
        tokenizer=tokenizer,
        train=train_rows,
        validation=(held_out.rows if task.of_trl else _longest_first(held_out.rows)) if held_out else None,
        **_of_the_task(recipe.model.task, tokenizer, held_out.num_characters if held_out else 0),
    )


class Maker(NamedTuple):
    """Records -> rows, as a recipe's task has them."""

    task: str
    data: DataSection
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    classes: Sequence[str | int]

    def __call__(self, found: datasets.Dataset, which: str) -> examples.Examples:
        """Rows of train or validation records.

        Raises:
            RecipeError: templates, columns or labels that do not fit the records.
        """
        how = (found, self.data, self.tokenizer)
        match self.task:
            case "causal_lm":
                return examples.completions(*how, self.max_length, which)
            case "chat":
                return answers.dialogues(*how, which)
            case "preference":
                return answers.pairs(found, self.data, which)
            case "reward":
                return answers.ranked(*how, self.max_length, which)
            case "sequence_classification":
                return classes.classified(*how, (self.max_length, self.classes), which)
            case "token_classification":
                return classes.tagged(*how, (self.max_length, self.classes), which)
            case "seq2seq":
                return examples.translations(*how, self.max_length, which)
            case _:
                return examples.whole_texts(*how, self.max_length, which)


def _with_units(
    made: examples.Examples, owned: datasets.Dataset | Sequence[int], column: str | None
) -> datasets.Dataset:
    """The rows with the column of their units: that of the records, or the numbers of split records."""
    if column is None:
        return made.rows
    if column in made.rows.column_names:
        raise RecipeError(f"privacy.unit_column={column}: rows have a column of that name already; rename yours")
    owners: list[Any] = list(owned[column] if isinstance(owned, datasets.Dataset) else owned)
    of_row = made.record_of_row or range(len(owners))
    return made.rows.add_column(column, [owners[record] for record in of_row])


def _of_the_task(task: str, tokenizer: PreTrainedTokenizerBase, num_characters: int) -> dict[str, Any]:
    """Collator and metrics, as `Parts` has them."""
    found: dict[str, Any] = dict.fromkeys(("collator", "reduce", "metrics"))
    if TASKS[task].of_trl:
        return found
    if task == "masked_lm":
        return found | {"collator": transformers.DataCollatorForLanguageModeling(tokenizer)}
    found["collator"] = examples.PadRight(tokenizer.pad_token_id)
    if TASKS[task].has_classes:
        return found | {"reduce": metrics.reduce_classes, "metrics": metrics.class_metrics}
    reduce = metrics.reduce_translations if task == "seq2seq" else metrics.reduce_completions
    return found | {"reduce": reduce, "metrics": lambda e: metrics.completion_metrics(e, num_characters)}


def trainer_keywords(recipe: Recipe, parts: Parts, output_dir: str | Path | None = None) -> dict[str, Any]:
    """Keywords of `transformers.Trainer`, private or not; DPTrainer takes further ones."""
    keywords = {
        "model": parts.model,
        "args": training_arguments(recipe, output_dir),
        "train_dataset": parts.train,
        "eval_dataset": parts.validation,
        "data_collator": parts.collator,
        "processing_class": parts.tokenizer,
        "compute_metrics": parts.metrics,
        "preprocess_logits_for_metrics": parts.reduce,
    }
    return {name: value for name, value in keywords.items() if value is not None}


def build(
    recipe: Recipe,
    parts: Parts | None = None,
    *,
    output_dir: str | Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    audit: AuditConfig | None = None,
) -> DPTrainer:
    """The private trainer of a recipe, ready to train. Its construction makes the output folder, and nothing in it.

    Raises:
        HfDpError: whatever is impossible in the recipe, as `prepare` and `DPTrainer` say.
    """
    parts = parts or prepare(recipe)
    keywords = trainer_keywords(recipe, parts, output_dir)
    try:
        trainer = TASKS[recipe.model.task].trainer_class(
            **keywords,
            privacy=recipe.privacy,
            micro_batch_tokens=recipe.micro_batch_tokens,
            class_weights=recipe.class_weights,
            callbacks=list(callbacks),
            audit=audit,
        )
        trainer.about |= _about(recipe)
        if "learning_rate" in recipe.training:  # given, even if it equals the default
            trainer.args.learning_rate, trainer.rate_by_rule = keywords["args"].learning_rate, "given"
        return trainer
    except HfDpError:
        raise
    except (*REFUSALS, TemplateError) as error:
        raise RecipeError(f"training: transformers refuses these settings: {_first_line(error)}") from None


def _about(recipe: Recipe) -> dict[str, str]:
    """What the recipe says of its data, for the card: names without folders, and how a record becomes text."""
    data = recipe.data
    found = {
        "training data": _shown(data.train),
        "evaluation data": _shown(data.validation),
        "a record's prompt": data.prompt and f"`{data.prompt}`",
        "a record's target": data.target and f"`{data.target}`",
        "a record's chosen answer": data.chosen and f"`{data.chosen}`",
        "a record's rejected answer": data.rejected and f"`{data.rejected}`",
        "a record's text": data.text and f"`{data.text}`",
        "tokens of a record": data.max_length and f"at most {data.max_length:,}",
        "conversations": data.messages and f"the column `{data.messages}`",
        "words": data.words and f"the column `{data.words}`",
        "weights of the base": recipe.model.load_in and f"{recipe.model.load_in.removesuffix('bit')} bits",
        "adapter": _adapter_in_words(recipe),
    }
    return {name: value for name, value in found.items() if value}


def _adapter_in_words(recipe: Recipe) -> str:
    if recipe.adapter is None:
        return ""
    kind, settings = recipe.adapter
    return f"LoRA of rank {settings.get('r', 8)}" if kind == "LORA" else kind


def _shown(source: str | None) -> str | None:
    return Path(source).name if source and is_file(source) else source


def training_arguments(recipe: Recipe, output_dir: str | Path | None = None) -> TrainingArguments:
    """The recipe's `TrainingArguments`, with another output folder if one is given.

    Raises:
        RecipeError: transformers refuses them.
    """
    # disable_tqdm is set because transformers hides its progress bar where logging is quiet.
    given = {"report_to": "none", "disable_tqdm": False, **recipe.training}
    if TASKS[recipe.model.task].of_trl:  # whose own defaults are for a GPU
        given = {"bf16": False, "gradient_checkpointing": False, "max_length": recipe.data.max_length, **given}
    if output_dir is not None:
        given["output_dir"] = str(output_dir)
    try:
        made: TrainingArguments = TASKS[recipe.model.task].arguments(**given)
        return made
    except REFUSALS as error:
        raise RecipeError(f"training: transformers refuses these settings: {_first_line(error)}") from None


def evaluate(trainer: Trainer) -> Metrics:
    """Loss and metric on the validation set; {} without one.

    `loss` is the mean over examples (for a plain Trainer, transformers' own). The metric is `nats_per_character` of the
    target, including the end-of-text mark, or `accuracy`; of pairs, `rewards/margins`, by how much more the chosen
    answer is preferred than by the reference, and `rewards/accuracies`, in how many pairs it is.
    """
    if trainer.eval_dataset is None:
        return {}
    measured = trainer.evaluate()
    wanted = ("loss", "nats_per_character", "accuracy", "rewards/margins", "rewards/accuracies")
    return {name: measured[f"eval_{name}"] for name in wanted if f"eval_{name}" in measured}


def tell_class_names(trainer: Any, recipe: Recipe) -> None:
    """Says where the names of a classifier's classes lie, beside its adapter, and how to load it."""
    path = recipe.output_dir / "classes.json"
    if recipe.adapter is not None and path.is_file():
        loads, classes = TASKS[recipe.model.task].auto.replace("Auto", "AutoPeft"), len(trainer.model.config.id2label)
        print(f"Classes: {path}; load the adapter with {loads} and num_labels={classes}")


# ---- model and tokenizer -------------------------------------------------------------------------------------------


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    words = {"add_prefix_space": True} if recipe.model.task == "token_classification" else {}
    tokenizer = _loaded(recipe, transformers.AutoTokenizer.from_pretrained, **words)
    tokenizer.padding_side = "right"  # padding on the left shifts absolute positions by other examples' lengths
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise RecipeError(f"model.name {recipe.model.name!r}: its tokenizer has neither pad_token nor eos_token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, classes: Sequence[str | int] | None
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of its modules whose weights are not in the files, and so are random."""
    section, task = recipe.model, TASKS[recipe.model.task]
    keywords: dict[str, object] = {"dtype": section.dtype}
    if section.attn_implementation is not None:
        keywords["attn_implementation"] = section.attn_implementation
    if section.load_in is not None:
        keywords["quantization_config"] = _in_few_bits(section.load_in)
    if classes is not None:
        names = {i: str(name) for i, name in enumerate(classes)}
        keywords |= {"num_labels": len(names), "id2label": names, "label2id": {n: i for i, n in names.items()}}
    elif task.auto == "AutoModelForSequenceClassification":
        keywords["num_labels"] = 1  # a score
    load = getattr(transformers, task.auto).from_pretrained
    model, found = _loaded(recipe, load, output_loading_info=True, **keywords)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, sorted({key.rpartition(".")[0] for key in found["missing_keys"]})


def _in_few_bits(load_in: str) -> transformers.BitsAndBytesConfig:
    """As QLoRA has it (Dettmers et al. 2023): 4 bits of its own number format, computed in the GPU's precision.

    Raises:
        RecipeError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise RecipeError("model.load_in: it needs the package bitsandbytes: pip install 'hf_dp[quantised]'")
    if load_in == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    precision = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=precision
    )


def _loaded(recipe: Recipe, load: Callable[..., T], **keywords: object) -> T:
    name = recipe.model.name
    revision = {} if recipe.model.revision is None else {"revision": recipe.model.revision}
    try:
        return load(name, **revision, **keywords)
    except (OSError, ValueError, KeyError) as error:
        remedy = (
            "is the folder a whole model for this task?"
            if is_folder(name)
            else "there is no such folder, and the Hub did not give it: check the name and the network, or give a "
            "folder: model.name=FOLDER"
        )
        raise RecipeError(f"model.name: cannot load {name!r}: {_first_line(error)} ({remedy})") from None


def _adapted(recipe: Recipe, model: PreTrainedModel, fresh: Sequence[str]) -> nn.Module:
    """The model with the recipe's adapter. What is random is trained and saved whole: no file of the base has it."""
    if recipe.adapter is None:
        return model
    kind, settings = recipe.adapter
    section, task = "lora" if recipe.lora is not None else "peft", TASKS[recipe.model.task]
    heads = ("classifier", "score") if task.adapter in ("SEQ_CLS", "TOKEN_CLS") else ()  # which peft trains whole
    try:
        config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
        others = [name for name in fresh if name.rpartition(".")[2] not in heads]
        if others and "modules_to_save" in config.__dataclass_fields__:
            settings = {**settings, "modules_to_save": [*(settings.get("modules_to_save") or []), *others]}
        whole = [*heads, *others]
        if whole and settings.get("target_modules") == "all-linear" and "exclude_modules" not in settings:
            settings = {**settings, "exclude_modules": whole}
        return peft.get_peft_model(model, config(**{"task_type": task.adapter, **settings}))
    except REFUSALS as error:
        raise RecipeError(f"{section}: peft refuses these settings for this model: {_first_line(error)}") from None


def _max_length(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int:
    """`data.max_length`; else the most that tokenizer and model take. Never more than the model has positions for."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    bounds = [n for n in (positions, tokenizer.model_max_length) if n is not None and 0 < n < 10**9]
    asked = recipe.data.max_length
    if asked is None and not bounds:
        raise RecipeError("data.max_length: missing; neither model nor tokenizer says how long a row may be")
    if asked is not None and bounds and asked > min(bounds):
        raise RecipeError(f"data.max_length: expected at most {min(bounds)}, which the model takes; got {asked}")
    return min(bounds) if asked is None else asked


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _longest_first(rows: datasets.Dataset) -> datasets.Dataset:
    """Rows of similar length together, so that evaluation pads little. Lack of memory shows in the first batch."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lambda i: -lengths[i]))
