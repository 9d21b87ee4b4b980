"""A model's outputs and labels -> one loss an example, [B], each a function of that example alone.

By default an example's loss is the *mean over its own target tokens*, so that no example's loss depends on the length
of another. Legend: B examples, T positions, V vocabulary or classes. A label of -100 marks a position without a target;
an example without any target has loss 0 and gradient 0.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeAlias, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dp.per_example.factors import exact, wide
from hf_dp.per_example.taps import Context

IGNORED = -100
Config: TypeAlias = Any  # a model's configuration, of whatever class


class Outputs(Protocol):
    """A model's outputs, as the losses read them."""

    @property
    def logits(self) -> Tensor:
        """Of the model, [B, ..., V]."""


CHUNK_ELEMENTS = 1 << 22  # logits held in float32 at once (16 MiB)
HEAD_ROWS = 512  # through a head at once: each time its whole weight is read
ExampleLoss: TypeAlias = Callable[..., Tensor]  # (outputs, labels, smoothing=0.0) -> [B]
_SPELT_OUT = ContextVar("_SPELT_OUT", default=False)


@contextmanager
def spelt_out() -> Iterator[None]:
    """Within, losses over tokens are PyTorch's own cross entropy of the logits at all positions.

    That is slower than this module's functions, but `proof` has rules for it.
    """
    token = _SPELT_OUT.set(True)
    try:
        yield
    finally:
        _SPELT_OUT.reset(token)


def are_spelt_out() -> bool:
    """Whether the code runs within `spelt_out`."""
    return _SPELT_OUT.get()


class Sizes(TypedDict):
    """What made-up records for a model depend on; see `synthetic_records`."""

    vocab_size: int
    label_values: int
    end: int | None


