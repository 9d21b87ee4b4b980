"""How dependence flows, as pure functions of bytes: over a dimension, along one, through products, through indices.

Each result's byte is the union of the bytes of all numbers that may reach it, whatever the values: zeros count, masks
do not help.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from hf_dp.per_example.proof.labels import Labels, distinct


def axes(dims: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """Dimensions as PyTorch takes them -> axes from 0; None and () are all of them."""
    if dims is None or (not isinstance(dims, int) and not dims):
        return tuple(range(ndim))
    listed = (dims,) if isinstance(dims, int) else tuple(dims)
    return tuple(d % ndim for d in listed) if ndim else ()


def over(labels: Labels, dims: int | Sequence[int] | None, keepdim: bool = False) -> Labels:
    """A reduction: the union over `dims`."""
    where = axes(dims, labels.ndim)
    if not where:
        return labels
    total = np.bitwise_or.reduce(distinct(labels), axis=where, keepdims=True, initial=0)
    kept = np.broadcast_to(total, [1 if d in where else n for d, n in enumerate(labels.shape)])
    return np.asarray(kept if keepdim else kept.squeeze(where))


def along(labels: Labels, dims: int | Sequence[int] | None) -> Labels:
    """A scan, a sort, a softmax: each number may depend on all others along `dims`. Same shape."""
    return np.broadcast_to(over(labels, dims, keepdim=True), labels.shape)


def union(parts: Iterable[Labels]) -> Labels:
    """Number by number, broadcast."""
    total: Labels = np.zeros((), dtype=np.uint8)
    for part in parts:
        total = np.asarray(total | part)
    return total


def product(a: Labels, b: Labels) -> Labels:
    """A matrix product [..., n, k] [..., k, m] -> [..., n, m]."""
    return np.asarray(over(a, -1, True) | over(b, -2, True))


def leading(parts: Iterable[Labels], shape: Sequence[int]) -> Labels:
    """Row n of the result depends on row n of each part, and on all of a part that leads with one row or with none."""
    total: Labels = np.zeros((shape[0],) if shape else (), dtype=np.uint8)
    for part in parts:
        rows = over(part, range(1, part.ndim)) if part.ndim > 1 else part
        kept = bool(shape) and rows.ndim == 1 and len(rows) in (1, shape[0])
        total = np.asarray(total | (rows if kept else over(rows, None)))
    return np.broadcast_to(total.reshape(total.shape + (1,) * (len(shape) - total.ndim)), tuple(shape))


def cropped(labels: Labels, shape: Sequence[int], dim: int) -> Labels:
    """The part of `labels` that indices of `shape` along `dim` can reach: all of `dim`, the first numbers of every
    other.
    """
    return labels[tuple(slice(None) if d == dim else slice(0, n) for d, n in enumerate(shape))]
