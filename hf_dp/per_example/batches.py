"""The batches of single records -> one micro-batch whose rows are tied to these records, and parts of it.

How many examples a micro-batch has is stated by the code that knows its records; it is never read off the size of a
tensor. A leaf is anything in a batch that is not a mapping, tuple or list of further leaves; its path is the keys and
indices that lead to it.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

Record: TypeAlias = Any  # whatever a data set returns for an index
Leaf: TypeAlias = Any  # a tensor, a number, a text, a list of texts, ...
Batch: TypeAlias = dict[str, Leaf]  # a Leaf may be a mapping, tuple or list of further leaves
Path: TypeAlias = tuple[str | int, ...]
RIGHT, LEFT = "right", "left"
BY_IDENTITY: Any = object.__eq__  # of types without an equality of their own


class Untied(Exception):
    """Leaves of several records that cannot become rows of one batch: each record then has a pass of its own."""


class Padding(NamedTuple):
    """What a leaf is padded with, up to the greatest size in each dimension, and on which side."""

    value: float
    side: str


class Owned(NamedTuple):
    """Which units the examples of a micro-batch belong to, where a unit may have several (see `owned`).

    Attributes:
        counts: how many examples each unit has here; those of a unit are neighbours.
        of: where all are of one unit that has further ones in other micro-batches: how many it has in all. Else 0.
        last: whether no further ones of that unit follow.
    """

    counts: tuple[int, ...]
    of: int = 0
    last: bool = True

    def pieces(self, most: int) -> Iterator["Owned"]:
        """The same in pieces of at most `most` examples. A unit is cut only if it has more by itself."""
        if self.of:
            left = sum(self.counts)
            while left > 0:
                size, left = min(most, left), left - min(most, left)
                yield Owned((size,), self.of, last=self.last and not left)
            return
        whole: list[int] = []
        room = most
        for count in self.counts:
            if whole and count > room:
                yield Owned(tuple(whole))
                whole, room = [], most
            if count > most:
                yield from Owned((count,), count).pieces(most)
            else:
                whole.append(count)
                room -= count
        if whole:
            yield Owned(tuple(whole))


class MicroBatch(Batch):
    """A batch for one pass, and how many examples it has.

    With several examples, every tensor, and every list of things that are not tensors, has one row for each example, in
    their order; anything else is the same for all of them. A batch of one example is what the collator made of its
    record, whatever that is.

    Attributes:
        records: of these examples, where they were padded to a length that other records of the draw had: from them
            each can be collated anew by itself. () where no example was padded, or where they are not known.
        owned: which units the examples belong to; None where each is one.
    """

    def __init__(
        self, batch: Mapping[str, Leaf], size: int, records: Sequence[Record] = (), owned: Owned | None = None
    ) -> None:
        super().__init__(batch)
        self.size, self.records = size, records
        self.owned = None if owned is not None and not owned.of and set(owned.counts) <= {1} else owned

    def rows(self, where: slice) -> "MicroBatch":
        """The examples in this range."""
        size = len(range(*where.indices(self.size)))
        if size == self.size:
            return self
        return MicroBatch({name: _sliced(value, where) for name, value in self.items()}, size, self.records[where])

    def first(self, count: int) -> "MicroBatch":
        """The first `count` examples; beyond the last one, some of them again (see `repeated`)."""
        where = repeated(self.size, count)
        return MicroBatch({name: _sliced(value, where) for name, value in self.items()}, count)

    def in_another_number(self) -> "MicroBatch":
        """The same examples but the last one; of two examples, three: a single row is never told from a shared one."""
        return self.first(self.size - 1 if self.size > 2 else 3)

    def mapped(self, change: Callable[[Batch], Batch]) -> "MicroBatch":
        """The same examples after `change` was applied to the batch as a whole, for example to move it to a device."""
        return MicroBatch(change(dict(self)), self.size, self.records, self.owned)

    def owned_by(self, owned: Owned | None) -> "MicroBatch":
        """The same examples as those of these units."""
        return MicroBatch(self, self.size, self.records, owned)

    def pieces(self, most: int) -> Iterator["MicroBatch"]:
        """The same examples in micro-batches of at most `most`. A unit is cut only if it has more by itself."""
        start = 0
        for owned in (self.owned or Owned((1,) * self.size)).pieces(most):
            size = sum(owned.counts)
            yield self.rows(slice(start, start + size)).owned_by(owned)
            start += size


def repeated(size: int, count: int) -> list[int]:
    """Which of `size` examples stands in each of `count` rows: each in its own, then some again without any order, so
    that rows moved to others' places hold other examples.
    """
    return [*range(size), *random.Random(count).choices(range(size), k=max(count - size, 0))][:count]


def leaves(value: Leaf, path: Path = ()) -> dict[Path, Leaf]:
    """Every leaf of a batch by its path. A list of things that are not tensors, such as one text an example, is one."""
    if isinstance(value, Mapping):
        members: Iterable[tuple[str | int, Leaf]] = value.items()
    elif _is_sequence_of_fields(value):
        members = enumerate(value)
    else:
        return {path: value}
    return {deeper: leaf for key, member in members for deeper, leaf in leaves(member, (*path, key)).items()}


def with_leaves(value: Leaf, change: Callable[[Path, Leaf], Leaf], path: Path = ()) -> Leaf:
    """The same with `change(path, leaf)` in each leaf's place."""
    if isinstance(value, Mapping):
        return {key: with_leaves(member, change, (*path, key)) for key, member in value.items()}
    if _is_sequence_of_fields(value):
        return [with_leaves(member, change, (*path, i)) for i, member in enumerate(value)]
    return change(path, value)


