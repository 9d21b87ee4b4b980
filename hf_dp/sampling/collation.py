"""A collator and made-up records -> micro-batches in which no record has a part in another's row.

Each record is collated by itself, and what comes is filled up and stacked: whatever a collator does with the records of a batch (mixes
them, cuts them into windows, normalises over the padding, drops one), it only ever sees one. How it fills up is learnt from public,
made-up records. Where stacking does not give what the collator makes of them together, each record has a pass of its own.

The padding collators of transformers, trl and torch get several records at once, which is faster, as long as all of these have the same
columns of the same types, and if on the made-up records that came to the same.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate
from transformers import default_data_collator

from hf_dp.errors import CaptureError, ConfigError, HfDpError
from hf_dp.per_example import (
    LEFT,
    RIGHT,
    Batch,
    MicroBatch,
    Padding,
    Path,
    Untied,
    is_tied,
    leaves,
    pad_and_join,
    same,
    stacked,
)
from hf_dp.randomness import fork_forward_rng
from hf_dp.sampling.microbatch import INPUTS, unpacked

Collate = Callable[[list[Any]], Any]
KNOWN = (
    "DataCollatorWithPadding DataCollatorForLanguageModeling DataCollatorForSeq2Seq DataCollatorForTokenClassification "
    "DefaultDataCollator"
).split()
SHIPPED_BY = ("transformers", "trl")
WHY_ROWS = (
    "clipping bounds what one record adds, so it must be one row. Cut the records before training (datasets.map), let "
    "PrivacyConfig(unit_column=...) name the record that each piece came from, and have the collator make one row of each"
)

OF_CHECKS = "made up for the checks, or given as check_records"
PASS_RECORDS = "pass check_records=[...], a few public records of different lengths that it takes"

TEXTS = "its label is a text; make numbers of labels (for classes, dataset.class_encode_column)"


class Collation:
    """Makes micro-batches of groups of records.

    Args:
        collate: a list of records -> a mapping, or a tuple, of tensors.
        made_up: public records on which it is tried; if all are of one length, shorter copies too, where it takes them.

    Attributes:
        apart: why each record has a pass of its own; None where they don't.
        tried: the records on which it was tried.

    Raises:
        ConfigError: the collator fails on the made-up records, or makes another number of rows than one of one of them.
    """

    def __init__(self, collate: Collate, made_up: Sequence[Any]) -> None:
        self._collate = collate
        self._paddings: dict[Path, Padding] = {}
        with fork_forward_rng():
            self.tried, alone, again, together = _tried(collate, made_up)
        self.apart = self._learn(alone, again, together)
        self._takes_several = self.apart is None and _is_known(collate)

    def __call__(self, records: list[Any]) -> list[MicroBatch]:
        """One micro-batch of these records, `packed` or not, or one for each. A record without a single token has no part in any.

        Raises:
            CaptureError: the collator makes several rows of a record, or none; nothing of it is told.
        """
        if self._takes_several and len(records) > 1 and _alike(records):
            batch = as_mapping(self._collate([unpacked(record) for record in records]))
            if not is_tied(batch, len(records)):
                raise CaptureError(f"the collator did not make one row of each record: {WHY_ROWS}")
            return [MicroBatch(batch, len(records))]
        alone = self.alone(records)
        if self.apart is None and alone:
            try:
                return [stacked(alone, self._paddings)]
            except Untied:
                pass
        return alone

    def alone(self, records: list[Any]) -> list[MicroBatch]:
        """A micro-batch for each record that has tokens; raises as a call does."""
        made = (as_mapping(self._collate([unpacked(record)])) for record in records)
        alone = [MicroBatch(batch, 1) for batch in made if not is_empty(batch)]
        for batch in alone:
            _refuse_other_rows(batch, CaptureError)
        return alone

    def together_and_alone(self, records: list[Any]) -> list[MicroBatch]:
        """What checks compare, drawn once: all records in one micro-batch, if they ever are, else the first; then each alone."""
        alone = self.alone(copy.deepcopy(records))
        try:
            whole = alone[0] if self.apart is not None else stacked(alone, self._paddings)
        except Untied:
            whole = alone[0]
        return [whole, *alone]

    def _learn(self, alone: list[Batch], again: list[Batch], together: Batch) -> str | None:
        """Paddings; and why they don't do, if so. What a collator draws is compared by what it is filled up with alone."""
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
            return "what the collator makes of one record does not stack"
        if any(not same(made.get(path), leaf) for path, leaf in whole.items() if path not in drawn):
            return "the collator makes something else of several records than of each alone"
        return None


