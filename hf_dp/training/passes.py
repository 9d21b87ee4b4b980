"""A model, its loss and made-up records -> the inventory of a training, and why each example needs a pass of its own.

One example a pass is exact for any layer and any loss, because autograd's gradient is the example's. It is slower than
many examples a pass, so it is used only where these are not possible: the loss is the model's own, the collator mixes
records, an operation has no rule for each example's gradient, or it is not proved that the examples of a pass are
independent.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_dp.errors import ConfigError, HfDpError
from hf_dp.per_example import (
    SIZE,
    Batch,
    ComparedLengths,
    Inventory,
    MicroBatch,
    Proof,
    Record,
    Trace,
    inventory_of_one,
    is_coupled,
    names_in,
    note_beside,
    note_losses,
    per_example_factors,
    prove,
    reads_of_code,
    take_inventory,
    trace_of,
    undisturbed,
    untouched,
)
from hf_dp.randomness import fork_forward_rng
from hf_dp.sampling import Collation, of_lengths
from hf_dp.training.beside import refuse_comparing, refuse_remembering
from hf_dp.training.host import PrivateTrainer
from hf_dp.training.not_taken import first_line, refused_records
from hf_dp.training.objective import ALONE, as_in_training, of_a_batch
from hf_dp.training.overrides import owns

# what seeds the generators that each example's numbers come from, leaves PyTorch without being seen, or asks a clock or
# the disk, whose answer may be another in a later pass
UNSEEN = frozenset(
    "manual_seed set_rng_state fork_rng DisableTorchFunction DisableTorchFunctionSubclass _disable_current_modes "
    "to_dlpack _to_dlpack grad_fn saved_tensors_hooks set_seed "
    "time monotonic perf_counter process_time exists is_file getmtime stat open isEnabledFor getLogger".split()
)
NOTHING_TRAINED = (
    "no parameter of the model requires gradients, so nothing would be trained: load an adapter with "
    "PeftModel.from_pretrained(..., is_trainable=True), make a new one without inference_mode, or set requires_grad"
)
COUPLED = (
    "on made-up records an example's gradient in a batch is another than alone (padding that no mask hides, left "
    "padding with absolute positions, numbers drawn for the whole batch)"
)


class Subject(NamedTuple):
    """What is examined: a model in training mode, its losses, and public records with the way to bring them there; how
    many rows of a pass each example has; and what of the losses is a user's code.
    """

    model: nn.Module
    example_losses: Callable[[nn.Module, Batch], Tensor]
    collation: Collation
    records: Sequence[Record]
    to_device: Callable[[Batch], Batch]
    unit_rows: int = 1
    code: object = None

    def losses_code(self) -> dict[str, object]:
        """`code` by name; {} where none is a user's."""
        if isinstance(self.code, dict):
            return self.code
        return {} if self.code is None else {"the loss": self.code}

    def batches(self, records: Sequence[Record] | None = None) -> list[MicroBatch]:
        """The records, or the subject's own if none are given: together in one batch, then each alone.

        If records never share a batch, the first one stands for all of them together.
        """
        with fork_forward_rng():  # a collator may draw
            made = self.collation.together_and_alone(list(self.records if records is None else records))
        return [batch.mapped(self.to_device) for batch in made]


def inventory_and_reason(trainer: PrivateTrainer) -> tuple[Inventory, str]:
    """How each parameter's per-example gradient is formed, and why each example has a pass of its own, or "".

    Raises:
        UnsupportedParameterError, CaptureError: a parameter or a loss that is not exact even with one example a pass.
    """
    trainer.model.train()
    with as_in_training(trainer):
        subject = subject_of(trainer)
        rows, reason = examined(subject, _known_beforehand(trainer), of_a_batch(trainer))
        if reason:
            return rows, reason
        batches = subject.batches()
        if not are_coupled(subject, rows, batches, trainer._most_examples()):
            return rows, ""
        refuse_comparing(subject.model, of_a_batch(trainer), batches[1:])
        return _of_one(subject, batches[1], COUPLED), COUPLED


def subject_of(trainer: PrivateTrainer) -> Subject:
    """A trainer's model, losses, collator and made-up records."""
    losses = lambda model, batch: trainer.example_losses(model, batch)  # noqa: E731
    collation = trainer._collation()
    return Subject(
        trainer.model,
        losses,
        collation,
        trainer._made_up_records() if collation.pads else collation.tried,
        trainer._prepare_inputs,
        type(trainer).unit_rows,
        users_losses(trainer),
    )


def users_losses(trainer: PrivateTrainer) -> dict[str, object]:
    """What of a trainer's losses is a user's code: an override of `example_losses`, and `compute_loss_func`."""
    found: dict[str, object] = {}
    if "example_losses" in vars(trainer) or owns(type(trainer), "example_losses"):
        found["example_losses"] = trainer.example_losses
    if trainer.compute_loss_func is not None:
        found["compute_loss_func"] = trainer.compute_loss_func
    return found


