"""A user's loss of outputs and labels -> one loss an example, each computed from its own rows alone.

The function never has another example in its arguments. So whatever it does (a mean, a sort, a term over the batch, the
largest losses left out) cannot make one example's loss depend on another.
"""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from hf_dp.errors import CaptureError
from hf_dp.per_example.batches import Leaf, MicroBatch, is_tied


def each_alone(
    function: Callable[[Leaf, Leaf], Tensor], outputs: Leaf, labels: Leaf, size: int, tied: Collection[str]
) -> Tensor:
    """`function(outputs, labels)` for each of `size` examples by itself, [size].

    Args:
        function: is given outputs and labels of one example, with a leading dimension of 1, and returns its loss, [1]
            or a scalar.
        outputs: of the model. With several examples, members that are not `tied` (a cache, an auxiliary loss) are left
            out.
        labels: a tensor, or a mapping or tuple of tensors, with one row an example.
        size: number of examples.
        tied: the names of the outputs that have one row an example, from `tied_members`.

    Raises:
        CaptureError: labels or tied outputs without one row an example, or another number of losses than one.
    """
    if size == 1:
        return _single(function(outputs, labels))
    rows = {"labels": labels}
    if not is_tied(rows, size):
        raise CaptureError(f"expected labels of one row for each of {size} examples: return them so from the collator")
    members = {name: value for name, value in _members(outputs).items() if name in tied}
    if not is_tied(members, size):
        raise CaptureError(f"expected {', '.join(members)} of the model's outputs to have one row for each example")
    own, whole = MicroBatch(members, size), MicroBatch(rows, size)
    losses = []
    for example in range(size):
        one = slice(example, example + 1)
        losses.append(_single(function(_as(outputs, own.rows(one)), whole.rows(one)["labels"])))
    return torch.cat(losses)


def tied_members(one: Leaf, other: Leaf, size: int, other_size: int) -> frozenset[str]:
    """The names of the outputs that have one row an example, whatever the number of examples; positions in a tuple.

    Args:
        one: outputs for `size` examples.
        other: outputs for `other_size` of these examples. Where only one of them were looked at, a dimension that
            happens to be of this size would be taken for the examples.
    """
    return frozenset(
        {name for name, value in _members(one).items() if is_tied({name: value}, size)}
        & {name for name, value in _members(other).items() if is_tied({name: value}, other_size)}
    )


def _members(outputs: Leaf) -> dict[str, Leaf]:
    if isinstance(outputs, Mapping):
        members = dict(outputs)
    else:
        members = {str(i): value for i, value in enumerate(outputs if isinstance(outputs, tuple) else (outputs,))}
    return {name: value for name, value in members.items() if value is not None}


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
