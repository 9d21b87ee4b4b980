"""A loss on one made-up record -> its value and gradient, and whether those of two losses differ by rounding alone."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_dp.per_example import factors as fx
from hf_dp.per_example import per_example_factors, undisturbed

# What rounding may make of a loss and of its gradient (relative), by the dtype of the activations: both come of the
# same forward pass. Models and hosts form losses in float32 at most.
ROUNDING = {
    torch.float64: (5e-5, 5e-4),
    torch.float32: (5e-5, 5e-4),
    torch.bfloat16: (0.01, 0.08),
    torch.float16: (2e-3, 0.02),
}


class Measured(NamedTuple):
    """A loss on one made-up record, and its gradient by parameter."""

    loss: float
    gradient: dict[str, Tensor]


def measure(model: nn.Module, compute: Callable[[], Tensor | None]) -> Measured | None:
    """The loss and gradient of one record, without dropout and from the same random state each time.

    None if there is no loss.
    """
    seen: list[Tensor | None] = []

    def loss() -> Tensor:
        found = compute()
        seen.append(found)
        return torch.zeros(1) if found is None else found

    with undisturbed(model):
        torch.manual_seed(0)
        factors, values = per_example_factors(model, loss, 1)
    if seen[0] is None:
        return None
    return Measured(float(values[0]), {name: fx.materialise(uses[0])[0] for name, uses in factors.items()})


def _square_sum(x: Tensor | None) -> float:
    """The sum of squares; in float64 where float32, eight times as fast, would overflow or lose what is small."""
    if x is None:
        return 0.0
    flat = x.reshape(-1)
    quick = float(torch.dot(flat, flat)) if flat.dtype == torch.float32 else 0.0
    return quick if 1e-20 < quick < 1e30 else float(flat.double().square().sum())


def same(a: Measured | None, b: Measured | None, dtype: torch.dtype = torch.float32) -> bool:
    """Whether two losses, and their gradients, differ by no more than rounding in `dtype` explains."""
    if a is None or b is None:
        return False
    of_loss, of_gradient = ROUNDING[dtype]
    apart = size = 0.0
    for name in a.gradient.keys() | b.gradient.keys():
        x, y = (m.gradient.get(name) for m in (a, b))
        apart += _square_sum(y if x is None else x if y is None else x - y)
        size += _square_sum(x)
    return math.isclose(a.loss, b.loss, rel_tol=of_loss, abs_tol=of_loss) and apart <= of_gradient**2 * size
