"""Which examples each number of a tensor depends on: one byte a number, kept beside the tensor's memory and never in
the tensor.

A byte is a set of bits (`EXAMPLES`, one bit an example; `SHAPED`, `UNWRITTEN`). Bytes belong to memory, not to tensor
objects, so views share them as they share numbers, and an operation in place is seen by whoever else looks at the same
memory. Memory without bytes is the same for all examples: weights, buffers, constants.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Labels = npt.NDArray[np.uint8]

PASSES, SIZE = 2, 3  # two passes are followed, of three examples each: six bits of a byte
EXAMPLES = 0b0011_1111
# Made within the pass: its sizes, and so its values, depend on the padded length and the number of examples.
SHAPED = 0b0100_0000
UNWRITTEN = 0b1000_0000  # memory that no observed operation has written to
NOTHING = np.zeros((), dtype=np.uint8)


def distinct(labels: Labels) -> Labels:
    """The labels without a broadcast's repetitions: each dimension along which one byte is repeated has length 1."""
    if 0 not in labels.strides:
        return labels
    return labels[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in labels.strides)]


def bits_of(number: int) -> Labels:
    """The bit of each example of pass 0 or 1, [SIZE]."""
    return np.left_shift(1, np.arange(SIZE) + SIZE * (number % PASSES)).astype(np.uint8)


class _Shadow:
    """The bytes of one piece of memory. It keeps that memory alive, so that no other gets its address meanwhile."""

    def __init__(self, like: Tensor) -> None:
        self.unit = like.element_size()
        self.memory: Any = like.untyped_storage()
        self.bytes = np.zeros(self.memory.nbytes() // self.unit, dtype=np.uint8)

    def window(self, tensor: Tensor) -> Labels | None:
        """The bytes of `tensor`, [*shape, units of a number]; None where its numbers do not fall on whole units."""
        times, rest = divmod(tensor.element_size(), self.unit)
        start = tensor.storage_offset() * times
        extent = (
            sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1 if tensor.numel() else 0
        )
        if rest or start + extent * times > self.bytes.size:
            return None
        strides = (*(s * times for s in tensor.stride()), 1)
        return np.ndarray((*tensor.shape, times), np.uint8, self.bytes, start, strides)

    def read(self, tensor: Tensor) -> Labels:
        window = self.window(tensor)
        if window is None:
            everything = np.bitwise_or.reduce(self.bytes, initial=0) | UNWRITTEN
            return np.broadcast_to(np.uint8(everything), tuple(tensor.shape))
        return window[..., 0].copy() if window.shape[-1] == 1 else np.bitwise_or.reduce(window, axis=-1)

    def write(self, tensor: Tensor, labels: Labels) -> None:
        window = self.window(tensor)
        if window is None:
            self.bytes |= np.bitwise_or.reduce(labels, axis=None, initial=0)
        else:
            window[...] = np.broadcast_to(labels, tuple(tensor.shape))[..., None]


def address(tensor: Tensor) -> int:
    """Identifies a piece of memory."""
    return int(tensor.untyped_storage()._cdata)


def key(tensor: Tensor) -> int:
    """Identifies the memory of a tensor; of one that is no array of numbers, the tensor."""
    return address(tensor) if tensor.layout is torch.strided else id(tensor)


class Memories:
    """Pieces of memory. None of them is kept alive, but no other gets the address of one meanwhile."""

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}

    def add(self, tensor: Tensor) -> None:
        """Notes the memory of a tensor."""
        if tensor.layout is torch.strided and (key := address(tensor)) not in self._storages:
            self._storages[key] = StorageWeakRef(tensor.untyped_storage())

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.layout is torch.strided and address(tensor) in self._storages


class Book:
    """The bytes of all memory that depends on anything.

    Attributes:
        of_weights: keys of memory that holds trained weights, or what was made of them: a step may change it.
    """

    def __init__(self, of_weights: Iterable[int] = ()) -> None:
        self.of_weights = set(of_weights)
        self._shadows: dict[int, _Shadow] = {}

    def follows_weights(self, tensors: Iterable[Tensor]) -> bool:
        """Whether a step may change what any of these holds."""
        return any(key(tensor) in self.of_weights for tensor in tensors)

    def read(self, tensor: Tensor) -> Labels:
        """The bytes of a tensor, of its shape."""
        if tensor.layout is not torch.strided:
            return np.broadcast_to(np.uint8(UNWRITTEN | EXAMPLES), tuple(tensor.shape))
        shadow = self._shadows.get(address(tensor))
        return np.broadcast_to(NOTHING, tuple(tensor.shape)) if shadow is None else shadow.read(tensor)

    def of_examples(self, tensor: Tensor) -> bool:
        """Whether anything in the tensor depends on an example, or cannot be told."""
        return bool((distinct(self.read(tensor)) & (EXAMPLES | UNWRITTEN)).any())

    def write(self, tensor: Tensor, labels: Labels, fresh: bool) -> None:
        """New bytes for a tensor; with `fresh`, its memory is new and whatever lay at its address is forgotten."""
        if tensor.layout is not torch.strided:
            return
        key = address(tensor)
        if fresh:
            self._shadows.pop(key, None)
        if key not in self._shadows:
            if not distinct(labels).any():
                return
            self._shadows[key] = _Shadow(tensor)
        self._shadows[key].write(tensor, labels)
