"""One example's loss -> its clipped gradient as whole numbers of bounded norm. The proof is in `randomness.grid`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hf_dp.errors import CaptureError
from hf_dp.per_example import Pass, per_example_factors
from hf_dp.per_example import factors as fx
from hf_dp.randomness import Grid, grid_for


def grid_of(model: nn.Module, noise_multiplier: float, clip_norm: float) -> Grid:
    """The grid for a model's trainable parameters; errors as `grid_for`."""
    return grid_for(noise_multiplier, clip_norm, sum(p.numel() for p in model.parameters() if p.requires_grad))


def to_integers(gradients: Sequence[Tensor], grid: Grid) -> list[Tensor]:
    """round(g min(1 / step, R / |g|)) for the gradients of all parameters together: int64, of the same shapes.

    Guarantee, whatever the arguments hold: the sum of all squares, as integers, is at most grid.sensitivity**2. If it
    would be more, or if the norm is not finite, all numbers are zero.
    """
    if not gradients:
        return []
    norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]).norm()
    scale = (grid.radius / norm).clamp(max=1 / grid.step)  # R / |g| is infinite at norm 0
    bound = grid.sensitivity
    integers = [g.double().mul(scale).round_().to(torch.int64).clamp_(-bound, bound) for g in gradients]
    if not bool(norm.isfinite()) or squared_norm(integers, bound) > bound**2:
        return [torch.zeros_like(z) for z in integers]
    return integers


def squared_norm(integers: Sequence[Tensor], bound: int) -> int:
    """The exact sum of squares of int64 tensors with entries from -bound to bound, bound at most 2**24."""
    chunk = (1 << 62) // bound**2  # sums of so many squares stay within int64
    parts = [part.square().sum() for z in integers for part in z.flatten().split(chunk)]
    return sum(torch.stack(parts).tolist())


@torch.no_grad()
def add_integer_gradient(
    model: nn.Module,
    example_losses: Callable[[], Tensor],
    batch_size: int,
    grid: Grid,
    into: dict[str, Tensor],
    factors_of: Pass = per_example_factors,
) -> None:
    """Adds the integer vector of one example, or of a unit's mean, to the int64 buffers `into`.

    Raises:
        CaptureError: several examples in the pass, since the rounding of one might depend on another; or as
            `per_example_factors`.
    """
    if batch_size == 0:
        return
    refuse_several(batch_size)
    factors, _ = factors_of(model, example_losses, 1)
    gradients = {name: fx.materialise(uses[0])[0] for name, uses in factors.items()}
    for name, z in zip(gradients, to_integers(list(gradients.values()), grid), strict=True):
        into[name] += z


def refuse_several(batch_size: int) -> None:
    """Raises CaptureError if a pass holds several examples."""
    if batch_size > 1:
        raise CaptureError(f"discrete noise takes one example a pass, got {batch_size}")
