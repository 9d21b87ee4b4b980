"""A trainer after its training -> what its card says of settings, data and results: public things alone."""

import json
import math
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from hf_dp import durable
from hf_dp.card import Described
from hf_dp.training.evaluation import CLOCK, EVAL_MARK, HARMLESS
from hf_dp.training.fitted import rate_in_force
from hf_dp.training.host import PrivateTrainer
from hf_dp.training.objective import HOST, SPELT_OUT
from hf_dp.training.overrides import host_of

LOSSES = {  # a known loss of an example -> what it is
    "ForCausalLM": "cross-entropy of each next token, mean over the record's target tokens",
    "ForConditionalGeneration": "cross-entropy of each target token, mean over the record's",
    "ForMaskedLM": "cross-entropy of the masked tokens, mean over the record's",
    "ForTokenClassification": "cross-entropy of each token's class, mean over the record's tokens",
    "ForSequenceClassification": "cross-entropy of the class",
    "multi_label_classification": "binary cross-entropy, mean over the classes",
    "regression": "squared error",
}
GENERIC = ("csv", "generator", "json", "pandas", "parquet", "text", "")  # builders of `datasets` that name no data set
OF_CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")


def described(trainer: PrivateTrainer) -> Described:
    """What the card says of this training besides the record.

    Results are those on evaluation data declared public, of the weights as they are now.
    """
    args, about = trainer.args, dict(trainer.about)
    base = str(getattr(_config(trainer), "name_or_path", "") or "")
    parameters = [p.numel() for p in trainer.model.parameters() if p.requires_grad]
    warm_up = args.get_warmup_steps(trainer.state.max_steps) if trainer.state.max_steps > 0 else 0
    evaluated_on = about.pop("evaluation data", _name_of(trainer.eval_dataset))
    rows = {
        "training data": about.pop("training data", _name_of(trainer.train_dataset)),
        **about,
        "fine-tuned from": Path(base).name if base and Path(base).is_dir() else "",
        "trained parameters": f"{sum(parameters):,}",
        "loss of an example": _loss(trainer),
        "learning rate": f"{rate_in_force(trainer):g}, {_value(args.lr_scheduler_type)}"
        + (f" after {warm_up:,} steps of warm-up" if warm_up else ""),
        "optimizer": _value(args.optim) + (f", weight decay {args.weight_decay:g}" if args.weight_decay else ""),
        "precision": "bfloat16 (autocast)" if args.bf16 else str(next(trainer.model.parameters()).dtype)[6:],
    }
    return Described(
        rows={name: value for name, value in rows.items() if value},
        results=_results(trainer),
        base=base,
        license=license_of(base),
        evaluated_on=evaluated_on,
        name=trainer.hub_model_id or "",
    )


def _loss(trainer: PrivateTrainer) -> str:
    """What the loss of an example is, in words."""
    kind, chosen = trainer.objective.kind, getattr(trainer.args, "loss_type", None)
    if kind in (HOST, SPELT_OUT):
        named = ", ".join(chosen) if isinstance(chosen, list | tuple) else chosen
        return f"{host_of(type(trainer), 'compute_loss').__name__}'s" + (f", {named}" if named else "")
    return LOSSES.get(kind, kind)


def license_of(base: str) -> str:
    """The licence in the base's own card, where that is a file on this machine; "" elsewhere."""
    if not base:
        return ""
    try:
        card = Path(base, "README.md") if Path(base).is_dir() else try_to_load_from_cache(base, "README.md")
        text = Path(card).read_text(encoding="utf-8") if isinstance(card, str | Path) else ""
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    except (OSError, ValueError, IndexError, yaml.YAMLError):  # no card, no name of a repository, or no YAML in it
        return ""
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) else ""


def save_classes(trainer: PrivateTrainer, folder: Path) -> None:
    """Writes the names of a classifier's classes beside its adapter, whose folder has no config.json for them."""
    settings = getattr(trainer.model, "peft_config", {}).get("default")
    if settings is None or str(settings.task_type).rpartition(".")[2] not in OF_CLASSIFIERS:
        return
    names = getattr(_config(trainer), "id2label", None)
    if not names:
        return
    durable.replace(folder / "classes.json", (json.dumps(names, indent=2, ensure_ascii=False) + "\n").encode())


def _results(trainer: PrivateTrainer) -> dict[str, float]:
    """The last evaluation's numbers, if they are of data declared public and of the last step's weights."""
    if not trainer.privacy.public_eval:
        return {}
    last = [e for e in trainer.state.log_history if any(name.startswith("eval_") for name in e)][-1:]
    if not last or not last[0].get("step") or last[0]["step"] != trainer.state.global_step or EVAL_MARK in last[0]:
        return {}
    return {
        name.removeprefix("eval_"): value
        for name, value in last[0].items()
        if name.startswith("eval_")
        and name not in HARMLESS
        and not name.endswith(CLOCK)
        and isinstance(value, int | float)
        and math.isfinite(value)
    }


def _config(trainer: PrivateTrainer) -> object:
    """The base model's config, or None of a module that has none."""
    return getattr(trainer._base_model(), "config", None)


def _name_of(dataset: Any) -> str:
    """A data set's name on the Hub, as `load_dataset` was given it; "" where it has none."""
    name = str(getattr(getattr(dataset, "info", None), "dataset_name", None) or "")
    return "" if name in GENERIC else name


def _value(option: Any) -> str:
    return str(getattr(option, "value", option))
