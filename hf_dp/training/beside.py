"""Losses of made-up examples, again and beside copies of themselves -> an error if they are not the examples' own.

One example a pass does not help a loss that compares examples, as contrastive losses do. Alone, an example has nobody
to be compared with: its loss is 0, or not a number, or lacks the part that pushes examples apart, so something else
would be trained than was asked for. Copies of one record show such a loss. A loss of each example is the same for
copies as for the record alone, and so is a mean over examples or tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_dp.errors import ConfigError
from hf_dp.per_example import Batch, MicroBatch, Path, Untied, leaves, precision, stacked, undisturbed
from hf_dp.sampling import refuse_what_remembers
from hf_dp.training.compared import ROUNDING

COPIES = 3
RECORDS = 2  # of which copies are made
Losses = Callable[[nn.Module, Batch], Tensor]  # one loss an example, or one of the whole batch
COMPARES = (
    "the loss compares the examples of a batch with each other, as a contrastive loss does ({how}). Clipping bounds "
    "what one record adds, so an example's loss must be a function of its own record. Put what is to be compared, such "
    "as an example and its negatives, into one record, and override DPTrainer.example_losses(model, inputs)"
)


def refuse_comparing(model: nn.Module, losses: Losses, alone: Sequence[MicroBatch]) -> None:
    """Refuses a loss that compares examples.

    A loss is not judged if it differs between two passes, or if the model's outputs are others beside copies.

    Args:
        model: unwrapped; it is left as it was.
        losses: one loss an example, or one of the whole batch.
        alone: made-up examples, each collated by itself.

    Raises:
        ConfigError: the loss compares examples, or fails for one alone and not for copies of it.
    """
    for one in alone[:RECORDS]:
        copies = copies_of(one)
        if copies is None:
            continue
        single, several = _tried(model, losses, one), _tried(model, losses, copies)
        if several is None or not bool(several.losses.isfinite().all()):
            continue
        if single is None:
            raise ConfigError(COMPARES.format(how="it fails for a made-up record alone, and not for copies of it"))
        again = _measured(model, losses, one, seed=1)
        if bool(single.losses.isfinite().all()) and not _close(single.losses, again.losses, model):
            continue
        # of a batch: its mean or sum; of an example: its own, or its share of what the batch holds of tokens
        factor = float(COPIES) if several.losses.numel() == 1 else 1.0 / COPIES
        usual = any(_close(several.losses, single.losses * f, model) for f in (1.0, factor))
        if not usual and _same_outputs(single.outputs, several.outputs, model):
            raise ConfigError(
                COMPARES.format(how="beside copies of itself, a made-up record has another loss than alone")
            )


def refuse_remembering(model: nn.Module, losses: Losses, alone: Sequence[MicroBatch], code: object = None) -> None:
    """Refuses a loss of an example that is another when it is computed again, with the model's state put back and under
    the same random states: it is a function of what was computed before, which one example a pass does not help.

    Args:
        model: unwrapped; it is left as it was.
        losses: one loss an example.
        alone: made-up examples, each collated by itself.
        code: what of the losses is a user's.

    Raises:
        ConfigError: two losses of an example differ, on an accelerator by more than rounding; or the code leaves
            something behind.
    """
    with undisturbed(model) as state:  # with gradients, for a loss may be made of some

        def loss(one: MicroBatch) -> Tensor:
            state.put_back()
            return losses(model, one).detach().double().cpu()

        devices = {p.device for p in model.parameters()}
        what = "the loss of an example, or the model that it calls,"
        exactly = {device.type for device in devices} == {"cpu"}
        alike = (lambda a, b: torch.equal(a.nan_to_num(), b.nan_to_num())) if exactly else partial(_close, model=model)
        refuse_what_remembers(what, loss, alone[:RECORDS], devices, alike, code or None)


def copies_of(one: MicroBatch) -> MicroBatch | None:
    """Several of one example in a batch; None where its tensors don't lead with the examples."""
    try:
        return stacked([one] * COPIES, {})
    except Untied:
        return None


class Measured(NamedTuple):
    """Losses [n], and the outputs of the model's last call by their path in it."""

    losses: Tensor
    outputs: dict[Path, Tensor]


def _tried(model: nn.Module, losses: Losses, batch: MicroBatch) -> Measured | None:
    """None where it fails, of whatever kind: code that was not written for one record, or for copies."""
    try:
        return _measured(model, losses, batch)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None


def _measured(model: nn.Module, losses: Losses, batch: MicroBatch, seed: int = 0) -> Measured:
    """Without dropout, and with the same random numbers for the same seed."""
    seen: list[Any] = []
    with undisturbed(model), torch.no_grad():
        torch.manual_seed(seed)
        handle = model.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            found = losses(model, batch).reshape(-1).double().cpu()
        finally:
            handle.remove()
        # read in here: with the model, the list that its hook holds is put back too
        tensors = {path: leaf for path, leaf in leaves(seen[-1] if seen else {}).items() if isinstance(leaf, Tensor)}
    return Measured(found, tensors)


def _same_outputs(alone: dict[Path, Tensor], beside: dict[Path, Tensor], model: nn.Module) -> bool:
    """Whether the outputs for each copy are those for the record alone, as far as they have one row an example."""
    for path in alone.keys() & beside.keys():
        a, b = alone[path], beside[path]
        rows = a.shape[:1] == (1,) and b.shape == (COPIES, *a.shape[1:]) and a.is_floating_point()
        if rows and not _close(b.double().cpu(), a.expand_as(b).double().cpu(), model):
            return False
    return True


def _close(a: Tensor, b: Tensor, model: nn.Module) -> bool:
    """Whether they differ by rounding alone; what is not a number is like itself."""
    tolerance = ROUNDING[precision(model)][0]
    size = max(float(b.nan_to_num().abs().max()), tolerance) if b.numel() else 0.0
    return torch.allclose(a, b.expand_as(a), rtol=0.0, atol=10 * tolerance * size, equal_nan=True)
