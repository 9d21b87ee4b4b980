"""A trainer (its class, arguments and model) -> the loss of an example that training takes, compared with the one asked
for.

What was asked for is, in this order: an overridden `example_losses`; `compute_loss_func`; the host's `compute_loss`,
where the trainer spells it out (`host_losses`); the loss that the model itself returns for one example, to which a
host's `compute_loss` may add. For some classes of models this loss is known in a fast form, for many examples a pass.
A fast form is used if, on made-up records, its loss and gradient are those of the model, or of the host. In all other
cases the model's own loss, or the host's, is trained with one example a pass, where it is that example's alone by
construction.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_dp.config import is_number
from hf_dp.errors import ConfigError, HfDpError
from hf_dp.per_example import (
    OVER_VOCABULARY,
    Batch,
    Leaf,
    MicroBatch,
    as_rows,
    decoder_inputs,
    each_alone,
    leaves,
    losses,
    precision,
    tied_members,
    undisturbed,
)
from hf_dp.training.compared import measure, same
from hf_dp.training.host import Objective, PrivateTrainer
from hf_dp.training.not_taken import refused_records
from hf_dp.training.overrides import host_of, owns

YOURS, FUNCTION, OWN, HOST = "example_losses", "compute_loss_func", "the model's own", "the host's compute_loss"
SPELT_OUT = "the host's compute_loss, for many examples a pass"
ALONE = (OWN, HOST)  # for one example a pass
RECORDS = 2  # made-up ones that losses are compared on
REMEDY = "override DPTrainer.example_losses(model, inputs), which returns one loss an example, [batch]"


DRAWS = 5
NEVER_FINITE = Objective(OWN, "it is not finite on any made-up record")


def choose(trainer: PrivateTrainer) -> Objective:
    """The objective of a trainer, found on made-up records, each collated by itself. The model is left as it was.

    Raises:
        ConfigError: no loss of an example is known and the model returns none; the host's `compute_loss` is not the
            loss that would be trained; settings apply only to a known loss; or the model does not take the made-up
            records. The message has the remedy.
    """
    alone = trainer._synthetic_batches()[1:]
    try:
        with as_in_training(trainer):
            found = _chosen(trainer, alone)
            if trainer.compute_loss_func is not None:
                found = found._replace(tied=_tied_outputs(trainer))
    except (HfDpError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise refused_records(error, alone[0], trainer.model) from error
    _refuse_settings(trainer, found)
    return found


@contextmanager
def as_in_training(trainer: PrivateTrainer) -> Iterator[None]:
    """Around passes that only check: in training's precision. `train` wraps the model's forward in it only later."""
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        yield


def _chosen(trainer: PrivateTrainer, alone: Sequence[Batch]) -> Objective:
    if owns(type(trainer), "example_losses"):
        return Objective(YOURS, "overridden")
    if trainer.compute_loss_func is not None:
        return Objective(FUNCTION, "given")
    if trainer.host_losses is not None:
        found = Objective(SPELT_OUT, "as compared on made-up records")
        return found if _host_agrees(trainer, found, alone[0]) else _loss_of_the_host(trainer)
    found = _known_or_own(trainer, alone[:RECORDS])
    for _ in range(DRAWS):  # of a collator that masks at random, on records as short as these
        found = _known_or_own(trainer, trainer._synthetic_batches()[1:]) if found == NEVER_FINITE else found
    return found if _host_agrees(trainer, found, alone[0]) else _loss_of_the_host(trainer)


def _tied_outputs(trainer: PrivateTrainer) -> frozenset[str]:
    """The names of the outputs that have one row an example; none where made-up records do not share a batch."""
    whole = trainer._synthetic_batches()[0]
    if whole.size == 1:
        return frozenset()
    some, found = whole.in_another_number(), []
    for batch in (whole, some):
        inputs = dict(batch)
        labels = _taken(inputs, trainer.label_names)
        try:
            with undisturbed(trainer.model), torch.no_grad():
                found.append(trainer.model(**inputs, **_decoder_reads(trainer, inputs, labels)))
        except Exception:  # the model does not take several examples, so that each will have a pass of its own
            return frozenset()
    return tied_members(found[0], found[1], whole.size, some.size)


def losses_of(trainer: PrivateTrainer, kind: str, model: nn.Module, inputs: Batch) -> Tensor:
    """One loss an example, [B], multiplied by its class's weight if the trainer has class weights."""
    if kind == YOURS:  # an override that calls ours
        kind = FUNCTION if trainer.compute_loss_func is not None else _kind_of_class(trainer) or OWN
    if kind == SPELT_OUT:
        return trainer.host_losses(model, inputs)
    if kind in ALONE:
        found = _one_by_one(partial(_own_loss if kind == OWN else _hosts_loss, trainer, model), inputs)
    else:
        given, inputs = inputs, dict(inputs)
        labels = _taken(inputs, trainer.label_names if kind == FUNCTION else ("labels",))
        if kind == FUNCTION:
            size = given.size if isinstance(given, MicroBatch) else len(leaves({"labels": labels}).popitem()[1])
            outputs = model(**inputs, **_decoder_reads(trainer, inputs, labels))
            found = each_alone(trainer.compute_loss_func, outputs, labels, size, trainer.objective.tied)
        else:
            found = _from_labels(trainer, kind, model, inputs, labels)
    weights = trainer.class_weights
    return (
        found if weights is None else found * _weight_of_each(weights, inputs if kind in ALONE else {"labels": labels})
    )


