"""One draw's records -> length-sorted micro-batches within a token budget, in one container.

How a draw is cut into micro-batches is a matter of speed and memory alone: the sum over its examples stays the same.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch

from hf_dp.errors import CaptureError, ConfigError
from hf_dp.per_example import MicroBatch, Owned, Record
from hf_dp.randomness import fork_forward_rng
from hf_dp.sampling.compact import narrowed, widened
from hf_dp.sampling.poisson import Draw
from hf_dp.sampling.reading import INPUTS, Failure

Container: TypeAlias = dict[str, Any]  # a draw on its way to a step: the keys below
MICRO_BATCHES = "micro_batches"
SIZES = "sizes"
BESIDE = "beside"
FAILURE = "failure"
DRAW_NUMBER = "draw_number"
# What one more pass costs beside its tokens, expressed in tokens. Measured on a CPU core: 55 (BERT of 22 M parameters)
# to 90 (Llama of 3 M). A GPU is faster at tokens, but not at starting a pass.
TOKENS_OF_A_PASS = {"cpu": 64, "other": 512}
UNUSUAL = 16  # the part of its tokens that a pass over an unusual number of examples counts more


def tokens_of_a_pass(device: torch.device) -> int:
    """What starting one more pass on this device costs, expressed in tokens."""
    return TOKENS_OF_A_PASS.get(device.type, TOKENS_OF_A_PASS["other"])


def split(
    lengths: Sequence[int],
    max_examples: int,
    max_tokens: int | None,
    pass_cost: int,
    counts: Sequence[int] | None = None,
) -> list[list[int]]:
    """Cuts units of these lengths into groups of similar length. Each unit is one example, or as many as `counts` says,
    all as long as the longest of them.

    A group has at most `max_examples` examples, and at most `max_tokens` tokens once all are padded to the longest. A
    unit that is larger makes a group of its own. Units are sorted by length; of all ways to cut the sorted units into
    groups, this one has the fewest tokens, where padding counts and each group costs `pass_cost` more, and a sixteenth
    of its tokens if it has another number of examples than a power of two or `max_examples`: each length and number is
    traced when it is first met, so that few numbers save passes. It is found by dynamic programming, in n steps of at
    most `max_examples` comparisons.

    Returns:
        For each group the indices of its units, every index once, longest first.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    descending = np.array([lengths[i] for i in order], dtype=np.int64)
    examples = np.cumsum([0, *(1 if counts is None else counts[i] for i in order)])
    cost = np.zeros(len(order) + 1, dtype=np.int64)  # cost[j]: of the first j examples, cut in the cheapest way
    start = np.zeros(len(order) + 1, dtype=np.int64)  # start[j]: where the last group of that way begins
    for end in range(1, len(cost)):
        first = max(0, end - max_examples)
        held = examples[end] - examples[first:end]  # of a group that begins at each place
        padded = held * descending[first:end]
        too_large = (held > max_examples) | (padded > (math.inf if max_tokens is None else max_tokens))
        first += min(int(too_large.sum()), end - first - 1)  # the single last unit stays
        padded, held = padded[first - end :], held[first - end :]
        is_usual = (held & (held - 1) == 0) | (held == max_examples)
        total = cost[first:end] + padded + np.where(is_usual, 0, padded // UNUSUAL)
        best = int(total.argmin())
        cost[end], start[end] = total[best] + pass_cost, first + best
    groups, end = [], len(order)
    while end:
        groups.append(order[start[end] : end])
        end = start[end]
    return groups[::-1]


def micro_batches(container: Mapping[str, Any]) -> Iterator[MicroBatch]:
    """The micro-batches of a container, one after the other, as they were collated.

    Raises:
        CaptureError: a record of the draw could not be read or collated.
    """
    if FAILURE in container:
        raise CaptureError(container[FAILURE])
    batches, sizes = container[MICRO_BATCHES], container[SIZES]
    beside = container[BESIDE].each if BESIDE in container else [((), None)] * len(batches)
    for batch, size, (records, owned) in zip(batches, sizes, beside, strict=True):
        yield MicroBatch(widened(batch), size, records, owned)


def feature_length(feature: Record) -> int:
    """Number of `input_ids` of a record; of a record without any, 0 if its sound or picture is empty, else 1."""
    if not isinstance(feature, Mapping):
        return 1
    if "input_ids" in feature:
        return len(cast(Sized, feature["input_ids"]))
    about = next((feature[name] for name in INPUTS if name in feature), None)
    return min(1, len(about)) if isinstance(about, Sized) else 1


@dataclass(frozen=True)
class Beside:
    """`records` and `owned` of each micro-batch. They are not moved to a device, as those in a list would be."""

    each: list[tuple[Sequence[Record], Owned | None]]


def _contained(made: Sequence[MicroBatch]) -> Container:
    is_there = any(batch.records or batch.owned for batch in made)
    beside = {BESIDE: Beside([(batch.records, batch.owned) for batch in made])} if is_there else {}
    return {MICRO_BATCHES: [narrowed(batch) for batch in made], SIZES: [batch.size for batch in made], **beside}


class LogicalBatchCollator:
    """Collates one draw into a container: `{"micro_batches": [batch, ...], "sizes": [number of examples, ...]}`.

    Both lists are empty for an empty draw. `micro_batches` reads them back, with the records of padded examples and the
    units that own several. If the records come as a `Draw`, the container has its number too, as "draw_number". The
    container has no top-level `labels` or `input_ids`, so Trainer counts no tokens in it, and it is a plain dict, so it
    is moved to a device like any batch.

    `collate` runs under secret randomness, because masking tokens from a public seed would couple the examples of a
    batch. A record without a single token counts as drawn and contributes nothing. If a record cannot be collated, the
    container holds a "failure" instead, and the step that takes the draw fails: so the draw is charged before anybody
    sees the training stop for it.

    Args:
        collate: list of records -> micro-batches of them; a `Collation`. It gets each record once, `packed`.
        max_examples: the most examples of a micro-batch.
        max_tokens: the most tokens of a micro-batch after padding, None for no bound.
        pass_cost: how many tokens one more micro-batch must save to be worth its pass; see `tokens_of_a_pass`.
        length_of: record -> length in tokens; by default the number of its `input_ids`.

    Raises:
        ConfigError: a bound below 1.
    """

    def __init__(
        self,
        collate: Callable[[list[Record]], list[MicroBatch]],
        max_examples: int,
        max_tokens: int | None = None,
        pass_cost: int = TOKENS_OF_A_PASS["cpu"],
        length_of: Callable[[Record], int] = feature_length,
    ) -> None:
        if max_examples < 1 or (max_tokens is not None and max_tokens < 1):
            raise ConfigError(
                f"a micro-batch needs room for 1 example and 1 token (got max_examples={max_examples}, "
                f"max_tokens={max_tokens})"
            )
        self.collate = collate
        self.max_examples = max_examples
        self.max_tokens = max_tokens
        self.pass_cost = pass_cost
        self.length_of = length_of

    def __call__(self, features: list[Record]) -> Container:
        """The container of these records, which are not changed."""
        number = {DRAW_NUMBER: features.number} if isinstance(features, Draw) else {}
        failures = [feature for feature in features if isinstance(feature, Failure)]
        if not failures:
            try:
                made = self._collated(features)
                return _contained(made) | number
            except Exception as error:
                failures = [Failure.of(error, "collated")]
        return {FAILURE: str(failures[0]), **number}

    def _collated(self, features: list[Record]) -> list[MicroBatch]:
        units = [[r for r in unit if self.length_of(r)] for unit in _by_unit(features)]
        units = [unit for unit in units if unit]
        alike: dict[int, list[list[Record]]] = {}  # in a pass, each unit takes the room of the one with most records
        for unit in units:
            alike.setdefault((len(unit) - 1).bit_length(), []).append(unit)
        with fork_forward_rng():
            return [
                batch
                for some in alike.values()
                for group in self._split([max(map(self.length_of, unit)) for unit in some], [*map(len, some)])
                for batch in self._of_units([some[i] for i in group])
            ]

    def _split(self, lengths: list[int], counts: list[int] | None = None) -> list[list[int]]:
        return split(lengths, self.max_examples, self.max_tokens, self.pass_cost, counts)

    def _of_units(self, units: list[list[Record]]) -> list[MicroBatch]:
        """Micro-batches of these units: one, or several where its records can't share it."""
        counts = tuple(map(len, units))
        is_too_large = len(units) == 1 and len(self._split([max(map(self.length_of, units[0]))] * counts[0])) > 1
        if not is_too_large or counts == (1,):
            made = self.collate([record for unit in units for record in unit])
            if {*counts} == {1}:
                return made
            if len(made) == 1 and made[0].size == sum(counts):
                return [made[0].owned_by(Owned(counts))]
        return [part for unit in units for part in self._in_parts(unit)]

    def _in_parts(self, unit: list[Record]) -> list[MicroBatch]:
        """The micro-batches of one unit whose records take several."""
        groups = self._split([self.length_of(record) for record in unit])
        made = [batch for group in groups for batch in self.collate([unit[i] for i in group])]
        whole = sum(batch.size for batch in made)
        return [
            batch.owned_by(Owned((batch.size,), whole, last=batch is made[-1])) if whole > 1 else batch
            for batch in made
        ]


def _by_unit(features: list[Record]) -> list[list[Record]]:
    """The records of each unit; each record by itself where a draw says nothing of units."""
    counts = features.counts if isinstance(features, Draw) and features.counts else (1,) * len(features)
    ends = np.cumsum(counts).tolist()
    return [features[end - count : end] for end, count in zip(ends, counts, strict=True)]
