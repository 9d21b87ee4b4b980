"""Tensors -> one number for each, which changes when any of its bits does, or when its values change places.

It is a sum of the tensor's 64-bit words modulo 2**64, each times an odd number that depends on its place; so one word
alone that changes always changes it.

A version counter would not do: it does not see what is written through `.data`. Reading the weights once is a small
part of a step, which reads them all in every pass.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

BLOCK, MANY = 1024, 8192  # words of a block; blocks whose products are held at a time (64 MiB)


@torch.no_grad()
def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name -> a sum of the tensor's words modulo 2**64. Waits for the device once in all."""
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
    words, others = octets[start:end].view(torch.int64), torch.cat([octets[:start], octets[end:]])
    whole = len(words) // BLOCK * BLOCK
    blocks = words[:whole].view(-1, BLOCK)
    sums = by_product(blocks) if blocks.is_cpu else by_parts(blocks)  # other devices have no products of whole numbers
    return _weighted(torch.cat([sums, words[whole:], others]))


def by_product(blocks: Tensor) -> Tensor:
    """[N, BLOCK] -> [N]: the sum of each block's words, each times its odd number."""
    return blocks.mv(_odd(BLOCK, blocks.device))


def by_parts(blocks: Tensor) -> Tensor:
    """As `by_product`, with sums alone, some of the blocks at a time."""
    odd = _odd(BLOCK, blocks.device)
    return torch.cat([(some * odd).sum(1) for some in blocks.split(MANY)])


def _weighted(words: Tensor) -> Tensor:
    return (words * _odd(len(words), words.device)).sum()


def _odd(count: int, device: torch.device) -> Tensor:
    """Odd numbers without a pattern, so that products of two of them differ: [count], as splitmix64 makes them."""
    mixed = torch.arange(1, count + 1, device=device) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    return (mixed ^ (mixed >> 27)) | 1
