r"""A data set and one of its columns -> groups of records that are protected as one; of a drawn group, one of its
records.

**Why a whole group is protected.** A step keeps each of N groups with probability q, independently. Of a group that is
kept it takes one record, each with the same probability, and clips its gradient to C. Let P be the law of the released
sum without the group. With the group, and given that record j would be taken, the law is (1-q) P + q P_j, where P_j is
P moved by at most C: the law of a subsampled Gaussian with one record. The choice of j depends on nothing else, so the
law with the group is the mean of these laws over j. The hockey-stick divergence, and exp((a-1) Rényi divergence), are
jointly convex, so the divergence of the mean is at most the greatest of theirs. Hence epsilon is that of N records at
the same q, however many records a group has, and T steps compose as they do for records.
"""

from collections.abc import Hashable
from typing import NamedTuple

import datasets
import numpy as np
from numpy.typing import NDArray

from hf_dp.errors import ConfigError


class Groups(NamedTuple):
    """Records sorted by group: those of group g are `records[starts[g] : starts[g + 1]]`.

    Attributes:
        records: indices into the data set, [number of records].
        starts: [N + 1].
    """

    records: NDArray[np.int64]
    starts: NDArray[np.int64]

    @property
    def num_groups(self) -> int:
        """N."""
        return len(self.starts) - 1

    def one_of_each(self, groups: NDArray[np.int64], uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        """One record of each of these groups, by a uniform number from [0, 1): a group's records are equally likely."""
        sizes = self.starts[groups + 1] - self.starts[groups]
        return self.records[self.starts[groups] + (uniforms * sizes).astype(np.int64)]


def groups_by(dataset: object, column: str | None) -> Groups | None:
    """Groups the records by their value in `column`; None if there is no column or no data set.

    Groups are numbered in the order of their first records.

    Raises:
        ConfigError: the data set is no `datasets.Dataset` or has no such column, or a record's value is missing or is
            not hashable.
    """
    if dataset is None or column is None:
        return None
    if not isinstance(dataset, datasets.Dataset):
        raise ConfigError(
            f"unit_column={column!r} needs a datasets.Dataset, whose column can be read (got a "
            f"{type(dataset).__name__}): datasets.Dataset.from_list makes one of records"
        )
    if column not in dataset.column_names:
        raise ConfigError(
            f"unit_column={column!r}: the training set has no such column (it has {', '.join(dataset.column_names)}); "
            "name the one that tells whose record it is"
        )
    values = dataset.with_format(None)[column][:]
    missing = [i for i, value in enumerate(values) if value is None or value != value]
    if missing:
        raise ConfigError(
            f"unit_column={column!r}: {len(missing):,} records have no value there; fill it in, or leave these records "
            "out"
        )
    if not all(isinstance(value, Hashable) for value in values):
        raise ConfigError(f"unit_column={column!r}: expected numbers or texts, got lists or mappings")
    numbers: dict[Hashable, int] = {}
    group = np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)
    sizes = np.bincount(group, minlength=len(numbers))
    return Groups(np.argsort(group, kind="stable"), np.concatenate([[0], np.cumsum(sizes)]))
