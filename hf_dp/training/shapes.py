"""Records -> those whose sound or picture has another shape than the rest, or is among the shortest, or has no target.

Shapes alone are looked at. Of a table they are Arrow's lengths, so that no sound or picture is read.
"""

from collections.abc import Iterator, Mapping

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from hf_dp.per_example import Leaf
from hf_dp.sampling import INPUTS

TOKENS, *OTHERS = INPUTS
LABELS = "labels"
ROWS = 64  # of one Arrow batch: a sound of half a minute is a megabyte
SHORTEST = 3
OTHER_SHAPE, SHORT, NO_TARGET = "of another shape than in other records", "too short for the model", "empty"
Shape = tuple[int, ...]


class Shapes:
    """The shapes of records' sounds, pictures or features, gathered record by record, and which have no target."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[Shape, list[int]]] = {}
        self._untargeted: list[int] = []

    def add(self, row: int, shapes: Mapping[str, Shape | None]) -> None:
        """Notes the shapes of a record's columns. What the record is about is the first of `INPUTS` that it has."""
        name = next((name for name in INPUTS if name in shapes), None)
        shape = None if name is None else shapes[name]
        if name is None or not shape or 0 in shape:
            return  # nothing to train on: it contributes nothing
        if name in OTHERS:
            self._rows.setdefault(name, {}).setdefault(shape, []).append(row)
        if shapes.get(LABELS) == (0,):
            self._untargeted.append(row)

    def add_table(self, dataset: datasets.Dataset) -> None:
        """Notes the shapes of all records of a table that has sounds or pictures as numbers."""
        names = [name for name in (*OTHERS, LABELS) if name in dataset.column_names]
        if TOKENS in dataset.column_names or not set(names) & set(OTHERS):
            return
        for number, table in enumerate(dataset.select_columns(names).with_format("arrow").iter(ROWS)):
            columns = [_of_column(table[name]) for name in names]
            for row, shapes in enumerate(zip(*columns, strict=True), number * ROWS):
                self.add(row, dict(zip(names, shapes, strict=True)))

    def odd(self) -> Iterator[tuple[int, str, str]]:
        """Row, column, and what is odd about it."""
        for name, rows_of in self._rows.items():
            usual = max(rows_of.values(), key=len)
            if all(len(shape) == 1 for shape in rows_of):
                for shape in sorted(rows_of)[:SHORTEST]:
                    yield from ((row, name, SHORT) for row in rows_of[shape][:SHORTEST])
            else:
                for rows in rows_of.values():
                    yield from ((row, name, OTHER_SHAPE) for row in rows if rows is not usual)
        yield from ((row, LABELS, NO_TARGET) for row in self._untargeted)


def shape_of(value: Leaf) -> Shape | None:
    """The shape of a tensor, an array, or lists in lists, as far as their first members show it; None of a number."""
    if isinstance(value, (Tensor, np.ndarray)):
        return tuple(value.shape)
    if isinstance(value, (list, tuple)):
        return (len(value), *((shape_of(value[0]) or ()) if value else ()))
    return None


def is_list(kind: pa.DataType) -> bool:
    """Whether an Arrow type is one of lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _of_column(column: pa.ChunkedArray) -> list[Shape | None]:
    return [shape or None for chunk in column.chunks for shape in _of_array(chunk)]


def _of_array(array: pa.Array) -> list[Shape]:
    """The shape of each list in an array, along first members; () of numbers."""
    dimensions: list[list[int]] = []
    first = np.arange(len(array))  # of each row's list, at the depth that `array` has come to
    while True:
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        if not is_list(array.type):
            break
        lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
        padded = np.append(lengths, 0)
        dimensions.append([int(n) for n in padded[np.minimum(first, len(lengths))]])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        first, array = starts[np.minimum(first, len(lengths))], array.flatten()
    return list(zip(*dimensions, strict=True)) if dimensions else [()] * len(array)
