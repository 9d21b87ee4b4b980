"""N, q, a secret key and a step's number -> this process's slice of one global Poisson draw."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from hf_dp.errors import ConfigError, HfDpError
from hf_dp.randomness import Key, Role, checked_key, keyed_stream
from hf_dp.sampling.privacy_unit import Groups

BLOCK = 1 << 20  # uniforms held at once
UNIT = 1 << 53  # uniforms are multiples of its inverse
NONE = np.zeros(0, dtype=np.int64)
T = TypeVar("T")


class Draw(list[T]):
    """What belongs to one draw (indices at first, later the records at these indices), with the draw's number.

    Where units own several records, `counts` says how many each unit has here, one unit after the other; it is empty
    where each record is a unit.
    """

    __slots__ = ("counts", "number")
    number: int
    counts: tuple[int, ...]

    def __init__(self, items: Iterable[T], number: int, counts: Iterable[int] = ()) -> None:
        super().__init__(items)
        self.number, self.counts = number, tuple(counts)


class PoissonSampler(Sampler[list[int]]):
    """Batches for a `DataLoader(batch_sampler=...)`: each keeps every record independently with probability q.

    Guarantee: under a secret key, record i is in draw t with probability `sample_rate`, rounded down to a multiple of
    2**-53, independently of every other record and draw. There is one global draw. Process r of W yields the slice
    kept[r::W] of the units, so the slices of all processes together are the draw, each unit once and whole. Nothing is
    capped, padded, shuffled or evened out. A slice may be empty: it is yielded as `[]`. The order within a draw is that
    of the data set, or of the groups.

    Iterating again yields fresh draws: no draw's number comes twice in the life of the object, even if an iterator was
    not exhausted.

    Args:
        units: N, the number of records; or N `Groups`, of which a kept one yields at most `most` of its records (see
            `privacy_unit`).
        sample_rate: q, 0 < q <= 1 (at 1 every draw is the whole set), or a function that gives it for a draw's number.
        num_batches: length of one iteration, 1 or more.
        key: 128 secret bits, the same on all processes, for Philox, or a `ChaChaKey`. None draws bits for Philox, which
            is right only if there is one process.
        process_index: this process, from 0.
        num_processes: W.

    Raises:
        ConfigError: a value out of range; names all of them.
    """

    def __init__(
        self,
        units: int | Groups,
        sample_rate: float | Callable[[int], float],
        num_batches: int,
        *,
        key: Key | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        self._groups = units if isinstance(units, Groups) else None
        num_examples = units.num_groups if isinstance(units, Groups) else units
        first_rate = sample_rate(0) if callable(sample_rate) else sample_rate
        wrong = [
            f"{name} must be {rule} (got {value})"
            for name, value, rule, right in (
                ("num_examples", num_examples, "1 or more", num_examples >= 1),
                ("sample_rate", first_rate, "above 0 and at most 1", 0 < first_rate <= 1),
                ("num_batches", num_batches, "1 or more", num_batches >= 1),
                ("num_processes", num_processes, "1 or more", num_processes >= 1),
                ("process_index", process_index, "from 0 to num_processes - 1", 0 <= process_index < num_processes),
            )
            if not right
        ]
        if wrong:
            raise ConfigError("PoissonSampler: " + "; ".join(wrong))
        self.num_examples = num_examples
        self.sample_rate = sample_rate
        self.num_batches = num_batches
        self.process_index = process_index
        self.num_processes = num_processes
        self._key = checked_key(key)
        self._next = 0

    @property
    def key(self) -> Key:
        """The secret that determines the draws: shared with the other processes, and never shown."""
        return self._key

    def draw(self, number: int) -> NDArray[np.int64]:
        """The whole draw, of all processes: indices of records, determined by (key, number) alone."""
        return self._records(number, slice(None))[0]

    def _records(self, number: int, of: slice) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Records of this slice of a draw's units, unit by unit; and how many each has, [] where each has one."""
        uniforms = keyed_stream(self._key, Role.SAMPLING, number)
        rate = self.sample_rate(number) if callable(self.sample_rate) else self.sample_rate
        threshold = math.floor(rate * UNIT) / UNIT
        parts = [
            start + np.flatnonzero(uniforms.random(min(BLOCK, self.num_examples - start)) < threshold)
            for start in range(0, self.num_examples, BLOCK)
        ]
        kept, groups = np.concatenate(parts), self._groups
        if groups is None:
            return kept[of], NONE
        own = uniforms.random(len(kept) * groups.most).reshape(len(kept), groups.most)
        records, counts = groups.some_of_each(kept[of], own[of])
        return records, counts if groups.most > 1 else counts[:0]

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.num_batches):
            number, self._next = self._next, self._next + 1
            of = slice(self.process_index, None, self.num_processes)
            mine, counts = (self.draw(number)[of], NONE) if self._groups is None else self._records(number, of)
            yield Draw(mine.tolist(), number, counts.tolist())

    def __reduce__(self) -> str:
        raise HfDpError(
            "a PoissonSampler holds a secret key and is not pickled; share its key, and make it where it is used"
        )
