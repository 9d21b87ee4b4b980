"""What a model, or its loss, raises on made-up records -> an error that names a remedy."""

import torch
from peft import PeftModel
from torch import nn

from hf_dp.errors import ConfigError
from hf_dp.per_example import Batch, undisturbed


def refused_records(error: Exception, batch: Batch, model: nn.Module, alone_because: str = "") -> ConfigError:
    """The error for made-up records that the model, or the loss, does not take.

    Args:
        error: what was raised.
        batch: one of the records, collated.
        model: left as it was.
        alone_because: why each example needs a pass of its own, where it is such a pass that failed.
    """
    if _fails_by_its_wrapper(model, batch):
        return ConfigError(
            f"the adapter's task_type wraps the model in {type(model).__name__}, which gives it inputs that it does "
            "not take, such as input_ids: leave task_type out of the adapter's config, such as LoraConfig, and wrap "
            "the model again; of an adapter on disk, set it to null in adapter_config.json"
        )
    said = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, NotImplementedError):
        return ConfigError(
            f"an operation of the model is not implemented on this device, or in this precision ({said}): load the "
            "model with another attention (attn_implementation='sdpa' or 'eager'), or use another device or precision"
        )
    if alone_because:
        return ConfigError(
            f"each example needs a pass of its own ({alone_because}), and the model does not take one alone ({said}): "
            "make it take a batch of one example"
        )
    return ConfigError(
        f"the model does not take made-up records with {', '.join(sorted(batch))} ({said}). Pass check_records=[...], "
        "a few public records like yours; columns that the model's forward does not name are dropped unless "
        "TrainingArguments(remove_unused_columns=False)"
    )


def first_line(error: Exception) -> str:
    """The first line of an error raised on made-up records, shortened."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 300 else text[:300] + "..."


def _fails_by_its_wrapper(model: nn.Module, batch: Batch) -> bool:
    """Whether peft's class for a task_type fails without `input_ids`, and the adapted model in it does not."""
    if not isinstance(model, PeftModel) or type(model) is PeftModel or "input_ids" in batch:
        return False
    return not _takes(model, model, batch) and _takes(model, model.base_model, batch)


def _takes(model: nn.Module, called: nn.Module, batch: Batch) -> bool:
    try:
        with undisturbed(model), torch.no_grad():
            called(**batch)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of whatever kind: one was raised already
        return False
    return True
