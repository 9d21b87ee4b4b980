"""Materialised gradients of a pass, those of one shape in one tensor -> norms and sums of many parameters at once.

A stack is [m, B, n]: m parameters of n numbers each. A sum of squares over m and n is that over all its parameters, and
a weighted sum over B is that of each. So what took some operations a parameter takes some a stack. Products are written
into a stack when they are formed; other gradients are copied into one if they are small.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_dp.per_example.factors import Dense, Factor, Outer, Stack, exact, in_rows, toward_zero, wide

ROOM = 1 << 24  # largest stack, in numbers (64 MiB of float32): it is taken when its first gradient comes
ROOM_ON_CPU = 1 << 21  # there, the system hands out larger blocks as fresh pages in each pass, and takes them back
SMALL = 1 << 18  # numbers: below that, to copy a gradient takes less time than some more operations do


class Stacks:
    """The stacks of a pass under way.

    Args:
        shapes: of the parameters that are trained, and how many there are of each; no room is taken for more.
    """

    def __init__(self, shapes: Mapping[torch.Size, int]) -> None:
        self._left = Counter(shapes)
        self._open: dict[tuple[int, int, torch.dtype, torch.device], Stack] = {}

    def product(self, factor: Outer, scale: float) -> Dense:
        """`scale` times the gradients that a linear map's factor stands for, [B, r, d], in a stack."""
        g, x = exact(factor.grads), exact(factor.inputs)
        batch, _, r = g.shape
        d = x.shape[-1]
        kind = r, d, g.dtype, g.device
        stack = self._open.get(kind)
        if stack is None or stack.used == len(stack.numbers):
            most = ROOM_ON_CPU if g.device.type == "cpu" else ROOM
            room = max(1, min(self._left[torch.Size((r, d))], most // max(1, batch * r * d)))
            self._left[torch.Size((r, d))] -= room
            stack = self._open[kind] = Stack(torch.empty(room, batch, r, d, dtype=g.dtype, device=g.device))
        place, stack.used = stack.used, stack.used + 1
        return Dense(stack.numbers[place].baddbmm_(g.transpose(1, 2), x, beta=0, alpha=scale), stack, place)


class Joined(NamedTuple):
    """Gradients of parameters of one shape, [m, B, n], in the order of their names; or of several in one, [1, B, n]."""

    names: tuple[str, ...]
    gradients: Tensor

    def without_examples(self, keep: Tensor) -> "Joined":
        """As `factors.without_examples`."""
        return Joined(self.names, torch.where(keep.view(1, -1, 1), self.gradients, self.gradients.new_zeros(())))


def joined(factors: Mapping[str, Sequence[Factor]]) -> list[Joined]:
    """The parameters whose gradients lie, or can be laid, in one tensor.

    Left out are those that are factored, those too large to copy, and a stack of which one was used twice.
    """
    dense = {name: uses[0] for name, uses in factors.items() if len(uses) == 1 and isinstance(uses[0], Dense)}
    stacks: dict[int, list[str]] = {}
    small: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, factor in dense.items():
        if factor.stack is not None:
            stacks.setdefault(id(factor.stack), []).append(name)
        elif factor.gradient.numel() <= SMALL:
            small.setdefault((wide(factor.gradient), factor.gradient.device), []).append(name)
    found = [_as_written({n: dense[n] for n in names}) for names in stacks.values()]
    return [
        *filter(None, found),
        *(_copied({n: dense[n] for n in names}) for names in small.values() if len(names) > 1),
    ]


def _as_written(dense: Mapping[str, Dense]) -> Joined | None:
    """A stack of which these fill all places that are used; None if there are gaps."""
    names = sorted(dense, key=lambda name: dense[name].place)
    stack = dense[names[0]].stack
    assert stack is not None
    return Joined(tuple(names), stack.numbers[: len(names)].flatten(2)) if stack.used == len(names) else None


def _copied(dense: Mapping[str, Dense]) -> Joined:
    return Joined(tuple(dense), torch.cat([in_rows(f.gradient) for f in dense.values()], 1).unsqueeze(0))


def add_weighted_sums(block: Joined, weights: Tensor, into: Mapping[str, Tensor]) -> None:
    """into += sum_b weights_b G_b for each parameter of the block, in place.

    Args:
        block: stands for G_b.
        weights: [B].
        into: parameter name -> sum, of the parameter's shape, float32 or better.
    """
    targets = [into[name] for name in block.names]
    dtype = max((total.dtype for total in targets), key=lambda d: d.itemsize)
    sums = torch.matmul(toward_zero(weights, dtype), block.gradients.to(dtype)).view(-1)
    torch._foreach_add_(targets, torch._C._nn.unflatten_dense_tensors(sums, targets))
