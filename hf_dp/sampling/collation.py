"""A collator and made-up records -> micro-batches in which no record influences another record's row.

Each record is collated by itself; the results are padded and stacked. So whatever the collator would do with several
records (mix them, cut them into windows, normalise over the padding, drop one), it only ever sees one. How to pad is
learnt from public, made-up records: they are collated together and each alone, and the two are compared. If padding and
stacking do not reproduce what the collator makes of all of them together, each record has a pass of its own.

The padding collators of transformers, trl and torch are given several records at once, which is faster, if on the
made-up records both ways gave the same, and as long as all records have the same columns of the same types.
"""

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hf_dp.errors import CaptureError, ConfigError, HfDpError
from hf_dp.per_example import (
    LEFT,
    RIGHT,
    Batch,
    Leaf,
    MicroBatch,
    Padding,
    Path,
    Record,
    Untied,
    as_units,
    is_tied,
    leaves,
    pad_and_join,
    same,
    sizes_of,
    stacked,
)
from hf_dp.randomness import fork_forward_rng
from hf_dp.sampling.compact import unpacked
from hf_dp.sampling.known_collators import is_known, unwrapped
from hf_dp.sampling.reading import INPUTS
from hf_dp.sampling.repeats import refuse_what_remembers

Collate: TypeAlias = Callable[[list[Record]], Any]  # what it returns is made a mapping by `as_mapping`
WHY_ROWS = (
    "clipping bounds what one record adds, so it must be one row. Cut the records before training (datasets.map), let "
    "PrivacyConfig(unit_column=...) name the record that each piece came from, and have the collator make one row of "
    "each"
)

FOR_CHECKS = "made up for the checks, or given as check_records"
PASS_RECORDS = "pass check_records=[...], a few public records of different lengths that it takes"

REPEATED = 3  # records that are collated again and again

NUMBER_LABELS = "its label is a text: make labels numbers (for classes, dataset.class_encode_column)"


class Collation:
    """Makes micro-batches of groups of records.

    Args:
        collate: a list of records -> a mapping, or a tuple, of tensors.
        made_up: public records on which the collator is tried. If all of them have one length, shorter copies are added
            where the collator takes them, so that padding can be seen.

    Attributes:
        apart: why each record has a pass of its own; None where records share one.
        tried: the records on which the collator was tried.
        pads: whether these have several lengths; else the collator takes no others together.

    Raises:
        ConfigError: the collator fails on the made-up records, does not make one row of each of them, or keeps
            something from one call to the next.
    """

    def __init__(self, collate: Collate, made_up: Sequence[Record]) -> None:
        self._collate = collate
        self._paddings: dict[Path, Padding] = {}
        # first of all, for what a collator does to records that it saw before is not what it does to new ones
        refuse_what_remembers(
            "the collator",
            partial(_if_taken, collate),
            several_lengths(made_up)[-REPEATED:],
            holder=unwrapped(collate),
        )
        with fork_forward_rng():
            self.tried, alone, again, together = _tried(collate, made_up)
        self.apart = self._learn(alone, again, together)
        self._takes_several = self.apart is None and is_known(collate)
        self.pads = len({_sizes(record) for record in self.tried}) > 1

    def __call__(self, records: list[Record]) -> list[MicroBatch]:
        """One micro-batch of these records, or one micro-batch for each of them.

        Args:
            records: `packed` or not. A record without a single token is left out.

        Raises:
            CaptureError: the collator does not make one row of each record. The message tells nothing of the record.
        """
        together = self._takes_several and (self.pads or not _if_padded(records))
        if together and len(records) > 1 and _alike(records):
            batch = as_mapping(self._collate([unpacked(record) for record in records]))
            if not is_tied(batch, len(records)):
                raise CaptureError(f"the collator did not make one row of each record: {WHY_ROWS}")
            return [MicroBatch(batch, len(records), _if_padded(records))]
        kept, alone = self._each(records)
        if self.apart is None and alone:
            try:
                batch = stacked(alone, self._paddings)
            except Untied:
                return alone
            padded = any(sizes_of(one) != sizes_of(batch) for one in alone)
            return [MicroBatch(batch, batch.size, kept if padded else ())]
        return alone

    def alone(self, records: Sequence[Record]) -> list[MicroBatch]:
        """A micro-batch for each record that has tokens.

        Raises:
            CaptureError: as a call.
        """
        return self._each(records)[1]

    def _each(self, records: Sequence[Record]) -> tuple[list[Record], list[MicroBatch]]:
        """The records that have tokens, and the micro-batch of each."""
        made = [as_mapping(self._collate([unpacked(record)])) for record in records]
        kept = [i for i, batch in enumerate(made) if not is_empty(batch)]
        for i in kept:
            _refuse_other_rows(made[i], CaptureError)
        return [records[i] for i in kept], [MicroBatch(made[i], 1) for i in kept]

    def together_and_alone(self, records: list[Record]) -> list[MicroBatch]:
        """What checks compare, each record collated once.

        Returns:
            First all records in one micro-batch, or the first record alone if records never share one; then each alone.
        """
        alone = self.alone(copy.deepcopy(records))
        try:
            whole = alone[0] if self.apart is not None else stacked(alone, self._paddings)
        except Untied:
            whole = alone[0]
        return [whole, *alone]

    def _learn(self, alone: list[Batch], again: list[Batch], together: Batch) -> str | None:
        """Learns the paddings from the made-up records.

        Args:
            alone: each record collated alone.
            again: each record collated alone a second time: leaves that differ are drawn at random, and their values
                are not compared, only what they are padded with.
            together: all records collated at once.

        Returns:
            Why padding and stacking do not reproduce `together`, or None if they do.
        """
        whole, *found = (leaves(batch) for batch in (together, *alone))
        drawn = {
            path for a, b in zip(found, map(leaves, again), strict=True) for path in a if not same(a[path], b.get(path))
        }
        if any(one.keys() != whole.keys() for one in found):
            return "the collator gives other members for one record than for several"
        for path, leaf in whole.items():
            padding = _padding(leaf, [one[path] for one in found], is_drawn=path in drawn)
            if padding is not None:
                self._paddings[path] = padding
        try:
            made = leaves(stacked(alone, self._paddings))
        except Untied:
            return f"what the collator makes of one record does not stack{self._remedy()}"
        if any(not same(made.get(path), leaf) for path, leaf in whole.items() if path not in drawn):
            return f"the collator makes something else of several records than of each alone{self._remedy()}"
        return None

    def _remedy(self) -> str:
        given = getattr(unwrapped(self._collate), "model", None) is not None
        return "; leave out its model=, for the model shifts its labels by itself" if given else ""


