"""Per-example gradients of one parameter, dense or factored -> squared norms and weighted sums. Pure mathematics.

Legend: B examples, T positions, d inputs, r outputs, V rows of a table. A gradient *per example* has shape [B, *parameter].

    Dense    [B, *shape]                      the gradients themselves
    Outer    x [B, T, d], g [B, T, r]         G_b = g_b^T x_b, shape [r, d]       (a linear map used at T positions)
    Rows     index [B, T], g [B, T, d]        G_b[v] = sum of g_b[t] with index_b[t] = v   (a lookup in a table)

The norm of an Outer needs no gradient: |G_b|^2 = sum_{s,t} (x_s . x_t)(g_s . g_t)  (Goodfellow 2015, eq. 1 for T = 1; Li et al. 2021,
section 4.1 for T > 1). Once the weights c_b are known, sum_b c_b G_b is one matrix product (book-keeping, Bu et al. 2023).
Everything here computes in float32, or in float64 where the inputs are.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 25  # largest temporary, in elements (128 MiB of float32)


class Dense(NamedTuple):
    """Materialised per-example gradients, [B, *shape]."""

    gradient: Tensor


class Outer(NamedTuple):
    """Inputs [B, T, d] and output gradients [B, T, r] of a linear map; stands for [B, r, d]."""

    inputs: Tensor
    grads: Tensor


class Rows(NamedTuple):
    """Looked-up rows [B, T] and their output gradients [B, T, d]; stands for [B, num_rows, d]."""

    rows: Tensor
    grads: Tensor
    num_rows: int


Factor: TypeAlias = Dense | Outer | Rows


def exact(x: Tensor) -> Tensor:
    """float32 or better: lower precisions are widened, float64 stays."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def per_example_product(grads: Tensor, inputs: Tensor) -> Tensor:
    """[B, T, r], [B, T, d] -> [B, r, d], accumulated and returned in float32 or better."""
    return torch.bmm(exact(grads).transpose(1, 2), exact(inputs))


def materialise(factor: Factor) -> Tensor:
    """The per-example gradients that a factor stands for: [B, r, d], [B, V, d] or [B, *shape]."""
    if isinstance(factor, Dense):
        return factor.gradient
    if isinstance(factor, Outer):
        return per_example_product(factor.grads, factor.inputs)
    batch, positions, width = factor.grads.shape
    out = exact(factor.grads).new_zeros(batch, factor.num_rows, width)
    return out.scatter_add_(1, factor.rows.unsqueeze(-1).expand(batch, positions, width), exact(factor.grads))


def merge(factors: Sequence[Factor]) -> list[Factor]:
    """Several uses of one parameter -> at most one factor of each kind, standing for the sum of them all."""
    dense = [f for f in factors if isinstance(f, Dense)]
    outer = [f for f in factors if isinstance(f, Outer)]
    rows = [f for f in factors if isinstance(f, Rows)]
    merged: list[Factor] = []
    if dense:
        merged.append(
            dense[0]
            if len(dense) == 1
            else Dense(torch.stack([f.gradient.flatten(1) for f in dense]).sum(0).view_as(dense[0].gradient))
        )
    if outer:
        one = len(outer) == 1
        merged.append(
            outer[0] if one else Outer(torch.cat([f.inputs for f in outer], 1), torch.cat([f.grads for f in outer], 1))
        )
    if rows:
        index, grads = torch.cat([f.rows for f in rows], 1), torch.cat([f.grads for f in rows], 1)
        merged.append(Rows(index, grads, rows[0].num_rows))
    return merged


def squared_norms(factors: Sequence[Factor]) -> Tensor:
    """|sum of factors|^2 for each example, [B]; `factors` as `merge` returns them (one of a kind)."""
    first, *rest = map(_squared_norm, factors)
    total = sum(rest, first)
    for a, b in combinations(factors, 2):
        total = total + 2.0 * _inner(a, b)
    return total


def add_weighted_sum(factors: Sequence[Factor], weights: Tensor, into: Tensor) -> None:
    """into += sum_b weights_b G_b, in place. `weights` [B]; `into` has the parameter's shape, float32 or better."""
    for factor in factors:
        if isinstance(factor, Dense):
            flat = exact(factor.gradient).flatten(1).to(into.dtype)
            into.view(-1).addmv_(flat.t(), weights.to(into.dtype))
        elif isinstance(factor, Outer):
            _add_outer(factor, weights, into)
        else:
            scaled = exact(factor.grads) * weights.view(-1, 1, 1)
            into.index_add_(0, factor.rows.reshape(-1), scaled.flatten(0, 1).to(into.dtype))


def without_examples(factors: Sequence[Factor], keep: Tensor) -> list[Factor]:
    """The same factors with every example where `keep` [B] is False set to exactly zero, NaN and infinity included."""

    def zero(x: Tensor) -> Tensor:
        return torch.where(keep.view(-1, *[1] * (x.dim() - 1)), x, x.new_zeros(()))

    return [
        Dense(zero(f.gradient))
        if isinstance(f, Dense)
        else Outer(zero(f.inputs), zero(f.grads))
        if isinstance(f, Outer)
        else Rows(f.rows, zero(f.grads), f.num_rows)
        for f in factors
    ]


