"""Where a value is held: a class, a namespace, a list, a set, an array, a cell -> what it holds, and that put back."""

import types

from hf_dp.per_example.proof.calls import Value


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
