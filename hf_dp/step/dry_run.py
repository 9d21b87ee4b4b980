"""A training set and the bounds of a micro-batch -> made-up records of the largest micro-batch, to be tried before the first draw.

Only the greatest lengths are read off the records. They may be private, unless the records were truncated to a public length, so what is
found out stays in this process: it decides how the work is cut, which changes no sum, and no message, log or file tells it.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from hf_dp.per_example import LENGTHS, longest_taken
from hf_dp.randomness import fork_forward_rng
from hf_dp.sampling import feature_length

ROWS = 10_000  # read at once
COLUMNS = ("input_ids", "labels")  # an encoder-decoder's have lengths of their own


def largest_micro_batch(
    dataset: Any, make: Callable[[tuple[int, ...]], list[Any]], bounds: tuple[int, int | None], model: nn.Module
) -> list[Any]:
    """Records of the greatest length, as many as a micro-batch may hold of them.

    Args:
        dataset: the training set, read as its fingerprint reads it. The lengths of what a `datasets.Dataset`'s transform makes, and of
            records without `input_ids`, stay unknown: then the number of examples alone is tried.
        make: lengths -> a made-up record for each.
        bounds: the most examples and the most padded tokens (or None) of one micro-batch.
        model: the base; no record is longer than it has positions for.
    """
    greatest = greatest_lengths(dataset)
    longest = min(max(greatest.values(), default=max(LENGTHS)), longest_taken(model) or 1 << 62)
    examples, tokens = bounds
    size = min(examples, len(dataset), max(1, tokens // max(1, longest)) if tokens else examples)
    return [_cut(record, greatest) for record in make((max(1, longest),) * size)]


def greatest_lengths(dataset: Any) -> dict[str, int]:
    """The greatest length of each of `COLUMNS` that holds sequences; empty where they can't be read. 100,000 rows of Arrow take 2 ms."""
    import datasets

    if isinstance(dataset, datasets.Dataset):
        return _of_arrow(dataset)
    with fork_forward_rng(seed=0):
        return {"input_ids": max(map(feature_length, _all(dataset)))} if feature_length(dataset[0]) > 1 else {}


def _of_arrow(dataset: Any) -> dict[str, int]:
    import pyarrow as pa
    import pyarrow.compute as pc

    found: dict[str, int] = {}
    names = [name for name in COLUMNS if name in dataset.column_names]
    if "input_ids" not in names or dataset.format["type"] == "custom":
        return found
    for table in dataset.select_columns(names).with_format("arrow").iter(ROWS):
        for name in names:
            if pa.types.is_list(table[name].type) or pa.types.is_large_list(table[name].type):
                here = pc.max(pc.list_value_length(table[name])).as_py()
                found[name] = max(found.get(name, 0), here or 0)
    return found


def _all(dataset: Any) -> Any:
    return (dataset[index] for index in range(len(dataset)))


def _cut(record: Any, greatest: dict[str, int]) -> Any:
    if not isinstance(record, dict):
        return record
    return {name: value[: greatest[name]] if name in greatest else value for name, value in record.items()}
