"""Per-example gradient norms and the bound C -> the factor by which each example is scaled before the sum."""

import torch
from torch import Tensor

# Float32 arithmetic may leave a clipped gradient this much above C: the norm of 1e7 float32 numbers, and its product with the
# factor, are rounded. Aiming below C by it keeps the true norm under C.
ROUNDING_MARGIN = 1e-6


def clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    """min(1, C / norm) for each example (Abadi et al. 2016, algorithm 1), [B] -> [B].

    An example whose norm is NaN or infinite gets exactly 0; a norm of 0 gets 1. The caller must also zero the gradients of an
    example with factor 0, since 0 x NaN is NaN. The factor aims `ROUNDING_MARGIN` below C, relatively, so that rounding
    does not carry a clipped gradient above C; an example already under C(1 - margin) is not touched.
    """
    target = clip_norm * (1.0 - ROUNDING_MARGIN)
    factors = (target / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))
