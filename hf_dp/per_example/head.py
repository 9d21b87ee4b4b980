"""A model and a batch -> its losses over a vocabulary without logits that no loss needs; and what a decoder reads."""

import inspect
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeAlias, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_dp.per_example import losses
from hf_dp.per_example.batches import Batch, Leaf
from hf_dp.per_example.operations import autocast

Inputs: TypeAlias = tuple[Tensor, ...]  # a module's positional arguments
# Output layer -> whether, in an earlier pass, its logits came out of the model unchanged. It is only a guess for the
# next pass, and is checked there.
_comes_last: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def next_token_losses(model: nn.Module, base: nn.Module, inputs: Batch, labels: Tensor, smoothing: float) -> Tensor:
    """One forward pass in which position t predicts label t + 1: the mean cross entropy over an example's targets, [B].

    Which logits are formed: if nothing of the output layer is trained, those that `at_targets` forms. Otherwise, if the
    model takes `logits_to_keep` and has no virtual tokens in front, those from the first target on. Otherwise all.
    """
    labels = losses.predictable(labels, inputs.get("attention_mask"))
    if losses.are_spelt_out():
        return losses.causal_lm(model(**inputs), labels, smoothing)
    head = frozen_head(base)
    if head is not None:
        outputs, found = at_targets(model, head, inputs, losses.shifted(labels), smoothing)
        return losses.causal_lm(outputs, labels, smoothing) if found is None else found
    start = losses.first_needed(labels) if can_leave_out_logits(model, base) else 0
    outputs = model(**inputs, logits_to_keep=labels.shape[1] - start) if start else model(**inputs)
    return losses.causal_lm(outputs, labels[:, start:], smoothing)


def aligned_losses(model: nn.Module, base: nn.Module, inputs: Batch, labels: Tensor, smoothing: float) -> Tensor:
    """As `next_token_losses`, but position t predicts label t."""
    head = None if losses.are_spelt_out() else frozen_head(base)
    if (
        head is None or labels.dim() != 2 or "labels" in inputs
    ):  # the model's own loss, computed beside, reads all logits
        return losses.aligned_tokens(model(**inputs), labels, smoothing)
    outputs, found = at_targets(model, head, inputs, labels, smoothing)
    return losses.aligned_tokens(outputs, labels, smoothing) if found is None else found


# Losses over a vocabulary, which can do without most of the logits.
OVER_VOCABULARY = {
    "ForCausalLM": next_token_losses,
    "ForConditionalGeneration": aligned_losses,
    "ForMaskedLM": aligned_losses,
}


def at_targets(
    model: nn.Module, head: nn.Linear, inputs: Batch, targets: Tensor, smoothing: float
) -> tuple[Leaf, Tensor | None]:
    """Runs the model, with logits formed only at positions that have a target.

    If an earlier pass has shown that nothing comes after the head, the head gives losses instead of logits, which exist
    for a few rows at a time. That pass counts only if the very tensor that the head gave is what the model returns;
    otherwise it is made again with logits at the targets.

    Args:
        model: as it is called.
        head: its frozen output layer.
        inputs: of the model.
        targets: [B, T].
        smoothing: of labels.

    Returns:
        The outputs and the losses [B]. If the head is not called as a module, or not on [B, T, d]: outputs with all
        logits, and None.
    """
    where = (targets.flatten() != losses.IGNORED).nonzero().flatten()
    if _comes_last.get(head, False) and is_plain(head):
        with losses_for_logits(head, where, targets, smoothing) as given:
            outputs = model(**inputs)
        if outputs.logits.shape == (1, len(where), 1) and _untouched(given, outputs.logits):
            here = outputs.logits.device
            return outputs, losses.mean_over_targets(outputs.logits.flatten(), targets.to(here), where.to(here))
        _comes_last[head] = False  # something comes after it after all; the pass is made again
    with head_at(head, where, targets.shape) as made:
        outputs = model(**inputs)
    if outputs.logits.shape[:2] != (1, len(where)):
        return outputs, None
    if head not in _comes_last and len(where):
        _comes_last[head] = not caps_logits(model) and _alone(made, outputs.logits)
    here = outputs.logits.device
    return outputs, losses.token_mean(outputs.logits, targets.to(here), smoothing, where.to(here))


def frozen_head(base: nn.Module) -> nn.Linear | None:
    """The output layer, if it is a linear map of each position by itself and none of it is trained; else None."""
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    frozen = isinstance(head, nn.Linear) and not any(p.requires_grad for p in head.parameters())
    return cast(nn.Linear, head) if frozen else None


