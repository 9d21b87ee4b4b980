"""Tensors -> one number for each, which changes when any of its bits does: the sum of its 64-bit words.

A version counter would not do: it does not see what is written through `.data`. Reading the weights once is a small
part of a step, which reads them all in every pass.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@torch.no_grad()
def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name -> the sum of the tensor's 64-bit words, modulo 2**64. Waits for the device once in all."""
    with torch._C.DisableTorchFunctionSubclass():
        words = [_sum_of_words(t) for t in tensors.values()]
        together = torch.stack([w.to(words[0].device) for w in words]).tolist() if words else []
    return dict(zip(tensors, together, strict=True))


def _sum_of_words(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if tensor.is_meta:  # its memory is elsewhere (offloaded), and only the module's hooks know where
        return torch.zeros((), dtype=torch.int64)
    if is_traceable_wrapper_subclass(tensor):  # sharded or quantised: the tensors that it consists of
        parts, _ = tensor.__tensor_flatten__()
        return torch.stack([_sum_of_words(getattr(tensor, part)) for part in parts]).sum()
    dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    flat = dense.detach().contiguous().reshape(-1)
    octets = (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(torch.uint8)
    start = -octets.storage_offset() % 8
    end = start + max(0, len(octets) - start) // 8 * 8
    ends = octets[:start].sum(dtype=torch.int64) + octets[end:].sum(dtype=torch.int64)
    return ends + octets[start:end].view(torch.int64).sum()
