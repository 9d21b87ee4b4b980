"""Materialised gradients of a pass, written side by side -> norms and weighted sums of many parameters at once.

A sheet is [B, n]: a row an example, and the numbers of one parameter after the other. A sum of squares over a row is
that over all its parameters, and a weighted sum over the rows is that of each. So what took some operations a parameter
takes some a sheet, exactly as if the parameters of a sheet were one. Products are written into a sheet at once;
other gradients are copied into one if they are small.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_dp.per_example.factors import CHUNK_ELEMENTS, Dense, Factor, Outer, Sheet, exact, per_example_product, toward_zero, wide

SMALL = 1 << 18  # numbers: below that, copying a gradient takes less time than some operations on it do


class Sheets:
    """The sheets of a pass under way.

    Args:
        numbers: how many numbers are trained; no room is taken for more.
    """

    def __init__(self, numbers: int) -> None:
        self._left = numbers
        self._open: dict[tuple[torch.dtype, torch.device], Sheet] = {}

    def product(self, factor: Outer) -> Dense:
        """The gradients that a linear map's factor stands for, [B, r, d], in a sheet."""
        r, d = factor.grads.shape[-1], factor.inputs.shape[-1]
        sheet = self._with_room_for(r * d, factor.grads)
        start, sheet.used = sheet.used, sheet.used + r * d
        self._left -= r * d
        out = sheet.numbers[:, start : sheet.used].unflatten(1, (r, d))
        return Dense(per_example_product(factor.grads, factor.inputs, out), sheet, start)

    def _with_room_for(self, count: int, like: Tensor) -> Sheet:
        kind = wide(like), like.device
        sheet = self._open.get(kind)
        if sheet is None or sheet.used + count > sheet.numbers.shape[1]:
            width = max(count, min(CHUNK_ELEMENTS // len(like), self._left))
            sheet = self._open[kind] = Sheet(torch.empty(len(like), width, dtype=kind[0], device=kind[1]))
        return sheet


class Joined(NamedTuple):
    """Gradients of several parameters, [B, n], in the order of their names."""

    names: tuple[str, ...]
    gradients: Tensor


def joined(factors: Mapping[str, Sequence[Factor]]) -> list[Joined]:
    """The parameters whose gradients lie, or can be laid, side by side.

    Left out are those that are factored, those too large to copy, and those of a sheet of which others are used twice.
    """
    dense = {name: uses[0] for name, uses in factors.items() if len(uses) == 1 and isinstance(uses[0], Dense)}
    written: dict[int, list[str]] = {}
    small: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, factor in dense.items():
        if factor.sheet is not None:
            written.setdefault(id(factor.sheet), []).append(name)
        elif factor.gradient.numel() <= SMALL:
            small.setdefault((wide(factor.gradient), factor.gradient.device), []).append(name)
    found = [_as_written({n: dense[n] for n in names}) for names in written.values()]
    return [*filter(None, found), *(_copied({n: dense[n] for n in names}) for names in small.values() if len(names) > 1)]


def _as_written(dense: Mapping[str, Dense]) -> Joined | None:
    """The part of a sheet that these fill from its beginning without gaps; None if there are gaps."""
    names = sorted(dense, key=lambda name: dense[name].start)
    sheet, used = dense[names[0]].sheet, sum(dense[name].gradient[0].numel() for name in names)
    last = dense[names[-1]]
    assert sheet is not None
    if last.start + last.gradient[0].numel() != used:
        return None
    return Joined(tuple(names), sheet.numbers[:, :used])


def _copied(dense: Mapping[str, Dense]) -> Joined:
    return Joined(tuple(dense), torch.cat([exact(f.gradient).flatten(1) for f in dense.values()], 1))


def add_weighted_sums(gradients: Tensor, weights: Tensor, into: Sequence[Tensor]) -> None:
    """into += sum_b weights_b G_b for each parameter of a block, in place.

    Args:
        gradients: G_b, [B, n], as in `Joined`.
        weights: [B].
        into: for each of its names, of the parameter's shape, float32 or better.
    """
    dtype = max((total.dtype for total in into), key=lambda d: d.itemsize)
    sums = torch.mv(gradients.to(dtype).t(), toward_zero(weights, dtype))
    torch._foreach_add_(into, torch._C._nn.unflatten_dense_tensors(sums, into))
