"""Factors of per-example gradients -> an upper bound of each example's squared norm, which clipping relies on.

Legend as in `factors`. Also: n numbers in a gradient; u = 2**-53, the unit roundoff of float64; v, the unit roundoff of
the factors themselves (2**-24 in float32).

**Claim.** Let G_b be example b's gradient, that is what its factors stand for, in exact arithmetic on the numbers that
they hold. Then `squared_norms` gives at least |G_b|^2, whatever the numbers are and in whatever order sums are formed;
or it gives NaN or infinity, and `clipping` drops the example. The root of the bound exceeds |G_b| by at most 1e-5,
relatively, except where the terms of G_b cancel to a millionth of their size, or where the gradient is so small that
squares underflow: there the bound still holds, and is far below any C.

**Size of the terms.** M bounds what a factor's terms would add up to if none cancelled:

    Dense  M   = |G|
    Outer  M   = sum_t |x_t| |g_t|
    Rows   M^2 = sum_v (sum of |g_t| over index_t = v)^2

For a sum of several factors, M is the sum of theirs. |G| <= M. For two factors A and B, the products whose sum is
<A, B> have absolute values that add up to at most M_A M_B (Cauchy-Schwarz, for each position or each row).

**Proof.** A sum of k products computed in any order has an error of at most gamma_k = k u / (1 - k u) times the sum of
the products' absolute values (Higham 2002, section 3.1). float32 numbers become float64 numbers exactly. For nested
sums, the lengths add up.

1. *Dense.* Blocks of at most 128 are summed in the gradient's own precision, then float64 adds up the k blocks. All
   terms are positive: relatively, the true square exceeds the computed one by at most (128 + 16) v + 2 k u. Each square
   that underflows adds at most twice the smallest normal number. Where m parameters are in one tensor, n and k are
   those of all of them: a sum of positive terms, whosever they are.
2. *Gram*, |G|^2 = sum_st (x_s . x_t) (g_s . g_t): nested sums of lengths d, r, T and T, so the error is at most
   gamma_(d + r + 2T) M^2.
3. *Product* and *Rows*: G itself is formed with an error of norm at most gamma_T M. So its square has an error of at
   most gamma_T M (2 + gamma_T) M, and the sum of squares adds gamma_k |G|^2.
4. *Cross terms* are sums no longer than those of their two factors together: gamma_k M_A M_B.

Let k be the lengths of all sums together. The float64 part of the error is at most 2 k u M^2. (The factor 2 over
gamma_k's k u covers the rounding of M and of these few lines, as k u < 0.01.) It is added to the computed square.

Where the terms cancel, M > 64 |G|, this bound may be loose. For those examples and parameters G is formed in float64, a
few rows at a time (`factors.in_float64`), and (|G| + 2 k u M)^2 is taken instead, which is never too small. A computed
square below zero needs no case of its own: it is one where the terms cancel.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from hf_dp.per_example import factors as fx
from hf_dp.per_example.factors import Dense, Factor, Outer, Rows, chunks

BLOCK = 128  # numbers added up in the factors' own precision before float64 takes over
CANCELS = 64.0  # an example's terms cancel where their size is above this many times its norm
UNIT = 2.0**-53


class Measured(NamedTuple):
    """The norms of a pass.

    Attributes:
        squares: at least |G_b|^2 over all parameters together, [B], float64. NaN or infinite if there is no bound.
        cancelling: parameter -> the examples whose terms cancel there; their sum has to be formed in float64, as their
            norm was.
    """

    squares: Tensor
    cancelling: dict[str, list[int]]


class Bound(NamedTuple):
    """|G_b|^2 of one parameter, [B] each, float64: |square - |G_b|^2| <= error, and `terms` is M.

    Attributes:
        length: k, the lengths of all sums together.
    """

    square: Tensor
    error: Tensor
    terms: Tensor
    length: int


def squared_norms(factors: Mapping[str, Sequence[Factor]], stacks: Sequence[Tensor] = ()) -> Measured:
    """Upper bounds of |G_b|^2 over all parameters, of which there is at least one.

    Args:
        factors: by parameter, each as from `factors.merge`.
        stacks: [m, B, n], the gradients of m further parameters each.
    """
    bounds = {name: bound(uses) for name, uses in factors.items()}
    measured = [*bounds.values(), *map(_dense, stacks)]
    squares = torch.stack([b.square + b.error for b in measured])  # [parameters and stacks, B]
    terms = torch.stack([b.terms for b in measured])
    cancels = terms > CANCELS * squares.sum(0).clamp_min(0.0).sqrt()  # False where it is NaN
    cancelling: dict[str, list[int]] = {}
    if any(not isinstance(f, Dense) for uses in factors.values() for f in uses):
        for number, example in (cancels & squares.sum(0).isfinite()).nonzero().tolist():
            name = list(bounds)[number]
            cancelling.setdefault(name, []).append(example)
            squares[number, example] = square_in_float64(factors[name], example, bounds[name])
    return Measured(squares.sum(0) * (1 + 4 * (len(measured) + 8) * UNIT), cancelling)


def bound(factors: Sequence[Factor]) -> Bound:
    """|sum of factors|^2 for each example by the cheapest form, with its error."""
    parts = [_measured(f) for f in factors]
    if len(parts) == 1 and isinstance(factors[0], Dense):
        return parts[0]
    square, error, terms = (torch.stack(column).sum(0) for column in list(zip(*parts, strict=True))[:3])
    for a, b in combinations(factors, 2):
        square = square + 2.0 * _inner(a, b)
    length = sum(p.length for p in parts) + 8
    return Bound(square, error + 2 * length * UNIT * terms.square(), terms, length)


def square_in_float64(factors: Sequence[Factor], example: int, rough: Bound) -> Tensor:
    """The upper bound for one example, from its gradient in float64; a number."""
    blocks = [(block.square().sum(), block.numel()) for _, block in fx.in_float64(factors, example)]
    square = torch.stack([s for s, _ in blocks]).sum() * (1 + 2 * (sum(n for _, n in blocks) + 8) * UNIT)
    return (square.sqrt() + 2 * rough.length * UNIT * rough.terms[example]).square()


def gram_is_cheaper(factor: Outer) -> bool:
    """Compares T^2 (d + r) with T d r multiply-adds, for one example."""
    _, positions, d = factor.inputs.shape
    r = factor.grads.shape[-1]
    return positions * (d + r) < d * r


def by_gram(factor: Outer) -> Bound:
    """|G_b|^2 = <x_b x_b^T, g_b g_b^T>."""
    batch, positions, d = factor.inputs.shape
    squares, terms = [], []
    for rows in chunks(batch, max(1, _room() // max(1, positions * positions))):
        x, g = _gram(factor.inputs[rows]), _gram(factor.grads[rows])
        squares.append((x * g).sum(2).sum(1))
        terms.append((x.diagonal(0, 1, 2) * g.diagonal(0, 1, 2)).sqrt().sum(1))
    return _formed_in_float64(torch.cat(squares), torch.cat(terms), d + factor.grads.shape[-1] + 2 * positions)


def by_product(factor: Outer) -> Bound:
    """|g_b^T x_b|^2 by forming the product for a few examples at a time."""
    batch, positions, d = factor.inputs.shape
    r = factor.grads.shape[-1]
    squares, terms = [], []
    for rows in chunks(batch, max(1, _room() // max(1, d * r + positions * (d + r)))):
        x, g = factor.inputs[rows].double(), factor.grads[rows].double()
        squares.append(torch.bmm(g.transpose(1, 2), x).square_().sum(2).sum(1))
        terms.append((_lengths(x) * _lengths(g)).sum(1))
    return _formed_in_float64(torch.cat(squares), torch.cat(terms), 3 * positions + d + r)


def _measured(factor: Factor) -> Bound:
    if isinstance(factor, Dense):
        return _dense(fx.in_rows(factor.gradient).unsqueeze(0))
    if isinstance(factor, Rows):
        return _rows(factor)
    return by_gram(factor) if gram_is_cheaper(factor) else by_product(factor)


def _dense(stack: Tensor) -> Bound:
    """The sum of squares of [m, B, n] over m and n, by blocks of n."""
    count, _, numbers = stack.shape
    precision = torch.finfo(stack.dtype)
    whole = numbers // BLOCK * BLOCK
    blocks = torch.linalg.vector_norm(stack[..., :whole].unflatten(2, (-1, BLOCK)), dim=3)
    square = blocks.double().square_().sum((0, 2))
    if whole < numbers:
        square = square + torch.linalg.vector_norm(stack[..., whole:], dim=2).double().square_().sum(0)
    length, total = count * -(-numbers // BLOCK), count * numbers
    error = square * ((BLOCK + 16) * precision.eps / 2 + 2 * length * UNIT) + 2 * total * precision.tiny
    return Bound(square, error, (square + error).sqrt(), 0)  # in a cross term, its sums are no longer than the other's


def _rows(factor: Rows) -> Bound:
    """A row looked up twice is added up before it is squared: all its lookups are gathered at its first position."""
    batch, positions, width = factor.grads.shape
    squares, terms = [], []
    for rows in chunks(batch, max(1, _room() // max(1, positions * (positions + 2 * width)))):
        index, grads = factor.rows[rows], factor.grads[rows].double()
        first = (index.unsqueeze(2) == index.unsqueeze(1)).int().argmax(2)  # [b, T]
        summed = torch.zeros_like(grads).scatter_add_(1, first.unsqueeze(-1).expand_as(grads), grads)
        squares.append(summed.square_().sum(2).sum(1))
        lengths = _lengths(grads)
        terms.append(_lengths(torch.zeros_like(lengths).scatter_add_(1, first, lengths)))
    return _formed_in_float64(torch.cat(squares), torch.cat(terms), 4 * positions + width)


def _formed_in_float64(square: Tensor, terms: Tensor, length: int) -> Bound:
    """Without an error of its own: `bound` adds that of all float64 sums at once."""
    return Bound(square, torch.zeros_like(square), terms, length)


def _lengths(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)


def _gram(x: Tensor) -> Tensor:
    """x x^T of [b, T, d] in float64, [b, T, T], a few features at a time."""
    batch, positions, features = x.shape
    width = max(1, _room() // max(1, batch * positions))
    total = x.new_zeros(batch, positions, positions, dtype=torch.float64)
    piece = x.new_empty(batch, positions, min(width, features), dtype=torch.float64)
    for columns in chunks(features, width):
        wide = piece[:, :, : columns.stop - columns.start].copy_(x[:, :, columns])
        total.baddbmm_(wide, wide.transpose(1, 2))
    return total


def _inner(a: Factor, b: Factor) -> Tensor:
    """<G_a, G_b> for each example, [B], for two factors of different kinds (as `factors.merge` leaves them)."""
    if isinstance(b, Dense) or (isinstance(b, Rows) and isinstance(a, Outer)):
        a, b = b, a  # Dense before Rows before Outer
    batch = len(b.grads) if not isinstance(b, Dense) else 0
    numbers = sum(x.numel() for factor in (a, b) for x in factor if isinstance(x, Tensor))
    step = max(1, _room() * batch // max(1, 2 * numbers))
    return torch.cat([_inner_in_float64(_part(a, rows), _part(b, rows)) for rows in chunks(batch, step)])


def _part(factor: Factor, rows: slice) -> Factor:
    if isinstance(factor, Dense):
        return Dense(factor.gradient[rows].double())
    if isinstance(factor, Outer):
        return Outer(factor.inputs[rows].double(), factor.grads[rows])
    return Rows(factor.rows[rows], factor.grads[rows].double(), factor.num_rows)


def _inner_in_float64(a: Factor, b: Factor) -> Tensor:
    if isinstance(a, Rows):
        # a tied table: sum_{t,s} (e_t . x_s) g_s[index_t], with e the lookup's gradients and (x, g) the head's
        assert isinstance(b, Outer)
        dots = torch.bmm(a.grads, b.inputs.transpose(1, 2))  # [B, T, S]
        index = a.rows.unsqueeze(1).expand(-1, b.grads.shape[1], -1)  # [B, S, T]
        return (dots * b.grads.gather(2, index).transpose(1, 2)).sum(2).sum(1)
    assert isinstance(a, Dense)
    if isinstance(b, Outer):  # sum_t g_t^T D x_t
        matrices = a.gradient.reshape(len(b.grads), b.grads.shape[-1], b.inputs.shape[-1])
        return (torch.bmm(b.inputs, matrices.transpose(1, 2)) * b.grads).sum(2).sum(1)
    assert isinstance(b, Rows)
    picked = a.gradient.gather(1, b.rows.unsqueeze(-1).expand_as(b.grads))
    return (picked * b.grads).sum(2).sum(1)


def _room() -> int:
    """The largest temporary in float64, in elements, besides one example's own."""
    return max(1, fx.CHUNK_ELEMENTS // 8)