class TokenCrossEntropy(torch.autograd.Function):
    """Cross entropy of each row of logits [N, V] with labels [N]; 0 for labels of -100.

    It is computed in float32, a few rows at a time. The gradient has the logits' dtype; nothing else as large as the
    logits is ever held. With smoothing s the target puts 1 - s on the label, and s / V on every class (Szegedy et al.
    2016, section 7).
    """

    @staticmethod
    def forward(ctx: Context, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """Losses [N], float32 (float64 for float64 logits)."""
        losses, log_z = torch.zeros(2, len(labels), dtype=wide(logits), device=logits.device)
        ctx.chunks = list(_chunks(logits, labels))
        for rows in ctx.chunks:
            chunk = logits[rows].to(losses.dtype)
            log_z[rows] = chunk.logsumexp(-1)
            there = labels[rows]
            losses[rows] = (log_z[rows] - _aim(chunk, _targets(there), smoothing)).masked_fill_(there == IGNORED, 0.0)
        ctx.save_for_backward(logits, labels, log_z)
        ctx.smoothing = smoothing
        return losses

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """(softmax - target) times the incoming gradient, [N, V]."""
        logits, labels, log_z = ctx.saved_tensors
        (grad_losses,) = grads
        covered = all(isinstance(rows, slice) for rows in ctx.chunks) and len(ctx.chunks) > 0
        result = torch.empty_like(logits) if covered else torch.zeros_like(logits)
        for rows in ctx.chunks:
            chunk = torch.sub(logits[rows].to(log_z.dtype), log_z[rows].unsqueeze(1)).exp_()
            chunk = _minus_target_(chunk, _targets(labels[rows]), ctx.smoothing).mul_(grad_losses[rows].unsqueeze(1))
            if bool((labels[rows] == IGNORED).any()):
                chunk[labels[rows] == IGNORED] = 0.0
            result[rows] = chunk.to(result.dtype)
        return result, None, None


class HeadCrossEntropy(torch.autograd.Function):
    """`TokenCrossEntropy` of the logits h W^T + b of hidden states h [N, d] under a frozen linear map.

    Logits exist for a few rows at a time, and none are kept. The gradient of a row's loss with respect to h is (softmax
    - target) W; it is formed in forward, while the row's logits exist, and backward multiplies it by the incoming
    gradient, which is one number a row. So forward and backward together cost two matrix products, as they would
    anyway.
    """

    @staticmethod
    def forward(
        ctx: Context, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float
    ) -> Tensor:
        """Losses [N], float32 (float64 for float64 hidden states)."""
        losses = torch.zeros(len(targets), dtype=wide(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            logits = F.linear(hidden[rows], weight, bias)
            chunk = logits.to(losses.dtype)  # from here on it is written over: logits, softmax, gradient
            aim, greatest = _aim(chunk, targets[rows], smoothing), chunk.amax(-1, keepdim=True)
            total = chunk.sub_(greatest).exp_().sum(-1, keepdim=True)
            losses[rows] = (total.log() + greatest).squeeze(1) - aim
            if gradient is not None:
                gradient[rows] = _minus_target_(chunk.div_(total), targets[rows], smoothing).to(logits.dtype) @ weight
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        return losses

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient with respect to the hidden states, [N, d]."""
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0].unsqueeze(1)).to(gradient.dtype), None, None, None, None


def _targets(labels: Tensor) -> Tensor:
    """Labels that can be looked up: any class for what is no target. Others below 0 stay, and are an error there."""
    return labels.masked_fill(labels == IGNORED, 0)


def _aim(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """[N, V], [N] -> the mean of the logits under the target distribution, [N]."""
    aim = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    return (1 - smoothing) * aim + smoothing * logits.mean(-1) if smoothing else aim


def _minus_target_(softmax: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The gradient of each row's cross entropy with respect to its logits, [N, V], in place."""
    if smoothing:
        softmax -= smoothing / softmax.shape[1]
    return softmax.scatter_add_(1, targets.unsqueeze(1), softmax.new_full((len(softmax), 1), smoothing - 1.0))


def _chunks(logits: Tensor, labels: Tensor) -> Iterator[slice | Tensor]:
    """Rows of the logits, a bounded number at a time.

    If most rows have a target: slices of all rows, which need no copy. Otherwise: indices of the rows that have one.
    """
    step = max(1, CHUNK_ELEMENTS // max(1, logits.shape[1]))
    targets = (labels != IGNORED).nonzero().flatten()
    if 4 * len(targets) >= 3 * len(labels):
        yield from (slice(start, start + step) for start in range(0, len(labels), step))
    elif len(targets):
        yield from targets.split(step)


def token_mean(logits: Tensor, labels: Tensor, smoothing: float = 0.0, positions: Tensor | None = None) -> Tensor:
    """[B, T, V], [B, T] -> mean cross entropy over each example's own targets, [B].

    With `positions` [N], of the B T, `logits` are those at these positions alone, [1, N, V]; other positions have no
    target.
    """
    flat = labels.flatten()
    if are_spelt_out() and positions is None:
        each = F.cross_entropy(
            exact(logits.flatten(0, 1)), flat, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing
        )
        return mean_over_targets(each, labels)
    if positions is None:
        losses: Tensor = TokenCrossEntropy.apply(logits.flatten(0, 1), flat, smoothing)
        return mean_over_targets(losses, labels)
    return mean_over_targets(TokenCrossEntropy.apply(logits.squeeze(0), flat[positions], smoothing), labels, positions)


def mean_over_targets(losses: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor:
    """The mean over each example's own targets, [B].

    Args:
        losses: of all positions, [B T], or of `positions`, [N].
        labels: [B, T].
        positions: of the B T.
    """
    if positions is not None:
        losses = losses.new_zeros(labels.numel()).index_copy(0, positions, losses)
    return losses.view(labels.shape).sum(1) / (labels != IGNORED).sum(1).clamp_min(1)


def causal_lm(outputs: Outputs, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Position t predicts label t + 1. Virtual tokens in front (prompt tuning) have logits but no labels."""
    logits: Tensor = outputs.logits
    labels = labels.to(logits.device)
    if logits.shape[1] > labels.shape[1]:
        labels = F.pad(labels, (logits.shape[1] - labels.shape[1], 0), value=IGNORED)
    return token_mean(logits, shifted(labels), smoothing)


def shifted(labels: Tensor) -> Tensor:
    """[B, T] -> what each position is to predict, [B, T]: the next label, and nothing at the end."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def predictable(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Labels [B, T] without those that only a padded position could predict.

    The first token of a row padded on the left is such a label. The position before it exists only if another record of
    the batch is longer, so a loss there would depend on another example.
    """
    if attention_mask is None or attention_mask.shape != labels.shape:
        return labels
    before = F.pad(attention_mask[:, :-1], (1, 0), value=1)
    return labels.masked_fill(before == 0, IGNORED)


def first_needed(labels: Tensor) -> int:
    """The first position, of T, whose logits a next-token loss on `labels` [B, T] reads.

    All positions before it belong to prompts.
    """
    columns = (labels != IGNORED).any(0).nonzero()
    return max(0, int(columns[0]) - 1) if len(columns) else max(0, labels.shape[1] - 1)


def aligned_tokens(outputs: Outputs, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Position t predicts label t: masked LM, token classification, and sequence to sequence."""
    return token_mean(outputs.logits, labels.to(outputs.logits.device), smoothing)


def classification(outputs: Outputs, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """[B, V], labels [B] -> cross entropy, [B]."""
    return token_mean(outputs.logits.unsqueeze(1), labels.to(outputs.logits.device).view(-1, 1), smoothing)


def regression(outputs: Outputs, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """[B, k] or [B, 1], targets [B, k] or [B] -> mean squared error over the example's k outputs, [B]."""
    logits = exact(outputs.logits.flatten(1))
    return (logits - labels.to(logits).view_as(logits)).square().mean(1)


def multi_label(outputs: Outputs, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """[B, k], targets in {0, 1} [B, k] -> mean binary cross entropy over the example's k labels, [B]."""
    logits = exact(outputs.logits)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").mean(1)


LOSSES: dict[str, ExampleLoss] = {
    "ForCausalLM": causal_lm,
    "ForConditionalGeneration": aligned_tokens,
    "ForMaskedLM": aligned_tokens,
    "ForTokenClassification": aligned_tokens,
    "ForSequenceClassification": classification,
    "ForImageClassification": classification,
    "regression": regression,
    "multi_label_classification": multi_label,
}


_CLASSIFIERS = tuple(f"For{what}Classification" for what in ("Sequence", "Image", "Audio", "Video"))
_OVER_TOKENS = ("ForConditionalGeneration", "ForCausalLM", "LMHeadModel", "MTModel", "EncoderDecoderModel")


def loss_kind(class_name: str, config: Config) -> str | None:
    """The key in `LOSSES` for a model class, such as `GPT2LMHeadModel`, with its config; None if no loss is known for
    it.

    The choice is that of transformers itself. An encoder-decoder that classifies pools at the last end-of-text token,
    of which all rows of a batch must have equally many; it gets None.
    """
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    if class_name.endswith(_CLASSIFIERS):
        problem_type = getattr(config, "problem_type", None)
        if encoder_decoder:
            return None
        if problem_type in ("regression", "multi_label_classification"):
            return str(problem_type)
        single_output = problem_type is None and getattr(config, "num_labels", None) == 1
        return "regression" if single_output else "ForSequenceClassification"
    for ending in ("ForMaskedLM", "ForTokenClassification"):
        if class_name.endswith(ending):
            return ending
    if class_name.endswith(_OVER_TOKENS):
        return "ForConditionalGeneration" if encoder_decoder else "ForCausalLM"
    return None


def public_sizes(class_name: str, config: Config) -> tuple[int, int]:
    """(number of token ids, number of label values) of a model: made-up records are drawn below these."""
    text = config.get_text_config() if config is not None else None
    vocabulary = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or 2
    if class_name.endswith(("ForMultipleChoice", "ForNextSentencePrediction")):
        return vocabulary, 2  # whatever num_labels says, a label is one of a record's choices, or yes or no
    over_tokens = class_name.endswith((*_OVER_TOKENS, "ForMaskedLM", "ForCTC"))
    return vocabulary, vocabulary if over_tokens else getattr(config, "num_labels", None) or 2


def sizes_of_records(class_name: str, config: Config) -> Sizes:
    """What `synthetic_records` needs to know of a model: vocab_size, label_values and end."""
    vocabulary, labels = public_sizes(class_name, config)
    return {"vocab_size": vocabulary, "label_values": labels, "end": end_of_text(config)}


def end_of_text(config: Config) -> int | None:
    """The token at which an encoder-decoder's classifier pools, the end of a text; None for other models."""
    found = getattr(config, "eos_token_id", None) if getattr(config, "is_encoder_decoder", False) else None
    return found if isinstance(found, int) else None