def is_plain(head: nn.Linear) -> bool:
    """Whether calling the module computes the linear map of its weight and bias and nothing else.

    That excludes subclasses, hooks, and quantised or sharded weights.
    """
    own = type(head) is nn.Linear and type(head.weight) is nn.Parameter and "forward" not in vars(head)
    return own and not head._forward_hooks and not head._forward_pre_hooks and head.out_features > 1


def caps_logits(model: nn.Module) -> bool:
    """Whether the config mentions soft caps: near zero, and in low precision, capped logits equal uncapped ones."""
    config = cast(PreTrainedModel, model).config.get_text_config().to_dict()
    return any(value for name, value in config.items() if "softcap" in name or "soft_cap" in name)


@contextmanager
def head_at(head: nn.Linear, positions: Tensor, shape: tuple[int, ...]) -> Iterator[list[Tensor]]:
    """Within, `head` is given only the hidden states at `positions`: [1, N, d] instead of [B, T, d].

    Yields copies of what an `is_plain` head gives, as long as it is not known whether the model changes that
    afterwards.

    Args:
        head: the output layer.
        positions: [N], of the B T.
        shape: (B, T).
    """
    made: list[Tensor] = []

    def pick(module: nn.Module, args: Inputs) -> Inputs | None:
        return (_rows(args[0], positions).unsqueeze(0), *args[1:]) if args[0].shape[:-1] == shape else None

    def note(module: nn.Module, args: Inputs, output: Tensor) -> None:
        made.append(output.detach().clone())

    unknown = head not in _comes_last and is_plain(head)
    handles = [head.register_forward_pre_hook(pick)]
    if unknown:
        handles.append(head.register_forward_hook(note))
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def losses_for_logits(
    head: nn.Linear, positions: Tensor, targets: Tensor, smoothing: float
) -> Iterator[list[tuple[Tensor, int]]]:
    """Within, `head` gives the losses at `positions`, [1, N, 1], instead of the logits of hidden states [B, T, d].

    Yields what it gives, each tensor with its version at that time.

    Args:
        head: an `is_plain` one.
        positions: [N], of the B T.
        targets: [B, T].
        smoothing: of labels.
    """

    given: list[tuple[Tensor, int]] = []

    def forward(hidden: Tensor) -> Tensor:
        if hidden.shape[:-1] != targets.shape:
            return F.linear(hidden, head.weight, head.bias)
        labels = targets.flatten()[positions].to(hidden.device)
        operands = autocast(_rows(hidden, positions), head.weight, head.bias)  # the weight once, not for every few rows
        found: Tensor = losses.HeadCrossEntropy.apply(*operands, labels, smoothing).view(1, -1, 1)
        given.append((found, found._version))
        return found

    head.forward = forward  # type: ignore[assignment,method-assign]
    try:
        yield given
    finally:
        del head.forward


def _rows(x: Tensor, positions: Tensor) -> Tensor:
    """[B, T, d] -> [N, d] at `positions` [N] of the B T."""
    return x.flatten(0, 1).index_select(0, positions.to(x.device))


def _untouched(given: list[tuple[Tensor, int]], logits: Tensor) -> bool:
    """Whether the model returned the very tensor that the head gave.

    The head must have been called once, and neither the tensor nor its gradient may have been changed afterwards.
    """
    return len(given) == 1 and logits is given[0][0] and logits._version == given[0][1] and not logits._backward_hooks


def _alone(made: list[Tensor], logits: Tensor) -> bool:
    """Whether the head was called once, and the model returned its result unchanged, up to the dtype."""
    return len(made) == 1 and torch.equal(made[0].to(logits.dtype), logits)


def can_leave_out_logits(model: nn.Module, base: nn.Module) -> bool:
    """Whether the model's forward takes `logits_to_keep`, and no virtual tokens shift its positions."""
    shifts = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    return not shifts and "logits_to_keep" in _forward_arguments(cast(Hashable, type(base)))


@cache
def _forward_arguments(model_class: Hashable) -> frozenset[str]:
    return frozenset(inspect.signature(cast(type[nn.Module], model_class).forward).parameters)


def decoder_inputs(model: nn.Module, inputs: Batch, labels: Leaf) -> Batch:
    """What the decoder of an encoder-decoder reads: the labels shifted right, as its own forward would shift them.

    {} for other models, and for labels that are not tokens, such as a classifier's. If the model has no method that
    shifts labels, it is given the labels themselves; its forward shifts them then, and the loss that it also computes
    is not used.
    """
    tokens = isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()
    own = getattr(model, "config", None)
    if not getattr(own, "is_encoder_decoder", False) or "decoder_input_ids" in inputs or not tokens:
        return {}
    shift_right = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    return {"labels": labels} if shift_right is None else {"decoder_input_ids": shift_right(labels=labels)}