def examined(
    subject: Subject, known: str = "", of_several: Callable[[nn.Module, Batch], Tensor] | None = None
) -> tuple[Inventory, str]:
    """The inventory, and why a pass holds one example: `known` where that is known beforehand, else what is found; ""
    for no reason.

    Args:
        subject: what is examined.
        known: a reason.
        of_several: the loss, where it is not `example_losses` that meets several examples.

    Raises:
        UnsupportedParameterError, CaptureError: what one example a pass can't help either.
        ConfigError: nor a loss that compares examples, or that remembers the examples before; or nothing is trained.
    """
    if not any(p.requires_grad for p in subject.model.parameters()):
        raise ConfigError(NOTHING_TRAINED)
    whole, *alone = subject.batches()
    note_losses(subject.model, {})  # what they keep is not put back here, so that it can be seen
    with undisturbed(subject.model):
        note_beside(subject.model, lambda: subject.example_losses(subject.model, alone[0]))
    try:
        rows, reason = _examined(subject, whole, alone, known)
    except Exception:
        refuse_comparing(subject.model, of_several or subject.example_losses, alone)
        raise
    refuse_remembering(subject.model, subject.example_losses, alone, subject.code)
    if reason:
        refuse_comparing(subject.model, of_several or subject.example_losses, alone)
    note_losses(subject.model, subject.losses_code())
    return rows, reason


def _unseen(subject: Subject) -> str:
    """What a user's code names that a proof cannot follow, in words; "" without any."""
    if names := sorted(names_in(reads_of_code(subject.losses_code(), subject.model)) & UNSEEN):
        return f"the code of the model or its loss names {', '.join(names)}, which no proof can follow"
    return ""


def _examined(subject: Subject, whole: MicroBatch, alone: Sequence[MicroBatch], known: str) -> tuple[Inventory, str]:
    one, reason = alone[0], known or subject.collation.apart or _unseen(subject)
    if reason:
        return _of_one(subject, one, reason), reason
    try:
        with untouched(subject.model):  # what a pass changes in it, such as its attention for good, the proof must see
            rows = take_inventory(subject.model, whole, subject.example_losses, subject.unit_rows)
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of whatever kind: stand-ins for parameters meet code that was not written for them
        try:
            with untouched(subject.model):
                rows = inventory_of_one(subject.model, one, subject.example_losses)
        except Exception as alone_too:
            raise error if isinstance(error, HfDpError) else refused_records(alone_too, one, subject.model) from None
        return rows, first_line(error)
    proof = proof_of(subject)
    if proof.independent:
        return rows, ""
    reason = f"not proved that its examples are independent: {proof.reasons[0]}"
    return _of_one(subject, one, reason), reason


def _of_one(subject: Subject, one: Batch, reason: str) -> Inventory:
    """The inventory where each example has a pass of its own, for that reason."""
    try:
        with untouched(subject.model):
            return inventory_of_one(subject.model, one, subject.example_losses)
    except (HfDpError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise refused_records(error, one, subject.model, reason) from error


def written_by(model: nn.Module, example_losses: Callable[[nn.Module, Batch], Tensor], one: Batch) -> tuple[str, ...]:
    """Names of the parameters that a pass over one example writes to, even if it writes the same values back."""
    before = {name: p._version for name, p in model.named_parameters()}
    with undisturbed(model):
        per_example_factors(model, lambda: example_losses(model, one), 1)
        return tuple(name for name, p in model.named_parameters() if p._version != before.get(name))


def are_coupled(subject: Subject, inventory: Inventory, batches: Sequence[MicroBatch], most: int) -> bool:
    """Whether examples have another gradient than alone in a batch of `most` of them, or of fewer for lack of memory.

    Args:
        subject: what is examined.
        inventory: of its passes.
        batches: several examples in one batch, then each alone.
        most: the most examples of a pass.
    """
    whole, *alone = batches
    factors_of, size = partial(per_example_factors, forms=inventory.forms), max(most, whole.size)
    while True:
        try:
            return is_coupled(subject.model, [whole.first(size), *alone], subject.example_losses, factors_of)
        except torch.OutOfMemoryError:
            if size == whole.size:
                raise
            size = max(size // 2, whole.size)


def compared_lengths(
    subject: Subject,
    inventory: Inventory,
    make: Callable[[Sequence[int]], list[Record]] | None = None,
    longest: int | None = None,
) -> ComparedLengths:
    """What decides of a micro-batch whether its examples may share a pass, by their lengths.

    Args:
        subject: what is trained.
        inventory: of its passes.
        make: lengths -> made-up records; None makes them of the subject's first record.
        longest: the most tokens that the model takes; None where any number is taken.
    """
    made = make or partial(of_lengths, subject.records[0])
    factors_of = partial(per_example_factors, forms=inventory.forms)

    def trace(batch: MicroBatch) -> Trace:
        with fork_forward_rng({p.device for p in subject.model.parameters()}):
            return trace_of(subject.model, subject.example_losses, batch)

    return ComparedLengths(
        lambda lengths: subject.batches(made(lengths)),
        lambda batches: not is_coupled(subject.model, batches, subject.example_losses, factors_of),
        subject.batches()[0],
        longest,
        trace,
    )


def proof_of(subject: Subject) -> Proof:
    """Follows passes over public records to show that the examples of a pass are independent.

    That no parameter outside of the model receives a gradient has been checked by the inventory.
    """
    some = list(islice(cycle(subject.records), SIZE))
    batches = [subject.batches(order)[0] for order in (some, some[::-1])]
    if any(batch.size != SIZE for batch in batches):
        return Proof(False, ("the collator does not put several records into one batch",))
    return prove(subject.model, subject.example_losses, batches)


def _known_beforehand(trainer: PrivateTrainer) -> str:
    if trainer.objective.kind in ALONE:
        return f"{trainer.objective.kind} is of its whole batch"
    if trainer._planned().is_discrete:
        return "noise='discrete'"
    alone = trainer.args.per_device_train_batch_size == 1 and not trainer.args.torch_compile
    return "per_device_train_batch_size=1" if alone else ""
