"""A user's loss of outputs and labels -> one loss an example, each computed from its own rows alone.

So nothing that the function does (a mean, a sort, a term over the batch, the largest losses left out) can make one
example's loss depend on another's: there is never another one in its arguments.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_dp.errors import CaptureError
from hf_dp.per_example import MicroBatch, is_tied


def each_alone(function: Callable[[Any, Any], Tensor], outputs: Any, labels: Any, size: int) -> Tensor:
    """`function(outputs, labels)` of each of `size` examples by itself, [size].

    Args:
        function: gets outputs and labels of one example, with a leading dimension of 1, and returns its loss, [1] or a
            scalar.
        outputs: of the model. With several examples, members that are not one row an example (a cache, an auxiliary
            loss) are left out.
        labels: a tensor, or a mapping or tuple of tensors, of one row an example.
        size: how many examples there are.

    Raises:
        CaptureError: labels that are not one row an example, or another number of losses than one.
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


def _tied_members(outputs: Any, size: int) -> dict[Any, Any]:
    if isinstance(outputs, Mapping):
        members: Any = outputs.items()
    else:
        members = enumerate(outputs if isinstance(outputs, tuple) else (outputs,))
    return {name: value for name, value in members if value is not None and is_tied({name: value}, size)}


def _as(outputs: Any, members: dict[Any, Any]) -> Any:
    """The members in a container of the outputs' own kind; what was left out of a tuple is None there."""
    if isinstance(outputs, Mapping):
        return type(outputs)(**members)
    values = tuple(members.get(i) for i in range(len(outputs))) if isinstance(outputs, tuple) else (members[0],)
    return values if isinstance(outputs, tuple) else values[0]


def _single(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise CaptureError(
            f"compute_loss_func is called with one example at a time: expected its loss, [1] or a scalar, got {found}"
        )
    return loss.reshape(1)
