"""Records and micro-batches -> the same in less memory, and back: lists of tokens and int64 tensors take the most."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_dp.per_example import Batch, Leaf, Record

INT32 = range(-(1 << 31), 1 << 31)
NARROW_TYPES = (torch.uint8, torch.int16, torch.int32)  # in the order in which they are tried


class Packed(np.ndarray[tuple[int, ...], np.dtype[np.int32]]):
    """A list of whole numbers in a record, kept as an array: Python's list takes about ten times as much memory."""


class Narrow(NamedTuple):
    """Whole numbers in fewer bytes, and the type that they have in the batch."""

    values: Tensor
    dtype: torch.dtype


def packed(record: Record) -> Record:
    """The record with its lists of whole numbers `Packed`; a record that is no dict stays as it is."""
    return {name: _pack(value) for name, value in record.items()} if type(record) is dict else record


def unpacked(record: Record) -> Record:
    """The record that `packed` was given."""
    if type(record) is not dict:
        return record
    return {name: value.tolist() if isinstance(value, Packed) else value for name, value in record.items()}


def narrowed(batch: Mapping[str, Leaf]) -> Batch:
    """A micro-batch with each of its int64 tensors `Narrow`, in the smallest type that holds its values.

    Tokens, masks and labels as a model wants them take 24 bytes a token; narrowed, they take about 9. Two draws are
    held at a time.
    """
    return {name: _narrow(value) for name, value in batch.items()}


def widened(batch: Mapping[str, Leaf]) -> Batch:
    """The micro-batch that `narrowed` was given."""
    return {name: v.values.to(v.dtype) if isinstance(v, Narrow) else v for name, v in batch.items()}


def _pack(value: Leaf) -> Leaf:
    whole = type(value) is list and {*map(type, value)} == {int}
    fits = whole and min(value) in INT32 and max(value) in INT32
    return np.array(value, dtype=np.int32).view(Packed) if fits else value


def _narrow(value: Leaf) -> Leaf:
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or not value.numel():
        return value
    least, greatest = (int(x) for x in value.aminmax())
    for dtype in NARROW_TYPES:
        if torch.iinfo(dtype).min <= least and greatest <= torch.iinfo(dtype).max:
            return Narrow(value.to(dtype), value.dtype)
    return value
