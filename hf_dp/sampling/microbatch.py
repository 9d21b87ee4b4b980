"""A logical batch of any size -> length-sorted micro-batches within a token budget, in one container.

How a batch is cut is a matter of speed and memory: the sum over its examples is the same however it is cut.
"""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from hf_dp.errors import CaptureError, ConfigError, HfDpError
from hf_dp.per_example import Batch, MicroBatch
from hf_dp.randomness import fork_forward_rng
from hf_dp.sampling.poisson import Draw

MICRO_BATCHES = "micro_batches"
SIZES = "sizes"
FAILURE = "failure"
DRAW_NUMBER = "draw_number"
INPUTS = ("input_values", "input_features", "pixel_values")  # of a record without tokens
READ_AT_ONCE = 256  # records, before they are packed
_NARROW = range(-(1 << 31), 1 << 31)
_NARROWER = (torch.uint8, torch.int16, torch.int32)
# What starting one more pass costs, as tokens. On a CPU core 55 (BERT of 22 M) to 90 (Llama of 3 M) were measured; a GPU is faster at
# tokens and not at starting.
TOKENS_OF_A_PASS = {"cpu": 64, "other": 512}


def tokens_of_a_pass(device: torch.device) -> int:
    """What a pass on this device costs beside its tokens, in tokens."""
    return TOKENS_OF_A_PASS.get(device.type, TOKENS_OF_A_PASS["other"])


def split(lengths: Sequence[int], max_examples: int, max_tokens: int | None, pass_cost: int) -> list[list[int]]:
    """Cuts examples of these lengths into groups of similar length: indices, every one once, longest first.

    A group has at most `max_examples` members, and its size padded to its longest member is at most `max_tokens`; one example that is
    longer than that makes a group of its own. Of all such cuts of the sorted examples it is the one of the fewest tokens, padding
    included, where a group counts as `pass_cost` more: found from the front by dynamic programming, n steps of `max_examples`.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    descending = np.array([lengths[i] for i in order], dtype=np.int64)
    cost = np.zeros(len(order) + 1, dtype=np.int64)  # of the first j examples, cut as well as can be
    start = np.zeros(len(order) + 1, dtype=np.int64)  # of their last group
    for end in range(1, len(cost)):
        first = max(0, end - max_examples)
        padded = np.arange(end - first, 0, -1) * descending[first:end]
        if max_tokens is not None:
            first += min(int((padded > max_tokens).sum()), end - first - 1)  # the larger groups, never the last alone
            padded = padded[first - end :]
        total = cost[first:end] + padded
        best = int(total.argmin())
        cost[end], start[end] = total[best] + pass_cost, first + best
    groups, end = [], len(order)
    while end:
        groups.append(order[start[end] : end])
        end = start[end]
    return groups[::-1]


class Packed(np.ndarray[Any, Any]):
    """A list of whole numbers in a record, in the memory of an array: Python's takes about ten times as much."""


def packed(record: Any) -> Any:
    """The record with its lists of whole numbers `Packed`; one that is no dict as it is."""
    return {name: _pack(value) for name, value in record.items()} if type(record) is dict else record


def unpacked(record: Any) -> Any:
    """What `packed` was given."""
    if type(record) is not dict:
        return record
    return {name: value.tolist() if isinstance(value, Packed) else value for name, value in record.items()}


def _pack(value: Any) -> Any:
    whole = type(value) is list and {*map(type, value)} == {int}
    return (
        np.array(value, dtype=np.int32).view(Packed)
        if whole and min(value) in _NARROW and max(value) in _NARROW
        else value
    )


class Narrow(NamedTuple):
    """Whole numbers in fewer bytes, and the type that they have in the batch."""

    values: Tensor
    dtype: torch.dtype


class Failure(str):
    """What is said of records that could not be read, collated, or brought to a loss, without anything that may be theirs."""

    @classmethod
    def of(cls, error: Exception, doing: str) -> "Failure":
        """Where an error arose, and of what kind; the message of our own, for others' may quote a record."""
        if isinstance(error, HfDpError):
            return cls(f"{error}. {CHARGED}")
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
        return cls(
            f"a drawn record could not be {doing} ({where}; what it said is left out, for it may quote the record): leave such records "
            f"out before training, or make them ones without tokens, which contribute nothing. {CHARGED}"
        )


CHARGED = "The step is charged, nothing was released"


def narrowed(batch: Mapping[str, Any]) -> Batch:
    """A micro-batch with its int64 tensors `Narrow`, in the least type that holds them.

    Tokens, masks and labels take 24 bytes a token as a model wants them, and about 9 like this, and two draws are held at a time.
    """
    return {name: _narrow(value) for name, value in batch.items()}


def micro_batches(container: Mapping[str, Any]) -> Iterator[MicroBatch]:
    """The micro-batches of a container, one after the other, as they were collated.

    Raises:
        CaptureError: a record of the draw could not be read or collated.
    """
    if FAILURE in container:
        raise CaptureError(container[FAILURE])
    for batch, size in zip(container[MICRO_BATCHES], container[SIZES], strict=True):
        yield MicroBatch(
            {name: v.values.to(v.dtype) if isinstance(v, Narrow) else v for name, v in batch.items()}, size
        )


