"""A trainer's records -> an error if one of them would end the training in a step, before the first step.

Labels, lengths and types of all records are looked at in one pass, over the columns that matter. What looks wrong is
then tried: a few such records are collated, each by itself, and brought to their loss. The training is refused only
if that fails, because a collator or a loss of the user's own may well take what looks wrong here. How many such
records there are, and which, is printed on the screen alone: an error's message is logged, and sent to trackers.

A record without tokens is not wrong: it counts, and contributes nothing.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from hf_dp.errors import ConfigError
from hf_dp.per_example import IGNORED, Leaf, Record, State, longest_taken, losses, state_put_back, undisturbed
from hf_dp.randomness import fork_forward_rng
from hf_dp.sampling import Records
from hf_dp.training.host import PrivateTrainer
from hf_dp.training.objective import as_in_training
from hf_dp.training.shapes import NO_TARGET, OTHER_SHAPE, SHORT, Shapes, is_list, shape_of

TOKENS, LABELS = "input_ids", ("labels", "label", "label_ids")
OF_PAIRS = ("prompt_ids", "chosen_ids", "rejected_ids")  # tokens, too
AS_LONG = ("attention_mask", "token_type_ids", "labels")  # as the tokens
ROWS = 4_096  # of one Arrow batch
TRANSFORMED = 256  # records of a table whose transform makes them on the fly: as many as are looked at
TRIED = 3  # records of each problem
SHOWN = 10  # row numbers of each problem
FIRST = 100  # records, for one of which others can be made up

MISSING, OUTSIDE, TEXTS, OTHER_TYPE = "missing (None)", "out of range", "texts", "of another type than in other records"
OTHER_LENGTH, TOO_LONG, UNREAD = (
    "of another length than the tokens",
    "longer than the model's positions",
    "not readable",
)
VAGUE = (OTHER_LENGTH, SHORT)  # most records of which this can be said are fine
REMEDIES = {
    MISSING: "fill them in, or leave these records out (dataset.filter)",
    TEXTS: "make numbers of them (for classes, dataset.class_encode_column)",
    OTHER_TYPE: "give all records one type, as datasets.Dataset.from_list does",
    OTHER_LENGTH: "make them as long as the tokens, or leave these records out (dataset.filter)",
    OTHER_SHAPE: "bring all records to one shape, or leave these out (dataset.filter)",
    SHORT: "leave such records out (dataset.filter)",
    NO_TARGET: "leave these records out (dataset.filter)",
    UNREAD: "mend them, or leave these records out",
}


class Limits(NamedTuple):
    """What a record must keep to: whole numbers of a column below `below[name]`, at most `positions` tokens."""

    below: dict[str, int]
    positions: int | None


class Problem(NamedTuple):
    """A column, and what is wrong with it."""

    column: str
    what: str


def refuse_unusable_records(trainer: PrivateTrainer) -> None:
    """Looks through the training set of a trainer whose objective is chosen.

    A `datasets.Dataset` without a transform is read as Arrow; of one with a transform, the first records are read. Any
    other data set is read record by record, as for its fingerprint.

    Raises:
        ConfigError: records that can't be trained on; names the columns and the remedies.
    """
    dataset, limits = trainer._columns_for_model()[0], _limits(trainer)
    found: dict[Problem, list[int]] = {}
    with fork_forward_rng(seed=0):
        for row, problem in _problems(dataset, limits, (*LABELS, *trainer.label_names)):
            found.setdefault(problem, []).append(row)
        failing = {p: [row for row in rows[:TRIED] if _fails(trainer, dataset, row)] for p, rows in found.items()}
    explained = {row for p, rows in failing.items() if p.what not in VAGUE for row in rows}
    failing = {p: rows if p.what not in VAGUE else [*set(rows) - explained] for p, rows in failing.items()}
    wrong = {p: rows if p.what == SHORT else found[p] for p, rows in failing.items() if rows}
    if not wrong:
        return
    if trainer.is_world_process_zero():
        for (column, what), rows in wrong.items():
            shown = ", ".join(map(str, rows[:SHOWN])) + (", ..." if len(rows) > SHOWN else "")
            print(f"{column}: {len(rows):,} {what}: rows {shown}", file=sys.stderr)
    told = "; ".join(f"{column} {what}: {_remedy(what, column, limits)}" for column, what in wrong)
    raise ConfigError(
        f"the training set has records that would end the training in the step that draws them ({told}). How many they "
        "are, and which, was printed on the screen"
    )


def complete_record(dataset: Records) -> Record:
    """Of the first records the first with the fewest empty or missing values: one of which others can be made up."""
    best, fewest = dataset[0], math.inf
    for row in range(min(FIRST, len(dataset))):
        record = dataset[row]
        missing = sum(map(_is_missing, record.values())) if isinstance(record, dict) else 0
        if missing < fewest:
            best, fewest = record, missing
        if not missing:
            break
    return best


def _is_missing(value: Leaf) -> bool:
    shape = shape_of(value)
    return value is None or (shape is not None and 0 in shape)


def _limits(trainer: PrivateTrainer) -> Limits:
    base = trainer._base_model()
    config = getattr(base, "config", None)
    if config is None:
        return Limits({}, None)
    tokens, labels = losses.public_sizes(type(base).__name__, config)
    with suppress(AttributeError, NotImplementedError):  # such as of a model of pictures
        tokens = cast(Any, base).get_input_embeddings().num_embeddings
    below = dict.fromkeys((TOKENS, *OF_PAIRS), tokens)
    if trainer.objective.kind != "regression":
        below |= dict.fromkeys(LABELS, labels)
    return Limits(below, longest_taken(base))


def _remedy(what: str, column: str, limits: Limits) -> str:
    if what == TOO_LONG:
        how = (
            f"max_length={limits.positions}"
            if column in OF_PAIRS
            else f"truncation=True, max_length={limits.positions}"
        )
        return f"truncate the records to {limits.positions} tokens ({how})"
    if what != OUTSIDE:
        return REMEDIES[what]
    highest = limits.below[column] - 1
    if column in (TOKENS, *OF_PAIRS):
        known = f"the model knows the tokens 0 to {highest}"
        return f"{known}; use its own tokenizer, or model.resize_token_embeddings(len(tokenizer))"
    return f"number them from 0 to {highest} ({IGNORED} is no target), or load the model with num_labels=..."


# ---- looking ---------------------------------------------------------------------------------------------------------


def _problems(dataset: Records, limits: Limits, labels: Sequence[str]) -> Iterator[tuple[int, Problem]]:
    names = dict.fromkeys((TOKENS, *OF_PAIRS, *AS_LONG, *labels))
    kinds: dict[str, dict[Any, list[int]]] = {}
    shapes = Shapes()
    if _is_table(dataset):
        shapes.add_table(cast(datasets.Dataset, dataset))
    for first, records in _suspicious(dataset, [*names], limits):
        for row, record in enumerate(records, first):
            if record is UNREAD:
                yield row, Problem("record", UNREAD)
            elif isinstance(record, dict):
                seen = {name: _seen(record[name], limits.below.get(name)) for name in names if name in record}
                for name, one in seen.items():
                    if one.types and not one.types & {type(None), str}:
                        kinds.setdefault(name, {}).setdefault((one.depth, one.types), []).append(row)
                yield from ((row, problem) for problem in _of_record(record, seen, limits))
                if not _is_table(dataset) or TOKENS in record:
                    shapes.add(row, {name: shape_of(value) for name, value in record.items()})
    yield from ((row, Problem(column, what)) for row, column, what in shapes.odd())
    for name, rows_of in kinds.items():
        usual = max(rows_of.values(), key=len)
        yield from ((row, Problem(name, OTHER_TYPE)) for rows in rows_of.values() if rows is not usual for row in rows)


def _is_table(dataset: Records) -> bool:
    """Whether Arrow has the records as the training reads them."""
    return isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"


def _suspicious(dataset: Records, names: list[str], limits: Limits) -> Iterator[tuple[int, Iterable[Leaf]]]:
    """Records with the number of the first, but for batches of a table in which nothing is wrong."""
    if not isinstance(dataset, datasets.Dataset):
        yield from ((row, [_read(dataset, row)]) for row in range(len(dataset)))
        return
    if dataset.format["type"] == "custom":
        yield from ((row, [_read(dataset, row)]) for row in range(min(TRANSFORMED, len(dataset))))
        return
    there = [name for name in names if name in dataset.column_names]
    if not there:
        return
    for number, table in enumerate(dataset.select_columns(there).with_format("arrow").iter(ROWS)):
        if not _is_clean(table, limits):
            yield number * ROWS, table.to_pylist()


def _read(dataset: Records, row: int) -> Record:
    try:
        return dataset[row]
    except Exception:  # of whatever kind; what it says may quote the record
        return UNREAD


def _is_clean(table: pa.Table, limits: Limits) -> bool:
    """Whether a batch of a table, whose columns have one type each, has no problem."""
    lengths = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if column.null_count or pa.types.is_string(column.type):
            return False
        if is_list(column.type):
            lengths[name] = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        while is_list(column.type):
            column = column.flatten()
        if column.null_count:
            return False
        below = limits.below.get(name) if pa.types.is_integer(column.type) else None
        if below is not None and not _inside(column.to_numpy(zero_copy_only=False), below):
            return False
    tokens = lengths.get(TOKENS, np.zeros(0))
    if limits.positions is not None and any(
        len(each) and each.max() > limits.positions for _, each in _longest(lengths)
    ):
        return False
    return all(np.array_equal(tokens, lengths[name]) for name in AS_LONG if TOKENS in lengths and name in lengths)


def _inside(values: Leaf, below: int) -> bool:
    return bool((((values >= 0) & (values < below)) | (values == IGNORED)).all())


class Seen(NamedTuple):
    """Of a value: how deep its lists are, the types in them, and whether its whole numbers keep to their limit."""

    depth: int
    types: frozenset[type]
    inside: bool


def _seen(value: Leaf, below: int | None) -> Seen:
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        kind = _type_of(value.dtype)
        inside = below is None or kind is not int or _inside(value, below)
        return Seen(value.ndim, frozenset([kind] if math.prod(value.shape) else []), inside)
    if not isinstance(value, (list, tuple)):
        inside = below is None or type(value) is not int or 0 <= value < below or value == IGNORED
        return Seen(0, frozenset([type(value)]), inside)
    types = frozenset(map(type, value))
    if types <= {int}:
        return Seen(1, types, below is None or _inside(np.asarray(value), below))
    members = [_seen(member, below) for member in value]
    types = frozenset().union(*(m.types for m in members))
    return Seen(1 + max(m.depth for m in members), types, all(m.inside for m in members))


def _type_of(dtype: Any) -> type:
    if isinstance(dtype, torch.dtype):
        return float if dtype.is_floating_point else bool if dtype == torch.bool else int
    return {"f": float, "i": int, "u": int, "b": bool, "U": str}.get(dtype.kind, object)


def _of_record(record: dict[str, Leaf], seen: dict[str, Seen], limits: Limits) -> Iterator[Problem]:
    for name, one in seen.items():
        if type(None) in one.types:
            yield Problem(name, MISSING)
        elif str in one.types:
            yield Problem(name, TEXTS)
        elif not one.inside:
            yield Problem(name, OUTSIDE)
    lengths = {name: length for name in seen if (length := _length(record[name])) is not None}
    for name, length in _longest(lengths):
        if limits.positions is not None and length > limits.positions:
            yield Problem(name, TOO_LONG)
    tokens = lengths.get(TOKENS)
    if tokens is None:
        return
    for name in AS_LONG:
        if lengths.get(name, tokens) != tokens:
            yield Problem(name, OTHER_LENGTH)


def _longest(lengths: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """How many tokens a model meets at a time: those of a text, or of a prompt and one of its two answers.

    Args:
        lengths: by column; numbers, or arrays of one number a record.
    """
    if TOKENS in lengths:
        yield TOKENS, lengths[TOKENS]
    prompt, *answers = OF_PAIRS
    yield from ((name, lengths[name] + lengths.get(prompt, 0)) for name in answers if name in lengths)


def _length(value: Leaf) -> int | None:
    """Of a sequence; None where it is none."""
    if isinstance(value, (Tensor, np.ndarray)):
        return len(value) if value.ndim else None
    return len(value) if isinstance(value, (list, tuple)) else None


# ---- trying ----------------------------------------------------------------------------------------------------------


def _fails(trainer: PrivateTrainer, dataset: Records, row: int) -> bool:
    """Whether a record, collated by itself, does not come to a loss. Model and random numbers stay as they were."""
    below, model, on_cpu = _limits(trainer).below, trainer.model, trainer.args.device.type == "cpu"
    try:
        state = State(model, trainer.private_step.passes.copied)
        for batch in trainer._collation().alone([dataset[row]]):
            if not on_cpu and any(_is_outside(batch.get(name), below.get(name)) for name in (TOKENS, "labels")):
                return True  # an accelerator is of no use after a look-up out of range
            with as_in_training(trainer), undisturbed(model), state_put_back(model, state), torch.no_grad():
                trainer.example_losses(model, batch.mapped(trainer._prepare_inputs)).tolist()
    except torch.OutOfMemoryError:
        return False
    except Exception:  # of whatever kind: what it says may quote the record
        return True
    return False


def _is_outside(values: Leaf, below: int | None) -> bool:
    if below is None or not isinstance(values, Tensor) or values.is_floating_point():
        return False
    return not _inside(values, below)
