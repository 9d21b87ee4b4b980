"""Recipe -> everything that a training needs (model with LoRA, tokenizer, data, collator, metrics), and a `DPTrainer`
with it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets
import numpy as np
import peft
import torch
import transformers
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
from hf_dp.per_example import losses
from hf_dp.recipe import data_files, examples
from hf_dp.recipe.recipe import DOCUMENT, Recipe, arguments_class, is_file, is_folder
from hf_dp.sampling import groups_by
from hf_dp.training import DPTrainer

Metrics = dict[str, float]
Logits = Tensor | tuple[Tensor, ...]  # a model may return more beside them
T = TypeVar("T")
_TASK_TYPE = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS", "preference": "CAUSAL_LM"}


class Parts(NamedTuple):
    """What a Trainer is built from. `reduce` is its preprocess_logits_for_metrics, `metrics` its compute_metrics; trl's
    trainer of preferences has a collator and metrics of its own.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    train: datasets.Dataset
    validation: datasets.Dataset | None
    collator: examples.PadRight | None
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
    for which, records in (("train", train), ("validation", validation)):
        if records is not None:
            examples.check_columns(recipe.data, records, which)
    args = training_arguments(recipe)
    column = recipe.privacy.unit_column
    is_document = column == DOCUMENT and recipe.data.split is not None and column not in train.column_names
    bound = recipe.privacy.contribution_bound
    groups = None if is_document else groups_by(train, column, bound=bound)
    num_units = len(train) if groups is None else groups.num_groups
    accounting.plan_mechanism(
        recipe.privacy, num_units, num_train_epochs=args.num_train_epochs, max_steps=args.max_steps
    )
    pairs, classes = recipe.model.task == "preference", None
    if recipe.model.task == "sequence_classification":
        classes = examples.label_names(recipe.data, train, validation)
    transformers.set_seed(args.seed)  # a fresh head and LoRA's A: public randomness
    tokenizer = _tokenizer(recipe)
    model = _model(recipe, tokenizer, classes)
    max_length = _max_length(recipe, tokenizer, model.config)

    def make(records: datasets.Dataset, which: str) -> examples.Examples:
        if pairs:
            return examples.pairs(records, recipe.data, which)
        if classes is None:
            return examples.completions(records, recipe.data, tokenizer, max_length, which)
        return examples.classified(records, recipe.data, tokenizer, (max_length, classes), which)

    train_rows = _with_units(make(train, "train"), range(len(train)) if is_document else train, column)
    held_out = None if validation is None else make(validation, "validation")
    characters = held_out.num_characters if held_out else 0
    return Parts(
        model=_with_lora(recipe, model),
        tokenizer=tokenizer,
        train=train_rows,
        validation=(held_out.rows if pairs else _longest_first(held_out.rows)) if held_out else None,
        **_of_the_task(tokenizer, pairs, classes, characters),
    )


def _with_units(
    made: examples.Examples, records: datasets.Dataset | Sequence[int], column: str | None
) -> datasets.Dataset:
    """The rows with the column of their units: that of the records, or the numbers of split records."""
    if column is None:
        return made.rows
    if column in made.rows.column_names:
        raise RecipeError(f"privacy.unit_column={column}: rows have a column of that name already; rename yours")
    owners: list[Any] = list(records[column] if isinstance(records, datasets.Dataset) else records)
    of_row = made.record_of_row or range(len(owners))
    return made.rows.add_column(column, [owners[record] for record in of_row])


def _of_the_task(
    tokenizer: PreTrainedTokenizerBase, pairs: bool, classes: Sequence[str | int] | None, characters: int
) -> dict[str, Any]:
    """Collator and metrics, as `Parts` has them."""
    if pairs:
        return dict.fromkeys(("collator", "reduce", "metrics"))
    return {
        "collator": examples.PadRight(tokenizer.pad_token_id),
        "reduce": _reduce_completions if classes is None else _reduce_classes,
        "metrics": (lambda e: _completion_metrics(e, characters)) if classes is None else _class_metrics,
    }


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
        trainer = _trainer_class(recipe)(
            **keywords,
            privacy=recipe.privacy,
            micro_batch_tokens=recipe.micro_batch_tokens,
            class_weights=recipe.class_weights,
            callbacks=list(callbacks),
            audit=audit,
        )
        trainer.about |= _about(recipe)
        if "learning_rate" in recipe.training:  # given, even if it equals the default
            trainer.args.learning_rate, trainer.rate_by_rule = keywords["args"].learning_rate, ""
        return trainer
    except HfDpError:
        raise
    except (ValueError, ImportError) as error:
        raise RecipeError(f"training: transformers refuses these settings: {_first_line(error)}") from None


