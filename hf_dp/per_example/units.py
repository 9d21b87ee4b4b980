"""Units of several rows, such as a pair of answers or the chunks of a document: one gradient, formed over k rows of a
pass.

Outside of the model a unit is an example like any other: each tensor leads with the units, and one that has numbers
for each row has the rows next, [U, k, ...]. So units are collated, padded, cut out and counted as examples are. Only a
loss, where it calls the model, lays the rows one after the other, [U k, ...], unit by unit (`as_rows`).

There trained parameters meet k rows a unit. What a tap hands over for each row is folded to units before it is kept
(`folded`), and so before any norm is formed:

    Dense  [U k, *shape]               -> [U, *shape], the sum over a unit's rows
    Outer  [U k, T, d], [U k, T, r]    -> [U, k T, d], [U, k T, r]; the Gram form has the products across rows
    Rows   [U k, T], [U k, T, d]       -> [U, k T], [U, k T, d]: a row of the table that both look up is added up first

Each stands for the sum of what its rows stood for, so the norm is that of the unit's gradient. That the k rows are
those of one unit is shown by `proof`: wherever trained values meet the examples, equal parts of the rows must each
depend on one unit alone.
"""

import torch
from torch import Tensor

from hf_dp.per_example.batches import Batch, Leaf, Untied
from hf_dp.per_example.factors import Dense, Factor, Outer, Rows


def as_units(batch: Batch, size: int, unit_rows: int) -> Batch:
    """What a collator made of `size` records, with `unit_rows` rows for each -> the same with the units in front.

    Args:
        batch: tensors [k U, ...], first the first row of each record, then the second of each, and so on; or [U, ...],
            of which each record has one value.
        size: U.
        unit_rows: k.

    Returns:
        Tensors [U, k, ...] or [U, ...].

    Raises:
        Untied: a tensor has neither number of rows, or none has k U.
    """
    if not any(isinstance(leaf, Tensor) and leaf.shape[:1] == (size * unit_rows,) for leaf in batch.values()):
        raise Untied
    return {name: _as_units(leaf, size, unit_rows) for name, leaf in batch.items()}


def _as_units(leaf: Leaf, size: int, unit_rows: int) -> Leaf:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.dim() and len(leaf) == size * unit_rows:
        return torch.stack(leaf.split(size), 1)
    if leaf.dim() and len(leaf) == size:
        return leaf
    raise Untied


def as_rows(batch: Batch) -> Batch:
    """Tensors [U, k, ...] -> [U k, ...], unit by unit, as a model takes them; those of one number a unit, [U], stay."""
    return {
        name: leaf.flatten(0, 1) if isinstance(leaf, Tensor) and leaf.dim() > 1 else leaf
        for name, leaf in batch.items()
    }


def folded(factor: Factor, unit_rows: int) -> Factor:
    """The factor of U k rows, unit by unit, as one of U units."""
    if unit_rows == 1:
        return factor
    if isinstance(factor, Dense):
        return Dense(factor.gradient.unflatten(0, (-1, unit_rows)).sum(1))
    if isinstance(factor, Outer):
        return Outer(_joined(factor.inputs, unit_rows), _joined(factor.grads, unit_rows))
    return Rows(_joined(factor.rows, unit_rows), _joined(factor.grads, unit_rows), factor.num_rows)


def _joined(x: Tensor, unit_rows: int) -> Tensor:
    """[U k, T, ...] -> [U, k T, ...]."""
    return x.reshape(len(x) // unit_rows, -1, *x.shape[2:])