class OfUnits:
    """A collator that makes `unit_rows` rows of each record -> one that makes a unit of it, [1, unit_rows, ...].

    Several records are laid out as trl's collators for preferences do: the first row of each, then the second of each.

    Raises:
        CaptureError: on a call, if it makes another number of rows. The message tells nothing of the records.
    """

    def __init__(self, collate: Collate, unit_rows: int) -> None:
        self.collate, self.unit_rows = collate, unit_rows

    def __call__(self, records: list[Record]) -> Batch:
        """A batch that leads with the units, see `units.as_units`."""
        batch = as_mapping(self.collate(records))
        try:
            return as_units(batch, len(records), self.unit_rows) if batch else batch
        except Untied:
            raise CaptureError(
                f"the collator did not make {self.unit_rows} rows of each record, which are clipped as one: return "
                f"tensors with {self.unit_rows} rows, or one, for each record"
            ) from None


@contextmanager
def taken_by_the_model() -> Iterator[None]:
    """Around checks: turns an error that the model or its loss raises on made-up records into one with a remedy.

    Raises:
        ConfigError: instead of that error.
    """
    try:
        yield
    except (HfDpError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ConfigError(
            f"the model or its loss failed on records {FOR_CHECKS} ({_said(error)}): {PASS_RECORDS}"
        ) from error


def as_mapping(batch: object) -> Batch:
    """What a collator returned, by name; the members of a tuple are named 0, 1, ..."""
    if isinstance(batch, Mapping):
        return dict(batch)
    return {str(i): member for i, member in enumerate(batch if isinstance(batch, (tuple, list)) else [batch])}


def is_empty(batch: Batch) -> bool:
    """Whether a record's batch has nothing to train on: no leaf at all, no token, or an empty sound or picture."""
    about = next((batch[name] for name in INPUTS if name in batch), None)
    return not batch or (isinstance(about, Tensor) and not about.numel())


def several_lengths(records: Sequence[Record]) -> list[Record]:
    """The records; if all have one length, also shorter copies of the first: else no padding would be seen."""
    lengths = [_length(record) for record in records]
    if len(set(lengths)) > 1 or not lengths or lengths[0] < 2:
        return list(records)
    return [*records, *of_lengths(records[0], (lengths[0] // 2, 1))]


def of_lengths(record: Record, lengths: Sequence[int]) -> list[Record]:
    """A record of each length: its sequences are cut, or gone through again from their first element on."""
    return [_resized(record, _length(record), to) for to in lengths]


def _if_taken(collate: Collate, record: Record) -> Batch | None:
    """A record collated alone; None if the collator does not take it."""
    try:
        return as_mapping(collate([copy.deepcopy(record)]))
    except Exception:
        return None


def _tried(collate: Collate, made_up: Sequence[Record]) -> tuple[list[Record], list[Batch], list[Batch], Batch]:
    """Tries the collator on the made-up records: with shorter copies among them if it takes these, else without; and
    all of one length, if it takes no others together.

    Returns:
        The records that have tokens; each collated alone; each collated alone once more; all of them collated together,
        {} if the collator does not take several.
    """
    lengths = [_length(record) for record in made_up]
    ways = [several_lengths(made_up), list(made_up)]
    if len(set(lengths)) > 1:
        ways.append([_resized(record, length, lengths[0]) for record, length in zip(made_up, lengths, strict=True)])
    found: list[tuple[list[Record], list[Batch], list[Batch], Batch]] = []
    for records in ways:
        try:
            alone, again = ([as_mapping(collate([copy.deepcopy(r)])) for r in records] for _ in range(2))
        except Exception as error:
            if len(records) > len(made_up) or found:
                continue
            if isinstance(error, HfDpError):
                raise ConfigError(str(error)) from error
            remedy = NUMBER_LABELS if any(map(_has_text_for_label, records)) else PASS_RECORDS
            raise ConfigError(f"the collator failed on a record {FOR_CHECKS} ({_said(error)}): {remedy}") from error
        for batch in alone:
            _refuse_other_rows(batch, ConfigError)
        kept = [i for i, batch in enumerate(alone) if not is_empty(batch)]
        if not kept:
            raise ConfigError(f"the collator makes nothing of the records {FOR_CHECKS}: {PASS_RECORDS}")
        records, alone, again = ([those[i] for i in kept] for those in (records, alone, again))
        try:
            return records, alone, again, as_mapping(collate(copy.deepcopy(records)))
        except Exception:  # shorter ones don't go with the others: it doesn't pad; or it takes one record at a time
            found.append((records, alone, again, {}))
    return found[1 - len(ways)]  # the records as they are


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def _refuse_other_rows(batch: Batch, error: type[Exception]) -> None:
    """Raises `error` if the batch of one record has labels that are not one row."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() and len(labels) != 1:
        raise error(f"the collator made {'several rows' if len(labels) else 'no row'} of one record: {WHY_ROWS}")


def _has_text_for_label(record: Record) -> bool:
    return isinstance(record, Mapping) and any(isinstance(record.get(name), str) for name in ("labels", "label"))


def _padding(whole: Leaf, parts: list[Leaf], *, is_drawn: bool) -> Padding | None:
    """How the parts were padded in the whole.

    Returns:
        None if nothing was padded, or if no constant on one side explains it.
    """
    if not all(isinstance(leaf, Tensor) for leaf in (whole, *parts)) or len({p.shape for p in parts}) == 1:
        return None
    for side in (RIGHT, LEFT):
        try:
            inside = pad_and_join([torch.ones_like(p) for p in parts], Padding(0, side))
        except Untied:
            return None
        outside = whole[inside == 0] if inside.shape == whole.shape else whole.new_zeros(0)
        if len(outside) and bool((outside == outside[0]).all()):
            padding = Padding(outside[0].item(), side)
            if is_drawn or same(pad_and_join(parts, padding), whole):
                return padding
    return None


def _if_padded(records: list[Record]) -> list[Record]:
    """The records, if one of them is padded to the length of another; else none."""
    return records if len({_sizes(record) for record in records}) > 1 else []


def _alike(records: list[Record]) -> bool:
    """Whether all records have the same columns of the same types; else one could decide how another is collated."""
    kinds = {_kind(record) for record in records}
    return len(kinds) == 1 and None not in kinds


def _kind(value: Record) -> Hashable:
    if isinstance(value, Mapping):
        return tuple((name, _leaf_kind(member)) for name, member in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(map(_leaf_kind, value))
    return _leaf_kind(value)


def _leaf_kind(value: Leaf) -> Hashable:
    if isinstance(value, (list, tuple)):
        types = frozenset(map(type, value))
        return list, frozenset(map(_leaf_kind, value)) if types & {list, tuple, dict} else types
    if isinstance(value, Mapping):
        return _kind(value)
    if isinstance(value, (Tensor, np.ndarray)):
        return type(value), value.dtype, value.ndim
    kind: type = type(value)
    return kind


def _length(record: Record) -> int:
    named = record.get("input_ids") if isinstance(record, Mapping) else None
    return len(named) if named is not None else max(_sizes(record), default=0)


def _sizes(record: Record) -> tuple[int, ...]:
    """How many elements each member of a record has; 0 of what is no sequence."""
    members = record.values() if isinstance(record, Mapping) else record
    return tuple(map(_size, members if isinstance(record, (Mapping, tuple, list)) else [record]))


def _size(value: object) -> int:
    if isinstance(value, (Tensor, np.ndarray)):
        return len(value) if value.ndim == 1 else 0
    return len(value) if isinstance(value, list) else 0


def _resized(record: Record, length: int, to: int) -> Record:
    """A copy of the record in which sequences of length `length` have `to` elements."""
    if isinstance(record, Mapping):
        return {name: _resized(member, length, to) for name, member in record.items()}
    if isinstance(record, tuple):
        return tuple(_resized(member, length, to) for member in record)
    if not length or _size(record) != length:
        return record
    again = np.arange(to) % length
    return [record[i] for i in again] if isinstance(record, list) else record[again]
