"""A model -> what its forward takes: whether logits can be left out, and the decoder's inputs where it has a decoder."""

import inspect
from functools import cache
from typing import Any, cast

from peft import PeftModel
from torch import Tensor, nn

from hf_dp.per_example.batches import Batch


def can_leave_out_logits(model: nn.Module, base: nn.Module) -> bool:
    """Whether the forward takes `logits_to_keep`, and no virtual tokens shift its positions."""
    shifts = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    return not shifts and "logits_to_keep" in _forward_arguments(cast(Any, type(base)))


@cache
def _forward_arguments(model_class: Any) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


def decoder_inputs(model: nn.Module, inputs: Batch, labels: Tensor) -> Batch:
    """An encoder-decoder's decoder reads the labels shifted right, as its own forward would make them."""
    if not getattr(model.config, "is_encoder_decoder", False) or "decoder_input_ids" in inputs:
        return {}
    shift_right: Any = model.prepare_decoder_input_ids_from_labels
    return {"decoder_input_ids": shift_right(labels=labels)}
