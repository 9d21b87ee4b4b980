"""Per-example gradient norms and the bound C -> the factor by which each example is scaled before the sum."""

import torch
from torch import Tensor

# What an example adds to the sum is its weight times its gradient, and each number of that product is rounded once: in
# float32 by at most 2**-24 of its size. Norms are upper bounds already (see `norms`), and weights are rounded toward
# zero, so aiming this much below C leaves room for the rounding of the product. The margin does not cover the rounding
# of a float32 sum over examples and positions, which depends on all of them; `noise="discrete"` has no such rounding.
ROUNDING_MARGIN = 1e-6

# Beyond this norm, squares overflow float32 in one form of a gradient (see `factors`) and not in another, and the
# choice of a form must not decide whether an example counts.
LARGEST_NORM = 1e18


def clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    """min(1, C / norm) for each example (Abadi et al. 2016, algorithm 1), [B] -> [B].

    An example whose norm is NaN, negative or above `LARGEST_NORM` gets exactly 0: it is dropped, which moves the sum by
    nothing. The caller must also zero the gradients of such an example, since 0 x NaN is NaN. A norm of 0 gets 1. The
    factor aims `ROUNDING_MARGIN` below C, relatively, so that rounding does not carry a clipped gradient above C.
    Examples already below C (1 - margin) are not scaled.
    """
    target = clip_norm * (1.0 - ROUNDING_MARGIN)
    factors = (target / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
    return torch.where((norms >= 0) & (norms <= LARGEST_NORM), factors, torch.zeros_like(factors))
