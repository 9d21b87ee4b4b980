"""A model's outputs on the validation set -> what its task is measured by: little of each batch is kept."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from hf_dp.per_example import losses

Metrics = dict[str, float]
Logits = Tensor | tuple[Tensor, ...]  # a model may return more beside them


class _Outputs(NamedTuple):
    logits: Tensor


def reduce_completions(logits: Logits, labels: Tensor) -> Tensor:
    """[B, T, V], [B, T] -> the sum of an example's target losses in nats, [B]: all that the metric needs."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return losses.causal_lm(_Outputs(logits), labels) * (labels[:, 1:] != losses.IGNORED).sum(1)


def completion_metrics(evaluated: EvalPrediction, num_characters: int) -> Metrics:
    """Nats a character of the targets, the end-of-text mark included."""
    return {"nats_per_character": float(np.asarray(evaluated.predictions).sum()) / max(1, num_characters)}


def reduce_classes(logits: Logits, labels: Tensor) -> Tensor:
    """[B, ..., K], [B, ...] -> the likeliest class of each text or token, [B, ...]."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return torch.argmax(logits, -1)


def reduce_translations(logits: Logits, labels: Tensor) -> Tensor:
    """[B, S, V], [B, S] -> as for completions; an encoder-decoder's logits stand at their labels."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return losses.aligned_tokens(_Outputs(logits), labels) * (labels != losses.IGNORED).sum(1)


def class_metrics(evaluated: EvalPrediction) -> Metrics:
    """Of texts, or of words: without the tokens that have no label."""
    labels = np.asarray(evaluated.label_ids)
    right = np.asarray(evaluated.predictions) == labels
    return {"accuracy": float(np.mean(right[labels != losses.IGNORED]))}
