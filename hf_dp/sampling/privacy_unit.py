r"""A data set and one of its columns -> groups of records that are protected as one; of a drawn group, at most k of its
records.

**Why a whole group is protected.** A step keeps each of N groups with probability q, independently. Of a group that is
kept it takes k records (all, if it has no more), each choice of k with the same probability, and clips the mean of
their gradients to C (user-level sampling: Charles et al. 2024, "Fine-Tuning Large Language Models with User-Level
Differential Privacy", DP-SGD-ULS). Let P be the law of the released sum without the group. With the group, and given
that the choice J of its records would be taken, the law is (1-q) P + q P_J, where P_J is P moved by at most C: the law
of a subsampled Gaussian with one record. The choice of J depends on nothing else, so the law with the group is the mean
of these laws over J. The hockey-stick divergence, and exp((a-1) Rényi divergence), are jointly convex, so the
divergence of the mean is at most the greatest of theirs. Hence epsilon is that of N records at the same q, however many
records a group has, and T steps compose as they do for records.

Each kept group is given k uniform numbers, whatever it needs of them: so which of its records are taken depends on its
own number of records and on secret randomness, and on no other group's records.

**Where records are drawn.** With a contribution bound G (DP-SGD-ELS there), the first G records of each group are kept:
which these are depends on that group alone. Each kept record is then drawn by itself, with probability q, and clipped
to C. N counts kept records, and is public: neighbours differ in the kept records of one group, which are empty in one
of the two. Without the group the law is P; given that a set J of its kept records would be drawn, it is P moved by a
vector of norm |J| C at most. |J| is Bin(G, q) or, for a group with fewer records, stochastically smaller. So a step is
dominated by the mixture of Gaussians of `accounting/mixtures.py`, in both directions, and T steps by T of them. The
same holds where a record has several owners, if who owns which record is the same in both (`sampling/owners.py`).
"""

from typing import NamedTuple

import datasets
import numpy as np
from numpy.typing import NDArray

from hf_dp.errors import ConfigError
from hf_dp.sampling.owners import Owners, owners_of


class Groups(NamedTuple):
    """Records sorted by group: those of group g are `records[starts[g] : starts[g + 1]]`.

    Attributes:
        records: indices into the data set, [number of records].
        starts: [N + 1].
        most: k, of how many records of a drawn group at most the mean gradient is taken.
        shared: whether a record may have several owners; each that is kept is then a group of its own.
    """

    records: NDArray[np.int64]
    starts: NDArray[np.int64]
    most: int = 1
    shared: bool = False

    @property
    def num_groups(self) -> int:
        """N."""
        return len(self.starts) - 1

    def differ(self, other: "Groups") -> bool:
        """Whether the other groups have other records, or the same in another order."""
        return not (np.array_equal(self.records, other.records) and np.array_equal(self.starts, other.starts))

    def some_of_each(
        self, groups: NDArray[np.int64], uniforms: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """k records of each of these groups, or all where there are no more: each choice is equally likely.

        It is Floyd's way to choose k of n: for j from n - k to n - 1, a random one of 0 to j, or j if that is chosen
        already (Bentley and Floyd 1987, "A sample of brilliance").

        Args:
            groups: their numbers, [U].
            uniforms: from [0, 1), [U, k].

        Returns:
            Indices of records, group by group; and how many there are of each group, [U].
        """
        sizes = self.starts[groups + 1] - self.starts[groups]
        chosen = np.full((len(groups), self.most), -1, dtype=np.int64)  # among a group's own; -1 for none
        for i in range(self.most):
            top = sizes - self.most + i  # j; below 0 where a group has too few records for k of them
            drawn = (uniforms[:, i] * (top + 1)).astype(np.int64)
            drawn = np.where((chosen[:, :i] == drawn[:, None]).any(1), top, drawn)
            chosen[:, i] = np.where(sizes > self.most, drawn, np.where(i < sizes, i, -1))
        taken = chosen >= 0
        return self.records[(self.starts[groups][:, None] + chosen)[taken]], taken.sum(1)


def groups_by(dataset: object, column: str | None, most: int = 1, bound: int | None = None) -> Groups | None:
    """Groups the records by their value in `column`; None if there is no column or no data set.

    Groups are numbered in the order of their first records. Texts are compared in Unicode's normal form C.

    Args:
        dataset: the records.
        column: whose value tells whose record it is.
        most: k, of how many records of a drawn group at most the mean gradient is taken.
        bound: G. Then the first G records of each value are kept, and each is drawn by itself: a group of its own. A
            value may then be a list of owners, and what is kept is as `Owners.kept` says.

    Raises:
        ConfigError: as `owners_in`; or there are lists and no `bound`.
    """
    if dataset is None or column is None:
        return None
    owners = owners_in(dataset, column)
    if owners.in_lists and bound is None:
        raise ConfigError(
            f"unit_column={column!r}: expected one name or number a record, got lists of owners. Who owns a record "
            "with others cannot be drawn by themselves, so have records drawn, of each owner G at most: set "
            "contribution_bound=G, and leave records_per_unit out. Or give the same value to all records that share a "
            "person, directly or through others, as threads or teams do"
        )
    if owners.in_lists and bound is not None:
        kept = owners.kept(bound)
        return Groups(kept, np.arange(len(kept) + 1), shared=True)
    group = owners.of_pairs
    records, starts = np.argsort(group, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(group))])
    if bound is None:
        return Groups(records, starts, most)
    kept = records[np.arange(len(records)) - starts[group[records]] < bound]
    return Groups(kept, np.arange(len(kept) + 1))


def owners_in(dataset: object, column: str) -> Owners:
    """Who owns which of these records, by `column`, whatever the data set's transforms.

    Raises:
        ConfigError: the data set is no `datasets.Dataset` or has no such column, or as `owners_of`.
    """
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
    return owners_of(dataset.with_format(None)[column][:], column)
