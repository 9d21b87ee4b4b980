"""The per-example engine as a training uses it: an inventory on examples of the same kind, then a pass."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from hf_dp.per_example.batches import MicroBatch
from hf_dp.per_example.capture import Pass, PerExample, clipped_gradient_sum, per_example_factors
from hf_dp.per_example.factors import Factor
from hf_dp.per_example.inventory import take_inventory
from tests.support import reference

Batch = dict[str, Tensor]
Losses = Callable[[nn.Module, Batch], Tensor]  # one loss an example


def passes(model: nn.Module, batch: Batch, example_losses: Losses) -> Pass:
    inventory = take_inventory(model, MicroBatch(batch, _size(batch)), example_losses)
    return partial(per_example_factors, forms=inventory.forms)


def factors(model: nn.Module, batch: Batch, example_losses: Losses) -> tuple[dict[str, list[Factor]], Tensor]:
    return passes(model, batch, example_losses)(model, lambda: example_losses(model, batch), _size(batch))


def clipped_sum(
    model: nn.Module, batch: Batch, example_losses: Losses, clip_norm: float, factors_of: Pass | None = None
) -> tuple[dict[str, Tensor], PerExample]:
    """The engine's clipped sum by parameter name, and the norms and losses of the examples."""
    into = {
        name: torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32))
        for name, p in reference.trainable(model).items()
    }
    factors_of = factors_of or passes(model, batch, example_losses)
    seen = clipped_gradient_sum(model, lambda: example_losses(model, batch), _size(batch), clip_norm, into, factors_of)
    return into, seen


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))