def mean_of_the_users(trainer: PrivateTrainer, model: nn.Module, inputs: Batch) -> tuple[Tensor, Leaf]:
    """For evaluation: the mean of the losses that `compute_loss_func` returns, and the model's outputs."""
    inputs = dict(inputs)
    labels = _taken(inputs, trainer.label_names)
    outputs = model(**inputs, **_decoder_reads(trainer, inputs, labels))
    return trainer.compute_loss_func(outputs, labels).mean(), outputs


# ---- the losses
# ------------------------------------------------------------------------------------------------------------


def _taken(inputs: Batch, names: Sequence[str]) -> Leaf:
    """The labels, removed from the inputs: `labels`, or else all that `label_names` name, as a tuple.

    Raises:
        ConfigError: there are none.
    """
    if "labels" in inputs:
        return inputs.pop("labels")
    found = tuple(inputs.pop(name) for name in names if name in inputs)
    if not found:
        raise ConfigError(
            f"the collated batch has no `labels` (it has {', '.join(sorted(inputs))}): name the target column "
            "`labels` (for a causal language model: data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False)"
            f"), name the columns in TrainingArguments(label_names=[...]), or {REMEDY}"
        )
    return found


def _decoder_reads(trainer: PrivateTrainer, inputs: Batch, labels: Leaf) -> Batch:
    return decoder_inputs(trainer._base_model(), inputs, labels)


def _from_labels(trainer: PrivateTrainer, kind: str, model: nn.Module, inputs: Batch, labels: Leaf) -> Tensor:
    inputs.update(_decoder_reads(trainer, inputs, labels))
    smoothing = trainer.args.label_smoothing_factor
    if kind in OVER_VOCABULARY:
        return OVER_VOCABULARY[kind](model, trainer._base_model(), inputs, labels, smoothing)
    return losses.LOSSES[kind](model(**inputs), labels, smoothing)


def _one_by_one(loss: Callable[[Batch], Tensor], inputs: Batch) -> Tensor:
    """One loss an example, [B], with a pass for each. A batch of one example is passed on as it is."""
    each: list[Batch] = [inputs]
    if isinstance(inputs, MicroBatch):
        each = [inputs.rows(slice(i, i + 1)) for i in range(inputs.size)]
    return torch.cat([loss(one).reshape(1) for one in each])


def _own_loss(trainer: PrivateTrainer, model: nn.Module, inputs: Batch) -> Tensor:
    loss = own_loss(model(**inputs))
    if loss is None:
        raise ConfigError(f"{type(model).__name__} returned no loss: {REMEDY}")
    return loss


def of_a_batch(trainer: PrivateTrainer) -> Callable[[nn.Module, Batch], Tensor]:
    """What is asked for, for several examples at once: the model's own loss is then one of them all."""
    own = trainer.objective.kind == OWN
    return partial(_own_loss, trainer) if own else lambda model, batch: trainer.example_losses(model, batch)


def _hosts_loss(trainer: PrivateTrainer, model: nn.Module, inputs: Batch) -> Tensor:
    """The host's `compute_loss`. Only the loss is kept: what the host notes of private examples would be logged."""
    host: Any = host_of(type(trainer), "compute_loss")
    with _books_put_back(trainer):
        loss: Tensor = host.compute_loss(trainer, model, dict(inputs) if trainer.unit_rows == 1 else as_rows(inputs))
    return loss


def own_loss(outputs: Leaf) -> Tensor | None:
    """The loss in a model's outputs, a number; None where there is none."""
    found = outputs.get("loss") if isinstance(outputs, dict) else outputs[0] if isinstance(outputs, tuple) else None
    return found if isinstance(found, Tensor) and found.numel() == 1 else None


def _weight_of_each(weights: Tensor, inputs: Batch) -> Tensor:
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
        raise ConfigError(
            f"class_weights need one label of a class in each record, as `labels`: leave them out, and {REMEDY}"
        )
    return weights.to(labels.device)[labels.masked_fill(labels == losses.IGNORED, 0)]


# ---- what was asked for
# ----------------------------------------------------------------------------------------------------