def _add_outer(factor: Outer, weights: Tensor, into: Tensor) -> None:
    """Into [r, d] += (c g)^T x over all B T positions, a bounded number of positions at a time."""
    batch, positions, width = factor.inputs.shape
    step = max(1, CHUNK_ELEMENTS // max(1, positions * (width + factor.grads.shape[-1])))
    for rows in _chunks(batch, step):
        scaled = exact(factor.grads[rows]) * weights[rows].view(-1, 1, 1)
        matrix = into.view(factor.grads.shape[-1], width)  # a convolution's kernel has more dimensions
        matrix.addmm_(scaled.flatten(0, 1).t().to(into.dtype), exact(factor.inputs[rows]).flatten(0, 1).to(into.dtype))


def _squared_norm(factor: Factor) -> Tensor:
    if isinstance(factor, Dense):
        return torch.linalg.vector_norm(exact(factor.gradient).flatten(1), dim=1).square()
    if isinstance(factor, Rows):
        return _rows_squared_norm(factor)
    return gram_squared_norm(factor) if gram_is_cheaper(factor) else product_squared_norm(factor)


def gram_is_cheaper(factor: Outer) -> bool:
    """T^2 (d + r) against T d r multiply-adds, for one example."""
    _, positions, d = factor.inputs.shape
    r = factor.grads.shape[-1]
    return positions * (d + r) < d * r


def gram_squared_norm(factor: Outer) -> Tensor:
    """|G_b|^2 = <x_b x_b^T, g_b g_b^T>, [B]; never below zero, whatever the rounding."""
    batch, positions, _ = factor.inputs.shape
    parts = []
    for rows in _chunks(batch, max(1, CHUNK_ELEMENTS // max(1, 2 * positions * positions))):
        x, g = exact(factor.inputs[rows]), exact(factor.grads[rows])
        parts.append((torch.bmm(x, x.transpose(1, 2)) * torch.bmm(g, g.transpose(1, 2))).sum((1, 2)))
    return torch.cat(parts).clamp_min(0.0)


def product_squared_norm(factor: Outer) -> Tensor:
    """|g_b^T x_b|^2 by forming the product for a few examples at a time, [B]."""
    batch, _, d = factor.inputs.shape
    r = factor.grads.shape[-1]
    parts = []
    for rows in _chunks(batch, max(1, CHUNK_ELEMENTS // max(1, d * r))):
        product = per_example_product(factor.grads[rows], factor.inputs[rows])
        parts.append(torch.linalg.vector_norm(product.flatten(1), dim=1).square())
    return torch.cat(parts)


def _rows_squared_norm(factor: Rows) -> Tensor:
    """Rows looked up twice add up before they are squared: gather each row at its first position, [B]."""
    batch, positions, width = factor.grads.shape
    first = (factor.rows.unsqueeze(2) == factor.rows.unsqueeze(1)).int().argmax(2)  # [B, T]
    summed = exact(factor.grads).new_zeros(batch, positions, width)
    summed.scatter_add_(1, first.unsqueeze(-1).expand(batch, positions, width), exact(factor.grads))
    return torch.linalg.vector_norm(summed.flatten(1), dim=1).square()


def _inner(a: Factor, b: Factor) -> Tensor:
    """<G_a, G_b> for each example, [B], for two factors of different kinds (as `merge` leaves them)."""
    if isinstance(b, Dense):
        a, b = b, a
    if isinstance(b, Outer):
        if isinstance(a, Dense):  # sum_t g_t^T D x_t
            matrices = exact(a.gradient).reshape(len(a.gradient), b.grads.shape[-1], b.inputs.shape[-1])
            mapped = torch.bmm(exact(b.inputs), matrices.transpose(1, 2))
            return (mapped * exact(b.grads)).sum((1, 2))
        assert isinstance(a, Rows)
        return _rows_outer_inner(a, b)
    assert isinstance(b, Rows)
    if isinstance(a, Outer):
        return _rows_outer_inner(b, a)
    assert isinstance(a, Dense)
    picked = exact(a.gradient).gather(1, b.rows.unsqueeze(-1).expand_as(b.grads))
    return (picked * exact(b.grads)).sum((1, 2))


def _rows_outer_inner(rows: Rows, outer: Outer) -> Tensor:
    """Tied table: sum_{t,s} (e_t . x_s) g_s[index_t], e the lookup's gradients and (x, g) the head's, [B]."""
    dots = torch.bmm(exact(rows.grads), exact(outer.inputs).transpose(1, 2))  # [B, T, S]
    index = rows.rows.unsqueeze(1).expand(-1, outer.grads.shape[1], -1)  # [B, S, T]
    picked = exact(outer.grads.gather(2, index)).transpose(1, 2)
    return (dots * picked).sum((1, 2))


def _chunks(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, max(total, 1), step))
