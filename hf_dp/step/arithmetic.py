"""PyTorch's settings at this moment -> those under which float32 products are too coarse for a norm that clips."""

from collections.abc import Iterator

import torch

COARSE = (
    "norms would have ten bits, so clipped gradients could exceed C by 1e-3; use bf16=True, which keeps norms in "
    "float32"
)
FINE = ("none", "ieee")  # "none": as PyTorch's default, ieee


def coarse_products() -> Iterator[str]:
    """Each setting that makes matrix products in TF32 or bfloat16, with its remedy. Asked before every step."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through the newer `fp32_precision`, which is asked below
        precision = "highest"
    if precision != "highest":
        yield f"torch.set_float32_matmul_precision({precision!r}): {COARSE}, and set 'highest'"
    for name, backend in (
        ("torch.backends", torch.backends),
        ("torch.backends.cuda.matmul", torch.backends.cuda.matmul),
        ("torch.backends.mkldnn", torch.backends.mkldnn),
        ("torch.backends.mkldnn.matmul", getattr(torch.backends.mkldnn, "matmul", None)),
    ):
        value = getattr(backend, "fp32_precision", "none")  # torch 2.9 and newer
        if precision == "highest" and value not in FINE:
            yield f"{name}.fp32_precision={value!r}: {COARSE}, and set 'ieee'"