def _trainer_class(recipe: Recipe) -> Any:
    if recipe.model.task != "preference":
        return DPTrainer
    from hf_dp.training import DPDPOTrainer

    return DPDPOTrainer


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
        "adapter": recipe.lora and f"LoRA of rank {recipe.lora.get('r', 8)}",
    }
    return {name: value for name, value in found.items() if value}


def _shown(source: str | None) -> str | None:
    return Path(source).name if source and is_file(source) else source


def training_arguments(recipe: Recipe, output_dir: str | Path | None = None) -> TrainingArguments:
    """The recipe's `TrainingArguments`, with another output folder if one is given.

    Raises:
        RecipeError: transformers refuses them.
    """
    # disable_tqdm is set because transformers hides its progress bar where logging is quiet.
    given = {"report_to": "none", "disable_tqdm": False, **recipe.training}
    if recipe.model.task == "preference":  # trl's own defaults are for a GPU
        given = {"bf16": False, "gradient_checkpointing": False, "max_length": recipe.data.max_length, **given}
    if output_dir is not None:
        given["output_dir"] = str(output_dir)
    try:
        made: TrainingArguments = arguments_class(recipe.model.task)(**given)
        return made
    except (ValueError, ImportError) as error:
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
    if recipe.lora is not None and path.is_file():
        classes = len(trainer.model.config.id2label)
        print(f"Classes: {path}; load the adapter with AutoPeftModelForSequenceClassification and num_labels={classes}")


# ---- model and tokenizer -------------------------------------------------------------------------------------------


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    tokenizer = _loaded(recipe, transformers.AutoTokenizer.from_pretrained)
    tokenizer.padding_side = "right"  # padding on the left shifts absolute positions by other examples' lengths
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise RecipeError(f"model.name {recipe.model.name!r}: its tokenizer has neither pad_token nor eos_token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, classes: Sequence[str | int] | None) -> PreTrainedModel:
    keywords: dict[str, object] = {"dtype": recipe.model.dtype}
    auto: Any = transformers.AutoModelForCausalLM
    if classes is not None:
        auto = transformers.AutoModelForSequenceClassification
        names = {i: str(name) for i, name in enumerate(classes)}
        keywords |= {"num_labels": len(names), "id2label": names, "label2id": {n: i for i, n in names.items()}}
    model = _loaded(recipe, auto.from_pretrained, **keywords)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


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


def _with_lora(recipe: Recipe, model: PreTrainedModel) -> nn.Module:
    if recipe.lora is None:
        return model
    try:
        config = peft.LoraConfig(**{"task_type": _TASK_TYPE[recipe.model.task], **recipe.lora})
        return peft.get_peft_model(model, config)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"lora: peft refuses these settings for this model: {_first_line(error)}") from None


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


# ---- metrics on the validation set ---------------------------------------------------------------------------------


class _Outputs(NamedTuple):
    logits: Tensor


def _reduce_completions(logits: Logits, labels: Tensor) -> Tensor:
    """[B, T, V], [B, T] -> the sum of an example's target losses in nats, [B]: all that the metric needs."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return losses.causal_lm(_Outputs(logits), labels) * (labels[:, 1:] != losses.IGNORED).sum(1)


def _completion_metrics(evaluated: EvalPrediction, num_characters: int) -> Metrics:
    return {"nats_per_character": float(np.asarray(evaluated.predictions).sum()) / max(1, num_characters)}


def _reduce_classes(logits: Logits, labels: Tensor) -> Tensor:
    logits = logits[0] if isinstance(logits, tuple) else logits
    return torch.argmax(logits, -1)


def _class_metrics(evaluated: EvalPrediction) -> Metrics:
    return {"accuracy": float(np.mean(np.asarray(evaluated.predictions) == evaluated.label_ids))}
