"""Where a value is held: a class, a namespace, a list, a set, an array, a cell -> what it holds, and that put back."""

import os
import types
from contextvars import ContextVar

from torch import nn

from hf_dp.per_example.proof.calls import Value

_NOTHING = object()


def attribute(owner: type, key: str) -> list[Value]:
    """What a class has under this name."""
    return [vars(owner).get(key)]


def set_attribute(owner: type, key: str, held: list[Value]) -> None:
    """Gives a class what was held."""
    type.__setattr__(owner, key, held[0])


def item(space: dict[str, Value], key: str) -> list[Value]:
    """What a namespace has under this name."""
    return [space.get(key)]


def set_item(space: dict[str, Value], key: str, held: list[Value]) -> None:
    """Gives a namespace what was held."""
    space[key] = held[0]


def set_list(own: Value, held: list[Value]) -> None:
    """Fills a list, or a deque."""
    own.clear()
    own.extend(held)


def sorted_set(own: set[Value]) -> list[Value]:
    """The members of a set, in an order of their own."""
    return sorted(own, key=id)


def set_set(own: set[Value], held: list[Value]) -> None:
    """Fills a set."""
    own.clear()
    own.update(held)


def set_array(own: Value, copy: Value, held: list[Value]) -> None:
    """Writes what was copied."""
    own[...] = copy


def set_bytes(own: Value, copy: Value, held: list[Value]) -> None:
    """Writes what was copied, over what may be longer or shorter now."""
    own[:] = copy


def slots_of(kind: type) -> list[str]:
    """The names of the attributes for which a class, written in Python, has slots."""
    return [
        key
        for owner in kind.__mro__
        for key, member in vars(owner).items()
        if isinstance(member, types.MemberDescriptorType) and not key.startswith("__")
    ]


def slot(owner: Value, key: str) -> list[Value]:
    """What an object has there; [] where nothing."""
    value = getattr(owner, key, _NOTHING)
    return [] if value is _NOTHING else [value]


def set_slot(owner: Value, key: str, held: list[Value]) -> None:
    """Gives an object what it had there."""
    if held:
        object.__setattr__(owner, key, held[0])
    elif slot(owner, key):
        object.__delattr__(owner, key)


def set_gradient(parameter: nn.Parameter, held: list[Value]) -> None:
    """Gives a parameter the gradient that it had."""
    parameter.grad = held[0]


def set_variable(variable: ContextVar[Value], held: list[Value]) -> None:
    """Gives a context's variable what it had."""
    variable.set(held[0])


def set_environment(held: dict[str, str]) -> None:
    """Gives the process the variables that it had."""
    os.environ.clear()
    os.environ.update(held)


def contents(cell: types.CellType) -> list[Value]:
    """What a closure's cell holds; [] where it is not filled yet."""
    try:
        return [cell.cell_contents]
    except ValueError:  # not filled yet
        return []


def set_contents(cell: types.CellType, held: list[Value]) -> None:
    """Fills a cell."""
    for value in held:
        cell.cell_contents = value


def frame_of(generator: Value) -> list[Value]:
    """How far a generator has come, and what plain values it holds."""
    frame = generator.gi_frame
    if frame is None:
        return []
    return [frame.f_lasti, *(v for v in frame.f_locals.values() if isinstance(v, (bool, int, float, str, bytes)))]
