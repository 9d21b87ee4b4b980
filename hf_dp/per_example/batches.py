"""A collated micro-batch -> parts in which the number of examples is no other dimension's size, and their slices."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

Batch = dict[str, Any]


def num_examples(batch: Batch) -> int:
    """The leading dimension that the batch's tensors share; that of `labels` where there are some.

    Raises:
        ValueError: no tensor in the batch.
    """
    tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.dim()}
    if not tensors:
        raise ValueError(
            f"expected tensors in a micro-batch, got keys {sorted(batch)}: does the collator return tensors?"
        )
    return len(tensors.get("labels", next(iter(tensors.values()))))


def rows(batch: Batch, where: slice) -> Batch:
    """Those examples of the batch: every tensor that leads with the examples is sliced, everything else kept."""
    size = num_examples(batch)
    return {k: v[where] if isinstance(v, Tensor) and v.dim() and len(v) == size else v for k, v in batch.items()}


def example(batch: Batch, row: int) -> Batch:
    """One example without its padding: the columns between the first and the last 1 of its `attention_mask`, where it has one."""
    one = rows(batch, slice(row, row + 1))
    mask = one.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not mask.any():
        return one
    where = mask[0].nonzero().flatten()
    columns, width = slice(int(where[0]), int(where[-1]) + 1), mask.shape[1]
    return {
        k: v[:, columns] if isinstance(v, Tensor) and v.dim() > 1 and v.shape[1] == width else v for k, v in one.items()
    }


def same(a: Batch, b: Batch) -> bool:
    """Whether two collated batches hold the same tensors."""
    return a.keys() == b.keys() and all(
        v.shape == b[k].shape and bool((v == b[k]).all()) for k, v in a.items() if isinstance(v, Tensor)
    )


def unambiguous(batch: Batch) -> Iterator[Batch]:
    """The batch in parts whose size is none of its other dimensions.

    A rule tells the examples by the size of the leading dimension. With 32 examples of 32 tokens, relative positions [T, T] or
    a layer that puts the sequence first could be taken for examples; in parts of 31 and 1 they cannot. One example
    alone is always unambiguous: then autograd's own gradient is used.
    """
    size = num_examples(batch)
    others = {n for v in batch.values() if isinstance(v, Tensor) for n in v.shape[1:]}
    start = 0
    while start < size:
        part = size - start
        while part > 1 and part in others:
            part -= 1
        yield rows(batch, slice(start, start + part)) if part < size else batch
        start += part
