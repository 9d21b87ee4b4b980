"""Which trainable parameter is used by which operation, and whether its per-example gradient is exact: found by
watching one pass.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_dp.errors import UnsupportedParameterError
from hf_dp.per_example.batches import Batch, MicroBatch
from hf_dp.per_example.capture import Capture, per_example_factors, refusal_message
from hf_dp.per_example.factors import Dense, Outer, Rows
from hf_dp.per_example.outside import nothing_outside, refuse_hooks

ExampleLosses = Callable[[nn.Module, Batch], Tensor]

_FORMS = {
    Dense: "per-example gradients",
    Outer: "factored (Gram norm, book-keeping)",
    Rows: "factored (rows of a table)",
}


class Row(NamedTuple):
    """One trainable parameter: name, shape, how it is used, how its per-example gradients are formed (or why not)."""

    parameter: str
    shape: tuple[int, ...]
    operations: str
    rule: str


def take_inventory(model: nn.Module, batch: MicroBatch, example_losses: ExampleLosses) -> list[Row]:
    """Every trainable parameter with the operations that use it and the form of its per-example gradients.

    One forward and backward on `batch`, which is synthetic. A parameter that this batch does not use is listed as such:
    it gets noise alone. With one example in the batch, as where each has a pass of its own, it is that of
    `inventory_of_one`.

    Raises:
        UnsupportedParameterError: naming all parameters that are used without an exact rule, with the remedy; hooks on
            gradients; or leaves outside the model that get a gradient.
    """
    if batch.size == 1:
        return inventory_of_one(model, batch, example_losses)
    refuse_hooks(model)
    capture = Capture(batch.size, collecting=True)
    with torch.random.fork_rng(devices=_cuda_devices(model)), nothing_outside(model, capture.anchor):
        factors, _ = per_example_factors(
            model, lambda: example_losses(model, batch), capture.batch_size, capture=capture
        )
    if capture.refusals:
        raise UnsupportedParameterError(refusal_message(capture.refusals))
    return [
        Row(name, tuple(p.shape), ", ".join(capture.operations.get(name, ())) or "-", _rule(factors.get(name, ())))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]


def inventory_of_one(model: nn.Module, one: Batch, example_losses: ExampleLosses) -> list[Row]:
    """As `take_inventory` where each pass holds one example, on a batch of one: autograd's gradient is its, whatever
    the layer.
    """
    refuse_hooks(model)
    with torch.random.fork_rng(devices=_cuda_devices(model)), nothing_outside(model, torch.zeros(())):
        found, _ = per_example_factors(model, lambda: example_losses(model, one), 1)
    return [
        Row(name, tuple(p.shape), "any", "autograd's, one example a pass" if name in found else _rule(()))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]


def _rule(factors: Sequence[Any]) -> str:
    return " + ".join(_FORMS[type(f)] for f in factors) or "not used by this batch"


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
