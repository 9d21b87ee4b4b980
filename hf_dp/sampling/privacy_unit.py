r"""A data set and one of its columns -> groups of records that are protected as one; of a drawn group, the record that
stands for it.

**Why that is private for a whole group.** A step keeps each of N groups with probability q, by itself, then takes one
of the group's records, each as likely as another, and clips its gradient to C. Without the group the released sum has
some law P; with it, and given which record j stands for it, (1-q) P + q P_j, where P_j is P moved by at most C. The
choice of j depends on nothing else, so the law with the group is the mean over j of laws that all are those of a
subsampled Gaussian of one record. The hockey-stick divergence, and exp((a-1) Rényi divergence), are jointly convex: the
mean is no worse than the worst. Hence epsilon is that of N records at the same q, however many records a group has, and
T steps compose as they do for records.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import datasets
import numpy as np
from numpy.typing import NDArray

from hf_dp.errors import ConfigError


class Groups(NamedTuple):
    """Records sorted by group: those of group g are `records[starts[g] : starts[g + 1]]`. [number of records] and [N +
    1].
    """

    records: NDArray[np.int64]
    starts: NDArray[np.int64]

    @property
    def num_groups(self) -> int:
        """N."""
        return len(self.starts) - 1

    def one_of_each(self, groups: NDArray[np.int64], uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        """One record of each of these groups, by a number from [0, 1) each; every record of a group is as likely as
        another.
        """
        sizes = self.starts[groups + 1] - self.starts[groups]
        return self.records[self.starts[groups] + (uniforms * sizes).astype(np.int64)]


def groups_by(dataset: Any, column: str | None) -> Groups | None:
    """The groups of records that have the same value in `column`, in the order in which they first come; None without a
    column, or data.

    Raises:
        ConfigError: no `datasets.Dataset`, no such column, or records whose value is missing or can't be compared.
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
    numbers: dict[Any, int] = {}
    group = np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)
    sizes = np.bincount(group, minlength=len(numbers))
    return Groups(np.argsort(group, kind="stable"), np.concatenate([[0], np.cumsum(sizes)]))