def _known_or_own(trainer: PrivateTrainer, alone: Sequence[Batch]) -> Objective:
    name, found = type(trainer._base_model()).__name__, NEVER_FINITE
    for batch in alone:
        theirs = measure(trainer.model, partial(_own_or_none, trainer.model, batch))
        kind = _kind_of_class(trainer)  # after that pass, which may settle config.problem_type
        if kind is None and theirs is None:
            raise ConfigError(
                f"no loss of an example is known for {name}, and it returns none for one record: {REMEDY}"
            )
        if kind is None:
            return Objective(OWN, f"no form for many examples is known for {name}")
        if theirs is None:
            return Objective(kind, f"{name} has no loss of its own")
        if not math.isfinite(theirs.loss):  # a mean over no target: masks may have left the record none
            continue
        ours = measure(trainer.model, partial(_known, trainer, kind, batch))
        if not same(ours, theirs, precision(trainer.model)):
            return Objective(OWN, f"it is not the {kind} loss of its logits: that was seen on made-up records")
        found = Objective(kind, "the model's own, as compared on made-up records")
    return found


def _kind_of_class(trainer: PrivateTrainer) -> str | None:
    base = trainer._base_model()
    return losses.loss_kind(type(base).__name__, getattr(base, "config", None))


def _known(trainer: PrivateTrainer, kind: str, batch: Batch) -> Tensor | None:
    """A known loss as the model would compute it, without smoothing or weights; None if it cannot be computed."""
    inputs, model = dict(batch), trainer.model
    try:
        labels = _taken(inputs, ("labels",))
        inputs.update(_decoder_reads(trainer, inputs, labels))
        if kind in OVER_VOCABULARY:
            return OVER_VOCABULARY[kind](model, trainer._base_model(), inputs, labels, 0.0)
        return losses.LOSSES[kind](model(**inputs), labels, 0.0)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
        return None


def _own_or_none(model: nn.Module, batch: Batch) -> Tensor | None:
    try:
        loss = own_loss(model(**batch))
    except TypeError:  # its forward takes no labels
        return None
    return None if loss is None else loss.reshape(1)


def _host_agrees(trainer: PrivateTrainer, chosen: Objective, batch: Batch) -> bool:
    """Whether the host's `compute_loss` gives the loss that was chosen.

    Of hosts with a loss of their own, only trl's for supervised fine-tuning and those whose loss is spelt out get here;
    `overrides` refuses all others.
    """
    if host_of(type(trainer), "compute_loss").__module__.startswith("transformers."):
        return True
    model = trainer.model
    theirs = measure(model, lambda: _hosts_loss(trainer, model, batch).reshape(1))
    try:
        ours = measure(model, lambda: losses_of(trainer, chosen.kind, model, batch))
    except KeyError:  # a loss of the host's that is not spelt out
        return False
    return same(ours, theirs, precision(model))


def _loss_of_the_host(trainer: PrivateTrainer) -> Objective:
    name, setting = host_of(type(trainer), "compute_loss").__name__, vars(trainer.args).get("loss_type")
    named = f"{name}'s{f' with loss_type={setting!r}' if setting else ''}"
    known = (
        "spelt out for many examples" if trainer.host_losses else "the mean cross entropy over a record's own targets"
    )
    rule = f"{named} is not {known}"
    if trainer.args.world_size > 1:
        raise ConfigError(
            f"{rule}, and it can't be trained in several processes, which it makes wait for each other: {REMEDY}"
        )
    return Objective(HOST, rule)


@contextmanager
def _books_put_back(trainer: PrivateTrainer) -> Iterator[None]:
    """Around a host's `compute_loss`: trl's trainers keep averages of what it has seen, and log them."""
    kept = {
        name: copy.deepcopy(value)
        for name, value in vars(trainer).items()
        if name in ("_metrics", "_total_train_tokens")
    }
    try:
        yield
    finally:
        vars(trainer).update(kept)


def _refuse_settings(trainer: PrivateTrainer, chosen: Objective) -> None:
    if chosen.kind in (OWN, SPELT_OUT) and trainer.args.label_smoothing_factor:
        raise ConfigError(
            f"label_smoothing_factor={trainer.args.label_smoothing_factor} cannot be put into {chosen.kind}, "
            f"which is trained here ({chosen.rule}): leave it at 0, or {REMEDY}"
        )
    if chosen.kind in (YOURS, SPELT_OUT) and trainer.class_weights is not None:
        raise ConfigError("class_weights are not for a loss of another kind: multiply its losses by them there")
    classes = getattr(getattr(trainer._base_model(), "config", None), "num_labels", None)
    weights = trainer.class_weights if "Classification" in chosen.kind else None
    if weights is not None and classes not in (None, len(weights)):
        raise ConfigError(
            f"class_weights: expected {classes} numbers, one for each of the model's classes (config.num_labels), got "
            f"{len(weights)}"
        )


def class_weights(given: Sequence[float] | None) -> Tensor | None:
    """The weights of classes as a tensor.

    Raises:
        ConfigError: not a list of finite numbers, 0 or more, or all of them 0.
    """
    if given is None:
        return None
    numbers = list(given)
    if not any(numbers) or not all(is_number(w) and w >= 0 for w in numbers):
        raise ConfigError(f"class_weights must be finite numbers, 0 or more, one a class, not all 0 (got {given!r})")
    return torch.tensor(numbers, dtype=torch.float32)