def _narrow(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or not value.numel():
        return value
    least, greatest = (int(x) for x in value.aminmax())
    for dtype in _NARROWER:
        if torch.iinfo(dtype).min <= least and greatest <= torch.iinfo(dtype).max:
            return Narrow(value.to(dtype), value.dtype)
    return value


def feature_length(feature: Any) -> int:
    """Number of `input_ids` of a record; for one that has none 1, or 0 where its sound or picture is empty."""
    if not isinstance(feature, Mapping):
        return 1
    if "input_ids" in feature:
        return len(feature["input_ids"])
    return min((min(1, len(feature[name])) for name in INPUTS if hasattr(feature.get(name), "__len__")), default=1)


class LogicalBatchCollator:
    """Collates one draw: `{"micro_batches": [batch, ...], "sizes": [its number of examples, ...]}`, empty lists for an empty draw.

    `micro_batches` gives them back as they were. The container has no `labels` or `input_ids` of its own, so that Trainer counts no
    tokens of it, and is a plain dict, so that it moves to a device as any batch. A `Draw` leaves its number there too, as
    "draw_number". `collate` runs under secret randomness: masking tokens from a public seed would couple the examples of a batch.
    A record without a single token counts as drawn and contributes nothing. Where a record can't be collated, the draw's container holds
    that instead, and the step for which it was drawn fails: whoever sees the training stop for it has been charged.

    Args:
        collate: list of features -> micro-batches of them; a `Collation`. It gets each feature once, `packed`.
        max_examples: the most examples of a micro-batch.
        max_tokens: the most tokens of a micro-batch after padding, None for no bound.
        pass_cost: tokens that one more micro-batch must save to be worth while; see `tokens_of_a_pass`.
        length_of: feature -> length in tokens; by default its `input_ids`.

    Raises:
        ConfigError: a bound below 1.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], list[MicroBatch]],
        max_examples: int,
        max_tokens: int | None = None,
        pass_cost: int = TOKENS_OF_A_PASS["cpu"],
        length_of: Callable[[Any], int] = feature_length,
    ) -> None:
        if max_examples < 1 or (max_tokens is not None and max_tokens < 1):
            raise ConfigError(
                f"a micro-batch needs room for 1 example and 1 token (got max_examples={max_examples}, max_tokens={max_tokens})"
            )
        self.collate = collate
        self.max_examples = max_examples
        self.max_tokens = max_tokens
        self.pass_cost = pass_cost
        self.length_of = length_of

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        """The micro-batches of these features; the features themselves are not changed here."""
        number = {DRAW_NUMBER: features.number} if isinstance(features, Draw) else {}
        failures = [feature for feature in features if isinstance(feature, Failure)]
        if not failures:
            try:
                made = self._collated(features)
                return {MICRO_BATCHES: [narrowed(b) for b in made], SIZES: [b.size for b in made], **number}
            except Exception as error:
                failures = [Failure.of(error, "collated")]
        return {FAILURE: str(failures[0]), **number}

    def _collated(self, features: list[Any]) -> list[MicroBatch]:
        lengths = {i: length for i, feature in enumerate(features) if (length := self.length_of(feature))}
        groups = split([*lengths.values()], self.max_examples, self.max_tokens, self.pass_cost)
        at = [*lengths]
        with fork_forward_rng():
            return [batch for group in groups for batch in self.collate([features[at[i]] for i in group])]


class Reader:
    """A data set that reads the records of a draw by itself: its `read` gives as many as there are, however many were asked for."""

    def read(self, indices: list[int]) -> list[Any]:
        """What is there at these indices."""
        raise NotImplementedError


def read_records(dataset: Any, indices: list[int]) -> list[Any]:
    """One record for each index. Where a data set may look at several at once (a transform of a batch), each is read by itself.

    Raises:
        CaptureError: it gives several records for one index, or none.
    """
    if isinstance(dataset, Reader):
        return dataset.read(indices)
    fetch = getattr(dataset, "__getitems__", None)  # DataLoader's own optional protocol for a whole batch
    if fetch is None:
        return [dataset[i] for i in indices]
    together = _reads_rows(dataset)
    pieces = [list(fetch(piece)) for piece in ([indices] if together else [[i] for i in indices]) if piece]
    records = [record for piece in pieces for record in piece]
    if len(records) != len(indices) or not (together or all(len(piece) == 1 for piece in pieces)):
        raise CaptureError(
            "the data set gave another number of records than one for one index, as a transform may that cuts records in pieces: "
            "clipping bounds what one record adds. Cut the records before training (datasets.map), and let "
            "PrivacyConfig(unit_column=...) name the record that each piece came from"
        )
    return records


def _reads_rows(dataset: Any) -> bool:
    """Whether it is a table of which each record is a row, whoever else is read with it."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return type(dataset) is datasets.Dataset and dataset.format["type"] != "custom"


class DrawnRecords:
    """A map-style data set whose `__getitems__` hands a draw's number on to the collator and reads under secret randomness.

    What it reads it packs: lists of tokens are most of what a large draw takes in memory. A draw that can't be read is one `Failure`.

    Random augmentations in the data set's own `__getitem__` would otherwise come from the public seed, dealt out in the order of the
    draw, as dropout masks would (see `forked_rng`).
    """

    def __init__(self, dataset: Any, num_units: int | None = None) -> None:
        self.dataset = dataset
        self._num_units = len(dataset) if num_units is None else num_units

    def __len__(self) -> int:
        """N, of units, which is public, and not of records: Trainer logs rates that come from it."""
        return self._num_units

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """The records of a draw, `packed`; a `Draw` stays one."""
        records: list[Any] = []
        try:
            with fork_forward_rng():
                for start in range(0, len(indices), READ_AT_ONCE):
                    records += map(packed, read_records(self.dataset, list(indices[start : start + READ_AT_ONCE])))
        except Exception as error:
            records = [Failure.of(error, "read")]
        return Draw(records, indices.number) if isinstance(indices, Draw) else records
