"""One watched pass -> which operations use each trainable parameter, and how its per-example gradient is formed."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from hf_dp.errors import UnsupportedParameterError
from hf_dp.per_example.batches import Batch, MicroBatch
from hf_dp.per_example.capture import Capture, per_example_factors, refusal_message
from hf_dp.per_example.factors import Dense, Factor, Outer, Rows
from hf_dp.per_example.forms import Forms, disagreeing, settled
from hf_dp.per_example.outside import nothing_outside, refuse_hooks

ExampleLosses: TypeAlias = Callable[[nn.Module, Batch], Tensor]  # one loss an example, [B]

_FORMS = {
    Dense: "per-example gradients",
    Outer: "factored (Gram norm, book-keeping)",
    Rows: "factored (rows of a table)",
}


class Row(NamedTuple):
    """One trainable parameter.

    Attributes:
        parameter: its name.
        shape: of the parameter.
        operations: the operations that use it.
        rule: how its per-example gradient is formed.
    """

    parameter: str
    shape: tuple[int, ...]
    operations: str
    rule: str


class Inventory(list[Row]):
    """A row for each trainable parameter.

    Attributes:
        forms: whether the rows that a parameter meets are the examples', for passes over several examples.
    """

    def __init__(self, rows: Iterable[Row], forms: Forms) -> None:
        super().__init__(rows)
        self.forms = forms


ROUNDS = 4  # a form found in one pair of passes may change what the next pair shows, further on in the model


def take_inventory(model: nn.Module, batch: MicroBatch, example_losses: ExampleLosses, unit_rows: int = 1) -> Inventory:
    """Every trainable parameter, with the operations that use it and the form of its per-example gradient.

    Runs passes on `batch`, which is made up, and on another number of the same examples (see `forms`). A parameter that
    this batch does not use is listed as unused; in training it gets noise alone unless a record uses it. A batch of one
    example is left to `inventory_of_one`. Where an example is a unit of several rows, `unit_rows` says how many.

    Raises:
        UnsupportedParameterError: parameters are used without an exact rule, or meet rows of which it stays open
            whether they are the examples'; gradients have hooks, or leaves outside of the model get a gradient. Names
            all of them, with a remedy.
    """
    if batch.size == 1:
        return inventory_of_one(model, batch, example_losses)
    refuse_hooks(model)
    other = batch.in_another_number()
    forms = Forms(unit_rows=unit_rows)
    for _ in range(ROUNDS):
        capture, factors = _watched(model, batch, example_losses, forms)
        beside, _ = _watched(model, other, example_losses, forms)
        forms = Forms(settled(capture.seen, beside.seen, capture.batch_size, beside.batch_size), unit_rows)
        unclear = disagreeing(forms, capture.seen, beside.seen)
        if not unclear:
            break
    else:
        capture.refusals.update(
            {(name, f"{what}, on rows of which it is open whose they are"): None for name, what, _ in unclear}
        )
    if capture.refusals or beside.refusals:
        raise UnsupportedParameterError(refusal_message(capture.refusals or beside.refusals))
    rows = [
        Row(name, tuple(p.shape), ", ".join(capture.operations.get(name, ())) or "-", _rule(factors.get(name, ())))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    return Inventory(rows, forms)


def _watched(
    model: nn.Module, batch: MicroBatch, example_losses: ExampleLosses, forms: Forms
) -> tuple[Capture, dict[str, list[Factor]]]:
    capture = Capture(batch.size, forms, collecting=True)
    with torch.random.fork_rng(devices=_cuda_devices(model)), nothing_outside(model, capture.anchor):
        factors, _ = per_example_factors(model, lambda: example_losses(model, batch), batch.size, capture=capture)
    return capture, factors


def inventory_of_one(model: nn.Module, one: Batch, example_losses: ExampleLosses) -> Inventory:
    """The inventory of passes with one example each, on a batch of one.

    Autograd's gradient is the example's own then, whatever the layer.

    Raises:
        UnsupportedParameterError: gradients have hooks, or leaves outside of the model get a gradient.
    """
    refuse_hooks(model)
    with torch.random.fork_rng(devices=_cuda_devices(model)), nothing_outside(model, torch.zeros(())):
        found, _ = per_example_factors(model, lambda: example_losses(model, one), 1)
    rows = [
        Row(name, tuple(p.shape), "any", "autograd's, one example a pass" if name in found else _rule(()))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    return Inventory(rows, Forms())


def _rule(factors: Sequence[Factor]) -> str:
    return " + ".join(_FORMS[type(f)] for f in factors) or "not used by this batch"


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
