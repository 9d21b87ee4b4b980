"""An inventory, or numbers before and after -> a table on the terminal."""

import math
import re
from collections.abc import Mapping, Sequence

from hf_dp.per_example import Row
from hf_dp.tables import console, print_table


def print_inventory(rows: Sequence[Row]) -> None:
    """Every trainable parameter; equal ones of different layers share a line: `layers.0-5.` says which."""
    groups: dict[tuple[str, ...], list[list[int]]] = {}
    for row in rows:
        pattern = re.sub(r"\b\d+\b", "#", row.parameter)
        shape = " x ".join(map(str, row.shape))
        groups.setdefault((pattern, shape, row.operations, row.rule), []).append(_numbers(row.parameter))
    cells = [(_named(key[0], numbers), len(numbers), *key[1:]) for key, numbers in groups.items()]
    print_table("Trainable parameters", ("parameter", "tensors", "shape", "used by", "per-example gradient"), cells)
    total = sum(math.prod(row.shape) for row in rows)
    console().print(f"{len(rows)} trainable tensors with {total:,} numbers, each with an exact rule.")


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\b\d+\b", name)]


def _named(pattern: str, numbers: list[list[int]]) -> str:
    """The pattern with each place for a number filled: one number, a range without gaps, or all of them in a list."""
    for place in zip(*numbers, strict=True):
        found = sorted(set(place))
        without_gaps = found == list(range(found[0], found[-1] + 1)) and len(found) > 1
        words = f"{found[0]}-{found[-1]}" if without_gaps else ",".join(map(str, found))
        pattern = pattern.replace("#", words, 1)
    return pattern


def print_metrics(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Validation numbers of the base and of the trained model, one row each."""
    rows = [(name.replace("_", " "), f"{before[name]:.4g}", f"{after[name]:.4g}") for name in after if name in before]
    print_table("On the validation set", ("", "before", "after"), rows)
