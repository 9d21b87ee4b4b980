"""Micro-batches as they were collated -> whether they hold the same when a step takes them.

Clipping bounds an example; in a batch that is changed on its way, examples may meet.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_dp.errors import CaptureError
from hf_dp.per_example import Batch, MicroBatch, Path, Record, checksums, leaves, same
from hf_dp.sampling.microbatch import FAILURE, MICRO_BATCHES, SIZES, Container, LogicalBatchCollator, micro_batches

SEALS = "seals"  # a container's key


@dataclass(frozen=True)
class Seals:
    """What micro-batches held when this was made. It is not moved to a device, as a list would be.

    Attributes:
        each: of every micro-batch its number of examples, and its leaves by path: type, shape and checksum of a
            tensor, and a copy of anything else.
    """

    each: tuple[tuple[int, Mapping[Path, Any]], ...]

    @classmethod
    def of(cls, batches: Sequence[Batch], sizes: Sequence[int]) -> "Seals":
        """Of batches of so many examples each."""
        return cls(tuple((size, _contents(batch)) for batch, size in zip(batches, sizes, strict=True)))

    def refuse_others(self, batches: Sequence[Any], sizes: Sequence[int], remedy: str) -> None:
        """Compares what was sealed with what there is now, on whatever device.

        Raises:
            CaptureError: other micro-batches, or one that holds something else.
        """
        try:
            alike = [*sizes] == [size for size, _ in self.each] and all(
                _hold_the_same(held, _contents(batch)) for (_, held), batch in zip(self.each, batches, strict=True)
            )
        except (AttributeError, TypeError, ValueError):  # no batches at all
            alike = False
        if not alike:
            raise CaptureError(
                "expected the micro-batches of the draw as they were collated, got others: clipping bounds an example, "
                f"and in a batch that is changed later, examples may meet. {remedy}"
            )


class Sealing:
    """Collates a draw as `cut` does, and seals the container."""

    def __init__(self, cut: LogicalBatchCollator) -> None:
        self._cut = cut

    def __call__(self, features: list[Record]) -> Container:
        """The container, with its seals if there was no failure."""
        container = self._cut(features)
        if FAILURE not in container:
            container[SEALS] = Seals.of(container[MICRO_BATCHES], container[SIZES])
        return container


def sealed_micro_batches(container: Container) -> Iterator[MicroBatch]:
    """As `micro_batches`, of a container that `Sealing` made.

    Raises:
        CaptureError: a record could not be read or collated; or the container holds something else by now.
    """
    if FAILURE not in container:
        remedy = "Change a record in data_collator, which is given each by itself"
        container.get(SEALS, Seals(())).refuse_others(container[MICRO_BATCHES], container[SIZES], remedy)
    yield from micro_batches(container)


def _contents(batch: Batch) -> dict[Path, Any]:
    found = leaves(batch)
    tensors = {str(path): leaf for path, leaf in found.items() if isinstance(leaf, Tensor)}
    sums = checksums(tensors)
    return {
        path: (leaf.dtype, leaf.shape, sums[str(path)]) if isinstance(leaf, Tensor) else copy.deepcopy(leaf)
        for path, leaf in found.items()
    }


def _hold_the_same(before: Mapping[Path, Any], now: Mapping[Path, Any]) -> bool:
    return before.keys() == now.keys() and all(same(leaf, now[path]) for path, leaf in before.items())
