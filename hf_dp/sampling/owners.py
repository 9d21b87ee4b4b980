r"""The values of a column -> who owns which record; with a bound G, records of which nobody owns more than G.

**Several owners a record.** A record such as a chat belongs to everybody in its list of owners. Let A be the graph of
owners: A(i) is the set of those of record i. Two data sets are neighbours if A is the same in both and, for one owner
u, the records {i: u in A(i)} are empty in one of them; they keep their places, and contribute nothing. This is
fixed-graph differential privacy with emptied records (Ganesh, McKenna, McMahan, Smith and Wu 2025, "It's My Data Too:
Private ML for Datasets with Multi-User Training Examples", section 2). Of the records a set S is kept (contribution
bounding, section 4 there): in an order that follows from A, a record is kept if each of its owners has fewer than G
kept ones so far. What the proof needs of it:

    |{i in S: u in A(i)}| <= G  for each owner u;                                                        (1)
    S is a function of A, G and the places of the records, and of nothing that a record says.            (2)

**Why an owner is protected.** By (2), S, N = |S| and q = B / N are the same on both neighbours. Each record in S is
drawn by itself with probability q. Let J be the drawn ones that u owns, and let all other draws, dropout masks and
noise be the same on both. Where u's records are empty, those in J add zero, and elsewhere each adds a vector of norm C
at most. So the two sums differ by

    |sum - sum'| <= sum_{j in J} |clip(g_j)| <= |J| C,                                                   (3)

where |J| is Bin(n, q) and independent of the rest, with n <= G by (1). This is what `accounting/mixtures.py` accounts
for, with P the law without u's records: given J, P is moved by |J| C at most. It holds in both directions, and T steps
are dominated by T such mixtures. Section 3.2 of the paper comes to group privacy under Poisson sampling the same way.

**What is not protected.** A itself: who owns how many records, and together with whom. S, N and q follow from it, and
a model may show which records were kept. Nor is anybody protected in a record whose list lacks them.

**Why owners are emptied, not taken out.** A neighbour without u's records, or without u's name on them, has another
graph, and S may change far beyond u's records. Take G = 1 and the chain A(0) = {0, 1}, A(1) = {1, 2}, A(2) = {2, 3},
and so on. Going along it, records 0, 2, 4, ... are kept. Without owner 0's only record it is 1, 3, 5, ...: each kept
record is another, and the sum of a step with q = 1 may move by as many times C as there are records, not by G C. (By
the order below the chain's other end is kept in both cases, and no other record.) Where each record has one owner this
cannot happen, because what is kept of an owner follows from their own records alone.

**The order** is by the sum, over a record's owners, of how many records each of them has: that is how many places in
lists compete with its own, so the fewer, the fewer records it keeps out. Records of few owners, and of owners who are
in little else, come first; among equals, the order of the data. Of three made-up graphs of 20,000 records and 3,000
owners (`tests/sampling/test_owners.py` has them) this keeps from 2 to 35 % more than the order of the data does for G
of 1, 4 and 16, and as many as going by the number of owners alone, or up to 17 % more. An order by chance keeps as many
as that of the data.

**Names** are compared in Unicode's normal form C: an accented letter of one code point and its spelling with a
combining accent are the same owner. Within the bound that only protects more, as (1) holds for each spelling by itself.
"""

import ast
import json
import unicodedata
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_dp.errors import ConfigError

MOST_SHOWN = 5  # rows that an error lists
Names = tuple[object, ...]  # of one record's owners, as its list has them
LISTS = (list, tuple)