def is_tied(batch: Mapping[str, Leaf], size: int) -> bool:
    """Whether every tensor, and every list of things that are not tensors, has `size` rows."""
    return all(_rows(leaf) in (size, None) for leaf in leaves(batch).values())


def stacked(alone: Sequence[Batch], paddings: Mapping[Path, Padding]) -> MicroBatch:
    """One micro-batch of records that were collated one by one.

    Args:
        alone: the batch of each record.
        paddings: of the leaves whose sizes differ.

    Raises:
        Untied: a leaf does not have exactly one row for its record; or it differs in kind or type, or in size without a
            known padding.
    """
    if len(alone) == 1:
        return MicroBatch(alone[0], 1)
    return MicroBatch(_joined(list(alone), (), paddings), len(alone))


def same(a: Leaf, b: Leaf, *, opaque: bool = False) -> bool:
    """Whether two batches, or two leaves, hold the same: tensors of floats up to rounding, everything else exactly.

    Args:
        opaque: whether two objects of one type without an equality of its own, such as a file's decoder, are the same.
    """
    first, second = leaves(a), leaves(b)
    return first.keys() == second.keys() and all(_equal(leaf, second[path], opaque) for path, leaf in first.items())


def pad_and_join(tensors: Sequence[Tensor], padding: Padding) -> Tensor:
    """Tensors [1, ...] of equal type and number of dimensions -> [B, ...], each padded to the greatest sizes.

    Raises:
        Untied: types or numbers of dimensions differ, or a tensor does not have exactly one row.
    """
    if len({(x.dtype, x.dim(), x.shape[:1]) for x in tensors}) > 1 or tensors[0].shape[:1] != (1,):
        raise Untied
    shape = [max(sizes) for sizes in zip(*(x.shape for x in tensors), strict=True)]
    out = tensors[0].new_full((len(tensors), *shape[1:]), padding.value)
    for row, x in zip(out, tensors, strict=True):
        right = padding.side == RIGHT
        row[tuple(slice(0, n) if right else slice(m - n, m) for n, m in zip(x.shape[1:], row.shape, strict=True))] = x[
            0
        ]
    return out


def _joined(values: list[Leaf], path: Path, paddings: Mapping[Path, Padding]) -> Leaf:
    first = values[0]
    if any(type(v) is not type(first) for v in values):
        raise Untied
    if isinstance(first, Mapping):
        if any(v.keys() != first.keys() for v in values):
            raise Untied
        return {key: _joined([v[key] for v in values], (*path, key), paddings) for key in first}
    if isinstance(first, Tensor):
        return _joined_tensors(values, path, paddings)
    if all(map(_is_sequence_of_fields, values)):
        if len({len(v) for v in values}) > 1:
            raise Untied
        return [_joined([v[i] for v in values], (*path, i), paddings) for i in range(len(first))]
    if isinstance(first, (tuple, list)):
        if any(len(v) != 1 for v in values):
            raise Untied
        return [member for v in values for member in v]
    if any(not _equal(v, first) for v in values):
        raise Untied
    return first


def _joined_tensors(tensors: list[Tensor], path: Path, paddings: Mapping[Path, Padding]) -> Tensor:
    if len({x.shape for x in tensors}) > 1:
        if path not in paddings:
            raise Untied
        return pad_and_join(tensors, paddings[path])
    if tensors[0].shape[:1] != (1,) or len({x.dtype for x in tensors}) > 1:
        raise Untied
    return torch.cat(tensors)


def _sliced(value: Leaf, where: slice | list[int]) -> Leaf:
    if isinstance(value, Mapping):
        return {key: _sliced(member, where) for key, member in value.items()}
    if isinstance(value, Tensor):
        return value[where]
    if _is_sequence_of_fields(value):
        return [_sliced(member, where) for member in value]
    if not isinstance(value, (tuple, list)):
        return value
    return value[where] if isinstance(where, slice) else type(value)(value[i] for i in where)


def _is_sequence_of_fields(value: Leaf) -> bool:
    return isinstance(value, (tuple, list)) and any(isinstance(m, (Tensor, Mapping, tuple, list)) for m in value)


def _rows(leaf: Leaf) -> int | None:
    if isinstance(leaf, Tensor):
        return len(leaf) if leaf.dim() else 0
    if isinstance(leaf, (tuple, list)):
        return len(leaf)
    return None if leaf is None or isinstance(leaf, (bool, int, float, str)) else 0


def _equal(a: Leaf, b: Leaf, opaque: bool = False) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.allclose(a, b, 1e-5, 1e-6, equal_nan=True) if a.is_floating_point() else torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_equal(*members, opaque) for members in zip(a, b, strict=True))
    if isinstance(a, np.ndarray):
        alike = (a.dtype, a.shape) == (b.dtype, b.shape)
        return alike and (_equal(a.tolist(), b.tolist(), opaque) if a.dtype.hasobject else a.tobytes() == b.tobytes())
    if type(a).__eq__ is BY_IDENTITY:
        return opaque or a is b
    try:
        return bool(a == b) or bool(a != a and b != b)  # what is not a number is like itself
    except (ValueError, TypeError, RuntimeError):  # == has no single answer
        return False
