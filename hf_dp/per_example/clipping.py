"""Per-example gradient norms and the bound C -> the factor by which each example is scaled before the sum."""

import torch
from torch import Tensor

# What is added for an example is its weight times its gradient, rounded once a number: at most 2**-24 of it in float32.
# Norms are upper bounds already (`per_example.norms`) and weights are rounded toward zero, so this much below C leaves
# room for that. It is not meant for the rounding of a float32 sum over examples and positions, which depends on all of
# them, as in any such sum: `noise="discrete"` has none.
ROUNDING_MARGIN = 1e-6

# Beyond, squares leave float32 in one form of a gradient and not in another: which one is taken must not decide what an
# example adds.
LARGEST_NORM = 1e18


def clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    """min(1, C / norm) for each example (Abadi et al. 2016, algorithm 1), [B] -> [B].

    An example whose norm is NaN, negative or above `LARGEST_NORM` gets exactly 0: it is dropped, which moves the sum by
    nothing. A norm of 0 gets 1. The caller must also zero the gradients of an example with factor 0, since 0 x NaN is
    NaN. The factor aims `ROUNDING_MARGIN` below C, relatively, so that rounding does not carry a clipped gradient above
    C; an example already under C(1 - margin) is not touched.
    """
    target = clip_norm * (1.0 - ROUNDING_MARGIN)
    factors = (target / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
    return torch.where((norms >= 0) & (norms <= LARGEST_NORM), factors, torch.zeros_like(factors))