class Owners(NamedTuple):
    """Who owns which record. Owners are numbered in the order in which they first occur.

    Attributes:
        of_pairs: the owner in each pair of a record and one of its owners, record by record, [number of pairs].
        starts: record i's pairs are those from `starts[i]` to `starts[i + 1]`, at least one, [number of records + 1].
        in_lists: whether the column has a list for each record; otherwise each has one owner.
    """

    of_pairs: NDArray[np.int64]
    starts: NDArray[np.int64]
    in_lists: bool

    def sets(self) -> list[frozenset[int]]:
        """The owners of each record."""
        return [frozenset(of.tolist()) for of in np.split(self.of_pairs, self.starts[1:-1])]

    def kept(self, bound: int) -> NDArray[np.int64]:
        """Records of which nobody owns more than `bound`, ascending; of those left out, each has an owner of so many.

        It reads who owns which record, and the records' order.
        """
        sizes = np.bincount(self.of_pairs)
        competing = np.add.reduceat(sizes[self.of_pairs], self.starts[:-1])
        room, kept = np.full(len(sizes), bound), []
        for record in np.argsort(competing, kind="stable"):
            of = self.of_pairs[self.starts[record] : self.starts[record + 1]]
            if room[of].all():
                room[of] -= 1
                kept.append(record)
        return np.sort(np.array(kept, dtype=np.int64))


def owners_of(values: Sequence[object], column: str) -> Owners:
    """Who owns which record, by the values of a column: a name or number each, or a list of them each.

    Who is in a list twice is one owner.

    Raises:
        ConfigError: there are no records; or values are missing, empty lists, lists within lists, mappings, texts that
            are written like lists, or lists in some records alone. Names all of it, with the numbers of rows and
            nothing that stands in them.
    """
    in_lists = any(isinstance(value, LISTS) for value in values)
    names = [tuple(value) if isinstance(value, LISTS) else (value,) for value in values]
    wrong = list(_problems(values, names, in_lists))
    if wrong:
        raise ConfigError(f"unit_column={column!r}: {'; '.join(wrong)}")
    numbers: dict[object, int] = {}
    of = [list(dict.fromkeys(numbers.setdefault(_normal(name), len(numbers)) for name in some)) for some in names]
    starts = np.concatenate([[0], np.cumsum([len(some) for some in of], dtype=np.int64)])
    return Owners(np.array([owner for some in of for owner in some], dtype=np.int64), starts, in_lists)


def _normal(name: object) -> object:
    return unicodedata.normalize("NFC", name) if isinstance(name, str) else name


def _problems(values: Sequence[object], names: Sequence[Names], in_lists: bool) -> Iterator[str]:
    if not values:
        yield "there are no records"
    found = _rows(i for i, some in enumerate(names) if any(map(_is_missing, some)))
    if found:
        yield f"{found} no value there, or none in a place of a list; fill it in, or leave these records out"
    found = _rows(i for i, some in enumerate(names) if not some)
    if found:
        yield f"{found} an empty list there: nobody's records, which nothing would protect; name their owners"
    found = _rows(i for i, some in enumerate(names) if not all(map(_is_name, some)))
    if found:
        yield f"{found} a list within a list there, or a mapping; expected names or numbers"
    found = _rows(i for i, some in enumerate(names) if any(map(_is_written_list, some)))
    if found:
        yield (
            f"{found} a text that is written like a list there, which would be one owner, and nobody whom it names; "
            "give lists, from a file that has them (JSON Lines, Parquet) and in all records"
        )
    found = _rows(i for i, value in enumerate(values) if in_lists and not isinstance(value, (*LISTS, type(None))))
    if found:
        yield f"{found} one value there where others have a list; write it as a list of one"


def _is_missing(name: object) -> bool:
    return name is None or (isinstance(name, float) and name != name)


def _is_name(name: object) -> bool:
    return isinstance(name, Hashable) and not isinstance(name, tuple)


def _is_written_list(name: object) -> bool:
    """Whether a text is a list as JSON or Python writes it. A CSV file has no other, and where some records of a file
    have a list and others a name, a recipe makes texts of all.
    """
    if not (isinstance(name, str) and name.startswith("[") and name.endswith("]")):
        return False
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return isinstance(read(name), list)
    return False


def _rows(found: Iterable[int]) -> str:
    """`3 records (rows 0, 4 and 7, counted from 0) have`, or "" for none."""
    rows = list(found)
    if not rows:
        return ""
    shown, more = ", ".join(map(str, rows[:MOST_SHOWN])), len(rows) - MOST_SHOWN
    places = f"row{'s' * (len(rows) > 1)} {shown}{f' and {more:,} more' if more > 0 else ''}, counted from 0"
    return f"{len(rows):,} records ({places}) have" if len(rows) > 1 else f"1 record ({places}) has"
