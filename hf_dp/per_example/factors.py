"""Per-example gradients of one parameter, dense or factored -> their weighted sums. Pure mathematics.

Legend: B examples, T positions, d inputs, r outputs, V rows of a table. A gradient *per example* has the shape
[B, *parameter]. It is kept in one of three forms:

    Dense    [B, *shape]                      the gradients themselves
    Outer    x [B, T, d], g [B, T, r]         G_b = g_b^T x_b, shape [r, d]       (a linear map used at T positions)
    Rows     index [B, T], g [B, T, d]        G_b[v] = sum of g_b[t] over index_b[t] = v   (a lookup in a table)

The norm of an Outer can be computed without forming the gradient (see `norms`):

    |G_b|^2 = sum_{s,t} (x_s . x_t) (g_s . g_t)     (Goodfellow 2015, eq. 1 for T = 1; Li et al. 2021, section 4.1)

Once the weights c_b are known, sum_b c_b G_b is one matrix product ("book-keeping", Bu et al. 2023). Sums are formed in
float32, or in float64 if the inputs are float64 or if an example's terms cancel.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 25  # largest temporary, in elements (128 MiB of float32)


class Stack:
    """Room for the gradients of m parameters of one shape, [m, B, r, d], of which `used` are there (see `stacks`)."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers, self.used = numbers, 0


class Dense(NamedTuple):
    """Materialised per-example gradients, [B, *shape]; where they lie in a stack, which one and where."""

    gradient: Tensor
    stack: Stack | None = None
    place: int = 0


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


def wide(x: Tensor) -> torch.dtype:
    """The dtype in which numbers of x are added up: float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def exact(x: Tensor) -> Tensor:
    """x in float32 or better: lower precisions are widened, float64 stays."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def in_rows(gradient: Tensor) -> Tensor:
    """[B, *shape] -> [B, n], in float32 or better; a single number has n = 1."""
    return exact(gradient.flatten(1) if gradient.dim() > 1 else gradient.unsqueeze(1))


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
    """Several uses of one parameter -> at most one factor of each form, which together stand for their sum."""
    dense = [f for f in factors if isinstance(f, Dense)]
    outer = [f for f in factors if isinstance(f, Outer)]
    rows = [f for f in factors if isinstance(f, Rows)]
    merged: list[Factor] = []
    if dense:
        merged.append(
            dense[0]
            if len(dense) == 1
            else Dense(torch.stack([in_rows(f.gradient) for f in dense]).sum(0).view_as(dense[0].gradient))
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


def add_weighted_sum(
    factors: Sequence[Factor], weights: Tensor, into: Tensor, in_float64_too: Sequence[int] = ()
) -> None:
    """into += sum_b weights_b G_b, in place.

    Args:
        factors: stand for G_b, [B, *shape].
        weights: [B].
        into: [*shape], float32 or better.
        in_float64_too: examples whose terms cancel. Their gradients are formed in float64 and rounded once: in float32
            the products over an Outer's T positions may be off by (T + 1) 2**-24 times the size of their terms (for the
            other examples that size is at most 64 |G|, see `norms`).
    """
    for example in in_float64_too:
        for rows, block in in_float64(factors, example):
            matrix = into.view(matrix_shape(factors))
            matrix[rows] += (block * weights[example]).to(into.dtype)
    if in_float64_too:
        weights = weights.index_fill(0, torch.tensor(in_float64_too, device=weights.device), 0.0)
    weights = toward_zero(weights, into.dtype)
    for factor in factors:
        if isinstance(factor, Dense):
            flat = in_rows(factor.gradient).to(into.dtype)
            into.view(-1).addmv_(flat.t(), weights)
        elif isinstance(factor, Outer):
            _add_outer(factor, weights, into)
        else:
            scaled = exact(factor.grads) * weights.view(-1, 1, 1)
            into.index_add_(0, factor.rows.reshape(-1), scaled.flatten(0, 1).to(into.dtype))


def toward_zero(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights (0 or more) in another precision, none of them greater than before."""
    rounded = weights.to(dtype)
    return torch.where(rounded > weights, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)


def matrix_shape(factors: Sequence[Factor]) -> tuple[int, int]:
    """(r, d) of the gradient of a parameter with at least one Outer or Rows."""
    for factor in factors:
        if isinstance(factor, Outer):
            return factor.grads.shape[-1], factor.inputs.shape[-1]
        if isinstance(factor, Rows):
            return factor.num_rows, factor.grads.shape[-1]
    raise AssertionError("gradients that are all dense have no terms that cancel")


def in_float64(factors: Sequence[Factor], example: int) -> Iterator[tuple[slice, Tensor]]:
    """One example's gradient as a matrix in float64, a few rows at a time: yields (which rows, [rows, d])."""
    r, d = matrix_shape(factors)
    for rows in chunks(r, max(1, CHUNK_ELEMENTS // 8 // d)):
        block = torch.zeros(rows.stop - rows.start, d, dtype=torch.float64, device=_device(factors[0]))
        for factor in factors:
            if isinstance(factor, Dense):
                block += factor.gradient[example].reshape(r, d)[rows]
            elif isinstance(factor, Outer):
                block.addmm_(factor.grads[example][:, rows].double().t(), factor.inputs[example].double())
            else:
                here = (factor.rows[example] >= rows.start) & (factor.rows[example] < rows.stop)
                index = factor.rows[example][here] - rows.start
                block.index_add_(0, index, factor.grads[example][here].double())
        yield rows, block


def _device(factor: Factor) -> torch.device:
    return factor.gradient.device if isinstance(factor, Dense) else factor.grads.device


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
    for rows in chunks(batch, step):
        scaled = exact(factor.grads[rows]) * weights[rows].view(-1, 1, 1)
        matrix = into.view(factor.grads.shape[-1], width)  # a convolution's kernel has more dimensions
        matrix.addmm_(scaled.flatten(0, 1).t().to(into.dtype), exact(factor.inputs[rows]).flatten(0, 1).to(into.dtype))


def chunks(total: int, step: int) -> Iterator[slice]:
    """Slices of `step` that make up range(total); one empty slice for 0."""
    return (slice(start, min(start + step, total)) for start in range(0, max(total, 1), step))