@contextmanager
def taken_by_the_model() -> Iterator[None]:
    """Around checks: an error of the model's or the loss's own, on made-up records, becomes one that says what to do.

    Raises:
        ConfigError: instead of it.
    """
    try:
        yield
    except (HfDpError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ConfigError(
            f"the model or its loss failed on records {OF_CHECKS} ({_said(error)}): {PASS_RECORDS}"
        ) from error


def as_mapping(batch: Any) -> Batch:
    """What a collator returned, by name; the members of a tuple are named 0, 1, ..."""
    if isinstance(batch, Mapping):
        return dict(batch)
    return {str(i): member for i, member in enumerate(batch if isinstance(batch, (tuple, list)) else [batch])}


def is_empty(batch: Batch) -> bool:
    """Whether there is nothing of a record to train on: not a single token, or, where it is no text, no number; or no batch at all."""
    inputs = [batch[name] for name in ("input_ids", *INPUTS) if isinstance(batch.get(name), Tensor)]
    return not batch or (bool(inputs) and not inputs[0].numel())


def several_lengths(records: Sequence[Any]) -> list[Any]:
    """The records; and, if all are of one length, shorter copies of the first: padding can't be seen otherwise."""
    lengths = [_length(record) for record in records]
    if len(set(lengths)) > 1 or not lengths or lengths[0] < 2:
        return list(records)
    return [*records, _cut(records[0], lengths[0], lengths[0] // 2), _cut(records[0], lengths[0], 1)]


def _tried(collate: Collate, made_up: Sequence[Any]) -> tuple[list[Any], list[Batch], list[Batch], Batch]:
    """The records that have tokens, each alone, once more, and all of them together: of several lengths, where that can be collated."""
    for records in (several_lengths(made_up), list(made_up)):
        last = len(records) == len(made_up)
        try:
            alone, again = ([as_mapping(collate([copy.deepcopy(r)])) for r in records] for _ in range(2))
        except Exception as error:
            if not last:
                continue
            remedy = TEXTS if any(map(_has_text_for_label, records)) else PASS_RECORDS
            raise ConfigError(f"the collator failed on a record {OF_CHECKS} ({_said(error)}): {remedy}") from error
        for batch in alone:
            _refuse_other_rows(batch, ConfigError)
        kept = [i for i, batch in enumerate(alone) if not is_empty(batch)]
        if not kept:
            raise ConfigError(f"the collator makes nothing of the records {OF_CHECKS}: {PASS_RECORDS}")
        records, alone, again = ([those[i] for i in kept] for those in (records, alone, again))
        try:
            return records, alone, again, as_mapping(collate(copy.deepcopy(records)))
        except Exception:  # the shorter ones don't go with the others; or it takes one record at a time
            if last:
                return records, alone, again, {}
    raise AssertionError("the records as they are come last")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def _refuse_other_rows(batch: Batch, error: type[Exception]) -> None:
    """Of one record: where its labels have another number of rows than one, so has it."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() and len(labels) != 1:
        raise error(f"the collator made {'several rows' if len(labels) else 'no row'} of one record: {WHY_ROWS}")


def _has_text_for_label(record: Any) -> bool:
    return isinstance(record, Mapping) and any(isinstance(record.get(name), str) for name in ("labels", "label"))


def _padding(whole: Any, parts: list[Any], *, is_drawn: bool) -> Padding | None:
    """How the parts were filled up in the whole; None where they were not, or where no constant on one side does it."""
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


def _is_known(collate: Any) -> bool:
    """Whether it is a padding collator that is known to make each row of one record; inside Trainer's own wrapper too."""
    if type(collate).__name__ == "RemoveColumnsCollator":
        collate = collate.data_collator
    if collate is default_collate or collate is default_data_collator:
        return True
    shipped = type(collate).__module__.partition(".")[0] in SHIPPED_BY and type(collate).__name__ in KNOWN
    return shipped and not vars(collate).get("mlm", False)


def _alike(records: list[Any]) -> bool:
    """Whether the records have the same columns of the same types: else one could decide what becomes of another's."""
    kinds = {_kind(record) for record in records}
    return len(kinds) == 1 and None not in kinds


def _kind(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((name, _kind_of_leaf(member)) for name, member in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(map(_kind_of_leaf, value))
    return _kind_of_leaf(value)


def _kind_of_leaf(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        types = frozenset(map(type, value))
        return (list, frozenset(map(_kind_of_leaf, value))) if types & {list, tuple, dict} else (list, types)
    if isinstance(value, Mapping):
        return _kind(value)
    return (type(value), value.dtype, value.ndim) if isinstance(value, (Tensor, np.ndarray)) else type(value)


def _length(record: Any) -> int:
    members = (
        record.values() if isinstance(record, Mapping) else record if isinstance(record, (tuple, list)) else [record]
    )
    named = record.get("input_ids") if isinstance(record, Mapping) else None
    return len(named) if named is not None else max((_size(m) for m in members), default=0)


def _size(value: Any) -> int:
    if isinstance(value, (Tensor, np.ndarray)):
        return len(value) if value.ndim == 1 else 0
    return len(value) if isinstance(value, list) else 0


def _cut(record: Any, length: int, to: int) -> Any:
    """A record whose sequences of that length are cut."""
    if isinstance(record, Mapping):
        return {name: _cut(member, length, to) for name, member in record.items()}
    if isinstance(record, tuple):
        return tuple(_cut(member, length, to) for member in record)
    return record[:to] if _size(record) == length else record
