"""One operation as it was called -> its arguments by name, with what each depends on: what a rule is given."""

from collections.abc import Iterator
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hf_dp.per_example.proof.labels import NOTHING, Book, Labels, distinct

Value: TypeAlias = Any  # an argument or a result of an operation


class Call:
    """An operation, its arguments bound to the names of its schema, and its results.

    Attributes:
        name: the operation's name without its overload and without the underscore of the form in place.
        arguments: name -> value, defaults included.
        results: the tensors it returned, in order.
        answers: whether it returned anything, a number too.
        inputs: the tensors it reads, those in lists too, without those that it only writes.
        everything: all that any input depends on.
    """

    def __init__(self, func: Value, args: tuple[Value, ...], kwargs: dict[str, Value], out: Value, book: Book) -> None:
        self.func, self.book = func, book
        self.name = plain_name(func)
        self._schema = func._schema.arguments
        self.arguments = bound(func, args, kwargs)
        self.results, self.answers = list(tensors_in(out)), out is not None
        self.inputs = [t for a in self._schema if not a.is_out for t in tensors_in(self.arguments[a.name])]
        self._read: dict[int, Labels] = {}
        self.everything = all_of(np.array([all_of(self.read(t)) for t in self.inputs], dtype=np.uint8))

    def labels(self, name: str) -> Labels:
        """What an argument depends on; a number, None or an absent argument: on nothing."""
        return self.read(self.arguments.get(name))

    def read(self, value: Value) -> Labels:
        """What a value depends on."""
        if not isinstance(value, Tensor):
            return NOTHING
        if id(value) not in self._read:
            self._read[id(value)] = self.book.read(value)
        return self._read[id(value)]

    def written(self) -> list[Tensor]:
        """The tensors among the arguments that the operation writes to."""
        return written(self.func, self.arguments)

    def replay(self, changed: dict[str, Value]) -> Value:
        """The operation itself, on other values for some of its arguments, on the CPU."""
        given = {k: v for k, v in {**self.arguments, **changed}.items() if k not in ("device", "pin_memory")}
        return self.func(**given)


@cache
def plain_name(func: Value) -> str:
    """'add' for aten.add_.Tensor; in another namespace than PyTorch's own, with it."""
    space, name = func._schema.name.split("::")
    name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    return name if space in ("aten", "prims") else f"{space}::{name}"


def written(func: Value, arguments: dict[str, Value]) -> list[Tensor]:
    """The tensors among the arguments, by name, that an operation writes to."""
    return [t for name in _targets(func) for t in tensors_in(arguments[name])]


@cache
def _targets(func: Value) -> tuple[str, ...]:
    return tuple(a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write)


def bound(func: Value, args: tuple[Value, ...], kwargs: dict[str, Value]) -> dict[str, Value]:
    """The arguments by the names of the operation's schema, defaults included."""
    found = {}
    for position, argument in enumerate(func._schema.arguments):
        given = args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value)
        found[argument.name] = given
    return found


def tensors_in(value: Value) -> Iterator[Tensor]:
    """The tensors of a value, nested lists, tuples and mappings included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors_in(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from tensors_in(v)


def all_of(labels: Labels) -> np.uint8:
    """The union over all numbers."""
    return np.uint8(np.bitwise_or.reduce(distinct(labels), axis=None, initial=0))


def as_tensor(labels: Labels) -> Tensor:
    """Bytes as a tensor of bytes."""
    return torch.from_numpy(np.ascontiguousarray(labels).copy())
