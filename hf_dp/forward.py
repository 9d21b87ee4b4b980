"""A model and a batch -> its forward pass as training needs it: next-token losses without needless logits, a decoder's inputs."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_dp import losses
from hf_dp.per_example.batches import Batch


def next_token_losses(model: nn.Module, base: nn.Module, inputs: Batch, labels: Tensor, smoothing: float) -> Tensor:
    """One forward pass: the mean cross entropy over each example's own targets, [B].

    Logits are formed where there is a target and nowhere else, if nothing of the output layer is trained; otherwise from the first
    target on. A model that takes no `logits_to_keep`, or has virtual tokens in front, forms all.
    """
    labels = losses.predictable(labels, inputs.get("attention_mask"))
    if not can_leave_out_logits(model, base):
        return losses.causal_lm(model(**inputs), labels, smoothing)
    head = frozen_head(base)
    if head is None:
        start = losses.first_needed(labels)
        outputs = model(**inputs, logits_to_keep=labels.shape[1] - start)
        return losses.causal_lm(outputs, labels[:, start:], smoothing)
    targets = losses.shifted(labels)
    positions = (targets.flatten() != losses.IGNORED).nonzero().flatten()
    with head_at(head, positions, labels.shape):
        outputs = model(**inputs)
    if outputs.logits.shape[:2] != (1, len(positions)):  # the head was not called as a module is
        return losses.causal_lm(outputs, labels, smoothing)
    here = outputs.logits.device
    return losses.token_mean(outputs.logits, targets.to(here), smoothing, positions.to(here))


def frozen_head(base: nn.Module) -> nn.Linear | None:
    """The output layer, where it is a linear map of each position by itself and none of it is trained."""
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    frozen = isinstance(head, nn.Linear) and not any(p.requires_grad for p in head.parameters())
    return cast(nn.Linear, head) if frozen else None


@contextmanager
def head_at(head: nn.Module, positions: Tensor, shape: tuple[int, ...]) -> Iterator[None]:
    """While it lasts, `head` gets the hidden states [B, T, d], B and T as in `shape`, at `positions` [N] of the B T: [1, N, d]."""

    def pick(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        if hidden.shape[:-1] != shape:
            return None
        return hidden.flatten(0, 1).index_select(0, positions.to(hidden.device)).unsqueeze(0), *args[1:]

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


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
