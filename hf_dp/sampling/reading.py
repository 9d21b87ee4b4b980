"""A data set and the indices of a draw -> its records, read under secret randomness, one for each index."""

import traceback
from pathlib import Path
from typing import Protocol, cast

import datasets
from torch.utils.data import Subset

from hf_dp.errors import CaptureError, HfDpError
from hf_dp.per_example import Record
from hf_dp.randomness import fork_forward_rng
from hf_dp.sampling.compact import packed
from hf_dp.sampling.poisson import Draw

READ_AT_ONCE = 256  # records; then they are packed
INPUTS = ("input_ids", "input_values", "input_features", "pixel_values")  # what a record is about: the first of these
CHARGED = "The step is charged, nothing was released"


class Records(Protocol):
    """A data set with a length and random access."""

    def __len__(self) -> int:
        """How many records it has."""

    def __getitem__(self, index: int, /) -> Record:
        """The record at this index."""


class Reader(Records):
    """A data set that reads the records of a draw by itself. `read` may give fewer records than it is asked for."""

    def read(self, indices: list[int]) -> list[Record]:
        """The records that there are at these indices."""
        raise NotImplementedError


class Failure(str):
    """Stands in for records that could not be read, collated or brought to a loss: a message without their content."""

    @classmethod
    def of(cls, error: Exception, doing: str) -> "Failure":
        """Kind and place of the error. Only the library's own messages are kept: others may quote a record."""
        if isinstance(error, HfDpError):
            return cls(f"{error}. {CHARGED}")
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
        return cls(
            f"a drawn record could not be {doing} ({where}; its message is left out, for it may quote the record): "
            "leave such records out before training, or replace them by records without tokens, which contribute "
            f"nothing. {CHARGED}"
        )


class DrawnRecords:
    """A map-style data set for a `DataLoader` whose `__getitems__` reads a whole draw, under secret randomness.

    It hands the draw's number on to the collator. Records are `packed`, because lists of tokens are most of the memory
    that a large draw takes. A draw that cannot be read becomes one `Failure`.

    Without secret randomness, random augmentations in the data set's own `__getitem__` would come from the public seed,
    in the order of the draw: removing one record would change those of all records after it (see `forked_rng`).
    """

    def __init__(self, dataset: Records, num_units: int | None = None) -> None:
        self.dataset = dataset
        self._num_units = len(dataset) if num_units is None else num_units

    def __len__(self) -> int:
        """N, the number of privacy units, which is public. Trainer logs rates that it computes from this."""
        return self._num_units

    def __getitem__(self, index: int) -> Record:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[Record]:
        """The records of a draw, `packed`; a `Draw` of indices gives a `Draw` of records."""
        records: list[Record] = []
        try:
            with fork_forward_rng():
                for start in range(0, len(indices), READ_AT_ONCE):
                    records += map(packed, read_records(self.dataset, list(indices[start : start + READ_AT_ONCE])))
        except Exception as error:
            records = [Failure.of(error, "read")]
        return Draw(records, indices.number, indices.counts) if isinstance(indices, Draw) else records


def read_records(dataset: Records, indices: list[int]) -> list[Record]:
    """One record for each index. A data set that might mix records read together is asked for one at a time.

    Raises:
        CaptureError: it gives several records for one index, or none.
    """
    if isinstance(dataset, Reader):
        return dataset.read(indices)
    fetch = getattr(dataset, "__getitems__", None)  # DataLoader's own optional protocol for a whole batch
    if fetch is None:
        return [dataset[i] for i in indices]
    together = is_plain_table(dataset)
    pieces = [list(fetch(piece)) for piece in ([indices] if together else [[i] for i in indices]) if piece]
    records = [record for piece in pieces for record in piece]
    if len(records) != len(indices) or not (together or all(len(piece) == 1 for piece in pieces)):
        raise CaptureError(
            "the data set gave another number of records than one for one index, as a transform may that cuts records "
            "in pieces: clipping bounds what one record adds. Cut the records before training (datasets.map), and let "
            "PrivacyConfig(unit_column=...) name the record that each piece came from"
        )
    return records


def is_plain_table(dataset: Records) -> bool:
    """Whether each record is a row of a table without a transform, so that reading several at once cannot mix them."""
    while isinstance(dataset, Subset) and type(dataset) is Subset:
        dataset = cast(Records, dataset.dataset)
    return type(dataset) is datasets.Dataset and cast(datasets.Dataset, dataset).format["type"] != "custom"
