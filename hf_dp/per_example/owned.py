"""Units that own several examples, such as a person with their records: the mean of a unit's gradients, formed before
the norm and clipped once (user-level sampling: Charles et al. 2024, "Fine-Tuning Large Language Models with User-Level
Differential Privacy", DP-SGD-ULS).

Legend: E examples of a pass, U units; unit u owns n_u of the examples, which are neighbours. Its gradient is

    G_u = 1/n_u sum_{e of u} g_e,     and its loss the mean of theirs.

Each example is a function of its own record alone, as ever, so that passes, rules and proof are those of examples. What
a pass found of E examples is brought to U units in the form that it has (`of_units`):

    Dense  [E, *shape]              -> [U, *shape], the mean over a unit's examples
    Outer  [E, T, d], [E, T, r]     -> [U, m T, d], [U, m T, r] with m = max n_u and zeros where there is no example;
                                       the Gram form has the products across examples
    Rows   [E, T], [E, T, d]        -> [U, m T], [U, m T, d]

Numbers of two units never meet in an operation, so that one which is not finite stays with its unit. Norm and sum are
of the numbers that come out, whatever rounding they have.

A unit whose examples take several passes is summed up in a tensor of its own first (`UnitUnderWay`).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_dp.errors import CaptureError
from hf_dp.per_example.batches import Owned
from hf_dp.per_example.capture import Pass
from hf_dp.per_example.factors import Dense, Factor, Outer, Rows, Stack, add_weighted_sum, exact

Found = tuple[dict[str, list[Factor]], Tensor]  # what a pass finds: parameter name -> factors, and losses


def of_units(factors_of: Pass, counts: Sequence[int]) -> Pass:
    """A pass over sum(counts) examples that gives the factors and losses of len(counts) units; see above.

    Args:
        factors_of: does the pass over the examples.
        counts: n_u, 1 or more each.
    """

    def of_the_units(model: nn.Module, example_losses: Callable[[], Tensor], batch_size: int) -> Found:
        found, losses = factors_of(model, example_losses, batch_size)
        if sum(counts) != batch_size:
            raise CaptureError(f"units of {sum(counts)} examples in all were expected, got {batch_size} examples")
        means = _Means(counts, losses.device)
        return {name: [means.of_factor(f) for f in factors] for name, factors in found.items()}, means.of(losses)

    return of_the_units


class _Means:
    """The means over each unit's examples."""

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        self._counts = torch.tensor(counts, device=device)
        self._unit = torch.arange(len(counts), device=device).repeat_interleave(self._counts)  # [E]
        first = self._counts.cumsum(0) - self._counts
        self._place = torch.arange(len(self._unit), device=device) - first[self._unit]  # [E], among its unit's
        self._most = max(counts)
        self._stacks: dict[int, Stack] = {}

    def of(self, x: Tensor, dim: int = 0) -> Tensor:
        """[.., E, ..] -> [.., U, ..]."""
        x = exact(x)
        shape = [*x.shape[:dim], len(self._counts), *x.shape[dim + 1 :]]
        return x.new_zeros(shape).index_add_(dim, self._unit, x).div_(self._counts.view(-1, *[1] * (x.dim() - dim - 1)))

    def of_factor(self, factor: Factor) -> Factor:
        if isinstance(factor, Dense):
            if factor.stack is None:
                return Dense(self.of(factor.gradient))
            stack = self._of_stack(factor.stack)
            return Dense(stack.numbers[factor.place], stack, factor.place)
        if isinstance(factor, Outer):
            return Outer(self._side_by_side(factor.inputs), self._side_by_side(self._shares(factor.grads)))
        rows, grads = self._side_by_side(factor.rows), self._side_by_side(self._shares(factor.grads))
        return Rows(rows, grads, factor.num_rows)

    def _of_stack(self, stack: Stack) -> Stack:
        if id(stack) not in self._stacks:
            means = self._stacks[id(stack)] = Stack(self.of(stack.numbers[: stack.used], 1))
            means.used = stack.used
        return self._stacks[id(stack)]

    def _shares(self, x: Tensor) -> Tensor:
        return exact(x) / self._counts[self._unit].view(-1, *[1] * (x.dim() - 1))

    def _side_by_side(self, x: Tensor) -> Tensor:
        """[E, T, ...] -> [U, m T, ...], zeros where a unit has fewer than m examples."""
        out = x.new_zeros(len(self._counts), self._most, *x.shape[1:])
        out[self._unit, self._place] = x
        return out.flatten(1, 2)


class UnitUnderWay:
    """The mean gradient of one unit whose examples come in several passes.

    Args:
        shapes: parameter name -> a tensor of its shape, type and device.
    """

    def __init__(self, shapes: Mapping[str, Tensor]) -> None:
        self._sums = {name: torch.zeros_like(x) for name, x in shapes.items()}
        self._loss: Tensor | None = None
        self._seen = 0

    @property
    def is_begun(self) -> bool:
        """Whether examples of a unit are in it that is not whole yet."""
        return self._seen > 0

    def add(self, found: Found, owned: Owned) -> Found | None:
        """Adds the examples of one pass, all of one unit.

        Returns:
            If they are the last ones: the unit's gradient and loss as those of a pass over one example; it lasts until
            the next call. Else None.

        Raises:
            CaptureError: they are not all of the unit's, or another unit's examples are in it.
        """
        factors, losses = found
        if not self._seen:
            self.forget()
        for name, uses in factors.items():
            add_weighted_sum(uses, torch.full_like(losses, 1 / owned.of, dtype=torch.float64), self._sums[name])
        self._loss = losses.sum() / owned.of + (0.0 if self._loss is None else self._loss)
        self._seen += len(losses)
        if not owned.last:
            return None
        if self._seen != owned.of:
            raise CaptureError("the examples of a unit did not come together, so that its gradient is not known")
        self._seen = 0
        return {name: [Dense(total.unsqueeze(0))] for name, total in self._sums.items()}, self._loss.view(1)

    def forget(self) -> None:
        """Drops what is in it."""
        for total in self._sums.values():
            total.zero_()
        self._loss, self._seen = None, 0
