"""Code that is called again and again with one thing -> an error if it gives something else: it keeps a state.

Reading, collating and losses are functions of one record and of random numbers from the global generators. What counts
calls, goes round a list, or draws from a generator of its own gives a record something else when others were drawn
before it. Then removing one record changes what all records after it give, and the sum moves by several clip norms.
"""

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch.utils.data import Subset

from hf_dp.errors import ConfigError, SelfCheckError
from hf_dp.per_example import State, same
from hf_dp.randomness import fork_forward_rng
from hf_dp.sampling.copies import Answers, in_a_copy
from hf_dp.sampling.own_generators import REMEDY as GENERATOR_REMEDY
from hf_dp.sampling.own_generators import own_generators
from hf_dp.sampling.reading import Records, is_plain_table, read_records

Given = TypeVar("Given")
RECORDS = 8  # of a data set, that are read
CALLS = 7  # one after another, with one thing; then one call more after those with all others
REMEDY = (
    "it keeps something from one call to the next, such as a counter, an iterator, a growing vocabulary or a random "
    "generator of its own, so what it makes of one record depends on which others were drawn before. Make it a "
    "function of its record alone; random numbers come from torch's, numpy's or Python's global generator, which hf_dp "
    "runs under secret states"
)


def refuse_what_remembers(
    what: str,
    call: Callable[[Given], Any],
    things: Sequence[Given],
    devices: Iterable[torch.device | str] = (),
    alike: Callable[[Any, Any], bool] | None = None,
    holder: object = None,
) -> None:
    """Calls with all things in two orders, the first in a copy of the process; with each thing several times, under the
    same random states each time, and once more after all the others; then, from the state that the code had before,
    with each thing alone and after the others.

    Args:
        what: is called, for the message.
        call: may draw from the global generators.
        things: public ones, or such whose results the message does not tell.
        devices: whose generators it draws from besides the CPU's.
        alike: whether two results are the same; without it, everything that has an equality of its own is compared.
        holder: the function, or object, whose code is called, if it is a user's.

    Raises:
        ConfigError: two results for one thing differ.
    """
    memory = State.of(holder, what)
    alike, devices = alike or partial(same, opaque=True), list(devices)

    def once(thing: Given) -> Any:
        with fork_forward_rng(devices, seed=0):
            return copy.deepcopy(call(thing))

    try:
        copied = in_a_copy(once, things) if holder is not None and _can_be_copied(devices) else None
        first: list[Any] = []
        for thing in reversed(things):
            results = [once(thing) for _ in range(CALLS)]
            if not all(alike(results[0], other) for other in results[1:]):
                raise ConfigError(f"{what} gives something else each time for the same record: {REMEDY}")
            first.insert(0, results[0])
        if copied is not None:
            _refuse_another_order(what, copied, first, alike)
        if not all(alike(result, once(thing)) for thing, result in zip(things, first, strict=True)):
            raise ConfigError(f"{what} gives something else for a record after others: {REMEDY}")
        if copied is None and holder is not None:
            _refuse_what_the_first_call_decides(what, once, things, alike, memory)
    finally:
        with suppress(SelfCheckError):
            memory.put_back()


def _can_be_copied(devices: Sequence[torch.device | str]) -> bool:
    """Whether a copy of the process can make the calls: it has no accelerator, and other processes do not know it, so a
    model whose processes wait for each other would wait for ever.
    """
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return not devices or (alone and all(torch.device(device).type == "cpu" for device in devices))


def _refuse_another_order(what: str, copied: Answers, backward: list[Any], alike: Callable[[Any, Any], bool]) -> None:
    """Wherever the code keeps what it keeps: a copy of the process begins with all of it as it is."""
    if copied.files:
        raise ConfigError(
            f"{what} reads and writes {', '.join(copied.files)}, so what it makes of one record may depend on which "
            "others came before: fill the file before training, and open it for reading alone"
        )
    if not all(alike(a, b) for a, b in zip(copied.results, backward, strict=True)):
        raise ConfigError(f"{what} gives something else for a record after others: {REMEDY}")


def _refuse_what_the_first_call_decides(
    what: str,
    once: Callable[[Given], Any],
    things: Sequence[Given],
    alike: Callable[[Any, Any], bool],
    memory: State,
) -> None:
    """As a vocabulary does that grows with the words it meets, or a mean that is taken of the first record."""
    try:
        alone = [_from_the_beginning(memory, once, [thing]) for thing in things]
        for number, expected in enumerate(alone):
            others = [*things[:number], *things[number + 1 :]]
            if others and not alike(expected, _from_the_beginning(memory, once, [*others, things[number]])):
                raise ConfigError(f"{what} gives something else for a record after others: {REMEDY}")
    except SelfCheckError as error:
        raise ConfigError(f"{what}: {error}") from None


def _from_the_beginning(memory: State, once: Callable[[Given], Any], things: Sequence[Given]) -> Any:
    """What the last call gives."""
    memory.put_back()
    return [once(thing) for thing in things][-1]


def refuse_data_that_remember(dataset: Records, collate: object) -> None:
    """Refuses a data set or collator with a random generator of its own, and a data set that gives a record differently
    when it is read again. What a collator gives is compared on made-up records, see `Collation`.

    Raises:
        ConfigError: naming the generators; nothing of a record is told.
    """
    if kept := own_generators(collate, "the collator") + own_generators(dataset, "the data set"):
        raise ConfigError(f"random generators of its own in {', '.join(kept)}: {GENERATOR_REMEDY}")
    if not is_plain_table(dataset):
        # others each time: what was kept of some outside of the process, such as in a file, would look as it should
        indices = random.SystemRandom().sample(range(len(dataset)), min(RECORDS, len(dataset)))
        read = partial(_read_if_possible, dataset)
        refuse_what_remembers("the data set", read, indices, holder=code_of(dataset))


def code_of(dataset: Records) -> object:
    """What of a data set is a user's: the transform of a table, or the data set itself."""
    while isinstance(dataset, Subset) and type(dataset) is Subset:
        dataset = cast(Records, dataset.dataset)
    return getattr(dataset, "_format_kwargs", dataset)


def _read_if_possible(dataset: Records, index: int) -> Any:
    """A record; None if it cannot be read, which the step that draws it tells."""
    try:
        return read_records(dataset, [index])
    except Exception:
        return None
