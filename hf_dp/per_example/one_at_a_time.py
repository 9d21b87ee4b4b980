"""A user's loss of outputs and labels -> one loss an example, each computed from its own rows alone.

The function never has another example in its arguments. So whatever it does (a mean, a sort, a term over the batch, the
largest losses left out) cannot make one example's loss depend on another.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hf_dp.errors import CaptureError
from hf_dp.per_example import Leaf, MicroBatch, is_tied


def each_alone(function: Callable[[Leaf, Leaf], Tensor], outputs: Leaf, labels: Leaf, size: int) -> Tensor:
    """`function(outputs, labels)` for each of `size` examples by itself, [size].

    Args:
        function: is given outputs and labels of one example, with a leading dimension of 1, and returns its loss, [1]
            or a scalar.
        outputs: of the model. With several examples, members without one row an example (a cache, an auxiliary loss)
            are left out.
        labels: a tensor, or a mapping or tuple of tensors, with one row an example.
        size: number of examples.

    Raises:
        CaptureError: labels without one row an example, or another number of losses than one.
    """
    if size == 1:
        return _single(function(outputs, labels))
    rows = {"labels": labels}
    if not is_tied(rows, size):
        raise CaptureError(f"expected labels of one row for each of {size} examples: return them so from the collator")
    tied, whole = MicroBatch(_tied_members(outputs, size), size), MicroBatch(rows, size)
    losses = []
    for example in range(size):
        one = slice(example, example + 1)
        losses.append(_single(function(_as(outputs, tied.rows(one)), whole.rows(one)["labels"])))
    return torch.cat(losses)


def _tied_members(outputs: Leaf, size: int) -> dict[str, Leaf]:
    """The members of the outputs that have one row an example, by name, or by position in a tuple."""
    if isinstance(outputs, Mapping):
        members = dict(outputs)
    else:
        members = {str(i): value for i, value in enumerate(outputs if isinstance(outputs, tuple) else (outputs,))}
    return {name: value for name, value in members.items() if value is not None and is_tied({name: value}, size)}


def _as(outputs: Leaf, members: Mapping[str, Leaf]) -> Leaf:
    """The members in a container of the same kind as the outputs; members left out of a tuple are None."""
    if isinstance(outputs, Mapping):
        return type(outputs)(**members)
    if isinstance(outputs, tuple):
        return tuple(members.get(str(i)) for i in range(len(outputs)))
    return members["0"]


def _single(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise CaptureError(
            f"compute_loss_func is called with one example at a time: expected its loss, [1] or a scalar, got {found}"
        )
    return loss.reshape(1)
